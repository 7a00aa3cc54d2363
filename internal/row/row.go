package row

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

// Family is an IP family, by its version.
type Family string

// The families.
const (
	IPv4 Family = "4"
	IPv6 Family = "6"
)

// Protocol is a transport protocol by the name that iptables(8) gives it.
type Protocol string

// The protocols that have host ports.
const (
	TCP  Protocol = "tcp"
	UDP  Protocol = "udp"
	SCTP Protocol = "sctp"
)

// API is the name that Kubernetes gives it.
func (p Protocol) API() string { return strings.ToUpper(string(p)) }

// What the header of a packet has for them (IANA, Assigned Internet Protocol Numbers).
const (
	tcpNumber  = 6
	udpNumber  = 17
	sctpNumber = 132
)

// Number is what the header of a packet has for it.
func (p Protocol) Number() uint8 {
	switch p {
	case TCP:
		return tcpNumber
	case UDP:
		return udpNumber
	default:
		return sctpNumber
	}
}

// ProtocolOf is the protocol with a number; "" if it is none that has host ports.
func ProtocolOf(number uint8) Protocol {
	for _, p := range []Protocol{TCP, UDP, SCTP} {
		if p.Number() == number {
			return p
		}
	}

	return ""
}

// PortKey is what pods compete for within a family.
type PortKey struct {
	Proto Protocol
	Port  uint16
}

// Endpoint is the host side of a row.
type Endpoint struct {
	PortKey

	IP netip.Addr // the zero Addr: any address of the family
}

// Overlaps reports whether some packet is for both endpoints of one port.
func (e Endpoint) Overlaps(o Endpoint) bool {
	return e.IP == o.IP || !e.IP.IsValid() || !o.IP.IsValid()
}

// HostIP is the literal form of the address.
func (e Endpoint) HostIP(f Family) netip.Addr {
	if e.IP.IsValid() {
		return e.IP
	}

	return f.AnyAddr()
}

// Row is one line of the table: host endpoint → pod endpoint, and whose.
type Row struct {
	Endpoint

	Pod netip.AddrPort
	// Former are where the row led before it was moved: connections go on there.
	Former []netip.AddrPort
	Owner  Owner
	// Device is the interface to the pod; "" where it is not known. Link is the same if
	// the pod's neighbours there have to be masqueraded, see links, and else "".
	Device, Link string
	// OwnerHash is the comment of the row's element in nftables; "" where a row
	// was found in iptables.
	OwnerHash string
	// Hash names the row's chains in iptables. It is over the strings as the
	// caller gave them, so that it is the same in every process; "" where a row
	// was found in nftables.
	Hash string
	// Label is the comment that says whose the row is: pod and port, free of
	// anything that could end a quoted string.
	Label string
	// Misplaced is set for a row that does not stand where this package would put
	// it: CRI-O's, and those in another backend. The next Add of its pod that
	// has to do with its port moves it.
	Misplaced bool
	// Gone is set if a Remove of the row has failed.
	Gone bool
	// Depth is the level of the range chain that the row stands in, as the
	// iptables backend chose it.
	Depth int
}

// Owner is a pod. It is known only by the row's marks while ID is empty.
type Owner struct{ ID, Namespace, Name string }

// Known reports whether the pod is known by its id.
func (o Owner) Known() bool { return o.ID != "" }

// String is how errors name the pod.
func (o Owner) String() string {
	switch {
	case o.Namespace != "" && o.Name != "":
		return o.Namespace + "/" + o.Name
	case o.Name != "" || o.ID != "":
		return cmp.Or(o.Name, o.ID)
	default:
		return "unknown"
	}
}

// SetOwner makes o the owner of a row that the kernel has carried without.
func (r *Row) SetOwner(o Owner) {
	r.Owner, r.OwnerHash, r.Gone = o, ShortHash(o.ID), false
	r.Hash = cmp.Or(r.Hash, HashOf(o.ID, int32(r.Port), r.Proto.API(), r.HostIP(r.Family()).String()))
	r.Label = cmp.Or(r.Label, LabelOf(o, r.Port))
}

// OwnerMark is what the kernel carries of the owner.
func (r *Row) OwnerMark() string { return cmp.Or(r.OwnerHash, r.Hash) }

// SetDevice notes which interface leads to the pod, and whether the pod answers its
// neighbours there past the node.
func (r *Row) SetDevice(device string, bypassed bool) {
	r.Device, r.Link = device, ""
	if bypassed {
		r.Link = device
	}
}

// StandsFor reports whether there is nothing to do for w where r is: where it is not
// known by which interface w's pod is reached, r's is taken for it.
func (r *Row) StandsFor(w *Row) bool {
	return r.Endpoint == w.Endpoint && r.Pod == w.Pod && !r.Misplaced && (r.Link == w.Link || w.Device == "")
}

// MovesTo reports whether w takes over r's endpoint for the same pod, whose
// connections stay then.
func (r *Row) MovesTo(w *Row) bool {
	return r.Endpoint == w.Endpoint && r.Owner.Known() && r.Owner.ID == w.Owner.ID
}

// MovedFrom notes that r takes over from another row of its pod.
func (r *Row) MovedFrom(before *Row) {
	r.Former = before.Former
	if !r.HasLedTo(before.Pod) {
		r.Former = append(slices.Clip(r.Former), before.Pod)
	}
}

// HasLedTo reports whether a row leads to a pod endpoint, or did before it was moved.
func (r *Row) HasLedTo(pod netip.AddrPort) bool {
	return r.Pod == pod || slices.Contains(r.Former, pod)
}

// ForLoopback reports whether some loopback address leads to the row.
func (r *Row) ForLoopback() bool { return !r.IP.IsValid() || r.IP.IsLoopback() }

// Family is that of the pod's address.
func (r *Row) Family() Family { return FamilyOf(r.Pod.Addr()) }

func (r *Row) String() string {
	return fmt.Sprintf("%s %s -> %s", r.Proto.API(), netip.AddrPortFrom(r.HostIP(r.Family()), r.Port), r.Pod)
}

// FamilyOf is the family of an address.
func FamilyOf(ip netip.Addr) Family {
	if ip.Is4() {
		return IPv4
	}

	return IPv6
}

// AnyAddr stands for all addresses of the node.
func (f Family) AnyAddr() netip.Addr {
	if f == IPv4 {
		return netip.IPv4Unspecified()
	}

	return netip.IPv6Unspecified()
}

// Loopback is what addresses the node itself and never comes from elsewhere
// (RFC 1122, section 3.2.1.3; RFC 4291, section 2.5.3).
func (f Family) Loopback() netip.Prefix {
	if f == IPv4 {
		return netip.PrefixFrom(netip.AddrFrom4([4]byte{127}), 8)
	}

	return HostPrefix(netip.IPv6Loopback())
}

// LinkLocal is what addresses a machine on its own link alone, so that the kernel
// does not forward it (RFC 4291, section 2.5.6). IPv4's 169.254.0.0/16 it does.
func (f Family) LinkLocal() netip.Prefix {
	if f == IPv4 {
		return netip.Prefix{}
	}

	return netip.PrefixFrom(netip.AddrFrom16([16]byte{0xfe, 0x80}), 10) //nolint:mnd // fe80::/10
}

// LoopbackDevice is the interface of loopback addresses, in every network
// namespace.
const LoopbackDevice = "lo"

// HashLen is how much of a hash names and comments carry.
const HashLen = 16

// scopeLen is how much of that is the scope's, where an id has one. Of a hundred scopes two are
// alike once in 200,000 nodes, and what is left tells ten thousand rows apart as well.
const scopeLen = 6

// ShortHash is the form in which the kernel carries an id, or what begins with one. What stands
// before a slash is the id's scope, and can be told from it.
func ShortHash(id string) string {
	if scope, _, has := strings.Cut(id, scopeEnd); has {
		return scopeMark(scope) + hash(id)[:HashLen-scopeLen]
	}

	return hash(id)[:HashLen]
}

const scopeEnd = "/"

// scopeMark is of the scope with its end: an id that is spelled as the scope is not in it.
func scopeMark(scope string) string { return hash(scope + scopeEnd)[:scopeLen] }

func hash(s string) string {
	sum := sha256.Sum256([]byte(s))

	return base32.StdEncoding.EncodeToString(sum[:])
}

// InScope reports whether the id of r's owner has a scope. All rows are in "".
func (r *Row) InScope(scope string) bool {
	return scope == "" || strings.HasPrefix(r.OwnerMark(), scopeMark(scope))
}

// HashOf names a row's chains. It is the name that CRI-O gives them, so that
// either can remove what the other made.
func HashOf(id string, hostPort int32, protocol, hostIP string) string {
	return ShortHash(id + strconv.Itoa(int(hostPort)) + protocol + hostIP)
}

// HashedBy reports whether r's hash is one that id gives, in a spelling of
// protocol and host IP that callers use.
func (r *Row) HashedBy(id string) bool {
	protocols := []string{strings.ToUpper(string(r.Proto)), string(r.Proto)}
	if r.Proto == TCP {
		protocols = append(protocols, "")
	}

	hostIPs := []string{r.HostIP(r.Family()).String()}
	if !r.IP.IsValid() {
		hostIPs = append(hostIPs, "")
	} else if r.IP.Is4() {
		hostIPs = append(hostIPs, "::ffff:"+r.IP.String())
	}

	for _, p := range protocols {
		for _, ip := range hostIPs {
			if HashOf(id, int32(r.Port), p, ip) == r.Hash {
				return true
			}
		}
	}

	return false
}

// MaxLabel is what a rule comment may have in the kernel: 256 bytes with the
// final NUL (struct xt_comment_info, linux/netfilter/xt_comment.h).
const MaxLabel = 255

// LabelOf says in a rule comment whose row it is. Names come from users:
// what is not known to be harmless within quotes is replaced, for a quote and
// a newline in a name would otherwise be rules of the user's own.
func LabelOf(o Owner, port uint16) string {
	pod := o.Name
	if o.Namespace != "" {
		pod += "_" + o.Namespace
	}

	suffix := " hostport " + strconv.Itoa(int(port))
	pod = Harmless(pod, "")

	return pod[:min(len(pod), MaxLabel-len(suffix))] + suffix
}

// Harmless replaces everything but letters, digits and a few others.
func Harmless(s, others string) string {
	return strings.Map(func(c rune) rune {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', strings.ContainsRune("._-"+others, c):
			return c
		default:
			return '-'
		}
	}, s)
}

// Repair is what a backend has put right besides what it was asked for.
type Repair struct {
	What string
	Row  *Row // nil where it is not about one of the table
	// Shared is set where it may be about what all rows share, so that none of them worked.
	Shared bool
}

// HostPrefix is the network of one address alone.
func HostPrefix(ip netip.Addr) netip.Prefix { return netip.PrefixFrom(ip, ip.BitLen()) }
