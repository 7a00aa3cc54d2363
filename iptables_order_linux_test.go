package hostport

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cri-o/hostport/internal/iptables"
	"github.com/cri-o/hostport/internal/nfnetlink"
)

// ends are rules that end the walk of whatever packet meets them in a base chain.
// FOREIGN accepts, and EMPTY does nothing.
func ends() [][]string {
	return [][]string{{"-j", "ACCEPT"}, {"-j", "RETURN"}, {"-j", "FOREIGN"}, {"-g", "EMPTY"}}
}

// foreignChains are what ends lead to.
func (n *node) foreignChains(f IPFamily, table string) {
	n.t.Helper()
	n.commandWith("*"+table+"\n:FOREIGN - [0:0]\n:EMPTY - [0:0]\n-A FOREIGN -j ACCEPT\nCOMMIT\n",
		iptables.Command(f)+"-"+string(n.variant)+"-restore", "--noflush")
}

// Rules of others that come before ours, and end the walk, are noticed, named and put
// behind, with packets to prove it: a pod does not get to services at 127.0.0.1, and
// does get to itself.
func TestForeignRulesBeforeOurs(t *testing.T) {
	eachVariantAndFamily(t, func(t *testing.T, n *node, f IPFamily) {
		n.serve(0, "tcp", f, 80)

		log, logged := logs(t)
		m := n.manager(log)
		pods := map[string][]*PodPortMapping{"id": {n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80})}}
		check := func() (err error) {
			n.do(func() { err = m.Check(t.Context(), "id", pods["id"][0]) })

			return err
		}
		require.NoError(t, n.add(m, "id", pods["id"][0]))

		to := netip.AddrPortFrom(n.nodeIP(f), 8080)
		holes := []struct {
			table, chain, comment string
			closed                func() bool
		}{{iptables.NATTable, iptables.PostRouting, iptables.MasqComment, func() bool { return n.asks(0, to) }}}

		if f == IPv4 {
			n.hostService("tcp", "127.0.0.1:9000")
			n.sysctl("net/ipv4/conf/all/rp_filter", "0")
			n.sysctl("net/ipv4/conf/cni0/rp_filter", "0")
			require.NoError(t, n.Pods[0].SendLoopback())

			holes = append(holes, holes[0])
			holes[1].table, holes[1].chain, holes[1].comment = iptables.RawTable, iptables.PreRouting, iptables.GuardComment
			holes[1].closed = func() bool { return !n.asks(0, netip.MustParseAddrPort("127.0.0.1:9000")) }
		}

		for _, hole := range holes {
			n.foreignChains(f, hole.table)

			open := func(end []string) {
				n.command(iptables.Command(f)+"-"+string(n.variant), append([]string{"-t", hole.table, "-I", hole.chain, "-s", podNetwork(n, f).String()}, end...)...)
				assert.False(t, hole.closed(), end)
				require.ErrorContains(t, check(), hole.comment, end)
			}

			for i, end := range ends() {
				open(end)

				if i%2 == 0 {
					require.NoError(t, n.add(m, "id", pods["id"][0]))
				} else {
					require.NoError(t, n.sync(m, pods))
				}

				require.NoError(t, check(), end)
				assert.True(t, hole.closed(), end)
			}
		}

		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan error)

		go func() { _ = n.Host.Do(func() error { ended <- m.Run(ctx); return nil }) }()
		n.wipe(f)
		n.soon(func() bool { return strings.Contains(logged(), "Repaired host ports") })

		for _, hole := range holes {
			for _, end := range ends() {
				n.command(iptables.Command(f)+"-"+string(n.variant), append([]string{"-t", hole.table, "-I", hole.chain}, end...)...)
				n.soon(func() bool { return check() == nil })
				assert.True(t, hole.closed(), end)
			}

			if n.variant == iptables.NFT { // and put behind one that is before ours
				n.command(iptables.Command(f)+"-nft", "-t", hole.table, "-I", hole.chain, "-j", "MARK", "--set-mark", "1")
				untilLooked(t, m)
				n.command("nft", "add", "rule", nftFamily(f), hole.table, hole.chain,
					"index", "0", "counter", "accept")
				n.soon(func() bool { return check() == nil })
			}
		}

		stop()
		require.Equal(t, context.Canceled, <-ended)
	})
}

// asks reports whether a pod is answered.
func (n *node) asks(pod int, to netip.AddrPort) bool {
	n.t.Helper()

	ctx, cancel := context.WithTimeout(n.t.Context(), patience/10)
	defer cancel()

	_, err := n.Pods[pod].Ask(ctx, "tcp", to)

	return err == nil
}

// What does not end the walk stays where it is, as does what insists on being first.
func TestForeignRulesThatGoOn(t *testing.T) {
	eachVariant(t, func(t *testing.T, n *node) {
		m := n.manager()
		pods := map[string][]*PodPortMapping{"id": {n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})}}
		require.NoError(t, n.sync(m, pods))

		tool := "iptables-" + string(n.variant)
		dump := func() []string {
			raw := strings.Split(n.command(tool+"-save", "-t", iptables.RawTable), "\n")

			return append(slices.DeleteFunc(raw, func(line string) bool { return !strings.HasPrefix(line, iptables.CmdAppend) }), n.rules(IPv4)...)
		}

		for table, chain := range map[string]string{iptables.NATTable: iptables.PostRouting, iptables.RawTable: iptables.PreRouting} {
			for _, name := range []string{"cali-x", "KUBE-x"} {
				n.command(tool, "-t", table, "-N", name)
				n.command(tool, "-t", table, "-I", chain, "-j", name)
			}

			rules := [][]string{{"-s", "10.0.0.0/8"}, {"-j", "MARK", "--set-mark", "1"}, {"-j", "LOG", "--log-prefix", "-j ACCEPT"}}
			if table == iptables.RawTable {
				rules = append(rules, []string{"-j", "CT", "--notrack"}, []string{"-s", "192.0.2.99", "-j", iptables.DropTarget})
			}

			for _, rule := range rules {
				n.command(tool, append([]string{"-t", table, "-I", chain}, rule...)...)
			}
		}

		before := dump()
		n.do(func() { require.NoError(t, m.Check(t.Context(), "id", pods["id"][0])) })
		require.NoError(t, n.add(m, "id", pods["id"][0]))
		require.NoError(t, n.sync(m, pods))
		assert.Equal(t, before, dump())
	})
}

// What CNI plugins append for each pod costs nothing, nor does what others do in
// front of services. Add again is one process where nothing has happened.
func TestForeignRulesBehindOurs(t *testing.T) {
	eachVariant(t, func(t *testing.T, n *node) {
		worked := n.countWork()
		log, logged := logs(t)
		m := n.manager(log)
		pod := n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})
		require.NoError(t, n.add(m, "id", pod))
		n.runs(m, logged)
		untilIdle(t, m, worked)

		if n.variant == iptables.NFT {
			n.iptables(IPv4, "-A", iptables.PostRouting, "-s", "10.88.0.9", "-j", "ACCEPT")
			n.iptables(IPv4, "-I", iptables.PreRouting, "-s", "10.88.0.9", "-j", "ACCEPT")
			untilLooked(t, m)

			if ours := worked() - 2; nfnetlink.KernelAtLeast(5, 15) {
				assert.Zero(t, ours)
			} else { // which does not say whether a rule stands behind the others
				assert.Positive(t, ours)
			}
		}

		for _, processes := range []int{1, 1} {
			require.NoError(t, n.add(m, "id", pod))
			require.NoError(t, n.add(m, "six", n.pod(0, IPv6, &PortMapping{HostPort: 8080, ContainerPort: 80})))
			worked()
			require.NoError(t, n.add(m, "id", pod))
			assert.Equal(t, processes, worked())
		}
	})
}
