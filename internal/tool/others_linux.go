package tool

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/cri-o/hostport/internal/iptables"
	"github.com/cri-o/hostport/internal/outcome"
	"github.com/cri-o/hostport/internal/row"
)

// claim is a rule of somebody else's that translates what comes to a port.
type claim struct {
	variant iptables.Variant
	chain   string
	target  string
	proto   string // "" is any
	ports   [][2]int
	to      netip.Prefix // the zero Prefix is any
	rule    string
}

func (c claim) String() string { return fmt.Sprintf("iptables-%s -t nat %s", c.variant, c.rule) }

// covers reports whether it takes packets for an endpoint of the node's.
func (c claim) covers(e row.Endpoint) bool {
	switch {
	case c.proto != "" && c.proto != string(e.Proto):
		return false
	case !slices.ContainsFunc(c.ports, func(ports [2]int) bool { return ports[0] <= int(e.Port) && int(e.Port) <= ports[1] }):
		return false
	case c.to.IsValid() && e.IP.IsValid():
		return c.to.Contains(e.IP)
	default:
		return !c.to.IsSingleIP() || isLocal(c.to.Addr()) // else it is that of a Service
	}
}

// othersClaims looks for such rules in both variants of iptables, where they have tables.
func othersClaims(ctx context.Context, f row.Family) (claims []claim, err error) {
	var errs []error

	for _, v := range []iptables.Variant{iptables.NFT, iptables.Legacy} {
		t, err := iptables.FindVariant(ctx, f, v)
		if errors.Is(err, outcome.ErrUnavailable) {
			continue // without its programs nobody reads its rules here
		}

		var dump []byte
		if err == nil {
			dump, err = t.Save(ctx, iptables.NATTable)
		}

		errs = append(errs, err)

		for _, c := range parseClaims(strings.Split(string(dump), "\n")) {
			c.variant = v
			claims = append(claims, c)
		}
	}

	return claims, errors.Join(errs...)
}

// parseClaims reads lines of iptables-save(8). A rule may translate itself, or send to a chain of
// which a rule does: kube-proxy's and the CNI port mapper's do.
func parseClaims(lines []string) (claims []claim) {
	var rules []claim

	for _, line := range lines {
		if c := parseRule(line); c.rule != "" {
			rules = append(rules, c)
		}
	}

	translating := map[string]bool{"DNAT": true, "REDIRECT": true}

	for found := true; found; {
		found = false

		for _, c := range rules {
			if translating[c.target] && !translating[c.chain] && !builtin(c.chain) {
				translating[c.chain], found = true, true
			}
		}
	}

	return slices.DeleteFunc(rules, func(c claim) bool { return len(c.ports) == 0 || !translating[c.target] })
}

// builtin reports whether a chain of the table nat is one that the kernel calls.
func builtin(chain string) bool {
	return slices.Contains([]string{"PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"}, chain)
}

// parseRule reads a line of iptables-save(8), if it appends a rule to a chain that is not ours.
func parseRule(line string) (c claim) {
	fields := strings.Fields(line)
	if len(fields) < 2 || fields[0] != "-A" || iptables.IsOurs(fields[1]) {
		return claim{}
	}

	value := func(flags ...string) string {
		for i, f := range fields[:len(fields)-1] {
			if slices.Contains(flags, f) && (i == 0 || fields[i-1] != "!") {
				return fields[i+1]
			}
		}

		return ""
	}

	c = claim{chain: fields[1], target: value("-j", "-g"), proto: value("-p"), rule: line}
	c.to, _ = netip.ParsePrefix(value("-d"))

	for ports := range strings.SplitSeq(value("--dport", "--dports"), ",") {
		first, last, ranged := strings.Cut(ports, ":")
		if !ranged {
			last = first
		}

		from, err := strconv.Atoi(first)
		to, lastErr := strconv.Atoi(last)

		if err == nil && lastErr == nil {
			c.ports = append(c.ports, [2]int{from, to})
		}
	}

	return c
}
