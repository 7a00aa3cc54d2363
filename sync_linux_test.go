package hostport

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mdlayher/netlink"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cri-o/hostport/internal/iptables"
	"github.com/cri-o/hostport/internal/nfnetlink"
	"github.com/cri-o/hostport/internal/nftables"
	"github.com/cri-o/hostport/internal/nodeaddr"
	"github.com/cri-o/hostport/internal/row"
	"github.com/cri-o/hostport/internal/testbed"
)

// deviations tells in what the kernel differs from rows of one family, exactly
// and in full.
func (n *node) deviations(f IPFamily, rows []*row.Row) []string {
	n.t.Helper()

	if n.variant == viaMemory {
		return n.memoryDeviations(f, rows)
	}

	if n.variant == viaNFTables {
		return n.nftDeviations(f, rows)
	}

	var list []string

	t, err := iptables.ParseSave([]byte(n.command(iptables.Command(f)+"-"+string(n.variant)+"-save", "-t", iptables.NATTable)), iptables.NATTable)
	require.NoError(n.t, err)

	ranges, chains, rules := map[string]bool{}, map[string]bool{}, map[iptables.Rule]bool{}

	for _, rule := range iptables.NATRules(f, f == IPv4) {
		rules[rule] = true
	}

	for _, r := range rows {
		if jumps := t.Jumps[iptables.DNATChain(r)]; len(jumps) == 1 {
			if found := iptables.RowFrom(r.Hash, iptables.FirstRule(t.Chains[iptables.DNATChain(r)]), jumps); found != nil {
				r.Depth = found.Depth
			}
		}

		if !t.Holds(r) {
			list = append(list, "row "+r.String())
		}

		for _, s := range iptables.SidesOf(r) {
			chains[s.Rule.Chain] = true
			rules[s.Rule], rules[s.Jump] = true, true

			for _, j := range s.Path {
				ranges[j.Target], rules[j] = true, true

				if len(t.Jumps[j.Target]) != 1 || !t.Jumps[j.Target][0].Is(j) {
					list = append(list, "jump "+j.String())
				}
			}
		}
	}

	for chain := range t.Chains {
		if isOurs(chain) && !chains[chain] && !ranges[chain] && chain != iptables.DNATDispatch && chain != iptables.MasqDispatch {
			list = append(list, "left over "+chain)
		}
	}

	for chain, some := range t.Chains {
		for i, r := range some {
			again := slices.ContainsFunc(some[:i], func(o iptables.SavedRule) bool { return o.Line == r.Line })
			if (isOurs(chain) || isOurs(r.Target)) && (!rules[*r.Spec] || again) {
				list = append(list, "left over "+r.Line)
			}
		}
	}

	if f == IPv4 && len(n.localnet()) > 0 {
		save := n.command("iptables-"+string(n.variant)+"-save", "-t", iptables.RawTable)
		for _, rule := range iptables.GuardRules(IPv4) {
			if strings.Count(save, iptables.CmdAppend+rule.String()) != 1 {
				list = append(list, "guard "+rule.String())
			}
		}
	}

	if len(rows) == 0 {
		return list // nothing need be there
	}

	rs := iptables.Ruleset{Misplaced: map[string]iptables.Misplaced{}}
	for _, rule := range iptables.NATRules(f, f == IPv4) {
		rs.Locate(t, rule)
	}

	for rule, found := range rs.Misplaced {
		list = append(list, "misplaced "+rule+" "+strings.Join(found.Lines, "\n"))
	}

	return list
}

func (n *node) memoryDeviations(f IPFamily, rows []*row.Row) (list []string) {
	n.t.Helper()

	wanted := map[string]bool{}
	for _, r := range rows {
		wanted[r.String()+" "+r.OwnerHash] = true
	}

	for _, r := range n.memoryRows(f) {
		if text := r.String() + " " + r.OwnerHash; wanted[text] {
			delete(wanted, text)
		} else {
			list = append(list, "left over "+text)
		}
	}

	for text := range wanted {
		list = append(list, "missing "+text)
	}

	return list
}

func (n *node) nftDeviations(f IPFamily, rows []*row.Row) []string {
	n.t.Helper()

	var (
		list   []string
		conn   = n.reader()
		b      = nftOver(n.t, conn, f)
		wanted = map[nftables.ElementKey]nftables.Element{}
	)

	for _, r := range rows {
		e := nftables.RowElement(r)
		wanted[e.ElementKey] = e
	}

	// Soon after a large commit a dump may lack hundreds of elements, in the same
	// generation (seen on Linux 6.18): two in turn do not lack the same.
	have, err := b.Dump(n.t.Context())
	require.NoError(n.t, err)

	for range 100 {
		before := have
		have, err = b.Dump(n.t.Context())
		require.NoError(n.t, err)

		if maps.Equal(before, have) {
			break
		}
	}

	for _, r := range rows { // in the name of one of the pods that have had the address
		e := nftables.HairpinElement(r.Pod.Addr(), r.OwnerHash)
		if e.Comment = have[e.ElementKey].Comment; e.Comment == "" {
			e.Comment = r.OwnerHash
		}

		wanted[e.ElementKey] = e
	}

	for key, e := range wanted {
		if have[key] != e {
			list = append(list, "missing "+b.Describe(e))
		}
	}

	for key, e := range have {
		if !wanted[key].There() && key.Set != nftables.Services { // which come and go with the node's addresses
			list = append(list, "left over "+b.Describe(e))
		}
	}

	if len(rows) == 0 {
		return list // no rule need be as it was
	}

	observed, err := b.Observe(n.t.Context())
	require.NoError(n.t, err)

	differences, _, err := b.Differences(observed)
	require.NoError(n.t, err)

	list = append(list, differences...)

	if int(observed.Table.Use) > len(b.Sets())+len(b.Chains()) {
		list = append(list, "left over chains or sets")
	}

	return list
}

func rowsOfAll(t *testing.T, f IPFamily, pods map[string][]*PodPortMapping) []*row.Row {
	t.Helper()

	var rows []*row.Row

	for id, mappings := range pods {
		some, err := rowsOfPod(id, mappings)
		require.NoError(t, err)

		rows = append(rows, some[f].rows...)
	}

	return rows
}

// exactly asserts that the kernel, the table and the sockets are what pods say.
func (n *node) exactly(m *Manager, pods map[string][]*PodPortMapping) {
	n.t.Helper()

	want := map[string]bool{}

	for _, f := range []IPFamily{IPv4, IPv6} {
		t, ok := n.t.(*testing.T)
		require.True(n.t, ok)

		rows := rowsOfAll(t, f, pods)
		assert.Empty(n.t, n.deviations(f, rows))

		for _, r := range rows {
			want[r.Owner.ID+" "+r.String()] = true
		}
	}

	have := map[string]bool{}

	for _, mapping := range m.Mappings() {
		have[mapping.text()] = true

		assert.Equal(n.t, n.backend(), mapping.Backend)
		assert.Equal(n.t, mapping.Protocol != "SCTP", mapping.Held, mapping)
	}

	assert.Equal(n.t, want, have)
}

func (n *node) sync(m *Manager, pods map[string][]*PodPortMapping) error {
	n.t.Helper()

	var err error

	n.do(func() { err = m.Sync(n.t.Context(), pods) })

	return err
}

// leak leaves in the kernel what bears our names and no row accounts for.
func (n *node) leak(f IPFamily) {
	n.t.Helper()

	if n.variant == viaMemory {
		stale, err := rowsOf("leaked", n.pod(1, f, &PortMapping{HostPort: 9999, ContainerPort: 80}))
		require.NoError(n.t, err)

		_, err = n.memory.Backend(f).Reconcile(n.t.Context(), row.Target{Deltas: []row.Delta{{Add: stale}}})
		require.NoError(n.t, err)

		return
	}

	if n.variant == viaNFTables {
		l := nftables.NewLayout(f)
		ip := n.Pods[1].IP(f == IPv6)
		stale := elementKey(l, nftables.HostPorts, 9999)
		stale.Data = append(ip.AsSlice(), 0, 80, 0, 0)
		odd := elementKey(l, nftables.HostPorts, 9998)
		odd.Key[0] = 99 // no protocol of ours
		odd.Data = stale.Data
		n.commit(
			l.Table.CreateChain(nfnetlink.Chain{Name: "alien", Type: "filter", Hook: unix.NF_INET_LOCAL_IN}),
			l.Table.AppendRule("alien", nfnetlink.Drop()),
			l.Table.CreateSet(nfnetlink.Set{Name: "alien", Key: []nfnetlink.DataType{nfnetlink.InetService}}))
		n.commit(l.Table.AddElement(nftables.HostPorts, stale), l.Table.AddElement(nftables.HostPorts, odd),
			l.Table.AddElement(nftables.Hairpins, nfnetlink.Element{Key: slices.Concat(n.otherNodeIP(f).AsSlice(), ip.AsSlice()), Comment: "?"}))

		if kernelHas(n.t, 5, 13) {
			n.commit(l.Table.AddElement(nftables.HostPorts, nfnetlink.Element{Data: stale.Data})) // for all other keys
		}

		return
	}

	chains := []string{
		"*nat", ":KUBE-HP-LEAKEDLEAKEDLEAK - [0:0]", ":CRIO-MASQ-LEAKEDLEAKEDLEAK - [0:0]", ":KUBE-HP-TCP-1-2 - [0:0]", ":KUBE-HP-odd - [0:0]",
	}
	rules := []string{
		"-A KUBE-HOSTPORTS -p tcp -m tcp --dport 9999 -j KUBE-HP-LEAKEDLEAKEDLEAK",
		"-A CRIO-HOSTPORTS-MASQ -j CRIO-MASQ-LEAKEDLEAKEDLEAK",
		"-A KUBE-HOSTPORTS -j KUBE-HP-odd",
		"-A KUBE-HOSTPORTS -g KUBE-HP-odd",
		"-A PREROUTING -p udp -g KUBE-HP-odd",
		"-A PREROUTING -p tcp -m tcp --syn -j KUBE-HP-odd",
		"-I PREROUTING -p tcp -j KUBE-HOSTPORTS",
		"-A KUBE-HP-LEAKEDLEAKEDLEAK -p tcp -j RETURN",
		"-A KUBE-HP-LEAKEDLEAKEDLEAK -j KUBE-HP-odd", // one leads to the other
		"-A CRIO-MASQ-LEAKEDLEAKEDLEAK -j KUBE-HP-odd",
		"-A KUBE-HP-TCP-1-2 -j RETURN",
		"-I KUBE-HOSTPORTS -p tcp -j RETURN", // in the way of all
		"-I KUBE-HP-TCP-0-16383 -j RETURN",
		"-I KUBE-HOSTPORTS -j KUBE-HP-TCP-4096-8191",
		"-I CRIO-HOSTPORTS-MASQ -j RETURN",
		iptables.CmdAppend + iptables.NATRules(f, f == IPv4)[0].String(),
		iptables.CmdAppend + iptables.NATRules(f, f == IPv4)[2].String(), // after what may accept
	}

	if f == IPv4 {
		n.command("iptables-"+string(n.variant), "-t", iptables.NATTable, "-A", iptables.PostRouting, "-d", "203.0.113.9", "-j", "ACCEPT")
		rules = append(rules, "COMMIT", "*raw", iptables.CmdAppend+iptables.GuardRules(f)[0].String(), "COMMIT", "*nat")
	}

	n.commandWith(strings.Join(slices.Concat(chains, rules, rules, []string{"COMMIT\n"}), "\n"), // twice
		iptables.Command(f)+"-"+string(n.variant)+"-restore", "--noflush")
}

// kernelHas reports whether the kernel is of a version or later.
func kernelHas(tb testing.TB, major, minor int) bool {
	tb.Helper()

	release, err := os.ReadFile("/proc/sys/kernel/osrelease")
	require.NoError(tb, err)

	var x, y int

	_, err = fmt.Sscanf(string(release), "%d.%d", &x, &y)
	require.NoError(tb, err)

	return x > major || x == major && y >= minor
}

func elementKey(_ nftables.Layout, _ string, port uint16) nfnetlink.Element {
	return nfnetlink.Element{Key: nftables.AppendPort([]byte{6, 0, 0, 0}, port), Comment: "?"}
}

func TestSync(t *testing.T) {
	eachNode(t, func(t *testing.T, n *node) {
		mappings := func(port int32) []*PortMapping {
			return []*PortMapping{
				{HostPort: port, ContainerPort: 80},
				{HostPort: port, ContainerPort: 80, Protocol: "UDP"},
				{HostPort: port, ContainerPort: 80, Protocol: "sctp"},
				{HostPort: port + 1, ContainerPort: 80, HostIP: "192.0.2.11"},
				{HostPort: port + 1, ContainerPort: 80, HostIP: "2001:db8:1::11"},
			}
		}
		both := func(i int, port int32) []*PodPortMapping {
			return []*PodPortMapping{n.pod(i, IPv4, mappings(port)...), n.pod(i, IPv6, mappings(port)...)}
		}

		for _, f := range []IPFamily{IPv4, IPv6} {
			n.serve(0, "tcp", f, 80)
			n.serve(1, "tcp", f, 80)
		}

		pods := map[string][]*PodPortMapping{
			"stays": both(0, 8000), "moves": both(0, 8010), "goes": both(1, 8020), "comes": both(1, 8030), "none": {nil, {HostNetwork: true}},
		}

		gone := n.manager()

		for _, id := range []string{"stays", "moves", "goes"} {
			for _, pod := range pods[id] {
				require.NoError(t, n.add(gone, id, pod))
			}
		}

		require.NoError(t, gone.Close())

		for _, f := range []IPFamily{IPv4, IPv6} {
			n.leak(f)
		}

		delete(pods, "goes")
		pods["moves"] = both(1, 8010)

		m := n.manager()
		require.NoError(t, n.sync(m, pods))
		n.exactly(m, pods)
		n.answers(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(IPv4), 8000), "web")
		n.answers(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(IPv6), 8010), "other")
		n.answers(n.Client, "tcp", netip.AddrPortFrom(n.otherNodeIP(IPv6), 8031), "other")
		n.refused(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(IPv4), 8020))

		// Again it does nothing.
		worked := n.countWork()
		before := n.dump(m)
		require.NoError(t, n.sync(m, pods))
		assert.Equal(t, before, n.dump(m))

		if n.variant == viaNFTables {
			assert.Zero(t, worked())
		}

		// Whatever others do to it.
		n.leak(IPv4)
		n.wipe(IPv6)
		require.NoError(t, n.sync(m, pods))
		n.exactly(m, pods)

		require.NoError(t, n.sync(m, nil))
		n.exactly(m, nil)
		assert.Empty(t, n.ours(IPv6), "nothing ought to be there")
	})
}

// Where Sync has taken everything out, it is forgotten as well: what comes next begins
// with nothing, and leaves nothing.
func TestAfterSyncOfNothing(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node, f IPFamily) {
		n.serve(0, "tcp", f, 80)
		require.NoError(t, n.Host.AddDevice(nodeaddr.ServiceDevice, false))
		n.assignService(vip(f))

		m := n.manager(WithoutLocalhost()) // whose sysctl would keep the table
		pod := n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80})

		for _, id := range []string{"id", "id", "another"} {
			require.NoError(t, n.sync(m, map[string][]*PodPortMapping{"id": {pod}}))
			require.NoError(t, n.sync(m, nil))
			require.Empty(t, n.ours(f))

			require.NoError(t, n.add(m, id, pod))
			n.answers(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(f), 8080), "web")
			n.answers(n.Pods[0].Namespace, "tcp", netip.AddrPortFrom(n.nodeIP(f), 8080), "web")

			if n.variant == viaNFTables { // with iptables kube-proxy sees to it
				n.refused(n.Client, "tcp", netip.AddrPortFrom(vip(f), 8080))
			}

			require.NoError(t, n.remove(m, id, nil))
			assert.Empty(t, slices.DeleteFunc(n.leftOver(f), func(line string) bool { return strings.Contains(line, " element "+nftables.Services) }))
		}
	})
}

// feed gives commands to iptables-restore, for the nat table.
func (n *node) feed(commands ...string) {
	n.t.Helper()
	n.commandWith("*nat\n"+strings.Join(commands, "\n")+"\nCOMMIT\n", "iptables-"+string(n.variant)+"-restore", "--noflush")
}

// What leads to our chains in another way than ours does is not taken for ours.
func TestSyncAmongForeignJumps(t *testing.T) {
	eachVariant(t, func(t *testing.T, n *node) {
		n.serve(0, "tcp", IPv4, 80)

		pods := map[string][]*PodPortMapping{}

		for port := range int32(5) {
			id := strconv.Itoa(int(port))
			pods[id] = []*PodPortMapping{n.pod(0, IPv4, &PortMapping{HostPort: 8080 + port, ContainerPort: 80})}
		}

		m := n.manager()
		require.NoError(t, n.sync(m, pods))

		rows := parsedRows(t, n)
		foreign := map[string][]string{"one row to another": nil}

		for i, r := range rows[1:] {
			foreign["one row to another"] = append(foreign["one row to another"], "-A "+iptables.DNATChain(rows[i])+" -j "+iptables.DNATChain(r))
		}

		for _, j := range iptables.DNATSide(rows[0]).Path {
			line := j.String()
			foreign["goto "+j.Target] = []string{"-I " + strings.Replace(line, "-j", "-g", 1), "-D " + line}
			foreign["narrower "+j.Target] = []string{"-I " + strings.Replace(line, "-j", "-i lo -j", 1), "-D " + line}
		}

		for name, commands := range foreign {
			n.feed(commands...)
			require.NoError(t, n.sync(m, pods), name)
			n.exactly(m, pods)
			n.answers(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(IPv4), 8080), "web")
		}
	})
}

// Who has a port keeps it, whatever has leaked behind it.
func TestLeakedBehind(t *testing.T) {
	eachVariant(t, func(t *testing.T, n *node) {
		n.serve(0, "tcp", IPv4, 80)

		log, logged := logs(t)
		m := n.manager(log)
		require.NoError(t, n.add(m, "id", n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})))

		leaf := iptables.DNATSide(parsedRows(t, n)[0]).Jump.Chain
		n.feed("-N KUBE-HP-LEAKEDLEAKEDLEAK", "-A KUBE-HP-LEAKEDLEAKEDLEAK -p tcp -j DNAT --to-destination "+n.Pods[1].IPv4.String()+":80",
			"-A "+leaf+" -p tcp -m tcp --dport 8080 -j KUBE-HP-LEAKEDLEAKEDLEAK")
		n.run(m)
		n.iptables(IPv4, "-F", iptables.PostRouting)
		n.soon(func() bool { return strings.Contains(logged(), "Repaired host ports") })
		n.answers(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(IPv4), 8080), "web")
	})
}

// What is from before, and has gone, may come back with a ruleset that somebody had
// saved.
func TestSyncAfterRestore(t *testing.T) {
	n := newNode(t, iptables.NFT)
	n.leftBehind("old", n.pod(0, IPv4, &PortMapping{HostPort: 7000, ContainerPort: 80}))

	old := *n
	save := n.iptablesSave(IPv4)
	n.change(viaNFTables)

	m := n.manager()

	for range 2 {
		require.NoError(t, n.sync(m, nil))
		assert.Empty(t, old.ours(IPv4))
		n.commandWith(save, "iptables-nft-restore", "--noflush")
	}
}

// It does not wait for longer than it is told to, whatever others do.
func TestSyncInTime(t *testing.T) {
	n := newNode(t, iptables.Legacy)
	m := n.manager(WithTimeout(testbed.Stretch(5 * time.Second)))
	pod := n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})
	family := m.families[0]

	unlock := lockXtables(t)
	defer unlock()

	ctx, cancel := context.WithTimeout(t.Context(), testbed.Stretch(500*time.Millisecond))
	defer cancel()

	added, synced := make(chan error), make(chan error)

	family.commitLock <- struct{}{}

	go func() {
		synced <- n.Host.Do(func() error { return m.Sync(ctx, map[string][]*PodPortMapping{"other": {pod}}) })
	}()

	n.soon(func() bool { return strings.Contains(stacks(), ").lockCommit(") })

	go func() { added <- n.add(m, "id", pod) }()

	n.soon(func() bool {
		family.queueMu.Lock()
		defer family.queueMu.Unlock()

		return len(family.queue) > 0
	})

	<-family.commitLock
	require.ErrorIs(t, <-synced, context.DeadlineExceeded)

	deadline, _ := ctx.Deadline()
	assert.Less(t, time.Since(deadline), testbed.Stretch(2*time.Second), "less than Add takes")
	require.ErrorIs(t, <-added, context.DeadlineExceeded)
}

// A row for one address comes before that for any, whoever has put it elsewhere.
func TestSyncRestoresOrder(t *testing.T) {
	eachVariant(t, func(t *testing.T, n *node) {
		n.serve(0, "tcp", IPv4, 80)

		to := netip.AddrPortFrom(n.otherNodeIP(IPv4), 8080)
		pods := map[string][]*PodPortMapping{"id": {n.pod(0, IPv4,
			&PortMapping{HostPort: 8080, ContainerPort: 80},
			&PortMapping{HostPort: 8080, ContainerPort: 81, HostIP: to.Addr().String()})}} // where nobody listens
		m := n.manager()
		require.NoError(t, n.sync(m, pods))

		rows := parsedRows(t, n)
		one := slices.IndexFunc(rows, func(r *row.Row) bool { return r.IP.IsValid() })
		anys := iptables.DNATSide(rows[1-one]).Jump

		for _, first := range iptables.DNATSide(rows[one]).Path {
			if first.Chain != anys.Chain {
				continue
			}

			n.feed("-D "+first.String(), "-A "+first.String())
			n.answers(n.Client, "tcp", to, "web")
			require.NoError(t, n.sync(m, pods))
			n.refused(n.Client, "tcp", to)
			n.exactly(m, pods)
		}

		n.feed("-I " + anys.String())
		n.answers(n.Client, "tcp", to, "web")
		require.NoError(t, n.sync(m, pods))
		n.refused(n.Client, "tcp", to)
		n.exactly(m, pods)
	})
}

// What has leaked goes also where a row leads there that is none of its business.
func TestSyncLeavesInvalid(t *testing.T) {
	eachVariant(t, func(t *testing.T, n *node) {
		n.serve(0, "tcp", IPv4, 80)
		loadCRIO(n)

		chain := iptables.DNATPrefix + row.HashOf("crio-a", 8080, "TCP", "")
		n.feed("-N KUBE-HP-odd", "-A "+chain+" -j KUBE-HP-odd")

		m := n.manager()
		pods := map[string][]*PodPortMapping{"crio-a": {n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80}, &PortMapping{HostPort: 70000})}}
		require.ErrorIs(t, n.sync(m, pods), ErrInvalidMapping)
		require.Len(t, m.Mappings(), 1)
		n.answers(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(IPv4), 8080), "web")
		assert.NotContains(t, n.ours(IPv4), "KUBE-HP-odd")
		assert.Contains(t, strings.Join(n.ours(IPv4), "\n"), chain)
	})
}

// A sandbox that takes the place of another, with the same IP and port, is the owner from then on,
// in the kernel too.
func TestSyncChangesOwner(t *testing.T) {
	eachNode(t, func(t *testing.T, n *node) {
		pod := n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})
		m := n.manager()
		require.NoError(t, n.add(m, "old", pod))
		require.NoError(t, n.sync(m, map[string][]*PodPortMapping{"new": {pod}}))
		n.exactly(m, map[string][]*PodPortMapping{"new": {pod}})
		require.NoError(t, m.Close())

		m = n.manager()
		require.NoError(t, n.remove(m, "old", nil))
		assert.Len(t, m.Mappings(), 1)
		require.NoError(t, n.remove(m, "new", nil))
		n.exactly(m, nil)
	})
}

// A pod that cannot be had does not keep the others from it.
func TestSyncReports(t *testing.T) {
	eachNode(t, func(t *testing.T, n *node) {
		m := n.manager()
		named := func(name string, mappings ...*PortMapping) []*PodPortMapping {
			return []*PodPortMapping{{Name: name, IP: n.Pods[0].IPv4.AsSlice(), PortMappings: mappings}}
		}
		port := func(p int32) *PortMapping { return &PortMapping{HostPort: p, ContainerPort: 80} }

		require.NoError(t, n.add(m, "z", named("z", port(8001), port(8002))[0]))
		require.NoError(t, n.add(m, "bad", named("bad", port(8003))[0]))
		require.NoError(t, n.add(m, "unknown", named("unknown", port(8008))[0]))

		unknown := named("unknown", port(8008))
		unknown[0].IP = nil

		s := n.takePort("tcp", "192.0.2.1:8005")
		err := n.sync(m, map[string][]*PodPortMapping{
			"a":       named("a", port(8000), port(8001)), // z has it
			"b":       named("b", port(8004)),
			"c":       named("c", port(8004)), // b comes first
			"z":       named("z", port(8001)),
			"bad":     named("bad", port(8003), port(70000)),
			"double":  named("double", port(8006), &PortMapping{HostPort: 8006, ContainerPort: 81}),
			"taken":   named("taken", port(8007), port(8005)),
			"d":       named("d", port(8008)), // which has an IP, though nobody knows it now
			"unknown": unknown,
		})
		conflict := (*ConflictError)(nil)
		require.ErrorAs(t, err, &conflict)
		require.ErrorIs(t, err, ErrInvalidMapping)
		require.ErrorIs(t, err, syscall.EADDRINUSE)

		assert.Equal(t, []string{"a", "bad", "c", "d", "double", "taken"}, podsOf(t, err))

		for _, text := range []string{"pod a:", "pod c:", "pod bad", "pod double", "pod taken"} {
			assert.ErrorContains(t, err, text)
		}

		n.exactly(m, map[string][]*PodPortMapping{
			"b": named("b", port(8004)), "z": named("z", port(8001)), "bad": named("bad", port(8003)),
			"unknown": named("unknown", port(8008)),
		})
		require.NoError(t, s.Close())
	})
}

// podsOf are the ids in the PodErrors of Sync, sorted. All of its errors are such.
func podsOf(t *testing.T, err error) (ids []string) {
	t.Helper()

	joined, ok := err.(interface{ Unwrap() []error })
	require.True(t, ok)

	for _, err := range joined.Unwrap() {
		pod := (*PodError)(nil)
		require.ErrorAs(t, err, &pod)

		ids = append(ids, pod.ID)
	}

	slices.Sort(ids)

	return ids
}

// What stays of a pod that cannot be had as wanted keeps its ports.
func TestSyncReportsAndHolds(t *testing.T) {
	eachNode(t, func(t *testing.T, n *node) {
		n.serve(0, "tcp", IPv4, 80)

		m := n.manager()
		stays := n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80}, &PortMapping{HostPort: 8080, ContainerPort: 80, Protocol: "UDP"})
		require.NoError(t, n.add(m, "id", stays))

		s := n.takePort("tcp", "192.0.2.1:9000")
		before := n.dump(m)
		err := n.sync(m, map[string][]*PodPortMapping{"id": {n.pod(0, IPv4,
			&PortMapping{HostPort: 8080, ContainerPort: 81}, &PortMapping{HostPort: 8080, ContainerPort: 81, Protocol: "UDP"},
			&PortMapping{HostPort: 9000, ContainerPort: 81})}})
		require.ErrorIs(t, err, syscall.EADDRINUSE)
		assert.Equal(t, before, n.dump(m))
		n.answers(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(IPv4), 8080), "web")
		n.refusesOthers(unix.SOCK_STREAM, 8080, IPv4.AnyAddr(), n.nodeIP(IPv4))
		n.refusesOthers(unix.SOCK_DGRAM, 8080, IPv4.AnyAddr(), n.nodeIP(IPv4))

		require.NoError(t, s.Close())
		require.NoError(t, n.remove(m, "id", nil))
		n.exactly(m, nil)
	})
}

// Connections to rows that stay do not fail, however often it is called and
// whatever comes and goes beside.
func TestSyncIsNotNoticed(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node, f IPFamily) {
		n.serve(0, "tcp", f, 80)
		n.serve(1, "tcp", f, 80)

		pods := map[string][]*PodPortMapping{"stays": {n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80})}}
		other := n.pod(1, f, &PortMapping{HostPort: 9090, ContainerPort: 80})
		n.leftBehind("stays", pods["stays"][0])

		var connects, failures atomic.Int32

		stop, done := make(chan struct{}), make(chan error, 1)

		go func() {
			done <- n.Client.Do(func() error { return keepAsking(t.Context(), n, f, stop, &connects, &failures) })
		}()

		m := n.manager()

		for i := range 20 {
			delete(pods, "other")

			if i%2 == 0 {
				pods["other"] = []*PodPortMapping{other}
			}

			require.NoError(t, n.sync(m, pods))
		}

		close(stop)
		require.NoError(t, <-done)
		assert.NotZero(t, connects.Load())
		assert.Zero(t, failures.Load())
	})
}

// A process that has not added a pod removes it, by its mappings or without them.
func TestRemoveByAnotherProcess(t *testing.T) {
	mappings := []*PortMapping{
		{HostPort: 8080, ContainerPort: 80},
		{HostPort: 8080, ContainerPort: 80, Protocol: "UDP"},
		{HostPort: 8081, ContainerPort: 80, Protocol: "SCTP", HostIP: "192.0.2.11"},
		{HostPort: 8081, ContainerPort: 80, Protocol: "SCTP", HostIP: "2001:db8:1::11"},
	}

	eachNode(t, func(t *testing.T, n *node) {
		for name, named := range map[string]*PodPortMapping{"all": nil, "by mappings": {PortMappings: mappings}} {
			stays := map[string][]*PodPortMapping{}

			for _, f := range []IPFamily{IPv4, IPv6} {
				stays["stays"] = append(stays["stays"], n.pod(1, f, &PortMapping{HostPort: 8082, ContainerPort: 80}))
				n.leftBehind("stays", stays["stays"][len(stays["stays"])-1])
				n.leftBehind("id", n.pod(0, f, mappings...))
			}

			m := n.manager()
			require.Len(t, m.Mappings(), 8, name)
			require.NoError(t, n.remove(m, "id", named))
			assert.Len(t, m.Mappings(), 2, name)

			for _, f := range []IPFamily{IPv4, IPv6} {
				assert.Empty(t, n.deviations(f, rowsOfAll(t, f, stays)), name)
			}

			require.NoError(t, n.takePort("tcp", "0.0.0.0:8080").Close(), name)
			require.NoError(t, m.Close())
		}
	})
}

// Rows that another backend carries from before move over, and nothing of ours
// stays behind there.
func TestSyncMovesOver(t *testing.T) {
	for _, from := range backends() {
		for _, to := range backends() {
			if from == to {
				continue
			}

			t.Run(string(from)+" to "+string(to), func(t *testing.T) {
				n := newNode(t, from)
				pods := map[string][]*PodPortMapping{}

				for i, f := range []IPFamily{IPv4, IPv6} {
					pods["id"] = append(pods["id"], n.pod(i, f, &PortMapping{HostPort: 8080, ContainerPort: 80}))
				}

				for _, pod := range pods["id"] {
					n.leftBehind("id", pod)
				}

				n.leftBehind("goes", n.pod(1, IPv4, &PortMapping{HostPort: 9090, ContainerPort: 80}))

				old := *n
				n.change(to)

				m := n.manager()
				assert.Len(t, m.Mappings(), 3)
				require.NoError(t, n.sync(m, pods))
				n.exactly(m, pods)

				for _, f := range []IPFamily{IPv4, IPv6} {
					assert.Empty(t, old.ours(f))
				}

				require.NoError(t, n.sync(m, pods))
				n.exactly(m, pods)
			})
		}
	}
}

// change has the node use another backend from now on.
func (n *node) change(to iptables.Variant) {
	n.t.Helper()

	if n.variant != viaNFTables {
		for _, f := range []IPFamily{IPv4, IPv6} {
			n.command(iptables.Command(f)+"-"+string(n.variant), "-t", "mangle", "-X", "KUBE-IPTABLES-HINT")
		}
	}

	if n.variant = to; to != viaNFTables {
		n.hint(to)
	}
}

// A Sync that fails as a whole changes nothing.
func TestSyncFails(t *testing.T) {
	n := newNode(t, viaNFTables)
	log, logged := logs(t)
	m, fake := n.viaFake(log)
	pod := n.pod(0, IPv6, &PortMapping{HostPort: 8080, ContainerPort: 80})
	require.NoError(t, n.add(m, "id", pod))

	before := n.dump(m)
	fake.dump = func() error { return errInjected }

	other := map[string][]*PodPortMapping{"other": {n.pod(1, IPv6, &PortMapping{HostPort: 9090, ContainerPort: 80})}}
	require.ErrorIs(t, n.sync(m, other), errInjected)

	fake.dump = nil
	assert.Equal(t, before, n.dump(m))

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	n.do(func() { require.ErrorIs(t, m.Sync(ctx, other), context.Canceled) })
	assert.Equal(t, before, n.dump(m))

	require.NoError(t, n.sync(m, other))
	n.exactly(m, other)

	// Nothing is to be there, and that fails.
	fake.commit = func([]netlink.Message) ([]netlink.Message, error) { return nil, errInjected }
	require.ErrorIs(t, n.sync(m, nil), errInjected)

	fake.commit = nil
	n.exactly(m, other)
	require.NoError(t, n.remove(m, "other", nil))
	n.exactly(m, nil)
	require.NoError(t, n.sync(m, other))

	// Somebody else has taken it out meanwhile.
	fake.commit = func(msgs []netlink.Message) ([]netlink.Message, error) {
		fake.commit = nil

		n.commit(nftables.NewLayout(IPv6).Table.Delete())

		return msgs, nil
	}
	require.NoError(t, n.sync(m, nil))
	n.exactly(m, nil)

	// After one that has not failed, Run leaves what it does not know.
	require.NoError(t, n.sync(m, other))
	n.leak(IPv6)
	n.run(m)
	n.wipe(IPv6)
	n.soon(func() bool { return strings.Contains(logged(), "Repaired host ports") })
	assert.Contains(t, n.deviations(IPv6, rowsOfAll(t, IPv6, other)), "left over chains or sets")
}

// What a Sync has added whose outcome nobody knew, and what it was to take out, goes with the
// next Remove.
func TestSyncIsLost(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node, f IPFamily) {
		m := n.manager()
		fm := m.families[slices.Index([]IPFamily{IPv4, IPv6}, f)]
		works := fm.backend
		other := n.pod(1, f, &PortMapping{HostPort: 9090, ContainerPort: 80})

		pod := n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80})
		require.NoError(t, n.add(m, "id", pod))

		fm.backend = losingBackend{works}
		require.ErrorIs(t, n.syncFamily(fm, []*PodPortMapping{other}, "other"), errInjected)

		fm.backend = works
		require.NoError(t, n.remove(m, "other", other))
		assert.NotContains(t, strings.Join(n.leftOver(f), "\n"), "9090")

		n.leak(f)

		fm.backend = refusingBackend{works}
		require.ErrorIs(t, n.syncFamily(fm, []*PodPortMapping{other}, "other"), syscall.EPERM)

		fm.backend = works
		require.NoError(t, n.remove(m, "other", other))
		assert.Empty(t, n.deviations(f, rowsOfAll(t, f, map[string][]*PodPortMapping{"id": {pod}})))
	})
}

// losingBackend does what it is told, and nobody hears of that.
type losingBackend struct{ backend }

func (b losingBackend) Reconcile(ctx context.Context, t row.Target) ([]row.Repair, error) {
	if repairs, err := b.backend.Reconcile(ctx, t); err != nil {
		return repairs, err
	}

	return nil, errInjected
}

// What others put in place of what is about to be taken out goes as well.
func TestSyncOvertaken(t *testing.T) {
	eachNFTFamily(t, func(t *testing.T, n *node, f IPFamily) {
		m, fake := n.viaFake()
		require.NoError(t, n.add(m, "id", n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80})))

		l := nftables.NewLayout(f)
		theirs := elementKey(l, nftables.HostPorts, 9999)
		theirs.Data = append(n.Pods[1].IP(f == IPv6).AsSlice(), 0, 80, 0, 0)
		n.commit(l.Table.AddElement(nftables.HostPorts, theirs))

		fake.commit = func(msgs []netlink.Message) ([]netlink.Message, error) {
			fake.commit = nil
			again := theirs
			again.Comment = "another"

			n.commit(l.Table.DeleteElement(nftables.HostPorts, theirs), l.Table.AddElement(nftables.HostPorts, again))

			return msgs, nil
		}
		require.NoError(t, n.sync(m, nil))
		require.Nil(t, fake.commit)
		n.exactly(m, nil)

		// What was to be taken out has gone, with the whole table.
		pods := map[string][]*PodPortMapping{"id": {n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80})}}
		require.NoError(t, n.sync(m, pods))
		n.commit(l.Table.CreateChain(nfnetlink.Chain{Name: "alien"}))

		fake.commit = func(msgs []netlink.Message) ([]netlink.Message, error) {
			fake.commit = nil

			n.commit(l.Table.Delete())

			return msgs, nil
		}
		require.NoError(t, n.sync(m, pods))
		n.exactly(m, pods)
	})
}

// A chain in place of one of ours is noticed at once, by whom has not seen ours.
func TestSyncAfterChainReplaced(t *testing.T) {
	n := newNode(t, viaNFTables)
	pods := map[string][]*PodPortMapping{"id": {n.pod(0, IPv6, &PortMapping{HostPort: 8080, ContainerPort: 80})}}

	gone := n.manager()
	require.NoError(t, n.add(gone, "id", pods["id"][0]))
	require.NoError(t, n.remove(gone, "id", nil))
	require.NoError(t, gone.Close())

	l := nftables.NewLayout(IPv6)
	n.commit(l.Table.FlushChain(nftables.NATOutput), l.Table.DeleteChain(nftables.NATOutput), l.Table.CreateChain(nfnetlink.Chain{Name: "alien"}))

	m := n.manager()
	require.NoError(t, n.sync(m, pods))
	n.exactly(m, pods)

	// One of another kind bears the name.
	replace := func() {
		n.commit(l.Table.FlushChain(nftables.NATOutput), l.Table.DeleteChain(nftables.NATOutput), l.Table.CreateChain(nfnetlink.Chain{Name: nftables.NATOutput}))
	}

	replace()
	require.NoError(t, n.sync(m, pods))
	n.exactly(m, pods)

	replace()
	pods["more"] = []*PodPortMapping{n.pod(1, IPv6, &PortMapping{HostPort: 9090, ContainerPort: 80})}
	require.NoError(t, n.add(m, "more", pods["more"][0]))
	n.exactly(m, pods)

	n.run(m)
	replace()
	n.soon(func() bool { return len(n.deviations(IPv6, rowsOfAll(t, IPv6, pods))) == 0 })
}

// The table stays, whatever Sync takes out of it: a packet that comes while one
// chain takes the place of another may meet neither.
func TestSyncKeepsTable(t *testing.T) {
	n := newNode(t, viaNFTables)
	m := n.manager()
	pods := map[string][]*PodPortMapping{"id": {n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})}}
	require.NoError(t, n.sync(m, pods))

	l := nftables.NewLayout(IPv4)
	b, ok := m.families[0].backend.(*migration).backend.(*nftables.Backend)
	require.True(t, ok)

	handle := func() (handle uint64) {
		answers, err := n.nfnetlink().Get(t.Context(), l.Table.Get())
		require.NoError(t, err)

		info, err := nfnetlink.ParseTable(*answers[0])
		require.NoError(t, err)

		return info.Handle
	}
	before := handle()

	for _, breakIt := range []func(){
		func() { n.leak(IPv4) },
		func() { // one that leads to another, by a rule and by a map
			n.command("nft", "add chain ip crio-hostports one; add chain ip crio-hostports two;"+
				"add map ip crio-hostports verdicts { type inet_service : verdict; elements = { 1 : jump two } };"+
				"add rule ip crio-hostports one tcp dport vmap @verdicts; add rule ip crio-hostports one udp dport { 1, 2 } jump two;"+
				"insert rule ip crio-hostports hostports jump one")
		},
		func() { n.commit(l.Table.FlushChain(nftables.NATPrerouting)) },
		func() { n.command("nft", "chain ip crio-hostports prerouting { policy drop; }") },
		func() { b.Seen = nftables.Observed{} }, // nobody has looked since it was made
	} {
		breakIt()
		require.NoError(t, n.sync(m, pods))
		n.exactly(m, pods)
		assert.Equal(t, before, handle())
		assert.NotContains(t, n.command("nft", "list", "ruleset"), "drop;")
	}

	// Of other kinds of objects there are none of ours to keep beside.
	n.command("nft", "add counter ip crio-hostports odd; add chain ip crio-hostports odd")
	require.NoError(t, n.sync(m, pods))
	n.exactly(m, pods)
	assert.NotContains(t, n.command("nft", "list", "ruleset"), "counter")
}

// Rows from before are looked after where they stand.
func TestRunRepairsBefore(t *testing.T) {
	for _, from := range []iptables.Variant{viaNFTables, iptables.NFT, iptables.Legacy} {
		t.Run(string(from), func(t *testing.T) {
			n := newNode(t, from)
			n.serve(0, "tcp", IPv4, 80)

			pods := map[string][]*PodPortMapping{"id": {n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})}}
			n.leftBehind("id", pods["id"][0])

			before := *n
			breaks := before.ways()

			if from == viaNFTables {
				n.change(iptables.Legacy)
			} else {
				n.change(viaNFTables)
			}

			m := n.manager()
			check := func() (err error) {
				n.do(func() { err = m.Check(t.Context(), "id", pods["id"][0]) })

				return err
			}
			require.NoError(t, check())

			for name, breakIt := range breaks {
				if name == "raw flushed" { // the guard stands with what is in use
					continue
				}

				breakIt()
				require.Error(t, check(), name)

				ctx, stop := context.WithCancel(t.Context())
				ended := make(chan error)

				go func() { _ = n.Host.Do(func() error { ended <- m.Run(ctx); return nil }) }()
				n.soon(func() bool { return check() == nil })
				stop()
				require.Equal(t, context.Canceled, <-ended)
				n.answers(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(IPv4), 8080), "web")
			}

			// While Run is at it: its first look is at everything.
			n.run(m)
			untilLooked(t, m)
			before.wipeAll()
			n.soon(func() bool { return check() == nil })
		})
	}
}

// What there is no program for is not said to be gone, and what nothing leads to
// any more is found.
func TestSyncFindsWhatIsFromBefore(t *testing.T) {
	n := newNode(t, iptables.NFT)
	n.leftBehind("id", n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80}))
	n.feed("-F "+iptables.DNATDispatch, "-F "+iptables.PreRouting, "-F "+iptables.Output, "-X "+iptables.DNATDispatch)
	n.change(viaNFTables)

	path := os.Getenv("PATH")
	t.Setenv("PATH", t.TempDir())

	m := n.manager()
	require.ErrorContains(t, n.sync(m, nil), "iptables")

	t.Setenv("PATH", path)
	require.NoError(t, n.sync(m, nil))
	n.change(iptables.NFT)
	assert.Empty(t, n.ours(IPv4))
}

// Where no row stands any more, nothing is missing.
func TestCheckOfWhatHasMoved(t *testing.T) {
	n := newNode(t, iptables.NFT)
	pod := n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})
	n.leftBehind("id", pod)

	before := *n
	n.change(viaNFTables)

	m := n.manager()
	require.NoError(t, n.add(m, "id", pod))
	before.wipeAll()
	n.do(func() { require.NoError(t, m.Check(t.Context(), "id", pod)) })
}

// What is missing is named.
func TestCheck(t *testing.T) {
	eachNode(t, func(t *testing.T, n *node) {
		m := n.manager()
		pod := n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80},
			&PortMapping{HostPort: 8081, ContainerPort: 80, HostIP: "192.0.2.11", Protocol: "SCTP"})
		check := func(pod *PodPortMapping) (err error) {
			n.do(func() { err = m.Check(t.Context(), "id", pod) })

			return err
		}
		require.NoError(t, check(nil))
		require.NoError(t, check(n.pod(0, IPv4)))
		require.ErrorIs(t, check(n.pod(0, IPv4, &PortMapping{HostPort: -1, ContainerPort: 80})), ErrInvalidMapping)

		missing := (*MissingError)(nil)
		require.ErrorAs(t, check(pod), &missing)
		assert.Equal(t, MissingError{
			Pod: "ns/web", ID: "id", Rows: []string{"TCP 0.0.0.0:8080 -> 10.88.0.2:80", "SCTP 192.0.2.11:8081 -> 10.88.0.2:80"},
			Rules: missing.Rules,
		}, *missing)
		require.EqualError(t, &MissingError{Pod: "ns/web", Rows: []string{"a", "b"}, Sockets: []string{"c"}, Rules: []string{"d is gone"}},
			"host ports of pod ns/web: row a is missing; row b is missing; not held: c; d is gone")

		s := n.takePort("tcp", "0.0.0.0:8080")
		require.ErrorAs(t, check(pod), &missing)
		assert.Contains(t, missing.Sockets[0], "in use by "+n.process())
		require.NoError(t, s.Close())

		other := n.pod(1, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80, HostIP: "192.0.2.1"})
		require.NoError(t, n.add(m, "other", other))
		require.ErrorAs(t, check(pod), &missing)
		assert.Equal(t, "TCP 0.0.0.0:8080 -> 10.88.0.2:80 (ns/other has TCP 192.0.2.1:8080 -> 10.88.0.3:80)", missing.Rows[0])
		assert.Empty(t, missing.Sockets)
		require.NoError(t, n.remove(m, "other", nil))

		broken := func(want string, how func()) {
			t.Helper()
			require.NoError(t, n.add(m, "id", pod))
			require.NoError(t, check(pod))
			how()

			missing := (*MissingError)(nil)
			require.ErrorAs(t, check(pod), &missing)
			assert.Contains(t, strings.Join(missing.Rules, "; "), want)
			assert.Empty(t, append(missing.Rows, missing.Sockets...))
			assert.ErrorContains(t, check(pod), want)
			assert.ErrorContains(t, check(pod), "pod ns/web")
			require.NoError(t, n.sync(m, map[string][]*PodPortMapping{"id": {pod}}))
			require.NoError(t, check(pod))
		}

		rows, err := rowsOf("id", pod)
		require.NoError(t, err)

		if n.variant == viaMemory {
			for _, r := range rows {
				broken("host port "+r.String()+" is missing", n.memory.Wipe)
			}

			return
		}

		if n.variant == viaNFTables {
			table := nftables.NewLayout(IPv4).Table
			for _, r := range rows {
				e := nftables.RowElement(r)
				broken("host port "+r.String()+" is missing", func() { n.commit(table.DeleteElement(e.Set, e.Element())) })
			}

			broken("hairpin of "+n.Pods[0].IPv4.String(), func() {
				n.commit(table.DeleteElement(nftables.Hairpins, nftables.HairpinElement(n.Pods[0].IPv4, "").Element()))
			})

			for _, chain := range []string{nftables.HostPorts, nftables.NATPrerouting, nftables.NATOutput, nftables.Masquerading, nftables.GuardChain} {
				broken("rule of chain "+chain, func() { n.commit(table.FlushChain(chain)) })
			}

			broken("table ip crio-hostports is missing", func() { n.commit(table.Delete()) })

			return
		}

		for _, r := range rows {
			broken("chain "+iptables.DNATChain(r)+" is empty", func() { n.iptables(IPv4, "-F", iptables.DNATChain(r)) })
			broken("chain "+iptables.MasqChain(r)+" is empty", func() { n.iptables(IPv4, "-F", iptables.MasqChain(r)) })
			broken("chain KUBE-HOSTPORTS is empty", func() { n.iptables(IPv4, "-F", iptables.DNATDispatch) })
		}

		broken(rows[0].String()+" are not alone", func() { n.feed("-I " + iptables.DNATChain(rows[0]) + " -j RETURN") })
		broken("rule "+iptables.PreRouting, func() { n.iptables(IPv4, "-F", iptables.PreRouting) })
		broken("chain "+iptables.DNATChain(rows[0])+" is missing", func() { n.wipeAll() })
		broken(iptables.GuardComment, func() { n.command("iptables-"+string(n.variant), "-t", iptables.RawTable, "-F") })

		n.feed(iptables.CmdAppend + iptables.NATRules(IPv4, true)[0].String())
		require.NoError(t, check(pod), "nothing is missing")
	})
}

// Check of a row from before does not make it anybody's, and misses no socket where
// none can be.
func TestCheckChangesNothing(t *testing.T) {
	eachFamilyOf(t, everywhere(), func(t *testing.T, n *node, f IPFamily) {
		mappings := []*PortMapping{{HostPort: 8080, ContainerPort: 80}}
		if f == IPv6 {
			mappings = append(mappings, &PortMapping{HostPort: 8081, ContainerPort: 80, HostIP: "fe80::5"})
		}

		pod := n.pod(0, f, mappings...)
		n.leftBehind("id", pod)

		m := n.manager()
		before := n.dump(m)
		n.do(func() { require.NoError(t, m.Check(t.Context(), "id", pod)) })
		assert.Equal(t, before, n.dump(m))
		assert.Empty(t, m.Mappings()[0].PodID)
	})
}

// run has a manager look after its rows until the test ends.
func (n *node) run(m *Manager) {
	n.t.Helper()

	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)

	go func() {
		_ = n.onHost(func() error {
			ended <- m.Run(ctx)

			return nil
		})
	}()
	n.t.Cleanup(func() {
		stop()
		assert.Equal(n.t, context.Canceled, <-ended)
	})
}

// runOnce does what Run does each time it looks.
func (n *node) runOnce(m *hostportManager, disturbed bool) {
	n.t.Helper()
	n.do(func() { require.NoError(n.t, m.runOnce(n.t.Context(), func(backend) bool { return disturbed })) })
}

// Whatever ends it, it ends all of it.
func TestRunEnds(t *testing.T) {
	n := newNode(t, viaNFTables)
	m := n.manager()
	ended := make(chan error)

	run := func(ctx context.Context) {
		go func() {
			_ = n.Host.Do(func() error {
				ended <- m.Run(ctx)

				return nil
			})
		}()
	}

	ctx, cancel := context.WithCancel(t.Context())
	m.families[0].commitLock <- struct{}{}

	run(ctx)
	n.soon(func() bool { return strings.Contains(stacks(), ").runOnce(") })
	cancel()
	assert.Equal(t, context.Canceled, <-ended)
	<-m.families[0].commitLock

	run(t.Context())
	n.soon(func() bool { return strings.Contains(stacks(), ").pump(") })
	require.NoError(t, m.Close())
	require.ErrorIs(t, <-ended, os.ErrClosed)
	n.soon(func() bool { return !strings.Contains(stacks(), ").pump(") })
}

// stacks are those of all goroutines.
func stacks() string {
	buf := make([]byte, 1<<20)

	return string(buf[:runtime.Stack(buf, true)])
}

// Where the kernel does not tell any more, anything may have happened.
func TestFollowDeaf(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()

		transactions := make(chan nfnetlink.Transaction)
		log, logged := logs(t)
		news := []nfnetlink.Transaction{{Generation: 1}, {}, {}, {Generation: 2}}

		go newSystemOpener(newConfig([]Option{log})).pump(ctx, func() (nfnetlink.Transaction, error) {
			if len(news) == 0 {
				<-ctx.Done()

				return nfnetlink.Transaction{}, ctx.Err()
			}

			next := news[0]
			news = news[1:]

			if next.Generation == 0 {
				return next, errInjected
			}

			return next, nil
		}, transactions)

		begun := time.Now()

		for _, generation := range []uint32{1, 0, 0, 2} {
			assert.Equal(t, generation, (<-transactions).Generation)
		}

		assert.Equal(t, 2*repairPause, time.Since(begun))
		assert.Equal(t, 1, strings.Count(logged(), errInjected.Error()))
	})
}

// runs is run, and waits until the manager does: it has repaired something.
func (n *node) runs(m *Manager, logged func() string) {
	n.t.Helper()
	n.run(m)
	n.wipe(IPv4)
	n.soon(func() bool { return strings.Contains(logged(), "Repaired host ports") })
}

// soon asserts that a state comes by itself.
func (n *node) soon(condition func() bool) {
	n.t.Helper()
	eventually(n.t, condition)
}

// ways are those in which others break what is there for IPv4.
func (n *node) ways() map[string]func() {
	if n.variant == viaMemory {
		return map[string]func(){"rows wiped": n.memory.Wipe}
	}

	if n.variant == viaNFTables {
		table := nftables.NewLayout(IPv4).Table

		return map[string]func(){
			"table deleted":   func() { n.commit(table.Delete()) },
			"rules flushed":   func() { n.wipe(IPv4) },
			"element deleted": func() { n.commit(table.DeleteElement(nftables.HostPorts, elementKey(nftables.Layout{}, "", 8080))) },
		}
	}

	tool := "iptables-" + string(n.variant)

	return map[string]func(){
		"all flushed":   func() { n.wipeAll() },
		"chain flushed": func() { n.iptables(IPv4, "-F", iptables.DNATDispatch) },
		"hook flushed":  func() { n.iptables(IPv4, "-F", iptables.PreRouting) },
		"raw flushed":   func() { n.command(tool, "-t", iptables.RawTable, "-F") },
		"rule inserted": func() { n.feed("-I " + iptables.DNATPrefix + row.HashOf("id", 8080, "", "") + " -j RETURN") },
	}
}

func TestRunRepairs(t *testing.T) {
	eachNode(t, func(t *testing.T, n *node) {
		n.serve(0, "tcp", IPv4, 80)

		log, logged := logs(n.t)
		m := n.manager(log)
		pods := map[string][]*PodPortMapping{"id": {n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})}}
		require.NoError(t, n.add(m, "id", pods["id"][0]))
		n.run(m)

		rows := rowsOfAll(t, IPv4, pods)

		for name, breakIt := range n.ways() {
			repairs := strings.Count(logged(), "Repaired host ports")

			breakIt()
			n.soon(func() bool {
				return len(n.deviations(IPv4, rows)) == 0 && strings.Count(logged(), "Repaired host ports") > repairs
			})
			n.answers(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(IPv4), 8080), "web")
			assert.Empty(t, n.deviations(IPv4, rows), name)
		}

		require.NoError(t, n.remove(m, "id", nil))
		n.exactly(m, nil)
	})
}

// What others do to their own tables is none of its business, nor are its own
// operations.
func TestRunLeavesOthersAlone(t *testing.T) {
	eachBackend(t, func(t *testing.T, n *node) {
		worked := n.countWork()
		log, logged := logs(n.t)
		m := n.manager(log)
		require.NoError(t, n.add(m, "id", n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})))
		n.runs(m, logged)
		untilIdle(t, m, worked)

		foreign := nfnetlink.Table{Family: nftables.NewLayout(IPv4).Table.Family, Name: "foreign"}

		for range 5 {
			n.commit(foreign.Create())
			n.commit(foreign.Delete())
			require.NoError(t, n.add(m, "again", n.pod(1, IPv4, &PortMapping{HostPort: 9090, ContainerPort: 80})))
			require.NoError(t, n.remove(m, "again", nil))
		}

		untilLooked(t, m)

		if n.variant == viaNFTables {
			assert.Equal(t, 20, worked(), "as many transactions as have been made here")
		} else {
			assert.Equal(t, 10, worked(), "as many processes as there were operations")
		}
	})
}

// To know its own transactions it need not look.
func TestRunKnowsItsOwn(t *testing.T) {
	n := newNode(t, viaNFTables)
	log, logged := logs(t)
	m, fake := n.viaFake(log)
	require.NoError(t, n.add(m, "id", n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})))
	n.runs(m, logged)
	require.NoError(t, n.add(m, "id", n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})))
	untilLooked(t, m)
	fake.others.Store(0)
	require.NoError(t, n.add(m, "again", n.pod(1, IPv4, &PortMapping{HostPort: 9090, ContainerPort: 80})))
	require.NoError(t, n.remove(m, "again", nil))
	untilLooked(t, m)
	assert.Zero(t, fake.others.Load())
}

// A port that the source of a connection kept from being held is held when that
// has gone, without any operation, or with the next one of another pod.
func TestRunHoldsPorts(t *testing.T) {
	for name, next := range map[string]func(n *node, m *Manager){
		"Run": (*node).run,
		"another pod's Add": func(n *node, m *Manager) {
			require.NoError(n.t, n.add(m, "another", n.pod(1, IPv4, &PortMapping{HostPort: 9090, ContainerPort: 80})))
		},
	} {
		t.Run(name, func(t *testing.T) { testHoldsPorts(t, next) })
	}
}

func testHoldsPorts(t *testing.T, next func(n *node, m *Manager)) {
	t.Helper()

	n := anyNode(t)
	n.serve(0, "tcp", IPv4, 80)

	var conn net.Conn

	require.NoError(t, n.Host.Do(func() (err error) {
		dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: n.nodeIP(IPv4).AsSlice(), Port: 8080}}
		conn, err = dialer.DialContext(t.Context(), "tcp", netip.AddrPortFrom(n.Pods[0].IPv4, 80).String())

		return err
	}))

	m := n.manager()
	require.NoError(t, n.add(m, "id", n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})))

	held := func() bool { return m.Mappings()[0].Held }
	assert.False(t, held())

	tcpConn, ok := conn.(*net.TCPConn)
	require.True(t, ok)
	require.NoError(t, tcpConn.SetLinger(0)) // no TIME_WAIT
	require.NoError(t, conn.Close())
	next(n, m)
	n.soon(held)
}

var errNotYet = errors.New("not yet")

// A family that comes later is taken over then.
func TestRunWaitsForFamily(t *testing.T) {
	n := newNode(t, viaNFTables)
	n.leftBehind("id", n.pod(0, IPv6, &PortMapping{HostPort: 8080, ContainerPort: 80}))

	m := n.manager()
	late := m.families[1]
	open := late.open

	var there atomic.Bool

	late = newHostportManager(IPv6, late.cfg, func(ctx context.Context) (backend, error) {
		if !there.Load() {
			return nil, errNotYet
		}

		return open(ctx)
	})
	require.NoError(t, m.families[1].Close())

	m.families[1] = late
	n.run(m)
	assert.Empty(t, m.Mappings())
	there.Store(true)
	n.soon(func() bool { return len(m.Mappings()) == 1 && m.Mappings()[0].Held })
}
