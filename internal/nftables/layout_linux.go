package nftables

import (
	"encoding/binary"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/cri-o/hostport/internal/nfnetlink"
	"github.com/cri-o/hostport/internal/nodeaddr"
	"github.com/cri-o/hostport/internal/row"
)

// The objects, by the names that CRI-O gives them.
const (
	TableName    = "crio-hostports"
	HostPorts    = "hostports" // a map, and the chain that looks there
	HostIPPorts  = "hostipports"
	Hairpins     = "hairpins"
	Prerouting   = "prerouting"
	Output       = "output"
	Masquerading = "masquerading"
)

// Chains and sets of our own.
const (
	NATPrerouting = "nat-prerouting"
	NATOutput     = "nat-output"
	GuardChain    = "guard"
	Services      = "services"
	Neighbours    = "neighbours"
)

// Priorities of hooks (linux/netfilter_ipv4.h). What translates destinations
// comes one later than kube-proxy, which is at PriorityDNAT: of two hooks at one
// priority the kernel takes the newest first, and services are to come first
// whoever was started first (CVE-2019-9946).
const (
	priorityRaw       = -300
	PriorityDNAT      = -100
	priorityAfterDNAT = PriorityDNAT + 1
	PrioritySNAT      = 100
)

// keptForCRIO begins the comment of the chains that have no rules. CRI-O puts its
// own there, at PriorityDNAT: where a chain of the name has another priority, the
// kernel refuses its transactions.
const keptForCRIO = "kept for CRI-O; hostport's rules are in "

// loopbackIndex is the interface index of lo, in every network namespace
// (LOOPBACK_IFINDEX, net/flow.h).
const loopbackIndex = 1

// Bits of a connection's status (linux/netfilter/nf_conntrack_common.h).
const (
	statusSNAT = 1 << 4
	statusDNAT = 1 << 5
)

// Registers 1 to 4 have 16 bytes each; those from 8 are the same memory in
// pieces of 4. A concatenation lies in pieces one after the other, from reg1.
// Where a piece begins a register of 16 bytes, nft calls it by that.
const (
	Reg1 = 1
	Reg2 = 2
)

// Piece is a register of 4 bytes.
func Piece(n uint32) uint32 { return 8 + n }

// Layout is one family's part of the ruleset: what there is of it whatever
// rows there are, and how rows are written into maps.
type Layout struct {
	Family    row.Family
	localhost bool // whether loopback sources are translated
	guard     bool // whether loopback addresses have to be guarded
	Table     nfnetlink.Table
	Addr      nfnetlink.DataType
}

// NewLayout is the layout of a family, without localhost and guard.
func NewLayout(f row.Family) Layout {
	l := Layout{
		Family: f,
		Table:  nfnetlink.Table{Family: unix.NFPROTO_IPV4, Name: TableName, Comment: "HostPort rules created by CRI-O"},
		Addr:   nfnetlink.IPv4Addr,
	}
	if f == row.IPv6 {
		l.Table.Family, l.Addr = unix.NFPROTO_IPV6, nfnetlink.IPv6Addr
	}

	return l
}

// Objects makes everything but the elements. What is there stays, except for the
// rules, which are recreated: CRI-O's rule for hairpin never matches.
func (l Layout) Objects() []netlink.Message {
	msgs := []netlink.Message{l.Table.Create()}

	for _, s := range l.Sets() {
		msgs = append(msgs, l.Table.CreateSet(s))
	}

	for _, c := range l.Chains() {
		msgs = append(msgs, l.Table.CreateChain(c), l.Table.FlushChain(c.Name))
	}

	return append(msgs, l.Rules()...)
}

// Sets are all maps and sets of the table.
func (l Layout) Sets() []nfnetlink.Set {
	pod := []nfnetlink.DataType{l.Addr, nfnetlink.InetService}
	port := []nfnetlink.DataType{nfnetlink.InetProto, nfnetlink.InetService}

	return []nfnetlink.Set{
		{
			Name: HostPorts, Key: port, Data: pod,
			Comment: "hostports on all local IPs (protocol . hostPort -> podIP . podPort)",
		},
		{
			Name: HostIPPorts, Key: append([]nfnetlink.DataType{l.Addr}, port...), Data: pod,
			Comment: "hostports on specific IPs (hostIP . protocol . hostPort -> podIP . podPort)",
		},
		{
			Name: Hairpins, Key: []nfnetlink.DataType{l.Addr, l.Addr},
			Comment: "hostport hairpin connections",
		},
		{
			Name: Services, Key: []nfnetlink.DataType{l.Addr},
			Comment: "addresses of Services that only " + nodeaddr.ServiceDevice + " has: not the node's",
		},
		{
			Name: Neighbours, Key: []nfnetlink.DataType{nfnetlink.IfName, l.Addr},
			Comment: "interfaces on which pods answer their neighbours past the node",
		},
	}
}

// Chains are all chains of the table.
func (l Layout) Chains() []nfnetlink.Chain {
	chains := []nfnetlink.Chain{
		{Name: HostPorts},
		{Name: Prerouting, Type: "nat", Hook: unix.NF_INET_PRE_ROUTING, Priority: PriorityDNAT, Comment: keptForCRIO + NATPrerouting},
		{Name: Output, Type: "nat", Hook: unix.NF_INET_LOCAL_OUT, Priority: PriorityDNAT, Comment: keptForCRIO + NATOutput},
		{Name: NATPrerouting, Type: "nat", Hook: unix.NF_INET_PRE_ROUTING, Priority: priorityAfterDNAT},
		{Name: NATOutput, Type: "nat", Hook: unix.NF_INET_LOCAL_OUT, Priority: priorityAfterDNAT},
		{Name: Masquerading, Type: "nat", Hook: unix.NF_INET_POST_ROUTING, Priority: PrioritySNAT},
	}
	if l.guard {
		chains = append(chains, nfnetlink.Chain{
			Name: GuardChain, Type: "filter", Hook: unix.NF_INET_PRE_ROUTING, Priority: priorityRaw,
		})
	}

	return chains
}

// Header is where things are in a packet's IP header, and the register that
// comes behind one address from reg1.
type Header struct{ saddr, daddr, size, Behind uint32 }

// Header is the family's.
func (l Layout) Header() Header {
	if l.Family == row.IPv6 {
		return Header{saddr: 8, daddr: 24, size: 16, Behind: 2} //nolint:mnd // of struct ipv6hdr
	}

	return Header{saddr: 12, daddr: 16, size: 4, Behind: Piece(1)} //nolint:mnd // of struct iphdr
}

// Rules are, in nft's words, where localhost is set,
//
//	guard:            iif != lo ip daddr 127.0.0.0/8 drop
//	                  iif != lo ip saddr 127.0.0.0/8 drop
//	nat-prerouting:   ip daddr != 127.0.0.0/8 fib daddr type local ip daddr != @services goto hostports
//	nat-output:       fib daddr type local ip daddr != @services goto hostports
//	hostports:        dnat ip to ip daddr . meta l4proto . th dport map @hostipports
//	                  dnat ip to meta l4proto . th dport map @hostports
//	masquerading:     ct status & (dnat|snat) == dnat ip saddr . ip daddr @hairpins masquerade
//	                  ct status & (dnat|snat) == dnat iifname . ip daddr @neighbours masquerade
//	                  ct status & (dnat|snat) == dnat ip saddr 127.0.0.0/8 ip daddr . ip daddr @hairpins masquerade
//
// and where it is not, without the last and with
//
//	nat-output:       ip saddr != 127.0.0.0/8 fib daddr type local ip daddr != @services goto hostports
//
// For IPv6 both have "ip6 daddr != fe80::/10 ip6 saddr != fe80::/10" besides: what
// has a link-local address the kernel does not forward.
//
// Only packets for an address of the node may be translated (CVE-2025-67499).
// The row for one address comes before the one for any.
func (l Layout) Rules() []netlink.Message {
	const (
		dport    = 2 // offset in the header of TCP, UDP and SCTP
		portSize = 2
	)

	t, h := l.Table, l.Header()

	incoming, outgoing := l.forNode()

	var (
		translated = []nfnetlink.Expr{
			nfnetlink.LoadConntrackStatus(Reg1), nfnetlink.MaskNumber(Reg1, statusDNAT|statusSNAT), nfnetlink.EqualTo(Reg1, statusDNAT),
		}
		// masquerade is for packets to a pod with the address at an offset as
		// the source.
		masquerade = func(saddr uint32) []nfnetlink.Expr {
			return []nfnetlink.Expr{
				nfnetlink.LoadNetworkHeader(saddr, h.size, Reg1), nfnetlink.LoadNetworkHeader(h.daddr, h.size, h.Behind),
				nfnetlink.InSet(Hairpins, Reg1), nfnetlink.Masquerade(),
			}
		}
	)

	msgs := []netlink.Message{
		t.AppendRule(HostPorts,
			nfnetlink.LoadNetworkHeader(h.daddr, h.size, Reg1), nfnetlink.LoadProtocol(h.Behind),
			nfnetlink.LoadTransportHeader(dport, portSize, Piece(h.size/4+1)),
			nfnetlink.LookUp(HostIPPorts, Reg1, Reg1), nfnetlink.DNAT(t.Family, Reg1, h.Behind)),
		t.AppendRule(HostPorts,
			nfnetlink.LoadProtocol(Reg1), nfnetlink.LoadTransportHeader(dport, portSize, Piece(1)),
			nfnetlink.LookUp(HostPorts, Reg1, Reg1), nfnetlink.DNAT(t.Family, Reg1, h.Behind)),
		t.AppendRule(NATPrerouting, incoming...),
		t.AppendRule(NATOutput, outgoing...),
		t.AppendRule(Masquerading, slices.Concat(translated, masquerade(h.saddr))...),
		t.AppendRule(Masquerading, slices.Concat(translated, []nfnetlink.Expr{
			nfnetlink.LoadInputName(Reg1), nfnetlink.LoadNetworkHeader(h.daddr, h.size, Reg2),
			nfnetlink.InSet(Neighbours, Reg1), nfnetlink.Masquerade(),
		})...),
	}

	if l.localhost {
		msgs = append(msgs, t.AppendRule(Masquerading,
			slices.Concat(translated, l.within(l.Family.Loopback(), h.saddr, nfnetlink.Equal), masquerade(h.daddr))...))
	}

	if l.guard {
		fromOutside := []nfnetlink.Expr{nfnetlink.LoadInputInterface(Reg1), nfnetlink.NotEqualTo(Reg1, loopbackIndex)}
		for _, offset := range []uint32{h.daddr, h.saddr} {
			loopback := slices.Concat(fromOutside, l.within(l.Family.Loopback(), offset, nfnetlink.Equal))
			msgs = append(msgs, t.AppendRule(GuardChain, append(loopback, nfnetlink.Drop())...))
		}
	}

	return msgs
}

// forNode lead to the rows what comes from outside, or from the node itself, for an
// address of the node.
func (l Layout) forNode() (incoming, outgoing []nfnetlink.Expr) {
	h := l.Header()
	incoming = l.within(l.Family.Loopback(), h.daddr, nfnetlink.NotEqual)

	if !l.localhost {
		outgoing = l.within(l.Family.Loopback(), h.saddr, nfnetlink.NotEqual)
	}

	var both []nfnetlink.Expr

	if network := l.Family.LinkLocal(); network.IsValid() {
		both = append(l.within(network, h.daddr, nfnetlink.NotEqual), l.within(network, h.saddr, nfnetlink.NotEqual)...)
	}

	both = append(both,
		nfnetlink.LoadDestinationType(Reg1), nfnetlink.EqualTo(Reg1, unix.RTN_LOCAL),
		nfnetlink.LoadNetworkHeader(h.daddr, h.size, Reg1), nfnetlink.NotInSet(Services, Reg1),
		nfnetlink.Goto(HostPorts))

	return append(incoming, both...), append(outgoing, both...)
}

// within compares the address at an offset in the IP header with a network, as nft
// does: of one that ends between two bytes with a mask for the whole address, and
// else without.
func (l Layout) within(network netip.Prefix, offset uint32, compare func(sreg uint32, data []byte) nfnetlink.Expr) []nfnetlink.Expr {
	var mask []nfnetlink.Expr

	addr, bits := network.Addr().AsSlice(), network.Bits()
	if bits%8 == 0 {
		addr = addr[:bits/8]
	} else {
		mask = append(mask, nfnetlink.Mask(Reg1, net.CIDRMask(bits, 8*len(addr))))
	}

	load := nfnetlink.LoadNetworkHeader(offset, uint32(len(addr)), Reg1) //nolint:gosec // 16 at the most

	return slices.Concat([]nfnetlink.Expr{load}, mask, []nfnetlink.Expr{compare(Reg1, addr)})
}

// ElementKey names an element: no two of one set have the same key.
type ElementKey struct{ Set, Key string }

// isRow reports whether an element of that key stands for a row.
func (k ElementKey) isRow() bool { return k.Set == HostPorts || k.Set == HostIPPorts }

// Element is an element. Its zero value is none.
type Element struct {
	ElementKey

	Data, Comment string
}

// There reports whether it is an element.
func (e Element) There() bool { return e.Set != "" }

// Element is what messages have of it.
func (e Element) Element() nfnetlink.Element {
	return nfnetlink.Element{Key: []byte(e.Key), Data: []byte(e.Data), Comment: e.Comment}
}

// ElementOf is an element of a set as messages have it.
func ElementOf(set string, e nfnetlink.Element) Element {
	return Element{ElementKey{set, string(e.Key)}, string(e.Data), e.Comment}
}

// RowElement is what stands for a row.
func RowElement(r *row.Row) Element {
	e := Element{ElementKey: ElementKey{Set: HostPorts}, Comment: r.OwnerHash}

	var key []byte
	if r.IP.IsValid() {
		e.Set, key = HostIPPorts, r.IP.AsSlice()
	}

	key = append(key, r.Proto.Number(), 0, 0, 0)
	e.Key = string(AppendPort(key, r.Port))
	e.Data = string(AppendPort(r.Pod.Addr().AsSlice(), r.Pod.Port()))

	return e
}

// HairpinElement is what lets a pod reach itself.
func HairpinElement(pod netip.Addr, comment string) Element {
	ip := string(pod.AsSlice())

	return Element{ElementKey: ElementKey{Hairpins, ip + ip}, Comment: comment}
}

// neighbourElement is what has a pod's neighbours on an interface masqueraded.
func neighbourElement(link string, pod netip.Addr, comment string) Element {
	name := make([]byte, nfnetlink.IfName.Size())
	copy(name, link)

	return Element{ElementKey: ElementKey{Neighbours, string(name) + string(pod.AsSlice())}, Comment: comment}
}

// neighbourOf is the interface and the pod of an element of the set of neighbours.
func (l Layout) neighbourOf(e Element) (link string, pod netip.Addr, ok bool) {
	size := int(nfnetlink.IfName.Size())
	if e.Set != Neighbours || len(e.Key) < size {
		return "", netip.Addr{}, false
	}

	link = strings.TrimRight(e.Key[:size], "\x00")
	pod, ok = netip.AddrFromSlice([]byte(e.Key[size:]))

	return link, pod, ok && neighbourElement(link, pod, e.Comment) == e && row.FamilyOf(pod) == l.Family
}

// ServiceElement keeps an address from being translated.
func ServiceElement(ip netip.Addr) Element {
	return Element{ElementKey: ElementKey{Services, string(ip.AsSlice())}}
}

// HairpinOf is the pod of an element of the set of hairpins.
func (l Layout) HairpinOf(e Element) (netip.Addr, bool) {
	ip, ok := netip.AddrFromSlice([]byte(e.Key[:len(e.Key)/2]))

	return ip, ok && HairpinElement(ip, e.Comment) == e && row.FamilyOf(ip) == l.Family
}

// Row is what an element of the maps stands for. It is not ok for one that no
// row of this package would make.
func (l Layout) Row(e Element) (r *row.Row, ok bool) {
	size := int(l.Addr.Size())
	key, data := []byte(e.Key), []byte(e.Data)
	r = &row.Row{OwnerHash: e.Comment}

	if e.Set == HostIPPorts && len(key) > size {
		r.IP, _ = netip.AddrFromSlice(key[:size])
		key = key[size:]
	}

	if len(key) != 8 || len(data) != size+4 {
		return nil, false
	}

	pod, _ := netip.AddrFromSlice(data[:size])
	r.Pod = netip.AddrPortFrom(pod, binary.BigEndian.Uint16(data[size:]))
	r.Port = binary.BigEndian.Uint16(key[4:])

	r.Proto = row.ProtocolOf(key[0])

	return r, r.Proto != "" && r.Port != 0 && r.Pod.Port() != 0 && !r.IP.IsUnspecified() && RowElement(r) == e
}

// AppendPort appends a port as keys and data have it: padded to 4 bytes.
func AppendPort(b []byte, port uint16) []byte {
	return append(binary.BigEndian.AppendUint16(b, port), 0, 0)
}
