package nodeaddr

import (
	"maps"
	"net/netip"
	"slices"
)

// Addresses are the node's addresses at one moment. They do not change.
type Addresses struct {
	own      prefixes
	local    prefixes // own, those of Services, and what has come or gone since the last look
	services map[netip.Addr]bool
}

func newAddresses() *Addresses {
	return &Addresses{own: newPrefixes(), local: newPrefixes(), services: map[netip.Addr]bool{}}
}

// Has reports whether ip is an address of the node.
func (a *Addresses) Has(ip netip.Addr) bool { return a.own.has(ip) }

// HadLocal reports whether ip was local when these addresses were, or for a while since
// the look before: as an address of the node, or of a Service.
func (a *Addresses) HadLocal(ip netip.Addr) bool { return a.local.has(ip) }

// Until returns these addresses, for which HadLocal reports what there has been until
// later ones.
func (a *Addresses) Until(later *Addresses) *Addresses {
	until := *a
	until.local = newPrefixes()

	for _, some := range []prefixes{a.local, later.local} {
		for p := range some.in {
			until.local.add(p)
		}
	}

	return &until
}

// Services are the addresses that are local and belong to Services, in no order.
func (a *Addresses) Services() []netip.Addr {
	list := make([]netip.Addr, 0, len(a.services))
	for ip := range a.services {
		list = append(list, ip)
	}

	return list
}

// HasService reports whether ip is one of them.
func (a *Addresses) HasService(ip netip.Addr) bool { return a.services[ip] }

// add notes a local route.
func (a *Addresses) add(p netip.Prefix, service bool) {
	a.local.add(p)

	switch {
	case service && p.IsSingleIP():
		a.services[p.Addr()] = true
	case !service:
		a.own.add(p)
	}
}

// settle takes out of the Services' addresses those that the node has besides.
func (a *Addresses) settle() {
	for ip := range a.services {
		if a.Has(ip) {
			delete(a.services, ip)
		}
	}
}

func (a *Addresses) equal(b *Addresses) bool {
	return maps.Equal(a.own.in, b.own.in) && maps.Equal(a.services, b.services)
}

// prefixes are networks and single addresses.
type prefixes struct {
	in      map[netip.Prefix]bool
	lengths []int // that these have
}

func newPrefixes() prefixes { return prefixes{in: map[netip.Prefix]bool{}} }

func (l *prefixes) add(p netip.Prefix) {
	l.in[p] = true
	if !slices.Contains(l.lengths, p.Bits()) {
		l.lengths = append(l.lengths, p.Bits())
	}
}

// has reports whether ip is in one of them.
func (l *prefixes) has(ip netip.Addr) bool {
	for _, bits := range l.lengths {
		if p, err := ip.Prefix(bits); err == nil && l.in[p] {
			return true
		}
	}

	return false
}
