package nftables

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/cri-o/hostport/internal/nfnetlink"
	"github.com/cri-o/hostport/internal/outcome"
	"github.com/cri-o/hostport/internal/row"
)

// Conn is what the backend needs of a nfnetlink.Conn.
type Conn interface {
	Generation(ctx context.Context) (uint32, error)
	Check(ctx context.Context, msgs []netlink.Message) error
	Commit(ctx context.Context, gen uint32, msgs []netlink.Message) error
	Get(ctx context.Context, requests ...netlink.Message) ([]*netlink.Message, error)
	Dump(ctx context.Context, request netlink.Message) ([]netlink.Message, error)
	Close() error
}

// Ruleset is what both families' backends share: the socket, and how far the
// kernel's ruleset is known.
type Ruleset struct {
	mu   sync.Mutex
	dial func() (Conn, error)
	conn Conn // nil until it is needed
	// gen is the ruleset's generation after our last look or transaction; 0: not
	// known.
	gen uint32
	own nfnetlink.Generations
	// epoch counts how often somebody else turned out to have changed the
	// ruleset. What a backend found out in an epoch is true to its end: our own
	// transactions change nothing for the other family.
	epoch int
}

// NewRuleset returns a ruleset that is reached by what dial returns.
func NewRuleset(dial func() (Conn, error)) *Ruleset { return &Ruleset{dial: dial} }

// Open opens the socket, in the namespace of the calling thread, unless it is open.
func (n *Ruleset) Open() (err error) {
	n.mu.Lock()
	defer n.mu.Unlock()

	if n.conn == nil {
		n.conn, err = n.dial()
	}

	return err
}

// Close closes the socket.
func (n *Ruleset) Close() error {
	n.mu.Lock()
	defer n.mu.Unlock()

	if n.conn == nil {
		return nil
	}

	return n.conn.Close()
}

// Generation is the ruleset's. The socket is open.
func (n *Ruleset) Generation(ctx context.Context) (uint32, error) { return n.conn.Generation(ctx) }

// Ours are the generations that we have made.
func (n *Ruleset) Ours() *nfnetlink.Generations { return &n.own }

// observe notes the generation that the ruleset turned out to have.
func (n *Ruleset) observe(gen uint32) {
	if gen != n.gen {
		n.gen = gen
		n.epoch++
	}
}

// now returns the generation that the ruleset has, or 0 after so many tries that the
// transaction is to be made in any case.
func (n *Ruleset) now(ctx context.Context, try int) (uint32, error) {
	gen, err := n.conn.Generation(ctx)
	if err != nil {
		return 0, err
	}

	n.observe(gen)

	if try >= outcome.MaxOvertaken {
		gen = 0
	}

	return gen, nil
}

// Backend keeps the rows of one family in maps of nf_tables.
//
// In the steady state a change is one transaction with the delta alone, on
// condition that nobody else has committed anything since the last one. If
// somebody has, the backend looks whether its rules are still there and what
// there is under the keys of the delta, and commits on condition that this is
// so. If its rules are not what they were, it recreates them, with all
// elements that are missing, in the same transaction.
type Backend struct {
	Layout

	ruleset *Ruleset
	epoch   int // in which what follows was true
	// made is set once our table stands. Seen is how it looked when it was last found or
	// made to be as ours, and zero if nobody knows.
	made     bool
	Seen     Observed
	hairpins map[netip.Addr]hairpin
	// services are the addresses that are not to be translated, exempted those that the
	// kernel has for that.
	services, exempted map[netip.Addr]bool
	// inDoubt are elements of transactions of which nobody knows whether they
	// took effect, because the answer did not come.
	inDoubt map[ElementKey]*wanted
}

// New returns a backend that translates what comes from loopback addresses, and
// guards them, if told so.
func New(ruleset *Ruleset, f row.Family, localhost, guard bool) *Backend {
	b := &Backend{
		Layout: NewLayout(f), ruleset: ruleset,
		hairpins: map[netip.Addr]hairpin{}, inDoubt: map[ElementKey]*wanted{},
		services: map[netip.Addr]bool{}, exempted: map[netip.Addr]bool{},
	}
	b.localhost, b.guard = localhost, guard

	return b
}

// Usable fails where the kernel cannot carry the layout, and says why.
func (b *Backend) Usable(ctx context.Context) error {
	if there, err := b.Observe(ctx); err == nil {
		if differences, _, err := b.Differences(there); err == nil && len(differences) == 0 {
			return nil // it does
		}
	}

	err := b.ruleset.conn.Check(ctx, b.Objects())
	if inPlaceOfOurs(err) { // which need not stay
		err = b.ruleset.conn.Check(ctx, append([]netlink.Message{b.Table.Create(), b.Table.Delete()}, b.Objects()...))
	}

	// Without nf_tables the transaction as a whole is.
	if refused := (*nfnetlink.BatchError)(nil); errors.As(err, &refused) && refused.Message < 0 && errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("%w: %w", outcome.ErrUnavailable, err)
	}

	if err != nil {
		return fmt.Errorf("make table %s: %w", TableName, err)
	}

	return nil
}

// Kind is the same for all rows.
func (b *Backend) Kind(*row.Row) string { return "nftables" }

// Variant is none.
func (b *Backend) Variant() string { return "" }

// Name is empty: an element is named by its row's endpoint.
func (b *Backend) Name(*row.Row) string { return "" }

// OwnedBy reports whether the comment of a row stands for id.
func (b *Backend) OwnedBy(id string, r *row.Row) bool { return row.ShortHash(id) == r.OwnerHash }

// List leaves it to reconcile to find out whether all is as we would make it.
func (b *Backend) List(ctx context.Context) (rows []*row.Row, intact bool, err error) {
	b.ruleset.mu.Lock()
	defer b.ruleset.mu.Unlock()

	var elements map[ElementKey]Element

	gen, err := b.unmoved(ctx, func() (err error) {
		elements, err = b.Dump(ctx)

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
func (b *Backend) unmoved(ctx context.Context, list func() error) (uint32, error) {
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

// AllChains lists the chains of the family, whosever they are.
func (b *Backend) AllChains(ctx context.Context) ([]nfnetlink.ChainInfo, error) {
	var chains []nfnetlink.ChainInfo

	_, err := b.unmoved(ctx, func() (err error) {
		chains, err = dumpAll(ctx, b.ruleset.conn, b.Table.Chains(), nfnetlink.ParseChain)

		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list chains: %w", err)
	}

	return chains, nil
}

// IsThere reports whether the family has our table, with chains.
func (b *Backend) IsThere(chains []nfnetlink.ChainInfo) bool {
	return slices.ContainsFunc(chains, func(c nfnetlink.ChainInfo) bool { return c.Table == b.Table.Name })
}

// Dump returns all elements of the family.
func (b *Backend) Dump(ctx context.Context) (map[ElementKey]Element, error) {
	return b.dumpSets(ctx, HostPorts, HostIPPorts, Hairpins, Services, Neighbours)
}

func (b *Backend) dumpSets(ctx context.Context, sets ...string) (map[ElementKey]Element, error) {
	elements := map[ElementKey]Element{}

	for _, set := range sets {
		lists, err := dumpAll(ctx, b.ruleset.conn, b.Table.Elements(set), nfnetlink.ParseElements)
		if err != nil {
			return nil, fmt.Errorf("list %s: %w", set, err)
		}

		for _, list := range lists {
			for _, e := range list {
				e := ElementOf(set, e)
				elements[e.ElementKey] = e
			}
		}
	}

	return elements, nil
}

// adopt takes elements for what the kernel holds, and returns the rows.
func (b *Backend) adopt(elements map[ElementKey]Element) []*row.Row {
	var rows []*row.Row

	for _, e := range elements {
		switch e.Set {
		case Hairpins:
			if ip, ok := b.HairpinOf(e); ok {
				h := b.hairpins[ip]
				h.there, h.comment = true, e.Comment
				b.hairpins[ip] = h
			}
		case Neighbours:
			if link, ip, ok := b.neighbourOf(e); ok {
				h := b.hairpins[ip]
				h.link = link
				b.hairpins[ip] = h
			}
		case Services:
			if ip, ok := netip.AddrFromSlice([]byte(e.Key)); ok {
				b.exempted[ip] = true
			}
		default:
			if r, ok := b.Row(e); ok {
				h := b.hairpins[r.Pod.Addr()]
				h.rows++
				b.hairpins[r.Pod.Addr()] = h

				rows = append(rows, r)
			}
		}
	}

	for _, r := range rows {
		r.Link = b.hairpins[r.Pod.Addr()].link
	}

	return rows
}

// Exempt notes addresses of Services; due is set if the kernel has others.
func (b *Backend) Exempt(services []netip.Addr) (due bool) {
	b.services = map[netip.Addr]bool{}
	for _, ip := range services {
		b.services[ip] = true
	}

	return !maps.Equal(b.services, b.exempted)
}

// Reconcile commits on the generation that it knows, if that proves what it relies on, and
// else on what it has looked at.
func (b *Backend) Reconcile(ctx context.Context, t row.Target) (repairs []row.Repair, err error) {
	b.ruleset.mu.Lock()
	defer b.ruleset.mu.Unlock()

	if !t.Base {
		return b.deleteTable(ctx)
	}

	p := b.plan(t.Deltas)

	if !t.Whole && b.made && b.epoch == b.ruleset.epoch && b.ruleset.gen != 0 && p.provesItself() {
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

		if err = b.commit(ctx, gen, p); !overtaken(err) || try > outcome.MaxOvertaken {
			return repairs, err
		}
	}
}

// overtaken reports whether a transaction may have failed because the kernel does
// not hold what it was made for: somebody else has committed, or has left an
// element that we did not remove because it was not ours, or something in place of
// ours that the next try is to delete.
//
// After outcome.MaxOvertaken tries the transaction is sent without the condition. The
// kernel still refuses to add an element that exists, and to delete one that is missing.
// It does not notice if somebody has replaced an element since the look: that one is
// deleted. The next operation finds what else has happened in that instant.
func overtaken(err error) bool {
	refused := (*nfnetlink.BatchError)(nil)

	return errors.Is(err, nfnetlink.ErrStale) ||
		errors.As(err, &refused) && (inPlaceOfOurs(err) || errors.Is(err, unix.ENOENT))
}

// inPlaceOfOurs reports whether the kernel has refused to make something because there
// is something else of that name.
func inPlaceOfOurs(err error) bool {
	return errors.Is(err, unix.EEXIST) || errors.Is(err, unix.EOPNOTSUPP)
}

// commit makes the plan true, if the ruleset is still of generation gen, or in
// any case if that is 0.
func (b *Backend) commit(ctx context.Context, gen uint32, p *plan) error {
	msgs := b.frame(p)
	base := len(msgs)
	msgs, of := p.messages(b.Table, msgs)

	err := b.ruleset.conn.Commit(ctx, gen, msgs)

	refused := (*nfnetlink.BatchError)(nil)
	if errors.As(err, &refused) && refused.Message >= base {
		if w := of[refused.Message-base]; w.delta != row.Shared {
			return &outcome.RefusedError{Delta: w.delta, Err: &outcome.RowError{Row: w.row, Err: err}}
		}
	}

	switch {
	case err == nil:
	case errors.Is(err, nfnetlink.ErrStale), errors.As(err, &refused):
		p.refused = gen != 0 && len(p.differences) > 0 && inPlaceOfOurs(err) && refused.Message < base

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

	if b.made, b.Seen = true, p.observed; len(p.differences) > 0 {
		b.Seen = b.justMade(ctx, gen)
	}

	return nil
}

// justMade returns how our table looks that was made in generation gen: a kernel to come may
// show it in another way than wanted says. It is zero if somebody may have changed it since.
func (b *Backend) justMade(ctx context.Context, gen uint32) Observed {
	found, err := b.Observe(ctx)
	if now, genErr := b.ruleset.conn.Generation(ctx); err != nil || genErr != nil || now != gen {
		return Observed{}
	}

	return found
}

// frame is what a transaction does besides to elements.
func (b *Backend) frame(p *plan) (msgs []netlink.Message) {
	if p.recreate {
		msgs = append(msgs, b.Table.Create(), b.Table.Delete())
	}

	if len(p.differences) > 0 {
		msgs = append(msgs, b.Objects()...)
	}

	if !p.recreate {
		msgs = append(msgs, p.foreign...)
	}

	return msgs
}

// look puts into the plan what the kernel holds. Where our table is not what it was at the
// last look, or a transaction is in doubt, the plan is for the whole table from now on.
func (b *Backend) look(ctx context.Context, p *plan, t row.Target) error {
	same, err := p.lookAtTable(ctx, b, t.Exactly)
	if err != nil {
		return err
	}

	var have map[ElementKey]Element

	whole := t.Whole || !same || len(b.inDoubt) > 0
	if !whole {
		have, err = b.lookUp(ctx, p.order)
	} else if have, err = b.Dump(ctx); err == nil {
		p.wantAll(b, t.Rows, have)
	}

	if err != nil {
		return err
	}

	for key, w := range p.wanted {
		w.have = b.ours(w, have[key], t.Exactly)
	}

	if whole {
		p.prune(b, have, t.Exactly)
	}

	return nil
}

// lookAtTable looks at everything but elements, and reports whether that is what it was.
func (p *plan) lookAtTable(ctx context.Context, b *Backend, exactly bool) (same bool, err error) {
	p.recreate, p.foreign, p.differences = false, nil, nil

	if p.observed, err = b.Observe(ctx); err != nil {
		return false, err
	}

	if same = b.knows(p.observed); !same {
		p.differences, p.recreate, err = b.Differences(p.observed)
	}

	if exactly && err == nil {
		err = p.takeOutForeign(ctx, b)
	}

	p.recreate = p.recreate || p.refused && len(p.differences) > 0

	return same, err
}

// knows reports whether what is there has been found to be as ours before.
func (b *Backend) knows(o Observed) bool { return o.exists() && o.equal(b.Seen) }

// ours is what a plan for an element has to know of the one that is there.
func (b *Backend) ours(w *wanted, there Element, exactly bool) Element {
	w.replaced = Element{}

	// What several pods share is ours whoever it is called after.
	foreign := there.There() && there.isRow() && there.Comment != w.have.Comment && there.Comment != w.want.Comment

	switch {
	case !foreign || exactly && !w.want.There():
	case !w.want.There():
		return Element{} // none of our business: the kernel deletes what has the key, whatever its comment
	default:
		w.replaced = there
	}

	return there
}

// lookUp returns the elements with the keys given.
func (b *Backend) lookUp(ctx context.Context, keys []ElementKey) (map[ElementKey]Element, error) {
	requests := make([]netlink.Message, len(keys))
	for i, key := range keys {
		requests[i] = b.Table.GetElement(key.Set, []byte(key.Key))
	}

	answers, err := b.ruleset.conn.Get(ctx, requests...)
	if err != nil {
		return nil, fmt.Errorf("look up host ports: %w", err)
	}

	elements := map[ElementKey]Element{}

	for i, key := range keys {
		if answers[i] == nil {
			continue
		}

		list, err := nfnetlink.ParseElements(*answers[i])
		if err != nil {
			return nil, fmt.Errorf("look up host ports: %w", err)
		}

		for _, e := range list {
			elements[key] = ElementOf(key.Set, e)
		}
	}

	return elements, nil
}
