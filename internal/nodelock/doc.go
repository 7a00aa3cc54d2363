// Package nodelock has one manager at a time work on the host ports of a network
// namespace.
//
// A lock is the binding of an NFLOG group to a netlink socket. The kernel gives a group of
// a network namespace to one socket at a time, and only with CAP_NET_ADMIN there, so that
// no unprivileged process can be in the way. It takes the group back when the socket is
// closed, however its process ends. The binding is in no ruleset and changes none: nothing
// is ever logged to these groups. It needs nfnetlink_log, which the kernel loads as a module.
//
// It works on Linux only and is empty elsewhere.
package nodelock
