package hostport

import (
	"bytes"
	"context"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"testing"

	"github.com/mdlayher/netlink"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cri-o/hostport/internal/iptables"
	"github.com/cri-o/hostport/internal/nfnetlink"
	"github.com/cri-o/hostport/internal/nftables"
	"github.com/cri-o/hostport/internal/outcome"
	"github.com/cri-o/hostport/internal/row"
)

func TestUnknownBackend(t *testing.T) {
	t.Parallel()

	for _, b := range []Backend{"iptabels", ""} {
		_, err := New(WithBackend(b), WithLogger(testLogger(t)))
		require.ErrorContains(t, err, `want auto, nftables or iptables`)
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

// occupy makes our layout impossible until leave: two of our chains are gone, and others
// have taken all places but one where those were (MAX_HOOK_COUNT, net/netfilter/core.c).
func (n *node) occupy() (leave func()) {
	n.t.Helper()

	const places = 1024

	var left []netlink.Message

	for _, f := range []IPFamily{IPv4, IPv6} {
		ours := nftables.NewLayout(f)
		others := nfnetlink.Table{Family: ours.Table.Family, Name: "others"}

		n.commit(append(ours.Objects(),
			ours.Table.FlushChain(nftables.Prerouting), ours.Table.DeleteChain(nftables.Prerouting),
			ours.Table.FlushChain(nftables.NATPrerouting), ours.Table.DeleteChain(nftables.NATPrerouting))...)

		taken := []netlink.Message{others.Create()}
		for i := range places - 1 {
			taken = append(taken, others.CreateChain(nfnetlink.Chain{
				Name: strconv.Itoa(i), Type: "nat", Hook: unix.NF_INET_PRE_ROUTING, Priority: nftables.PriorityDNAT,
			}))
		}

		n.commit(taken...)

		left = append(left, others.Delete())
	}

	return func() { n.commit(left...) }
}

// Where nftables cannot be used any more, rows that it carries from before are
// removed there and moved over all the same.
func TestNFTablesFromBeforeUnusable(t *testing.T) {
	n := newNode(t, iptables.NFT)
	gone := n.manager(WithBackend(BackendNFTables))
	pod := n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})
	require.NoError(t, n.add(gone, "id", pod))
	require.NoError(t, n.add(gone, "goes", n.pod(0, IPv6, &PortMapping{HostPort: 8080, ContainerPort: 80})))
	require.NoError(t, n.add(gone, "leak", n.pod(0, IPv4, &PortMapping{HostPort: 8081, ContainerPort: 80})))
	require.NoError(t, gone.Close())

	leave := n.occupy()
	m := n.manager(WithBackend(BackendAuto))

	leave()
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
		require.ErrorIs(t, m.Remove("id", nil), unix.E2BIG)
		require.NoError(t, m.Remove("id", n.pod(0, IPv4)), "but for nothing")
	})
	assert.NotEmpty(t, n.elements(IPv4))
}

// A table of our name that another process has to itself is not put right.
func TestTableOfAnotherProcess(t *testing.T) {
	if !nfnetlink.KernelAtLeast(5, 12) { // where nobody can
		return
	}

	n := newNode(t, iptables.NFT)
	other := n.nfnetlink()

	for _, f := range []IPFamily{IPv4, IPv6} {
		create := nftables.NewLayout(f).Table.Create()
		create.Data = bytes.Replace(create.Data, []byte{8, 0, unix.NFTA_TABLE_FLAGS, 0, 0, 0, 0, 0},
			[]byte{8, 0, unix.NFTA_TABLE_FLAGS, 0, 0, 0, 0, 2}, 1) // NFT_TABLE_F_OWNER
		require.NoError(t, other.Commit(t.Context(), 0, append([]netlink.Message{create}, nftables.NewLayout(f).Objects()[1:]...)))
	}

	n.do(func() {
		_, err := New(WithBackend(BackendNFTables), WithoutLocalhost(), WithLogger(testLogger(t)))
		require.ErrorIs(t, err, unix.EPERM)
	})

	m := n.manager(WithBackend(BackendAuto))
	require.NoError(t, n.add(m, "id", n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})))
	assert.Equal(t, BackendIPTables, m.Mappings()[0].Backend)
}

// rowKeeper is a backend that keeps rows to itself.
type rowKeeper struct {
	backend

	rows []*row.Row
	fail error
}

func (b *rowKeeper) Kind(*row.Row) string          { return "memory" }
func (b *rowKeeper) Name(*row.Row) string          { return "" }
func (b *rowKeeper) OwnedBy(string, *row.Row) bool { return true }
func (b *rowKeeper) List(context.Context) ([]*row.Row, bool, error) {
	return slices.Clone(b.rows), true, nil
}

func (b *rowKeeper) Reconcile(_ context.Context, t row.Target) ([]row.Repair, error) {
	if b.fail != nil {
		return nil, b.fail
	}

	if t.Whole {
		b.rows = slices.Collect(t.Rows)

		return nil, nil
	}

	for _, d := range t.Deltas {
		b.rows = append(slices.DeleteFunc(b.rows, func(r *row.Row) bool { return slices.Contains(d.Del, r) }), d.Add...)
	}

	return nil, nil
}

// Where one of several backends fails, all that went before can be taken back.
func TestLayersTakeBack(t *testing.T) {
	t.Parallel()

	var rows []*row.Row

	for _, id := range []string{"a", "b", "new"} {
		some, err := rowsOf(id, podAt("10.88.0.2", &PortMapping{HostPort: 8080, ContainerPort: 80}))
		require.NoError(t, err)

		rows = append(rows, some...)
	}

	inUse, a, b := &rowKeeper{}, &rowKeeper{rows: slices.Clone(rows[:1])}, &rowKeeper{rows: slices.Clone(rows[1:2]), fail: errInjected}
	l := newMigration(inUse,
		func(context.Context, bool) (backend, error) { return a, nil },
		func(context.Context, bool) (backend, error) { return b, nil })
	_, _, err := l.List(t.Context())
	require.NoError(t, err)

	deltas := []row.Delta{{Del: rows[:2], Add: rows[2:]}}
	_, err = l.Reconcile(t.Context(), row.Target{Deltas: deltas, Rows: slices.Values(rows[2:]), Base: true})
	require.ErrorIs(t, err, errInjected)
	require.True(t, outcome.IsPartly(err))

	_, err = l.Reconcile(t.Context(), row.Target{Rows: slices.Values(rows[:2]), Base: true, Whole: true})
	require.True(t, isLeftBehind(err))
	assert.Empty(t, inUse.rows)
	assert.Len(t, a.rows, 1)
	assert.Len(t, b.rows, 1)

	b.fail = nil

	_, err = l.Reconcile(t.Context(), row.Target{Deltas: deltas, Rows: slices.Values(rows[2:]), Base: true})
	require.NoError(t, err)
	assert.Equal(t, rows[2:], inUse.rows)
	assert.Empty(t, a.rows)
	assert.Empty(t, b.rows)
}

// What is from before and could not be taken out is not forgotten, also if another backend
// keeps rows.
func TestLayersTakeOutLater(t *testing.T) {
	t.Parallel()

	rows, err := rowsOf("id", podAt("10.88.0.2", &PortMapping{HostPort: 8080, ContainerPort: 80}, &PortMapping{HostPort: 8081, ContainerPort: 80}))
	require.NoError(t, err)

	stays, goes := &rowKeeper{rows: slices.Clone(rows[:1])}, &rowKeeper{rows: slices.Clone(rows[1:]), fail: errInjected}
	l := newMigration(&rowKeeper{},
		func(context.Context, bool) (backend, error) { return stays, nil },
		func(context.Context, bool) (backend, error) { return goes, nil })
	_, _, err = l.List(t.Context())
	require.NoError(t, err)

	target := row.Target{Rows: slices.Values(rows[:1]), Base: true, Whole: true, Exactly: true}
	_, err = l.Reconcile(t.Context(), target)
	require.True(t, isLeftBehind(err))

	goes.fail = nil

	_, err = l.Reconcile(t.Context(), target)
	require.NoError(t, err)
	assert.Empty(t, goes.rows)
	assert.Equal(t, rows[:1], stays.rows)
}

// The backend in use comes first: where it fails, what is from before stays.
func TestLayersInOrder(t *testing.T) {
	t.Parallel()

	rows, err := rowsOf("id", podAt("10.88.0.2", &PortMapping{HostPort: 8080, ContainerPort: 80}, &PortMapping{HostPort: 8081, ContainerPort: 80}))
	require.NoError(t, err)

	before := &rowKeeper{rows: slices.Clone(rows[:1])}
	l := newMigration(&rowKeeper{fail: errInjected}, func(context.Context, bool) (backend, error) { return before, nil })
	l.listed = true
	_, _, err = l.List(t.Context())
	require.NoError(t, err)

	_, err = l.Reconcile(t.Context(), row.Target{Rows: slices.Values(rows[1:]), Base: true, Whole: true, Exactly: true})
	require.ErrorIs(t, err, errInjected)
	assert.Equal(t, rows[:1], before.rows)
}

// By default it is nftables, and iptables where that cannot be; if neither can
// be, New and Add say why for both.
func TestBackendAuto(t *testing.T) {
	n := newNode(t, iptables.NFT)
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
		require.ErrorIs(t, err, unix.E2BIG)
		require.ErrorIs(t, err, exec.ErrNotFound)

		err = metaManager(t, auto).Add("id", n.pod(0, IPv4, port), "")
		require.ErrorContains(t, err, "add chain prerouting")
		require.ErrorIs(t, err, exec.ErrNotFound)
	})
}
