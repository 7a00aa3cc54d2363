// Package sysctl reads the kernel's switches below /proc/sys (proc(5)).
package sysctl
