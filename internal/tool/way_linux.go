package tool

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/cri-o/hostport/internal/nodeaddr"
	"github.com/cri-o/hostport/internal/row"
)

// way is how the node gets to an address.
type way struct {
	device string
	// obstacle is what is in the way, as far as the kernel knows; "" if nothing is.
	obstacle string
	// unknown is why it is not known, "" if it is.
	unknown string
}

// network is what the node knows of machines that it reaches directly. It is read once for many
// questions: there may be thousands.
type network struct {
	links      map[int]netlink.Link
	neighbours map[neighbour]int // states
	// uplinks are the interfaces with the default routes, "" where there is none.
	uplinks map[row.Family]string
}

// neighbour is an address behind an interface.
type neighbour struct {
	ip   netip.Addr
	link int
}

// readNetwork returns what could be read, and why the rest could not.
func readNetwork() (*network, error) {
	n := &network{links: map[int]netlink.Link{}, neighbours: map[neighbour]int{}, uplinks: map[row.Family]string{}}

	links, err := whole(netlink.LinkList)
	for _, l := range links {
		n.links[l.Attrs().Index] = l
	}

	neighbours, neighboursErr := whole(func() ([]netlink.Neigh, error) { return netlink.NeighList(0, netlink.FAMILY_ALL) })
	for _, neigh := range neighbours {
		ip, _ := netip.AddrFromSlice(neigh.IP)
		n.neighbours[neighbour{ip.Unmap(), neigh.LinkIndex}] = neigh.State
	}

	errs := []error{err, neighboursErr}

	for _, f := range []row.Family{row.IPv4, row.IPv6} {
		routes, err := whole(func() ([]netlink.Route, error) { return netlink.RouteList(nil, familyOf(f)) })
		errs = append(errs, err)

		if i := slices.IndexFunc(routes, isDefault); i >= 0 && n.links[routes[i].LinkIndex] != nil {
			n.uplinks[f] = n.links[routes[i].LinkIndex].Attrs().Name
		}
	}

	return n, errors.Join(errs...)
}

// familyOf is the kernel's number of a family.
func familyOf(f row.Family) int {
	if f == row.IPv6 {
		return unix.AF_INET6
	}

	return unix.AF_INET
}

// isDefault reports whether a route is one to everywhere.
func isDefault(r netlink.Route) bool { return r.Dst == nil || r.Dst.IP.IsUnspecified() }

// refused reports whether an error of a look-up is what the routes themselves say: none, unreachable,
// prohibit, blackhole, throw (fib_props in net/ipv4/fib_semantics.c).
func refused(err error) bool {
	return slices.ContainsFunc([]error{unix.ENETUNREACH, unix.EHOSTUNREACH, unix.EACCES, unix.EINVAL, unix.EAGAIN},
		func(e error) bool { return errors.Is(err, e) })
}

// wayTo looks up the way to a pod.
func (n *network) wayTo(pod netip.Addr) way {
	routes, err := netlink.RouteGetWithOptions(pod.AsSlice(), &netlink.RouteGetOptions{FIBMatch: true})

	switch {
	case errors.Is(err, unix.ENETUNREACH):
		return way{obstacle: fmt.Sprintf("the node has no route to %s: the pod is gone, or its network is", pod)}
	case refused(err):
		return way{obstacle: fmt.Sprintf("the node's route to %s leads nowhere (ip route get %s: %v)", pod, pod, err)}
	case err != nil:
		return way{unknown: fmt.Sprintf("the route to %s cannot be looked up: %v", pod, err)}
	}

	link := n.links[routes[0].LinkIndex]
	if link == nil {
		return way{unknown: fmt.Sprintf("the interface to %s is not known", pod)}
	}

	w := way{device: link.Attrs().Name}
	if routes[0].Type == unix.RTN_LOCAL {
		w.device = row.LoopbackDevice // whichever has the address
	}

	switch state := link.Attrs().OperState; {
	case isDefault(routes[0]):
		w.obstacle = fmt.Sprintf("the node has no route to %s but the default one, over %s: the pod is gone, or its network is",
			pod, w.device)
	case link.Attrs().Flags&net.FlagUp == 0:
		w.obstacle = fmt.Sprintf("interface %s, which leads to %s, is down", w.device, pod)
	case state == netlink.OperLowerLayerDown || state == netlink.OperDown:
		w.obstacle = fmt.Sprintf("interface %s, which leads to %s, has no carrier: the pod's link is down", w.device, pod)
	case n.neighbours[neighbour{pod, routes[0].LinkIndex}]&(netlink.NUD_FAILED|netlink.NUD_INCOMPLETE) != 0:
		w.obstacle = n.nobodyAt(w.device, pod)
	}

	return w
}

// whole repeats a dump during which something has changed, so that some may be missing
// (NLM_F_DUMP_INTR).
func whole[T any](dump func() (T, error)) (list T, err error) {
	const most = 10

	for range most {
		if list, err = dump(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}

	return list, err
}

// nobodyAt says why no machine may answer for an address.
func (n *network) nobodyAt(device string, ip netip.Addr) string {
	text := fmt.Sprintf("no machine on %s answers for %s", device, ip)

	if dead := n.dead(device); dead != "" {
		return text + dead
	}

	return text + ": the pod is gone, and its row has leaked; or the route is wrong, or a rule of the bridge drops what it says"
}

// dead names the ports of a bridge that have no carrier, "" if all have one.
func (n *network) dead(bridge string) string {
	var dead []string

	for _, l := range n.links {
		a := l.Attrs()
		if master := n.links[a.MasterIndex]; master != nil && master.Attrs().Name == bridge &&
			a.OperState != netlink.OperUp && a.OperState != netlink.OperUnknown {
			dead = append(dead, a.Name)
		}
	}

	if len(dead) == 0 {
		return ""
	}

	slices.Sort(dead)

	return ": the pod's link is down (no carrier: " + strings.Join(dead, ", ") + ")"
}

// lacksAddress says that an address is none of the node's, nothing of the zero Addr, which is any.
func lacksAddress(ip netip.Addr) []string {
	if !ip.IsValid() || isLocal(ip) {
		return nil
	}

	return []string{fmt.Sprintf("the node does not have the address %s", ip)}
}

// isLocal reports whether an address is one of the node's, as far as that can be looked up.
func isLocal(ip netip.Addr) bool {
	routes, err := netlink.RouteGet(ip.AsSlice())
	if err != nil {
		return !refused(err)
	}

	return routes[0].Type == unix.RTN_LOCAL
}

// nodeAddress chooses an address of the node for packets to a row: the one asked for, else that of
// the interface with the default route, else of one that does not lead to the pod, which device does.
func (n *network) nodeAddress(asked netip.Addr, f row.Family, device string) (netip.Addr, error) {
	if asked.IsValid() {
		return asked, nil
	}

	addrs, err := whole(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, familyOf(f)) })
	if err != nil {
		return netip.Addr{}, fmt.Errorf("look up the node's addresses: %w", err)
	}

	var chosen netip.Addr

	for _, a := range addrs {
		ip, ok := netip.AddrFromSlice(a.IP)
		if ip = ip.Unmap(); !ok || !ip.IsGlobalUnicast() {
			continue
		}

		link := n.links[a.LinkIndex]
		if link == nil || link.Attrs().Name == nodeaddr.ServiceDevice {
			continue
		}

		switch name := link.Attrs().Name; {
		case name == n.uplinks[f]:
			return ip, nil
		case !chosen.IsValid() || name != device:
			chosen = ip
		}
	}

	if !chosen.IsValid() {
		return netip.Addr{}, errors.New("the node has no address of this family")
	}

	return chosen, nil
}

// ruleText is how nft(8) writes a rule, where it is installed, with a colon before.
func ruleText(ctx context.Context, family, table, chain string, handle uint64) string {
	const most = 5 * time.Second

	ctx, cancel := context.WithTimeout(ctx, most)
	defer cancel()

	out, err := exec.CommandContext(ctx, "nft", "-a", "list", "chain", family, table, chain).Output()
	if err != nil {
		return ""
	}

	for line := range strings.Lines(string(out)) {
		if rule, found := strings.CutSuffix(strings.TrimSpace(line), fmt.Sprintf(" # handle %d", handle)); found {
			return ": " + rule
		}
	}

	return ""
}
