package hostport

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cri-o/hostport/internal/row"
	"github.com/cri-o/hostport/internal/testbed"
)

// A pod that was removed is gone, also where the rows could not be taken out: another pod
// gets the port, Run takes out what nobody wants, and the table says so.
func TestRemoveFails(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node, f IPFamily) {
		n.serve(0, "tcp", f, 80)
		n.serve(1, "tcp", f, 80)

		log, logged := logs(t)
		m := n.manager(WithTimeout(testbed.Stretch(500*time.Millisecond)), log)
		fm := m.familyOf([]*row.Row{{Pod: netip.AddrPortFrom(n.nodeIP(f), 80)}})
		at := func(port uint16) netip.AddrPort { return netip.AddrPortFrom(n.nodeIP(f), port) }
		port := func(port int32) *PortMapping { return &PortMapping{HostPort: port, ContainerPort: 80} }
		add := func(id string, pod int, ports ...*PortMapping) {
			eventually(t, func() bool { return n.add(m, id, n.pod(pod, f, ports...)) == nil })
		}

		held := func(remove func() error) {
			fm.commitLock <- struct{}{}
			defer func() { <-fm.commitLock }()

			require.ErrorIs(t, remove(), context.DeadlineExceeded)
		}
		refused := func(remove func() error) {
			use := func(b backend) (before backend) {
				fm.commitLock <- struct{}{}
				defer func() { <-fm.commitLock }()

				before, fm.backend = fm.backend, b

				return before
			}
			works := use(refusingBackend{fm.backend})

			defer use(works)

			require.ErrorIs(t, remove(), syscall.EPERM)
		}
		all := func() error { return n.remove(m, "gone", nil) }
		named := func() error { return n.remove(m, "gone", n.pod(0, f, port(8080), port(8081))) }

		for name, fails := range map[string]func(){
			"too late":        func() { held(all) },
			"named, too late": func() { held(named) },
			"refused":         func() { refused(all) },
			"named, refused":  func() { refused(named) },
		} {
			t.Run(name, func(t *testing.T) {
				n := n.within(t)

				add("gone", 0, port(8080), port(8081))
				fails()
				require.Len(t, m.Mappings(), 2)

				for _, mapping := range m.Mappings() {
					assert.Empty(t, mapping.PodID+mapping.Namespace+mapping.Name)
					assert.NotEmpty(t, mapping.PodIDHash)
				}

				add("next", 1, port(8080))
				n.answers(n.Client, "tcp", at(8080), "other")
				n.answers(n.Client, "tcp", at(8081), "web")

				n.run(m)
				n.soon(func() bool { return len(m.Mappings()) == 1 })
				n.refused(n.Client, "tcp", at(8081))
				assert.Contains(t, logged(), "Removed host ports of pods that are gone")

				require.NoError(t, n.remove(m, "next", nil))
				assert.Empty(t, n.leftOver(f))
			})
		}
	})
}

// An Add that fails does not bring back what a Remove has disowned.
func TestFailedAddOfRemovedPod(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node, f IPFamily) {
		m := n.manager(WithTimeout(testbed.Stretch(500 * time.Millisecond)))
		fm := m.familyOf([]*row.Row{{Pod: netip.AddrPortFrom(n.nodeIP(f), 80)}})
		port := func(port int32) *PortMapping { return &PortMapping{HostPort: port, ContainerPort: 80} }

		require.NoError(t, n.add(m, "gone", n.pod(0, f, port(8080))))
		require.NoError(t, n.add(m, "other", n.pod(1, f, port(8081))))

		fm.commitLock <- struct{}{}

		require.ErrorIs(t, n.remove(m, "gone", nil), context.DeadlineExceeded)
		<-fm.commitLock

		before := m.Mappings()

		conflict := (*ConflictError)(nil)
		require.ErrorAs(t, n.add(m, "gone", n.pod(0, f, port(8080), port(8081))), &conflict)
		assert.Equal(t, before, m.Mappings())

		n.run(m)
		n.soon(func() bool { return len(m.Mappings()) == 1 })
	})
}

// The next Add wins at once, whether or not anybody has looked at the table.
func TestAddAfterRemoveFails(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node, f IPFamily) {
		m := n.manager(WithTimeout(testbed.Stretch(500 * time.Millisecond)))
		fm := m.families[slices.Index([]IPFamily{IPv4, IPv6}, f)]
		port := &PortMapping{HostPort: 8080, ContainerPort: 80}
		require.NoError(t, n.add(m, "gone", n.pod(0, f, port)))

		fm.commitLock <- struct{}{}

		require.ErrorIs(t, n.remove(m, "gone", nil), context.DeadlineExceeded)
		<-fm.commitLock

		require.NoError(t, n.add(m, "next", n.pod(1, f, port)))
	})
}

// A pod that Sync names has its rows, whatever Remove was to take out before.
func TestSyncAfterRemoveFails(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node, f IPFamily) {
		m := n.manager(WithTimeout(testbed.Stretch(500 * time.Millisecond)))
		fm := m.families[slices.Index([]IPFamily{IPv4, IPv6}, f)]
		pod := n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80})
		require.NoError(t, n.add(m, "id", pod))

		fm.commitLock <- struct{}{}

		require.ErrorIs(t, n.remove(m, "id", nil), context.DeadlineExceeded)
		<-fm.commitLock

		require.NoError(t, n.sync(m, map[string][]*PodPortMapping{"id": {pod}}))
		n.runOnce(fm, true)
		require.Len(t, m.Mappings(), 1)
		assert.Equal(t, "id", m.Mappings()[0].PodID)
	})
}

// A Remove of a family that cannot be looked at yet is carried out when it can.
func TestRemoveBeforeReady(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node, f IPFamily) {
		before := n.manager()
		require.NoError(t, n.add(before, "gone", n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80})))
		require.NoError(t, n.add(before, "stays", n.pod(1, f, &PortMapping{HostPort: 8081, ContainerPort: 80})))
		require.NoError(t, before.Close())

		works := false
		cfg := newConfig([]Option{WithLogger(testLogger(t)), WithBackend(n.backend())})
		opener := newOpener(cfg)
		m := newHostportManager(f, cfg, func(ctx context.Context) (backend, error) {
			if !works {
				return nil, syscall.EMFILE
			}

			return opener.open(f)(ctx)
		})

		t.Cleanup(func() { assert.NoError(t, errors.Join(m.Close(), opener.close())) })
		n.do(func() {
			for range 2 {
				require.ErrorIs(t, m.Remove("gone", nil), syscall.EMFILE)
			}

			assert.Len(t, m.unfinished, 1, "of one pod")

			works = true
			require.NoError(t, m.runOnce(t.Context(), func(backend) bool { return false }))
		})

		mappings := m.mappings()
		require.Len(t, mappings, 1)
		assert.EqualValues(t, 8081, mappings[0].HostPort)
	})
}

// refusingBackend changes nothing.
type refusingBackend struct{ backend }

func (refusingBackend) Reconcile(context.Context, row.Target) ([]row.Repair, error) {
	return nil, syscall.EPERM
}
