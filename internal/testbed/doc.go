// Package testbed builds a small network out of network namespaces and sends
// real traffic through it, for this module's tests and its demo:
//
//	client ── host ── peer
//	           │
//	        bridge cni0
//	         │      │
//	        pod1   pod2 …
//
// The host is a Kubernetes node: it forwards, and its pods hang on a bridge
// whose ports have hairpin mode on, as CNI's bridge plugin sets it. The client
// reaches the node from outside; the peer is a machine behind the node, for
// traffic that the node forwards without being its destination. Everything has
// an IPv4 and an IPv6 address.
//
//	         IPv4           IPv6              device
//	client   192.0.2.2      2001:db8:1::2     eth0
//	host     192.0.2.1      2001:db8:1::1     eth0 (towards the client)
//	         192.0.2.11     2001:db8:1::11    eth0
//	         198.51.100.1   2001:db8:2::1     eth1 (towards the peer)
//	         10.88.0.1      fd00:10:88::1     cni0
//	peer     198.51.100.2   2001:db8:2::2     eth0
//	pods     10.88.0.2 …    fd00:10:88::2 …   eth0 (vethN in the host, N from 1)
//
// A namespace answers requests with [Namespace.Serve] and sends them with
// [Namespace.Ask]; the answer tells who gave it and which source address it
// saw, which is what a port mapping changes. A pod may be on a second bridge,
// cni1, as well: 10.89.0.0/16 and fd00:10:89::/64, host .1 and pod .2.
//
// The package executes no programs and needs CAP_SYS_ADMIN and CAP_NET_ADMIN,
// which an unprivileged user has in namespaces of its own (unshare -Urnm). The
// namespaces have no name in the file system: they vanish with [Bed.Close], or
// with the process. It works on Linux only and is empty elsewhere.
package testbed
