package hostport

import (
	"encoding/binary"
	"net/netip"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/cri-o/hostport/internal/nfnetlink"
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

// Priorities of NAT hooks (linux/netfilter_ipv4.h). They are CRI-O's: were
// they others, the kernel would refuse its transactions.
const (
	priorityDNAT = -100
	prioritySNAT = 100
)

// Bits of a connection's status (linux/netfilter/nf_conntrack_common.h).
const (
	statusSNAT = 1 << 4
	statusDNAT = 1 << 5
)

// Registers 1 to 4 have 16 bytes each; those from 8 are the same memory in
// pieces of 4. A concatenation lies in pieces one after the other, from reg1.
// Where a piece begins a register of 16 bytes, nft calls it by that.
const reg1 = 1

func piece(n uint32) uint32 { return 8 + n }

// nftLayout is one family's part of the ruleset: what there is of it whatever
// rows there are, and how rows are written into maps.
type nftLayout struct {
	family ipFamily
	table  nfnetlink.Table
	addr   nfnetlink.DataType
}

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
	t := l.table
	pod := []nfnetlink.DataType{l.addr, nfnetlink.InetService}
	port := []nfnetlink.DataType{nfnetlink.InetProto, nfnetlink.InetService}

	msgs := []netlink.Message{
		t.Create(),
		t.CreateSet(nfnetlink.Set{
			Name: nftHostPorts, Key: port, Data: pod,
			Comment: "hostports on all local IPs (protocol . hostPort -> podIP . podPort)",
		}),
		t.CreateSet(nfnetlink.Set{
			Name: nftHostIPPorts, Key: append([]nfnetlink.DataType{l.addr}, port...), Data: pod,
			Comment: "hostports on specific IPs (hostIP . protocol . hostPort -> podIP . podPort)",
		}),
		t.CreateSet(nfnetlink.Set{
			Name: nftHairpins, Key: []nfnetlink.DataType{l.addr, l.addr},
			Comment: "hostport hairpin connections",
		}),
	}

	for _, c := range []nfnetlink.Chain{
		{Name: nftHostPorts},
		{Name: nftPrerouting, Type: "nat", Hook: unix.NF_INET_PRE_ROUTING, Priority: priorityDNAT},
		{Name: nftOutput, Type: "nat", Hook: unix.NF_INET_LOCAL_OUT, Priority: priorityDNAT},
		{Name: nftMasquerade, Type: "nat", Hook: unix.NF_INET_POST_ROUTING, Priority: prioritySNAT},
	} {
		msgs = append(msgs, t.CreateChain(c), t.FlushChain(c.Name))
	}

	return append(msgs, l.rules()...)
}

// rules are, in nft's words,
//
//	hostports:        dnat ip to ip daddr . meta l4proto . th dport map @hostipports
//	                  dnat ip to meta l4proto . th dport map @hostports
//	prerouting:       fib daddr type local goto hostports
//	output:           fib daddr type local goto hostports
//	masquerading:     ct status & (dnat|snat) == dnat ip saddr . ip daddr @hairpins masquerade
//
// Only packets for an address of the node may be translated (CVE-2025-67499).
// The row for one address comes before the one for any.
func (l nftLayout) rules() []netlink.Message {
	const (
		dport    = 2 // offset in the header of TCP, UDP and SCTP
		portSize = 2
	)

	t := l.table
	// Offsets in the IP header, the size of an address, and the register behind
	// one.
	saddr, daddr, size, behind := uint32(12), uint32(16), uint32(4), piece(1) //nolint:mnd // of struct iphdr

	if l.family == IPv6 {
		saddr, daddr, size, behind = 8, 24, 16, 2
	}

	local := func(chain string) netlink.Message {
		return t.AppendRule(chain,
			nfnetlink.LoadDestinationType(reg1), nfnetlink.Equal(reg1, unix.RTN_LOCAL), nfnetlink.Goto(nftHostPorts))
	}

	return []netlink.Message{
		t.AppendRule(nftHostPorts,
			nfnetlink.LoadNetworkHeader(daddr, size, reg1), nfnetlink.LoadProtocol(behind),
			nfnetlink.LoadTransportHeader(dport, portSize, piece(size/4+1)),
			nfnetlink.LookUp(nftHostIPPorts, reg1, reg1), nfnetlink.DNAT(t.Family, reg1, behind)),
		t.AppendRule(nftHostPorts,
			nfnetlink.LoadProtocol(reg1), nfnetlink.LoadTransportHeader(dport, portSize, piece(1)),
			nfnetlink.LookUp(nftHostPorts, reg1, reg1), nfnetlink.DNAT(t.Family, reg1, behind)),
		local(nftPrerouting),
		local(nftOutput),
		t.AppendRule(nftMasquerade,
			nfnetlink.LoadConntrackStatus(reg1), nfnetlink.Mask(reg1, statusDNAT|statusSNAT), nfnetlink.Equal(reg1, statusDNAT),
			nfnetlink.LoadNetworkHeader(saddr, size, reg1), nfnetlink.LoadNetworkHeader(daddr, size, behind),
			nfnetlink.InSet(nftHairpins, reg1), nfnetlink.Masquerade()),
	}
}

// nftKey names an element: no two of one set have the same key.
type nftKey struct{ set, key string }

// nftElement is an element. Its zero value is none.
type nftElement struct {
	nftKey

	data, comment string
}

func (e nftElement) there() bool { return e.set != "" }

func (e nftElement) element() nfnetlink.Element {
	return nfnetlink.Element{Key: []byte(e.key), Data: []byte(e.data), Comment: e.comment}
}

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

	key = append(key, protocolNumber(r.proto), 0, 0, 0)
	e.key = string(appendPort(key, r.port))
	e.data = string(appendPort(r.pod.Addr().AsSlice(), r.pod.Port()))

	return e
}

// hairpinElement is what lets a pod reach itself.
func hairpinElement(pod netip.Addr, comment string) nftElement {
	ip := string(pod.AsSlice())

	return nftElement{nftKey: nftKey{nftHairpins, ip + ip}, comment: comment}
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

	for _, p := range []protocol{tcp, udp, sctp} {
		if protocolNumber(p) == key[0] {
			r.proto = p
		}
	}

	return r, r.proto != "" && r.port != 0 && r.pod.Port() != 0 && !r.ip.IsUnspecified() && rowElement(r) == e
}

func appendPort(b []byte, port uint16) []byte {
	return append(binary.BigEndian.AppendUint16(b, port), 0, 0)
}

func protocolNumber(p protocol) byte {
	switch p {
	case tcp:
		return unix.IPPROTO_TCP
	case udp:
		return unix.IPPROTO_UDP
	default:
		return unix.IPPROTO_SCTP
	}
}
