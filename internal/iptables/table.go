package iptables

import (
	"bufio"
	"bytes"
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/cri-o/hostport/internal/row"
)

// Ruleset is what the kernel has of ours in a family's tables, as far as is known.
type Ruleset struct {
	nat, raw *Table
	// Misplaced has the base rules, as lines, that are not where they are to be, or not alone.
	Misplaced map[string]Misplaced
}

// Misplaced is what stands in place of a base rule, or besides it.
type Misplaced struct {
	inPlace bool // one of lines is
	Lines   []string
}

// Table is a table: as somebody has looked at it, and as our transactions have
// changed it since.
type Table struct {
	Chains map[string][]SavedRule
	// Jumps are the rules that the look has found, by target; nil once it is over.
	Jumps map[string][]SavedRule
}

// SavedRule is a rule of a table.
type SavedRule struct {
	Line   string // what follows -A; rules that we could have written have the same as ours
	Target string
	rows   int   // that it leads to, if its target is a range chain
	Spec   *Rule // nil once the look is over
}

// Is reports whether a rule that was looked at is one of ours.
func (r SavedRule) Is(rule Rule) bool { return *r.Spec == rule }

// ParseSave reads a table as iptables-save prints it.
func ParseSave(save []byte, table string) (*Table, error) {
	t := &Table{Chains: map[string][]SavedRule{}, Jumps: map[string][]SavedRule{}}
	inTable := false

	lines := bufio.NewScanner(bytes.NewReader(save))
	for lines.Scan() {
		line := strings.TrimSpace(lines.Text())

		switch {
		case strings.HasPrefix(line, "*"):
			inTable = line == "*"+table
		case !inTable:
		case strings.HasPrefix(line, ":"):
			name, _, _ := strings.Cut(line[1:], " ")
			t.Chains[name] = nil // chains come before rules
		case strings.HasPrefix(line, CmdAppend):
			spec := parseRule(line)
			r := SavedRule{Line: strings.TrimPrefix(line, CmdAppend), Target: spec.Target, Spec: &spec}

			if !spec.other && !strings.Contains(line, `\`) { // which is for what is quoted
				r.Line = spec.String()
			}

			t.Chains[spec.Chain] = append(t.Chains[spec.Chain], r)
			t.Jumps[r.Target] = append(t.Jumps[r.Target], r)
		}
	}

	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("read iptables-save's output: %w", err)
	}

	return t, nil
}

// lookOver forgets what only a look is for, and the chains of others.
func (rs *Ruleset) lookOver() {
	for _, t := range []*Table{rs.nat, rs.raw} {
		t.Jumps = nil

		for chain, rules := range t.Chains {
			if !IsOurs(chain) && !slices.Contains([]string{PreRouting, Output, PostRouting}, chain) {
				delete(t.Chains, chain)
			}

			for i := range rules {
				rules[i].Spec = nil
			}
		}
	}
}

// find is where a chain has a rule, or -1.
func (t *Table) find(chain, line string) int {
	return slices.IndexFunc(t.Chains[chain], func(r SavedRule) bool { return r.Line == line })
}

// rowsBehind is how many rows the rules of a chain with a target lead to.
func (t *Table) rowsBehind(chain, target string) int {
	n := 0

	for _, r := range t.Chains[chain] {
		if r.Target == target {
			n += r.rows
		}
	}

	return n
}

// countPath counts r for the jumps that lead to it. It reports whether these are all there.
func (t *Table) countPath(r *row.Row) bool {
	whole := true

	for _, s := range SidesOf(r) {
		for _, j := range s.Path {
			if i := t.find(j.Chain, j.String()); i >= 0 {
				t.Chains[j.Chain][i].rows++
			} else {
				whole = false
			}
		}
	}

	return whole
}

// pruned reports whether every range chain leads to rows, and every jump to one.
func (t *Table) pruned() bool {
	for chain := range t.Chains {
		idle := func(j SavedRule) bool { return t.Chains[j.Spec.Chain][t.find(j.Spec.Chain, j.Line)].rows == 0 }

		if isRange(chain) && (len(t.Jumps[chain]) == 0 || slices.ContainsFunc(t.Jumps[chain], idle)) {
			return false
		}
	}

	return true
}

// Holds reports whether a row stands in t as this package puts it. The range
// chains that lead there are another matter.
func (t *Table) Holds(r *row.Row) bool {
	for _, s := range SidesOf(r) {
		if jumps := t.Jumps[s.Jump.Target]; len(jumps) != 1 || !jumps[0].Is(s.Jump) {
			return false
		}

		if rules := t.Chains[s.Rule.Chain]; len(rules) != 1 || !rules[0].Is(s.Rule) {
			return false
		}
	}

	return r.IP.IsValid() || !t.takesFrom(r)
}

// takesFrom reports whether r, which is for any address, stands before what may be
// for one address.
func (t *Table) takesFrom(r *row.Row) bool {
	jump := DNATSide(r).Jump
	chain := t.Chains[jump.Chain]
	at := slices.IndexFunc(chain, func(o SavedRule) bool { return o.Is(jump) })

	return slices.ContainsFunc(chain[at:], func(o SavedRule) bool {
		return o.Spec.proto == r.Proto && o.Spec.dports.lo <= r.Port && r.Port <= o.Spec.dports.hi &&
			(isRange(o.Target) || FirstRule(t.Chains[o.Target]).dst.IsValid())
	})
}

// leadsTo reports whether r stands in t where CRI-O puts it: with its jumps
// straight in the dispatch chains.
func (t *Table) leadsTo(r *row.Row) bool {
	dnat, masq := t.Jumps[DNATChain(r)], t.Jumps[MasqChain(r)]
	if len(dnat) != 1 || dnat[0].Spec.Chain != DNATDispatch || len(masq) != 1 || masq[0].Spec.Chain != MasqDispatch {
		return false
	}

	found := RowFrom(r.Hash, FirstRule(t.Chains[DNATChain(r)]), dnat)

	return found != nil && found.Endpoint == r.Endpoint && found.Pod == r.Pod &&
		FirstRule(t.Chains[MasqChain(r)]).Target == masqTarget
}

// FirstRule is what the first of a chain's rules says, if it has one.
func FirstRule(rules []SavedRule) Rule {
	if len(rules) == 0 {
		return Rule{}
	}

	return *rules[0].Spec
}

// leadsInto reports whether some rule of a chain leads to target.
func (t *Table) leadsInto(chain, target string) bool {
	return slices.ContainsFunc(t.Chains[chain], func(r SavedRule) bool { return r.Target == target })
}

// missing returns what is not there of what r takes, in words.
func (t *Table) missing(r *row.Row) (missing []string) {
	for _, side := range SidesOf(r) {
		for _, rule := range append(side.Path, side.Jump, side.Rule) {
			switch rules, ok := t.Chains[rule.Chain]; {
			case !ok:
				missing = append(missing, "chain "+rule.Chain+" is missing")
			case len(rules) == 0:
				missing = append(missing, "chain "+rule.Chain+" is empty")
			case t.find(rule.Chain, rule.String()) < 0:
				missing = append(missing, "rule "+rule.String()+" is missing")
			}
		}
	}

	return missing
}

// Rows finds the rows in a saved table, whoever made them and wherever they
// stand: CRI-O puts its own straight into the dispatch chains.
func (t *Table) Rows(f row.Family) []*row.Row {
	var rows []*row.Row

	for chain, rules := range t.Chains {
		hash, ok := strings.CutPrefix(chain, DNATPrefix)
		if !ok || !isHash(hash) {
			continue
		}

		for _, rule := range rules {
			if r := RowFrom(hash, *rule.Spec, t.Jumps[chain]); r != nil && r.Family() == f {
				masquerade := FirstRule(t.Chains[MasqChain(r)])
				r.Label, r.Link = row.Harmless(cmp.Or(rule.Spec.comment, masquerade.comment), " "), masquerade.in
				rows = append(rows, r)

				break
			}
		}
	}

	return rows
}

// RowFrom makes a row of a DNAT rule and the jumps that lead to its chain, or
// nil if these do not say enough.
func RowFrom(hash string, rule Rule, jumps []SavedRule) *row.Row {
	if rule.Target != dnatTarget || !rule.to.IsValid() || rule.to.Port() == 0 {
		return nil
	}

	for _, j := range jumps {
		if j.Spec.proto != rule.proto || j.Spec.dports.lo != j.Spec.dports.hi || j.Spec.dports.lo == 0 {
			continue
		}

		r := &row.Row{
			Endpoint: row.Endpoint{PortKey: row.PortKey{Proto: rule.proto, Port: j.Spec.dports.lo}},
			Pod:      rule.to,
			Hash:     hash,
		}
		if rule.dst.IsValid() {
			r.IP = rule.dst.Addr()
		}

		for level := range rangeLevels {
			if j.Spec.Chain == RangeChain(r, DNATPrefix, level) {
				r.Depth = level
			}
		}

		return r
	}

	return nil
}

// isHash reports whether a text may be a hash of a row.
func isHash(s string) bool {
	return len(s) == row.HashLen && strings.Trim(s, "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567") == ""
}

// Locate notes a base rule that is missing, that is at the wrong position or that has copies,
// with all rules like it. These are all deleted before the rule is put in again: -D deletes
// the first copy, not one that we choose.
func (rs *Ruleset) Locate(t *Table, base Rule) {
	chain := t.Chains[base.Chain]

	var like []string

	for _, r := range chain {
		if o := r.Spec; o.Target == base.Target && o.comment == base.comment && o.src == base.src && o.dst == base.dst {
			like = append(like, r.Line)
		}
	}

	at := slices.IndexFunc(chain, func(r SavedRule) bool { return r.Is(base) })
	first := base.Chain == PostRouting || base.Target == DropTarget
	inPlace := at >= 0 && !(first && slices.ContainsFunc(chain[:at], mayEnd))

	if !inPlace || len(like) > 1 {
		rs.Misplaced[base.String()] = Misplaced{inPlace, like}
	}
}

// mayEnd reports whether a rule before one of ours may keep packets from it: by a
// verdict, RETURN being one in a base chain, or by a chain of others, whatever is in
// it now. CNI plugins' rules accept what comes from their network. Of the targets that
// nat and raw can have, those named go on to the next rule (iptables-extensions(8)),
// and what is dropped gets nowhere. Calico and Kubernetes insist on being first.
func mayEnd(r SavedRule) bool {
	switch r.Target {
	case "", "AUDIT", "CLASSIFY", "CONNMARK", "CT", "HMARK", "IDLETIMER", "LED", "LOG", "MARK", "NFLOG",
		"NOTRACK", "RATEEST", "SET", "TCPMSS", "TEE", "TRACE", "ULOG", DropTarget:
		return false
	}

	return !strings.HasPrefix(r.Target, "KUBE-") && !strings.HasPrefix(r.Target, "cali-")
}

// isRange reports whether a chain is a range chain by its name.
func isRange(chain string) bool {
	for _, prefix := range []string{DNATPrefix, MasqPrefix} {
		if rest, ok := strings.CutPrefix(chain, prefix); ok {
			proto, ports, _ := strings.Cut(rest, "-")
			_, ok := parsePorts(strings.Replace(ports, "-", ":", 1))

			return ok && slices.Contains([]row.Protocol{row.TCP, row.UDP, row.SCTP}, row.Protocol(strings.ToLower(proto)))
		}
	}

	return false
}

// IsOurs reports whether a chain is of host ports.
func IsOurs(chain string) bool {
	return chain == DNATDispatch || chain == MasqDispatch ||
		strings.HasPrefix(chain, DNATPrefix) || strings.HasPrefix(chain, MasqPrefix)
}
