// Package nodeaddr knows which addresses are the node's, now and as they come
// and go: those of type local in the routing table, which is what nf_tables
// (fib daddr type local) and iptables (addrtype --dst-type LOCAL) go by. An
// address may be local without any interface that has it (ip route add local).
//
// Two kinds of local addresses are not the node's here. Those that only the
// device kube-ipvs0 has belong to Services: kube-proxy puts them there in its
// IPVS mode. IPv6 link-local ones cannot be mapped, because the kernel does not
// forward packets that have one.
//
// The package works on Linux only and is empty elsewhere.
package nodeaddr
