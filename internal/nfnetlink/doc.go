// Package nfnetlink speaks nf_tables to the kernel over netlink, as far as a
// port mapper needs it: tables, chains, rules, sets and maps, their elements,
// and transactions that take effect as a whole, on condition that nobody else
// has changed the ruleset meanwhile. Beside that it lists and deletes flows that
// connection tracking knows, and binds NFLOG groups.
//
// It is thin: a [Table] makes messages, and a [Conn] has them carried out.
// Attributes and their values are those of linux/netfilter/nf_tables.h; what
// that header leaves to user space, the data types and the user data in which
// nft(8) finds comments, is nft's and libnftnl's.
//
// Needed are Linux 5.10, nf_tables and CAP_NET_ADMIN in the user namespace that
// owns the network namespace. It works on Linux only and is empty elsewhere.
package nfnetlink
