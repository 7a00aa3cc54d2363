package hostport

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mdlayher/netlink"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cri-o/hostport/internal/iptables"
	"github.com/cri-o/hostport/internal/nfnetlink"
	"github.com/cri-o/hostport/internal/nftables"
	"github.com/cri-o/hostport/internal/row"
)

// register is the first of 16 bytes (NFT_REG_1, linux/netfilter/nf_tables.h).
const register = 1

// nfnetlink is a socket on the node, until the test ends.
func (n *node) nfnetlink() *nfnetlink.Conn {
	n.t.Helper()

	var conn *nfnetlink.Conn

	n.do(func() {
		var err error
		conn, err = nfnetlink.Dial()
		require.NoError(n.t, err)
	})
	n.t.Cleanup(func() { assert.NoError(n.t, conn.Close()) })

	return conn
}

// reader is such a socket for whoever looks often.
func (n *node) reader() *nfnetlink.Conn {
	n.t.Helper()

	if n.reads == nil {
		n.reads = n.nfnetlink()
	}

	return n.reads
}

// commit changes the node's nf_tables, as somebody else might.
func (n *node) commit(msgs ...netlink.Message) {
	n.t.Helper()

	// On no condition: a manager may commit at the same time.
	require.NoError(n.t, n.nfnetlink().Commit(context.Background(), 0, msgs))
}

// nftRules is all that a family has in nf_tables, to the byte: a line for each
// table, chain, rule, set and element.
func (n *node) nftRules(f IPFamily) []string {
	n.t.Helper()

	conn := n.nfnetlink()
	family := nftables.NewLayout(f).Table.Family

	var lines []string

	for _, kind := range []struct {
		name string
		get  netlink.HeaderType
	}{{"table", unix.NFT_MSG_GETTABLE}, {"chain", unix.NFT_MSG_GETCHAIN}, {"rule", unix.NFT_MSG_GETRULE}, {"set", unix.NFT_MSG_GETSET}} {
		msgs, err := conn.Dump(context.Background(), netlink.Message{
			Header: netlink.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | kind.get, Flags: netlink.Request},
			Data:   []byte{family, 0, 0, 0},
		})
		require.NoError(n.t, err)

		for _, m := range msgs {
			attrs := m.Data[4:] // before that stands the generation
			table := stringAttr(n, attrs, unix.NFTA_RULE_TABLE)
			lines = append(lines, fmt.Sprintf("%s %s %x", table, kind.name, attrs))

			if kind.name == "set" {
				lines = append(lines, n.nftElements(conn, nfnetlink.Table{Family: family, Name: table}, stringAttr(n, attrs, unix.NFTA_SET_NAME))...)
			}
		}
	}

	return lines
}

func (n *node) nftElements(conn *nfnetlink.Conn, table nfnetlink.Table, set string) []string {
	n.t.Helper()

	msgs, err := conn.Dump(context.Background(), table.Elements(set))
	require.NoError(n.t, err)

	var lines []string

	for _, m := range msgs {
		elements, err := nfnetlink.ParseElements(m)
		require.NoError(n.t, err)

		for _, e := range elements {
			lines = append(lines, fmt.Sprintf("%s element %s %x : %x %q", table.Name, set, e.Key, e.Data, e.Comment))
		}
	}

	return slices.Sorted(slices.Values(lines)) // their order means nothing
}

func stringAttr(n *node, attrs []byte, kind uint16) (value string) {
	n.t.Helper()

	ad, err := netlink.NewAttributeDecoder(attrs)
	require.NoError(n.t, err)

	for ad.Next() {
		if ad.Type() == kind {
			value = ad.String()
		}
	}

	return value
}

// addForeignNFT adds a table of somebody else's with hooks where ours are.
func (n *node) addForeignNFT(f IPFamily) {
	n.t.Helper()

	t := nfnetlink.Table{Family: nftables.NewLayout(f).Table.Family, Name: "cni"}
	set := nfnetlink.Set{Name: "pods", Key: []nfnetlink.DataType{nftables.NewLayout(f).Addr}, Comment: "of others"}
	n.commit(
		t.Create(),
		t.CreateSet(set),
		t.AddElement(set.Name, nfnetlink.Element{Key: n.Pods[0].IP(f == IPv6).AsSlice(), Comment: "of others"}),
		t.CreateChain(nfnetlink.Chain{Name: "services", Type: "nat", Hook: unix.NF_INET_PRE_ROUTING, Priority: nftables.PriorityDNAT}),
		t.CreateChain(nfnetlink.Chain{Name: "masquerade", Type: "nat", Hook: unix.NF_INET_POST_ROUTING, Priority: nftables.PrioritySNAT}),
		t.AppendRule("services", nfnetlink.LoadProtocol(register), nfnetlink.EqualTo(register, 0)),
	)
}

// wipe deletes all of our rules in a family, but neither chains nor maps.
func (n *node) wipe(f IPFamily) {
	n.t.Helper()

	if n.variant == viaMemory {
		n.memory.Wipe()

		return
	}

	if n.variant != viaNFTables {
		n.iptables(f, "-F")
		n.command(iptables.Command(f)+"-"+string(n.variant), "-t", iptables.RawTable, "-F")

		return
	}

	t := nftables.NewLayout(f).Table
	n.commit(t.FlushChain(nftables.HostPorts), t.FlushChain(nftables.NATPrerouting), t.FlushChain(nftables.NATOutput), t.FlushChain(nftables.Masquerading))

	if f == IPv4 {
		n.commit(t.FlushChain(nftables.GuardChain))
	}
}

// eachNFTFamily runs f on a fresh node with nftables for each IP family.
func eachNFTFamily(t *testing.T, f func(t *testing.T, n *node, family IPFamily)) {
	t.Helper()
	eachFamilyOf(t, []iptables.Variant{viaNFTables}, f)
}

// fakeNFT is a connection, a real one underneath, that fails when told to, and
// counts.
type fakeNFT struct {
	nftables.Conn

	generation func() error
	commit     func(msgs []netlink.Message) ([]netlink.Message, error) // may change what is committed
	get, dump  func() error

	commits, others atomic.Int32
}

func (f *fakeNFT) Generation(ctx context.Context) (uint32, error) {
	f.others.Add(1)

	if err := called(f.generation); err != nil {
		return 0, err
	}

	return f.Conn.Generation(ctx)
}

func (f *fakeNFT) Commit(ctx context.Context, gen uint32, msgs []netlink.Message) error {
	f.commits.Add(1)

	if f.commit != nil {
		var err error
		if msgs, err = f.commit(msgs); err != nil {
			return err
		}
	}

	return f.Conn.Commit(ctx, gen, msgs)
}

func (f *fakeNFT) Get(ctx context.Context, requests ...netlink.Message) ([]*netlink.Message, error) {
	f.others.Add(1)

	if err := called(f.get); err != nil {
		return nil, err
	}

	return f.Conn.Get(ctx, requests...)
}

func (f *fakeNFT) Dump(ctx context.Context, request netlink.Message) ([]netlink.Message, error) {
	f.others.Add(1)

	if err := called(f.dump); err != nil {
		return nil, err
	}

	return f.Conn.Dump(ctx, request)
}

func called(f func() error) error {
	if f == nil {
		return nil
	}

	return f()
}

// nftOver returns a backend over a connection.
func nftOver(t testing.TB, conn nftables.Conn, f IPFamily) *nftables.Backend {
	t.Helper()

	ruleset := nftables.NewRuleset(func() (nftables.Conn, error) { return conn, nil })
	require.NoError(t, ruleset.Open())

	return nftables.New(ruleset, f, f == IPv4, f == IPv4)
}

// viaFake returns a Manager whose families share a fake connection.
func (n *node) viaFake(opts ...Option) (*Manager, *fakeNFT) {
	n.t.Helper()

	fake := &fakeNFT{Conn: n.nfnetlink()}
	cfg := newConfig(append([]Option{WithLogger(testLogger(n.t))}, opts...))
	opener := newSystemOpener(cfg)
	m := &Manager{opener: opener, lock: newNodeLock(cfg, IPv4, IPv6)}
	opener.finder.Ruleset = nftables.NewRuleset(func() (nftables.Conn, error) { return fake, nil })

	for _, f := range []IPFamily{IPv4, IPv6} {
		fm := newHostportManager(f, cfg, func(context.Context) (backend, error) {
			return opener.finder.NFTables(f)
		})
		n.do(func() { require.NoError(n.t, fm.start(context.Background(), false)) })
		m.families = append(m.families, fm)
	}

	n.t.Cleanup(func() { assert.NoError(n.t, m.Close()) })

	return m, fake
}

// elements are those of our table.
func (n *node) elements(f IPFamily) []string { return n.leftOver(f) }

// In the steady state an operation is one transaction and nothing else, also
// where the families take turns.
func TestOneTransactionPerOperation(t *testing.T) {
	n := newNode(t, viaNFTables)
	m, fake := n.viaFake()
	port, other := &PortMapping{HostPort: 8080, ContainerPort: 80}, &PortMapping{HostPort: 8081, ContainerPort: 80}

	first := &PodPortMapping{IP: net.IPv4(10, 88, 9, 9), PortMappings: []*PortMapping{{HostPort: 8079, ContainerPort: 80}}}

	for _, ip := range []net.IP{net.ParseIP("fd00:88::99"), first.IP} { // the first makes the table
		first.IP = ip
		require.NoError(t, n.add(m, "first", first))
	}

	for i, do := range []func() error{
		func() error { return n.add(m, "a", n.pod(0, IPv4, port)) },
		func() error { return n.add(m, "a", n.pod(0, IPv6, port)) },
		func() error { return n.add(m, "a", n.pod(1, IPv4, port)) },
		func() error { return n.add(m, "a", n.pod(1, IPv4, other)) }, // which shares the pod's hairpin
		func() error { return n.remove(m, "a", n.pod(1, IPv4, other)) },
		func() error { return n.remove(m, "a", n.pod(0, IPv4, port)) },
		func() error { return n.add(m, "b", n.pod(1, IPv6, port)) },
		func() error { return n.remove(m, "b", nil) },
	} {
		fake.commits.Store(0)
		fake.others.Store(0)
		require.NoError(t, do())
		assert.LessOrEqual(t, fake.commits.Load(), int32(2), "step %d", i) // Remove is of both families
		assert.Zero(t, fake.others.Load(), "step %d", i)
	}

	// Where nothing has changed, there is nothing to commit.
	before := n.dump(m)

	require.NoError(t, n.add(m, "first", first))
	assert.Equal(t, before, n.dump(m))
}

// That the table is made again when all has been taken out puts nothing right.
func TestTableMadeAgain(t *testing.T) {
	n := newNode(t, viaNFTables)
	b := nftOver(t, n.nfnetlink(), IPv4)

	for range 2 {
		repairs, err := b.Reconcile(t.Context(), row.Target{Rows: slices.Values([]*row.Row(nil)), Base: true, Whole: true})
		require.NoError(t, err)
		assert.Empty(t, repairs)

		_, err = b.Reconcile(t.Context(), row.Nothing())
		require.NoError(t, err)
	}
}

// A table from before without rows is looked over by the first Add.
func TestTableFromBeforeWithoutRows(t *testing.T) {
	eachNFTFamily(t, func(t *testing.T, n *node, f IPFamily) {
		n.serve(0, "tcp", f, 80)

		pod := n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80})
		before := n.manager(WithoutLocalhost()) // which may have it looked over at the start
		require.NoError(t, n.add(before, "id", pod))
		require.NoError(t, n.remove(before, "id", pod))
		require.NoError(t, before.Close())

		table := nftables.NewLayout(f).Table
		n.commit(table.FlushChain(nftables.HostPorts))
		require.NoError(t, n.add(n.manager(WithoutLocalhost()), "id", pod))
		n.answers(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(f), 8080), "web")
	})
}

// A look after which there is nothing to do is no transaction: the next one is somebody else's.
func TestNothingToDoIsNoTransaction(t *testing.T) {
	n := newNode(t, viaNFTables)
	conn := n.nfnetlink()
	b := nftOver(t, conn, IPv4)

	for range 2 {
		_, err := b.Reconcile(t.Context(), row.Target{Rows: slices.Values([]*row.Row(nil)), Base: true, Whole: true})
		require.NoError(t, err)
	}

	n.wipe(IPv4)

	gen, err := conn.Generation(t.Context())
	require.NoError(t, err)

	table := nftables.NewLayout(IPv4).Table
	change := nfnetlink.Change{Family: table.Family, Table: table.Name, Chain: nftables.HostPorts}

	for _, g := range []uint32{gen - 1, gen} {
		assert.True(t, b.Disturbed([]nfnetlink.Transaction{{Generation: g, Changes: map[nfnetlink.Change]bool{change: true}}}))
	}
}

// What the kernel could not tell of may have been about our table.
func TestLostNewsDisturbs(t *testing.T) {
	n := newNode(t, viaNFTables)
	b := nftOver(t, n.nfnetlink(), IPv4)
	assert.False(t, b.Disturbed([]nfnetlink.Transaction{{Generation: 1}}))
	assert.True(t, b.Disturbed([]nfnetlink.Transaction{{}}))
}

// Whatever somebody does to our table between two operations, the next one
// puts it right, for all rows.
func TestTableIsRepaired(t *testing.T) {
	eachNFTFamily(t, func(t *testing.T, n *node, f IPFamily) {
		n.serve(0, "tcp", f, 80)

		m := n.manager()
		stays := n.pod(0, f,
			&PortMapping{HostPort: 8080, ContainerPort: 80},
			&PortMapping{HostPort: 8081, ContainerPort: 80, HostIP: n.otherNodeIP(f).String()})
		other := n.pod(1, f, &PortMapping{HostPort: 9000, ContainerPort: 80})
		require.NoError(t, n.add(m, "stays", stays))

		elements := n.elements(f)
		l := nftables.NewLayout(f)
		crio := append(slices.Clone(l.Objects()), // CRI-O makes its rules anew with each Add
			l.Table.FlushChain(nftables.Masquerading))

		for name, breakIt := range map[string][]netlink.Message{
			"flush table":         {l.Table.FlushChain(nftables.HostPorts), l.Table.FlushChain(nftables.NATPrerouting), l.Table.FlushChain(nftables.NATOutput), l.Table.FlushChain(nftables.Masquerading)},
			"flush one chain":     {l.Table.FlushChain(nftables.Masquerading)},
			"delete chain":        {l.Table.FlushChain(nftables.NATOutput), l.Table.DeleteChain(nftables.NATOutput)},
			"delete table":        {l.Table.Delete()},
			"delete and make":     append([]netlink.Message{l.Table.Delete()}, l.Objects()...),
			"delete and make all": append([]netlink.Message{l.Table.Delete()}, crio...),
			"rules of others":     crio,
			"nothing of ours":     {nfnetlink.Table{Family: l.Table.Family, Name: "others"}.Create()},
		} {
			t.Run(name, func(t *testing.T) {
				n := n.within(t)

				for _, do := range []func() error{
					func() error { return n.add(m, "other", other) },
					func() error { return n.add(m, "other", other) },
					func() error { return n.remove(m, "other", nil) },
				} {
					n.commit(breakIt...)
					require.NoError(t, do())
					n.answers(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(f), 8080), "web")
					n.answers(n.Client, "tcp", netip.AddrPortFrom(n.otherNodeIP(f), 8081), "web")
					n.answers(n.Host, "tcp", netip.AddrPortFrom(n.nodeIP(f), 8080), "web")
					n.answers(n.Pods[0].Namespace, "tcp", netip.AddrPortFrom(n.nodeIP(f), 8080), "web")
				}

				assert.Equal(t, elements, n.elements(f))
			})
		}
	})
}

// An element has one owner, and it is looked up before anything is done to it.
func TestElementsOfStrangers(t *testing.T) {
	eachNFTFamily(t, func(t *testing.T, n *node, f IPFamily) {
		m := n.manager()
		port := &PortMapping{HostPort: 8080, ContainerPort: 80}
		require.NoError(t, n.add(m, "id", n.pod(0, f, port)))

		table := nftables.NewLayout(f).Table
		rows, err := rowsOf("stranger", n.pod(1, f, port))
		require.NoError(t, err)

		theirs := nftables.RowElement(rows[0])
		n.commit(table.DeleteElement(theirs.Set, theirs.Element()), table.AddElement(theirs.Set, theirs.Element()))

		// What a stranger has put in the place of ours is not ours to remove.
		require.NoError(t, n.remove(m, "id", nil))
		assert.Len(t, n.elements(f), 1)
		assert.Contains(t, n.elements(f)[0], row.ShortHash("stranger"))

		// But a new pod's Add wins over it.
		require.NoError(t, n.add(m, "new", n.pod(0, f, port)))
		assert.Len(t, n.elements(f), 2)
		assert.NotContains(t, strings.Join(n.elements(f), "\n"), row.ShortHash("stranger"))

		// As does Add again, for an element that has gone or is another's.
		before := n.elements(f)

		n.commit(table.DeleteElement(theirs.Set, theirs.Element()), table.AddElement(theirs.Set, theirs.Element()))
		require.NoError(t, n.add(m, "new", n.pod(0, f, port)))
		assert.Equal(t, before, n.elements(f))

		hairpin := nftables.HairpinElement(n.Pods[0].IP(f == IPv6), "")
		n.commit(table.DeleteElement(theirs.Set, theirs.Element()), table.DeleteElement(hairpin.Set, hairpin.Element()))
		require.NoError(t, n.add(m, "new", n.pod(0, f, port)))
		assert.Equal(t, before, n.elements(f))
	})
}

// Two pods that have come to one IP, one of them a leak from before, share a
// hairpin, which is in the name of the newer one and goes with the last.
func TestHairpinOfTwo(t *testing.T) {
	n := newNode(t, viaNFTables)
	n.leftBehind("old", n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80}))

	m := n.manager()
	require.NoError(t, n.add(m, "new", n.pod(0, IPv4, &PortMapping{HostPort: 8081, ContainerPort: 80})))
	assert.Equal(t, 1, strings.Count(strings.Join(n.elements(IPv4), "\n"), nftables.Hairpins))
	assert.Equal(t, 2, strings.Count(strings.Join(n.elements(IPv4), "\n"), row.ShortHash("new")))

	worked := n.countWork()

	for range 20 { // it would be by chance
		n.runOnce(m.families[0], true)
	}

	assert.Zero(t, worked(), "it keeps its name")

	require.NoError(t, n.remove(m, "new", nil))
	assert.Len(t, n.elements(IPv4), 2)
	require.NoError(t, n.remove(m, "old", nil))
	assert.Empty(t, n.elements(IPv4))
}

// storm commits something of no concern some thousand times a second, until calm
// is called, which returns how often. another waits for one more.
func (n *node) storm() (another func(), calm func() int) {
	n.t.Helper()

	conn := n.nfnetlink()
	table := nfnetlink.Table{Family: unix.NFPROTO_IPV4, Name: "storm"}
	stop, done, committed := make(chan struct{}), make(chan int), make(chan struct{})

	go func() {
		tick := time.NewTicker(500 * time.Microsecond)
		defer tick.Stop()

		for commits := 0; ; {
			select {
			case <-stop:
				done <- commits

				return
			case <-tick.C:
			}

			gen, err := conn.Generation(context.Background())
			if err != nil || conn.Commit(context.Background(), gen, []netlink.Message{table.Create(), table.Delete()}) != nil {
				continue
			}

			commits++

			select {
			case committed <- struct{}{}:
			default:
			}
		}
	}()

	another = func() {
		select {
		case <-committed:
		case <-time.After(patience):
			assert.Fail(n.t, "nobody commits")
		}
	}
	calm = func() int {
		close(stop)

		return <-done
	}

	return another, calm
}

// Others may commit as often as they like.
func TestForeignCommits(t *testing.T) {
	n := newNode(t, viaNFTables)
	m := n.manager(WithoutSockets()) // so that the operations need not be in the namespace
	another, calm := n.storm()
	start := time.Now()

	var wg sync.WaitGroup

	for i := range 10 {
		wg.Go(func() {
			for j := range 20 {
				id := fmt.Sprint("id", i, "-", j)
				port := &PortMapping{HostPort: int32(8000 + 20*i + j), ContainerPort: 80}
				assert.NoError(t, n.add(m, id, n.pod(i%2, IPv4, port)))

				if j%2 == 0 {
					assert.NoError(t, n.remove(m, id, n.pod(i%2, IPv4, port)))
				}

				another()
			}
		})
	}

	wg.Wait()

	took := time.Since(start)
	commits := calm()

	t.Logf("%d commits of others in %v", commits, took)
	assert.GreaterOrEqual(t, commits, 200, "one beside each operation")

	mappings := m.Mappings()
	require.NoError(t, m.Close())

	adopted := n.manager(WithoutSockets()).Mappings()
	require.Len(t, adopted, 100)

	for i, mapping := range mappings {
		assert.Equal(t, adopted[i].HostPort, mapping.HostPort)
		assert.Equal(t, adopted[i].PodIDHash, mapping.PodIDHash)
	}
}

// A list is of one moment, though it takes several requests, and somebody may
// commit in between.
func TestListIsOfOneMoment(t *testing.T) {
	eachNFTFamily(t, func(t *testing.T, n *node, f IPFamily) {
		n.leftBehind("goes", n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80}))
		n.leftBehind("stays", n.pod(1, f, &PortMapping{HostPort: 8081, ContainerPort: 80}))

		rows, err := rowsOf("goes", n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80}))
		require.NoError(t, err)

		dumps := 0
		fake := &fakeNFT{Conn: n.nfnetlink(), dump: func() error {
			dumps++
			if dumps == 2 {
				e := nftables.RowElement(rows[0])
				n.commit(nftables.NewLayout(f).Table.DeleteElement(e.Set, e.Element()))
			}

			return nil
		}}
		b := nftOver(t, fake, f)

		list, _, err := b.List(t.Context())
		require.NoError(t, err)
		require.Len(t, list, 1)
		assert.Equal(t, uint16(8081), list[0].Port)

		// And it comes to an end where they commit all the time.
		another, calm := n.storm()

		for range 50 {
			list, _, err := b.List(t.Context())
			require.NoError(t, err)
			require.Len(t, list, 1)
		}

		another()
		assert.Positive(t, calm())
	})
}

// What one family has seen of a stranger's doings the other one has yet to see.
func TestFamiliesLookForThemselves(t *testing.T) {
	n := newNode(t, viaNFTables)
	m := n.manager()
	families := []IPFamily{IPv4, IPv6}
	add := func(f IPFamily, port int32) {
		require.NoError(t, n.add(m, fmt.Sprint(f, port), n.pod(0, f, &PortMapping{HostPort: port, ContainerPort: 80})))
	}

	for _, f := range families {
		add(f, 8080)
		n.serve(0, "tcp", f, 80)
	}

	for i := range families {
		first, second := families[i], families[1-i]
		n.wipe(second)
		add(first, 8081)
		add(second, 8082)
		n.answers(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(second), 8080), "web")
	}
}

// An operation comes to an end even if somebody commits each time between its
// look and its transaction, and the next one looks again.
func TestOvertakenEachTime(t *testing.T) {
	n := newNode(t, viaNFTables)
	n.serve(0, "tcp", IPv4, 80)

	m, fake := n.viaFake()
	require.NoError(t, n.add(m, "calm", n.pod(0, IPv4, &PortMapping{HostPort: 8079, ContainerPort: 80})))

	others := nfnetlink.Table{Family: unix.NFPROTO_IPV4, Name: "others"}
	fake.commit = func(msgs []netlink.Message) ([]netlink.Message, error) {
		n.commit(others.Create(), others.Delete())

		return msgs, nil
	}

	for i := range int32(3) {
		require.NoError(t, n.add(m, fmt.Sprint("id", i), n.pod(0, IPv4, &PortMapping{HostPort: 8080 + i, ContainerPort: 80})))
		n.answers(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(IPv4), uint16(8080+i)), "web")
	}

	fake.commit = nil

	fake.commits.Store(0)
	require.NoError(t, n.add(m, "id3", n.pod(0, IPv4, &PortMapping{HostPort: 8083, ContainerPort: 80})))
	assert.Equal(t, int32(1), fake.commits.Load(), "it knows that it does not know")
	require.NoError(t, n.remove(m, "id3", nil))

	n.wipe(IPv4)
	require.NoError(t, n.remove(m, "id0", nil))
	n.answers(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(IPv4), 8081), "web")
	assert.Len(t, n.elements(IPv4), 4)
}

// What somebody does to rules that have just been made, before they have been looked
// at, is not taken for ours.
func TestWipedWhenJustMade(t *testing.T) {
	eachNFTFamily(t, func(t *testing.T, n *node, f IPFamily) {
		n.serve(0, "tcp", f, 80)

		m, fake := n.viaFake()
		fake.commit = func(msgs []netlink.Message) ([]netlink.Message, error) {
			fake.commit = nil
			fake.get = func() error {
				fake.get = nil

				n.wipe(f)

				return nil
			}

			return msgs, nil
		}
		require.NoError(t, n.add(m, "id", n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80})))
		require.Nil(t, fake.get, "it has been looked at")

		require.NoError(t, n.add(m, "other", n.pod(1, f, &PortMapping{HostPort: 9090, ContainerPort: 80})))
		n.answers(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(f), 8080), "web")
	})
}

// fitting is how many rows a test puts into one transaction: many, or fewer with
// the kernel's default limit, which other user namespaces than the first cannot
// pass.
func fitting(many, fewer int) int {
	if uids, err := os.ReadFile("/proc/self/uid_map"); err != nil || !strings.Contains(string(uids), "4294967295") {
		return fewer
	}

	return many
}

// Many rows go in one transaction, and come back.
func TestManyRows(t *testing.T) {
	eachNFTFamily(t, func(t *testing.T, n *node, f IPFamily) {
		many := fitting(20_000, 2000)
		m := n.manager(WithoutSockets())
		pod := n.pod(0, f)

		for i := range many {
			pm := &PortMapping{HostPort: int32(1000 + i), ContainerPort: 80}
			if i%2 == 0 {
				pm.HostIP = n.nodeIP(f).String()
			}

			pod.PortMappings = append(pod.PortMappings, pm)
		}

		work := n.countWork()

		require.NoError(t, n.add(m, "id", pod))
		assert.Equal(t, 1, work())
		assert.Len(t, n.elements(f), many+1)

		require.NoError(t, m.Close())

		again := n.manager(WithoutSockets())
		assert.Len(t, again.Mappings(), many)

		n.commit(nftables.NewLayout(f).Table.Delete())
		require.NoError(t, n.add(again, "other", n.pod(1, f, &PortMapping{HostPort: 80, ContainerPort: 80})), "a repair of all of them")
		assert.Len(t, n.elements(f), many+3)
		require.NoError(t, n.remove(again, "id", nil))
		require.NoError(t, n.remove(again, "other", nil))
		assert.Empty(t, n.elements(f))
	})
}

// 200 Adds at once go in a few transactions, and one that the kernel refuses
// fails alone.
func TestGroupTransactions(t *testing.T) {
	n := newNode(t, viaNFTables)

	const pods, bad = 200, 117

	m, fake := n.viaFake()
	require.NoError(t, n.add(m, "first", n.pod(0, IPv4, &PortMapping{HostPort: 7999, ContainerPort: 80})))

	// What is wrong with one pod is in its element, and the real kernel finds it.
	rows, err := rowsOf("id", n.pod(0, IPv4, &PortMapping{HostPort: 8000 + bad, ContainerPort: 80}))
	require.NoError(t, err)

	key := []byte(nftables.RowElement(rows[0]).Key)
	fake.commit = refusing(IPv4, key)

	fake.commits.Store(0)

	errs := n.atOnce(pods, func(i int) error { return m.Add(fmt.Sprint("id", i), podNumber(i), "") })
	t.Logf("%d transactions for %d Adds", fake.commits.Load(), pods)
	assert.Less(t, fake.commits.Load(), int32(pods))

	for i, err := range errs {
		if i != bad {
			assert.NoError(t, err, i)

			continue
		}

		if assert.ErrorIs(t, err, unix.ENOENT) {
			assert.ErrorContains(t, err, "ns/pod117")
			assert.ErrorContains(t, err, ":8117")
		}
	}

	assert.Len(t, m.Mappings(), pods)
	assert.Len(t, n.elements(IPv4), 2*pods)
}

// refusing has the real kernel refuse to add elements with a key.
func refusing(f IPFamily, key []byte) func([]netlink.Message) ([]netlink.Message, error) {
	return func(msgs []netlink.Message) ([]netlink.Message, error) {
		msgs = slices.Clone(msgs)
		for i, m := range msgs {
			if m.Header.Type&0xff == unix.NFT_MSG_NEWSETELEM && bytes.Contains(m.Data, key) {
				msgs[i] = nftables.NewLayout(f).Table.AddElement("no-such-set", nfnetlink.Element{Key: key})
			}
		}

		return msgs, nil
	}
}

// Where it is another pod's row, which is to be put back, that the kernel refuses, the
// operation fails, and nothing else.
func TestAnothersRowIsRefused(t *testing.T) {
	eachNFTFamily(t, func(t *testing.T, n *node, f IPFamily) {
		m, fake := n.viaFake()
		stays := n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80})
		comes := n.pod(1, f, &PortMapping{HostPort: 9090, ContainerPort: 80})
		require.NoError(t, n.add(m, "stays", stays))
		n.commit(nftables.NewLayout(f).Table.Delete())

		key := []byte(nftables.RowElement(rowsOfAll(t, f, map[string][]*PodPortMapping{"stays": {stays}})[0]).Key)
		fake.commit = refusing(f, key)

		require.ErrorIs(t, n.add(m, "comes", comes), unix.ENOENT)
		assert.Len(t, m.Mappings(), 1)
		assert.Empty(t, n.elements(f))

		fake.commit = nil

		require.NoError(t, n.add(m, "comes", comes))
		n.exactly(m, map[string][]*PodPortMapping{"stays": {stays}, "comes": {comes}})
	})
}

// Whatever step fails, all is as before, and the second try works.
func TestFailedTransactionIsUndone(t *testing.T) {
	n := newNode(t, viaNFTables)
	others := nfnetlink.Table{Family: unix.NFPROTO_IPV4, Name: "others"}
	pod := n.pod(0, IPv4,
		&PortMapping{HostPort: 8080, ContainerPort: 81},
		&PortMapping{HostPort: 8090, ContainerPort: 80, Protocol: "UDP"})

	for _, op := range []struct {
		name string
		do   func(m HostPortManager) error
	}{
		{"add", func(m HostPortManager) error { return n.add(m, "id", pod) }},
		{"move", func(m HostPortManager) error {
			return n.add(m, "id", n.pod(1, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80}))
		}},
		{"remove", func(m HostPortManager) error { return n.remove(m, "id", nil) }},
	} {
		for name, fail := range map[string]func(fake *fakeNFT, err func() error){
			"commit": func(fake *fakeNFT, err func() error) {
				fake.commit = func([]netlink.Message) ([]netlink.Message, error) { return nil, err() }
			},
			"refused": func(fake *fakeNFT, err func() error) {
				fake.commit = func(msgs []netlink.Message) ([]netlink.Message, error) {
					return nil, &nfnetlink.BatchError{Message: len(msgs) - 1, Err: err()}
				}
			},
			"generation": func(fake *fakeNFT, err func() error) { fake.generation = err },
			"look":       func(fake *fakeNFT, err func() error) { fake.get = err },
			"rules":      func(fake *fakeNFT, err func() error) { fake.dump = err },
		} {
			t.Run(op.name+"/"+name, func(t *testing.T) {
				n := n.within(t)
				m, fake := n.viaFake()
				require.NoError(t, n.add(m, "id", n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})))

				before, held := n.dump(m), heldPorts(m.families[0])
				fail(fake, func() error { return errInjected })

				if name != "commit" && name != "refused" { // these come when somebody else has committed
					n.commit(others.Create(), others.Delete())
					before = n.dump(m)
				}

				err := op.do(m)
				require.ErrorIs(t, err, errInjected)
				assert.ErrorContains(t, err, "host ports of pod ")

				if op.name == "remove" {
					before = disowned(before)
				}

				assert.Equal(t, before, n.dump(m))
				assert.Equal(t, held, heldPorts(m.families[0]))

				fake.commit, fake.generation, fake.get, fake.dump = nil, nil, nil, nil

				require.NoError(t, op.do(m))
				require.NoError(t, n.remove(m, "id", nil))
				assert.Empty(t, m.Mappings())
				assert.Empty(t, heldPorts(m.families[0]))
				assert.Empty(t, n.elements(IPv4))
			})
		}
	}
}

// Operations on few ports and pods, committed together, some of them while
// others have committed or wiped our rules, leave the kernel with what the table
// says.
func TestRandomBatches(t *testing.T) {
	n := newNode(t, viaNFTables)
	m := n.manager(WithoutSockets())
	fm := m.families[0]
	others := nfnetlink.Table{Family: unix.NFPROTO_IPV4, Name: "others"}
	seed := uint64(time.Now().UnixNano())
	random := rand.New(rand.NewPCG(seed, 0))

	require.NoError(t, n.add(fm, "first", n.pod(0, IPv4, &PortMapping{HostPort: 9001, ContainerPort: 80}))) // makes the table

	for step := range 200 {
		fm.commitLock <- struct{}{} // so that all queue up

		var wg sync.WaitGroup

		for i := range 1 + random.IntN(5) {
			id := fmt.Sprint("id", random.IntN(3))
			pod := n.pod(random.IntN(2), IPv4, &PortMapping{HostPort: int32(8080 + random.IntN(3)), ContainerPort: int32(80 + random.IntN(2))})

			if random.IntN(3) == 0 {
				wg.Go(func() { assert.NoError(t, n.remove(fm, id, nil)) })
			} else {
				wg.Go(func() { // the port may be another pod's
					if conflict := (*ConflictError)(nil); !errors.As(n.add(fm, id, pod), &conflict) {
						assert.Nil(t, conflict)
					}
				})
			}

			require.Eventually(t, func() bool {
				fm.queueMu.Lock()
				defer fm.queueMu.Unlock()

				return len(fm.queue) == i+1
			}, patience, time.Microsecond)
		}

		switch random.IntN(4) {
		case 0:
			n.commit(others.Create(), others.Delete())
		case 1:
			n.wipe(IPv4)
		case 2:
			n.commit(nftables.NewLayout(IPv4).Table.Create(), nftables.NewLayout(IPv4).Table.Delete())
		}

		<-fm.commitLock
		wg.Wait()
		require.NoError(t, n.add(fm, "last", n.pod(0, IPv4, &PortMapping{HostPort: 9000, ContainerPort: 80})), "which repairs, if nothing else did")

		should := map[nftables.ElementKey]string{}

		for r := range fm.table() {
			e := nftables.RowElement(r)
			should[e.ElementKey] = e.Data + e.Comment
			should[nftables.HairpinElement(r.Pod.Addr(), "").ElementKey] = ""
		}

		have := map[nftables.ElementKey]string{}

		elements, err := nftOver(t, n.nfnetlink(), IPv4).Dump(t.Context())
		require.NoError(t, err)

		for key, e := range elements {
			if have[key] = e.Data + e.Comment; key.Set == nftables.Hairpins {
				have[key] = "" // in the name of one of its pods
			}
		}

		require.Equal(t, should, have, "seed %d, step %d", seed, step)
	}
}

// A transaction that took effect though nobody was told so is taken back by the
// next operation.
func TestLostAnswer(t *testing.T) {
	n := newNode(t, viaNFTables)
	m, fake := n.viaFake()
	first := n.pod(1, IPv4, &PortMapping{HostPort: 7999, ContainerPort: 80})
	require.NoError(t, n.add(m, "first", first))

	before := n.elements(IPv4)

	for _, do := range []func() error{
		func() error { return n.add(m, "id", n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})) },
		func() error {
			return n.add(m, "first", n.pod(0, IPv4, &PortMapping{HostPort: 7999, ContainerPort: 80}))
		},
		func() error { return n.remove(m, "first", nil) },
	} {
		fake.commit = func(msgs []netlink.Message) ([]netlink.Message, error) {
			n.commit(msgs...)

			return nil, errInjected
		}
		require.ErrorIs(t, do(), errInjected)
		require.NotEqual(t, before, n.elements(IPv4), "it has taken effect")

		fake.commit = nil

		require.NoError(t, n.add(m, "first", first))
		require.Equal(t, before, n.elements(IPv4))
	}

	only := newNode(t, viaNFTables)
	m, fake = only.viaFake()
	pod := only.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})
	fake.commit = func(msgs []netlink.Message) ([]netlink.Message, error) {
		only.commit(msgs...)

		return nil, errInjected
	}

	require.ErrorIs(t, only.add(m, "id", pod), errInjected)
	require.Len(t, only.elements(IPv4), 2, "row and hairpin")
	require.ErrorIs(t, only.remove(m, "id", nil), errInjected)

	fake.commit = nil

	require.NoError(t, only.remove(m, "id", nil))
	require.Empty(t, only.elements(IPv4))

	// Nothing is in doubt any more: looks are as short as they were.
	looks := func() int32 {
		foreign := nfnetlink.Table{Family: unix.NFPROTO_IPV4, Name: "foreign"}
		only.commit(foreign.Create(), foreign.Delete())
		fake.others.Store(0)
		require.NoError(t, only.add(m, "id", pod))

		return fake.others.Load()
	}
	after := looks()

	require.NoError(t, m.Close())

	m, fake = only.viaFake()
	require.NoError(t, only.remove(m, "id", pod))
	assert.Equal(t, looks(), after)
}

// What of that somebody else has put another row in place of is not ours to take back.
func TestLostToOthers(t *testing.T) {
	eachNFTFamily(t, func(t *testing.T, n *node, f IPFamily) {
		port := &PortMapping{HostPort: 8080, ContainerPort: 80}
		element := func(id string, pod *PodPortMapping) nftables.Element {
			return nftables.RowElement(rowsOfAll(t, f, map[string][]*PodPortMapping{id: {pod}})[0])
		}
		ours, theirs := element("id", n.pod(0, f, port)), element("theirs", n.pod(1, f, port))
		table := nftables.NewLayout(f).Table

		for name, next := range map[string]func(n *node, m *Manager){
			"another pod's Add": func(n *node, m *Manager) {
				require.NoError(t, n.add(m, "other", n.pod(1, f, &PortMapping{HostPort: 9090, ContainerPort: 80})))
			},
			"Remove": func(n *node, m *Manager) { require.NoError(t, n.remove(m, "id", nil)) },
			"Run":    (*node).run,
		} {
			t.Run(name, func(t *testing.T) {
				n := n.within(t)
				m, fake := n.viaFake()
				fake.commit = func(msgs []netlink.Message) ([]netlink.Message, error) {
					fake.commit = nil

					n.commit(msgs...)
					n.commit(table.DeleteElement(ours.Set, ours.Element()), table.AddElement(theirs.Set, theirs.Element()))

					return nil, errInjected
				}
				require.ErrorIs(t, n.add(m, "id", n.pod(0, f, port)), errInjected)
				next(n, m)

				elements := func() string { return strings.Join(n.elements(f), "\n") }
				n.soon(func() bool { return !strings.Contains(elements(), ours.Comment) })
				assert.Contains(t, elements(), theirs.Comment)
				require.NoError(t, n.sync(m, nil))
			})
		}
	})
}

// An element that somebody has deleted comes back with its pod's Add, whatever
// other pods' operations have come in between.
func TestAddAgainAfterOthers(t *testing.T) {
	eachNFTFamily(t, func(t *testing.T, n *node, f IPFamily) {
		m := n.manager()
		pod := n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80})
		require.NoError(t, n.add(m, "id", pod))

		l := nftables.NewLayout(f)
		r := rowsOfAll(t, f, map[string][]*PodPortMapping{"id": {pod}})[0]

		for _, e := range []nftables.Element{nftables.RowElement(r), nftables.HairpinElement(r.Pod.Addr(), r.OwnerHash)} {
			n.commit(l.Table.DeleteElement(e.Set, e.Element()))
			require.NoError(t, n.add(m, "between", n.pod(1, f, &PortMapping{HostPort: 9000, ContainerPort: 80})))
			require.NoError(t, n.remove(m, "between", nil))
			require.NoError(t, n.add(m, "id", pod))
			require.Empty(t, n.deviations(f, []*row.Row{r}))
		}

		// What the pod's rows share comes back with any of them.
		hairpin := nftables.HairpinElement(r.Pod.Addr(), r.OwnerHash)
		n.commit(l.Table.DeleteElement(hairpin.Set, hairpin.Element()))
		require.NoError(t, n.add(m, "between", n.pod(1, f, &PortMapping{HostPort: 9000, ContainerPort: 80})))

		more := n.pod(0, f, &PortMapping{HostPort: 8081, ContainerPort: 80})
		require.NoError(t, n.add(m, "id", more))
		require.Empty(t, n.deviations(f, rowsOfAll(t, f, map[string][]*PodPortMapping{
			"id": {pod, more}, "between": {n.pod(1, f, &PortMapping{HostPort: 9000, ContainerPort: 80})},
		})))
	})
}

// Rows that iptables carries from before are listed, held, removed there and
// moved over, and the other way round.
func TestBackendChanges(t *testing.T) {
	for _, tc := range []struct{ from, to iptables.Variant }{
		{iptables.NFT, viaNFTables}, {iptables.Legacy, viaNFTables}, {viaNFTables, iptables.NFT}, {viaNFTables, iptables.Legacy},
	} {
		t.Run(string(tc.from)+" to "+string(tc.to), func(t *testing.T) {
			n := newNode(t, tc.from)
			n.serve(0, "tcp", IPv4, 80)
			n.serve(0, "tcp", IPv4, 81)

			stays := n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80}, &PortMapping{HostPort: 8083, ContainerPort: 80})
			n.leftBehind("stays", stays)
			n.leftBehind("goes", n.pod(0, IPv4, &PortMapping{HostPort: 8081, ContainerPort: 80}))
			n.leftBehind("leak", n.pod(0, IPv4, &PortMapping{HostPort: 8082, ContainerPort: 80}))

			old := n.backend()
			from := *n

			n.variant = tc.to
			if tc.to != viaNFTables {
				n.hint(tc.to)
			}

			m := n.manager()
			require.Len(t, m.Mappings(), 4)

			for i, mapping := range m.Mappings() {
				assert.Equal(t, old, mapping.Backend)
				assert.True(t, mapping.Held)
				n.answers(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(IPv4), uint16(8080+i)), "web")
			}

			// One row of a pod named, and its other one stays where it is.
			require.NoError(t, n.add(m, "stays", n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})))
			require.NoError(t, n.remove(m, "goes", nil))
			require.NoError(t, n.add(m, "new", n.pod(0, IPv4, &PortMapping{HostPort: 8082, ContainerPort: 81})), "the newest wins")

			carried := map[int32]Backend{}
			for _, mapping := range m.Mappings() {
				carried[mapping.HostPort] = mapping.Backend
			}

			assert.Equal(t, map[int32]Backend{8080: n.backend(), 8082: n.backend(), 8083: old}, carried)

			for port, by := range map[uint16]string{8080: "web", 8082: "web", 8083: "web"} {
				n.answers(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(IPv4), port), by)
			}

			n.refused(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(IPv4), 8081))

			// By its words, or all of a pod, wherever they are.
			require.NoError(t, n.remove(m, "stays", stays))
			require.NoError(t, n.remove(m, "new", nil))
			assert.Empty(t, m.Mappings())
			assert.Empty(t, n.leftOver(IPv4))
			assert.Empty(t, from.leftOver(IPv4))
		})
	}
}

// Rows that move over because another row of their pod's does, and are not named, can be
// told apart where they come to stand, and after one more restart.
func TestBackendChangesUnnamed(t *testing.T) {
	for _, tc := range []struct{ from, to iptables.Variant }{
		{viaNFTables, iptables.NFT}, {viaNFTables, iptables.Legacy}, {iptables.NFT, viaNFTables}, {iptables.Legacy, viaNFTables},
	} {
		for _, f := range []IPFamily{IPv4, IPv6} {
			t.Run(fmt.Sprintf("%s to %s/IPv%s", tc.from, tc.to, f), func(t *testing.T) {
				n := newNode(t, tc.from)
				n.serve(0, "tcp", f, 80)

				nodeIP, other := n.nodeIP(f), n.otherNodeIP(f)
				anyIP := &PortMapping{HostPort: 8080, ContainerPort: 80}
				pod := n.pod(0, f, anyIP,
					&PortMapping{HostPort: 8080, ContainerPort: 80, HostIP: nodeIP.String()},
					&PortMapping{HostPort: 8080, ContainerPort: 81, HostIP: other.String()}) // where nobody listens
				n.leftBehind("id", pod)

				from := *n
				n.change(tc.to)

				m := n.manager()
				require.NoError(t, n.add(m, "id", n.pod(0, f, anyIP)))

				check := func() {
					for _, mapping := range m.Mappings() {
						assert.Equal(t, n.backend(), mapping.Backend)
					}

					assert.Len(t, m.Mappings(), 3)
					n.answers(n.Client, "tcp", netip.AddrPortFrom(nodeIP, 8080), "web")
					n.answers(n.Host, "tcp", netip.AddrPortFrom(podGatewayOf(n, f), 8080), "web")
					n.refused(n.Client, "tcp", netip.AddrPortFrom(other, 8080))
				}

				check()

				if n.variant != viaNFTables { // and people can tell whose they are
					assert.Equal(t, 3, strings.Count(n.iptablesSave(f), `"web_ns hostport 8080"`))
				}

				require.NoError(t, m.Close())

				m = n.manager()
				check()
				require.NoError(t, n.remove(m, "id", nil))
				assert.Empty(t, m.Mappings())
				assert.Empty(t, n.leftOver(f))
				assert.Empty(t, from.leftOver(f))
			})
		}
	}
}

// Where iptables carries nothing, none of its programs is started.
func TestNoProcessWithNFTables(t *testing.T) {
	n := newNode(t, iptables.NFT) // which has tables, and a hint in it
	n.command("iptables-legacy", "-t", "mangle", "-N", "OTHERS")

	started := countProcesses(t)
	m := n.manager(WithBackend(BackendAuto))
	pod := n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})
	require.NoError(t, n.add(m, "id", pod))
	require.NoError(t, n.remove(m, "id", pod))
	assert.Zero(t, started())
}

// An element that no row would make, because somebody has made it for a
// purpose of his own, is neither listed nor touched.
func TestOddElements(t *testing.T) {
	eachNFTFamily(t, func(t *testing.T, n *node, f IPFamily) {
		m := n.manager()
		pod := n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80})
		require.NoError(t, n.add(m, "id", pod))

		table := nftables.NewLayout(f).Table
		ip := n.Pods[0].IP(f == IPv6).AsSlice()
		n.commit(
			table.AddElement(nftables.HostPorts, nfnetlink.Element{Key: []byte{unix.IPPROTO_DCCP, 0, 0, 0, 0, 80, 0, 0}, Data: append(slices.Clone(ip), 0, 80, 0, 0)}),
			table.AddElement(nftables.HostPorts, nfnetlink.Element{Key: []byte{unix.IPPROTO_TCP, 0, 0, 0, 0, 0, 0, 0}, Data: append(slices.Clone(ip), 0, 80, 0, 0)}),
			table.AddElement(nftables.HostIPPorts, nfnetlink.Element{
				Key: append(nftables.NewLayout(f).Family.AnyAddr().AsSlice(), unix.IPPROTO_TCP, 0, 0, 0, 0, 80, 0, 0), Data: append(slices.Clone(ip), 0, 80, 0, 0),
			}),
			table.AddElement(nftables.Hairpins, nfnetlink.Element{Key: append(slices.Clone(ip), n.nodeIP(f).AsSlice()...), Comment: "odd"}))

		require.NoError(t, m.Close())

		again := n.manager(WithoutSockets())
		assert.Len(t, again.Mappings(), 1)
		require.NoError(t, n.remove(again, "id", nil))
		assert.Len(t, n.elements(f), 4)
	})
}

// TestMain runs tests beside thousands of open files: with more than 1024 of them, what uses
// select(2) breaks. Benchmarks do without: each makes the start of a process longer.
func TestMain(m *testing.M) {
	if backend := os.Getenv(runtimeVariable); backend != "" {
		os.Exit(runRuntime(Backend(backend)))
	}

	flag.Parse()

	if flag.Lookup("test.bench").Value.String() == "" {
		for range 3000 {
			if _, err := unix.Open(os.DevNull, unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil { // closed with the process
				os.Exit(complain("open files: ", err))
			}
		}
	}

	m.Run()
}

func complain(what ...any) int {
	_, _ = fmt.Fprintln(os.Stderr, what...)

	return 1
}

func FuzzNFTElement(f *testing.F) {
	for _, pod := range []*PodPortMapping{
		podAt("10.88.0.2", &PortMapping{HostPort: 8080, ContainerPort: 80}, &PortMapping{HostPort: 1, ContainerPort: 2, HostIP: "192.0.2.1", Protocol: "UDP"}),
		podAt("fd00::2", &PortMapping{HostPort: 8080, ContainerPort: 80}, &PortMapping{HostPort: 1, ContainerPort: 2, HostIP: "::1", Protocol: "SCTP"}),
	} {
		rows, err := rowsOf("id", pod)
		require.NoError(f, err)

		for _, r := range rows {
			e := nftables.RowElement(r)
			f.Add(e.Set, []byte(e.Key), []byte(e.Data), e.Comment)
		}

		e := nftables.HairpinElement(rows[0].Pod.Addr(), rows[0].OwnerHash)
		f.Add(e.Set, []byte(e.Key), []byte(e.Data), e.Comment)
	}

	f.Fuzz(func(t *testing.T, set string, key, data []byte, comment string) {
		for _, family := range []IPFamily{IPv4, IPv6} {
			l := nftables.NewLayout(family)
			e := nftables.ElementOf(set, nfnetlink.Element{Key: key, Data: data, Comment: comment})

			if r, ok := l.Row(e); ok {
				assert.Equal(t, e, nftables.RowElement(r), "what is understood can be written again")
				assert.Equal(t, family, r.Family())
			}

			if ip, ok := l.HairpinOf(e); ok {
				assert.Equal(t, e, nftables.HairpinElement(ip, comment))
			}
		}
	})
}
