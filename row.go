package hostport

import (
	"cmp"
	"crypto/sha256"
	"encoding/base32"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// family is an IP family, by its version.
type family string

// The families.
const (
	ipv4 family = "4"
	ipv6 family = "6"
)

// protocol is a transport protocol by the name that iptables(8) gives it.
type protocol string

// The protocols that have host ports.
const (
	tcp  protocol = "tcp"
	udp  protocol = "udp"
	sctp protocol = "sctp"
)

// api is the name that Kubernetes gives it.
func (p protocol) api() string { return strings.ToUpper(string(p)) }

// What the header of a packet has for them (IANA, Assigned Internet Protocol Numbers).
const (
	tcpNumber  = 6
	udpNumber  = 17
	sctpNumber = 132
)

// number is what the header of a packet has for it.
func (p protocol) number() uint8 {
	switch p {
	case tcp:
		return tcpNumber
	case udp:
		return udpNumber
	default:
		return sctpNumber
	}
}

// protocolOf is the protocol with a number; "" if it is none that has host ports.
func protocolOf(number uint8) protocol {
	for _, p := range []protocol{tcp, udp, sctp} {
		if p.number() == number {
			return p
		}
	}

	return ""
}

// portKey is what pods compete for within a family.
type portKey struct {
	proto protocol
	port  uint16
}

// endpoint is the host side of a row.
type endpoint struct {
	portKey

	ip netip.Addr // the zero Addr: any address of the family
}

// overlaps tells whether some packet is for both endpoints of one port.
func (e endpoint) overlaps(o endpoint) bool {
	return e.ip == o.ip || !e.ip.IsValid() || !o.ip.IsValid()
}

// hostIP is the literal form of the address.
func (e endpoint) hostIP(f family) netip.Addr {
	if e.ip.IsValid() {
		return e.ip
	}

	return f.anyAddr()
}

// row is one line of the table: host endpoint → pod endpoint, and whose.
type row struct {
	endpoint

	pod netip.AddrPort
	// former are where the row led before it was moved: connections go on there.
	former []netip.AddrPort
	owner  owner
	// device is the interface to the pod; "" where it is not known. link is the same if
	// the pod's neighbours there have to be masqueraded, see links, and else "".
	device, link string
	// ownerHash is the comment of the row's element in nftables; "" where a row
	// was found in iptables.
	ownerHash string
	// hash names the row's chains in iptables. It is over the strings as the
	// caller gave them, so that it is the same in every process; "" where a row
	// was found in nftables.
	hash string
	// label is the comment that says whose the row is: pod and port, free of
	// anything that could end a quoted string.
	label string
	// astray is set for a row that does not stand where this package would put
	// it: CRI-O's, and those in another backend. The next Add of its pod that
	// has to do with its port moves it.
	astray bool
	// gone is set if a Remove of the row has failed.
	gone bool
	// depth is the level of the range chain that the row stands in, as the
	// iptables backend chose it.
	depth int
}

// owner is a pod. It is known only by the row's marks while id is empty.
type owner struct{ id, namespace, name string }

// known reports whether the pod is known by its id.
func (o owner) known() bool { return o.id != "" }

// String is how errors name the pod.
func (o owner) String() string {
	switch {
	case o.namespace != "" && o.name != "":
		return o.namespace + "/" + o.name
	case o.name != "" || o.id != "":
		return cmp.Or(o.name, o.id)
	default:
		return "unknown"
	}
}

// setOwner makes o the owner of a row that the kernel has carried without.
func (r *row) setOwner(o owner) {
	r.owner, r.ownerHash, r.gone = o, shortHash(o.id), false
	r.hash = cmp.Or(r.hash, rowHash(o.id, int32(r.port), r.proto.api(), r.hostIP(r.family()).String()))
	r.label = cmp.Or(r.label, ruleLabel(o, r.port))
}

// ownerMark is what the kernel carries of the owner.
func (r *row) ownerMark() string { return cmp.Or(r.ownerHash, r.hash) }

// setDevice notes which interface leads to the pod, and whether the pod answers its
// neighbours there past the node.
func (r *row) setDevice(device string, bypassed bool) {
	r.device, r.link = device, ""
	if bypassed {
		r.link = device
	}
}

// standsFor reports whether there is nothing to do for w where r is: where it is not
// known by which interface w's pod is reached, r's is taken for it.
func (r *row) standsFor(w *row) bool {
	return r.endpoint == w.endpoint && r.pod == w.pod && !r.astray && (r.link == w.link || w.device == "")
}

// movesTo reports whether w takes over r's endpoint for the same pod, whose
// connections stay then.
func (r *row) movesTo(w *row) bool {
	return r.endpoint == w.endpoint && r.owner.known() && r.owner.id == w.owner.id
}

// movedFrom notes that r takes over from another row of its pod.
func (r *row) movedFrom(before *row) {
	r.former = before.former
	if !r.hasLedTo(before.pod) {
		r.former = append(slices.Clip(r.former), before.pod)
	}
}

// hasLedTo reports whether a row leads to a pod endpoint, or did before it was moved.
func (r *row) hasLedTo(pod netip.AddrPort) bool {
	return r.pod == pod || slices.Contains(r.former, pod)
}

// forLoopback tells whether some loopback address leads to the row.
func (r *row) forLoopback() bool { return !r.ip.IsValid() || r.ip.IsLoopback() }

// family is that of the pod's address.
func (r *row) family() family { return familyOf(r.pod.Addr()) }

func (r *row) String() string {
	return fmt.Sprintf("%s %s -> %s", r.proto.api(), netip.AddrPortFrom(r.hostIP(r.family()), r.port), r.pod)
}

// familyOf is the family of an address.
func familyOf(ip netip.Addr) family {
	if ip.Is4() {
		return ipv4
	}

	return ipv6
}

// anyAddr stands for all addresses of the node.
func (f family) anyAddr() netip.Addr {
	if f == ipv4 {
		return netip.IPv4Unspecified()
	}

	return netip.IPv6Unspecified()
}

// loopback is what addresses the node itself and never comes from elsewhere
// (RFC 1122, section 3.2.1.3; RFC 4291, section 2.5.3).
func (f family) loopback() netip.Prefix {
	if f == ipv4 {
		return netip.PrefixFrom(netip.AddrFrom4([4]byte{127}), 8)
	}

	return hostPrefix(netip.IPv6Loopback())
}

// linkLocal is what addresses a machine on its own link alone, so that the kernel
// does not forward it (RFC 4291, section 2.5.6). IPv4's 169.254.0.0/16 it does.
func (f family) linkLocal() netip.Prefix {
	if f == ipv4 {
		return netip.Prefix{}
	}

	return netip.PrefixFrom(netip.AddrFrom16([16]byte{0xfe, 0x80}), 10) //nolint:mnd // fe80::/10
}

// loopbackDevice is the interface of loopback addresses, in every network
// namespace.
const loopbackDevice = "lo"

// hashLen is how much of a hash names and comments carry.
const hashLen = 16

// shortHash is the form in which the kernel carries what it cannot spell out.
func shortHash(s string) string {
	sum := sha256.Sum256([]byte(s))

	return base32.StdEncoding.EncodeToString(sum[:])[:hashLen]
}

// rowHash names a row's chains. It is the name that CRI-O gives them, so that
// either can remove what the other made.
func rowHash(id string, hostPort int32, protocol, hostIP string) string {
	return shortHash(id + strconv.Itoa(int(hostPort)) + protocol + hostIP)
}

// hashedBy tells whether r's hash is one that id gives, in a spelling of
// protocol and host IP that callers use.
func (r *row) hashedBy(id string) bool {
	protocols := []string{strings.ToUpper(string(r.proto)), string(r.proto)}
	if r.proto == tcp {
		protocols = append(protocols, "")
	}

	hostIPs := []string{r.hostIP(r.family()).String()}
	if !r.ip.IsValid() {
		hostIPs = append(hostIPs, "")
	} else if r.ip.Is4() {
		hostIPs = append(hostIPs, "::ffff:"+r.ip.String())
	}

	for _, p := range protocols {
		for _, ip := range hostIPs {
			if rowHash(id, int32(r.port), p, ip) == r.hash {
				return true
			}
		}
	}

	return false
}

// maxLabel is what a rule comment may have in the kernel: 256 bytes with the
// final NUL (struct xt_comment_info, linux/netfilter/xt_comment.h).
const maxLabel = 255

// ruleLabel says in a rule comment whose row it is. Names come from users:
// what is not known to be harmless within quotes is replaced, for a quote and
// a newline in a name would otherwise be rules of the user's own.
func ruleLabel(o owner, port uint16) string {
	pod := o.name
	if o.namespace != "" {
		pod += "_" + o.namespace
	}

	suffix := " hostport " + strconv.Itoa(int(port))
	pod = harmless(pod, "")

	return pod[:min(len(pod), maxLabel-len(suffix))] + suffix
}

// harmless replaces everything but letters, digits and a few others.
func harmless(s, others string) string {
	return strings.Map(func(c rune) rune {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', strings.ContainsRune("._-"+others, c):
			return c
		default:
			return '-'
		}
	}, s)
}

// hostPrefix is the network of one address alone.
func hostPrefix(ip netip.Addr) netip.Prefix { return netip.PrefixFrom(ip, ip.BitLen()) }
