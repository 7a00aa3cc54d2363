package hostport

import (
	"cmp"
	"crypto/sha256"
	"encoding/base32"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	v1 "k8s.io/api/core/v1"
)

type ipFamily string

// The IP families.
const (
	IPv4 ipFamily = "4"
	IPv6 ipFamily = "6"
)

// PodPortMapping says which host ports a pod wants.
type PodPortMapping struct {
	// Namespace and Name are for errors, logs and rule comments. Either may be
	// empty.
	Namespace, Name string
	// PortMappings are the rows. Those of the other IP family than IP's are
	// skipped, so that a dual-stack pod is two Adds with the same mappings.
	PortMappings []*PortMapping
	// HostNetwork pods have no host ports: Add and Remove do nothing.
	HostNetwork bool
	// IP is the pod's address, one that the node can forward to: not unspecified,
	// loopback, multicast, of 0.0.0.0/8 or 240.0.0.0/4, and in IPv6 not link-local.
	// Remove does not need it.
	IP net.IP
}

// PortMapping maps one host port.
type PortMapping struct {
	// HostPort is 1 to 65535; 0 stands for none, and the mapping is skipped.
	HostPort int32
	// ContainerPort is 1 to 65535.
	ContainerPort int32
	// Protocol is TCP, UDP or SCTP in any case; "" is TCP.
	Protocol v1.Protocol
	// HostIP is the address on the node: "" for any in the pod's family,
	// "0.0.0.0" and "::" for any in theirs, else a literal IP without zone, not
	// multicast, of 0.0.0.0/8 or 240.0.0.0/4. It need not be on the node (yet).
	// "::ffff:192.0.2.1" is 192.0.2.1.
	HostIP string
}

// Mapping is one row as Mappings lists it.
type Mapping struct {
	// PodID, Namespace and Name are empty where only PodIDHash is known: for
	// rows from before a restart that no Add, Remove or Sync has named since.
	PodID, Namespace, Name string
	// PodIDHash is base32(sha256(PodID))[:16], which is what the kernel carries
	// of the owner with nftables. Of a row in iptables whose PodID is not known,
	// it is the hash in the names of its chains, which covers port, protocol and
	// host IP as well.
	PodIDHash string
	// Protocol is TCP, UDP or SCTP.
	Protocol v1.Protocol
	// HostIP is "0.0.0.0" or "::" where the row is for any address.
	HostIP string
	// HostPort and ContainerPort are 1 to 65535.
	HostPort, ContainerPort int32
	// PodIP is where the row leads.
	PodIP net.IP
	// Backend carries the row.
	Backend Backend
	// Held tells whether a socket of this process holds the host port.
	Held bool
}

// protocol is a transport protocol by the name that iptables(8) gives it.
type protocol string

const (
	tcp  protocol = "tcp"
	udp  protocol = "udp"
	sctp protocol = "sctp"
)

func parseProtocol(p v1.Protocol) (protocol, bool) {
	switch l := protocol(strings.ToLower(string(p))); l {
	case "":
		return tcp, true
	case tcp, udp, sctp:
		return l, true
	default:
		return "", false
	}
}

func (p protocol) api() v1.Protocol { return v1.Protocol(strings.ToUpper(string(p))) }

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
func (e endpoint) hostIP(f ipFamily) netip.Addr {
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
	r.hash = cmp.Or(r.hash, rowHash(o.id, int32(r.port), string(r.proto.api()), r.hostIP(r.family()).String()))
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

func (r *row) family() ipFamily { return familyOf(r.pod.Addr()) }

func (r *row) String() string {
	return fmt.Sprintf("%s %s -> %s", r.proto.api(), netip.AddrPortFrom(r.hostIP(r.family()), r.port), r.pod)
}

func familyOf(ip netip.Addr) ipFamily {
	if ip.Is4() {
		return IPv4
	}

	return IPv6
}

func (f ipFamily) anyAddr() netip.Addr {
	if f == IPv4 {
		return netip.IPv4Unspecified()
	}

	return netip.IPv6Unspecified()
}

// loopback is what addresses the node itself and never comes from elsewhere
// (RFC 1122, section 3.2.1.3; RFC 4291, section 2.5.3).
func (f ipFamily) loopback() netip.Prefix {
	if f == IPv4 {
		return netip.PrefixFrom(netip.AddrFrom4([4]byte{127}), 8)
	}

	return hostPrefix(netip.IPv6Loopback())
}

// linkLocal is what addresses a machine on its own link alone, so that the kernel
// does not forward it (RFC 4291, section 2.5.6). IPv4's 169.254.0.0/16 it does.
func (f ipFamily) linkLocal() netip.Prefix {
	if f == IPv4 {
		return netip.Prefix{}
	}

	return netip.PrefixFrom(netip.AddrFrom16([16]byte{0xfe, 0x80}), 10) //nolint:mnd // fe80::/10
}

// loopbackDevice is the interface of loopback addresses, in every network
// namespace.
const loopbackDevice = "lo"

// rowsOf validates all of pod and returns its rows in the family of its IP,
// each once.
func rowsOf(id string, pod *PodPortMapping) ([]*row, error) {
	if pod == nil || pod.HostNetwork {
		return nil, nil
	}

	o := owner{id: id, namespace: pod.Namespace, name: pod.Name}
	podIP, badIP := parsePodIP(pod.IP)

	var (
		rows      []*row
		ownerHash string // of a pod that has rows; most have none
		seen      = map[endpoint]*row{}
	)

	for i, pm := range pod.PortMappings {
		if pm == nil || pm.HostPort == 0 {
			continue
		}

		invalid := func(err error) error {
			return fmt.Errorf("pod %s: %w: row %d (hostPort %d): %w", o, ErrInvalidMapping, i, pm.HostPort, err)
		}

		e, f, err := endpointOf(pm)
		if err == nil {
			err = refusal(id, pod.IP, badIP, pm, e)
		}

		if err != nil {
			return nil, invalid(err)
		}

		if f != "" && f != familyOf(podIP) {
			continue
		}

		if ownerHash == "" {
			ownerHash = shortHash(id)
		}

		r := &row{
			endpoint:  e,
			pod:       netip.AddrPortFrom(podIP, portOf(pm.ContainerPort)),
			owner:     o,
			ownerHash: ownerHash,
			hash:      rowHash(id, pm.HostPort, string(pm.Protocol), pm.HostIP),
			label:     ruleLabel(o, e.port),
		}

		if first, twice := seen[e]; !twice {
			seen[e] = r
			rows = append(rows, r)
		} else if first.pod != r.pod {
			return nil, invalid(fmt.Errorf("containerPort %d: want %d, as in an earlier row of the same host port",
				pm.ContainerPort, first.pod.Port()))
		}
	}

	return rows, nil
}

// refusal says what keeps a mapping with an endpoint from being a row of a pod, and
// what would not. badIP is what is wrong with podIP, if anything.
func refusal(id string, podIP net.IP, badIP string, pm *PortMapping, e endpoint) error {
	switch kind := noMachine(e.ip); {
	case kind != "":
		return fmt.Errorf("hostIP %q (%s): %s", pm.HostIP, kind, wantHostIP)
	case portOf(pm.ContainerPort) == 0:
		return fmt.Errorf("containerPort %d: %s", pm.ContainerPort, wantPort)
	case badIP != "":
		return fmt.Errorf("pod IP %s (%s): %s", podIP, badIP, wantPodIP)
	case id == "":
		return errors.New(`sandbox id "": want one for each pod`)
	default:
		return nil
	}
}

// rowsOfPod is rowsOf for all IPs of a pod, by family.
func rowsOfPod(id string, mappings []*PodPortMapping) (map[ipFamily][]*row, owner, error) {
	o := owner{id: id}
	rows := map[ipFamily][]*row{}
	seen := map[ipFamily]map[endpoint]netip.AddrPort{IPv4: {}, IPv6: {}}

	for _, pod := range mappings {
		if pod == nil {
			continue
		}

		o.namespace, o.name = pod.Namespace, pod.Name

		some, err := rowsOf(id, pod)
		if err != nil {
			return nil, o, err
		}

		for _, r := range some {
			f := r.family()

			if other, twice := seen[f][r.endpoint]; !twice {
				seen[f][r.endpoint] = r.pod
				rows[f] = append(rows[f], r)
			} else if other != r.pod {
				return nil, o, fmt.Errorf("pod %s: %w: row %s: want %s, as in an earlier mapping of the pod",
					o, ErrInvalidMapping, r, other)
			}
		}
	}

	return rows, o, nil
}

// claim is a row as Remove names it: without the pod's side.
type claim struct {
	endpoint

	hash string
}

// claimsOf returns pod's rows in family f, leaving out those that cannot be in
// the kernel. An address that Add refuses can, from before.
func claimsOf(id string, pod *PodPortMapping, f ipFamily) []claim {
	var claims []claim

	for _, pm := range pod.PortMappings {
		if pm == nil || pm.HostPort == 0 {
			continue
		}

		if e, ef, bad := endpointOf(pm); bad == nil && (ef == "" || ef == f) {
			claims = append(claims, claim{e, rowHash(id, pm.HostPort, string(pm.Protocol), pm.HostIP)})
		}
	}

	return claims
}

// What is allowed, for errors.
const (
	wantPort     = "want 1 to 65535"
	wantProtocol = "want TCP, UDP or SCTP"
	wantHostIP   = `want an IP address that a node can have, without zone, or "", "0.0.0.0" or "::" for any`
	wantPodIP    = "want an IP address that a node can forward to"
)

// endpointOf returns the host side of a mapping and the family that its host
// IP confines it to, "" where that is left to the pod IP. Its error names the
// field.
func endpointOf(pm *PortMapping) (endpoint, ipFamily, error) {
	proto, ok := parseProtocol(pm.Protocol)
	if !ok {
		return endpoint{}, "", fmt.Errorf("protocol %q: %s", pm.Protocol, wantProtocol)
	}

	e := endpoint{portKey: portKey{proto: proto, port: portOf(pm.HostPort)}}
	if e.port == 0 {
		return endpoint{}, "", fmt.Errorf("hostPort %d: %s", pm.HostPort, wantPort)
	}

	if pm.HostIP == "" {
		return e, "", nil
	}

	ip, err := netip.ParseAddr(pm.HostIP)
	if err != nil || ip.Zone() != "" {
		return endpoint{}, "", fmt.Errorf("hostIP %q: %s", pm.HostIP, wantHostIP)
	}

	if ip = ip.Unmap(); !ip.IsUnspecified() {
		e.ip = ip
	}

	return e, familyOf(ip), nil
}

// portOf is p as a port number, and 0 if it is none.
func portOf(p int32) uint16 {
	if p < 1 || p > 65535 {
		return 0
	}

	return uint16(p)
}

// parsePodIP returns ip, and what makes it no address of a pod, "" where it may be
// one's.
func parsePodIP(ip net.IP) (netip.Addr, string) {
	addr, ok := netip.AddrFromSlice(ip)
	addr = addr.Unmap()

	switch {
	case len(ip) == 0:
		return addr, "missing"
	case !ok:
		return addr, "neither 4 nor 16 bytes"
	case addr.IsUnspecified():
		return addr, "unspecified"
	case addr.IsLoopback(): // each machine's own: RFC 1122, section 3.2.1.3; RFC 4291, section 2.5.3
		return addr, "loopback"
	case addr.Is6() && addr.IsLinkLocalUnicast():
		// Routers do not forward it (RFC 4291, section 2.5.6), and neither does the
		// kernel. It does forward IPv4's, 169.254.0.0/16.
		return addr, "link-local"
	default:
		return addr, noMachine(addr)
	}
}

// noMachine says what keeps ip from being the address of one machine, "" where
// nothing does. No packet that a row is for goes to such an address, nor does any
// reach a pod there.
//
// Only the node knows which address is the broadcast address of a network.
func noMachine(ip netip.Addr) string {
	switch {
	case ip.IsMulticast(): // a group of machines: RFC 1112, section 4; RFC 4291, section 2.7
		return "multicast"
	case ip == netip.AddrFrom4([4]byte{255, 255, 255, 255}): // all machines of a link: RFC 919, section 7
		return "broadcast"
	case ip.Is4() && ip.As4()[0] == 0:
		// Never a destination (RFC 1122, section 3.2.1.3), though Linux 5.3 and later
		// would carry it.
		return "of 0.0.0.0/8"
	case ip.Is4() && ip.As4()[0] >= 0xf0: // reserved (RFC 1112, section 4), though the kernel would carry it
		return "of 240.0.0.0/4"
	default:
		return ""
	}
}

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
