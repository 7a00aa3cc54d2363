package tool

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"github.com/cri-o/hostport/internal/localhost"
	"github.com/cri-o/hostport/internal/row"
)

// check tells what is not as it should be.
func check(ctx context.Context, out output) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()

	n, err := look(ctx)
	if err != nil {
		return err
	}

	problems := []string{}

	network := sync.OnceValues(readNetwork) // the same for both families, and only where there are rows

	for _, f := range []row.Family{row.IPv4, row.IPv6} {
		problems = append(problems, n.problems(ctx, f, network)...)
	}

	lines := problems
	if len(problems) == 0 && n.unseenError(row.IPv4, row.IPv6) == nil {
		lines = []string{fmt.Sprintf("%d host ports, all as they should be", len(n.rows()))}
	}

	err = out.print(problems, lines)

	if err = errors.Join(err, n.unseenError(row.IPv4, row.IPv6)); err == nil && len(problems) > 0 {
		err = errFound
	}

	return err
}

// problems are those of a family.
func (n *node) problems(ctx context.Context, f row.Family, network func() (*network, error)) (problems []string) {
	var with []string // the backends that have rows

	for _, c := range n.carriers {
		if c.family != f {
			continue
		}

		for _, missing := range c.missing {
			problems = append(problems, c.name+": "+missing)
		}

		if len(c.rows) > 0 {
			with = append(with, fmt.Sprintf("%s (%d)", c.name, len(c.rows)))
		}
	}

	if len(with) > 0 {
		problems = append(problems, n.blocked(f)...)
	}

	if len(with) > 1 {
		problems = append(problems, "rows are in "+strings.Join(with, " and in ")+
			": those of the one not in use are from before, and move with their pods' next Add")
	}

	if len(with) > 0 {
		problems = append(problems, n.problemsOfRows(ctx, f, network)...)
	}

	for _, e := range n.wiped(f) {
		problems = append(problems, fmt.Sprintf("%s %s: %s, the manager, holds the port for a pod, and the kernel has no rule",
			e.Proto.API(), netip.AddrPortFrom(e.HostIP(f), e.Port), n.manager[f]))
	}

	for i, p := range problems {
		problems[i] = fmt.Sprintf("IPv%s: %s", f, p)
	}

	return problems
}

// problemsOfRows are those of the rows of a family, of which there is at least one.
func (n *node) problemsOfRows(ctx context.Context, f row.Family, readOnce func() (*network, error)) (problems []string) {
	if n.manager[f] == "" {
		problems = append(problems, "no manager runs: nothing is repaired, and no port is held")
	}

	claims, err := othersClaims(ctx, f)
	if err != nil {
		problems = append(problems, fmt.Sprintf("cannot look for other port mappers: %v", err))
	}

	network, err := readOnce()
	if err != nil {
		problems = append(problems, fmt.Sprintf("cannot look at all interfaces and neighbours: %v", err))
	}

	// Interfaces by which packets come and go, and whether 127.0.0.1 is to reach pods behind them.
	interfaces := map[string]bool{network.uplinks[f]: false}

	for _, r := range n.rows() {
		if r.in.family != f {
			continue
		}

		w := network.wayTo(r.Pod.Addr())
		if w.device != "" {
			interfaces[w.device] = interfaces[w.device] || r.in.loopback && r.ForLoopback()
		}

		for _, p := range append(n.problemsOf(r, w, claims), lacksAddress(r.IP)...) {
			problems = append(problems, fmt.Sprintf("%s of %s: %s", r, pod(r.Row), p))
		}
	}

	devices := slices.Sorted(maps.Keys(interfaces))
	problems = append(problems, n.notForwarding(f, devices...)...)

	for _, device := range devices {
		if text := n.notOpened(device); interfaces[device] && text != "" {
			problems = append(problems, text)
		}
	}

	return problems
}

// problemsOf are those of one row.
func (n *node) problemsOf(r found, w way, claims []claim) (problems []string) {
	if n.lacks(r) {
		problems = append(problems, "the port is not held: "+holder(r.Proto, n.holders(r.Endpoint, r.Family()))+" has it")
	}

	if text := cmp.Or(w.obstacle, w.unknown); text != "" {
		problems = append(problems, text)
	}

	for _, c := range claims {
		if c.covers(r.Endpoint) {
			problems = append(problems, "another port mapper has the port: "+c.String())
		}
	}

	return problems
}

// blocked says what keeps the host ports of a family as a whole from work, by its sysctls.
func (n *node) blocked(f row.Family) (obstacles []string) {
	const noIPv6 = "/proc/sys/net/ipv6/conf/all/disable_ipv6"

	if f == row.IPv6 && n.isSet(f, noIPv6, false) {
		obstacles = append(obstacles, "IPv6 is off: "+noIPv6+" is 1")
	}

	if !n.isSet(f, localhost.Forwarding(f), true) {
		obstacles = append(obstacles, "the node does not forward, so that nobody else reaches its pods: "+localhost.Forwarding(f)+" is 0")
	}

	return obstacles
}

// notForwarding says which of some interfaces take in no packet that is to be forwarded. IPv6 asks
// for all alone (ip6_forward, net/ipv6/ip6_output.c).
func (n *node) notForwarding(f row.Family, devices ...string) (obstacles []string) {
	for _, device := range devices {
		sysctl := "/proc/sys/net/ipv4/conf/" + device + "/forwarding"
		if f == row.IPv4 && !n.isSet(f, sysctl, true) {
			obstacles = append(obstacles, fmt.Sprintf("the node does not forward what comes in by %s: %s is 0", device, sysctl))
		}
	}

	return obstacles
}

// notOpened says that the interface to a pod does not let 127.0.0.0/8 through, "" if it does.
func (n *node) notOpened(device string) string {
	sysctl := "/proc/sys/net/ipv4/conf/" + device + "/route_localnet"
	if device == row.LoopbackDevice || n.isSet(row.IPv4, sysctl, true) {
		return ""
	}

	return fmt.Sprintf("from the node, 127.0.0.1 does not reach the pod: %s is 0", sysctl)
}
