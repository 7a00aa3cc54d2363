package hostport_test

import (
	"errors"
	"fmt"
	"net"

	v1 "k8s.io/api/core/v1"

	"github.com/cri-o/hostport"
)

// A runtime maps a pod's ports at sandbox set-up, and takes them out at
// teardown. The second pod finds the port taken.
func Example() {
	// In a runtime this is hostport.New, once.
	manager := newManager()

	web := &hostport.PodPortMapping{
		Namespace: "default",
		Name:      "web",
		IP:        net.ParseIP("10.88.0.2"),
		PortMappings: []*hostport.PortMapping{
			{HostPort: 8080, ContainerPort: 80, Protocol: v1.ProtocolTCP},
			{HostPort: 5353, ContainerPort: 53, Protocol: v1.ProtocolUDP, HostIP: "192.0.2.1"},
		},
	}
	if err := manager.Add("sandbox-1", web, ""); err != nil {
		fmt.Println(err)
	}

	other := &hostport.PodPortMapping{
		Namespace:    "default",
		Name:         "other",
		IP:           net.ParseIP("10.88.0.3"),
		PortMappings: []*hostport.PortMapping{{HostPort: 8080, ContainerPort: 8080}},
	}

	conflict := (*hostport.ConflictError)(nil)
	if err := manager.Add("sandbox-2", other, ""); errors.As(err, &conflict) {
		fmt.Println(err)
	}

	// All rows of the sandbox, in both families; its IP need not be known.
	if err := manager.Remove("sandbox-1", nil); err != nil {
		fmt.Println(err)
	}

	fmt.Println(manager.Add("sandbox-2", other, ""))
	// Output:
	// pod default/other: host port TCP 0.0.0.0:8080 is taken by pod default/web (TCP 0.0.0.0:8080)
	// <nil>
}

// A runtime that is configured to map no host ports takes them like any others.
func ExampleNewNoopHostportManager() {
	enabled := false // as the configuration says

	manager := hostport.NewNoopHostportManager()
	if enabled {
		manager = hostport.NewMetaHostportManager()
	}

	web := &hostport.PodPortMapping{
		IP:           net.ParseIP("10.88.0.2"),
		PortMappings: []*hostport.PortMapping{{HostPort: 8080, ContainerPort: 80}},
	}
	fmt.Println(manager.Add("sandbox-1", web, ""), manager.Add("sandbox-2", web, ""), manager.Remove("sandbox-1", nil))
	// Output: <nil> <nil> <nil>
}
