package interop

import (
	"context"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/stretchr/testify/require"
	"sigs.k8s.io/knftables"

	"github.com/cri-o/hostport"
)

// crio stands in for CRI-O's nftables manager of one family: it makes the
// transactions that CRI-O makes.
type crio struct {
	node   *node
	family knftables.Family
	nft    knftables.Interface
}

func (n *node) crio(f knftables.Family) crio {
	n.t.Helper()

	return crio{node: n, family: f, nft: n.knftables(f)}
}

// add adds the rows of the node's i-th pod, those of its family.
func (c crio) add(id string, i int, mappings ...*hostport.PortMapping) {
	c.node.t.Helper()

	c.node.do(func() {
		tx := c.nft.NewTransaction()
		c.ensure(tx)

		pod := c.node.podIP(i, c.family)
		for _, pm := range mappings {
			tx.Add(crioElement(id, pod, pm))
		}

		tx.Add(&knftables.Element{
			Set: hairpins, Key: []string{pod.String(), pod.String()}, Comment: knftables.PtrTo(hashOf(id)),
		})

		require.NoError(c.node.t, c.nft.Run(c.node.t.Context(), tx))
	})
}

// crioElement is what stands for a row.
func crioElement(id string, pod netip.Addr, pm *hostport.PortMapping) *knftables.Element {
	e := &knftables.Element{
		Map:     hostPorts,
		Key:     []string{strings.ToLower(string(pm.Protocol)), strconv.Itoa(int(pm.HostPort))},
		Value:   []string{pod.String(), strconv.Itoa(int(pm.ContainerPort))},
		Comment: knftables.PtrTo(hashOf(id)),
	}
	if pm.HostIP != "" {
		e.Map, e.Key = hostIPPorts, slices.Insert(e.Key, 0, pm.HostIP)
	}

	return e
}

// ensure makes everything but elements. What is there stays, but for the rules,
// which are made anew.
func (c crio) ensure(tx *knftables.Transaction) {
	var (
		ip   = string(c.family)
		addr = map[string]string{"ip": "ipv4_addr", "ip6": "ipv6_addr"}[ip]
		pod  = addr + " . inet_service"
		port = "inet_proto . inet_service"
	)

	chain := func(ch knftables.Chain, rules ...string) {
		tx.Add(&ch)
		tx.Flush(&knftables.Chain{Name: ch.Name})

		for _, r := range rules {
			tx.Add(&knftables.Rule{Chain: ch.Name, Rule: r})
		}
	}
	hook := func(name string, hook knftables.BaseChainHook, priority knftables.BaseChainPriority) knftables.Chain {
		return knftables.Chain{Name: name, Type: knftables.PtrTo(knftables.NATType), Hook: &hook, Priority: &priority}
	}

	tx.Add(&knftables.Table{Comment: knftables.PtrTo("HostPort rules created by CRI-O")})
	tx.Add(&knftables.Map{
		Name: hostPorts, Type: port + " : " + pod,
		Comment: knftables.PtrTo("hostports on all local IPs (protocol . hostPort -> podIP . podPort)"),
	})
	tx.Add(&knftables.Map{
		Name: hostIPPorts, Type: addr + " . " + port + " : " + pod,
		Comment: knftables.PtrTo("hostports on specific IPs (hostIP . protocol . hostPort -> podIP . podPort)"),
	})

	chain(knftables.Chain{Name: hostPorts},
		"dnat "+ip+" addr . port to "+ip+" daddr . meta l4proto . th dport map @"+hostIPPorts,
		"dnat "+ip+" addr . port to meta l4proto . th dport map @"+hostPorts)

	local := "fib daddr type local goto " + hostPorts
	chain(hook("prerouting", knftables.PreroutingHook, "-100"), local)
	chain(hook("output", knftables.OutputHook, "-100"), local)
	chain(hook("masquerading", knftables.PostroutingHook, "100"))

	tx.Add(&knftables.Set{Name: hairpins, Type: addr + " . " + addr, Comment: knftables.PtrTo("hostport hairpin connections")})

	// nft reads (status & dnat) | snat, where the bit of snat is always set: this
	// never matches, and CRI-O's pods do not reach themselves.
	tx.Add(&knftables.Rule{
		Chain: "masquerading",
		Rule:  "ct status & dnat|snat == dnat " + ip + " saddr . " + ip + " daddr @" + hairpins + " masquerade",
	})
}

// remove removes whatever bears the hash of a pod's id.
func (c crio) remove(id string) {
	c.node.t.Helper()
	c.node.do(func() { require.NoError(c.node.t, c.tryRemove(c.node.t.Context(), id)) })
}

func (c crio) tryRemove(ctx context.Context, id string) error {
	tx := c.nft.NewTransaction()

	for _, name := range []string{hostPorts, hostIPPorts, hairpins} {
		kind := "map"
		if name == hairpins {
			kind = "set"
		}

		list, err := c.nft.ListElements(ctx, kind, name)
		if err != nil {
			return err
		}

		for _, e := range list {
			if e.Comment != nil && *e.Comment == hashOf(id) {
				tx.Delete(e)
			}
		}
	}

	return c.nft.Run(ctx, tx)
}
