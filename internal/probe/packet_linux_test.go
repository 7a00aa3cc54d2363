package probe

import (
	"net/netip"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cri-o/hostport/internal/row"
)

// question is one of a family and a protocol, with the answers that it may get.
func question(v6 bool, p row.Protocol) (f flow, answers map[string][]byte) {
	ours, theirs, router := netip.MustParseAddr("198.18.0.1"), netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.9")
	icmp, unreachable := byte(unix.IPPROTO_ICMP), []byte{3, 1, 0, 0, 0, 0, 0, 0}

	if v6 {
		ours, theirs, router = netip.MustParseAddr("fd00::1"), netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("2001:db8::9")
		icmp, unreachable = unix.IPPROTO_ICMPV6, []byte{1, 3, 0, 0, 0, 0, 0, 0}
	}

	f = newFlow(p, ours, netip.AddrPortFrom(theirs, 80))
	back := flow{proto: p, from: f.to, to: f.from}

	switch p {
	case row.TCP:
		answers = map[string][]byte{
			"SYN-ACK": back.packet(tcpHeader{ports: back.ports(), Ack: f.number + 1, Seq: 7, Flags: tcpSYN | tcpACK}, nil),
			"RST":     back.packet(tcpHeader{ports: back.ports(), Ack: f.number + 1, Flags: tcpRST | tcpACK}, nil),
		}
	case row.UDP:
		answers = map[string][]byte{"datagram": back.packet(udpHeader{ports: back.ports()}, []byte("yes!"))}
	default:
		answers = map[string][]byte{
			"INIT-ACK": back.packet(sctpHeader{ports: back.ports(), Tag: f.number, Chunk: sctpINITACK}, encode(sctpInit{Tag: 7})),
			"ABORT":    back.packet(sctpHeader{ports: back.ports(), Tag: f.number, Chunk: sctpABORT}, nil),
		}
	}

	// The router has seen the packet after its translation to a pod.
	about := flow{proto: p, from: f.from, to: netip.AddrPortFrom(router.Next(), 8080), number: f.number}.first()
	about = about[:min(48, len(about))]
	b := flow{proto: row.UDP, from: netip.AddrPortFrom(router, 0), to: f.from}.packet(udpHeader{}, about)
	copy(b[len(b)-len(about)-8:], unreachable)

	if v6 {
		b[6] = icmp
	} else {
		b[9] = icmp
	}

	answers["ICMP"] = b

	return f, answers
}

// Answers are known, whole, and as those of their question alone.
func TestHears(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		for _, p := range []row.Protocol{row.TCP, row.UDP, row.SCTP} {
			f, answers := question(v6, p)
			others := []flow{f, f, f}
			others[0].from = netip.AddrPortFrom(f.from.Addr(), f.from.Port()^1)
			others[1].from = netip.AddrPortFrom(f.from.Addr().Next(), f.from.Port())
			others[2].proto = map[row.Protocol]row.Protocol{row.TCP: row.UDP, row.UDP: row.SCTP, row.SCTP: row.TCP}[p]

			for name, b := range answers {
				r, ok := parse(b)
				assert.True(t, ok, "%s %s", p, name)
				assert.True(t, f.hears(r), "%s %s", p, name)
				assert.Equal(t, name == "ICMP", r.why != "", name)

				for _, o := range others {
					assert.False(t, o.hears(r), "%s %s, asked %v", p, name, o)
				}

				if name != "ICMP" { // which may not know these
					other := f
					other.number ^= 2
					assert.Equal(t, p == row.UDP, p == row.UDP || other.hears(r), "%s %s", p, name)

					other = f
					other.to = netip.AddrPortFrom(f.to.Addr(), 81)
					assert.False(t, other.hears(r), "%s %s", p, name)
				}

				for n := range min(len(b), 40) {
					_, ok := parse(b[:n])
					assert.False(t, ok && n < 28, "%s %s, of %d bytes", p, name, n)
				}
			}

			r, ok := parse(f.first())
			assert.False(t, ok && f.hears(r), "its own packet")
		}
	}
}

// A packet sums up to nothing, and UDP's never says that it has no sum.
func TestChecksums(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		f, _ := question(v6, row.UDP)

		for port := range 1 << 16 {
			f.from = netip.AddrPortFrom(f.from.Addr(), uint16(port))
			b := f.first()
			body := b[len(b)-8:]

			if [2]byte(body[6:]) == [2]byte{} || !v6 && checksum(b[:20]) != 0 || f.checksum(body) != 0xffff {
				require.Fail(t, "wrong", "%x", b)
			}
		}
	}
}

// What is no answer to anything is none: parts of packets, other ICMP messages, other chunks.
func TestNoAnswers(t *testing.T) {
	f, answers := question(false, row.TCP)

	fragment := answers["RST"]
	fragment[7] = 1

	size := answers["ICMP"]
	size[21] = 4 // fragmentation needed

	for name, b := range map[string][]byte{
		"fragment": fragment,
		"size":     size,
		"ACK":      flow{proto: row.TCP, from: f.to, to: f.from}.packet(tcpHeader{Flags: tcpACK}, nil),
		"version":  {0x50, 31: 0},
		"length":   {0x4f, 30: 0},
		"short":    {0x41, 9: unix.IPPROTO_UDP, 31: 0},
		"nothing":  {},
	} {
		_, ok := parse(b)
		assert.False(t, ok, name)
	}
}

func FuzzParse(f *testing.F) {
	for _, v6 := range []bool{false, true} {
		for _, p := range []row.Protocol{row.TCP, row.UDP, row.SCTP} {
			asked, answers := question(v6, p)
			f.Add(asked.first())

			for _, b := range answers {
				f.Add(b)
			}
		}
	}

	f.Fuzz(func(t *testing.T, b []byte) {
		r, ok := parse(b)
		if !ok {
			return
		}

		assert.NotEmpty(t, r.proto)
		assert.NotEmpty(t, r.kind)
		assert.True(t, r.from.IsValid())
		assert.True(t, r.to.IsValid())
		assert.Equal(t, r.why != "", r.kind == Unreachable || r.why == portUnreachable)

		asked := flow{proto: r.proto, from: r.to, to: r.from, number: r.ours}
		assert.True(t, asked.hears(r))
		_ = asked.last(r)
	})
}
