package hostport

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cri-o/hostport/internal/iptables"
)

// podNetwork is the network of the first pod, as CNI plugins have it.
func podNetwork(n *node, f IPFamily) netip.Prefix {
	return netip.PrefixFrom(n.Pods[0].IP(f == IPv6), map[IPFamily]int{IPv4: 16, IPv6: 64}[f]).Masked()
}

// foreign are rules of others: such as a CNI plugin makes for its pods, which
// accept traffic within their network before anything else sees it.
func foreign(n *node, f IPFamily) string {
	network := podNetwork(n, f)

	return fmt.Sprintf(`*nat
:CNI-0123456789 - [0:0]
:KUBE-SERVICES - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A POSTROUTING -s %[1]s -m comment --comment "name: \"net\" id: \"x\"" -j CNI-0123456789
-A CNI-0123456789 -d %[1]s -j ACCEPT
-A KUBE-SERVICES -p tcp -m tcp --dport 9999 -j RETURN
COMMIT
`, network)
}

func (n *node) addForeign(f IPFamily) {
	n.t.Helper()

	if n.variant == viaNFTables {
		n.addForeignNFT(f)

		return
	}

	n.commandWith(foreign(n, f), iptables.Command(f)+"-"+string(n.variant)+"-restore", "--noflush")
}

func (n *node) theirs(f IPFamily) []string {
	n.t.Helper()

	return slices.DeleteFunc(n.rules(f), isOurs)
}

func TestTraffic(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node, f IPFamily) {
		n.addForeign(f)
		theirs := n.theirs(f)

		for _, network := range []string{"tcp", "udp"} {
			n.serve(0, network, f, 80)
			n.serve(0, network, f, 81)
		}

		nodeIP, otherIP := n.nodeIP(f), n.otherNodeIP(f)
		m := n.manager()
		pod := n.pod(0, f,
			&PortMapping{HostPort: 8080, ContainerPort: 80},
			&PortMapping{HostPort: 8080, ContainerPort: 80, Protocol: "UDP"},
			&PortMapping{HostPort: 8081, ContainerPort: 80, HostIP: otherIP.String()},
			&PortMapping{HostPort: 8081, ContainerPort: 80, HostIP: otherIP.String(), Protocol: "UDP"},
			&PortMapping{HostPort: 8082, ContainerPort: 80},
			&PortMapping{HostPort: 8082, ContainerPort: 81, HostIP: otherIP.String()},
			&PortMapping{HostPort: 8083, ContainerPort: 80, Protocol: "SCTP"})
		require.NoError(t, n.add(m, "web", pod))

		web, neighbour := n.Pods[0].Namespace, n.Pods[1].Namespace
		at := netip.AddrPortFrom

		for _, network := range []string{"tcp", "udp"} {
			t.Run(network, func(t *testing.T) {
				n := n.within(t)

				a := n.answers(n.Client, network, at(nodeIP, 8080), "web")
				assert.Equal(t, n.ClientIP(f == IPv6), a.Source.Addr(), "the source address is kept")
				n.answers(n.Client, network, at(otherIP, 8080), "web")

				a = n.answers(n.Host, network, at(nodeIP, 8080), "web")
				assert.Equal(t, nodeIP, a.Source.Addr())

				a = n.answers(neighbour, network, at(nodeIP, 8080), "web")
				assert.Equal(t, n.Pods[1].IP(f == IPv6), a.Source.Addr())

				a = n.answers(web, network, at(nodeIP, 8080), "web")
				assert.NotEqual(t, n.Pods[0].IP(f == IPv6), a.Source.Addr(), "hairpin is masqueraded")

				n.answers(n.Client, network, at(otherIP, 8081), "web")
				n.refused(n.Client, network, at(nodeIP, 8081))
				n.refused(n.Host, network, at(nodeIP, 8081))

				// Forwarded traffic to the same port is not for the node.
				s, err := n.Peer.Serve(network, at(n.PeerIP(f == IPv6), 8080))
				require.NoError(t, err)
				n.answers(n.Client, network, at(n.PeerIP(f == IPv6), 8080), "peer")
				n.answers(neighbour, network, at(n.PeerIP(f == IPv6), 8080), "peer")
				require.NoError(t, s.Close())
			})
		}

		n.answers(n.Client, "tcp", at(nodeIP, 8082), "web")
		asked := n.answers(n.Client, "tcp", at(otherIP, 8082), "web")
		assert.NotZero(t, asked.Took)

		assert.Equal(t, theirs, n.theirs(f), "rules of others")

		require.NoError(t, n.remove(m, "web", pod))
		assert.Equal(t, theirs, n.theirs(f), "rules of others")
		assert.Empty(t, m.Mappings())

		for _, network := range []string{"tcp", "udp"} {
			n.refused(n.Client, network, at(nodeIP, 8080))
			n.refused(n.Host, network, at(nodeIP, 8080))
			n.refused(neighbour, network, at(otherIP, 8081))
		}

		assert.Empty(t, n.leftOver(f))
	})
}

// The row for one address wins there, in whatever order the rows came.
func TestSpecificAddressWins(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node, f IPFamily) {
		n.serve(0, "tcp", f, 80)
		n.serve(1, "tcp", f, 81)

		var (
			anyIP    = &PortMapping{HostPort: 8080, ContainerPort: 80}
			specific = &PortMapping{HostPort: 8080, ContainerPort: 81, HostIP: n.otherNodeIP(f).String()}
			nodeIP   = netip.AddrPortFrom(n.nodeIP(f), 8080)
			otherIP  = netip.AddrPortFrom(n.otherNodeIP(f), 8080)
		)

		for _, order := range [][]*PortMapping{{anyIP, specific}, {specific, anyIP}} {
			m := n.manager()

			for _, pm := range order {
				require.NoError(t, n.add(m, "id", n.pod(0, f, pm)))
			}

			n.answers(n.Client, "tcp", nodeIP, "web")
			n.refused(n.Client, "tcp", otherIP) // of the pod: nothing serves port 81 there

			require.NoError(t, n.remove(m, "id", n.pod(0, f, specific)))
			n.answers(n.Client, "tcp", otherIP, "web")
			require.NoError(t, n.remove(m, "id", nil))
			require.NoError(t, m.Close())
		}
	})
}

// Two pods that take turns at one port, with connection attempts all the time.
func TestMoveIsAtomic(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node, f IPFamily) {
		n.serve(0, "tcp", f, 80)
		n.serve(1, "tcp", f, 80)

		m := n.manager()
		port := &PortMapping{HostPort: 8080, ContainerPort: 80}
		require.NoError(t, n.add(m, "id", n.pod(0, f, port)))

		var connects, failures atomic.Int32

		stop := make(chan struct{})
		done := make(chan error, 1)

		go func() {
			done <- n.Client.Do(func() error { return keepAsking(t.Context(), n, f, stop, &connects, &failures) })
		}()

		moves := 0
		for ; moves < 60 || connects.Load() < 100; moves++ {
			require.NoError(t, n.add(m, "id", n.pod(moves%2, f, port)))
			require.Less(t, moves, 100_000, "no connections")
		}

		close(stop)
		require.NoError(t, <-done)

		t.Logf("%d connects over %d moves, %d failed", connects.Load(), moves, failures.Load())
		assert.Zero(t, failures.Load())
		require.NoError(t, n.remove(m, "id", nil))
	})
}

func keepAsking(ctx context.Context, n *node, f IPFamily, stop <-chan struct{}, connects, failures *atomic.Int32) error {
	for range 100_000 {
		select {
		case <-stop:
			return nil
		default:
		}

		a, err := n.Client.Ask(ctx, "tcp", netip.AddrPortFrom(n.nodeIP(f), 8080))
		if err != nil || (a.From != "web" && a.From != "other") {
			failures.Add(1)
		}

		connects.Add(1)
	}

	return nil
}

// A pod's rows in both families are two Adds with one id and the same
// mappings, and one Remove.
func TestDualStack(t *testing.T) {
	eachNode(t, func(t *testing.T, n *node) {
		m := n.manager()
		mappings := []*PortMapping{
			{HostPort: 8080, ContainerPort: 80},
			{HostPort: 8081, ContainerPort: 80, HostIP: "0.0.0.0"},
			{HostPort: 8082, ContainerPort: 80, HostIP: "::"},
		}

		for _, f := range []IPFamily{IPv4, IPv6} {
			n.serve(0, "tcp", f, 80)
			require.NoError(t, n.add(m, "web", n.pod(0, f, mappings...)))
		}

		assert.Len(t, m.Mappings(), 4)

		for _, tc := range []struct {
			f    IPFamily
			port uint16
			ok   bool
		}{{IPv4, 8080, true}, {IPv6, 8080, true}, {IPv4, 8081, true}, {IPv6, 8081, false}, {IPv4, 8082, false}, {IPv6, 8082, true}} {
			if to := netip.AddrPortFrom(n.nodeIP(tc.f), tc.port); tc.ok {
				n.answers(n.Client, "tcp", to, "web")
			} else {
				n.refused(n.Client, "tcp", to)
			}
		}

		// As a runtime does that no longer knows the pod's IPs.
		require.NoError(t, n.remove(m, "web", &PodPortMapping{PortMappings: mappings}))
		assert.Empty(t, m.Mappings())
	})
}
