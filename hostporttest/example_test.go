package hostporttest_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"

	v1 "k8s.io/api/core/v1"

	"github.com/cri-o/hostport"
	"github.com/cri-o/hostport/hostporttest"
)

// web is a pod that wants port 8080 of the node.
func web() *hostport.PodPortMapping {
	return &hostport.PodPortMapping{
		Namespace:    "default",
		Name:         "web",
		IP:           net.ParseIP("10.88.0.2"),
		PortMappings: []*hostport.PortMapping{{HostPort: 8080, ContainerPort: 80}},
	}
}

// A runtime restarts: its second manager finds the rows of the first one, and learns from
// Sync whose they are.
func ExampleNode_Option() {
	var node hostporttest.Node

	before, err := hostport.New(node.Option())
	if err != nil {
		fmt.Println(err)

		return
	}

	fmt.Println(before.Add("sandbox-1", web(), ""), before.Close())

	manager, err := hostport.New(node.Option())
	if err != nil {
		fmt.Println(err)

		return
	}

	defer func() { _ = manager.Close() }()

	show := func() {
		for _, m := range manager.Mappings() {
			fmt.Printf("%s %s:%d of %q %s\n", m.Protocol, m.HostIP, m.HostPort, m.PodID, m.PodIDHash)
		}
	}

	show()
	fmt.Println(manager.Sync(context.Background(), map[string][]*hostport.PodPortMapping{"sandbox-1": {web()}}))
	show()
	// Output:
	// <nil> <nil>
	// TCP 0.0.0.0:8080 of "" Y6CVKG3Y5AJB4DTP
	// <nil>
	// TCP 0.0.0.0:8080 of "sandbox-1" Y6CVKG3Y5AJB4DTP
}

// Another process has the port that a pod wants.
func ExampleNode_Occupy() {
	var node hostporttest.Node

	manager := hostport.NewMetaHostportManager(node.Option())

	free, err := node.Occupy(v1.ProtocolTCP, netip.MustParseAddrPort("[::]:8080"))
	if err != nil {
		fmt.Println(err)

		return
	}

	fmt.Println(errors.Is(manager.Add("sandbox-1", web(), ""), syscall.EADDRINUSE))
	free()
	fmt.Println(manager.Add("sandbox-1", web(), ""))
	// Output:
	// true
	// <nil>
}

// Somebody flushes the rules. Add again puts back what is missing.
func ExampleNode_Wipe() {
	var node hostporttest.Node

	manager, err := hostport.New(node.Option())
	if err != nil {
		fmt.Println(err)

		return
	}

	defer func() { _ = manager.Close() }()

	fmt.Println(manager.Add("sandbox-1", web(), ""))
	node.Wipe()
	fmt.Println(manager.Check(context.Background(), "sandbox-1", web()))
	fmt.Println(manager.Add("sandbox-1", web(), ""))
	fmt.Println(manager.Check(context.Background(), "sandbox-1", web()))
	// Output:
	// <nil>
	// host ports of pod default/web: host port TCP 0.0.0.0:8080 -> 10.88.0.2:80 is missing
	// <nil>
	// <nil>
}
