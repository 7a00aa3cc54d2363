package hostport

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/mdlayher/netlink"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cri-o/hostport/internal/nfnetlink"
	"github.com/cri-o/hostport/internal/nftables"
	"github.com/cri-o/hostport/internal/nodeaddr"
	"github.com/cri-o/hostport/internal/row"
)

// nameTaken is something by one of our names that is not as we would make it.
type nameTaken struct {
	script string // for nft(8)
	says   string // Check
	silent bool   // the host port goes on working
}

// namesTaken are those of one family, where a row leads from TCP port 8080 to pod.
func namesTaken(f IPFamily, pod netip.Addr) map[string]nameTaken {
	chain := func(name, is string) string {
		return fmt.Sprintf("flush chain FAM TABLE %[1]s; delete chain FAM TABLE %[1]s; add chain FAM TABLE %[1]s { %[2]s }", name, is)
	}
	anew := func(objects string) string { return "delete table FAM TABLE; add table FAM TABLE; " + objects }
	element := fmt.Sprintf("; add element FAM TABLE hostports { tcp . 8080 comment %q : %s . 80 }", row.ShortHash("id"), pod)

	all := map[string]nameTaken{
		"table dormant": {script: "add table FAM TABLE { flags dormant; }", says: "TABLE is dormant"},

		"chain elsewhere":   {script: chain("nat-prerouting", "type nat hook input priority -99;"), says: "chain nat-prerouting has another type, hook or priority"},
		"chain later":       {script: chain("nat-prerouting", "type nat hook prerouting priority -90;"), says: "chain nat-prerouting has another type, hook or priority"},
		"chain of a filter": {script: chain("nat-prerouting", "type filter hook prerouting priority -99;"), says: "chain nat-prerouting has another type, hook or priority"},
		"chain without hook": {
			script: chain("nat-prerouting", ""), says: "chain nat-prerouting has another type, hook or priority",
		},
		"chain with a hook": {
			script: "flush table FAM TABLE; " + chain("hostports", "type nat hook input priority 5;"), says: "chain hostports has another type, hook or priority",
		},
		"chain gone":   {script: "delete chain FAM TABLE prerouting", says: "chain prerouting is missing", silent: true},
		"chain closed": {script: "add chain FAM TABLE prerouting { policy drop; }", says: "chain prerouting has policy drop"},

		"map that times out":   {script: anew("add map FAM TABLE hostports { type inet_proto . inet_service : ADDR . inet_service; flags timeout; }" + element), says: "set hostports has another type, size or flags"},
		"map with a size":      {script: anew("add map FAM TABLE hostports { type inet_proto . inet_service : ADDR . inet_service; size 1; }" + element), says: "set hostports has another type, size or flags"},
		"map of ranges":        {script: anew("add map FAM TABLE hostports { type inet_proto . inet_service : ADDR . inet_service; flags interval; }" + element), says: "set hostports has another type, size or flags"},
		"map by another key":   {script: anew("add map FAM TABLE hostports { type inet_service : ADDR . inet_service; }"), says: "set hostports has another type, size or flags"},
		"map to another thing": {script: anew("add map FAM TABLE hostports { type inet_proto . inet_service : ADDR; }"), says: "set hostports has another type, size or flags"},
		"set gone":             {script: anew("add map FAM TABLE hostports { type inet_proto . inet_service : ADDR . inet_service; }" + element), says: "set hairpins is missing"},

		"accepted before": {script: "insert rule FAM TABLE nat-prerouting accept", says: "rule of others in chain nat-prerouting"},
		"dropped before":  {script: "insert rule FAM TABLE nat-prerouting drop", says: "rule of others in chain nat-prerouting"},
		"returned before": {script: "insert rule FAM TABLE hostports return", says: "rule of others in chain hostports"},
		"dropped for CRI-O": {
			script: "add rule FAM TABLE prerouting drop", says: "rule of others in chain prerouting",
		},
		"accepted behind": {script: "insert rule FAM TABLE masquerading accept", says: "rule of others in chain masquerading", silent: true},
		"rule twice":      {script: "add rule FAM TABLE nat-output goto hostports", says: "rule of others in chain nat-output", silent: true},
		"rules in the way": { // the kernel would not take ours beside them, from where there is no DNAT
			script: "flush chain FAM TABLE hostports; add chain FAM TABLE odd { type filter hook input priority 0; }; add rule FAM TABLE odd jump hostports",
			says:   "rule of chain hostports is missing",
		},
	}

	for name, m := range all {
		words := strings.NewReplacer("FAM", nftFamily(f), "ADDR", "ipv"+string(f)+"_addr", "TABLE", nftables.TableName)
		m.script, m.says = words.Replace(m.script), words.Replace(m.says)
		all[name] = m
	}

	return all
}

// Whatever bears our names and is not as ours is named by Check, and put right by whoever
// comes to it.
func TestNamesTaken(t *testing.T) {
	eachNFTFamily(t, func(t *testing.T, n *node, f IPFamily) {
		for i := range n.Pods {
			n.serve(i, "tcp", f, 80)
		}

		for name, taken := range namesTaken(f, n.Pods[0].IP(f == IPv6)) {
			t.Run(name, func(t *testing.T) { n.within(t).testNameTaken(f, taken) })
		}
	})
}

func (n *node) testNameTaken(f IPFamily, taken nameTaken) {
	pod := n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80})
	pods := map[string][]*PodPortMapping{"id": {pod}}
	at := func(port uint16) netip.AddrPort { return netip.AddrPortFrom(n.nodeIP(f), port) }
	m := n.manager()
	check := func() (err error) {
		n.do(func() { err = m.Check(n.t.Context(), "id", pod) })

		return err
	}
	right := func() {
		n.t.Helper()
		n.answers(n.Client, "tcp", at(8080), "web")
		n.exactly(m, pods)
		require.NoError(n.t, check())
	}

	require.NoError(n.t, n.add(m, "id", pod))
	right()
	n.command("nft", taken.script)
	require.ErrorContains(n.t, check(), taken.says)

	ctx, cancel := context.WithTimeout(n.t.Context(), patience/30)
	defer cancel()

	_, err := n.Client.Ask(ctx, "tcp", at(8080))
	assert.Equal(n.t, taken.silent, err == nil, err)

	require.NoError(n.t, n.sync(m, pods))
	right()

	n.command("nft", taken.script)
	require.NoError(n.t, n.add(m, "id", pod))
	n.answers(n.Client, "tcp", at(8080), "web")

	n.command("nft", taken.script)
	require.NoError(n.t, n.add(m, "other", n.pod(1, f, &PortMapping{HostPort: 9090, ContainerPort: 80})))
	n.answers(n.Client, "tcp", at(8080), "web")
	n.answers(n.Client, "tcp", at(9090), "other")
	require.NoError(n.t, n.remove(m, "other", nil))

	for _, backend := range []Backend{BackendAuto, BackendNFTables} {
		require.NoError(n.t, m.Close())
		n.command("nft", taken.script)

		m = n.manager(WithBackend(backend))
		if len(m.Mappings()) == 0 { // what is there cannot hold a row
			require.NoError(n.t, n.add(m, "id", pod))
		}

		assert.Equal(n.t, BackendNFTables, m.Mappings()[0].Backend)
		n.answers(n.Client, "tcp", at(8080), "web")
		require.NoError(n.t, check())
		require.NoError(n.t, n.sync(m, pods)) // makes known whose the row is, and takes out what does not matter
		right()
	}

	n.run(m)
	n.command("nft", taken.script)
	n.soon(func() bool { return check() == nil })
	n.answers(n.Client, "tcp", at(8080), "web")
}

// The kernel gives back what we make as we would make it, rules to the byte.
func TestMadeAsWanted(t *testing.T) {
	eachNFTFamily(t, func(t *testing.T, n *node, f IPFamily) {
		b := nftOver(t, n.nfnetlink(), f)
		n.commit(b.Objects()...)

		there, err := b.Observe(t.Context())
		require.NoError(t, err)

		differences, recreate, err := b.Differences(there)
		require.NoError(t, err)
		assert.Empty(t, differences)
		assert.False(t, recreate)
	})
}

// On an intact table New changes nothing.
func TestNewChangesNothing(t *testing.T) {
	eachNFTFamily(t, func(t *testing.T, n *node, f IPFamily) {
		n.bridgeCalls(f, false) // so that neighbours are masqueraded
		require.NoError(t, n.Host.AddDevice(nodeaddr.ServiceDevice, false))
		n.assignService(serviceIP(f, 1))

		for i := range n.Pods {
			n.serve(i, "tcp", f, 80)
		}

		m := n.manager()
		web := n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80}, &PortMapping{HostPort: 8080, ContainerPort: 80, Protocol: "SCTP"},
			&PortMapping{HostPort: 8081, ContainerPort: 80, HostIP: n.otherNodeIP(f).String()})
		require.NoError(t, n.add(m, "id", web))
		require.NoError(t, n.add(m, "other", n.pod(1, f, &PortMapping{HostPort: 9090, ContainerPort: 80})))
		require.NoError(t, n.add(m, "other", n.pod(1, f, &PortMapping{HostPort: 9091, ContainerPort: 80})))
		require.NoError(t, n.remove(m, "other", n.pod(1, f, &PortMapping{HostPort: 9091, ContainerPort: 80})))
		require.NoError(t, m.Close())

		worked := n.countWork()
		before := strings.Join(n.elements(f), "\n")

		for _, set := range []string{nftables.HostPorts, nftables.HostIPPorts, nftables.Hairpins, nftables.Neighbours, nftables.Services} {
			require.Contains(t, before, " element "+set+" ")
		}

		for _, backend := range []Backend{BackendNFTables, BackendAuto, BackendNFTables} {
			m = n.manager(WithBackend(backend))
			assert.Zero(t, worked(), "generations")

			// What others do elsewhere changes nothing either.
			n.commit(nfnetlink.Table{Family: unix.NFPROTO_IPV4, Name: "others"}.Create())
			require.NoError(t, n.add(m, "id", web))
			assert.Equal(t, 1, worked(), "generations")
			require.NoError(t, m.Close())
			n.commit(nfnetlink.Table{Family: unix.NFPROTO_IPV4, Name: "others"}.Delete())
			worked()
		}

		assert.Equal(t, before, strings.Join(n.elements(f), "\n"))

		m = n.manager()
		require.NoError(t, n.add(m, "more", n.pod(0, f, &PortMapping{HostPort: 8088, ContainerPort: 80})))
		n.answers(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(f), 8088), "web")
		assert.Equal(t, 1, worked(), "generations")
	})
}

// A rule that differs from ours in a single expression is not taken for it.
func TestChangedExpressionIsSeen(t *testing.T) {
	eachNFTFamily(t, func(t *testing.T, n *node, f IPFamily) {
		n.serve(0, "tcp", f, 80)
		n.leftBehind("id", n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80}))

		l := nftables.NewLayout(f)
		h := l.Header()
		port := nfnetlink.LoadTransportHeader(2, 2, nftables.Piece(1))
		rule := func(port, lookUp nfnetlink.Expr, more ...nfnetlink.Expr) []nfnetlink.Expr {
			return append([]nfnetlink.Expr{nfnetlink.LoadProtocol(nftables.Reg1), port}, append(more, lookUp, nfnetlink.DNAT(l.Table.Family, nftables.Reg1, h.Behind))...)
		}
		lookUp := nfnetlink.LookUp(nftables.HostPorts, nftables.Reg1, nftables.Reg1)

		rules := l.Rules()
		changed := func(exprs []nfnetlink.Expr) []netlink.Message {
			return []netlink.Message{rules[0], l.Table.AppendRule(nftables.HostPorts, exprs...)}
		}

		for name, msgs := range map[string][]netlink.Message{
			"one alone":   rules[1:2],
			"order":       {rules[1], rules[0]},
			"twice":       {rules[0], rules[1], rules[1]},
			"port masked": changed(rule(port, lookUp, nfnetlink.Mask(nftables.Piece(1), []byte{0xff, 0xfe}))),
			"offset":      changed(rule(nfnetlink.LoadTransportHeader(0, 2, nftables.Piece(1)), lookUp)),
			"more":        changed(rule(port, lookUp, nfnetlink.LoadProtocol(nftables.Reg2+1))),
		} {
			t.Run(name, func(t *testing.T) {
				n := n.within(t)
				n.commit(append([]netlink.Message{l.Table.FlushChain(nftables.HostPorts)}, msgs...)...)

				worked := n.countWork()
				m := n.manager()
				assert.Equal(t, 1, worked())
				n.answers(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(f), 8080), "web")
				assert.Empty(t, n.deviations(f, rowsOfAll(t, f, map[string][]*PodPortMapping{
					"id": {n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80})},
				})))
				require.NoError(t, m.Close())
			})
		}
	})
}

// otherKernel is a connection to a kernel that shows rules in another way than they were
// made.
type otherKernel struct{ nftables.Conn }

func (k otherKernel) Dump(ctx context.Context, request netlink.Message) ([]netlink.Message, error) {
	msgs, err := k.Conn.Dump(ctx, request)
	if request.Header.Type == nftables.NewLayout(IPv4).Table.Rules().Header.Type {
		for i := range msgs {
			msgs[i].Data = bytes.ReplaceAll(msgs[i].Data, []byte("lookup\x00"), []byte("lookUp\x00"))
		}
	}

	return msgs, err
}

// On a kernel that shows our rules in another way than it is sent them, they are known once
// they have been made.
func TestRulesShownInAnotherWay(t *testing.T) {
	n := newNode(t, viaNFTables)
	m, fake := n.viaFake()
	fake.Conn = otherKernel{fake.Conn}
	pod := n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})
	pods := map[string][]*PodPortMapping{"id": {pod}}
	others := nfnetlink.Table{Family: unix.NFPROTO_IPV4, Name: "others"}
	worked := n.countWork()

	require.NoError(t, n.add(m, "id", pod))
	n.commit(others.Create())
	worked()

	for range 2 {
		n.do(func() { require.NoError(t, m.Check(t.Context(), "id", pod)) })
		require.NoError(t, n.add(m, "id", pod))
		require.NoError(t, n.sync(m, pods))
		assert.Zero(t, worked())
	}

	n.wipe(IPv4)
	n.do(func() { require.Error(t, m.Check(t.Context(), "id", pod)) })
	require.NoError(t, n.sync(m, pods))
	n.do(func() { require.NoError(t, m.Check(t.Context(), "id", pod)) })
	assert.Empty(t, n.deviations(IPv4, rowsOfAll(t, IPv4, pods)))
}

// An address of the node that somebody has put among those of Services is named by Check,
// and taken out.
func TestNodeAddressExempted(t *testing.T) {
	eachNFTFamily(t, func(t *testing.T, n *node, f IPFamily) {
		n.serve(0, "tcp", f, 80)

		pod := n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80})
		m := n.manager()
		check := func() (err error) {
			n.do(func() { err = m.Check(t.Context(), "id", pod) })

			return err
		}
		e := nftables.ServiceElement(n.nodeIP(f))
		add := func() { n.commit(nftables.NewLayout(f).Table.AddElement(e.Set, e.Element())) }
		exempt := func() {
			add()
			require.ErrorContains(t, check(), "address of a Service "+n.nodeIP(f).String()+" is none of the node's")
			n.refused(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(f), 8080))
		}

		require.NoError(t, n.add(m, "id", pod))

		exempt()
		require.NoError(t, n.sync(m, map[string][]*PodPortMapping{"id": {pod}}))
		require.NoError(t, check())

		exempt()
		require.NoError(t, m.Close())

		m = n.manager()
		require.NoError(t, check())
		n.run(m)
		add()
		n.soon(func() bool { return !strings.Contains(strings.Join(n.elements(f), "\n"), nftables.Services) })
		n.answers(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(f), 8080), "web")
	})
}
