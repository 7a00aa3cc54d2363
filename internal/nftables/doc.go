// Package nftables carries rows in a table of nf_tables: its layout, a look at it, the difference,
// and the transaction. It knows nothing of iptables' rows, of owners or of sockets.
package nftables
