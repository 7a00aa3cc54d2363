package hostport

import (
	"context"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cri-o/hostport/internal/testbed"
)

// The kernel does not forward what has a link-local address, so that is not
// translated: whoever asks is refused, by the port's holder or because there is
// nobody.
func TestLinkLocal(t *testing.T) {
	eachBackend(t, func(t *testing.T, n *node) {
		var (
			client, web = n.Client, n.Pods[1].Namespace
			node        = linkLocal(t, n.Host, "eth0")
			bridge      = linkLocal(t, n.Host, "cni0")
			at          = netip.AddrPortFrom
			services    []*testbed.Service
			udp         sync.WaitGroup
		)

		for _, network := range []string{"tcp", "udp"} {
			s, err := n.Pods[0].Serve(network, at(n.Pods[0].IPv6, 80))
			require.NoError(t, err)

			services = append(services, s)
		}

		m := n.manager()
		require.NoError(t, n.add(m, "id", n.pod(0, IPv6,
			&PortMapping{HostPort: 8080, ContainerPort: 80}, &PortMapping{HostPort: 8080, ContainerPort: 80, Protocol: "UDP"},
			&PortMapping{HostPort: 8081, ContainerPort: 80, HostIP: node.WithZone("").String()},
			&PortMapping{HostPort: 8081, ContainerPort: 80, HostIP: node.WithZone("").String(), Protocol: "UDP"},
			&PortMapping{HostPort: 8081, ContainerPort: 80, HostIP: bridge.WithZone("").String()})))

		for _, ask := range []struct {
			by       *testbed.Namespace
			from, to netip.Addr
			ports    []uint16
		}{
			{by: client, to: via(t, client, "eth0", node), ports: []uint16{8080, 8081}},
			{by: client, from: n.ClientIP(true), to: via(t, client, "eth0", node), ports: []uint16{8080, 8081}},
			{by: client, from: linkLocal(t, client, "eth0"), to: n.NodeIP(true), ports: []uint16{8080}},
			{by: web, to: via(t, web, "eth0", bridge), ports: []uint16{8080, 8081}},
			{by: web, from: n.Pods[1].IPv6, to: via(t, web, "eth0", bridge), ports: []uint16{8080, 8081}},
			{by: web, from: linkLocal(t, web, "eth0"), to: n.NodeIP(true), ports: []uint16{8080}},
			{by: n.Host, to: node, ports: []uint16{8080, 8081}},
			{by: n.Host, to: bridge, ports: []uint16{8080, 8081}},
			{by: n.Host, from: n.NodeIP(true), to: node, ports: []uint16{8080, 8081}},
			{by: n.Host, from: node, to: n.NodeIP(true), ports: []uint16{8080}},
		} {
			for _, port := range ask.ports {
				source, to := at(ask.from, 0), at(ask.to, port)

				ctx, cancel := context.WithTimeout(t.Context(), patience)
				_, err := ask.by.AskFrom(ctx, "tcp", source, to)

				cancel()
				assert.ErrorContains(t, err, "connection refused", "from %s %s to %s", ask.by.Name, source, to)

				// The holder swallows UDP, and what nobody holds is refused, if ICMP's
				// limit lets it.
				udp.Go(func() {
					ctx, cancel := context.WithTimeout(t.Context(), patience/10)
					defer cancel()

					_, err := ask.by.AskFrom(ctx, "udp", source, to)
					assert.Error(t, err, "from %s %s to %s", ask.by.Name, source, to)
				})
			}
		}

		udp.Wait()

		for _, s := range services {
			assert.Zero(t, s.Count(), "nothing has come to the pod")
		}

		for _, network := range []string{"tcp", "udp"} {
			n.answers(client, network, at(n.NodeIP(true), 8080), "web")
			n.answers(n.Host, network, at(n.NodeIP(true), 8080), "web")
		}
	})
}

// linkLocal is the link-local address of a device, with the device's number as
// the zone: net remembers the numbers of names, across namespaces.
func linkLocal(t *testing.T, ns *testbed.Namespace, device string) netip.Addr {
	t.Helper()

	var found netip.Addr

	require.NoError(t, ns.Do(func() error {
		dev, err := net.InterfaceByName(device)
		if err != nil {
			return err
		}

		addrs, err := dev.Addrs()
		for _, a := range addrs {
			if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().Is6() && p.Addr().IsLinkLocalUnicast() {
				found = p.Addr().WithZone(strconv.Itoa(dev.Index))
			}
		}

		return err
	}))
	require.True(t, found.IsValid())

	return found
}

// via is another machine's link-local address, by way of a device.
func via(t *testing.T, ns *testbed.Namespace, device string, addr netip.Addr) netip.Addr {
	t.Helper()

	return addr.WithZone(linkLocal(t, ns, device).Zone())
}
