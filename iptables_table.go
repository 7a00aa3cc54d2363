package hostport

import (
	"bufio"
	"bytes"
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// iptRuleset is what the kernel has of ours in a family's tables, as far as is known.
type iptRuleset struct {
	nat, raw *iptTable
	// misplaced has the base rules, as lines, that are not where they are to be, or not alone.
	misplaced map[string]misplaced
}

// misplaced is what stands in place of a base rule, or besides it.
type misplaced struct {
	inPlace bool // one of lines is
	lines   []string
}

// iptTable is a table: as somebody has looked at it, and as our transactions have
// changed it since.
type iptTable struct {
	chains map[string][]savedRule
	// jumps are the rules that the look has found, by target; nil once it is over.
	jumps map[string][]savedRule
}

// savedRule is a rule of a table.
type savedRule struct {
	line   string // what follows -A; rules that we could have written have the same as ours
	target string
	rows   int      // that it leads to, if its target is a range chain
	spec   *iptRule // nil once the look is over
}

// is reports whether a rule that was looked at is one of ours.
func (r savedRule) is(rule iptRule) bool { return *r.spec == rule }

// parseSave reads a table as iptables-save prints it.
func parseSave(save []byte, table string) (*iptTable, error) {
	t := &iptTable{chains: map[string][]savedRule{}, jumps: map[string][]savedRule{}}
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
			t.chains[name] = nil // chains come before rules
		case strings.HasPrefix(line, cmdAppend):
			spec := parseRule(line)
			r := savedRule{line: strings.TrimPrefix(line, cmdAppend), target: spec.target, spec: &spec}

			if !spec.other && !strings.Contains(line, `\`) { // which is for what is quoted
				r.line = spec.String()
			}

			t.chains[spec.chain] = append(t.chains[spec.chain], r)
			t.jumps[r.target] = append(t.jumps[r.target], r)
		}
	}

	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("read iptables-save's output: %w", err)
	}

	return t, nil
}

// lookOver forgets what only a look is for, and the chains of others.
func (rs *iptRuleset) lookOver() {
	for _, t := range []*iptTable{rs.nat, rs.raw} {
		t.jumps = nil

		for chain, rules := range t.chains {
			if !ourChain(chain) && !slices.Contains([]string{preRouting, output, postRouting}, chain) {
				delete(t.chains, chain)
			}

			for i := range rules {
				rules[i].spec = nil
			}
		}
	}
}

// find is where a chain has a rule, or -1.
func (t *iptTable) find(chain, line string) int {
	return slices.IndexFunc(t.chains[chain], func(r savedRule) bool { return r.line == line })
}

// rowsBehind is how many rows the rules of a chain with a target lead to.
func (t *iptTable) rowsBehind(chain, target string) int {
	n := 0

	for _, r := range t.chains[chain] {
		if r.target == target {
			n += r.rows
		}
	}

	return n
}

// countPath counts r for the jumps that lead to it. It reports whether these are all there.
func (t *iptTable) countPath(r *row) bool {
	whole := true

	for _, s := range sidesOf(r) {
		for _, j := range s.path {
			if i := t.find(j.chain, j.String()); i >= 0 {
				t.chains[j.chain][i].rows++
			} else {
				whole = false
			}
		}
	}

	return whole
}

// pruned reports whether every range chain leads to rows, and every jump to one.
func (t *iptTable) pruned() bool {
	for chain := range t.chains {
		idle := func(j savedRule) bool { return t.chains[j.spec.chain][t.find(j.spec.chain, j.line)].rows == 0 }

		if isRange(chain) && (len(t.jumps[chain]) == 0 || slices.ContainsFunc(t.jumps[chain], idle)) {
			return false
		}
	}

	return true
}

// holds reports whether a row stands in t as this package puts it. The range
// chains that lead there are another matter.
func (t *iptTable) holds(r *row) bool {
	for _, s := range sidesOf(r) {
		if jumps := t.jumps[s.jump.target]; len(jumps) != 1 || !jumps[0].is(s.jump) {
			return false
		}

		if rules := t.chains[s.rule.chain]; len(rules) != 1 || !rules[0].is(s.rule) {
			return false
		}
	}

	return r.ip.IsValid() || !t.takesFrom(r)
}

// takesFrom reports whether r, which is for any address, stands before what may be
// for one address.
func (t *iptTable) takesFrom(r *row) bool {
	jump := dnatSide(r).jump
	chain := t.chains[jump.chain]
	at := slices.IndexFunc(chain, func(o savedRule) bool { return o.is(jump) })

	return slices.ContainsFunc(chain[at:], func(o savedRule) bool {
		return o.spec.proto == r.proto && o.spec.dports.lo <= r.port && r.port <= o.spec.dports.hi &&
			(isRange(o.target) || firstRule(t.chains[o.target]).dst.IsValid())
	})
}

// leadsTo reports whether r stands in t where CRI-O puts it: with its jumps
// straight in the dispatch chains.
func (t *iptTable) leadsTo(r *row) bool {
	dnat, masq := t.jumps[dnatChain(r)], t.jumps[masqChain(r)]
	if len(dnat) != 1 || dnat[0].spec.chain != dnatDispatch || len(masq) != 1 || masq[0].spec.chain != masqDispatch {
		return false
	}

	found := rowFrom(r.hash, firstRule(t.chains[dnatChain(r)]), dnat)

	return found != nil && found.endpoint == r.endpoint && found.pod == r.pod &&
		firstRule(t.chains[masqChain(r)]).target == masqTarget
}

// firstRule is what the first of a chain's rules says, if it has one.
func firstRule(rules []savedRule) iptRule {
	if len(rules) == 0 {
		return iptRule{}
	}

	return *rules[0].spec
}

// leadsInto reports whether some rule of a chain leads to target.
func (t *iptTable) leadsInto(chain, target string) bool {
	return slices.ContainsFunc(t.chains[chain], func(r savedRule) bool { return r.target == target })
}

// missing returns what is not there of what r takes, in words.
func (t *iptTable) missing(r *row) (missing []string) {
	for _, side := range sidesOf(r) {
		for _, rule := range append(side.path, side.jump, side.rule) {
			if _, ok := t.chains[rule.chain]; !ok {
				missing = append(missing, "chain "+rule.chain)
			} else if t.find(rule.chain, rule.String()) < 0 {
				missing = append(missing, "rule "+rule.String())
			}
		}
	}

	return missing
}

// rows finds the rows in a saved table, whoever made them and wherever they
// stand: CRI-O puts its own straight into the dispatch chains.
func (t *iptTable) rows(f ipFamily) []*row {
	var rows []*row

	for chain, rules := range t.chains {
		hash, ok := strings.CutPrefix(chain, dnatPrefix)
		if !ok || !isHash(hash) {
			continue
		}

		for _, rule := range rules {
			if r := rowFrom(hash, *rule.spec, t.jumps[chain]); r != nil && r.family() == f {
				masquerade := firstRule(t.chains[masqChain(r)])
				r.label, r.link = harmless(cmp.Or(rule.spec.comment, masquerade.comment), " "), masquerade.in
				rows = append(rows, r)

				break
			}
		}
	}

	return rows
}

// rowFrom makes a row of a DNAT rule and the jumps that lead to its chain, or
// nil if these do not say enough.
func rowFrom(hash string, rule iptRule, jumps []savedRule) *row {
	if rule.target != dnatTarget || !rule.to.IsValid() || rule.to.Port() == 0 {
		return nil
	}

	for _, j := range jumps {
		if j.spec.proto != rule.proto || j.spec.dports.lo != j.spec.dports.hi || j.spec.dports.lo == 0 {
			continue
		}

		r := &row{
			endpoint: endpoint{portKey: portKey{proto: rule.proto, port: j.spec.dports.lo}},
			pod:      rule.to,
			hash:     hash,
		}
		if rule.dst.IsValid() {
			r.ip = rule.dst.Addr()
		}

		for level := range rangeLevels {
			if j.spec.chain == rangeChain(r, dnatPrefix, level) {
				r.depth = level
			}
		}

		return r
	}

	return nil
}

// isHash reports whether a text may be a hash of a row.
func isHash(s string) bool {
	return len(s) == hashLen && strings.Trim(s, "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567") == ""
}

// locate finds out whether a base rule is in place in its chain, and what stands in
// place of it or besides: then all of that has to go, as what goes is the first of
// several copies.
func (rs *iptRuleset) locate(t *iptTable, base iptRule) {
	chain := t.chains[base.chain]

	var like []string

	for _, r := range chain {
		if o := r.spec; o.target == base.target && o.comment == base.comment && o.src == base.src && o.dst == base.dst {
			like = append(like, r.line)
		}
	}

	at := slices.IndexFunc(chain, func(r savedRule) bool { return r.is(base) })
	first := base.chain == postRouting || base.target == dropTarget
	inPlace := at >= 0 && !(first && slices.ContainsFunc(chain[:at], mayEnd))

	if !inPlace || len(like) > 1 {
		rs.misplaced[base.String()] = misplaced{inPlace, like}
	}
}

// mayEnd reports whether a rule before one of ours may keep packets from it: by a
// verdict, RETURN being one in a base chain, or by a chain of others, whatever is in
// it now. CNI plugins' rules accept what comes from their network. Of the targets that
// nat and raw can have, those named go on to the next rule (iptables-extensions(8)),
// and what is dropped gets nowhere. Calico and Kubernetes insist on being first.
func mayEnd(r savedRule) bool {
	switch r.target {
	case "", "AUDIT", "CLASSIFY", "CONNMARK", "CT", "HMARK", "IDLETIMER", "LED", "LOG", "MARK", "NFLOG",
		"NOTRACK", "RATEEST", "SET", "TCPMSS", "TEE", "TRACE", "ULOG", dropTarget:
		return false
	}

	return !strings.HasPrefix(r.target, "KUBE-") && !strings.HasPrefix(r.target, "cali-")
}

// isRange reports whether a chain is a range chain by its name.
func isRange(chain string) bool {
	for _, prefix := range []string{dnatPrefix, masqPrefix} {
		if rest, ok := strings.CutPrefix(chain, prefix); ok {
			proto, ports, _ := strings.Cut(rest, "-")
			_, ok := parsePorts(strings.Replace(ports, "-", ":", 1))

			return ok && slices.Contains([]protocol{tcp, udp, sctp}, protocol(strings.ToLower(proto)))
		}
	}

	return false
}

func ourChain(chain string) bool {
	return chain == dnatDispatch || chain == masqDispatch ||
		strings.HasPrefix(chain, dnatPrefix) || strings.HasPrefix(chain, masqPrefix)
}
