package hostport

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cri-o/hostport/internal/flows"
	"github.com/cri-o/hostport/internal/nfnetlink"
	"github.com/cri-o/hostport/internal/nftables"
	"github.com/cri-o/hostport/internal/row"
)

// sender sends from one UDP port to another and never pauses.
type sender struct {
	conn    net.Conn
	sent    sync.WaitGroup
	packets atomic.Int64

	mu   sync.Mutex
	from string // who has answered last
}

// send has the client send, until the test ends.
func (n *node) send(to netip.AddrPort) *sender {
	n.t.Helper()

	s := &sender{}

	require.NoError(n.t, n.Client.Do(func() error {
		var err error
		s.conn, err = (&net.Dialer{}).DialContext(n.t.Context(), "udp", to.String())

		return err
	}))

	ctx, stop := context.WithCancel(context.Background())

	s.sent.Go(func() {
		for ctx.Err() == nil {
			_, _ = s.conn.Write([]byte("hello\n")) // refused while there is no row
			s.packets.Add(1)

			select {
			case <-ctx.Done():
			case <-time.After(time.Millisecond):
			}
		}
	})
	s.sent.Go(func() {
		buf := make([]byte, 1024)

		for ctx.Err() == nil {
			if size, err := s.conn.Read(buf); err == nil {
				name, _, _ := strings.Cut(string(buf[:size]), " ")

				s.mu.Lock()
				s.from = name
				s.mu.Unlock()
			}
		}
	})
	n.t.Cleanup(func() {
		stop()
		assert.NoError(n.t, s.conn.Close())
		s.sent.Wait()
	})

	return s
}

// goesOn waits until a hundred more packets have been sent.
func (s *sender) goesOn(t *testing.T) {
	t.Helper()

	before := s.packets.Load()
	eventually(t, func() bool { return s.packets.Load() >= before+100 })
}

// reaches waits until it is pod that answers.
func (s *sender) reaches(t *testing.T, pod string) {
	t.Helper()
	assert.Eventually(t, func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()

		return s.from == pod
	}, patience, time.Millisecond, "expected %s to answer", pod)
}

// A sender that never pauses reaches whom it would if it began now.
func TestUDPFlows(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node, f IPFamily) {
		n.serve(0, "udp", f, 53)
		n.serve(1, "udp", f, 53)

		m := n.manager()
		// Others that stay: without any rule the kernel would stop tracking.
		require.NoError(t, n.add(m, "stays", n.pod(1, f, &PortMapping{HostPort: 7777, ContainerPort: 53, Protocol: "UDP"})))

		for name, ports := range map[string][]*PortMapping{
			"one port":  {{HostPort: 5353, ContainerPort: 53, Protocol: "UDP"}},
			"two ports": {{HostPort: 5353, ContainerPort: 53, Protocol: "UDP"}, {HostPort: 5354, ContainerPort: 53, Protocol: "UDP"}},
			"one address": {
				{HostPort: 5353, ContainerPort: 53, Protocol: "UDP", HostIP: n.nodeIP(f).String()},
			},
		} {
			t.Run(name, func(t *testing.T) {
				n := n.within(t)

				s := n.send(netip.AddrPortFrom(n.nodeIP(f), 5353)) // to begin with to nobody
				stays := n.send(netip.AddrPortFrom(n.nodeIP(f), 7777))
				stays.reaches(t, "other")

				require.NoError(t, n.add(m, "a", n.pod(0, f, ports...)))
				s.reaches(t, "web")

				require.NoError(t, n.remove(m, "a", n.pod(0, f, ports...)))
				require.NoError(t, n.add(m, "b", n.pod(1, f, ports...)))
				s.reaches(t, "other")

				require.NoError(t, n.add(m, "b", n.pod(0, f, ports...)), "moved")
				s.reaches(t, "web")

				require.NoError(t, n.remove(m, "b", nil))
				stays.reaches(t, "other")
			})
		}
	})
}

// A row for one address takes over from the pod's row for any, and gives back.
func TestUDPFlowsOfNarrowerRow(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node, f IPFamily) {
		n.serve(0, "udp", f, 53)
		n.serve(1, "udp", f, 53)

		m := n.manager()
		wide := &PortMapping{HostPort: 5353, ContainerPort: 53, Protocol: "UDP"}
		narrow := &PortMapping{HostPort: 5353, ContainerPort: 53, Protocol: "UDP", HostIP: n.otherNodeIP(f).String()}
		require.NoError(t, n.add(m, "id", n.pod(0, f, wide)))

		s, elsewhere := n.send(netip.AddrPortFrom(n.otherNodeIP(f), 5353)), n.send(netip.AddrPortFrom(n.nodeIP(f), 5353))
		s.reaches(t, "web")
		elsewhere.reaches(t, "web")

		require.NoError(t, n.add(m, "id", n.pod(1, f, narrow)))
		s.reaches(t, "other")
		elsewhere.reaches(t, "web")

		require.NoError(t, n.remove(m, "id", n.pod(1, f, narrow)))
		s.reaches(t, "web")
	})
}

// After Remove, whoever has the pod's address gets nothing any more.
func TestUDPFlowEnds(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node, f IPFamily) {
		service, err := n.Pods[0].Serve("udp", netip.AddrPortFrom(n.Pods[0].IP(f == IPv6), 53))
		require.NoError(t, err)

		for _, hostIP := range []string{"", n.nodeIP(f).String()} {
			m := n.manager()
			require.NoError(t, n.add(m, "stays", n.pod(1, f, &PortMapping{HostPort: 7777, ContainerPort: 53, Protocol: "UDP"})))
			require.NoError(t, n.add(m, "id", n.pod(0, f, &PortMapping{HostPort: 5353, ContainerPort: 53, Protocol: "UDP", HostIP: hostIP})))

			s := n.send(netip.AddrPortFrom(n.nodeIP(f), 5353))
			s.reaches(t, "web")
			require.NoError(t, n.remove(m, "id", nil))

			// Whatever is before a request in the service's queue counts before it.
			pod := netip.AddrPortFrom(n.Pods[0].IP(f == IPv6), 53)
			last := service.Count()

			require.Eventually(t, func() bool { // what was under way has come
				n.answers(n.Host, "udp", pod, "web")

				before := last
				last = service.Count()

				return last == before+1
			}, patience, 20*time.Millisecond)

			s.goesOn(t)
			n.answers(n.Host, "udp", pod, "web")
			assert.Equal(t, last+1, service.Count())
			require.NoError(t, n.remove(m, "stays", nil))
			require.NoError(t, m.Close())
		}
	})
}

// Flows that no row would lead if they began now stay: those from a loopback address without
// localhost, and those from a link-local one of IPv6.
func TestFlowsThatNoRowLeadsStay(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node, f IPFamily) {
		m := n.manager(WithoutSockets(), WithoutLocalhost())
		require.NoError(t, n.add(m, "stays", n.pod(1, f, &PortMapping{HostPort: 7777, ContainerPort: 53, Protocol: "UDP"})))

		conn := n.nfnetlink()
		tracked := func() []nfnetlink.Flow {
			list, err := conn.Flows(t.Context(), nftables.NewLayout(f).Table.Family, unix.IPPROTO_UDP, 5353)
			require.NoError(t, err)

			return list
		}
		want := 1

		at := netip.AddrPortFrom(f.Loopback().Addr().Next(), 5353)
		if f == IPv6 {
			at = netip.AddrPortFrom(f.Loopback().Addr(), 5353)
			to := netip.AddrPortFrom(n.nodeIP(f), 5353)

			n.hostService("udp", to.String())

			_, err := n.Client.AskFrom(t.Context(), "udp", netip.AddrPortFrom(linkLocal(t, n.Client, "eth0"), 0), to)
			require.NoError(t, err)

			want++
		}

		n.hostService("udp", at.String())
		n.answers(n.Host, "udp", at, "host")

		before := tracked()
		require.Len(t, before, want)
		require.NoError(t, n.add(m, "id", n.pod(0, f, &PortMapping{HostPort: 5353, ContainerPort: 53, Protocol: "UDP"})))
		assert.ElementsMatch(t, before, tracked())
	})
}

// Flows of others stay, though they are to the same port number: forwarded
// ones, and those of another row for another address.
func TestOthersFlowsStay(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node, f IPFamily) {
		peer, other := netip.AddrPortFrom(n.PeerIP(f == IPv6), 5353), netip.AddrPortFrom(n.otherNodeIP(f), 5353)
		_, err := n.Peer.Serve("udp", peer)
		require.NoError(t, err)
		n.serve(0, "udp", f, 53)
		n.serve(1, "udp", f, 53)

		m := n.manager()
		port := func(ip netip.Addr) *PortMapping {
			return &PortMapping{HostPort: 5353, ContainerPort: 53, Protocol: "UDP", HostIP: ip.String()}
		}

		require.NoError(t, n.add(m, "stays", n.pod(1, f, port(other.Addr()))))
		n.answers(n.Client, "udp", peer, "peer")
		n.answers(n.Pods[0].Namespace, "udp", peer, "peer")
		n.answers(n.Client, "udp", other, "other")

		conn := n.nfnetlink()
		some := func() []string {
			list, err := conn.Flows(t.Context(), nftables.NewLayout(f).Table.Family, unix.IPPROTO_UDP, 5353)
			require.NoError(t, err)

			var lines []string
			for _, flow := range list {
				if flow.Destination.Addr() != n.nodeIP(f) {
					lines = append(lines, fmt.Sprint(flow))
				}
			}

			return slices.Sorted(slices.Values(lines))
		}
		before := some()
		require.Len(t, before, 3)

		for _, pm := range []*PortMapping{
			port(n.nodeIP(f)),
			port(n.PeerIP(f == IPv6)), // an address that is not the node's (yet)
		} {
			n.refused(n.Client, "udp", netip.AddrPortFrom(n.nodeIP(f), 5353)) // which leaves a stale flow
			require.NoError(t, n.add(m, "id", n.pod(0, f, pm)))
			assert.Equal(t, before, some())
			require.NoError(t, n.remove(m, "id", nil))
			assert.Equal(t, before, some())
		}

		// For one address and for any: each has its own.
		require.NoError(t, n.add(m, "stays", n.pod(1, f, &PortMapping{HostPort: 5353, ContainerPort: 54, Protocol: "UDP"})))
		assert.Equal(t, before, some())
	})
}

// A flow that has taken the place of one that was listed, between the same ends, is
// another one, and lives on.
func TestFlowInPlaceOfAnother(t *testing.T) {
	eachFamilyOf(t, backends()[:1], func(t *testing.T, n *node, f IPFamily) {
		to := netip.AddrPortFrom(n.nodeIP(f), 5353)
		m := n.manager() // without any rule the kernel would not track
		require.NoError(t, n.add(m, "id", n.pod(0, f, &PortMapping{HostPort: 7777, ContainerPort: 53, Protocol: "UDP"})))

		_, err := n.Host.Serve("udp", to)
		require.NoError(t, err)

		var client net.Conn

		require.NoError(t, n.Client.Do(func() (err error) {
			client, err = (&net.Dialer{}).DialContext(t.Context(), "udp", to.String())

			return err
		}))
		t.Cleanup(func() { assert.NoError(t, client.Close()) })

		conn, family := n.nfnetlink(), nftables.NewLayout(f).Table.Family
		some := func() []nfnetlink.Flow {
			list, err := conn.Flows(t.Context(), family, unix.IPPROTO_UDP, to.Port())
			require.NoError(t, err)

			return slices.DeleteFunc(list, func(flow nfnetlink.Flow) bool { return flow.Source.String() != client.LocalAddr().String() })
		}
		begin := func() nfnetlink.Flow {
			_, err := client.Write([]byte("hello\n"))
			require.NoError(t, err)
			require.NoError(t, client.SetReadDeadline(time.Now().Add(patience)))
			_, err = client.Read(make([]byte, 100))
			require.NoError(t, err)

			list := some()
			require.Len(t, list, 1)

			return list[0]
		}
		first := begin()
		second := first

		// In the same memory it has the same id: others have that meanwhile.
		for try := 0; assert.ObjectsAreEqual(first, second); try++ {
			require.Less(t, try, 100)
			require.NoError(t, conn.DeleteFlows(t.Context(), family, []nfnetlink.Flow{first}))

			for range 10 {
				n.answers(n.Client, "udp", to, "host")
			}

			second = begin()
		}

		require.NoError(t, conn.DeleteFlows(t.Context(), family, []nfnetlink.Flow{first}), "has ended")
		assert.Equal(t, []nfnetlink.Flow{second}, some())
		require.NoError(t, conn.DeleteFlows(t.Context(), family, []nfnetlink.Flow{second}))
		assert.Empty(t, some())
	})
}

// Where there is neither a UDP nor an SCTP row, an operation does not ask the kernel.
func TestNoFlowsOfTCP(t *testing.T) {
	n := anyNode(t)
	m := n.manager()
	four, six := n.countFlows(m.families[0]), n.countFlows(m.families[1])
	require.NoError(t, n.add(m, "id", n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})))
	require.NoError(t, n.add(m, "stays", n.pod(0, IPv4, &PortMapping{HostPort: 8081, ContainerPort: 80})))
	require.NoError(t, n.remove(m, "id", nil))
	require.NoError(t, n.Host.AddAddress("eth1", row.HostPrefix(vip(IPv4))))
	n.do(func() {
		require.NoError(t, m.families[0].runOnce(t.Context(), func(backend) bool { return false }))
	})
	assert.Nil(t, m.families[0].nodeBefore, "looked at")
	assert.Zero(t, four.others.Load())

	require.NoError(t, n.add(m, "id", n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80, Protocol: "UDP"})))
	assert.NotZero(t, four.others.Load())
	assert.Zero(t, six.others.Load())
}

// An operation does not fail because stale flows cannot be ended.
func TestFlushFails(t *testing.T) {
	n := anyNode(t)
	m := n.manager()

	conn := n.nfnetlink()
	require.NoError(t, conn.Close())

	n.flowsBy(m.families[0], func() (flows.Conn, error) { return conn, nil })

	pod := n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80, Protocol: "UDP"})
	require.NoError(t, n.add(m, "id", pod))
	require.NoError(t, n.remove(m, "id", pod))
	assert.Empty(t, m.Mappings())
}
