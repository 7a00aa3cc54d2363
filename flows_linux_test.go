package hostport

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/mdlayher/netlink"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cri-o/hostport/internal/flows"
	"github.com/cri-o/hostport/internal/nfnetlink"
	"github.com/cri-o/hostport/internal/nftables"
	"github.com/cri-o/hostport/internal/nodeaddr"
	"github.com/cri-o/hostport/internal/row"
	"github.com/cri-o/hostport/internal/testbed"
)

// vip is an address that the node does not have, and that the client sends to it.
func vip(f IPFamily) netip.Addr {
	if f == IPv6 {
		return netip.MustParseAddr("2001:db8:9::9")
	}

	return netip.MustParseAddr("203.0.113.9")
}

// Every way in which an address comes to be the node's, or ceases to be.
func eachVIP(t *testing.T, n *node, f IPFamily, test func(t *testing.T, n *node, come, goes func() error)) {
	t.Helper()

	prefix := row.HostPrefix(vip(f))

	t.Run("of an interface", func(t *testing.T) {
		test(t, n.within(t),
			func() error { return n.Host.AddAddress("eth1", prefix) },
			func() error { return n.Host.RemoveAddress("eth1", prefix) })
	})
	t.Run("by route alone", func(t *testing.T) {
		test(t, n.within(t),
			func() error { return n.Host.AddLocalRoute("eth1", prefix) },
			func() error { return n.Host.RemoveLocalRoute("eth1", prefix) })
	})
}

// A flow to an address of the node that began before there was a row, however the
// node has the address.
func TestFlowsToEachAddress(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node, f IPFamily) {
		n.serve(0, "udp", f, 53)

		m := n.manager()
		require.NoError(t, n.add(m, "stays", n.pod(1, f, &PortMapping{HostPort: 7777, ContainerPort: 53, Protocol: "UDP"})))

		eachVIP(t, n, f, func(t *testing.T, n *node, come, goes func() error) {
			require.NoError(t, come())

			s := n.send(netip.AddrPortFrom(vip(f), 5353))
			n.tracks(f, unix.IPPROTO_UDP, 5353)
			require.NoError(t, n.add(m, "id", n.pod(0, f, &PortMapping{HostPort: 5353, ContainerPort: 53, Protocol: "UDP"})))
			s.reaches(t, "web")
			require.NoError(t, n.remove(m, "id", nil))
			require.NoError(t, goes())
		})
	})
}

// tracks waits until the kernel tracks a flow to a port.
func (n *node) tracks(f IPFamily, protocol uint8, port uint16) {
	n.t.Helper()

	conn := n.nfnetlink()

	eventually(n.t, func() bool {
		list, err := conn.Flows(n.t.Context(), nftables.NewLayout(f).Table.Family, protocol, port)
		require.NoError(n.t, err)

		return len(list) > 0
	})
}

// A sender that never pauses reaches the pod when the address comes to the node, and
// its old destination when that goes: with Run, or with the family's next operation.
func TestFlowsFollowAddresses(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node, f IPFamily) {
		n.serve(0, "udp", f, 53)
		n.peerHas(f, 5353)

		for _, running := range []bool{false, true} {
			t.Run(fmt.Sprintf("run=%t", running), func(t *testing.T) {
				n := n.within(t)
				m := n.manager()

				for _, hostIP := range []string{"", vip(f).String()} {
					require.NoError(t, n.add(m, "id"+hostIP, n.pod(0, f, &PortMapping{HostPort: 5353, ContainerPort: 53, Protocol: "UDP", HostIP: hostIP})))

					settle := func() {}
					if running {
						n.run(m)
					} else {
						settle = func() { n.look(m, f) }
					}

					eachVIP(t, n, f, func(t *testing.T, n *node, come, goes func() error) {
						s := n.send(netip.AddrPortFrom(vip(f), 5353))
						s.reaches(t, "peer")
						require.NoError(t, come())
						settle()
						s.reaches(t, "web")
						require.NoError(t, goes())
						settle()
						s.reaches(t, "peer")
					})

					require.NoError(t, n.remove(m, "id"+hostIP, nil))

					if running {
						break // Run is for one time
					}
				}
			})
		}
	})
}

// Flows that the row for an address has led end with the address, also if its pod has a row for
// any address besides.
func TestFlowsOfRowForAddress(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node, f IPFamily) {
		n.serve(0, "udp", f, 53)
		n.peerHas(f, 5353)
		require.NoError(t, n.Host.AddAddress("eth1", row.HostPrefix(vip(f))))

		m := n.manager()
		for _, pm := range []*PortMapping{
			{HostPort: 5353, ContainerPort: 53, Protocol: "UDP", HostIP: vip(f).String()},
			{HostPort: 5353, ContainerPort: 54, Protocol: "UDP"},
		} {
			require.NoError(t, n.add(m, "id", n.pod(0, f, pm)))
		}

		s := n.send(netip.AddrPortFrom(vip(f), 5353))
		s.reaches(t, "web")
		require.NoError(t, n.Host.RemoveAddress("eth1", row.HostPrefix(vip(f))))
		n.look(m, f)
		s.reaches(t, "peer")
	})
}

// An address that comes and goes, or goes and comes back, before anybody looks: flows of
// that moment are not for ever.
func TestFlowsOfBriefAddresses(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node, f IPFamily) {
		n.serve(0, "udp", f, 53)
		n.peerHas(f, 5353)

		m := n.manager()
		require.NoError(t, n.add(m, "id", n.pod(0, f, &PortMapping{HostPort: 5353, ContainerPort: 53, Protocol: "UDP"})))

		eachVIP(t, n, f, func(t *testing.T, n *node, come, goes func() error) {
			require.NoError(t, come())

			s := n.send(netip.AddrPortFrom(vip(f), 5353))
			s.reaches(t, "web")
			require.NoError(t, goes())
			n.look(m, f)
			s.reaches(t, "peer")

			require.NoError(t, come())
			n.look(m, f)
			s.reaches(t, "web")
			require.NoError(t, goes())

			between := n.send(netip.AddrPortFrom(vip(f), 5353))
			between.reaches(t, "peer")
			require.NoError(t, come())
			n.look(m, f)
			between.reaches(t, "web")
			s.reaches(t, "web")
			require.NoError(t, goes())
			n.look(m, f)
			s.reaches(t, "peer")
		})
	})
}

// flowsBy has a family end flows by what dial returns.
func (n *node) flowsBy(fm *hostportManager, dial func() (flows.Conn, error)) {
	n.t.Helper()

	fm.flows.Stop()
	require.NoError(n.t, fm.flows.Close(fm.view()))
	fm.flows = flows.New(fm.family, fm.cannotEnd, fm.withView, dial)
}

// failingFlows cannot list flows as long as it fails.
type failingFlows struct {
	flows.Conn

	fails *atomic.Bool
	lists *atomic.Int64
}

func (c failingFlows) Flows(ctx context.Context, family, protocol uint8, port uint16) ([]nfnetlink.Flow, error) {
	c.lists.Add(1)

	if c.fails.Load() {
		return nil, errInjected
	}

	return c.Conn.Flows(ctx, family, protocol, port)
}

// Flows to an address that has gone end later if they cannot now, also if others come and go
// until then. They are not tried each time: others wait.
func TestFlowsFollowLater(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node, f IPFamily) {
		n.serve(0, "udp", f, 53)
		n.peerHas(f, 5353)

		m := n.manager()
		fm := m.families[slices.Index([]IPFamily{IPv4, IPv6}, f)]
		failing := failingFlows{fails: &atomic.Bool{}, lists: &atomic.Int64{}}

		n.flowsBy(fm, func() (flows.Conn, error) {
			conn, err := flows.Dial()

			return failingFlows{conn, failing.fails, failing.lists}, err
		})
		require.NoError(t, n.add(m, "id", n.pod(0, f, &PortMapping{HostPort: 5353, ContainerPort: 53, Protocol: "UDP"})))
		require.NoError(t, n.Host.AddAddress("eth1", row.HostPrefix(vip(f))))
		n.runOnce(fm, false)

		s := n.send(netip.AddrPortFrom(vip(f), 5353))
		s.reaches(t, "web")
		failing.fails.Store(true)
		require.NoError(t, n.Host.RemoveAddress("eth1", row.HostPrefix(vip(f))))
		n.runOnce(fm, false)

		lists := failing.lists.Load()

		for _, ip := range []netip.Addr{vip(f).Next(), vip(f).Next().Next()} {
			require.NoError(t, n.Host.AddAddress("eth1", row.HostPrefix(ip)))
			n.runOnce(fm, false)
		}

		assert.Equal(t, lists, failing.lists.Load(), "at once")
		failing.fails.Store(false)

		fm.flushAt = time.Time{}

		n.runOnce(fm, false)
		s.reaches(t, "peer")
	})
}

// noneLate keeps a family from ending connections until it is called again: there is one
// socket, which is for datagrams if they come first.
func (n *node) noneLate(fm *hostportManager) (again func()) {
	n.t.Helper()

	var dials, allowed atomic.Int64

	n.flowsBy(fm, func() (flows.Conn, error) {
		if dials.Add(1) > 1 && allowed.Load() == 0 {
			return nil, errInjected
		}

		return flows.Dial()
	})

	return func() { allowed.Store(1) }
}

// Connections are ended a moment later, once for all changes until then.
func TestConnectionsToBriefAddress(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node, f IPFamily) {
		n.serve(0, "tcp", f, 80)

		m := n.manager()
		again := n.noneLate(m.families[slices.Index([]IPFamily{IPv4, IPv6}, f)])
		require.NoError(t, n.add(m, "id", n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80})))

		for _, ip := range []netip.Addr{vip(f).Next(), vip(f)} {
			require.NoError(t, n.Host.AddAddress("eth1", row.HostPrefix(ip)))
			n.look(m, f)
		}

		c := n.connect(t, netip.AddrPortFrom(vip(f), 8080))
		require.Equal(t, "web", c.asks())
		require.NoError(t, n.Host.RemoveAddress("eth1", row.HostPrefix(vip(f))))
		n.look(m, f)

		again()
		n.run(m)
		n.noConnections(f, netip.AddrPortFrom(vip(f), 8080))
	})
}

// noConnections waits until there is no connection to an address.
func (n *node) noConnections(f IPFamily, to netip.AddrPort) {
	n.t.Helper()

	conn := n.nfnetlink()

	eventually(n.t, func() bool {
		list, err := conn.Flows(n.t.Context(), nftables.NewLayout(f).Table.Family, unix.IPPROTO_TCP, to.Port())
		require.NoError(n.t, err)

		return !slices.ContainsFunc(list, func(flow nfnetlink.Flow) bool { return flow.Destination == to })
	}, "the connection goes on")
}

// An answer that is under way when its flow is ended begins one from the other side, to
// which the client's packets belong then: they would never meet a row.
// An IPv4 one would be dropped: it comes from an address of the node.
func TestAnswerUnderWay(t *testing.T) {
	eachBackend(t, func(t *testing.T, n *node) {
		const f = IPv6

		n.serve(0, "udp", f, 53)
		require.NoError(t, n.Peer.AddAddress("eth0", row.HostPrefix(vip(f))))
		require.NoError(t, n.Host.AddRoute(row.HostPrefix(vip(f)), n.PeerIP(f == IPv6)))

		m := n.manager()
		require.NoError(t, n.add(m, "id", n.pod(0, f, &PortMapping{HostPort: 5353, ContainerPort: 53, Protocol: "UDP"})))

		to := netip.AddrPortFrom(vip(f), 5353)

		var client, peer net.Conn

		require.NoError(t, n.Client.Do(func() (err error) {
			client, err = (&net.Dialer{}).DialContext(t.Context(), "udp", to.String())

			return err
		}))
		require.NoError(t, n.Peer.Do(func() (err error) {
			peer, err = (&net.Dialer{LocalAddr: net.UDPAddrFromAddrPort(to)}).DialContext(t.Context(), "udp", client.LocalAddr().String())

			return err
		}))
		t.Cleanup(func() { assert.NoError(t, errors.Join(client.Close(), peer.Close())) })

		pass := func(from, to net.Conn) {
			_, err := from.Write([]byte("hello\n"))
			require.NoError(t, err)
			require.NoError(t, to.SetReadDeadline(time.Now().Add(patience)))
			_, err = to.Read(make([]byte, 100))
			require.NoError(t, err)
		}

		pass(client, peer)
		require.NoError(t, n.Host.AddAddress("eth1", row.HostPrefix(vip(f))))
		n.look(m, f)
		pass(peer, client)

		assert.Eventually(t, func() bool {
			_, err := client.Write([]byte("hello\n"))
			require.NoError(t, err)
			require.NoError(t, client.SetReadDeadline(time.Now().Add(20*time.Millisecond)))

			answer := make([]byte, 100)
			_, err = client.Read(answer)

			return err == nil && strings.HasPrefix(string(answer), "web ")
		}, patience, time.Millisecond, "the pod does not answer")
	})
}

// What came for the address of a Service before it was known for that, or with iptables
// by leave of kube-proxy, does not reach the pod for ever.
func TestFlowsToServiceAddresses(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node, f IPFamily) {
		n.serve(0, "udp", f, 53)
		n.peerHas(f, 5353)
		require.NoError(t, n.Host.AddDevice(nodeaddr.ServiceDevice, false))

		m := n.manager(WithoutSockets())
		require.NoError(t, n.add(m, "id", n.pod(0, f, &PortMapping{HostPort: 5353, ContainerPort: 53, Protocol: "UDP"})))

		n.assignService(vip(f))
		s := n.send(netip.AddrPortFrom(vip(f), 5353))
		s.reaches(t, "web")

		some := func() []nfnetlink.Flow {
			list, err := n.nfnetlink().Flows(t.Context(), nftables.NewLayout(f).Table.Family, unix.IPPROTO_UDP, 5353)
			require.NoError(t, err)

			return list
		}
		before := some()

		n.look(m, f)

		if n.variant == viaNFTables {
			_, err := n.Host.Serve("udp", netip.AddrPortFrom(vip(f), 5353))
			require.NoError(t, err)
			s.reaches(t, "host")

			// CRI-O's rule knows nothing of Services.
			n.commit(nftables.NewLayout(f).Table.AppendRule(nftables.Prerouting,
				nfnetlink.LoadDestinationType(register), nfnetlink.EqualTo(register, unix.RTN_LOCAL), nfnetlink.Goto(nftables.HostPorts)))

			misled := n.send(netip.AddrPortFrom(vip(f), 5353))
			misled.reaches(t, "web")
			n.look(m, f)
			misled.reaches(t, "host")
		} else {
			assert.Equal(t, before, some())
		}

		require.NoError(t, n.Host.RemoveAddress(nodeaddr.ServiceDevice, row.HostPrefix(vip(f))))
		n.look(m, f)
		s.reaches(t, "peer")
	})
}

// peerHas has the peer answer at vip while the node does not have it.
func (n *node) peerHas(f IPFamily, port uint16) {
	n.t.Helper()
	require.NoError(n.t, n.Peer.AddAddress("eth0", row.HostPrefix(vip(f))))
	require.NoError(n.t, n.Host.AddRoute(row.HostPrefix(vip(f)), n.PeerIP(f == IPv6)))

	_, err := n.Peer.Serve("udp", netip.AddrPortFrom(vip(f), port))
	require.NoError(n.t, err)
}

// look has a manager look at the node's addresses, with an operation of the family.
func (n *node) look(m *Manager, f IPFamily) {
	n.t.Helper()
	require.NoError(n.t, n.add(m, "else", n.pod(1, f, &PortMapping{HostPort: 9999, ContainerPort: 99, Protocol: "UDP"})))
	require.NoError(n.t, n.remove(m, "else", nil))
}

// connection is a TCP connection of the client's.
type connection struct {
	net.Conn

	t *testing.T
}

func (n *node) connect(t *testing.T, to netip.AddrPort) *connection {
	t.Helper()

	c := &connection{t: t}

	require.NoError(t, n.Client.Do(func() error {
		var err error
		c.Conn, err = (&net.Dialer{Timeout: patience}).DialContext(t.Context(), "tcp", to.String())

		return err
	}))
	t.Cleanup(func() { _ = c.Close() })

	return c
}

// asks sends a line and returns who has answered.
func (c *connection) asks() string {
	c.t.Helper()
	require.NoError(c.t, c.SetDeadline(time.Now().Add(patience)))

	_, err := fmt.Fprintln(c, "hello")
	require.NoError(c.t, err)

	line, err := bufio.NewReader(c).ReadString('\n')
	require.NoError(c.t, err)

	name, _, _ := strings.Cut(line, " ")

	return name
}

// isReset waits until a packet of the connection's is answered with a reset.
func (c *connection) isReset() {
	c.t.Helper()
	eventually(c.t, func() bool {
		_ = c.SetDeadline(time.Now().Add(20 * time.Millisecond))
		_, writeErr := fmt.Fprintln(c, "hello")
		_, readErr := c.Read(make([]byte, 100))

		return errors.Is(writeErr, syscall.ECONNRESET) || errors.Is(readErr, syscall.ECONNRESET) || errors.Is(writeErr, syscall.EPIPE)
	}, "no reset")
}

// silence makes a pod drop whatever comes, as one does that has died without a word.
func (n *node) silence(i int) {
	n.t.Helper()
	require.NoError(n.t, n.Pods[i].Do(func() error {
		_, err := execute(n.t, `add table inet dead
			add chain inet dead input { type filter hook input priority 0; }
			add rule inet dead input meta l4proto { tcp, udp } drop`, "nft", "-f", "-")

		return err
	}))
}

// A client of a pod that has died without a word is reset after Remove, Run or not;
// connections of rows that stay or move, and those of others, live on.
func TestTCPFlows(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node, f IPFamily) {
		n.serve(0, "tcp", f, 80)
		n.serve(0, "tcp", f, 81)
		n.serve(1, "tcp", f, 80)
		_, err := n.Peer.Serve("tcp", netip.AddrPortFrom(n.PeerIP(f == IPv6), 8080))
		require.NoError(t, err)

		m := n.manager()
		port := func(hostPort, containerPort int32) *PortMapping {
			return &PortMapping{HostPort: hostPort, ContainerPort: containerPort}
		}
		at := func(port uint16) netip.AddrPort { return netip.AddrPortFrom(n.nodeIP(f), port) }

		require.NoError(t, n.add(m, "dies", n.pod(0, f, port(8080, 80), port(8081, 81))))
		require.NoError(t, n.add(m, "stays", n.pod(1, f, port(7777, 80))))
		require.NoError(t, n.add(m, "moves", n.pod(1, f, port(7778, 80))))

		dies, too := n.connect(t, at(8080)), n.connect(t, at(8081))
		stays, moves := n.connect(t, at(7777)), n.connect(t, at(7778))
		theirs := n.connect(t, netip.AddrPortFrom(n.PeerIP(f == IPv6), 8080))
		others := []*connection{stays, moves}

		assert.Equal(t, "web", dies.asks())
		assert.Equal(t, "web", too.asks())
		assert.Equal(t, "peer", theirs.asks())

		for _, c := range others {
			assert.Equal(t, "other", c.asks())
		}

		require.NoError(t, n.add(m, "moves", n.pod(1, f, port(7778, 81))))
		n.silence(0)

		// One that is being made.
		answered := make(chan string, 1)

		go func() {
			a, err := n.Client.Ask(context.Background(), "tcp", at(8080))
			answered <- fmt.Sprint(a.From, err)
		}()

		n.dials(f, 8080, 2)

		require.NoError(t, n.remove(m, "dies", n.pod(0, f, port(8080, 80))))
		require.NoError(t, n.add(m, "next", n.pod(1, f, port(8080, 80))))
		dies.isReset()
		assert.Equal(t, "other<nil>", <-answered, "the SYN reaches the new pod")

		require.NoError(t, n.remove(m, "dies", nil))
		too.isReset()

		for _, c := range others {
			assert.Equal(t, "other", c.asks())
		}

		assert.Equal(t, "peer", theirs.asks())

		// And in the end all of one's connections, wherever they began.
		require.NoError(t, n.remove(m, "moves", nil))
		moves.isReset()
		assert.Equal(t, "other", stays.asks())
	})
}

// Connections go on to where the pod's row for any address led when there is one for their
// address as well, and end with the address.
func TestConnectionsOfWiderRow(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node, f IPFamily) {
		n.serve(0, "tcp", f, 80)
		n.serve(1, "tcp", f, 80)
		require.NoError(t, n.Host.AddAddress("eth1", row.HostPrefix(vip(f))))

		m := n.manager()
		port := func(ip netip.Addr) *PortMapping {
			pm := &PortMapping{HostPort: 8080, ContainerPort: 80}
			if ip.IsValid() {
				pm.HostIP = ip.String()
			}

			return pm
		}
		wide, there, here := port(netip.Addr{}), port(vip(f)), port(n.nodeIP(f))
		connect := func(to netip.Addr, pod string) *connection {
			c := n.connect(t, netip.AddrPortFrom(to, 8080))
			require.Equal(t, pod, c.asks())

			return c
		}

		require.NoError(t, n.add(m, "id", n.pod(0, f, wide)))

		gone, left := connect(vip(f), "web"), connect(n.otherNodeIP(f), "web")
		require.NoError(t, n.add(m, "id", n.pod(0, f, here)))

		stays := connect(n.nodeIP(f), "web")
		require.NoError(t, n.add(m, "id", n.pod(1, f, there, here)))

		for _, c := range []*connection{gone, left, stays} {
			assert.Equal(t, "web", c.asks())
		}

		require.NoError(t, n.Host.RemoveAddress("eth1", row.HostPrefix(vip(f))))
		n.look(m, f)
		n.noConnections(f, netip.AddrPortFrom(vip(f), 8080))

		require.NoError(t, n.remove(m, "id", n.pod(0, f, wide)))
		left.isReset()
		assert.Equal(t, "web", stays.asks(), "by the row that has moved")
	})
}

// Connections of a row from before end when another pod takes its port over, and when
// Sync finds that nobody has it.
func TestTakeoverEndsConnections(t *testing.T) {
	eachBackend(t, func(t *testing.T, n *node) {
		n.serve(0, "tcp", IPv4, 80)

		to := netip.AddrPortFrom(n.nodeIP(IPv4), 8080)

		for name, takeOver := range map[string]func(m *Manager) error{
			"add": func(m *Manager) error {
				return m.Add("new", n.pod(1, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80}), "")
			},
			"sync": func(m *Manager) error { return m.Sync(t.Context(), nil) },
		} {
			t.Run(name, func(t *testing.T) {
				n := n.within(t)
				n.leftBehind("old", n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80}))

				c := n.connect(t, to)
				require.Equal(t, "web", c.asks())

				m := n.manager()
				n.do(func() { require.NoError(t, takeOver(m)) })
				c.isReset()
				n.do(func() { require.NoError(t, m.Sync(t.Context(), nil)) })
			})
		}
	})
}

// What an Add has led whose outcome nobody knew ends with the Remove, also if the row has been
// taken out meanwhile.
func TestFlowsOfLostAdd(t *testing.T) {
	for name, meanwhile := range map[string]func(n *node, m *Manager){
		"Remove": func(*node, *Manager) {},
		"another pod's Add": func(n *node, m *Manager) {
			require.NoError(n.t, n.add(m, "another", n.pod(1, IPv4, &PortMapping{HostPort: 9090, ContainerPort: 80})))
		},
	} {
		t.Run(name, func(t *testing.T) { testFlowsOfLostAdd(t, meanwhile) })
	}
}

func testFlowsOfLostAdd(t *testing.T, meanwhile func(n *node, m *Manager)) {
	t.Helper()

	n := newNode(t, viaNFTables)
	n.serve(0, "udp", IPv4, 53)

	m, fake := n.viaFake(WithoutSockets())
	require.NoError(t, n.add(m, "stays", n.pod(1, IPv4, &PortMapping{HostPort: 7777, ContainerPort: 53, Protocol: "UDP"})))

	fake.commit = func(msgs []netlink.Message) ([]netlink.Message, error) {
		n.commit(msgs...)

		return nil, errInjected
	}
	pod := n.pod(0, IPv4, &PortMapping{HostPort: 5353, ContainerPort: 53, Protocol: "UDP"})
	require.ErrorIs(t, n.add(m, "id", pod), errInjected)

	fake.commit = nil

	n.send(netip.AddrPortFrom(n.nodeIP(IPv4), 5353)).reaches(t, "web")
	meanwhile(n, m)
	require.NoError(t, n.remove(m, "id", pod))
	eventually(t, func() bool {
		list, err := n.nfnetlink().Flows(t.Context(), unix.NFPROTO_IPV4, unix.IPPROTO_UDP, 5353)
		require.NoError(t, err)

		return !slices.ContainsFunc(list, func(flow nfnetlink.Flow) bool { return flow.Translated })
	})
}

// What could not be scheduled, for want of a socket, is when Run looks.
func TestConnectionsResume(t *testing.T) {
	n := anyNode(t)
	n.serve(0, "tcp", IPv4, 80)

	m := n.manager()
	again := n.noneLate(m.families[0])
	n.look(m, IPv4)
	require.NoError(t, n.add(m, "id", n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})))

	c := n.connect(t, netip.AddrPortFrom(n.nodeIP(IPv4), 8080))
	require.Equal(t, "web", c.asks())
	n.silence(0)
	require.NoError(t, n.remove(m, "id", nil))

	again()
	n.run(m)
	c.isReset()
}

// dials waits until as many connections to a port are tracked.
func (n *node) dials(f IPFamily, port uint16, count int) {
	n.t.Helper()

	conn := n.nfnetlink()

	eventually(n.t, func() bool {
		list, err := conn.Flows(n.t.Context(), nftables.NewLayout(f).Table.Family, unix.IPPROTO_TCP, port)
		require.NoError(n.t, err)

		translated := 0

		for _, flow := range list {
			if flow.Translated {
				translated++
			}
		}

		return translated == count
	})
}

// What is to end behind a Remove ends with Close at the latest.
func TestCloseEndsTCPFlows(t *testing.T) {
	n := anyNode(t)
	n.serve(0, "tcp", IPv4, 80)

	m := n.manager()
	require.NoError(t, n.add(m, "id", n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})))

	c := n.connect(t, netip.AddrPortFrom(n.nodeIP(IPv4), 8080))
	require.Equal(t, "web", c.asks())
	n.silence(0)
	require.NoError(t, n.remove(m, "id", nil))
	require.NoError(t, m.Close())

	list, err := n.nfnetlink().Flows(t.Context(), unix.NFPROTO_IPV4, unix.IPPROTO_TCP, 8080)
	require.NoError(t, err)
	assert.Empty(t, list)
	c.isReset()
}

// An SCTP association that is being made, from a fixed port, is with whom it would be
// if it began now.
func TestSCTPFlows(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node, f IPFamily) {
		m := n.manager()
		port := &PortMapping{HostPort: 5060, ContainerPort: 5061, Protocol: "SCTP"}
		web, other := n.hearsSCTP(n.Pods[0].Namespace, f, 5061), n.hearsSCTP(n.Pods[1].Namespace, f, 5061)

		require.NoError(t, n.add(m, "stays", n.pod(1, f, &PortMapping{HostPort: 7777, ContainerPort: 53, Protocol: "UDP"})))
		n.sendSCTP(netip.AddrPortFrom(n.nodeIP(f), 5060)) // to nobody, to begin with
		n.tracks(f, unix.IPPROTO_SCTP, 5060)

		require.NoError(t, n.add(m, "a", n.pod(0, f, port)))
		web.hears(t)

		require.NoError(t, n.remove(m, "a", nil))
		require.NoError(t, n.add(m, "b", n.pod(1, f, port)))
		other.hears(t)

		heard := other.count.Load()

		require.NoError(t, n.add(m, "b", n.pod(0, f, port)), "moved: the association lives on")
		eventually(t, func() bool { return other.count.Load() > heard+10 })

		require.NoError(t, n.remove(m, "b", nil))
		require.NoError(t, n.add(m, "c", n.pod(0, f, port)))
		web.hears(t)
	})
}

// It follows addresses as well.
func TestSCTPFlowsFollowAddresses(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node, f IPFamily) {
		m := n.manager()
		web := n.hearsSCTP(n.Pods[0].Namespace, f, 5061)
		conn := n.nfnetlink()

		n.peerHas(f, 5353)

		require.NoError(t, n.add(m, "id", n.pod(0, f, &PortMapping{HostPort: 5060, ContainerPort: 5061, Protocol: "SCTP"})))

		eachVIP(t, n, f, func(t *testing.T, n *node, come, goes func() error) {
			n.sendSCTP(netip.AddrPortFrom(vip(f), 5060)) // to the peer, to begin with
			n.tracks(f, unix.IPPROTO_SCTP, 5060)
			require.NoError(t, come())
			n.look(m, f)
			web.hears(t)
			require.NoError(t, goes())
			n.look(m, f)

			list, err := conn.Flows(t.Context(), nftables.NewLayout(f).Table.Family, unix.IPPROTO_SCTP, 5060)
			require.NoError(t, err)
			assert.False(t, slices.ContainsFunc(list, func(f nfnetlink.Flow) bool { return f.Translated }))
		})
	})
}

// sctpService counts the packets that come to an SCTP port.
type sctpService struct{ count atomic.Int64 }

// hears waits for one more packet.
func (s *sctpService) hears(t *testing.T) {
	t.Helper()

	before := s.count.Load()

	eventually(t, func() bool { return s.count.Load() > before })
}

// rawSCTP opens a socket for SCTP packets, which takes no SCTP in the kernel.
func rawSCTP(t testing.TB, ns *testbed.Namespace, f IPFamily) int {
	t.Helper()

	domain := unix.AF_INET
	if f == IPv6 {
		domain = unix.AF_INET6
	}

	var fd int

	require.NoError(t, ns.Do(func() (err error) {
		fd, err = unix.Socket(domain, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_SCTP)

		return err
	}))
	require.NoError(t, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 10_000}))

	return fd
}

func (n *node) hearsSCTP(ns *testbed.Namespace, f IPFamily, port uint16) *sctpService {
	n.t.Helper()

	s := &sctpService{}
	fd := rawSCTP(n.t, ns, f)
	done := make(chan struct{})
	ctx, stop := context.WithCancel(context.Background())

	go func() {
		defer close(done)

		buf := make([]byte, 1500)

		for ctx.Err() == nil {
			size, _, err := unix.Recvfrom(fd, buf, 0)
			if err != nil {
				continue
			}

			packet := buf[:size]
			if f == IPv4 {
				packet = packet[4*(packet[0]&0xf):] // behind the IP header
			}

			if binary.BigEndian.Uint16(packet[2:]) == port {
				s.count.Add(1)
			}
		}
	}()

	n.t.Cleanup(func() {
		stop()
		<-done
		assert.NoError(n.t, unix.Close(fd))
	})

	return s
}

// sendSCTP has the client repeat an INIT from one port to another, until the test ends.
func (n *node) sendSCTP(dst netip.AddrPort) {
	n.t.Helper()

	packet := sctpInit(40_000, dst.Port())
	fd := rawSCTP(n.t, n.Client, row.FamilyOf(dst.Addr()))
	to := sockaddrOf(dst.Addr(), 0)
	done := make(chan struct{})
	ctx, stop := context.WithCancel(context.Background())

	go func() {
		defer close(done)

		for tick := time.NewTicker(time.Millisecond); ctx.Err() == nil; {
			_ = unix.Sendto(fd, packet, 0, to)

			select {
			case <-ctx.Done():
			case <-tick.C:
			}
		}
	}()

	n.t.Cleanup(func() {
		stop()
		<-done
		assert.NoError(n.t, unix.Close(fd))
	})
}

// sctpInit is a packet that begins an association (RFC 9260, sections 3.1 and 3.3.2).
func sctpInit(from, to uint16) []byte {
	packet := binary.BigEndian.AppendUint16(nil, from)
	packet = binary.BigEndian.AppendUint16(packet, to)
	packet = append(packet,
		0, 0, 0, 0, 0, 0, 0, 0, // verification tag, checksum
		1, 0, 0, 20, // INIT and its length
		1, 2, 3, 4, 0, 1, 0, 0, 0, 1, 0, 1, 5, 6, 7, 8)
	binary.LittleEndian.PutUint32(packet[8:], crc32.Checksum(packet, crc32.MakeTable(crc32.Castagnoli)))

	return packet
}

// What others translate is theirs, to the number of a host port as well.
func TestTranslatedFlowsOfOthers(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node, f IPFamily) {
		for _, network := range []string{"tcp", "udp"} {
			n.serve(0, network, f, 80)
			n.serve(1, network, f, 80)
		}

		ip := nftFamily(f)
		to := netip.AddrPortFrom(n.nodeIP(f), 8080)
		// As a Service does, before anything else.
		n.commandWith(fmt.Sprintf(`add table %[1]s others
			add chain %[1]s others prerouting { type nat hook prerouting priority -150; }
			add rule %[1]s others prerouting %[1]s daddr %[2]s meta l4proto { tcp, udp } th dport 8080 dnat %[1]s to %[3]s`,
			ip, n.nodeIP(f), netip.AddrPortFrom(n.Pods[1].IP(f == IPv6), 80)), "nft", "-f", "-")

		m := n.manager()
		conn := n.nfnetlink()
		theirs := n.connect(t, to)
		assert.Equal(t, "other", theirs.asks())
		n.send(to).reaches(t, "other")

		flowsOf := func() (list []nfnetlink.Flow) {
			for _, protocol := range []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
				some, err := conn.Flows(t.Context(), nftables.NewLayout(f).Table.Family, protocol, 8080)
				require.NoError(t, err)

				list = append(list, some...)
			}

			return list
		}
		before := flowsOf()
		require.Len(t, before, 2)

		pod := n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80}, &PortMapping{HostPort: 8080, ContainerPort: 80, Protocol: "UDP"})
		require.NoError(t, n.add(m, "id", pod))
		assert.Equal(t, before, flowsOf())
		require.NoError(t, n.add(m, "id", pod))
		assert.Equal(t, before, flowsOf())
		require.NoError(t, n.remove(m, "id", nil))

		// Nor do they end because the same pod loses that port at another address.
		pod = n.pod(1, f, &PortMapping{HostPort: 8080, ContainerPort: 80, HostIP: n.otherNodeIP(f).String()},
			&PortMapping{HostPort: 8080, ContainerPort: 80, HostIP: n.otherNodeIP(f).String(), Protocol: "UDP"})
		require.NoError(t, n.add(m, "same", pod))
		require.NoError(t, n.remove(m, "same", nil))

		require.NoError(t, m.Close())
		assert.Equal(t, before, flowsOf())
		assert.Equal(t, "other", theirs.asks())
	})
}

// A connection to a program that had the port before there was a row goes on.
func TestConnectionsBeforeRow(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node, f IPFamily) {
		_, err := n.Host.Serve("tcp", netip.AddrPortFrom(n.nodeIP(f), 8080))
		require.NoError(t, err)

		m := n.manager(WithoutSockets())
		require.NoError(t, n.add(m, "tracks", n.pod(1, f, &PortMapping{HostPort: 7777, ContainerPort: 80})))

		c := n.connect(t, netip.AddrPortFrom(n.nodeIP(f), 8080))
		require.Equal(t, "host", c.asks())

		port := &PortMapping{HostPort: 8080, ContainerPort: 80}
		require.NoError(t, n.add(m, "a", n.pod(0, f, port)))
		require.NoError(t, n.remove(m, "a", nil))
		require.NoError(t, n.add(m, "b", n.pod(0, f, port)))
		require.NoError(t, m.Close())
		assert.Equal(t, "host", c.asks())
	})
}

// countedFlows counts the lists that are asked for: of TCP and of others.
type countedFlows struct {
	flows.Conn

	tcp, others *atomic.Int64
}

func (c countedFlows) Flows(ctx context.Context, family, protocol uint8, port uint16) ([]nfnetlink.Flow, error) {
	if protocol == unix.IPPROTO_TCP {
		c.tcp.Add(1)
	} else {
		c.others.Add(1)
	}

	return c.Conn.Flows(ctx, family, protocol, port)
}

// countFlows counts a family's from now on.
func (n *node) countFlows(fm *hostportManager) countedFlows {
	n.t.Helper()

	c := countedFlows{tcp: &atomic.Int64{}, others: &atomic.Int64{}}

	n.flowsBy(fm, func() (flows.Conn, error) {
		conn, err := flows.Dial()

		return countedFlows{conn, c.tcp, c.others}, err
	})

	return c
}

// One list of each protocol for all operations of one moment, whatever rows they have.
func TestOneListOfFlows(t *testing.T) {
	n := anyNode(t)
	m := n.manager()
	lists := n.countFlows(m.families[0])

	pod := func(i int) *PodPortMapping {
		return &PodPortMapping{IP: net.IPv4(10, 88, 9, byte(i)), PortMappings: []*PortMapping{
			{HostPort: int32(8000 + i), ContainerPort: 80},
			{HostPort: int32(8000 + i), ContainerPort: 80, Protocol: "UDP"},
			{HostPort: int32(9000 + i), ContainerPort: 80, Protocol: "UDP"},
			{HostPort: int32(8000 + i), ContainerPort: 80, Protocol: "SCTP"},
		}}
	}

	const pods = 20

	for _, do := range []func(i int) error{
		func(i int) error { return m.Add(strconv.Itoa(i), pod(i), "") },
		func(i int) error { return m.Remove(strconv.Itoa(i), nil) },
	} {
		before := lists.others.Load()

		m.families[0].commitLock <- struct{}{} // until all of them wait
		done := make(chan []error)

		go func() { done <- n.atOnce(pods, do) }()

		eventually(t, func() bool {
			m.families[0].queueMu.Lock()
			defer m.families[0].queueMu.Unlock()

			return len(m.families[0].queue) == pods
		})

		<-m.families[0].commitLock

		for _, err := range <-done {
			require.NoError(t, err)
		}

		assert.Equal(t, before+2, lists.others.Load(), "of UDP and of SCTP")
	}

	eventually(t, func() bool { return lists.tcp.Load() == 1 })
	require.NoError(t, m.Close())
	assert.EqualValues(t, 1, lists.tcp.Load())
}
