package trace

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/cri-o/hostport/internal/nfnetlink"
	"github.com/cri-o/hostport/internal/row"
)

// Tracer follows packets of a network namespace, until it is closed. Its methods are to be
// called in that, and by one goroutine.
type Tracer struct {
	conn    *nfnetlink.Conn // the table goes when it is closed
	traces  *nfnetlink.Traces
	table   nfnetlink.Table
	awaited bool // there is one packet to be waited for

	packets map[uint32]*Step // the last step of the packet that has the kernel's id now
	count   int              // of packets so far
	steps   []Step
}

// Step is where a packet has been: at a rule that matched it, or at the end of a base chain.
type Step struct {
	// Packet tells packets apart, and counts from 1: the kernel uses its ids again. An answer is
	// another packet, and so are those that IPv6 looks for neighbours with.
	Packet int
	// Hook is that from which the chain was reached: "prerouting", "input", "forward", "output",
	// "postrouting", "ingress" or "egress". It is "" where the chain is gone already.
	Hook string
	// Family is the table's, as nft has it: "ip", "ip6", "inet", "bridge" or "netdev".
	Family, Table, Chain string
	// Milestone is set for a chain of our own: its name is the hook's and "-first" or "-last".
	Milestone bool
	// Rule is the handle of the rule that matched, and 0 for a policy.
	Rule uint64
	// Verdict is the rule's, or the policy: "accept", "drop", "continue", "return", "jump X",
	// "goto X", "queue" or "stolen". A rule that rejects says "drop".
	Verdict string
	Policy  bool
	// From and To are the packet's addresses and ports as it came into the base chain: what a
	// rule translates is seen from the next one on. The ports are 0 where there are none.
	From, To netip.AddrPort
	// In and Out are the interfaces' names, "" where there is none or none is known yet.
	In, Out string
}

const (
	// The milestones are before connection tracking and after source NAT and whatever else
	// comes at a usual priority (linux/netfilter_ipv4.h).
	priorityFirst, priorityLast = -450, 450

	first, last = "-first", "-last"
	drop        = "drop"

	// quiet is how long nothing comes before it is taken that nothing will.
	quiet = 50 * time.Millisecond
	// week is the longest time that nft knows for a limit.
	week = 7 * 24 * 60 * 60

	loopback = 1 // the index of lo (LOOPBACK_IFINDEX, net/flow.h)
	reg      = 1
)

// rule has the packets that it matches traced.
type rule struct {
	chain string
	match []nfnetlink.Expr
}

// Start begins to follow the packets from and to an address. One that gets the address only in a
// hook, as the answer to a masqueraded packet does, is followed from the end of that hook. The
// error is errors.ErrUnsupported before Linux 5.12.
func Start(ctx context.Context, peer netip.Addr) (*Tracer, error) {
	h := headerOf(row.FamilyOf(peer))
	from := []nfnetlink.Expr{nfnetlink.LoadNetworkHeader(h.saddr, h.size, reg), nfnetlink.Equal(reg, peer.AsSlice())}
	to := []nfnetlink.Expr{nfnetlink.LoadNetworkHeader(h.daddr, h.size, reg), nfnetlink.Equal(reg, peer.AsSlice())}

	return start(ctx, h.family,
		rule{"prerouting" + first, from}, rule{"prerouting" + first, to}, rule{"prerouting" + last, from}, rule{"prerouting" + last, to},
		rule{"output" + first, from}, rule{"output" + first, to}, rule{"output" + last, from}, rule{"output" + last, to})
}

// StartNext begins to follow the next packet that comes from outside to a port of the node, at one
// of its addresses or at any of either family, and begins a connection: the SYN of TCP, the INIT of SCTP, any of UDP. No other is
// followed, which costs a busy node nothing. The error is that of Start.
func StartNext(ctx context.Context, p row.Protocol, port uint16, to netip.Addr) (*Tracer, error) {
	const (
		dport, portSize = 2, 2
		flags, syn, ack = 13, 0x02, 0x10 // of struct tcphdr
		chunk, initial  = 12, 1          // SCTP_CID_INIT of struct sctp_chunkhdr, behind struct sctphdr
	)

	match := []nfnetlink.Expr{
		nfnetlink.LoadInputInterface(reg), nfnetlink.NotEqualTo(reg, loopback),
		nfnetlink.LoadProtocol(reg), nfnetlink.Equal(reg, []byte{p.Number()}),
		nfnetlink.LoadTransportHeader(dport, portSize, reg), nfnetlink.Equal(reg, binary.BigEndian.AppendUint16(nil, port)),
	}

	family := uint8(unix.NFPROTO_INET)

	if to.IsValid() {
		h := headerOf(row.FamilyOf(to))
		family = h.family
		match = append(match, nfnetlink.LoadNetworkHeader(h.daddr, h.size, reg), nfnetlink.Equal(reg, to.AsSlice()))
	}

	switch p {
	case row.TCP:
		match = append(match, nfnetlink.LoadTransportHeader(flags, 1, reg),
			nfnetlink.Mask(reg, []byte{syn | ack}), nfnetlink.Equal(reg, []byte{syn}))
	case row.UDP: // has no connections
	case row.SCTP:
		match = append(match, nfnetlink.LoadTransportHeader(chunk, 1, reg), nfnetlink.Equal(reg, []byte{initial}))
	}

	match = append(match, nfnetlink.LoadDestinationType(reg), nfnetlink.EqualTo(reg, unix.RTN_LOCAL), nfnetlink.OncePer(week))

	t, err := start(ctx, family, rule{"prerouting" + first, match})
	if err == nil {
		t.awaited = true
	}

	return t, err
}

// start listens before there is anything to be heard.
func start(ctx context.Context, family uint8, rules ...rule) (_ *Tracer, err error) {
	t := &Tracer{packets: map[uint32]*Step{}}

	defer func() {
		if err != nil {
			err = fmt.Errorf("trace: %w", errors.Join(err, t.Close()))
		}
	}()

	if t.traces, err = nfnetlink.ListenTraces(); err != nil {
		return nil, err
	}

	if t.conn, err = nfnetlink.Dial(); err != nil {
		return nil, err
	}

	// By the socket's number two tables differ, of processes in different PID namespaces as well.
	t.table = nfnetlink.Table{
		Family: family, Name: fmt.Sprint("hostports-explain-", t.conn.Port()), Owned: true,
		Comment: "goes when hostports explain ends",
	}
	msgs := []netlink.Message{t.table.Create()}

	for hook := range uint32(unix.NF_INET_NUMHOOKS) {
		for suffix, priority := range map[string]int32{first: priorityFirst, last: priorityLast} {
			msgs = append(msgs, t.table.CreateChain(nfnetlink.Chain{
				Name: hookName(t.table.Family, hook) + suffix, Type: "filter", Hook: hook, Priority: priority,
			}))
		}
	}

	for _, r := range rules {
		msgs = append(msgs, t.table.AppendRule(r.chain, append(r.match, nfnetlink.SetTrace(reg)...)...))
	}

	if err := supported(t.conn.Commit(ctx, 0, msgs)); err != nil {
		return nil, err
	}

	return t, nil
}

// supported says what it means that the kernel does not know of tables that have an owner.
func supported(err error) error {
	refused := (*nfnetlink.BatchError)(nil)
	if errors.As(err, &refused) && refused.Message == 0 && (errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP)) {
		return fmt.Errorf("this takes Linux 5.12, which has tables that go with a process: %w: %w", errors.ErrUnsupported, err)
	}

	return err
}

// Close ends the tracing. Nothing is left of it in the kernel. It is called once.
func (t *Tracer) Close() error {
	var errs []error
	if t.conn != nil {
		errs = append(errs, t.conn.Close())
	}

	if t.traces != nil {
		errs = append(errs, t.traces.Close())
	}

	return errors.Join(errs...)
}

// Steps are what has been seen since the start. It waits until nothing has come for 50 ms, after
// StartNext for the packet before that, or until ctx ends, which is no error. With an error it
// returns what it has; unix.ENOBUFS is that some of what came has been lost.
func (t *Tracer) Steps(ctx context.Context) ([]Step, error) {
	var n *names

	for {
		patience := quiet
		if ctx.Err() != nil {
			patience = 0 // what has come by now is there to be read
		}

		heard, err := t.traces.Next(patience)

		for _, h := range heard {
			s := t.packet(h)

			if s != nil && n == nil && err == nil {
				n, err = t.names(context.WithoutCancel(ctx)) // the kernel answers at once
			}

			if s != nil && err == nil {
				t.add(s, h, n)
			}
		}

		if err != nil {
			return t.steps, fmt.Errorf("trace: %w", err)
		}

		if len(heard) == 0 && (patience == 0 || !t.awaited || len(t.steps) > 0) {
			return t.steps, nil
		}
	}
}

// own reports whether it is about one of our chains.
func (t *Tracer) own(h nfnetlink.Trace) bool {
	return h.Table == t.table.Name && h.Family == t.table.Family
}

// packet is the last step of the packet that it is about, or nil where that is none of ours. What
// others have traced passes our milestones, too, but it has not matched our rules.
func (t *Tracer) packet(h nfnetlink.Trace) *Step {
	s := t.packets[h.ID]

	switch from, to := addresses(h); {
	case t.own(h) && h.Rule != 0:
		// Where the last chain of a hook has it traced, the first may have had so before. Else it is a
		// packet that lies where another has lain.
		if s == nil || s.Hook+last != h.Chain || s.Milestone && s.Chain == h.Chain {
			t.count++
			s = &Step{Packet: t.count}
			t.packets[h.ID] = s
		}
	case to.IsValid() && (s == nil || s.ended()):
		delete(t.packets, h.ID)

		if s = t.travelling(from, to); s != nil {
			t.packets[h.ID] = s
		}
	}

	return s
}

// travelling is the packet that was last seen with these addresses, the oldest of several. The
// interface is part of the kernel's id: from prerouting on a bridge that calls iptables, a packet comes
// to the next hook under another id.
func (t *Tracer) travelling(from, to netip.AddrPort) (s *Step) {
	for _, p := range t.packets {
		if p.From == from && p.To == to && !p.ended() && (s == nil || p.Packet < s.Packet) {
			s = p
		}
	}

	return s
}

// ended reports whether the packet is not expected anywhere else.
func (s *Step) ended() bool {
	return s.Verdict == drop || s.Milestone && (s.Chain == "input"+last || s.Chain == "postrouting"+last)
}

// add makes the next step of a packet of what has been heard.
func (t *Tracer) add(s *Step, h nfnetlink.Trace, n *names) {
	if from, to := addresses(h); to.IsValid() { // the first of a base chain
		s.From, s.To = from, to
		s.In, s.Out = n.links[h.In], n.links[h.Out]
	}

	if !h.Policy && (h.Rule == 0 || t.own(h)) {
		return // a chain that others jumped to has ended, or a milestone is not passed yet
	}

	if hook, ok := n.hooks[chainKey{h.Family, h.Table, h.Chain}]; ok {
		s.Hook = hook // else it was jumped to, from the same
	}

	s.Family, s.Table, s.Chain, s.Milestone = familyName(h.Family), h.Table, h.Chain, t.own(h)
	s.Rule, s.Policy, s.Verdict = h.Rule, h.Policy, verdict(h)
	t.steps = append(t.steps, *s)
}

// names are what the kernel tells by number, or not at all.
type names struct {
	hooks map[chainKey]string // of base chains
	links map[uint32]string
}

// chainKey names a base chain.
type chainKey struct {
	family      uint8
	table, name string
}

func (t *Tracer) names(ctx context.Context) (*names, error) {
	n := &names{hooks: map[chainKey]string{}, links: map[uint32]string{}}

	msgs, err := t.conn.Dump(ctx, nfnetlink.Table{Family: unix.NFPROTO_UNSPEC}.Chains())
	for _, m := range msgs {
		c, parseErr := nfnetlink.ParseChain(m)
		err = errors.Join(err, parseErr)

		if c.Type != "" {
			n.hooks[chainKey{m.Data[0], c.Table, c.Name}] = hookName(m.Data[0], c.Hook)
		}
	}

	links, linksErr := net.Interfaces()
	for _, l := range links {
		n.links[uint32(l.Index)] = l.Name //nolint:gosec // the kernel's have 31 bits
	}

	return n, errors.Join(err, linksErr)
}

// hookName is nft's name for a hook (linux/netfilter.h).
func hookName(family uint8, hook uint32) string {
	names := []string{"prerouting", "input", "forward", "output", "postrouting", "ingress"}
	if family == unix.NFPROTO_NETDEV {
		names = []string{"ingress", "egress"}
	}

	if int(hook) >= len(names) {
		return ""
	}

	return names[hook]
}

// familyName is nft's name for a table's family.
func familyName(family uint8) string {
	return map[uint8]string{
		unix.NFPROTO_INET: "inet", unix.NFPROTO_IPV4: "ip", unix.NFPROTO_IPV6: "ip6",
		unix.NFPROTO_BRIDGE: "bridge", unix.NFPROTO_NETDEV: "netdev",
	}[family]
}

// verdict is one in nft's words.
func verdict(h nfnetlink.Trace) string {
	const mask = 0xff // NF_VERDICT_MASK; above it is the number of a queue

	if h.Verdict >= 0 {
		return [...]string{drop, "accept", "stolen", "queue", "repeat", "stop"}[min(h.Verdict&mask, 5)] //nolint:mnd // linux/netfilter.h
	}

	word := map[int32]string{
		unix.NFT_CONTINUE: "continue", unix.NFT_RETURN: "return", unix.NFT_JUMP: "jump", unix.NFT_GOTO: "goto",
	}[h.Verdict]

	return strings.TrimSpace(word + " " + h.Target)
}

// header is where things are in an IP header.
type header struct {
	family                       uint8
	protocol, saddr, daddr, size uint32
}

func headerOf(f row.Family) header {
	if f == row.IPv6 {
		return header{family: unix.NFPROTO_IPV6, protocol: 6, saddr: 8, daddr: 24, size: 16} //nolint:mnd // of struct ipv6hdr
	}

	return header{family: unix.NFPROTO_IPV4, protocol: 9, saddr: 12, daddr: 16, size: 4} //nolint:mnd // of struct iphdr
}

// addresses are those in a packet's headers.
func addresses(h nfnetlink.Trace) (from, to netip.AddrPort) {
	const version6 = 6

	at := headerOf(row.IPv4)
	if len(h.Network) > 0 && h.Network[0]>>4 == version6 {
		at = headerOf(row.IPv6)
	}

	if len(h.Network) < int(at.daddr+at.size) {
		return from, to
	}

	saddr, _ := netip.AddrFromSlice(h.Network[at.saddr:][:at.size])
	daddr, _ := netip.AddrFromSlice(h.Network[at.daddr:][:at.size])

	var sport, dport uint16
	if len(h.Transport) >= 4 && row.ProtocolOf(h.Network[at.protocol]) != "" {
		sport, dport = binary.BigEndian.Uint16(h.Transport), binary.BigEndian.Uint16(h.Transport[2:])
	}

	return netip.AddrPortFrom(saddr, sport), netip.AddrPortFrom(daddr, dport)
}
