// Command sandbox is a container runtime in miniature, and the demo of package
// hostport. In network namespaces of its own it builds a client, a node and two
// pods behind the node's bridge, and does what a runtime does: it adds the host
// ports of its sandboxes when they start and removes them when they end.
//
// In between it sends TCP and UDP through them and prints what was asked, which
// rule in the kernel carries it, who answered, which source address the pod saw
// and how long that took; then what happens when a pod asks for a port that is
// taken, and when another process does; and at the end what an operator sees of
// it all.
//
// Every row of its tables is checked. It exits with 1 when anything is not as it
// should be. Nothing has to be installed, but iptables for -backend iptables. It
// wants root, or namespaces in which it is root:
//
//	make demo
//	unshare -Urnm sh -c 'mount -t tmpfs none /run; go run ./examples/sandbox'
package main
