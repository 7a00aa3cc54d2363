package hostport_test

import (
	"net"

	"github.com/cri-o/hostport"
	"github.com/cri-o/hostport/hostporttest"
)

// newManager returns a manager whose node is in memory, so that the example runs
// anywhere, as any user. A runtime calls hostport.New, once.
func newManager() *hostport.Manager {
	manager, err := hostport.New((&hostporttest.Node{}).Option())
	if err != nil {
		panic(err) //nolint:forbidigo // a node in memory is always there
	}

	return manager
}

// web is a pod that wants port 8080 of the node.
func web() *hostport.PodPortMapping {
	return &hostport.PodPortMapping{
		Namespace: "default", Name: "web", IP: net.ParseIP("10.88.0.2"),
		PortMappings: []*hostport.PortMapping{{HostPort: 8080, ContainerPort: 80}},
	}
}
