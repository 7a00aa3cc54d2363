// Package probe asks a port of the node as a machine outside it would. It knows nothing of rules
// and needs CAP_NET_ADMIN alone. It works on Linux only and is empty elsewhere.
package probe
