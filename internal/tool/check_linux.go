package tool

import (
	"context"
	"errors"
	"fmt"
	"strings"

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

	for _, f := range []row.Family{row.IPv4, row.IPv6} {
		problems = append(problems, n.problems(ctx, f)...)
	}

	lines := problems
	if len(problems) == 0 && n.unseenError() == nil {
		lines = []string{fmt.Sprintf("%d host ports, all as they should be", len(n.rows()))}
	}

	err = out.print(problems, lines)

	if err = errors.Join(err, n.unseenError()); err == nil && len(problems) > 0 {
		err = errFound
	}

	return err
}

// problems are those of a family.
func (n *node) problems(ctx context.Context, f row.Family) (problems []string) {
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
		problems = append(problems, blocked(f)...)
	}

	if len(with) > 1 {
		problems = append(problems, "rows are in "+strings.Join(with, " and in ")+
			": those of the one not in use are from before, and move with their pods' next Add")
	}

	if len(with) > 0 {
		problems = append(problems, n.problemsOfRows(ctx, f)...)
	}

	for i, p := range problems {
		problems[i] = fmt.Sprintf("IPv%s: %s", f, p)
	}

	return problems
}

// problemsOfRows are those of the rows of a family, of which there is at least one.
func (n *node) problemsOfRows(ctx context.Context, f row.Family) (problems []string) {
	if n.manager[f] == "" {
		problems = append(problems, "no manager runs: nothing is repaired, and no port is held")
	}

	claims, err := othersClaims(ctx, f)
	if err != nil {
		problems = append(problems, fmt.Sprintf("cannot look for other port mappers: %v", err))
	}

	network, err := readNetwork()
	if err != nil {
		problems = append(problems, fmt.Sprintf("cannot look at all interfaces and neighbours: %v", err))
	}

	for _, r := range n.rows() {
		if r.in.family != f {
			continue
		}

		for _, p := range n.problemsOf(r, network, claims) {
			problems = append(problems, fmt.Sprintf("%s of %s: %s", r, pod(r.Row), p))
		}
	}

	return problems
}

// problemsOf are those of one row.
func (n *node) problemsOf(r found, network *network, claims []claim) (problems []string) {
	by := n.holders(r.Endpoint, r.Family())
	if shows(r.Proto) && n.lacks(r, by) {
		problems = append(problems, "the port is not held: "+holder(r.Proto, by)+" has it")
	}

	if w := network.wayTo(r.Pod.Addr()); w.obstacle != "" {
		problems = append(problems, w.obstacle)
	}

	for _, c := range claims {
		if c.covers(r.PortKey) {
			problems = append(problems, "another port mapper has the port: "+c.String())
		}
	}

	return problems
}

// blocked says what keeps the host ports of a family as a whole from work, by its sysctls.
func blocked(f row.Family) (obstacles []string) {
	const noIPv6 = "/proc/sys/net/ipv6/conf/all/disable_ipv6"

	if set, err := localhost.IsSet(noIPv6); f == row.IPv6 && set && err == nil {
		obstacles = append(obstacles, "IPv6 is off: "+noIPv6+" is 1")
	}

	if set, err := localhost.IsSet(localhost.Forwarding(f)); !set && err == nil {
		obstacles = append(obstacles, "the node does not forward, so that nobody else reaches its pods: "+localhost.Forwarding(f)+" is 0")
	}

	return obstacles
}
