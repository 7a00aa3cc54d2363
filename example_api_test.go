package hostport_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"time"

	v1 "k8s.io/api/core/v1"

	"github.com/cri-o/hostport"
	"github.com/cri-o/hostport/hostporttest"
)

// A runtime makes one manager, says which pods run, and has it repair what others break for as
// long as the runtime lives.
func ExampleNew() {
	var node hostporttest.Node // a runtime has none, and calls hostport.New()

	manager, err := hostport.New(node.Option())
	if err != nil {
		fmt.Println(err) // neither IP family can work here, and why

		return
	}

	ctx, stop := context.WithCancel(context.Background())
	defer stop()

	err = manager.Sync(ctx, map[string][]*hostport.PodPortMapping{"sandbox-1": {web()}})
	if err != nil {
		fmt.Println(err) // each pod that lacks a port; the others have theirs
	}

	repaired := make(chan error, 1)
	go func() { repaired <- manager.Run(ctx) }()

	fmt.Println(manager.Remove("sandbox-1", nil))

	stop() // the runtime ends

	if err := <-repaired; !errors.Is(err, context.Canceled) {
		fmt.Println("nobody repairs host ports any more:", err)
	}

	fmt.Println(manager.Close()) // the ports are free for the next process; the rules stay
	// Output:
	// <nil>
	// <nil>
}

// The configuration of a runtime names a backend.
func ExampleWithBackend() {
	var node hostporttest.Node // it takes any backend; a runtime has none

	configured := "iptables" // or "nftables", or "auto", which is the default

	manager, err := hostport.New(node.Option(), hostport.WithBackend(hostport.Backend(configured)))
	if err != nil {
		fmt.Println(err) // such as that the kernel has no iptables

		return
	}

	fmt.Println(manager.Add("sandbox-1", web(), ""))
	// Output: <nil>
}

// What a runtime makes of the errors of Add.
func Example_errors() {
	var node hostporttest.Node

	manager, err := hostport.New(node.Option())
	if err != nil {
		fmt.Println(err)

		return
	}

	free, err := node.Occupy(v1.ProtocolTCP, netip.MustParseAddrPort("0.0.0.0:9090")) // a server of the node
	if err != nil {
		fmt.Println(err)

		return
	}
	defer free()

	fmt.Println(manager.Add("sandbox-1", web(), ""))

	for _, port := range []int32{8080, 9090, 70000} {
		err := manager.Add("sandbox-2", &hostport.PodPortMapping{
			Name: "other", IP: net.ParseIP("10.88.0.3"),
			PortMappings: []*hostport.PortMapping{{HostPort: port, ContainerPort: 80}},
		}, "")

		conflict := (*hostport.ConflictError)(nil)

		switch {
		case errors.As(err, &conflict):
			fmt.Println(port, "is a port of", conflict.OtherPod)
		case errors.Is(err, syscall.EADDRINUSE):
			fmt.Println(port, "is a port of another process")
		case errors.Is(err, hostport.ErrInvalidMapping):
			fmt.Println(port, "is no port")
		case errors.Is(err, hostport.ErrUnavailable):
			fmt.Println("the node lacks what the IP family takes:", err)
		default:
			fmt.Println("may work another time:", err) // context.DeadlineExceeded and what else the node may say
		}
	}
	// Output:
	// <nil>
	// 8080 is a port of default/web
	// 9090 is a port of another process
	// 70000 is no port
}

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

// After a restart a runtime knows that a pod runs, and not its IP. What the pod has stays.
func ExampleManager_Sync_unknownIP() {
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

	pod := web()
	pod.IP = nil

	fmt.Println(manager.Sync(context.Background(), map[string][]*hostport.PodPortMapping{"sandbox-1": {pod}}))

	for _, m := range manager.Mappings() {
		fmt.Println(m.PodID, m.HostPort, m.PodIP)
	}
	// Output:
	// <nil> <nil>
	// <nil>
	// sandbox-1 8080 10.88.0.2
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
