// Command cni-portmap is a CNI plugin that maps host ports with hostport: what it takes to use the
// library from a process that lives for one call. It is chained behind the plugin that gives the
// container its addresses, in the place of portmap, and reads what that reads:
//
//	{
//	  "cniVersion": "1.1.0", "name": "net1",
//	  "plugins": [
//	    {"type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true, "ipam": {…}},
//	    {"type": "cni-portmap", "capabilities": {"portMappings": true}}
//	  ]
//	}
//
// ADD puts in the rows of runtimeConfig.portMappings for the container's first address of each
// family, or nothing. DEL takes out all rows of the attachment. CHECK says what is missing.
// GC takes out the rows of all attachments of the network that are not valid any more, and none
// of another network. STATUS fails where host ports cannot be mapped.
//
// "backend" may be "nftables" or "iptables". Of portmap's other settings conditionsV4 and
// conditionsV6 are refused, as they limit who may come in, and the rest is ignored: only what
// would not come back otherwise is masqueraded.
//
// # Whose a row is
//
// The sandbox id that the library is given is network/interface/container: two attachments of one
// container are two. The library makes the hash that the kernel keeps so that the network can be
// told from it (hostport.WithScope), since GC is called for one network and nothing else
// remembers which rows are whose. There are no files of this plugin.
//
// # What a process of one call cannot do
//
// No port is held between calls: another process of the node can bind a port that is mapped, and
// will see no traffic. What others flush stays away until the next call that changes rows puts back
// what the kernel still has of them, and the container's next ADD the rest; CHECK tells. Two calls
// at once wait for each other, for 30 seconds. A runtime that keeps a hostport.Manager of its own
// on the node keeps the plugin out for as long as it runs.
package main
