package nodeaddr

import (
	"maps"
	"net/netip"
	"slices"
)

// Addresses are the node's addresses at one moment. They do not change.
type Addresses struct {
	own      map[netip.Prefix]bool
	lengths  []int // of the prefixes in own
	services map[netip.Addr]bool
}

// Has reports whether ip is an address of the node.
func (a *Addresses) Has(ip netip.Addr) bool {
	for _, bits := range a.lengths {
		if p, err := ip.Prefix(bits); err == nil && a.own[p] {
			return true
		}
	}

	return false
}

// Services are the addresses that are local and belong to Services, in no order.
func (a *Addresses) Services() []netip.Addr {
	list := make([]netip.Addr, 0, len(a.services))
	for ip := range a.services {
		list = append(list, ip)
	}

	return list
}

// add notes a local route.
func (a *Addresses) add(p netip.Prefix, service bool) {
	switch {
	case service && p.IsSingleIP():
		a.services[p.Addr()] = true
	case !service:
		a.own[p] = true
		if !slices.Contains(a.lengths, p.Bits()) {
			a.lengths = append(a.lengths, p.Bits())
		}
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
	return maps.Equal(a.own, b.own) && maps.Equal(a.services, b.services)
}
