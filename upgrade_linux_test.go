package hostport

import (
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mdlayher/netlink"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cri-o/hostport/internal/nfnetlink"
	"github.com/cri-o/hostport/internal/nftables"
	"github.com/cri-o/hostport/internal/testbed"
)

// firstLayout turns the chains of our table into those of this package's first
// version, which had its rules where CRI-O has them. In nft's words:
//
//	prerouting: type nat hook prerouting priority -100
//	            ip daddr != 127.0.0.0/8 fib daddr type local goto hostports
//	output:     type nat hook output priority -100
//	            fib daddr type local goto hostports
//
// and for IPv6
//
//	prerouting: ip6 daddr != ::1 fib daddr type local goto hostports
//	output:     ip6 saddr != ::1 fib daddr type local goto hostports
func firstLayout(f IPFamily) []netlink.Message {
	t := nfnetlink.Table{Family: unix.NFPROTO_IPV4, Name: "crio-hostports"}
	local := []nfnetlink.Expr{nfnetlink.LoadDestinationType(1), nfnetlink.EqualTo(1, unix.RTN_LOCAL), nfnetlink.Goto("hostports")}
	in := []nfnetlink.Expr{nfnetlink.LoadNetworkHeader(16, 1, 1), nfnetlink.NotEqual(1, []byte{127})}
	out := []nfnetlink.Expr(nil)

	if f == IPv6 {
		t.Family = unix.NFPROTO_IPV6
		one := netip.IPv6Loopback().AsSlice()
		in = []nfnetlink.Expr{nfnetlink.LoadNetworkHeader(24, 16, 1), nfnetlink.NotEqual(1, one)}
		out = []nfnetlink.Expr{nfnetlink.LoadNetworkHeader(8, 16, 1), nfnetlink.NotEqual(1, one)}
	}

	return []netlink.Message{
		t.FlushChain("nat-prerouting"), t.DeleteChain("nat-prerouting"), t.FlushChain("nat-output"), t.DeleteChain("nat-output"),
		t.FlushChain("prerouting"), t.DeleteChain("prerouting"), t.FlushChain("output"), t.DeleteChain("output"),
		t.CreateChain(nfnetlink.Chain{Name: "prerouting", Type: "nat", Hook: unix.NF_INET_PRE_ROUTING, Priority: -100}),
		t.CreateChain(nfnetlink.Chain{Name: "output", Type: "nat", Hook: unix.NF_INET_LOCAL_OUT, Priority: -100}),
		t.AppendRule("prerouting", slices.Concat(in, local)...),
		t.AppendRule("output", slices.Concat(out, local)...),
	}
}

// A manager that finds the table as the first version made it puts its rules
// where they belong, and no connection fails meanwhile.
func TestFirstLayoutIsTakenOver(t *testing.T) {
	eachNFTFamily(t, func(t *testing.T, n *node, f IPFamily) {
		n.serve(0, "tcp", f, 80)
		n.serve(0, "udp", f, 80)

		pod := n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80}, &PortMapping{HostPort: 8080, ContainerPort: 80, Protocol: "UDP"})
		m := n.manager()
		require.NoError(t, n.add(m, "id", pod))

		to := netip.AddrPortFrom(n.nodeIP(f), 8080)
		rows := rowsOfAll(t, f, map[string][]*PodPortMapping{"id": {pod}})

		const rounds = 25

		asked := 0

		for range rounds {
			require.NoError(t, m.Close())
			n.commit(firstLayout(f)...)
			require.Subset(t, n.deviations(f, rows), []string{"chain nat-prerouting is missing", "rule of others in chain prerouting"})

			ask := n.startAsking(to)

			m = n.manager()

			asked += ask.stop()
			require.Empty(t, n.deviations(f, rows))
		}

		t.Logf("%d requests over %d takeovers", asked, rounds)
		n.answers(n.Client, "tcp", to, "web")
	})
}

// The first version's jumps, which let link-local addresses through, are replaced,
// and no connection fails meanwhile.
func TestFirstJumpsAreReplaced(t *testing.T) {
	eachVariant(t, func(t *testing.T, n *node) {
		n.serve(0, "tcp", IPv6, 80)
		n.serve(0, "udp", IPv6, 80)

		pod := n.pod(0, IPv6, &PortMapping{HostPort: 8080, ContainerPort: 80}, &PortMapping{HostPort: 8080, ContainerPort: 80, Protocol: "UDP"})
		m := n.manager()
		require.NoError(t, n.add(m, "id", pod))

		rows := rowsOfAll(t, IPv6, map[string][]*PodPortMapping{"id": {pod}})

		for name, do := range map[string]func(){
			"New": func() {
				require.NoError(t, m.Close())

				m = n.manager()
			},
			"Sync": func() { require.NoError(t, n.sync(m, map[string][]*PodPortMapping{"id": {pod}})) },
			"Add":  func() { require.NoError(t, n.add(m, "id", pod)) },
		} {
			for range 5 {
				n.commandWith(`*nat
-F PREROUTING
-A PREROUTING ! -d ::1/128 -m comment --comment "kube hostport portals" -m addrtype --dst-type LOCAL -j KUBE-HOSTPORTS
-F OUTPUT
-A OUTPUT ! -s ::1/128 -m comment --comment "kube hostport portals" -m addrtype --dst-type LOCAL -j KUBE-HOSTPORTS
COMMIT
`, "ip6tables-"+string(n.variant)+"-restore", "--noflush")
				require.Len(t, n.deviations(IPv6, rows), 4, "of two rules: left over, misplaced")

				ask := n.startAsking(netip.AddrPortFrom(n.nodeIP(IPv6), 8080))

				do()
				ask.stop()
				assert.Empty(t, n.deviations(IPv6, rows), name)
			}
		}
	})
}

// asking are requests over new connections that go on.
type asking struct {
	n     *node
	count [4]atomic.Int32
	done  chan struct{}
	wg    sync.WaitGroup
}

// startAsking has the client and the node itself ask over TCP and UDP, one after
// the other, until stop, and returns when each has been answered.
func (n *node) startAsking(to netip.AddrPort) *asking {
	n.t.Helper()

	a := &asking{n: n, done: make(chan struct{})}

	for i, from := range []*testbed.Namespace{n.Client, n.Host, n.Client, n.Host} {
		network := []string{"tcp", "udp"}[i/2]

		a.wg.Go(func() {
			for {
				select {
				case <-a.done:
					return
				case <-time.After(time.Millisecond): // or conntrack, which remembers each for minutes, makes New slow
				}

				if answer, err := from.Ask(n.t.Context(), network, to); assert.NoError(n.t, err) {
					assert.Equal(n.t, "web", answer.From)
				}

				a.count[i].Add(1)
			}
		})
	}

	a.each(1)

	return a
}

// each waits until each has asked so many times more.
func (a *asking) each(times int32) {
	a.n.t.Helper()

	for i := range a.count {
		until := a.count[i].Load() + times
		assert.Eventually(a.n.t, func() bool { return a.count[i].Load() >= until }, patience, time.Millisecond)
	}
}

// stop goes on for a while, and returns how many requests there were.
func (a *asking) stop() (asked int) {
	a.n.t.Helper()
	a.each(2) // the first may have begun before
	close(a.done)
	a.wg.Wait()

	for i := range a.count {
		asked += int(a.count[i].Load())
	}

	return asked
}

// Rules that CRI-O has put where it wants them go again with what comes next.
func TestChainsForCRIOAreEmptied(t *testing.T) {
	eachNFTFamily(t, func(t *testing.T, n *node, f IPFamily) {
		m := n.manager()
		pods := map[string][]*PodPortMapping{"id": {n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80})}}
		other := n.pod(1, f, &PortMapping{HostPort: 9090, ContainerPort: 80})
		require.NoError(t, n.sync(m, pods))

		rows := rowsOfAll(t, f, pods)
		table := nftables.NewLayout(f).Table
		crio := func() {
			for _, chain := range []string{nftables.Prerouting, nftables.Output} {
				n.commit(table.AppendRule(chain,
					nfnetlink.LoadDestinationType(register), nfnetlink.EqualTo(register, unix.RTN_LOCAL), nfnetlink.Goto(nftables.HostPorts)))
			}
		}

		for name, do := range map[string]func() error{
			"Add":       func() error { return n.add(m, "other", other) },
			"Add again": func() error { return n.add(m, "id", pods["id"][0]) },
			"Remove":    func() error { return n.remove(m, "other", nil) },
			"Sync":      func() error { return n.sync(m, pods) },
			"New": func() error {
				if err := m.Close(); err != nil {
					return err
				}

				m = n.manager()

				return nil
			},
		} {
			require.NoError(t, n.remove(m, "other", nil))

			if name == "Remove" {
				require.NoError(t, n.add(m, "other", other))
			}

			crio()
			require.Subset(t, n.deviations(f, rows), []string{"rule of others in chain prerouting", "rule of others in chain output"})

			var check error

			n.do(func() { check = m.Check(t.Context(), "id", pods["id"][0]) })
			require.ErrorContains(t, check, "rule of others in chain output", name)
			require.NoError(t, do(), name)
			require.NoError(t, n.remove(m, "other", nil))
			assert.Empty(t, n.deviations(f, rows), name)
		}

		n.run(m)
		crio()
		n.soon(func() bool { return len(n.deviations(f, rows)) == 0 })
	})
}
