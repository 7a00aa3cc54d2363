package hostport

import (
	"context"
	"fmt"
	"iter"
	"maps"
	"net/netip"
	"slices"

	"github.com/mdlayher/netlink"

	"github.com/cri-o/hostport/internal/nfnetlink"
)

func (b *nftBackend) repair(ctx context.Context, table iter.Seq[*row], purge bool) ([]string, error) {
	b.ruleset.mu.Lock()
	defer b.ruleset.mu.Unlock()

	rows := slices.Collect(table)

	for try := 0; ; try++ {
		gen, err := b.ruleset.now(ctx, try)
		if err != nil {
			return nil, err
		}

		repairs, err := b.tryRepair(ctx, gen, rows, purge)
		if !overtaken(err) || try > maxOvertaken {
			return repairs, err
		}
	}
}

// tryRepair repairs if the ruleset stays of generation gen, or in any case if that
// is 0.
func (b *nftBackend) tryRepair(ctx context.Context, gen uint32, rows []*row, purge bool) ([]string, error) {
	observed, err := b.observe(ctx)
	if err != nil {
		return nil, err
	}

	have, err := b.dump(ctx)
	if err != nil {
		return nil, err
	}

	p := b.planAll(have, rows, purge)
	intact := b.isIntact(observed)
	repairs := p.differences(b)

	if !intact {
		if p.recreate, err = b.nameTaken(ctx, observed); err != nil {
			return nil, err
		}
	}

	if purge {
		if err := p.takeOutForeign(ctx, b, observed.table); err != nil {
			return nil, err
		}
	}

	intact = intact && !p.recreate && len(p.foreign) == 0 // and has another fingerprint then

	if !intact && b.fingerprint != "" || len(p.foreign) > 0 {
		repairs = append(repairs, "rules of table "+nftTable)
	}

	if err := b.commit(ctx, gen, p, !intact); err != nil {
		return repairs, err
	}

	maps.DeleteFunc(b.hairpins, func(ip netip.Addr, _ nftHairpin) bool {
		_, ok := p.hairpins[ip]

		return !ok
	})

	return repairs, nil
}

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

// planAll works out what it takes for the kernel, which has the elements given,
// to hold rows, and with purge nothing else.
func (b *nftBackend) planAll(have map[nftKey]nftElement, rows []*row, purge bool) *nftPlan {
	p := &nftPlan{wanted: map[nftKey]*nftWanted{}, hairpins: map[netip.Addr]nftHairpin{}}

	for _, r := range rows {
		ip := r.pod.Addr()
		e, h := rowElement(r), p.hairpins[ip]
		p.touch(shared, r, e.nftKey, have[e.nftKey], e)

		h.there, h.link = true, r.link
		h.rows++

		if there := have[hairpinElement(ip, "").nftKey]; h.comment == "" || there.comment == r.ownerHash {
			h.comment = r.ownerHash
		}

		p.hairpins[ip] = h
	}

	for ip, h := range p.hairpins {
		for _, e := range []nftElement{h.element(ip), h.neighbour(ip)} {
			if e.there() {
				p.touch(shared, nil, e.nftKey, have[e.nftKey], e)
			}
		}
	}

	for ip := range b.services {
		e := serviceElement(ip)
		p.touch(shared, nil, e.nftKey, have[e.nftKey], e)
	}

	for key, e := range have {
		if p.wanted[key] == nil && (purge || b.goes(e)) {
			p.touch(shared, nil, key, e, nftElement{})
		}
	}

	return p
}

// goes reports whether an element that is not wanted goes in any repair: one that a
// transaction of unknown outcome has left, and one that changes the way of packets to
// rows, whoever made it.
func (b *nftBackend) goes(e nftElement) bool {
	doubt := b.doubtful[e.nftKey]

	return e.set == nftServices || e.set == nftNeighbours ||
		doubt != nil && (e.comment == doubt.want.comment || e.comment == doubt.have.comment)
}

// differences are the elements that the plan changes, in words.
func (p *nftPlan) differences(b *nftBackend) []string {
	var list []string

	for _, key := range p.order {
		switch w := p.wanted[key]; {
		case w.have == w.want:
		case w.want.there():
			list = append(list, "missing "+b.describe(w.want))
		default:
			list = append(list, "unknown "+b.describe(w.have))
		}
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

func (b *nftBackend) demolish(ctx context.Context) ([]string, error) {
	b.ruleset.mu.Lock()
	defer b.ruleset.mu.Unlock()

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
	clear(b.doubtful)
	b.exempted = map[netip.Addr]bool{}

	return repairs, nil
}

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
	if err == nil && len(missing) == 0 && b.fingerprint != "" && observed.fingerprint() != b.fingerprint {
		missing = append(missing, "rules of table "+nftTable+" as they were made")
	}

	return missing, err
}

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
