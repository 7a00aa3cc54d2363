package hostport

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
)

// The objects, by the names that CRI-O gives them.
const (
	nftTable       = "crio-hostports"
	nftHostPorts   = "hostports" // a map, and the chain that looks there
	nftHostIPPorts = "hostipports"
	nftHairpins    = "hairpins"
	nftPrerouting  = "prerouting"
	nftOutput      = "output"
	nftMasquerade  = "masquerading"
)

// Chains and sets of our own.
const (
	nftNATPrerouting = "nat-prerouting"
	nftNATOutput     = "nat-output"
	nftGuard         = "guard"
	nftServices      = "services"
	nftNeighbours    = "neighbours"
)

// Priorities of hooks (linux/netfilter_ipv4.h). What translates destinations
// comes one later than kube-proxy, which is at priorityDNAT: of two hooks at one
// priority the kernel takes the newest first, and services are to come first
// whoever was started first (CVE-2019-9946).
const (
	priorityRaw       = -300
	priorityDNAT      = -100
	priorityAfterDNAT = priorityDNAT + 1
	prioritySNAT      = 100
)

// keptForCRIO begins the comment of the chains that have no rules. CRI-O puts its
// own there, at priorityDNAT: where a chain of the name has another priority, the
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
	reg1 = 1
	reg2 = 2
)

func piece(n uint32) uint32 { return 8 + n }

// nftLayout is one family's part of the ruleset: what there is of it whatever
// rows there are, and how rows are written into maps.
type nftLayout struct {
	family    ipFamily
	localhost bool // whether loopback sources are translated
	guard     bool // whether loopback addresses have to be guarded
	table     nfnetlink.Table
	addr      nfnetlink.DataType
}

// newNFTLayout is the layout of a family, without localhost and guard.
func newNFTLayout(f ipFamily) nftLayout {
	l := nftLayout{
		family: f,
		table:  nfnetlink.Table{Family: unix.NFPROTO_IPV4, Name: nftTable, Comment: "HostPort rules created by CRI-O"},
		addr:   nfnetlink.IPv4Addr,
	}
	if f == IPv6 {
		l.table.Family, l.addr = unix.NFPROTO_IPV6, nfnetlink.IPv6Addr
	}

	return l
}

// objects makes everything but the elements. What is there stays, but for the
// rules, which are made anew: CRI-O's rule for hairpin never matches.
func (l nftLayout) objects() []netlink.Message {
	msgs := []netlink.Message{l.table.Create()}

	for _, s := range l.sets() {
		msgs = append(msgs, l.table.CreateSet(s))
	}

	for _, c := range l.chains() {
		msgs = append(msgs, l.table.CreateChain(c), l.table.FlushChain(c.Name))
	}

	return append(msgs, l.rules()...)
}

// sets are all maps and sets of the table.
func (l nftLayout) sets() []nfnetlink.Set {
	pod := []nfnetlink.DataType{l.addr, nfnetlink.InetService}
	port := []nfnetlink.DataType{nfnetlink.InetProto, nfnetlink.InetService}

	return []nfnetlink.Set{
		{
			Name: nftHostPorts, Key: port, Data: pod,
			Comment: "hostports on all local IPs (protocol . hostPort -> podIP . podPort)",
		},
		{
			Name: nftHostIPPorts, Key: append([]nfnetlink.DataType{l.addr}, port...), Data: pod,
			Comment: "hostports on specific IPs (hostIP . protocol . hostPort -> podIP . podPort)",
		},
		{
			Name: nftHairpins, Key: []nfnetlink.DataType{l.addr, l.addr},
			Comment: "hostport hairpin connections",
		},
		{
			Name: nftServices, Key: []nfnetlink.DataType{l.addr},
			Comment: "addresses of Services that only " + nodeaddr.ServiceDevice + " has: not the node's",
		},
		{
			Name: nftNeighbours, Key: []nfnetlink.DataType{nfnetlink.IfName, l.addr},
			Comment: "interfaces on which pods answer their neighbours past the node",
		},
	}
}

// chains are all chains of the table.
func (l nftLayout) chains() []nfnetlink.Chain {
	chains := []nfnetlink.Chain{
		{Name: nftHostPorts},
		{Name: nftPrerouting, Type: "nat", Hook: unix.NF_INET_PRE_ROUTING, Priority: priorityDNAT, Comment: keptForCRIO + nftNATPrerouting},
		{Name: nftOutput, Type: "nat", Hook: unix.NF_INET_LOCAL_OUT, Priority: priorityDNAT, Comment: keptForCRIO + nftNATOutput},
		{Name: nftNATPrerouting, Type: "nat", Hook: unix.NF_INET_PRE_ROUTING, Priority: priorityAfterDNAT},
		{Name: nftNATOutput, Type: "nat", Hook: unix.NF_INET_LOCAL_OUT, Priority: priorityAfterDNAT},
		{Name: nftMasquerade, Type: "nat", Hook: unix.NF_INET_POST_ROUTING, Priority: prioritySNAT},
	}
	if l.guard {
		chains = append(chains, nfnetlink.Chain{
			Name: nftGuard, Type: "filter", Hook: unix.NF_INET_PRE_ROUTING, Priority: priorityRaw,
		})
	}

	return chains
}

// header is where things are in a packet's IP header, and the register that
// comes behind one address from reg1.
type header struct{ saddr, daddr, size, behind uint32 }

func (l nftLayout) header() header {
	if l.family == IPv6 {
		return header{saddr: 8, daddr: 24, size: 16, behind: 2} //nolint:mnd // of struct ipv6hdr
	}

	return header{saddr: 12, daddr: 16, size: 4, behind: piece(1)} //nolint:mnd // of struct iphdr
}

// rules are, in nft's words, where localhost is set,
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
func (l nftLayout) rules() []netlink.Message {
	const (
		dport    = 2 // offset in the header of TCP, UDP and SCTP
		portSize = 2
	)

	t, h := l.table, l.header()

	incoming, outgoing := l.forNode()

	var (
		translated = []nfnetlink.Expr{
			nfnetlink.LoadConntrackStatus(reg1), nfnetlink.MaskNumber(reg1, statusDNAT|statusSNAT), nfnetlink.EqualTo(reg1, statusDNAT),
		}
		// masquerade is for packets to a pod with the address at an offset as
		// the source.
		masquerade = func(saddr uint32) []nfnetlink.Expr {
			return []nfnetlink.Expr{
				nfnetlink.LoadNetworkHeader(saddr, h.size, reg1), nfnetlink.LoadNetworkHeader(h.daddr, h.size, h.behind),
				nfnetlink.InSet(nftHairpins, reg1), nfnetlink.Masquerade(),
			}
		}
	)

	msgs := []netlink.Message{
		t.AppendRule(nftHostPorts,
			nfnetlink.LoadNetworkHeader(h.daddr, h.size, reg1), nfnetlink.LoadProtocol(h.behind),
			nfnetlink.LoadTransportHeader(dport, portSize, piece(h.size/4+1)),
			nfnetlink.LookUp(nftHostIPPorts, reg1, reg1), nfnetlink.DNAT(t.Family, reg1, h.behind)),
		t.AppendRule(nftHostPorts,
			nfnetlink.LoadProtocol(reg1), nfnetlink.LoadTransportHeader(dport, portSize, piece(1)),
			nfnetlink.LookUp(nftHostPorts, reg1, reg1), nfnetlink.DNAT(t.Family, reg1, h.behind)),
		t.AppendRule(nftNATPrerouting, incoming...),
		t.AppendRule(nftNATOutput, outgoing...),
		t.AppendRule(nftMasquerade, slices.Concat(translated, masquerade(h.saddr))...),
		t.AppendRule(nftMasquerade, slices.Concat(translated, []nfnetlink.Expr{
			nfnetlink.LoadInputName(reg1), nfnetlink.LoadNetworkHeader(h.daddr, h.size, reg2),
			nfnetlink.InSet(nftNeighbours, reg1), nfnetlink.Masquerade(),
		})...),
	}

	if l.localhost {
		msgs = append(msgs, t.AppendRule(nftMasquerade,
			slices.Concat(translated, l.within(l.family.loopback(), h.saddr, nfnetlink.Equal), masquerade(h.daddr))...))
	}

	if l.guard {
		fromOutside := []nfnetlink.Expr{nfnetlink.LoadInputInterface(reg1), nfnetlink.NotEqualTo(reg1, loopbackIndex)}
		for _, offset := range []uint32{h.daddr, h.saddr} {
			loopback := slices.Concat(fromOutside, l.within(l.family.loopback(), offset, nfnetlink.Equal))
			msgs = append(msgs, t.AppendRule(nftGuard, append(loopback, nfnetlink.Drop())...))
		}
	}

	return msgs
}

// forNode lead to the rows what comes from outside, or from the node itself, for an
// address of the node.
func (l nftLayout) forNode() (incoming, outgoing []nfnetlink.Expr) {
	h := l.header()
	incoming = l.within(l.family.loopback(), h.daddr, nfnetlink.NotEqual)

	if !l.localhost {
		outgoing = l.within(l.family.loopback(), h.saddr, nfnetlink.NotEqual)
	}

	var both []nfnetlink.Expr

	if network := l.family.linkLocal(); network.IsValid() {
		both = append(l.within(network, h.daddr, nfnetlink.NotEqual), l.within(network, h.saddr, nfnetlink.NotEqual)...)
	}

	both = append(both,
		nfnetlink.LoadDestinationType(reg1), nfnetlink.EqualTo(reg1, unix.RTN_LOCAL),
		nfnetlink.LoadNetworkHeader(h.daddr, h.size, reg1), nfnetlink.NotInSet(nftServices, reg1),
		nfnetlink.Goto(nftHostPorts))

	return append(incoming, both...), append(outgoing, both...)
}

// within compares the address at an offset in the IP header with a network, as nft
// does: of one that ends between two bytes with a mask for the whole address, and
// else without.
func (l nftLayout) within(network netip.Prefix, offset uint32, compare func(sreg uint32, data []byte) nfnetlink.Expr) []nfnetlink.Expr {
	var mask []nfnetlink.Expr

	addr, bits := network.Addr().AsSlice(), network.Bits()
	if bits%8 == 0 {
		addr = addr[:bits/8]
	} else {
		mask = append(mask, nfnetlink.Mask(reg1, net.CIDRMask(bits, 8*len(addr))))
	}

	load := nfnetlink.LoadNetworkHeader(offset, uint32(len(addr)), reg1) //nolint:gosec // 16 at the most

	return slices.Concat([]nfnetlink.Expr{load}, mask, []nfnetlink.Expr{compare(reg1, addr)})
}

// nftKey names an element: no two of one set have the same key.
type nftKey struct{ set, key string }

// isRow reports whether an element of that key stands for a row.
func (k nftKey) isRow() bool { return k.set == nftHostPorts || k.set == nftHostIPPorts }

// nftElement is an element. Its zero value is none.
type nftElement struct {
	nftKey

	data, comment string
}

// there reports whether it is an element.
func (e nftElement) there() bool { return e.set != "" }

// element is what messages have of it.
func (e nftElement) element() nfnetlink.Element {
	return nfnetlink.Element{Key: []byte(e.key), Data: []byte(e.data), Comment: e.comment}
}

// elementOf is an element of a set as messages have it.
func elementOf(set string, e nfnetlink.Element) nftElement {
	return nftElement{nftKey{set, string(e.Key)}, string(e.Data), e.Comment}
}

// rowElement is what stands for a row.
func rowElement(r *row) nftElement {
	e := nftElement{nftKey: nftKey{set: nftHostPorts}, comment: r.ownerHash}

	var key []byte
	if r.ip.IsValid() {
		e.set, key = nftHostIPPorts, r.ip.AsSlice()
	}

	key = append(key, r.proto.number(), 0, 0, 0)
	e.key = string(appendPort(key, r.port))
	e.data = string(appendPort(r.pod.Addr().AsSlice(), r.pod.Port()))

	return e
}

// hairpinElement is what lets a pod reach itself.
func hairpinElement(pod netip.Addr, comment string) nftElement {
	ip := string(pod.AsSlice())

	return nftElement{nftKey: nftKey{nftHairpins, ip + ip}, comment: comment}
}

// neighbourElement is what has a pod's neighbours on an interface masqueraded.
func neighbourElement(link string, pod netip.Addr, comment string) nftElement {
	name := make([]byte, nfnetlink.IfName.Size())
	copy(name, link)

	return nftElement{nftKey: nftKey{nftNeighbours, string(name) + string(pod.AsSlice())}, comment: comment}
}

// neighbourOf is the interface and the pod of an element of the set of neighbours.
func (l nftLayout) neighbourOf(e nftElement) (link string, pod netip.Addr, ok bool) {
	size := int(nfnetlink.IfName.Size())
	if e.set != nftNeighbours || len(e.key) < size {
		return "", netip.Addr{}, false
	}

	link = strings.TrimRight(e.key[:size], "\x00")
	pod, ok = netip.AddrFromSlice([]byte(e.key[size:]))

	return link, pod, ok && neighbourElement(link, pod, e.comment) == e && familyOf(pod) == l.family
}

// serviceElement keeps an address from being translated.
func serviceElement(ip netip.Addr) nftElement {
	return nftElement{nftKey: nftKey{nftServices, string(ip.AsSlice())}}
}

// hairpinOf is the pod of an element of the set of hairpins.
func (l nftLayout) hairpinOf(e nftElement) (netip.Addr, bool) {
	ip, ok := netip.AddrFromSlice([]byte(e.key[:len(e.key)/2]))

	return ip, ok && hairpinElement(ip, e.comment) == e && familyOf(ip) == l.family
}

// row is what an element of the maps stands for. It is not ok for one that no
// row of this package would make.
func (l nftLayout) row(e nftElement) (r *row, ok bool) {
	size := int(l.addr.Size())
	key, data := []byte(e.key), []byte(e.data)
	r = &row{ownerHash: e.comment}

	if e.set == nftHostIPPorts && len(key) > size {
		r.ip, _ = netip.AddrFromSlice(key[:size])
		key = key[size:]
	}

	if len(key) != 8 || len(data) != size+4 {
		return nil, false
	}

	pod, _ := netip.AddrFromSlice(data[:size])
	r.pod = netip.AddrPortFrom(pod, binary.BigEndian.Uint16(data[size:]))
	r.port = binary.BigEndian.Uint16(key[4:])

	r.proto = protocolOf(key[0])

	return r, r.proto != "" && r.port != 0 && r.pod.Port() != 0 && !r.ip.IsUnspecified() && rowElement(r) == e
}

// appendPort appends a port as keys and data have it: padded to 4 bytes.
func appendPort(b []byte, port uint16) []byte {
	return append(binary.BigEndian.AppendUint16(b, port), 0, 0)
}
