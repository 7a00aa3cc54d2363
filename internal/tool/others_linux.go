package tool

import (
	"context"
	"errors"
	"fmt"
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
	proto   string // "" is any
	ports   [][2]int
	rule    string
}

func (c claim) String() string { return fmt.Sprintf("iptables-%s -t nat %s", c.variant, c.rule) }

// covers reports whether it is for a port.
func (c claim) covers(k row.PortKey) bool {
	return (c.proto == "" || c.proto == string(k.Proto)) && slices.ContainsFunc(c.ports, func(ports [2]int) bool {
		return ports[0] <= int(k.Port) && int(k.Port) <= ports[1]
	})
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

		for line := range strings.Lines(string(dump)) {
			if c, ok := parseClaim(strings.TrimSpace(line)); ok {
				c.variant = v
				claims = append(claims, c)
			}
		}
	}

	return claims, errors.Join(errs...)
}

// parseClaim reads a line of iptables-save(8).
func parseClaim(line string) (c claim, ok bool) {
	fields := strings.Fields(line)
	if len(fields) < 2 || fields[0] != "-A" || iptables.IsOurs(fields[1]) {
		return claim{}, false
	}

	value := func(flags ...string) string {
		for i, f := range fields[:len(fields)-1] {
			if slices.Contains(flags, f) && (i == 0 || fields[i-1] != "!") {
				return fields[i+1]
			}
		}

		return ""
	}

	target := value("-j")
	c = claim{proto: value("-p"), rule: line}

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

	return c, (target == "DNAT" || target == "REDIRECT") && len(c.ports) > 0
}
