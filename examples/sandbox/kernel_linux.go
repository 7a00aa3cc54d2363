package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/cri-o/hostport"
)

// ruleset holds the lines of iptables-save -t nat, by v6.
type ruleset map[bool][]string

// savedRules reads what is in the kernel now.
func (d *demo) savedRules(ctx context.Context) (ruleset, error) {
	rules := ruleset{}
	_, err := d.onHost(func() error {
		ipv4, err4 := hostport.NewIPTables(hostport.IPv4)
		ipv6, err6 := hostport.NewIPTables(hostport.IPv6)
		if err := errors.Join(err4, err6); err != nil {
			return fmt.Errorf("find iptables: %w", err)
		}
		for v6, iptables := range map[bool]hostport.IPTables{false: ipv4, true: ipv6} {
			saved, err := iptables.Save(ctx, "nat")
			if err != nil {
				return fmt.Errorf("read rules: %w", err)
			}
			rules[v6] = strings.Split(string(saved), "\n")
		}
		return nil
	})
	return rules, err
}

// of returns the rules of one family that are in the mappings' chains, or
// jump to them. The hash tells: it is in the names of these chains.
func (r ruleset) of(v6 bool, mappings []hostport.Mapping) []string {
	return slices.DeleteFunc(slices.Clone(r[v6]), func(line string) bool {
		mentioned := func(m hostport.Mapping) bool { return strings.Contains(line, m.PodIDHash) }
		return !strings.HasPrefix(line, "-A ") || !slices.ContainsFunc(mappings, mentioned)
	})
}

// noRule is the carrier of what is not mapped.
const noRule = "none"

// carrier tells the rule that translates a destination: the manager knows its
// mark, and the kernel where it leads.
func (r ruleset) carrier(mappings []hostport.Mapping, network string, to netip.AddrPort) string {
	v6 := to.Addr().Is6()
	i := slices.IndexFunc(mappings, func(m hostport.Mapping) bool {
		hostIP, err := netip.ParseAddr(m.HostIP)
		return err == nil && strings.EqualFold(string(m.Protocol), network) && m.HostPort == int32(to.Port()) &&
			hostIP.Is6() == v6 && (hostIP.IsUnspecified() || hostIP == to.Addr())
	})
	if i < 0 {
		return noRule
	}
	for _, line := range r.of(v6, mappings[i:i+1]) {
		if rule, target, ok := strings.Cut(line, " --to-destination "); ok {
			return strings.Fields(rule)[1] + " → " + target
		}
	}
	return noRule
}
