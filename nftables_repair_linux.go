package hostport

import (
	"context"
	"fmt"
	"net/netip"
	"slices"

	"github.com/mdlayher/netlink"

	"github.com/cri-o/hostport/internal/nfnetlink"
)

// isIntact reports whether our rules are what they were.
func (b *nftBackend) isIntact(o nftObserved) bool {
	now := o.fingerprint()

	return now != "" && now == b.fingerprint
}

// nameTaken reports whether a chain or set bears one of our names and is not as ours: to
// make ours takes another table then.
func (b *nftBackend) nameTaken(ctx context.Context, o nftObserved) (bool, error) {
	if o.chains == nil {
		return false, nil
	}

	for i, c := range b.chains() {
		ours, err := nfnetlink.ParseChain(b.table.CreateChain(c))
		if err != nil {
			return false, err
		}

		there := o.chains[i]
		there.Handle, there.Policy = 0, ours.Policy // which is put back where the chain is

		if there.Name != "" && there != ours {
			return true, nil
		}
	}

	ours := map[string]nfnetlink.SetInfo{}

	for _, s := range b.sets() {
		info, err := nfnetlink.ParseSet(b.table.CreateSet(s))
		if err != nil {
			return false, err
		}

		ours[s.Name] = info
	}

	answers, err := b.ruleset.conn.Dump(ctx, b.table.Sets())
	if err != nil {
		return false, err
	}

	for _, m := range answers {
		there, err := nfnetlink.ParseSet(m)
		if err != nil {
			return false, err
		}

		if s, ok := ours[there.Name]; ok && there != s {
			return true, nil
		}
	}

	return false, nil
}

// takeOutForeign extends the plan to the chains and sets that others have put into our
// table. To make the table again would do as well, but not unnoticed: between two chains
// of one hook, the old one and the new, a packet may meet neither. It is made again if
// there is something of another kind, which nothing less takes out.
func (p *nftPlan) takeOutForeign(ctx context.Context, b *nftBackend, table nfnetlink.TableInfo) error {
	if table == (nfnetlink.TableInfo{}) {
		return nil
	}

	ours := map[string]bool{}
	for _, c := range b.chains() {
		ours["chain "+c.Name] = true
	}

	for _, s := range b.sets() {
		ours["set "+s.Name] = true
	}

	var flush, sets, chains []netlink.Message

	found := 0

	answers, err := b.ruleset.conn.Dump(ctx, b.table.Chains())
	if err != nil {
		return err
	}

	for _, m := range answers {
		c, err := nfnetlink.ParseChain(m)
		if err != nil {
			return err
		}

		if c.Table != nftTable {
			continue
		}

		found++

		if !ours["chain "+c.Name] {
			flush, chains = append(flush, b.table.FlushChain(c.Name)), append(chains, b.table.DeleteChain(c.Name))
		}
	}

	if answers, err = b.ruleset.conn.Dump(ctx, b.table.Sets()); err != nil {
		return err
	}

	for _, m := range answers {
		s, err := nfnetlink.ParseSet(m)
		if err != nil {
			return err
		}

		found++

		if !s.Anonymous() && !ours["set "+s.Name] {
			sets = append(sets, b.table.DeleteSet(s.Name))
		}
	}

	p.foreign = slices.Concat(flush, sets, chains)
	p.recreate = p.recreate || int(table.Use) > found

	return nil
}

// repairs are what the plan changes besides what deltas ask for, in words.
func (p *nftPlan) repairs(b *nftBackend, intact bool) []string {
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

	if !intact && b.fingerprint != "" || len(p.foreign) > 0 {
		list = append(list, "rules of table "+nftTable)
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

	repairs := []string{"unknown table " + nftTable}

	// It may go meanwhile.
	if err := b.ruleset.conn.Commit(ctx, 0, []netlink.Message{b.table.Create(), b.table.Delete()}); err != nil {
		return repairs, err
	}

	b.fingerprint = ""
	clear(b.hairpins)
	clear(b.inDoubt)
	b.exempted = map[netip.Addr]bool{}

	return repairs, nil
}

// missing returns the elements and rules that are not there, in words.
func (b *nftBackend) missing(ctx context.Context, rows []*row) ([]string, error) {
	b.ruleset.mu.Lock()
	defer b.ruleset.mu.Unlock()

	missing, err := b.missingRules(ctx)
	if err != nil {
		return nil, err
	}

	var wanted []nftElement
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

	return missing, nil
}

// missingRules looks for the rules, chain by chain.
func (b *nftBackend) missingRules(ctx context.Context) ([]string, error) {
	msgs, err := b.ruleset.conn.Dump(ctx, b.table.Rules())
	if err != nil {
		return nil, err
	}

	rules := map[string]int{}

	for _, m := range msgs {
		r, err := nfnetlink.ParseRule(m)
		if err != nil {
			return nil, err
		}

		rules[r.Chain]++
	}

	var missing []string

	for _, m := range b.rules() {
		r, err := nfnetlink.ParseRule(m)
		if err != nil {
			return nil, err
		}

		rules[r.Chain]--

		if rules[r.Chain] < 0 {
			missing = append(missing, "rule of chain "+r.Chain)
		}
	}

	observed, err := b.observe(ctx)
	if err == nil && len(missing) == 0 && !slices.Contains([]string{"", unknownFingerprint, observed.fingerprint()}, b.fingerprint) {
		missing = append(missing, "rules of table "+nftTable+" as they were made")
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
