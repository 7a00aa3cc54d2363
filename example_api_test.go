package hostport_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/cri-o/hostport"
	"github.com/cri-o/hostport/hostporttest"
)

// A network stop of a runtime has its own time limit.
func ExampleManager_RemoveContext() {
	manager := newManager()

	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()

	fmt.Println(manager.AddContext(ctx, "sandbox-1", web(), ""))
	fmt.Println(manager.RemoveContext(ctx, "sandbox-1", nil))
	// Output:
	// <nil>
	// <nil>
}

// At its start a runtime says which pods run. One that cannot have its port does not keep the
// others from theirs.
func ExampleManager_Sync() {
	manager := newManager()

	err := manager.Sync(context.Background(), map[string][]*hostport.PodPortMapping{
		"sandbox-1": {web()},
		"sandbox-2": {{Name: "other", IP: net.ParseIP("10.88.0.3"), PortMappings: web().PortMappings}},
	})

	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		for _, err := range joined.Unwrap() {
			if pod := (*hostport.PodError)(nil); errors.As(err, &pod) {
				fmt.Println(pod.ID, "lacks a port; rows:", len(manager.Mappings()))
			}
		}
	}
	// Output: sandbox-2 lacks a port; rows: 1
}

// Check says what is missing of a pod, here after somebody has wiped the rules.
func ExampleManager_Check() {
	var node hostporttest.Node

	manager, err := hostport.New(node.Option())
	if err != nil {
		fmt.Println(err)

		return
	}

	fmt.Println(manager.Add("sandbox-1", web(), ""))
	node.Wipe()

	missing := (*hostport.MissingError)(nil)
	if errors.As(manager.Check(context.Background(), "sandbox-1", web()), &missing) {
		fmt.Println(missing.Pod, len(missing.Rows), len(missing.Sockets), missing.Rules)
	}
	// Output:
	// <nil>
	// default/web 0 0 [host port TCP 0.0.0.0:8080 -> 10.88.0.2:80 is missing]
}

// A readiness probe of the runtime looks at both families.
func ExampleManager_Status() {
	manager := newManager()

	if err := manager.Add("sandbox-1", web(), ""); err != nil {
		fmt.Println(err)
	}

	for _, s := range manager.Status() {
		fmt.Printf("IPv%s: %s, %d rows, %d not held, %v\n", s.Family, s.Health, s.Rows, s.Unheld, s.Err)
	}
	// Output:
	// IPv4: in sync, 1 rows, 0 not held, <nil>
	// IPv6: in sync, 0 rows, 0 not held, <nil>
}

// A tool looks at the node of a runtime that has crashed.
func ExampleList() {
	var node hostporttest.Node

	manager, err := hostport.New(node.Option())
	if err != nil {
		fmt.Println(err)

		return
	}

	fmt.Println(manager.Add("sandbox-1", web(), ""), manager.Close())

	list, err := hostport.List(context.Background(), node.Option())
	for _, m := range list {
		fmt.Printf("%s %s:%d -> %s:%d of %s\n", m.Protocol, m.HostIP, m.HostPort, m.PodIP, m.ContainerPort, m.PodIDHash)
	}

	fmt.Println(err)
	// Output:
	// <nil> <nil>
	// TCP 0.0.0.0:8080 -> 10.88.0.2:80 of Y6CVKG3Y5AJB4DTP
	// <nil>
}
