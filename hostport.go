package hostport

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	v1 "k8s.io/api/core/v1"

	"github.com/cri-o/hostport/internal/row"
)

// IPFamily is an IP family, IPv4 or IPv6.
type IPFamily = row.Family

// The IP families.
const (
	IPv4 IPFamily = "4"
	IPv6 IPFamily = "6"
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

// PortMapping maps one host port. Its JSON, which has the names of the fields, stays as it
// is: CRI-O stores it in an annotation of the sandbox.
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

// Mapping is one row as Mappings and List have it.
type Mapping struct {
	// PodID, Namespace and Name are empty where only PodIDHash is known: for
	// rows from before a restart that no Add, Remove, Sync or Keep has named since.
	PodID, Namespace, Name string
	// PodIDHash is base32(sha256(PodID))[:16], which is what the kernel carries
	// of the owner with nftables. If PodID has a scope before its first slash, it is
	// base32(sha256(scope + "/"))[:6] and the first 10 of those: see WithScope. Of a row in iptables whose PodID is not known,
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
	// Held reports whether a socket of the manager holds the host port.
	Held bool
}

func parseProtocol(p v1.Protocol) (row.Protocol, bool) {
	switch l := row.Protocol(strings.ToLower(string(p))); l {
	case "":
		return row.TCP, true
	case row.TCP, row.UDP, row.SCTP:
		return l, true
	default:
		return "", false
	}
}

// rowsOf validates all of pod and returns its rows in the family of its IP,
// each once.
func rowsOf(id string, pod *PodPortMapping) ([]*row.Row, error) {
	if pod == nil || pod.HostNetwork {
		return nil, nil
	}

	o := row.Owner{ID: id, Namespace: pod.Namespace, Name: pod.Name}
	podIP, badIP := parsePodIP(pod.IP)

	var (
		rows      []*row.Row
		ownerHash string // of a pod that has rows; most have none
		seen      = map[row.Endpoint]*row.Row{}
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

		if f != "" && f != row.FamilyOf(podIP) {
			continue
		}

		if ownerHash == "" {
			ownerHash = row.ShortHash(id)
		}

		r := &row.Row{
			Endpoint:  e,
			Pod:       netip.AddrPortFrom(podIP, portOf(pm.ContainerPort)),
			Owner:     o,
			OwnerHash: ownerHash,
			Hash:      row.HashOf(id, pm.HostPort, string(pm.Protocol), pm.HostIP),
			Label:     row.LabelOf(o, e.Port),
		}

		if first, twice := seen[e]; !twice {
			seen[e] = r
			rows = append(rows, r)
		} else if first.Pod != r.Pod {
			return nil, invalid(fmt.Errorf("containerPort %d: want %d, as in an earlier row of the same host port",
				pm.ContainerPort, first.Pod.Port()))
		}
	}

	return rows, nil
}

// refusal says what keeps a mapping with an endpoint from being a row of a pod, and
// what would not. badIP is what is wrong with podIP, if anything.
func refusal(id string, podIP net.IP, badIP string, pm *PortMapping, e row.Endpoint) error {
	switch kind := noMachine(e.IP); {
	case kind != "":
		return fmt.Errorf("hostIP %q (%s): %s", pm.HostIP, kind, wantHostIP)
	case portOf(pm.ContainerPort) == 0:
		return fmt.Errorf("containerPort %d: %s", pm.ContainerPort, wantPort)
	case badIP != "":
		return fmt.Errorf("pod IP %s (%s): %s", podIP, badIP, wantPodIP)
	case id == "":
		return errNoID
	default:
		return nil
	}
}

// podRows are the rows of one pod in one family, as it is to have them.
type podRows struct {
	owner row.Owner
	rows  []*row.Row
	// stays is set where that cannot be told: what stands of the pod stays as it is.
	stays bool
}

// unknownIn is how many pods stay as they are.
func unknownIn(pods []podRows) (count int) {
	for _, pod := range pods {
		if pod.stays {
			count++
		}
	}

	return count
}

// rowsOfPod is rowsOf for all IPs of a pod, by family. Where that fails, or the IP of a family
// is not known, what stands there stays.
func rowsOfPod(id string, mappings []*PodPortMapping) (map[IPFamily]podRows, error) {
	var (
		owner     = row.Owner{ID: id}
		rows      = map[IPFamily][]*row.Row{}
		ipUnknown bool
		err       error
	)

	for _, mapping := range mappings {
		if mapping == nil {
			continue
		}

		owner.Namespace, owner.Name = mapping.Namespace, mapping.Name

		if len(mapping.IP) == 0 && hasHostPorts(mapping) {
			ipUnknown = true

			continue
		}

		var some []*row.Row

		if some, err = rowsOf(id, mapping); err == nil && len(some) > 0 {
			f := some[0].Family()
			rows[f], err = merge(rows[f], some)
		}

		if err != nil {
			rows = nil

			break
		}
	}

	pod := map[IPFamily]podRows{}
	for _, f := range []IPFamily{IPv4, IPv6} {
		pod[f] = podRows{owner: owner, rows: rows[f], stays: err != nil || ipUnknown && len(rows[f]) == 0}
	}

	return pod, err
}

// merge returns a pod's rows in one family with more of its rows there. Of several IPs the first
// one counts.
func merge(rows, more []*row.Row) ([]*row.Row, error) {
	if len(rows) == 0 {
		return more, nil
	}

	byEndpoint := map[row.Endpoint]*row.Row{}
	for _, r := range rows {
		byEndpoint[r.Endpoint] = r
	}

	for _, r := range more {
		switch first := byEndpoint[r.Endpoint]; {
		case r.Pod.Addr() != rows[0].Pod.Addr():
		case first == nil:
			rows = append(rows, r)
		case first.Pod != r.Pod:
			return nil, fmt.Errorf("pod %s: %w: row %s: want %s, as in an earlier mapping of the pod",
				r.Owner, ErrInvalidMapping, r, first.Pod)
		}
	}

	return rows, nil
}

func hasHostPorts(pod *PodPortMapping) bool {
	return !pod.HostNetwork && slices.ContainsFunc(pod.PortMappings, func(pm *PortMapping) bool { return pm != nil && pm.HostPort != 0 })
}

// ref is a row as Remove names it: without the pod's side.
type ref struct {
	row.Endpoint

	hash string
}

// refsOf returns pod's rows in family f, leaving out those that cannot be in
// the kernel. An address that Add refuses can, from before.
func refsOf(id string, pod *PodPortMapping, f IPFamily) []ref {
	var claims []ref

	for _, pm := range pod.PortMappings {
		if pm == nil || pm.HostPort == 0 {
			continue
		}

		if e, ef, bad := endpointOf(pm); bad == nil && (ef == "" || ef == f) {
			claims = append(claims, ref{e, row.HashOf(id, pm.HostPort, string(pm.Protocol), pm.HostIP)})
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
func endpointOf(pm *PortMapping) (row.Endpoint, IPFamily, error) {
	proto, ok := parseProtocol(pm.Protocol)
	if !ok {
		return row.Endpoint{}, "", fmt.Errorf("protocol %q: %s", pm.Protocol, wantProtocol)
	}

	e := row.Endpoint{PortKey: row.PortKey{Proto: proto, Port: portOf(pm.HostPort)}}
	if e.Port == 0 {
		return row.Endpoint{}, "", fmt.Errorf("hostPort %d: %s", pm.HostPort, wantPort)
	}

	if pm.HostIP == "" {
		return e, "", nil
	}

	ip, err := netip.ParseAddr(pm.HostIP)
	if err != nil || ip.Zone() != "" {
		return row.Endpoint{}, "", fmt.Errorf("hostIP %q: %s", pm.HostIP, wantHostIP)
	}

	if ip = ip.Unmap(); !ip.IsUnspecified() {
		e.IP = ip
	}

	return e, row.FamilyOf(ip), nil
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
