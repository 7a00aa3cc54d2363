package nftables

import (
	"iter"
	"net/netip"
	"slices"

	"github.com/mdlayher/netlink"

	"github.com/cri-o/hostport/internal/nfnetlink"
	"github.com/cri-o/hostport/internal/row"
)

// hairpin is what is known of a pod IP's element of the set of hairpins, and of the
// one of neighbours beside it where there is a link.
type hairpin struct {
	there   bool
	comment string
	link    string
	rows    int // that lead to the pod IP
	epoch   int // in which it was last known to be so
}

// plan is what deltas come to, element by element.
type plan struct {
	wanted      map[ElementKey]*wanted
	order       []ElementKey           // in which the deltas came to them
	hairpins    map[netip.Addr]hairpin // what becomes of those that the deltas touch
	observed    Observed               // what the plan is made for
	differences []string               // how that differs from what we would make, which we do then
	recreate    bool                   // the table is deleted first
	// foreign is what takes out what others have put into the table.
	foreign []netlink.Message
	// refused is set if the kernel has not made our objects beside what was there, though
	// nobody had changed that since the look.
	refused bool
}

// wanted is one element as it is, as far as that is known, and as it is to be.
type wanted struct {
	have, want Element
	known      bool // the kernel has it as long as nobody else commits anything
	delta      int
	row        *row.Row // the last that it was touched for
	replaced   Element  // a row of others in its place
}

// plan works out what deltas come to if the kernel holds what it should.
func (b *Backend) plan(deltas []row.Delta) *plan {
	rows := 0
	for _, d := range deltas {
		rows += len(d.Del) + len(d.Add) + len(d.Keep)
	}

	p := &plan{wanted: make(map[ElementKey]*wanted, rows), hairpins: map[netip.Addr]hairpin{}, observed: b.Seen}

	for i, d := range deltas {
		for _, r := range d.Del {
			e := RowElement(r)
			p.touch(i, r, e.ElementKey, e, Element{})
			p.hairpin(b, i, r, -1)
		}

		for _, r := range d.Add {
			e := RowElement(r)
			p.touch(i, r, e.ElementKey, Element{}, e)
			p.hairpin(b, i, r, 1)
		}

		for _, r := range d.Keep {
			e := RowElement(r)
			p.touch(i, r, e.ElementKey, e, e)
			p.hairpin(b, i, r, 0)
		}
	}

	p.exempt(b.exempted, b.services)

	return p
}

// exempt plans for the addresses that are not to be translated.
func (p *plan) exempt(have, want map[netip.Addr]bool) {
	for ip := range want {
		if e := ServiceElement(ip); !have[ip] {
			p.touch(row.Shared, nil, e.ElementKey, Element{}, e)
		}
	}

	for ip := range have {
		if e := ServiceElement(ip); !want[ip] {
			p.touch(row.Shared, nil, e.ElementKey, e, Element{})
		}
	}
}

// provesItself reports whether the plan may be sent without a look. It may if each element is
// added or deleted, which the kernel refuses where we are wrong about what it has, or is known
// to be there in this epoch.
func (p *plan) provesItself() bool {
	for _, w := range p.wanted {
		if w.have == w.want && !w.known {
			return false
		}
	}

	return true
}

// touch plans for an element to be want. have is what it should be before that,
// which is what the kernel holds if the plan comes to it for the first time.
func (p *plan) touch(delta int, r *row.Row, key ElementKey, have, want Element) *wanted {
	w := p.wanted[key]
	if w == nil {
		w = &wanted{have: have}
		p.wanted[key] = w
		p.order = append(p.order, key)
	}

	w.delta, w.row, w.want = delta, r, want

	return w
}

// hairpin plans for the element that lets r's pod reach itself, and for the one that has
// its neighbours masqueraded where they have to be: they stand as long as some row leads
// there, in the name of the pod whose row came last.
func (p *plan) hairpin(b *Backend, delta int, r *row.Row, rows int) {
	ip := r.Pod.Addr()

	h, ok := p.hairpins[ip]
	if !ok {
		h = b.hairpins[ip]
	}

	before := h
	h.rows += rows
	h.there = h.rows > 0

	if rows > 0 || h.comment == "" {
		h.comment = r.OwnerHash
	}

	if rows >= 0 {
		h.link = r.Link
	}

	p.hairpins[ip] = h
	known := h.epoch == b.ruleset.epoch
	p.touch(delta, r, HairpinElement(ip, "").ElementKey, before.element(ip), h.element(ip)).known = known

	if before.link != h.link && before.link != "" {
		p.touch(delta, r, neighbourElement(before.link, ip, "").ElementKey, before.neighbour(ip), Element{})
		before.link = ""
	}

	if h.link != "" {
		p.touch(delta, r, neighbourElement(h.link, ip, "").ElementKey, before.neighbour(ip), h.neighbour(ip)).known = known
	}
}

// element is the element of a pod's hairpin, or none.
func (h hairpin) element(ip netip.Addr) Element {
	if !h.there {
		return Element{}
	}

	return HairpinElement(ip, h.comment)
}

// neighbour is the element of a pod's neighbours, or none.
func (h hairpin) neighbour(ip netip.Addr) Element {
	if !h.there || h.link == "" {
		return Element{}
	}

	return neighbourElement(h.link, ip, h.comment)
}

// wantAll extends the plan to all rows that are to stand, and to what they share.
func (p *plan) wantAll(b *Backend, rows iter.Seq[*row.Row], have map[ElementKey]Element) {
	clear(p.hairpins)

	for ip := range b.hairpins {
		p.hairpins[ip] = hairpin{}
	}

	for r := range rows {
		ip, e := r.Pod.Addr(), RowElement(r)
		p.want(r, e)

		h := p.hairpins[ip]
		h.there, h.link, h.rows = true, r.Link, h.rows+1

		if there := have[HairpinElement(ip, "").ElementKey]; h.comment == "" || there.Comment == r.OwnerHash {
			h.comment = r.OwnerHash
		}

		p.hairpins[ip] = h
	}

	for ip, h := range p.hairpins {
		p.want(nil, h.element(ip))
		p.want(nil, h.neighbour(ip))
	}

	for ip := range b.services {
		p.want(nil, ServiceElement(ip))
	}
}

// want has an element stand, if it is one, whichever delta it belongs to.
func (p *plan) want(r *row.Row, e Element) {
	if w := p.wanted[e.ElementKey]; w != nil {
		w.want = e
	} else if e.There() {
		p.touch(row.Shared, r, e.ElementKey, Element{}, e)
	}
}

// prune extends the plan to elements that are there and not wanted. With exactly all of them
// go. Else those go that a transaction of ours in doubt has left, and those of the sets
// services and neighbours, because they change where packets to rows go.
func (p *plan) prune(b *Backend, have map[ElementKey]Element, exactly bool) {
	for key, e := range have {
		doubt := b.inDoubt[key]
		left := doubt != nil && e.Comment == doubt.want.Comment

		if p.wanted[key] == nil && (exactly || left || key.Set == Services || key.Set == Neighbours) {
			p.touch(row.Shared, nil, key, e, Element{})
		}
	}
}

// elementsOf are those that take part in r. The comments of all but the first may be of
// another pod, where several share an address.
func elementsOf(r *row.Row) []Element {
	list := []Element{RowElement(r), HairpinElement(r.Pod.Addr(), r.OwnerHash)}
	if r.Link != "" {
		list = append(list, neighbourElement(r.Link, r.Pod.Addr(), r.OwnerHash))
	}

	return list
}

// messages appends to msgs what makes the plan true, and returns what each of
// the messages appended is about.
func (p *plan) messages(t nfnetlink.Table, msgs []netlink.Message) ([]netlink.Message, []*wanted) {
	of := make([]*wanted, 0, len(p.order))
	msgs = slices.Grow(msgs, len(p.order))

	for _, key := range p.order {
		w := p.wanted[key]

		have := w.have
		if p.recreate {
			have = Element{}
		}

		if have == w.want {
			continue
		}

		if have.There() {
			msgs, of = append(msgs, t.DeleteElement(key.Set, have.Element())), append(of, w)
		}

		if w.want.There() {
			msgs, of = append(msgs, t.AddElement(key.Set, w.want.Element())), append(of, w)
		}
	}

	return msgs, of
}
