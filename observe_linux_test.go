package hostport

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// events keeps what it is told.
type events struct {
	mu   sync.Mutex
	list []Event
}

func (o *events) Observe(e Event) {
	o.mu.Lock()
	defer o.mu.Unlock()

	o.list = append(o.list, e)
}

// take returns what has happened in a family since, in words.
func (o *events) take(f ipFamily) []string {
	o.mu.Lock()
	defer o.mu.Unlock()

	texts := []string{}

	for _, e := range o.list {
		if e.Family != f {
			continue
		}

		text := fmt.Sprintf("%s %s +%d -%d =%d", e.Kind, e.PodID, e.Added, e.Removed, e.Kept)
		if e.Kind == EventHealth {
			text = "health " + string(e.Health)
		}

		if e.Kind == EventRepair {
			text = fmt.Sprintf("repair %t", e.Repairs > 0)
		}

		if e.Err != nil {
			text += " failed"
		}

		if slices.Contains([]EventKind{EventAdd, EventRemove, EventSync}, e.Kind) && e.Took <= 0 {
			text += " in no time"
		}

		texts = append(texts, text)
	}

	o.list = nil

	return texts
}

func TestObserver(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node, f ipFamily) {
		var told events

		pod := n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80}, &PortMapping{HostPort: 8081, ContainerPort: 80})
		other := n.pod(1, f, &PortMapping{HostPort: 8080, ContainerPort: 80})
		first := n.manager(WithObserver(&told))
		assert.Equal(t, []string{"health in sync"}, told.take(f))

		require.NoError(t, n.add(first, "id", pod))
		require.NoError(t, n.add(first, "id", pod))
		require.NoError(t, n.remove(first, "nobody", nil))
		require.Error(t, n.add(first, "other", other))
		assert.Equal(t, []string{"add id +2 -0 =0", "add id +0 -0 =2", "add other +0 -0 =0 failed"}, told.take(f))
		require.NoError(t, first.Close())

		m := n.manager(WithObserver(&told))
		require.NoError(t, n.add(m, "other", other))
		assert.Equal(t, []string{"health in sync", "takeover other +0 -1 =0", "add other +1 -1 =0"}, told.take(f))
		require.NoError(t, n.sync(m, map[string][]*PodPortMapping{"other": {other}}))
		assert.Equal(t, []string{"sync  +0 -1 =1"}, told.take(f))

		n.wipe(f)
		n.run(m)

		var all []string

		n.soon(func() bool {
			all = append(all, told.take(f)...)

			return slices.Contains(all, "repair true")
		})
		require.NoError(t, n.remove(m, "other", nil))
		n.soon(func() bool {
			all = append(all, told.take(f)...)

			return slices.Contains(all, "remove other +0 -1 =0")
		})
	})
}

// Status says how each family stands, and why one cannot work.
func TestStatus(t *testing.T) {
	eachBackend(t, func(t *testing.T, n *node) {
		m := n.manager()
		variant := ""
		if n.variant != viaNFTables {
			variant = string(n.variant)
		}

		status := func() []Status { return m.Status() }
		want := []Status{
			{Family: IPv4, Backend: n.backend(), Variant: variant, Health: HealthInSync},
			{Family: IPv6, Backend: n.backend(), Variant: variant, Health: HealthInSync},
		}
		assert.Equal(t, want, status())

		require.NoError(t, n.add(m, "id", n.pod(0, IPv6,
			&PortMapping{HostPort: 8080, ContainerPort: 80}, &PortMapping{HostPort: 8081, ContainerPort: 80, Protocol: "SCTP"})))

		want[1].Rows, want[1].Held = 2, 1
		assert.Equal(t, want, status())

		fm := m.families[0]
		for health, sick := range map[Health]func(*health){
			HealthSuspect:   func(h *health) { h.suspects() },
			HealthInDoubt:   func(h *health) { h.doubts() },
			HealthLeftovers: func(h *health) { h.looked(errors.New("nobody can look")) },
		} {
			before := fm.health
			sick(&fm.health)
			assert.Equal(t, health, status()[0].Health)

			fm.health = before
		}

		// Another one has the host ports.
		n.do(func() {
			second := metaManager(t, WithBackend(n.backend()))
			for _, s := range second.Status() {
				assert.Equal(t, HealthUnavailable, s.Health)
				assert.Empty(t, s.Backend)
				assert.ErrorContains(t, s.Err, "another manager has the host ports")
			}
		})

		require.NoError(t, m.Close())
		require.ErrorIs(t, status()[0].Err, errClosed)

		n.do(func() {
			odd := metaManager(t, WithBackend("odd"))
			assert.ErrorIs(t, odd.Status()[1].Err, errors.ErrUnsupported)
		})
	})
}

// generation is that of nf_tables.
func (n *node) generation() uint32 {
	n.t.Helper()

	gen, err := n.nfnetlink().Generation(n.t.Context())
	require.NoError(n.t, err)

	return gen
}

// List reads what the kernel holds, in all backends, beside a manager and without one, and
// changes nothing.
func TestList(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node, f ipFamily) {
		list := func() []Mapping {
			var (
				list []Mapping
				err  error
			)

			before, generation := n.rules(f), n.generation()
			n.do(func() { list, err = List(t.Context()) })
			require.NoError(t, err)
			assert.Equal(t, generation, n.generation(), "no transaction")
			assert.Equal(t, before, n.rules(f))

			return list
		}
		assert.Empty(t, list())

		m := n.manager()
		require.NoError(t, n.add(m, "id", n.pod(0, f, &PortMapping{HostPort: 8081, ContainerPort: 80},
			&PortMapping{HostPort: 8080, ContainerPort: 80, Protocol: "UDP"})))

		want := m.Mappings()
		for i := range want {
			want[i].PodID, want[i].Namespace, want[i].Name, want[i].Held = "", "", "", false
			if n.variant != viaNFTables {
				want[i].PodIDHash = list()[i].PodIDHash // covers more
			}
		}

		assert.Equal(t, want, list())
		require.NoError(t, m.Close())
		assert.Equal(t, want, list())

		if n.variant == viaNFTables {
			return
		}

		// And what another backend has from before.
		n.change(viaNFTables)

		m = n.manager()
		require.NoError(t, n.add(m, "more", n.pod(1, f, &PortMapping{HostPort: 9090, ContainerPort: 80})))

		all := list()
		require.Len(t, all, 3)
		assert.Equal(t, want, all[:2])
		assert.Equal(t, n.backend(), all[2].Backend)
	})
}
