// Package trace follows packets through the hooks of the node: which chains of nf_tables they
// pass, whoever's, which rule drops them, and how far they come where none does.
//
// A [Tracer] has a table of its own. One rule in it has packets traced; the other chains are
// empty and stand first and last in each hook, as milestones: a traced packet reports each of them that
// it passes. So it is seen, too, between which two of them a packet has ended that nf_tables
// did not drop, but routing or iptables-legacy did. The table is owned by a socket: the kernel
// deletes it when that is closed, however the process ends.
//
// It works on Linux only and is empty elsewhere.
package trace
