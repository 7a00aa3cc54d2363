// Package iptables carries rows in the tables of iptables(8): one model of a table, which emits
// lines, and the programs that commit them. It knows nothing of nftables' rows, of owners or of sockets.
package iptables
