package iptables

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/cri-o/hostport/internal/row"
)

// The chains, by the names that CRI-O gives them.
const (
	NATTable      = "nat"
	RawTable      = "raw"
	DNATDispatch  = "KUBE-HOSTPORTS"
	DNATPrefix    = "KUBE-HP-"
	MasqDispatch  = "CRIO-HOSTPORTS-MASQ"
	MasqPrefix    = "CRIO-MASQ-"
	dnatTarget    = "DNAT"
	masqTarget    = "MASQUERADE"
	DropTarget    = "DROP"
	DNATComment   = "kube hostport portals"
	MasqComment   = "kube hostport masquerading"
	GuardComment  = "hostport guard of loopback addresses"
	matchLocal    = "-m addrtype --dst-type LOCAL"
	matchDNATed   = "-m conntrack --ctstate DNAT"
	PreRouting    = "PREROUTING"
	Output        = "OUTPUT"
	PostRouting   = "POSTROUTING"
	CmdAppend     = "-A "
	cmdInsert     = "-I "
	CmdDelete     = "-D "
	cmdCheck      = "-C "
	cmdNewChain   = "-N "
	cmdFlushChain = "-F "
	CmdDelChain   = "-X "
	CmdCommit     = "COMMIT"
)

// GuardRules stand in the raw table: whatever nat does comes later.
func GuardRules(f row.Family) []Rule {
	from := Rule{Chain: PreRouting, notIn: row.LoopbackDevice, comment: GuardComment, Target: DropTarget}
	to := from
	from.src, to.dst = f.Loopback(), f.Loopback()

	return []Rule{to, from}
}

// NATRules lead packets into the dispatch chains. Only packets for an address
// of the node may be translated (CVE-2025-67499), and services come first
// (CVE-2019-9946). localhost reports whether loopback sources are translated.
//
// A rule takes one -s and one -d. Addresses that it excludes besides are those of
// the connection, which in this table are the packet's.
func NATRules(f row.Family, localhost bool) []Rule {
	fromOutside := Rule{
		Chain: PreRouting, notSrc: f.LinkLocal(), notDst: f.Loopback(), notOrigDst: f.LinkLocal(),
		comment: DNATComment, match: matchLocal, Target: DNATDispatch,
	}
	fromHost := Rule{
		Chain: Output, notOrigSrc: f.LinkLocal(), notDst: f.LinkLocal(),
		comment: DNATComment, match: matchLocal, Target: DNATDispatch,
	}
	masquerade := Rule{Chain: PostRouting, comment: MasqComment, match: matchDNATed, Target: MasqDispatch}

	if !localhost {
		fromHost.notSrc = f.Loopback()

		return []Rule{fromOutside, fromHost, masquerade}
	}

	return []Rule{fromOutside, fromHost, masquerade, {
		Chain: MasqDispatch, src: f.Loopback(), notOut: row.LoopbackDevice, comment: MasqComment, Target: masqTarget,
	}}
}

// A dispatch chain is a tree over the port numbers, so that a packet walks some
// tens of rules at the most, however many rows there are, and iptables reads as
// few to find one (it reads all of a chain for -D and -C).
//
// Each range chain costs as well: for each change the kernel looks at all chains
// of the table for loops (nf_tables, Linux 6.18). So a row stands in the widest
// range chain, from the level OwnRows on, that few others are in or below, and
// where ports are spread wide there are no narrower ones. The jumps to these
// come before the rows beside them.
const (
	widestRange = 16384
	rangeLevels = 6
	OwnRows     = 3
	// FewRows is how many rows a range chain takes before others go deeper.
	FewRows = 24
)

// rangeSize is how many ports a range has on a level, 0 being the widest: each
// has four of the next.
func rangeSize(level int) uint16 { return widestRange >> (2 * level) }

// ports is a range of port numbers; the zero value is no range.
type ports struct{ lo, hi uint16 }

// rangeAt is the range around a port on a level.
func rangeAt(port uint16, level int) ports {
	low := rangeSize(level) - 1

	return ports{port &^ low, port | low}
}

func (p ports) String() string {
	if p.lo == p.hi {
		return strconv.Itoa(int(p.lo))
	}

	return fmt.Sprintf("%d:%d", p.lo, p.hi)
}

// RangeChain names the range chain around r's port on a level.
func RangeChain(r *row.Row, prefix string, level int) string {
	p := rangeAt(r.Port, level)

	return fmt.Sprintf("%s%s-%d-%d", prefix, r.Proto.API(), p.lo, p.hi)
}

// path returns the jumps that lead from a dispatch chain to the range chain
// with r's own jump, widest range first, and the name of that chain.
func path(r *row.Row, dispatch, prefix string, jump func(level int, p ports) Rule) ([]Rule, string) {
	jumps := make([]Rule, r.Depth+1)
	chain := dispatch

	for level := range jumps {
		jumps[level] = jump(level, rangeAt(r.Port, level))
		jumps[level].Chain, jumps[level].Target = chain, RangeChain(r, prefix, level)
		chain = jumps[level].Target
	}

	return jumps, chain
}

// Side is where a row stands on the DNAT or on the masquerade side.
type Side struct {
	Path  []Rule // jumps to range chains
	Jump  Rule   // from the last of these to the row's own chain
	first bool   // jump goes before the others
	Rule  Rule   // in the row's own chain
}

// DNATSide leads from the node's endpoint to the pod's.
func DNATSide(r *row.Row) Side {
	jumps, leaf := path(r, DNATDispatch, DNATPrefix, func(_ int, p ports) Rule {
		return Rule{proto: r.Proto, dports: p}
	})
	s := Side{
		Path:  jumps,
		Jump:  Rule{Chain: leaf, proto: r.Proto, dports: ports{r.Port, r.Port}, Target: DNATChain(r)},
		first: r.IP.IsValid(), // before the row for any address, which would take the packet
		Rule: Rule{
			Chain: DNATChain(r), proto: r.Proto, Target: dnatTarget, to: r.Pod,
		},
	}

	if r.IP.IsValid() {
		s.Rule.dst = row.HostPrefix(r.IP)
	}

	return s
}

// MasqSide is for hairpin: a pod that meets itself has to see another source address,
// and so have its neighbours where there is a link. Every connection that anybody
// translates comes by, so those from outside the pods' networks, or not from the link,
// pass at the first jump.
//
// The rule has the row's comment, and no other does: a comment is a match, and
// the kernel visits each for every change, on the DNAT side twice (from
// PREROUTING and from OUTPUT), which there made a tenth of an Add at 5000 rows.
func MasqSide(r *row.Row) Side {
	pod := row.HostPrefix(r.Pod.Addr())
	first := Rule{src: podBlock(r.Pod.Addr())}
	jump := Rule{src: pod}
	rule := Rule{src: pod, dst: pod}

	if isPlain(r.Link) { // a pod is its own neighbour as well
		first, jump, rule = Rule{in: r.Link}, Rule{dst: pod}, Rule{dst: pod, in: r.Link}
	}

	jumps, leaf := path(r, MasqDispatch, MasqPrefix, func(level int, p ports) Rule {
		if level > 0 {
			return Rule{origPorts: p} // what gets there is of the protocol
		}

		first.proto, first.origPorts = r.Proto, p

		return first
	})

	jump.Chain, jump.Target = leaf, MasqChain(r)
	rule.Chain, rule.Target, rule.proto, rule.comment = MasqChain(r), masqTarget, r.Proto, r.Label
	rule.origPorts, rule.dports = ports{r.Port, r.Port}, ports{r.Pod.Port(), r.Pod.Port()}

	return Side{Path: jumps, Jump: jump, Rule: rule}
}

// isPlain reports whether iptables takes a name of an interface for what it is: to the
// kernel a quote is a letter as any other, and iptables takes "br+" for all that begin so.
func isPlain(device string) bool {
	return device != "" && device[0] != '-' && row.Harmless(device, "") == device
}

// SidesOf returns both sides of a row.
func SidesOf(r *row.Row) []Side { return []Side{DNATSide(r), MasqSide(r)} }

// DNATChain names the chain with the row's rule on the DNAT side.
func DNATChain(r *row.Row) string { return DNATPrefix + r.Hash }

// MasqChain names the one on the masquerade side.
func MasqChain(r *row.Row) string { return MasqPrefix + r.Hash }

// podBlock is the network that is taken for the pods' around a pod IP.
func podBlock(ip netip.Addr) netip.Prefix {
	bits := 64
	if ip.Is4() {
		bits = 16
	}

	return netip.PrefixFrom(ip, bits).Masked()
}

// Rule is a rule, as far as this package writes them.
type Rule struct {
	Chain     string
	src, dst  netip.Prefix
	notSrc    netip.Prefix
	notDst    netip.Prefix
	in, notIn string // interfaces
	notOut    string
	proto     row.Protocol
	comment   string
	match     string // matchLocal or matchDNATed
	origPorts ports  // the connection's destination port before DNAT
	dports    ports
	Target    string
	to        netip.AddrPort

	// notOrigSrc and notOrigDst are addresses of the connection before NAT.
	notOrigSrc, notOrigDst netip.Prefix

	// other is set for a rule with anything else in it.
	other bool
}

// String is the rule as iptables-restore takes it after -A and its like.
func (n Rule) String() string {
	b := make([]byte, 0, 128)
	b = append(b, n.Chain...)

	text := func(option, value, end string) {
		if value != "" {
			b = append(append(append(b, option...), value...), end...)
		}
	}
	prefix := func(option string, p netip.Prefix) {
		if p.IsValid() {
			b = p.AppendTo(append(b, option...))
		}
	}
	number := func(option string, p ports) {
		if p != (ports{}) {
			b = append(append(b, option...), p.String()...)
		}
	}

	prefix(" -s ", n.src)
	prefix(" -d ", n.dst)
	prefix(" ! -s ", n.notSrc)
	prefix(" ! -d ", n.notDst)
	text(" -i ", n.in, "")
	text(" ! -i ", n.notIn, "")
	text(" ! -o ", n.notOut, "")
	text(" -p ", string(n.proto), "")
	text(` -m comment --comment "`, n.comment, `"`)
	text(" ", n.match, "")
	prefix(" -m conntrack ! --ctorigsrc ", n.notOrigSrc)
	prefix(" -m conntrack ! --ctorigdst ", n.notOrigDst)
	number(" -m conntrack --ctorigdstport ", n.origPorts)
	number(" -m "+string(n.proto)+" --dport ", n.dports)
	text(" -j ", n.Target, "")

	if n.to.IsValid() {
		b = n.to.AppendTo(append(b, " --to-destination "...))
	}

	return string(b)
}

// parseRule reads a line "-A …" of iptables-save.
func parseRule(line string) Rule {
	n := Rule{}

	words, ok := splitWords(line)

	for len(words) > 0 {
		option := words[0]
		if option == "!" && len(words) > 1 {
			option += " " + words[1]
			words = words[1:]
		}

		if len(words) == 1 { // all that we write has a value
			ok = false

			break
		}

		if parseOption(&n, option, words[1]) {
			words = words[2:]
		} else { // and nobody knows how many values it has
			ok, words = false, words[1:]
		}
	}

	n.other = !ok

	return n
}

// parseOption reads one option with its value into n, and reports whether it
// knows it.
func parseOption(n *Rule, option, value string) (ok bool) {
	if field := prefixField(n, option); field != nil {
		*field, ok = parsePrefix(value)

		return ok
	}

	if field := deviceField(n, option); field != nil {
		*field = value

		return true
	}

	switch option {
	case "-A":
		n.Chain, ok = value, true
	case "-p":
		n.proto, ok = row.Protocol(value), true
	case "-m":
		ok = true // named by its option
	case "--comment":
		n.comment, ok = value, true
	case "--dst-type":
		n.match, ok = matchLocal, value == "LOCAL"
	case "--ctstate":
		n.match, ok = matchDNATed, value == "DNAT"
	case "--ctorigdstport":
		n.origPorts, ok = parsePorts(value)
	case "--dport":
		n.dports, ok = parsePorts(value)
	case "-j":
		n.Target, ok = value, true
	case "-g": // which we do not write
		n.Target = value
	case "--to-destination":
		to, err := netip.ParseAddrPort(value)
		n.to, ok = to, err == nil
	}

	return ok
}

// prefixField is the field of n for an option's addresses, or nil.
func prefixField(n *Rule, option string) *netip.Prefix {
	switch option {
	case "-s":
		return &n.src
	case "-d":
		return &n.dst
	case "! -s":
		return &n.notSrc
	case "! -d":
		return &n.notDst
	case "! --ctorigsrc":
		return &n.notOrigSrc
	case "! --ctorigdst":
		return &n.notOrigDst
	default:
		return nil
	}
}

// deviceField is the field of n for an option's interface, or nil.
func deviceField(n *Rule, option string) *string {
	switch option {
	case "-i":
		return &n.in
	case "! -i":
		return &n.notIn
	case "! -o":
		return &n.notOut
	default:
		return nil
	}
}

func parsePrefix(s string) (netip.Prefix, bool) {
	if ip, err := netip.ParseAddr(s); err == nil {
		return row.HostPrefix(ip), true
	}

	p, err := netip.ParsePrefix(s)

	return p, err == nil
}

func parsePorts(s string) (ports, bool) {
	first, last, isRange := strings.Cut(s, ":")
	if !isRange {
		last = first
	}

	lo, err1 := strconv.ParseUint(first, 10, 16)
	hi, err2 := strconv.ParseUint(last, 10, 16)

	return ports{uint16(lo), uint16(hi)}, err1 == nil && err2 == nil
}

// splitWords splits a line at spaces, with double quotes and backslashes as
// iptables-save writes them.
func splitWords(line string) (words []string, ok bool) {
	var (
		word           strings.Builder
		inWord, quoted bool
	)

	for i := 0; i < len(line); i++ {
		switch c := line[i]; {
		case c == '\\' && quoted && i+1 < len(line):
			i++
			word.WriteByte(line[i])
		case c == '"':
			quoted, inWord = !quoted, true
		case c == ' ' && !quoted:
			if inWord {
				words = append(words, word.String())
			}

			word.Reset()

			inWord = false
		default:
			word.WriteByte(c)

			inWord = true
		}
	}

	if inWord {
		words = append(words, word.String())
	}

	return words, !quoted
}
