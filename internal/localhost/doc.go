// Package localhost has the sysctls with which the node itself, and others, reach pods:
// route_localnet and forwarding. It knows nothing of the rules that guard them.
package localhost
