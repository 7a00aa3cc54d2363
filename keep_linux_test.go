package hostport

import (
	"context"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cri-o/hostport/internal/testbed"
)

func (n *node) keep(m *Manager, ids ...string) error {
	n.t.Helper()

	var err error

	n.do(func() { err = m.Keep(n.t.Context(), ids) })

	return err
}

// withPort is a pod of one TCP port in both families.
func (n *node) withPort(pod int, port int32) []*PodPortMapping {
	pm := &PortMapping{HostPort: port, ContainerPort: 80}

	return []*PodPortMapping{n.pod(pod, IPv4, pm), n.pod(pod, IPv6, pm)}
}

// addAll adds pods, each in both families.
func (n *node) addAll(m *Manager, pods map[string][]*PodPortMapping) {
	n.t.Helper()

	for id, mappings := range pods {
		for _, mapping := range mappings {
			require.NoError(n.t, n.add(m, id, mapping))
		}
	}
}

// only is those of pods that have one of ids.
func only(pods map[string][]*PodPortMapping, ids ...string) map[string][]*PodPortMapping {
	some := map[string][]*PodPortMapping{}
	for _, id := range ids {
		some[id] = pods[id]
	}

	return some
}

// What Keep names stays, what it does not goes: before and after a restart, with a backend that
// carries the owner's hash and with one that carries the row's.
func TestKeep(t *testing.T) {
	eachNode(t, func(t *testing.T, n *node) {
		for _, f := range []IPFamily{IPv4, IPv6} {
			n.serve(0, "tcp", f, 80)
			n.serve(1, "tcp", f, 80)
		}

		all := map[string][]*PodPortMapping{"goes": n.withPort(1, 8000), "stays": n.withPort(0, 8010), "ends": n.withPort(1, 8020)}

		for i, pod := range all["stays"] {
			for _, pm := range []PortMapping{
				{HostPort: 8011, Protocol: "UDP"},
				{HostPort: 8012, Protocol: "sctp"},
				{HostPort: 8013, HostIP: n.otherNodeIP(IPv4).String()},
				{HostPort: 8014, HostIP: n.otherNodeIP(IPv6).String()},
				{HostPort: 8015, HostIP: []string{"0.0.0.0", "::"}[i]},
			} {
				pm.ContainerPort = 80
				pod.PortMappings = append(pod.PortMappings, &pm)
			}
		}

		reach := func(port uint16, pod string) {
			for _, f := range []IPFamily{IPv4, IPv6} {
				if to := netip.AddrPortFrom(n.nodeIP(f), port); pod != "" {
					n.answers(n.Client, "tcp", to, pod)
				} else {
					n.refused(n.Client, "tcp", to)
				}
			}
		}

		m := n.manager()
		n.addAll(m, all)
		require.NoError(t, n.keep(m, "stays", "ends"))
		n.exactly(m, only(all, "stays", "ends"))
		reach(8000, "")
		reach(8010, "web")
		reach(8020, "other")

		// After a restart, and what has leaked goes.
		n.addAll(m, only(all, "goes"))
		require.NoError(t, m.Close())
		n.leak(IPv4)
		n.leak(IPv6)

		log, logged := logs(t)
		m = n.manager(log)
		require.NoError(t, n.keep(m, "stays", "nobody", "stays", "ends"))

		for _, mapping := range m.Mappings() {
			assert.Contains(t, []string{"stays", "ends"}, mapping.PodID, "named from now on")
		}

		n.exactly(m, only(all, "stays", "ends"))
		reach(8000, "")
		reach(8010, "web")
		assert.Contains(t, logged(), "Keep removed host ports")
		assert.Contains(t, logged(), ":8000 -> ")

		// Again it does nothing.
		worked := n.countWork()
		before := n.dump(m)
		require.NoError(t, n.keep(m, "ends", "stays"))
		assert.Equal(t, before, n.dump(m))

		if n.variant == viaNFTables {
			assert.Zero(t, worked())
		}

		// The pod that stays is another's rival as before.
		conflict := (*ConflictError)(nil)
		require.ErrorAs(t, n.add(m, "goes", n.withPort(1, 8010)[0]), &conflict)

		require.NoError(t, n.keep(m))
		n.exactly(m, nil)
		assert.Empty(t, n.ours(IPv6), "no object of the kernel stays")
		reach(8010, "")
	})
}

// What another backend carries stays there, or goes there.
func TestKeepElsewhere(t *testing.T) {
	for _, from := range backends() {
		t.Run(string(from), func(t *testing.T) {
			n := newNode(t, from)
			n.serve(0, "tcp", IPv4, 80)
			n.leftBehind("stays", n.withPort(0, 8010)[0])
			n.leftBehind("goes", n.withPort(1, 8000)[0])
			n.change(backends()[(slices.Index(backends(), from)+1)%len(backends())])

			m := n.manager()
			require.NoError(t, n.keep(m, "stays"))
			require.Len(t, m.Mappings(), 1)
			assert.Equal(t, "stays", m.Mappings()[0].PodID)
			n.answers(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(IPv4), 8010), "web")
			n.refused(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(IPv4), 8000))

			require.NoError(t, n.keep(m))
			assert.Empty(t, m.Mappings())
			n.refused(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(IPv4), 8010))
		})
	}
}

// A Keep that fails changes nothing, and an observer hears of it as of other operations.
func TestKeepFails(t *testing.T) {
	eachNode(t, func(t *testing.T, n *node) {
		var told events

		m := n.manager(WithObserver(&told), WithTimeout(testbed.Stretch(2*time.Second)))
		all := map[string][]*PodPortMapping{"stays": n.withPort(0, 8010), "goes": n.withPort(1, 8000)}
		n.addAll(m, all)
		told.take(IPv4)

		require.ErrorIs(t, n.keep(m, "stays", ""), ErrInvalidMapping)
		assert.Equal(t, []string{"keep  +0 -0 =0 in no time failed"}, told.take(""))

		ended, cancel := context.WithCancel(t.Context())
		cancel()
		n.do(func() { require.ErrorIs(t, m.Keep(ended, []string{"stays"}), context.Canceled) })
		assert.Equal(t, []string{"keep  +0 -0 =0 ?1 failed"}, told.take(IPv4))

		n.do(func() {
			second := metaManager(t, n.on(), WithTimeout(time.Millisecond))
			require.ErrorIs(t, second.Keep(t.Context(), nil), ErrOtherManager)
		})
		n.exactly(m, all)

		require.NoError(t, n.keep(m, "stays"))
		assert.Equal(t, []string{"keep  +0 -1 =0 ?1"}, told.take(IPv4))
		assert.Equal(t, 1, m.Status()[0].Rows)
		n.exactly(m, only(all, "stays"))

		require.NoError(t, m.Close())
		require.ErrorIs(t, n.keep(m), os.ErrClosed)
		n.exactly(n.managerThatKnows("stays"), only(all, "stays"))
	})
}

// managerThatKnows is a manager that has been told whose rows there are.
func (n *node) managerThatKnows(ids ...string) *Manager {
	n.t.Helper()

	m := n.manager()
	require.NoError(n.t, n.keep(m, ids...))

	return m
}

// Keep and Sync take out what is of the manager's scope alone, known or not.
func TestWithScope(t *testing.T) {
	eachNode(t, func(t *testing.T, n *node) {
		for _, f := range []IPFamily{IPv4, IPv6} {
			n.serve(0, "tcp", f, 80)
			n.serve(1, "tcp", f, 80)
		}

		all := map[string][]*PodPortMapping{
			"net1/a": n.withPort(0, 8000), "net1/b": n.withPort(0, 8001), "net2/a": n.withPort(1, 8002), "net1": n.withPort(1, 8003), "a": n.withPort(1, 8004),
		}
		others := only(all, "net2/a", "net1", "a")

		for _, restarts := range []bool{false, true} {
			m := n.manager(WithScope("net1"))
			n.addAll(m, all)

			if restarts {
				require.NoError(t, m.Close())

				m = n.manager(WithScope("net1"))
			}

			require.NoError(t, n.keep(m, "net1/a"))
			n.refused(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(IPv4), 8001))
			require.NoError(t, n.sync(m, only(all, "net1/a")))
			assert.Len(t, m.Mappings(), 8)

			for _, f := range []IPFamily{IPv4, IPv6} {
				n.answers(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(f), 8000), "web")

				for port := range uint16(3) {
					n.answers(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(f), 8002+port), "other")
				}
			}

			require.NoError(t, n.keep(m))
			assert.Len(t, m.Mappings(), 6)
			require.NoError(t, m.Close())

			m = n.managerThatKnows("net2/a", "net1", "a")
			n.exactly(m, others)
			require.NoError(t, m.Close())
		}
	})
}

// A row whose pod nobody has named keeps its port, and nothing changes. The pod's own Add is
// none of another.
func TestWithoutTakeover(t *testing.T) {
	eachNode(t, func(t *testing.T, n *node) {
		var told events

		for _, f := range []IPFamily{IPv4, IPv6} {
			n.serve(0, "tcp", f, 80)
			n.serve(1, "tcp", f, 80)
		}

		all := map[string][]*PodPortMapping{"id": n.withPort(0, 8080)}
		first := n.manager()
		n.addAll(first, all)
		require.NoError(t, first.Close())

		m := n.manager(WithoutTakeover(), WithObserver(&told))

		for _, f := range []IPFamily{IPv4, IPv6} {
			told.take(f)

			for _, hostIP := range []string{"", n.otherNodeIP(f).String()} {
				other := n.pod(1, f, &PortMapping{HostPort: 8081, ContainerPort: 80}, &PortMapping{HostPort: 8080, ContainerPort: 80, HostIP: hostIP})
				conflict := (*ConflictError)(nil)
				require.ErrorAs(t, n.add(m, "other", other), &conflict)
				assert.Equal(t, "ns/other", conflict.Pod)
				assert.Empty(t, conflict.OtherID)
				assert.NotContains(t, conflict.OtherPod, "unknown")
				assert.NotEmpty(t, conflict.OtherPod)

				n.answers(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(f), 8080), "web")
				n.refused(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(f), 8081))
			}

			assert.Equal(t, []string{"add other +0 -0 =0 failed", "add other +0 -0 =0 failed"}, told.take(f))
		}

		require.NoError(t, m.Close())

		m = n.manager(WithoutTakeover())
		n.addAll(m, all)
		n.exactly(m, all)

		require.NoError(t, n.remove(m, "id", nil))

		next := map[string][]*PodPortMapping{"other": n.withPort(1, 8080)}
		n.addAll(m, next)
		n.exactly(m, next)
	})
}

// Sync takes the port of a row of another scope from before, if it may.
func TestSyncWithoutTakeover(t *testing.T) {
	eachNode(t, func(t *testing.T, n *node) {
		n.serve(0, "tcp", IPv4, 80)
		n.serve(1, "tcp", IPv4, 80)
		n.leftBehind("net2/a", n.withPort(0, 8080)[0])

		wanted := map[string][]*PodPortMapping{"net1/b": n.withPort(1, 8080)[:1], "net1/c": n.withPort(1, 8081)[:1]}
		to := netip.AddrPortFrom(n.nodeIP(IPv4), 8080)

		m := n.manager(WithScope("net1"), WithoutTakeover())
		err := n.sync(m, wanted)
		conflict := (*ConflictError)(nil)
		require.ErrorAs(t, err, &conflict)
		assert.Equal(t, "net1/b", conflict.ID)
		n.answers(n.Client, "tcp", to, "web")
		n.answers(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(IPv4), 8081), "other")
		require.NoError(t, m.Close())

		m = n.manager(WithScope("net1"))
		require.NoError(t, n.sync(m, wanted))
		n.answers(n.Client, "tcp", to, "other")
		n.exactly(m, wanted)
	})
}

// Of a pod that was to be removed nobody waits for the port, whoever may know it.
func TestWithoutTakeoverOfWhatIsGone(t *testing.T) {
	eachNode(t, func(t *testing.T, n *node) {
		n.leftBehind("gone", n.withPort(0, 8080)[0])

		m := n.manager(WithoutTakeover())
		ended, cancel := context.WithCancel(t.Context())
		cancel()
		n.do(func() { require.ErrorIs(t, m.RemoveContext(ended, "gone", nil), context.Canceled) })
		require.NoError(t, n.add(m, "next", n.withPort(1, 8080)[0]))
		n.exactly(m, map[string][]*PodPortMapping{"next": n.withPort(1, 8080)[:1]})
	})
}

// A thousand pods by a thousand rows from before is not a million hashes.
func BenchmarkKeep(b *testing.B) {
	const pods = 1000

	n := anyNode(b)
	m := n.manager()
	ids := make([]string, pods)

	for i := range ids {
		ids[i] = "pod" + strconv.Itoa(i)
		require.NoError(b, n.add(m, ids[i], n.pod(0, IPv4, &PortMapping{HostPort: int32(8000 + i), ContainerPort: 80})))
	}

	for b.Loop() {
		b.StopTimer()
		require.NoError(b, m.Close())

		m = n.manager(WithoutSockets())

		b.StartTimer()
		require.NoError(b, n.keep(m, ids...))
	}

	assert.Len(b, m.Mappings(), pods)
}
