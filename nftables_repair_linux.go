package hostport

import (
	"context"
	"fmt"
	"net/netip"
	"slices"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/cri-o/hostport/internal/nfnetlink"
)

// wanted is what the kernel gives back of the layout, except for handles.
func (l nftLayout) wanted() (o nftObserved, err error) {
	chains, sets := make([]netlink.Message, len(l.chains())), make([]netlink.Message, len(l.sets()))

	for i, c := range l.chains() {
		chains[i] = l.table.CreateChain(c)
	}

	for i, s := range l.sets() {
		sets[i] = l.table.CreateSet(s)
	}

	if o.chains, err = parseAll(chains, nfnetlink.ParseChain); err != nil {
		return nftObserved{}, err
	}

	if o.sets, err = parseAll(sets, nfnetlink.ParseSet); err != nil {
		return nftObserved{}, err
	}

	o.rules, err = parseAll(l.rules(), nfnetlink.ParseRule)

	return o, err
}

// misfits returns, in words, how what bears our names differs from what we would make, and
// whether to make that takes another table: the kernel puts back a policy, and wakes a table
// that is dormant, but it moves no chain and changes no set.
func (l nftLayout) misfits(there nftObserved) (list []string, recreate bool, err error) {
	if !there.exists() {
		return []string{l.tableName() + " is missing"}, false, nil
	}

	ours, err := l.wanted()
	if err != nil {
		return nil, false, err
	}

	switch flags := there.table.Flags; {
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
		list = append(list, misfitRules(c.Name, ours.rules, there.rules)...)
	}

	return list, recreate, nil
}

// misfitRules are the misfits of one chain's rules.
func misfitRules(chain string, ours, there []nfnetlink.RuleInfo) (list []string) {
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
func (l nftLayout) tableName() string {
	if l.family == IPv6 {
		return "table ip6 " + nftTable
	}

	return "table ip " + nftTable
}

// takeOutForeign extends the plan to the chains and sets that others have put into our
// table. To make the table again would do as well, but not unnoticed: between two chains
// of one hook, the old one and the new, a packet may meet neither. It is made again if
// there is something of another kind, which nothing less takes out.
func (p *nftPlan) takeOutForeign(ctx context.Context, b *nftBackend) error {
	if !p.observed.exists() {
		return nil
	}

	there, err := dumpAll(ctx, b.ruleset.conn, b.table.Chains(), nfnetlink.ParseChain)
	if err != nil {
		return err
	}

	there = slices.DeleteFunc(there, func(c nfnetlink.ChainInfo) bool { return c.Table != nftTable })

	var flush, sets, chains []netlink.Message

	for _, c := range there {
		if !slices.ContainsFunc(b.chains(), func(ours nfnetlink.Chain) bool { return ours.Name == c.Name }) {
			flush, chains = append(flush, b.table.FlushChain(c.Name)), append(chains, b.table.DeleteChain(c.Name))
		}
	}

	for _, s := range p.observed.sets {
		if !s.Anonymous() && !slices.ContainsFunc(b.sets(), func(ours nfnetlink.Set) bool { return ours.Name == s.Name }) {
			sets = append(sets, b.table.DeleteSet(s.Name))
		}
	}

	p.foreign = slices.Concat(flush, sets, chains)

	if odd := int(p.observed.table.Use) > len(there)+len(p.observed.sets); odd || len(p.foreign) > 0 {
		p.recreate = p.recreate || odd
		p.misfits = append(p.misfits, "objects of others in "+b.tableName())
	}

	return nil
}

// repairs are what the plan changes besides what deltas ask for, in words.
func (p *nftPlan) repairs(b *nftBackend) []string {
	var list []string

	for _, key := range p.order {
		switch w := p.wanted[key]; {
		case w.delta != shared || w.have == w.want:
		case w.want.there():
			list = append(list, "missing "+b.describe(w.want))
		default:
			list = append(list, "unknown "+b.describe(w.have))
		}
	}

	if b.made || p.observed.exists() {
		list = append(list, p.misfits...)
	}

	return list
}

// describe says what an element is.
func (b *nftBackend) describe(e nftElement) string {
	if ip, ok := b.hairpinOf(e); ok && e.set == nftHairpins {
		return "hairpin of " + ip.String()
	}

	if link, ip, ok := b.neighbourOf(e); ok {
		return "neighbours of " + ip.String() + " on " + link
	}

	if ip, ok := netip.AddrFromSlice([]byte(e.key)); ok && e.set == nftServices {
		return "address of a Service " + ip.String()
	}

	if r, ok := b.row(e); ok && e.set != nftHairpins {
		return "host port " + r.String()
	}

	return fmt.Sprintf("element %x of %s", e.key, e.set)
}

// deleteTable takes out everything that bears our names.
func (b *nftBackend) deleteTable(ctx context.Context) ([]string, error) {
	answers, err := b.ruleset.conn.Get(ctx, b.table.Get())
	if err != nil || answers[0] == nil {
		return nil, err
	}

	repairs := []string{"unknown " + b.tableName()}

	// It may go meanwhile.
	if err := b.ruleset.conn.Commit(ctx, 0, []netlink.Message{b.table.Create(), b.table.Delete()}); err != nil {
		return repairs, err
	}

	b.made = false
	clear(b.hairpins)
	clear(b.inDoubt)
	b.exempted = map[netip.Addr]bool{}

	return repairs, nil
}

// missing returns the elements and rules that are not there, in words.
func (b *nftBackend) missing(ctx context.Context, rows []*row) ([]string, error) {
	b.ruleset.mu.Lock()
	defer b.ruleset.mu.Unlock()

	var there nftObserved

	_, err := b.unmoved(ctx, func() (err error) {
		there, err = b.observe(ctx)

		return err
	})
	if err != nil {
		return nil, err
	}

	var (
		missing []string
		wanted  []nftElement
	)

	if !b.knows(there) {
		var recreate bool
		if missing, recreate, err = b.misfits(there); err != nil || recreate { // and elements cannot be asked for
			return missing, err
		}
	}

	for _, r := range rows {
		wanted = append(wanted, elementsOf(r)...)
	}

	keys := make([]nftKey, len(wanted))
	for i, e := range wanted {
		keys[i] = e.nftKey
	}

	have, err := b.lookUp(ctx, keys)
	if err != nil {
		return nil, err
	}

	for _, e := range wanted {
		if e.set == nftHairpins || e.set == nftNeighbours {
			e.comment = have[e.nftKey].comment // another pod's, where they share an address
		}

		if have[e.nftKey] != e {
			missing = append(missing, b.describe(e))
		}
	}

	exempted, err := b.dumpSets(ctx, nftServices)
	for _, e := range exempted {
		if ip, _ := netip.AddrFromSlice([]byte(e.key)); !b.services[ip] {
			missing = append(missing, "unknown "+b.describe(e))
		}
	}

	return missing, err
}

// disturbed reports whether others have changed our table.
func (b *nftBackend) disturbed(transactions []nfnetlink.Transaction) bool {
	return slices.ContainsFunc(transactions, func(t nfnetlink.Transaction) bool {
		if t.Generation == 0 {
			return true
		}

		for c := range t.Changes {
			if c.Family == b.table.Family && c.Table == nftTable {
				return !b.ruleset.own.Has(t.Generation)
			}
		}

		return false
	})
}
