// Package nftables carries rows in a table of nf_tables: its layout, a look at it, the difference,
// and the transaction. It knows nothing of iptables, nor of sockets. Of a row's owner it knows the mark in the kernel.
package nftables
