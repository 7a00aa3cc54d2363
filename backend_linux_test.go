package hostport

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cri-o/hostport/internal/nfnetlink"
)

func TestUnknownBackend(t *testing.T) {
	t.Parallel()

	for _, b := range []Backend{"iptabels", ""} {
		_, err := New(WithBackend(b), WithLogger(testLogger(t)))
		require.ErrorIs(t, err, errors.ErrUnsupported)
		assert.ErrorContains(t, err, strconv.Quote(string(b)))
	}
}

// Without IPv6 on the host, IPv4 works.
func TestIPv6Off(t *testing.T) {
	eachBackend(t, func(t *testing.T, n *node) {
		n.serve(0, "tcp", IPv4, 80)
		n.do(func() {
			require.NoError(t, os.WriteFile("/proc/sys/net/ipv6/conf/all/disable_ipv6", []byte("1"), 0))
		})

		m := n.manager()
		require.NoError(t, n.add(m, "id", n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})))
		n.answers(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(IPv4), 8080), "web")
		require.NoError(t, n.remove(m, "id", nil))
	})
}

// Without CAP_NET_ADMIN both constructors' managers say so.
func TestNoNetAdmin(t *testing.T) {
	done := make(chan struct{})

	go func() {
		defer close(done)

		runtime.LockOSThread() // for good: the thread ends with this goroutine

		hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}

		var data [2]unix.CapUserData
		if !assert.NoError(t, unix.Capget(&hdr, &data[0])) {
			return
		}

		data[0].Effective &^= 1 << unix.CAP_NET_ADMIN
		if !assert.NoError(t, unix.Capset(&hdr, &data[0])) {
			return
		}

		_, err := New(WithLogger(testLogger(t)))
		assert.ErrorIs(t, err, unix.EPERM)
		assert.ErrorContains(t, err, "CAP_NET_ADMIN")

		err = NewMetaHostportManager(WithLogger(testLogger(t))).Add("id",
			podAt("10.88.0.2", &PortMapping{HostPort: 8080, ContainerPort: 80}), "")
		assert.ErrorIs(t, err, unix.EPERM)
		assert.ErrorContains(t, err, "CAP_NET_ADMIN")
	}()
	<-done
}

// occupy makes our layout impossible: somebody has a chain by our name elsewhere.
func (n *node) occupy() {
	n.t.Helper()

	for _, f := range []ipFamily{IPv4, IPv6} {
		table := newNFTLayout(f).table
		chain := nfnetlink.Chain{Name: nftPrerouting, Type: "nat", Hook: unix.NF_INET_PRE_ROUTING, Priority: priorityDNAT}
		n.commit(table.Create(), table.CreateChain(chain))

		chain.Priority++

		n.commit(table.FlushChain(nftPrerouting), table.DeleteChain(nftPrerouting))
		n.commit(table.CreateChain(chain))
	}
}

// Where nftables cannot be used any more, rows that it carries from before are
// removed there and moved over all the same.
func TestNFTablesFromBeforeUnusable(t *testing.T) {
	n := newNode(t, variantNFT)
	gone := n.manager(WithBackend(BackendNFTables))
	pod := n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})
	require.NoError(t, n.add(gone, "id", pod))
	require.NoError(t, n.add(gone, "goes", n.pod(0, IPv6, &PortMapping{HostPort: 8080, ContainerPort: 80})))
	require.NoError(t, n.add(gone, "leak", n.pod(0, IPv4, &PortMapping{HostPort: 8081, ContainerPort: 80})))
	require.NoError(t, gone.Close())
	n.occupy()

	m := n.manager(WithBackend(BackendAuto))
	require.Len(t, m.Mappings(), 3)
	require.NoError(t, n.add(m, "new", n.pod(1, IPv4, &PortMapping{HostPort: 8081, ContainerPort: 80})))
	require.NoError(t, n.add(m, "id", pod))
	require.NoError(t, n.remove(m, "goes", nil))

	for _, mapping := range m.Mappings() {
		assert.Equal(t, BackendIPTables, mapping.Backend)
	}

	onNFT := node{Bed: n.Bed, t: t, variant: viaNFTables}
	assert.Empty(t, onNFT.elements(IPv4))
	assert.Empty(t, onNFT.elements(IPv6))
}

// A backend that is there and cannot be used may hold the rows: Remove does not
// say that they are gone.
func TestRemoveWithUnusableBackend(t *testing.T) {
	n := newNode(t, viaNFTables)
	n.leftBehind("id", n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80}))
	n.occupy()
	t.Setenv("PATH", t.TempDir())
	n.do(func() {
		m := NewMetaHostportManager(WithLogger(testLogger(t)))
		require.ErrorContains(t, m.Remove("id", nil), "add chain prerouting")
		require.NoError(t, m.Remove("id", n.pod(0, IPv4)), "but for nothing")
	})
	assert.NotEmpty(t, n.elements(IPv4))
}

// memory is a backend that keeps rows to itself.
type memory struct {
	backend

	rows []*row
	fail error
}

func (b *memory) kind(*row) string                           { return "memory" }
func (b *memory) name(*row) string                           { return "" }
func (b *memory) ownedBy(string, *row) bool                  { return true }
func (b *memory) list(context.Context) ([]*row, bool, error) { return slices.Clone(b.rows), true, nil }

func (b *memory) reconcile(_ context.Context, t target) ([]string, error) {
	if b.fail != nil {
		return nil, b.fail
	}

	for _, d := range t.deltas {
		b.rows = append(slices.DeleteFunc(b.rows, func(r *row) bool { return slices.Contains(d.del, r) }), d.add...)
	}

	return nil, nil
}

// Where one of several backends fails, all that went before is taken back.
func TestLayersTakeBack(t *testing.T) {
	t.Parallel()

	var rows []*row

	for _, id := range []string{"a", "b", "new"} {
		some, err := rowsOf(id, podAt("10.88.0.2", &PortMapping{HostPort: 8080, ContainerPort: 80}))
		require.NoError(t, err)

		rows = append(rows, some...)
	}

	inUse, a, b := &memory{}, &memory{rows: rows[:1:1]}, &memory{rows: rows[1:2:2], fail: errInjected}
	l := newLayers(inUse,
		func(context.Context, bool) (backend, error) { return a, nil },
		func(context.Context, bool) (backend, error) { return b, nil })
	_, _, err := l.list(t.Context())
	require.NoError(t, err)

	deltas := []delta{{del: rows[:2], add: rows[2:]}}
	_, err = l.reconcile(t.Context(), target{deltas: deltas, rows: slices.Values(rows[2:]), base: true})
	require.ErrorIs(t, err, errInjected)
	assert.Empty(t, inUse.rows)
	assert.Len(t, a.rows, 1)
	assert.Len(t, b.rows, 1)

	b.fail = nil

	_, err = l.reconcile(t.Context(), target{deltas: deltas, rows: slices.Values(rows[2:]), base: true})
	require.NoError(t, err)
	assert.Equal(t, rows[2:], inUse.rows)
	assert.Empty(t, a.rows)
	assert.Empty(t, b.rows)
}

// By default it is nftables, and iptables where that cannot be; if neither can
// be, New and Add say why for both.
func TestBackendAuto(t *testing.T) {
	n := newNode(t, variantNFT)
	auto := WithBackend(BackendAuto)
	port := &PortMapping{HostPort: 8080, ContainerPort: 80}

	m := n.manager(auto)
	require.NoError(t, n.add(m, "id", n.pod(0, IPv4, port)))
	assert.Equal(t, BackendNFTables, m.Mappings()[0].Backend)
	require.NoError(t, n.remove(m, "id", nil))
	require.NoError(t, m.Close())

	n.occupy()

	m = n.manager(auto)
	require.NoError(t, n.add(m, "id", n.pod(0, IPv4, port)))
	assert.Equal(t, BackendIPTables, m.Mappings()[0].Backend)
	require.NoError(t, n.remove(m, "id", nil))
	require.NoError(t, m.Close())

	t.Setenv("PATH", t.TempDir())
	n.do(func() {
		_, err := New(auto, WithLogger(testLogger(t)))
		require.ErrorContains(t, err, "add chain prerouting")
		require.ErrorIs(t, err, exec.ErrNotFound)

		err = metaManager(t, auto).Add("id", n.pod(0, IPv4, port), "")
		require.ErrorContains(t, err, "add chain prerouting")
		require.ErrorIs(t, err, exec.ErrNotFound)
	})
}
