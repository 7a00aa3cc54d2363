package tool

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"strings"

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
}

// network is what the node knows of machines that it reaches directly. It is read once for many
// questions: there may be thousands.
type network struct {
	links      map[int]netlink.Link
	neighbours map[neighbour]int // states
}

// neighbour is an address behind an interface.
type neighbour struct {
	ip   netip.Addr
	link int
}

// readNetwork returns what could be read, and why the rest could not.
func readNetwork() (*network, error) {
	n := &network{links: map[int]netlink.Link{}, neighbours: map[neighbour]int{}}

	links, err := whole(netlink.LinkList)
	for _, l := range links {
		n.links[l.Attrs().Index] = l
	}

	neighbours, neighboursErr := whole(func() ([]netlink.Neigh, error) { return netlink.NeighList(0, netlink.FAMILY_ALL) })
	for _, neigh := range neighbours {
		ip, _ := netip.AddrFromSlice(neigh.IP)
		n.neighbours[neighbour{ip.Unmap(), neigh.LinkIndex}] = neigh.State
	}

	return n, errors.Join(err, neighboursErr)
}

// wayTo looks up the way to a pod.
func (n *network) wayTo(pod netip.Addr) way {
	routes, err := netlink.RouteGet(pod.AsSlice())
	if err != nil || len(routes) == 0 {
		return way{obstacle: fmt.Sprintf("the node has no route to %s: the pod is gone, or its network is", pod)}
	}

	link := n.links[routes[0].LinkIndex]
	if link == nil {
		return way{obstacle: fmt.Sprintf("the interface to %s is not known", pod)}
	}

	w := way{device: link.Attrs().Name}

	switch state := link.Attrs().OperState; {
	case link.Attrs().Flags&net.FlagUp == 0:
		w.obstacle = fmt.Sprintf("interface %s, which leads to %s, is down", w.device, pod)
	case state == netlink.OperLowerLayerDown || state == netlink.OperDown:
		w.obstacle = fmt.Sprintf("interface %s, which leads to %s, has no carrier: the pod's link is down", w.device, pod)
	case n.neighbours[neighbour{pod, routes[0].LinkIndex}]&(netlink.NUD_FAILED|netlink.NUD_INCOMPLETE) != 0:
		w.obstacle = n.nobodyAt(link, pod)
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
func (n *network) nobodyAt(link netlink.Link, ip netip.Addr) string {
	text := fmt.Sprintf("no machine on %s answers for %s", link.Attrs().Name, ip)

	var dead []string

	for _, l := range n.links {
		if a := l.Attrs(); a.MasterIndex == link.Attrs().Index && a.OperState != netlink.OperUp && a.OperState != netlink.OperUnknown {
			dead = append(dead, a.Name)
		}
	}

	if len(dead) > 0 {
		slices.Sort(dead)

		return text + ": the pod's link is down (no carrier: " + strings.Join(dead, ", ") + ")"
	}

	return text + ": the pod is gone, and its row has leaked"
}

// isLocal fails if an address is none of the node's.
func isLocal(ip netip.Addr) error {
	routes, err := netlink.RouteGet(ip.AsSlice())
	if err != nil || len(routes) == 0 || routes[0].Type != unix.RTN_LOCAL {
		return fmt.Errorf("the node does not have the address %s", ip)
	}

	return nil
}

// uplinkOf is the index of the interface with the default route, 0 if there is none.
func uplinkOf(family int) int {
	routes, _ := whole(func() ([]netlink.Route, error) { return netlink.RouteList(nil, family) })
	for _, r := range routes {
		if r.Dst == nil || r.Dst.IP.IsUnspecified() {
			return r.LinkIndex
		}
	}

	return 0
}

// nodeAddress chooses an address of the node for packets to a row: that of the interface with the
// default route, else of one that does not lead to the pod, which device does.
func nodeAddress(r *row.Row, device string) (netip.Addr, error) {
	if r.IP.IsValid() {
		return r.IP, isLocal(r.IP)
	}

	family := netlink.FAMILY_V4
	if r.Family() == row.IPv6 {
		family = netlink.FAMILY_V6
	}

	addrs, err := whole(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, family) })
	if err != nil {
		return netip.Addr{}, fmt.Errorf("look up the node's addresses: %w", err)
	}

	uplink := uplinkOf(family)

	var chosen netip.Addr

	for _, a := range addrs {
		ip, ok := netip.AddrFromSlice(a.IP)
		if ip = ip.Unmap(); !ok || !ip.IsGlobalUnicast() {
			continue
		}

		link, err := netlink.LinkByIndex(a.LinkIndex)
		if err != nil || link.Attrs().Name == nodeaddr.ServiceDevice {
			continue
		}

		switch {
		case a.LinkIndex == uplink:
			return ip, nil
		case !chosen.IsValid() || link.Attrs().Name != device:
			chosen = ip
		}
	}

	if !chosen.IsValid() {
		return netip.Addr{}, errors.New("the node has no address of this family")
	}

	return chosen, nil
}

// ruleText is how nft(8) writes a rule, where it is installed, with a colon before.
func ruleText(family, table, chain string, handle uint64) string {
	//nolint:noctx // the names are the kernel's, and the answer comes at once
	out, err := exec.Command("nft", "-a", "list", "chain", family, table, chain).Output()
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
