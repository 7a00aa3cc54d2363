package probe

import (
	"crypto/rand"
	"encoding/binary"
	"hash/crc32"
	"math"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/cri-o/hostport/internal/row"
)

// ipv4Header is RFC 791, section 3.1.
type ipv4Header struct {
	VersionLength, Service uint8
	Length, ID, Fragment   uint16
	TTL, Protocol          uint8
	Checksum               uint16
	From, To               [4]byte
}

// ipv6Header is RFC 8200, section 3.
type ipv6Header struct {
	VersionClassFlow uint32
	Length           uint16
	Protocol, Hops   uint8
	From, To         [16]byte
}

// The others begin with the ports.
type ports struct{ From, To uint16 }

// tcpHeader is RFC 9293, section 3.1.
type tcpHeader struct {
	ports

	Seq, Ack                 uint32
	Offset, Flags            uint8 // the offset, in four bytes, is the upper half
	Window, Checksum, Urgent uint16
}

const tcpSYN, tcpRST, tcpACK = 2, 4, 16

// udpHeader is RFC 768.
type udpHeader struct {
	ports

	Length, Checksum uint16
}

// sctpHeader is RFC 9260, section 3.1, with the first chunk's.
type sctpHeader struct {
	ports

	Tag, Checksum uint32
	Chunk, Flags  uint8
	Length        uint16
}

// sctpInit is what follows in INIT and INIT-ACK (section 3.3.2).
type sctpInit struct {
	Tag, Window uint32
	Out, In     uint16 // streams
	TSN         uint32
}

const sctpINIT, sctpINITACK, sctpABORT = 1, 2, 6

// flow is one question, by which its answers are known.
type flow struct {
	proto    row.Protocol
	from, to netip.AddrPort
	number   uint32 // TCP's first sequence number, SCTP's tag; UDP has none
}

// newFlow is a question from a port that the node's own connections might have.
func newFlow(p row.Protocol, from netip.Addr, to netip.AddrPort) flow {
	const lowest, count = 32768, 28232 // net.ipv4.ip_local_port_range

	var b [6]byte

	_, _ = rand.Read(b[:]) // never fails
	port := lowest + binary.BigEndian.Uint16(b[4:])%count

	f := flow{proto: p, from: netip.AddrPortFrom(from, port), to: to}

	if p != row.UDP {
		f.number = binary.BigEndian.Uint32(b[:]) | 1 // no tag is 0
	}

	return f
}

const (
	maxSegment = 1440 // what fits into 1500 bytes with IPv6
	window     = 65535
	tcpWords   = 5

	sctpInitLength = 16
)

// first is the packet that asks.
func (f flow) first() []byte {
	switch f.proto {
	case row.TCP:
		option := binary.BigEndian.AppendUint16([]byte{2, 4}, maxSegment) // RFC 9293, section 3.2

		return f.packet(tcpHeader{ports: f.ports(), Seq: f.number, Offset: (tcpWords + 1) << 4, Flags: tcpSYN, Window: window}, option)
	case row.UDP:
		return f.packet(udpHeader{ports: f.ports(), Length: 8}, nil)
	default:
		init := encode(sctpInit{Tag: f.number, Window: window, Out: 1, In: 1, TSN: f.number})

		return f.packet(sctpHeader{ports: f.ports(), Chunk: sctpINIT, Length: 4 + sctpInitLength}, init)
	}
}

// last is the packet that ends what an answer has begun; nil if that is nothing.
func (f flow) last(r reply) []byte {
	switch {
	case r.kind != Accepted || f.proto == row.UDP:
		return nil
	case f.proto == row.TCP:
		return f.packet(tcpHeader{
			ports: f.ports(), Seq: f.number + 1, Ack: r.theirs + 1, Offset: tcpWords << 4, Flags: tcpRST | tcpACK,
		}, nil)
	default:
		return f.packet(sctpHeader{ports: f.ports(), Tag: r.theirs, Chunk: sctpABORT, Length: 4}, nil)
	}
}

// hears reports whether something answers the question. What an ICMP error tells of its
// target is not certain: it may be from before the answer's translation, or after.
func (f flow) hears(r reply) bool {
	return r.proto == f.proto && r.to == f.from && (r.why != "" || r.from.Port() == f.to.Port() && r.ours == f.number)
}

func (f flow) ports() ports { return ports{f.from.Port(), f.to.Port()} }

// packet is a whole packet: the header and what follows it, with checksums.
func (f flow) packet(header any, rest []byte) []byte {
	body := append(encode(header), rest...)
	from, to := f.from.Addr(), f.to.Addr()

	switch f.proto {
	case row.TCP:
		binary.BigEndian.PutUint16(body[16:], f.checksum(body))
	case row.UDP:
		binary.BigEndian.PutUint16(body[6:], f.checksum(body))
	default: // RFC 9260, appendix A
		binary.LittleEndian.PutUint32(body[8:], crc32.Checksum(body, crc32.MakeTable(crc32.Castagnoli)))
	}

	const (
		hops         = 64
		v4, v6       = 0x45, 6 << 28 // IPv4's version with the length of its header, in units of four bytes
		v4Length     = 20
		dontFragment = 0x4000
	)

	length := uint16(len(body)) //nolint:gosec // some bytes

	if from.Is6() {
		return append(encode(ipv6Header{v6, length, f.proto.Number(), hops, from.As16(), to.As16()}), body...)
	}

	ip := encode(ipv4Header{
		VersionLength: v4, Length: v4Length + length, Fragment: dontFragment,
		TTL: hops, Protocol: f.proto.Number(), From: from.As4(), To: to.As4(),
	})
	binary.BigEndian.PutUint16(ip[10:], checksum(ip))

	return append(ip, body...)
}

// checksum is that of TCP and UDP: over addresses, protocol and length as well.
func (f flow) checksum(body []byte) uint16 {
	pseudo := append(f.from.Addr().AsSlice(), f.to.Addr().AsSlice()...)
	pseudo = append(pseudo, 0, f.proto.Number())
	pseudo = binary.BigEndian.AppendUint16(pseudo, uint16(len(body))) //nolint:gosec // some bytes

	if sum := checksum(append(pseudo, body...)); sum != 0 {
		return sum
	}

	return math.MaxUint16 // the same number; UDP's 0 says that there is none
}

// checksum is RFC 1071, of an even number of bytes.
func checksum(b []byte) uint16 {
	var sum uint32
	for ; len(b) >= 2; b = b[2:] {
		sum += uint32(binary.BigEndian.Uint16(b))
	}

	sum = sum>>16 + sum&math.MaxUint16

	return ^uint16(sum>>16 + sum)
}

func encode(header any) []byte {
	b, _ := binary.Append(nil, binary.BigEndian, header) // fails on what has no fixed size alone

	return b
}

// reply is what a packet says.
type reply struct {
	proto    row.Protocol
	from, to netip.AddrPort
	kind     Kind
	why      string // of ICMP errors, whose protocol and target are those of the packet that they are about
	// ours is the number that TCP and SCTP repeat to show that they answer us, theirs is that of their own.
	ours, theirs uint32
}

// parse reads a packet that the node has sent, and reports whether that may be an answer.
func parse(b []byte) (reply, bool) {
	ip, ok := parseIP(b)
	if !ok {
		return reply{}, false
	}

	if ip.protocol == unix.IPPROTO_ICMP || ip.protocol == unix.IPPROTO_ICMPV6 {
		return parseICMP(ip)
	}

	p, ok := decode[ports](ip.body)
	r := reply{
		proto: row.ProtocolOf(ip.protocol), from: netip.AddrPortFrom(ip.from, p.From), to: netip.AddrPortFrom(ip.to, p.To),
	}

	switch r.proto {
	case row.TCP:
		var h tcpHeader

		h, ok = decode[tcpHeader](ip.body)
		r.ours, r.theirs = h.Ack-1, h.Seq

		switch h.Flags & (tcpSYN | tcpRST | tcpACK) {
		case tcpSYN | tcpACK:
			r.kind = Accepted
		case tcpRST | tcpACK:
			r.kind = Refused
		}
	case row.UDP:
		_, ok = decode[udpHeader](ip.body)
		r.kind = Accepted
	case row.SCTP:
		var h sctpHeader

		h, ok = decode[sctpHeader](ip.body)
		r.ours = h.Tag

		switch h.Chunk {
		case sctpINITACK:
			var init sctpInit

			init, ok = decode[sctpInit](ip.body[min(binary.Size(h), len(ip.body)):])
			r.kind, r.theirs = Accepted, init.Tag
		case sctpABORT:
			r.kind = Refused
		}
	}

	return r, ok && r.kind != ""
}

// portUnreachable is how a machine refuses what its protocol cannot.
const portUnreachable = "port unreachable"

// parseICMP reads an ICMP error.
func parseICMP(ip ipPacket) (reply, bool) {
	const header = 8

	if len(ip.body) < header {
		return reply{}, false
	}

	about, known := parseIP(ip.body[header:])
	p, ok := decode[ports](about.body)
	r := reply{
		proto: row.ProtocolOf(about.protocol), from: netip.AddrPortFrom(ip.from, 0), to: netip.AddrPortFrom(about.from, p.From),
		kind: Unreachable, why: describe(ip.protocol, ip.body[0], ip.body[1]),
	}

	if r.why == portUnreachable {
		r.kind = Refused
	}

	return r, known && ok && r.proto != "" && r.why != ""
}

// describe says what an ICMP error means; "" if it is none that ends a question, as one about
// a packet's size.
func describe(protocol, kind, code uint8) string {
	const v4, v6 = unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6

	return map[[3]uint8]string{ // RFC 792 and 1812, RFC 4443
		{v4, 3, 0}:  "network unreachable",
		{v4, 3, 1}:  "host unreachable",
		{v4, 3, 2}:  "protocol unreachable",
		{v4, 3, 3}:  portUnreachable,
		{v4, 3, 9}:  "network administratively prohibited",
		{v4, 3, 10}: "host administratively prohibited",
		{v4, 3, 13}: "administratively prohibited",
		{v4, 11, 0}: "time to live exceeded",
		{v6, 1, 0}:  "no route",
		{v6, 1, 1}:  "administratively prohibited",
		{v6, 1, 3}:  "address unreachable",
		{v6, 1, 4}:  portUnreachable,
		{v6, 1, 5}:  "source address failed policy",
		{v6, 1, 6}:  "route rejected",
		{v6, 3, 0}:  "hop limit exceeded",
		{v6, 4, 1}:  "protocol unreachable",
	}[[3]uint8{protocol, kind, code}]
}

// ipPacket is what is of interest in a packet of either family. IPv6's extension headers are
// none of those: no answer has any.
type ipPacket struct {
	protocol uint8
	from, to netip.Addr
	body     []byte
}

func parseIP(b []byte) (ipPacket, bool) {
	const (
		v4, v6 = 4, 6
		offset = 0x1fff // of a fragment: with another than 0, it does not begin with a header
	)

	if h, ok := decode[ipv6Header](b); ok && h.VersionClassFlow>>28 == v6 {
		return ipPacket{h.Protocol, netip.AddrFrom16(h.From), netip.AddrFrom16(h.To), b[binary.Size(h):]}, true
	}

	h, ok := decode[ipv4Header](b)
	length := int(h.VersionLength%16) * 4 // in units of four bytes

	if !ok || h.VersionLength>>4 != v4 || length < binary.Size(h) || length > len(b) || h.Fragment&offset != 0 {
		return ipPacket{}, false
	}

	return ipPacket{h.Protocol, netip.AddrFrom4(h.From), netip.AddrFrom4(h.To), b[length:]}, true
}

// decode reads a header; it fails if bytes are missing.
func decode[T any](b []byte) (header T, ok bool) {
	_, err := binary.Decode(b, binary.BigEndian, &header)

	return header, err == nil
}
