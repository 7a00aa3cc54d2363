package hostport

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"net/netip"
	"slices"
	"sync"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/cri-o/hostport/internal/nfnetlink"
)

// nftConn is what the backend needs of a nfnetlink.Conn.
type nftConn interface {
	Generation(ctx context.Context) (uint32, error)
	Check(ctx context.Context, msgs []netlink.Message) error
	Commit(ctx context.Context, gen uint32, msgs []netlink.Message) error
	Get(ctx context.Context, requests ...netlink.Message) ([]*netlink.Message, error)
	Dump(ctx context.Context, request netlink.Message) ([]netlink.Message, error)
	Close() error
}

// nftRuleset is what both families' backends share: the socket, and how far the
// kernel's ruleset is known.
type nftRuleset struct {
	mu   sync.Mutex
	dial func() (nftConn, error)
	conn nftConn // nil until it is needed
	// gen is the ruleset's generation after our last look or transaction; 0: not
	// known.
	gen uint32
	own nfnetlink.Generations
	// epoch counts how often somebody else turned out to have changed the
	// ruleset. What a backend found out in an epoch is true to its end: our own
	// transactions change nothing for the other family.
	epoch int
}

// newNFTRuleset returns a ruleset that is reached by what dial returns.
func newNFTRuleset(dial func() (nftConn, error)) *nftRuleset { return &nftRuleset{dial: dial} }

// open opens the socket, in the namespace of the calling thread, unless it is open.
func (n *nftRuleset) open() (err error) {
	n.mu.Lock()
	defer n.mu.Unlock()

	if n.conn == nil {
		n.conn, err = n.dial()
	}

	return err
}

// close closes the socket.
func (n *nftRuleset) close() error {
	n.mu.Lock()
	defer n.mu.Unlock()

	if n.conn == nil {
		return nil
	}

	return n.conn.Close()
}

// generation is the ruleset's. The socket is open.
func (n *nftRuleset) generation(ctx context.Context) (uint32, error) { return n.conn.Generation(ctx) }

// ours are the generations that we have made.
func (n *nftRuleset) ours() *nfnetlink.Generations { return &n.own }

// observe notes the generation that the ruleset turned out to have.
func (n *nftRuleset) observe(gen uint32) {
	if gen != n.gen {
		n.gen = gen
		n.epoch++
	}
}

// now returns the generation that the ruleset has, or 0 after so many tries that the
// transaction is to be made in any case.
func (n *nftRuleset) now(ctx context.Context, try int) (uint32, error) {
	gen, err := n.conn.Generation(ctx)
	if err != nil {
		return 0, err
	}

	n.observe(gen)

	if try >= maxOvertaken {
		gen = 0
	}

	return gen, nil
}

// nftBackend keeps the rows of one family in maps of nf_tables.
//
// In the steady state a change is one transaction with the delta alone, on
// condition that nobody else has committed anything since the last one. If
// somebody has, the backend looks whether its rules are still there and what
// there is under the keys of the delta, and commits on condition that this is
// so. If its rules are not what they were, it makes them anew, with all
// elements that are missing, in the same transaction.
type nftBackend struct {
	nftLayout

	ruleset *nftRuleset
	log     klog.Logger
	epoch   int // in which what follows was true
	// made is set once our table stands. seen is how it looked when it was last found or
	// made to be as ours, and zero if nobody knows.
	made     bool
	seen     nftObserved
	hairpins map[netip.Addr]nftHairpin
	// services are the addresses that are not to be translated, exempted those that the
	// kernel has for that.
	services, exempted map[netip.Addr]bool
	// inDoubt are elements of transactions of which nobody knows whether they
	// took effect, because the answer did not come.
	inDoubt map[nftKey]*nftWanted
}

// nftHairpin is what is known of a pod IP's element of the set of hairpins, and of the
// one of neighbours beside it where there is a link.
type nftHairpin struct {
	there   bool
	comment string
	link    string
	rows    int // that lead to the pod IP
	epoch   int // in which it was last known to be so
}

// newNFTBackend returns a backend that translates what comes from loopback addresses, and
// guards them, if told so.
func newNFTBackend(ruleset *nftRuleset, f ipFamily, log klog.Logger, localhost, guard bool) *nftBackend {
	b := &nftBackend{
		nftLayout: newNFTLayout(f), ruleset: ruleset, log: log,
		hairpins: map[netip.Addr]nftHairpin{}, inDoubt: map[nftKey]*nftWanted{},
		services: map[netip.Addr]bool{}, exempted: map[netip.Addr]bool{},
	}
	b.localhost, b.guard = localhost, guard

	return b
}

// usable fails where the kernel cannot carry the layout, and says why.
func (b *nftBackend) usable(ctx context.Context) error {
	if there, err := b.observe(ctx); err == nil {
		if misfits, _, err := b.misfits(there); err == nil && len(misfits) == 0 {
			return nil // it does
		}
	}

	err := b.ruleset.conn.Check(ctx, b.objects())
	if inPlaceOfOurs(err) { // which need not stay
		err = b.ruleset.conn.Check(ctx, append([]netlink.Message{b.table.Create(), b.table.Delete()}, b.objects()...))
	}

	// Without nf_tables the transaction as a whole is.
	if refused := (*nfnetlink.BatchError)(nil); errors.As(err, &refused) && refused.Message < 0 && errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("%w: %w", errUnavailable, err)
	}

	if err != nil {
		return fmt.Errorf("make table %s: %w", nftTable, err)
	}

	return nil
}

// kind is the same for all rows.
func (b *nftBackend) kind(*row) string { return "nftables" }

// name is empty: an element is named by its row's endpoint.
func (b *nftBackend) name(*row) string { return "" }

// ownedBy reports whether the comment of a row stands for id.
func (b *nftBackend) ownedBy(id string, r *row) bool { return shortHash(id) == r.ownerHash }

// list leaves it to reconcile to find out whether all is as we would make it.
func (b *nftBackend) list(ctx context.Context) (rows []*row, intact bool, err error) {
	b.ruleset.mu.Lock()
	defer b.ruleset.mu.Unlock()

	var elements map[nftKey]nftElement

	gen, err := b.unmoved(ctx, func() (err error) {
		elements, err = b.dump(ctx)

		return err
	})
	if err != nil {
		return nil, false, err
	}

	b.ruleset.observe(gen)
	b.epoch = b.ruleset.epoch

	return b.adopt(elements), false, nil
}

// unmoved lists until nobody has committed meanwhile, for else some may be missing. It
// returns the generation of the list.
func (b *nftBackend) unmoved(ctx context.Context, list func() error) (uint32, error) {
	for {
		before, err := b.ruleset.conn.Generation(ctx)
		if err != nil {
			return 0, err
		}

		if err := list(); err != nil {
			return 0, err
		}

		if after, err := b.ruleset.conn.Generation(ctx); err != nil || before == after {
			return after, err
		}
	}
}

// allChains lists the chains of the family, whosever they are.
func (b *nftBackend) allChains(ctx context.Context) ([]nfnetlink.ChainInfo, error) {
	var chains []nfnetlink.ChainInfo

	_, err := b.unmoved(ctx, func() (err error) {
		chains, err = dumpAll(ctx, b.ruleset.conn, b.table.Chains(), nfnetlink.ParseChain)

		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list chains: %w", err)
	}

	return chains, nil
}

// isThere reports whether the family has our table, with chains.
func (b *nftBackend) isThere(chains []nfnetlink.ChainInfo) bool {
	return slices.ContainsFunc(chains, func(c nfnetlink.ChainInfo) bool { return c.Table == b.table.Name })
}

// dump returns all elements of the family.
func (b *nftBackend) dump(ctx context.Context) (map[nftKey]nftElement, error) {
	return b.dumpSets(ctx, nftHostPorts, nftHostIPPorts, nftHairpins, nftServices, nftNeighbours)
}

func (b *nftBackend) dumpSets(ctx context.Context, sets ...string) (map[nftKey]nftElement, error) {
	elements := map[nftKey]nftElement{}

	for _, set := range sets {
		lists, err := dumpAll(ctx, b.ruleset.conn, b.table.Elements(set), nfnetlink.ParseElements)
		if err != nil {
			return nil, fmt.Errorf("list %s: %w", set, err)
		}

		for _, list := range lists {
			for _, e := range list {
				e := elementOf(set, e)
				elements[e.nftKey] = e
			}
		}
	}

	return elements, nil
}

// adopt takes elements for what the kernel holds, and returns the rows.
func (b *nftBackend) adopt(elements map[nftKey]nftElement) []*row {
	var rows []*row

	clear(b.hairpins)
	b.exempted = map[netip.Addr]bool{}

	for _, e := range elements {
		switch e.set {
		case nftHairpins:
			if ip, ok := b.hairpinOf(e); ok {
				h := b.hairpins[ip]
				h.there, h.comment = true, e.comment
				b.hairpins[ip] = h
			}
		case nftNeighbours:
			if link, ip, ok := b.neighbourOf(e); ok {
				h := b.hairpins[ip]
				h.link = link
				b.hairpins[ip] = h
			}
		case nftServices:
			if ip, ok := netip.AddrFromSlice([]byte(e.key)); ok {
				b.exempted[ip] = true
			}
		default:
			if r, ok := b.row(e); ok {
				h := b.hairpins[r.pod.Addr()]
				h.rows++
				b.hairpins[r.pod.Addr()] = h

				rows = append(rows, r)
			}
		}
	}

	for _, r := range rows {
		r.link = b.hairpins[r.pod.Addr()].link
	}

	return rows
}

// exempt notes addresses of Services; due is set if the kernel has others.
func (b *nftBackend) exempt(services []netip.Addr) (due bool) {
	b.services = map[netip.Addr]bool{}
	for _, ip := range services {
		b.services[ip] = true
	}

	return !maps.Equal(b.services, b.exempted)
}

// reconcile commits on the generation that it knows, if that proves what it relies on, and
// else on what it has looked at.
func (b *nftBackend) reconcile(ctx context.Context, t target) (repairs []string, err error) {
	b.ruleset.mu.Lock()
	defer b.ruleset.mu.Unlock()

	if !t.base {
		return b.deleteTable(ctx)
	}

	p := b.plan(t.deltas)

	if !t.whole && b.made && b.epoch == b.ruleset.epoch && b.ruleset.gen != 0 && len(b.inDoubt) == 0 && p.provesItself() {
		err := b.commit(ctx, b.ruleset.gen, p)
		if !overtaken(err) {
			return nil, err
		}
	}

	for try := 0; ; try++ {
		gen, err := b.ruleset.now(ctx, try)
		if err != nil {
			return nil, err
		}

		if err := b.look(ctx, p, t); err != nil {
			return nil, err
		}

		repairs := p.repairs(b)

		if err = b.commit(ctx, gen, p); !overtaken(err) || try > maxOvertaken {
			return repairs, err
		}
	}
}

// overtaken reports whether a transaction may have failed because the kernel does
// not hold what it was made for: somebody else has committed, or has left an
// element that we did not remove because it was not ours, or something in place of
// ours that the next try is to delete.
//
// After maxOvertaken times the transaction is made all the same. It still fails if
// there is an element that the look did not find, or none that it did, though not
// if a foreign one has come into its place. What else may have happened in that
// instant the next operation finds.
func overtaken(err error) bool {
	refused := (*nfnetlink.BatchError)(nil)

	return errors.Is(err, nfnetlink.ErrStale) ||
		errors.As(err, &refused) && (inPlaceOfOurs(err) || errors.Is(err, unix.ENOENT))
}

// inPlaceOfOurs tells whether the kernel has refused to make something because there
// is something else of that name.
func inPlaceOfOurs(err error) bool {
	return errors.Is(err, unix.EEXIST) || errors.Is(err, unix.EOPNOTSUPP)
}

// commit makes the plan true, if the ruleset is still of generation gen, or in
// any case if that is 0.
func (b *nftBackend) commit(ctx context.Context, gen uint32, p *nftPlan) error {
	msgs := b.frame(p)
	base := len(msgs)
	msgs, of := p.messages(b.table, msgs)

	err := b.ruleset.conn.Commit(ctx, gen, msgs)

	refused := (*nfnetlink.BatchError)(nil)
	if errors.As(err, &refused) && refused.Message >= base {
		if w := of[refused.Message-base]; w.delta != shared {
			return &refusedError{delta: w.delta, err: &rowError{w.row, err}}
		}
	}

	switch {
	case err == nil:
	case errors.Is(err, nfnetlink.ErrStale), errors.As(err, &refused):
		p.refused = gen != 0 && len(p.misfits) > 0 && inPlaceOfOurs(err) && refused.Message < base

		return err
	default: // and nobody knows what came of it
		maps.Copy(b.inDoubt, p.wanted)

		return err
	}

	clear(b.inDoubt)

	if len(msgs) > 0 && gen != 0 {
		gen = nfnetlink.NextGeneration(gen)
		b.ruleset.own.Add(gen)
	}

	b.ruleset.gen, b.epoch = gen, b.ruleset.epoch
	b.exempted = b.services

	for ip, h := range p.hairpins {
		if h.rows == 0 {
			delete(b.hairpins, ip)
		} else {
			h.epoch = b.epoch
			b.hairpins[ip] = h
		}
	}

	if b.made, b.seen = true, p.observed; len(p.misfits) > 0 {
		b.seen = b.justMade(ctx, gen)
	}

	return nil
}

// justMade returns how our table looks that was made in generation gen: a kernel to come may
// show it in another way than wanted says. It is zero if somebody may have changed it since.
func (b *nftBackend) justMade(ctx context.Context, gen uint32) nftObserved {
	found, err := b.observe(ctx)
	if now, genErr := b.ruleset.conn.Generation(ctx); err != nil || genErr != nil || now != gen {
		return nftObserved{}
	}

	return found
}

// frame is what a transaction does besides to elements.
func (b *nftBackend) frame(p *nftPlan) (msgs []netlink.Message) {
	if p.recreate {
		msgs = append(msgs, b.table.Create(), b.table.Delete())
	}

	if len(p.misfits) > 0 {
		msgs = append(msgs, b.objects()...)
	}

	if !p.recreate {
		msgs = append(msgs, p.foreign...)
	}

	return msgs
}

// nftObserved is what the kernel holds of the layout, except elements. Its zero value is
// that there is no table.
//
// It changes if anybody makes, deletes or replaces a rule of our table, one of our chains
// or its policy, or the table itself, or if that comes to have more or fewer chains and
// sets. A set of ours cannot be replaced without that: as long as a rule refers to it, the
// kernel keeps it.
type nftObserved struct {
	table  nfnetlink.TableInfo
	chains []nfnetlink.ChainInfo // as nftLayout.chains has them; zero where there is none
	sets   []nfnetlink.SetInfo   // all that the table has, as are
	rules  []nfnetlink.RuleInfo
}

func (o nftObserved) exists() bool { return o.chains != nil }

func (o nftObserved) equal(other nftObserved) bool {
	return o.table == other.table && slices.Equal(o.chains, other.chains) &&
		slices.Equal(o.sets, other.sets) && slices.Equal(o.rules, other.rules)
}

// observe reads our table.
func (b *nftBackend) observe(ctx context.Context) (found nftObserved, err error) {
	ours := b.chains()
	requests := append(make([]netlink.Message, 0, 1+len(ours)), b.table.Get())

	for _, c := range ours {
		requests = append(requests, b.table.GetChain(c.Name))
	}

	answers, err := b.ruleset.conn.Get(ctx, requests...)
	if err != nil || answers[0] == nil {
		return nftObserved{}, err
	}

	if found.table, err = nfnetlink.ParseTable(*answers[0]); err != nil {
		return nftObserved{}, err
	}

	found.chains = make([]nfnetlink.ChainInfo, len(ours))

	for i, answer := range answers[1:] {
		if answer == nil {
			continue
		}

		if found.chains[i], err = nfnetlink.ParseChain(*answer); err != nil {
			return nftObserved{}, err
		}
	}

	if found.sets, err = dumpAll(ctx, b.ruleset.conn, b.table.Sets(), nfnetlink.ParseSet); err != nil {
		return nftObserved{}, err
	}

	found.rules, err = dumpAll(ctx, b.ruleset.conn, b.table.Rules(), nfnetlink.ParseRule)

	return found, err
}

// dumpAll lists what a request is for.
func dumpAll[T any](ctx context.Context, conn nftConn, request netlink.Message, parse func(netlink.Message) (T, error)) ([]T, error) {
	msgs, err := conn.Dump(ctx, request)
	if err != nil {
		return nil, err
	}

	return parseAll(msgs, parse)
}

func parseAll[T any](msgs []netlink.Message, parse func(netlink.Message) (T, error)) (list []T, err error) {
	list = make([]T, len(msgs))
	for i, m := range msgs {
		if list[i], err = parse(m); err != nil {
			return nil, err
		}
	}

	return list, nil
}

// look puts into the plan what the kernel holds. Where our table is not what it was at the
// last look, or a transaction is in doubt, the plan is for the whole table from now on.
func (b *nftBackend) look(ctx context.Context, p *nftPlan, t target) error {
	same, err := p.lookAtTable(ctx, b, t.exactly)
	if err != nil {
		return err
	}

	var have map[nftKey]nftElement

	whole := t.whole || !same || len(b.inDoubt) > 0
	if !whole {
		have, err = b.lookUp(ctx, p.order)
	} else if have, err = b.dump(ctx); err == nil {
		p.wantAll(b, t.rows, have)
	}

	if err != nil {
		return err
	}

	for key, w := range p.wanted {
		w.have = b.ours(w, have[key], t.exactly)
	}

	if whole {
		p.prune(b, have, t.exactly)
	}

	return nil
}

// lookAtTable looks at everything but elements, and reports whether that is what it was.
func (p *nftPlan) lookAtTable(ctx context.Context, b *nftBackend, exactly bool) (same bool, err error) {
	p.recreate, p.foreign, p.misfits = false, nil, nil

	if p.observed, err = b.observe(ctx); err != nil {
		return false, err
	}

	if same = b.knows(p.observed); !same {
		p.misfits, p.recreate, err = b.misfits(p.observed)
	}

	if exactly && err == nil {
		err = p.takeOutForeign(ctx, b)
	}

	p.recreate = p.recreate || p.refused && len(p.misfits) > 0

	return same, err
}

// knows reports whether what is there has been found to be as ours before.
func (b *nftBackend) knows(o nftObserved) bool { return o.exists() && o.equal(b.seen) }

// ours is what a plan for an element has to know of the one that is there.
func (b *nftBackend) ours(w *nftWanted, there nftElement, exactly bool) nftElement {
	// What several pods share is ours whoever it is called after.
	foreign := there.there() && there.isRow() && there.comment != w.have.comment && there.comment != w.want.comment

	switch {
	case !foreign || exactly && !w.want.there():
	case !w.want.there():
		return nftElement{} // none of our business: the kernel deletes what has the key, whatever its comment
	default:
		b.log.Info("Replacing a host port whose owner is unknown",
			"row", b.describe(there), "podIDHash", there.comment, "pod", w.row.owner)
	}

	return there
}

// lookUp returns the elements with the keys given.
func (b *nftBackend) lookUp(ctx context.Context, keys []nftKey) (map[nftKey]nftElement, error) {
	requests := make([]netlink.Message, len(keys))
	for i, key := range keys {
		requests[i] = b.table.GetElement(key.set, []byte(key.key))
	}

	answers, err := b.ruleset.conn.Get(ctx, requests...)
	if err != nil {
		return nil, fmt.Errorf("look up host ports: %w", err)
	}

	elements := map[nftKey]nftElement{}

	for i, key := range keys {
		if answers[i] == nil {
			continue
		}

		list, err := nfnetlink.ParseElements(*answers[i])
		if err != nil {
			return nil, fmt.Errorf("look up host ports: %w", err)
		}

		for _, e := range list {
			elements[key] = elementOf(key.set, e)
		}
	}

	return elements, nil
}

// nftPlan is what deltas come to, element by element.
type nftPlan struct {
	wanted   map[nftKey]*nftWanted
	order    []nftKey                  // in which the deltas came to them
	hairpins map[netip.Addr]nftHairpin // what becomes of those that the deltas touch
	observed nftObserved               // what the plan is made for
	misfits  []string                  // how that differs from what we would make, which we do then
	recreate bool                      // the table is deleted first
	// foreign is what takes out what others have put into the table.
	foreign []netlink.Message
	// refused is set if the kernel has not made our objects beside what was there, though
	// nobody had changed that since the look.
	refused bool
}

// nftWanted is one element as it is, as far as that is known, and as it is to be.
type nftWanted struct {
	have, want nftElement
	known      bool // the kernel has it as long as nobody else commits anything
	delta      int
	row        *row // the last that it was touched for
}

// plan works out what deltas come to if the kernel holds what it should.
func (b *nftBackend) plan(deltas []delta) *nftPlan {
	p := &nftPlan{wanted: map[nftKey]*nftWanted{}, hairpins: map[netip.Addr]nftHairpin{}, observed: b.seen}

	for i, d := range deltas {
		for _, r := range d.del {
			e := rowElement(r)
			p.touch(i, r, e.nftKey, e, nftElement{})
			p.hairpin(b, i, r, -1)
		}

		for _, r := range d.add {
			e := rowElement(r)
			p.touch(i, r, e.nftKey, nftElement{}, e)
			p.hairpin(b, i, r, 1)
		}

		for _, r := range d.keep {
			e := rowElement(r)
			p.touch(i, r, e.nftKey, e, e)
			p.hairpin(b, i, r, 0)
		}
	}

	p.exempt(b.exempted, b.services)

	return p
}

// exempt plans for the addresses that are not to be translated.
func (p *nftPlan) exempt(have, want map[netip.Addr]bool) {
	for ip := range want {
		if e := serviceElement(ip); !have[ip] {
			p.touch(shared, nil, e.nftKey, nftElement{}, e)
		}
	}

	for ip := range have {
		if e := serviceElement(ip); !want[ip] {
			p.touch(shared, nil, e.nftKey, e, nftElement{})
		}
	}
}

// provesItself reports whether the kernel would refuse the plan if it did not hold
// what it should. It says nothing of what is only kept, unless that is known.
func (p *nftPlan) provesItself() bool {
	for _, w := range p.wanted {
		if w.have == w.want && !w.known {
			return false
		}
	}

	return true
}

// touch plans for an element to be want. have is what it should be before that,
// which is what the kernel holds if the plan comes to it for the first time.
func (p *nftPlan) touch(delta int, r *row, key nftKey, have, want nftElement) *nftWanted {
	w := p.wanted[key]
	if w == nil {
		w = &nftWanted{have: have}
		p.wanted[key] = w
		p.order = append(p.order, key)
	}

	w.delta, w.row, w.want = delta, r, want

	return w
}

// hairpin plans for the element that lets r's pod reach itself, and for the one that has
// its neighbours masqueraded where they have to be: they stand as long as some row leads
// there, in the name of the pod whose row came last.
func (p *nftPlan) hairpin(b *nftBackend, delta int, r *row, rows int) {
	ip := r.pod.Addr()

	h, ok := p.hairpins[ip]
	if !ok {
		h = b.hairpins[ip]
	}

	before := h
	h.rows += rows
	h.there = h.rows > 0

	if rows > 0 || h.comment == "" {
		h.comment = r.ownerHash
	}

	if rows >= 0 {
		h.link = r.link
	}

	p.hairpins[ip] = h
	known := h.epoch == b.ruleset.epoch
	p.touch(delta, r, hairpinElement(ip, "").nftKey, before.element(ip), h.element(ip)).known = known

	if before.link != h.link && before.link != "" {
		p.touch(delta, r, neighbourElement(before.link, ip, "").nftKey, before.neighbour(ip), nftElement{})
		before.link = ""
	}

	if h.link != "" {
		p.touch(delta, r, neighbourElement(h.link, ip, "").nftKey, before.neighbour(ip), h.neighbour(ip)).known = known
	}
}

// element is the element of a pod's hairpin, or none.
func (h nftHairpin) element(ip netip.Addr) nftElement {
	if !h.there {
		return nftElement{}
	}

	return hairpinElement(ip, h.comment)
}

// neighbour is the element of a pod's neighbours, or none.
func (h nftHairpin) neighbour(ip netip.Addr) nftElement {
	if !h.there || h.link == "" {
		return nftElement{}
	}

	return neighbourElement(h.link, ip, h.comment)
}

// wantAll extends the plan to all rows that are to stand, and to what they share.
func (p *nftPlan) wantAll(b *nftBackend, rows iter.Seq[*row], have map[nftKey]nftElement) {
	for key, w := range p.wanted {
		if !key.isRow() {
			w.want = nftElement{} // unless it is asked for below
		}
	}

	clear(p.hairpins)

	for ip := range b.hairpins {
		p.hairpins[ip] = nftHairpin{}
	}

	for r := range rows {
		ip, e := r.pod.Addr(), rowElement(r)
		p.want(r, e)

		h := p.hairpins[ip]
		h.there, h.link, h.rows = true, r.link, h.rows+1

		if there := have[hairpinElement(ip, "").nftKey]; h.comment == "" || there.comment == r.ownerHash {
			h.comment = r.ownerHash
		}

		p.hairpins[ip] = h
	}

	for ip, h := range p.hairpins {
		p.want(nil, h.element(ip))
		p.want(nil, h.neighbour(ip))
	}

	for ip := range b.services {
		p.want(nil, serviceElement(ip))
	}
}

// want has an element stand, if it is one, whichever delta it belongs to.
func (p *nftPlan) want(r *row, e nftElement) {
	if w := p.wanted[e.nftKey]; w != nil {
		w.want = e
	} else if e.there() {
		p.touch(shared, r, e.nftKey, nftElement{}, e)
	}
}

// prune extends the plan to what is there and not wanted: exactly takes out all of it, and
// else what a transaction in doubt has left, and what changes the way of packets to rows,
// whoever made it.
func (p *nftPlan) prune(b *nftBackend, have map[nftKey]nftElement, exactly bool) {
	for key, e := range have {
		doubt := b.inDoubt[key]
		left := doubt != nil && e.comment == doubt.want.comment

		if p.wanted[key] == nil && (exactly || left || key.set == nftServices || key.set == nftNeighbours) {
			p.touch(shared, nil, key, e, nftElement{})
		}
	}
}

// elementsOf are those that take part in r. The comments of all but the first may be of
// another pod, where several share an address.
func elementsOf(r *row) []nftElement {
	list := []nftElement{rowElement(r), hairpinElement(r.pod.Addr(), r.ownerHash)}
	if r.link != "" {
		list = append(list, neighbourElement(r.link, r.pod.Addr(), r.ownerHash))
	}

	return list
}

// messages appends to msgs what makes the plan true, and returns what each of
// the messages appended is about.
func (p *nftPlan) messages(t nfnetlink.Table, msgs []netlink.Message) ([]netlink.Message, []*nftWanted) {
	var of []*nftWanted

	for _, key := range p.order {
		w := p.wanted[key]

		have := w.have
		if p.recreate {
			have = nftElement{}
		}

		if have == w.want {
			continue
		}

		if have.there() {
			msgs, of = append(msgs, t.DeleteElement(key.set, have.element())), append(of, w)
		}

		if w.want.there() {
			msgs, of = append(msgs, t.AddElement(key.set, w.want.element())), append(of, w)
		}
	}

	return msgs, slices.Clip(of)
}
