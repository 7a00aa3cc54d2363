package nftables

import (
	"context"
	"fmt"
	"net/netip"
	"slices"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/cri-o/hostport/internal/nfnetlink"
	"github.com/cri-o/hostport/internal/row"
)

// wanted is what the kernel gives back of the layout, except for handles.
func (l Layout) wanted() (o Observed, err error) {
	chains, sets := make([]netlink.Message, len(l.Chains())), make([]netlink.Message, len(l.Sets()))

	for i, c := range l.Chains() {
		chains[i] = l.Table.CreateChain(c)
	}

	for i, s := range l.Sets() {
		sets[i] = l.Table.CreateSet(s)
	}

	if o.chains, err = parseAll(chains, nfnetlink.ParseChain); err != nil {
		return Observed{}, err
	}

	if o.sets, err = parseAll(sets, nfnetlink.ParseSet); err != nil {
		return Observed{}, err
	}

	o.rules, err = parseAll(l.Rules(), nfnetlink.ParseRule)

	return o, err
}

// Differences returns, in words, how what bears our names differs from what we would make, and
// whether to make that takes another table: the kernel puts back a policy, and wakes a table
// that is dormant, but it moves no chain and changes no set.
func (l Layout) Differences(there Observed) (list []string, recreate bool, err error) {
	if !there.exists() {
		return []string{l.tableName() + " is missing"}, false, nil
	}

	ours, err := l.wanted()
	if err != nil {
		return nil, false, err
	}

	switch flags := there.Table.Flags; {
	case flags&unix.NFT_TABLE_F_DORMANT != 0:
		list = append(list, l.tableName()+" is dormant")
	case flags != 0:
		list = append(list, fmt.Sprintf("%s has flags %#x", l.tableName(), flags))
	}

	for i, c := range ours.chains {
		is := there.chains[i]
		is.Handle = 0
		moved := is
		moved.Policy = c.Policy

		switch {
		case is.Name == "":
			list = append(list, "chain "+c.Name+" is missing")
		case moved != c:
			list, recreate = append(list, "chain "+c.Name+" has another type, hook or priority"), true
		case is != c:
			list = append(list, "chain "+c.Name+" has policy drop")
		}
	}

	for _, s := range ours.sets {
		switch i := slices.IndexFunc(there.sets, func(is nfnetlink.SetInfo) bool { return is.Name == s.Name }); {
		case i < 0:
			list = append(list, "set "+s.Name+" is missing")
		case there.sets[i] != s:
			list, recreate = append(list, "set "+s.Name+" has another type, size or flags"), true
		}
	}

	for _, c := range ours.chains {
		list = append(list, differentRules(c.Name, ours.rules, there.rules)...)
	}

	return list, recreate, nil
}

// differentRules are the differences in one chain's rules.
func differentRules(chain string, ours, there []nfnetlink.RuleInfo) (list []string) {
	in := func(rules []nfnetlink.RuleInfo) (expressions []string) {
		for _, r := range rules {
			if r.Chain == chain {
				expressions = append(expressions, r.Expressions)
			}
		}

		return expressions
	}
	want, have := in(ours), in(there)
	lacks := func(some, of []string) bool {
		return slices.ContainsFunc(of, func(rule string) bool { return !slices.Contains(some, rule) })
	}

	if lacks(have, want) {
		list = append(list, "rule of chain "+chain+" is missing")
	}

	if lacks(want, have) {
		list = append(list, "rule of others in chain "+chain)
	}

	if list == nil && !slices.Equal(have, want) {
		list = append(list, "rules of chain "+chain+" are in another order")
	}

	return list
}

// tableName is our table's, as nft names it.
func (l Layout) tableName() string {
	if l.Family == row.IPv6 {
		return "table ip6 " + TableName
	}

	return "table ip " + TableName
}

// takeOutForeign extends the plan to the chains and sets that others have put into our
// table. To make the table again would do as well, but not unnoticed: between two chains
// of one hook, the old one and the new, a packet may meet neither. It is made again if
// there is something of another kind, which nothing less takes out.
func (p *plan) takeOutForeign(ctx context.Context, b *Backend) error {
	if !p.observed.exists() {
		return nil
	}

	there, err := dumpAll(ctx, b.ruleset.conn, b.Table.Chains(), nfnetlink.ParseChain)
	if err != nil {
		return err
	}

	there = slices.DeleteFunc(there, func(c nfnetlink.ChainInfo) bool { return c.Table != TableName })

	var flush, sets, chains []netlink.Message

	for _, c := range there {
		if !slices.ContainsFunc(b.Chains(), func(ours nfnetlink.Chain) bool { return ours.Name == c.Name }) {
			flush, chains = append(flush, b.Table.FlushChain(c.Name)), append(chains, b.Table.DeleteChain(c.Name))
		}
	}

	for _, s := range p.observed.sets {
		if !s.Anonymous() && !slices.ContainsFunc(b.Sets(), func(ours nfnetlink.Set) bool { return ours.Name == s.Name }) {
			sets = append(sets, b.Table.DeleteSet(s.Name))
		}
	}

	p.foreign = slices.Concat(flush, sets, chains)

	if odd := int(p.observed.Table.Use) > len(there)+len(p.observed.sets); odd || len(p.foreign) > 0 {
		p.recreate = p.recreate || odd
		p.differences = append(p.differences, "objects of others in "+b.tableName())
	}

	return nil
}

// repairs are what the plan changes besides what deltas ask for, in words.
func (p *plan) repairs(b *Backend) []row.Repair {
	var list []row.Repair

	for _, key := range p.order {
		switch w := p.wanted[key]; {
		case w.replaced.There():
			list = append(list, row.Repair{What: "replaced " + b.Describe(w.replaced) + " of podIDHash " + w.replaced.Comment, Row: w.row})
		case w.delta != row.Shared || w.have == w.want:
		case w.want.There():
			list = append(list, row.Repair{What: "missing " + b.Describe(w.want), Row: w.row})
		default:
			list = append(list, row.Repair{What: "unknown " + b.Describe(w.have)})
		}
	}

	if b.made || p.observed.exists() {
		for _, difference := range p.differences {
			list = append(list, row.Repair{What: difference, Shared: true})
		}
	}

	return list
}

// Describe says what an element is.
func (b *Backend) Describe(e Element) string {
	if ip, ok := b.HairpinOf(e); ok && e.Set == Hairpins {
		return "hairpin of " + ip.String()
	}

	if link, ip, ok := b.neighbourOf(e); ok {
		return "neighbours of " + ip.String() + " on " + link
	}

	if ip, ok := netip.AddrFromSlice([]byte(e.Key)); ok && e.Set == Services {
		return "address of a Service " + ip.String()
	}

	if r, ok := b.Row(e); ok && e.Set != Hairpins {
		return "host port " + r.String()
	}

	return fmt.Sprintf("element %x of %s", e.Key, e.Set)
}

// deleteTable takes out everything that bears our names.
func (b *Backend) deleteTable(ctx context.Context) ([]row.Repair, error) {
	answers, err := b.ruleset.conn.Get(ctx, b.Table.Get())
	if err != nil || answers[0] == nil {
		return nil, err
	}

	repairs := []row.Repair{{What: "unknown " + b.tableName()}}

	// It may go meanwhile.
	if err := b.ruleset.conn.Commit(ctx, 0, []netlink.Message{b.Table.Create(), b.Table.Delete()}); err != nil {
		return repairs, err
	}

	b.made = false // and the next plan is for the whole table

	return repairs, nil
}

// Missing returns the elements and rules that are not there, in words.
func (b *Backend) Missing(ctx context.Context, rows []*row.Row) ([]string, error) {
	b.ruleset.mu.Lock()
	defer b.ruleset.mu.Unlock()

	var there Observed

	_, err := b.unmoved(ctx, func() (err error) {
		there, err = b.Observe(ctx)

		return err
	})
	if err != nil {
		return nil, err
	}

	var (
		missing []string
		wanted  []Element
	)

	if !b.knows(there) {
		var recreate bool
		if missing, recreate, err = b.Differences(there); err != nil || recreate { // and elements cannot be asked for
			return missing, err
		}
	}

	for _, r := range rows {
		wanted = append(wanted, elementsOf(r)...)
	}

	keys := make([]ElementKey, len(wanted))
	for i, e := range wanted {
		keys[i] = e.ElementKey
	}

	have, err := b.lookUp(ctx, keys)
	if err != nil {
		return nil, err
	}

	for _, e := range wanted {
		if e.Set == Hairpins || e.Set == Neighbours {
			e.Comment = have[e.ElementKey].Comment // another pod's, where they share an address
		}

		if have[e.ElementKey] != e {
			missing = append(missing, b.Describe(e)+" is missing")
		}
	}

	exempted, err := b.dumpSets(ctx, Services)
	for _, e := range exempted {
		if ip, _ := netip.AddrFromSlice([]byte(e.Key)); !b.services[ip] {
			missing = append(missing, b.Describe(e)+" is none of the node's")
		}
	}

	return missing, err
}

// Disturbed reports whether others have changed our table.
func (b *Backend) Disturbed(transactions []nfnetlink.Transaction) bool {
	return slices.ContainsFunc(transactions, func(t nfnetlink.Transaction) bool {
		if t.Generation == 0 {
			return true
		}

		for c := range t.Changes {
			if c.Family == b.Table.Family && c.Table == TableName {
				return !b.ruleset.own.Has(t.Generation)
			}
		}

		return false
	})
}
