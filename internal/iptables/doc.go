// Package iptables carries rows in the tables of iptables(8): one model of a table, which emits
// lines, and the programs that commit them. It knows nothing of nftables, nor of sockets. Of a row's owner
// it knows the mark in the kernel.
package iptables
