// Command embed is the README's "Embed it": what a container runtime does with host ports.
package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/signal"
	"syscall"

	v1 "k8s.io/api/core/v1"

	"github.com/cri-o/hostport"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()

	if err := serve(ctx); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
}

func serve(ctx context.Context) error {
	manager, err := hostport.New()
	if err != nil {
		return err // neither IP family can work here, and why
	}
	defer manager.Close() // releases the ports; the rules stay

	// At the start, before the first Add: the pods that run. The ports of others go.
	if err := manager.Sync(ctx, podsOnRecord()); err != nil {
		fmt.Fprintln(os.Stderr, err) // each pod that lacks a port; the others have theirs
	}

	go func() { // repairs what others break, until ctx ends
		if err := manager.Run(ctx); ctx.Err() == nil {
			fmt.Fprintln(os.Stderr, "host ports are not repaired any more:", err)
		}
	}()

	// When a sandbox is set up, once for each IP of the pod:
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
		return err // and nothing has changed
	}

	<-ctx.Done()

	// When it is torn down: all its ports, of both families.
	return manager.Remove("sandbox-1", nil)
}

// podsOnRecord is for you to write: by sandbox id, what Add was given, once for each IP. An
// entry whose IP you do not know keeps what the sandbox has. With nil no pod runs: all ports go.
func podsOnRecord() map[string][]*hostport.PodPortMapping { return nil }
