package tool

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/cri-o/hostport/internal/row"
)

// way is how the node gets to an address.
type way struct {
	device string
	// obstacle is what is in the way, as far as the kernel knows; "" if nothing is.
	obstacle string
}

// wayTo looks up the way to a pod.
func wayTo(pod netip.Addr) way {
	routes, err := netlink.RouteGet(pod.AsSlice())
	if err != nil || len(routes) == 0 {
		return way{obstacle: fmt.Sprintf("the node has no route to %s: the pod is gone, or its network is", pod)}
	}

	link, err := netlink.LinkByIndex(routes[0].LinkIndex)
	if err != nil {
		return way{obstacle: fmt.Sprintf("the interface to %s is gone", pod)}
	}

	w := way{device: link.Attrs().Name}

	switch state := link.Attrs().OperState; {
	case link.Attrs().Flags&net.FlagUp == 0:
		w.obstacle = fmt.Sprintf("interface %s, which leads to %s, is down", w.device, pod)
	case state == netlink.OperLowerLayerDown || state == netlink.OperDown:
		w.obstacle = fmt.Sprintf("interface %s, which leads to %s, has no carrier: the pod's link is down", w.device, pod)
	case isSilent(link, pod):
		w.obstacle = nobodyAt(link, pod)
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

// isSilent reports whether a machine has last not answered for its address.
func isSilent(link netlink.Link, ip netip.Addr) bool {
	family := netlink.FAMILY_V4
	if ip.Is6() {
		family = netlink.FAMILY_V6
	}

	neighbours, err := whole(func() ([]netlink.Neigh, error) { return netlink.NeighList(link.Attrs().Index, family) })

	for _, n := range neighbours {
		if err == nil && n.IP.Equal(ip.AsSlice()) {
			return n.State&(netlink.NUD_FAILED|netlink.NUD_INCOMPLETE) != 0
		}
	}

	return false
}

// nobodyAt says why no machine may answer for an address.
func nobodyAt(link netlink.Link, ip netip.Addr) string {
	text := fmt.Sprintf("no machine on %s answers for %s", link.Attrs().Name, ip)

	links, err := whole(netlink.LinkList)
	if err != nil {
		return text
	}

	var dead []string

	for _, l := range links {
		if a := l.Attrs(); a.MasterIndex == link.Attrs().Index && a.OperState != netlink.OperUp && a.OperState != netlink.OperUnknown {
			dead = append(dead, a.Name)
		}
	}

	if len(dead) > 0 {
		return text + ": the pod's link is down (no carrier: " + strings.Join(dead, ", ") + ")"
	}

	return text + ": the pod is gone, and its row has leaked"
}

// nodeAddress chooses an address of the node for packets to a row. device leads to the pod: an
// address on another interface is one that machines outside use.
func nodeAddress(r *row.Row, device string) (netip.Addr, error) {
	if r.IP.IsValid() {
		routes, err := netlink.RouteGet(r.IP.AsSlice())
		if err != nil || len(routes) == 0 || routes[0].Type != unix.RTN_LOCAL {
			return netip.Addr{}, fmt.Errorf("the node does not have the address %s", r.IP)
		}

		return r.IP, nil
	}

	family := netlink.FAMILY_V4
	if r.Family() == row.IPv6 {
		family = netlink.FAMILY_V6
	}

	addrs, err := whole(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, family) })
	if err != nil {
		return netip.Addr{}, fmt.Errorf("look up the node's addresses: %w", err)
	}

	var chosen netip.Addr

	for _, a := range addrs {
		ip, ok := netip.AddrFromSlice(a.IP)
		if ip = ip.Unmap(); !ok || !ip.IsGlobalUnicast() {
			continue
		}

		if link, err := netlink.LinkByIndex(a.LinkIndex); err == nil && link.Attrs().Name != device {
			return ip, nil
		}

		chosen = ip
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

// legacyFilters reports whether iptables-legacy has a table filter in a family. Tracing does not see
// it.
func legacyFilters(f row.Family) bool {
	names := map[row.Family]string{row.IPv4: "ip_tables_names", row.IPv6: "ip6_tables_names"}[f]
	tables, _ := os.ReadFile("/proc/thread-self/net/" + names)

	return slices.Contains(strings.Fields(string(tables)), "filter")
}

func legacySave(f row.Family) string {
	if f == row.IPv6 {
		return "ip6tables-legacy-save"
	}

	return "iptables-legacy-save"
}
