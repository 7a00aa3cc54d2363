package hostport

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cri-o/hostport/internal/memory"
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
func (o *events) take(f IPFamily) []string {
	o.mu.Lock()
	defer o.mu.Unlock()

	texts := []string{}
	others := []Event(nil)

	for _, e := range o.list {
		if e.Family != f {
			others = append(others, e)

			continue
		}

		text := fmt.Sprintf("%s %s +%d -%d =%d", e.Kind, e.PodID, e.Added, e.Removed, e.Kept)
		if e.Kind == EventHealth {
			text = "health " + string(e.Health)
		}

		if e.Kind == EventRepair {
			text = fmt.Sprintf("repair %t", e.Repairs > 0)
		}

		if e.Unknown > 0 {
			text += fmt.Sprintf(" ?%d", e.Unknown)
		}

		if slices.Contains([]EventKind{EventAdd, EventRemove, EventSync, EventKeep}, e.Kind) && e.Took <= 0 {
			text += " in no time"
		}

		if e.Err != nil {
			text += " failed"
		}

		texts = append(texts, text)
	}

	o.list = others

	return texts
}

func TestObserver(t *testing.T) {
	eachFamilyOf(t, everywhere(), func(t *testing.T, n *node, f IPFamily) {
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

		// What cannot be accepted is of no family.
		bad := n.pod(0, f, &PortMapping{HostPort: -1, ContainerPort: 80})
		require.Error(t, n.add(first, "bad", bad))
		assert.Equal(t, []string{"add bad +0 -0 =0 in no time failed"}, told.take(""))
		require.Error(t, n.sync(first, map[string][]*PodPortMapping{"id": {pod}, "bad": {bad}, "unknown": {podAt("", bad.PortMappings...)}}))
		assert.Equal(t, []string{"sync  +0 -0 =0 in no time failed"}, told.take(""))
		assert.Equal(t, []string{"sync  +0 -0 =2 ?2"}, told.take(f))

		// A second manager says that it waits.
		var waits events

		n.do(func() {
			second := metaManager(t, n.on(), WithObserver(&waits))
			assert.Equal(t, []string{"health unavailable"}, waits.take(f))
			require.NoError(t, second.Close())
		})

		require.NoError(t, first.Close())
		assert.Equal(t, []string{"health unavailable"}, told.take(f))

		m := n.manager(WithObserver(&told))
		require.NoError(t, n.add(m, "other", other))
		assert.Equal(t, []string{"health in sync", "takeover other +0 -1 =0", "add other +1 -1 =0"}, told.take(f))
		require.NoError(t, n.sync(m, map[string][]*PodPortMapping{"other": {other}}))
		assert.Equal(t, []string{"sync  +0 -1 =1"}, told.take(f))

		n.wipe(f)
		require.NoError(t, n.sync(m, map[string][]*PodPortMapping{"other": {other}}))
		assert.Equal(t, []string{"repair true", "sync  +0 -0 =1"}, told.take(f))

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
	eachNode(t, func(t *testing.T, n *node) {
		m := n.manager()
		variant := ""
		if n.backend() == BackendIPTables {
			variant = string(n.variant)
		}

		status := m.Status
		want := []Status{
			{Family: IPv4, Backend: n.backend(), Variant: variant, Health: HealthInSync},
			{Family: IPv6, Backend: n.backend(), Variant: variant, Health: HealthInSync},
		}
		assert.Equal(t, want, status())

		require.NoError(t, n.add(m, "id", n.pod(0, IPv6,
			&PortMapping{HostPort: 8080, ContainerPort: 80}, &PortMapping{HostPort: 8081, ContainerPort: 80, Protocol: "SCTP"})))

		want[1].Rows = 2
		assert.Equal(t, want, status())

		// It waits for nobody, and knows what nobody has begun.
		fm := m.families[1]
		fm.commitLock <- struct{}{}

		ended, end := context.WithCancel(t.Context())
		end()

		n.do(func() { require.ErrorIs(t, m.RemoveContext(ended, "id", nil), context.Canceled) })
		want[1].Health = HealthLeftovers // the other family has no rows to leave
		assert.Equal(t, want, status())
		<-fm.commitLock
		assert.Len(t, m.Mappings(), 2)
		assert.Equal(t, want, status(), "nobody's")
		require.NoError(t, n.remove(m, "id", nil))
		want[1].Health, want[1].Rows = HealthInSync, 0
		assert.Equal(t, want, status())

		for health, sick := range map[Health]func(*health){
			HealthSuspect:   func(h *health) { h.suspects() },
			HealthInDoubt:   func(h *health) { h.doubts() },
			HealthLeftovers: func(h *health) { h.looked(errors.New("nobody can look")) },
		} {
			before := fm.health
			sick(&fm.health)
			fm.publish()
			assert.Equal(t, health, status()[1].Health)

			fm.health = before
		}

		fm.publish()
		assert.Equal(t, want, status())

		// Another one has the host ports.
		n.do(func() {
			second := metaManager(t, n.on())
			for _, s := range second.Status() {
				assert.Equal(t, HealthUnavailable, s.Health)
				assert.Empty(t, s.Backend)
				assert.ErrorIs(t, s.Err, ErrOtherManager)
			}
		})

		require.NoError(t, m.Close())
		assert.Equal(t, Status{Family: IPv4, Health: HealthUnavailable, Err: errClosed}, status()[0])

		n.do(func() {
			odd := metaManager(t, n.on(), WithBackend("odd"))
			assert.ErrorContains(t, odd.Status()[1].Err, `backend "odd": want auto, nftables or iptables`)
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
	eachFamily(t, func(t *testing.T, n *node, f IPFamily) {
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

// An observer that panics, where the caller recovers, holds nobody up.
func TestObserverPanics(t *testing.T) {
	t.Parallel()

	m := newHostportManager(IPv4, newConfig([]Option{WithMemory(&memory.Node{}), WithObserver(panics{}), nil}), nil)
	for range 2 {
		m.status.Store(&Status{})
		m.commitLock <- struct{}{}
		assert.Panics(t, m.unlock)
	}
}

type panics struct{}

func (panics) Observe(Event) { panic("an observer's") } //nolint:forbidigo // is what it is about
