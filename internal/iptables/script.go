package iptables

import (
	"bytes"
	"errors"
	"slices"
	"strings"

	"github.com/cri-o/hostport/internal/outcome"
	"github.com/cri-o/hostport/internal/row"
)

// script is the input of one iptables-restore. What it does to the kernel it does to the
// model of the tables as well, line by line.
type script struct {
	ruleset *Ruleset
	table   *Table // of the lines to come
	lines   []scriptLine
	// most is how many rows one transaction changes, rows how many the last one does
	// so far, transactions how many there are for the nat table.
	most, rows, transactions int
	asserted                 map[string]bool // lines
	// before has the chains of the nat table as they were.
	before map[string]chainBefore
	// entries is by how much the tables grow; a chain has two besides its rules.
	entries int
	// commits is how many transactions change something, the last one if changing.
	commits  int
	changing bool
}

type scriptLine struct {
	text  string
	delta int
	row   *row.Row
	// own marks a rule in a chain that the script itself has made: if that
	// fails, it is for what the rule says and not for what is missing.
	own bool
}

type chainBefore struct {
	rules []SavedRule
	there bool
}

// chainEntries are where a chain begins and where it ends.
const chainEntries = 2

func newScript(rs *Ruleset, most int) *script {
	return &script{
		ruleset: rs, most: most, asserted: map[string]bool{}, before: map[string]chainBefore{},
	}
}

func (s *script) emit(delta int, r *row.Row, text string) {
	s.lines = append(s.lines, scriptLine{text: text, delta: delta, row: r})

	switch {
	case text == CmdCommit:
		s.changing = false
	case !s.changing && changes(text):
		s.changing = true
		s.commits++
	}
}

// changes reports whether a line does more than to look.
func changes(line string) bool {
	return !strings.HasPrefix(line, cmdCheck) && !strings.HasPrefix(line, "*") && line != CmdCommit
}

// begin begins a transaction for a table.
func (s *script) begin(name string) {
	if len(s.lines) > 0 {
		s.emit(row.Shared, nil, CmdCommit)
	}

	s.emit(row.Shared, nil, "*"+name)

	if s.table = s.ruleset.raw; name == NATTable {
		s.table, s.rows = s.ruleset.nat, 0
		s.transactions++
	}
}

// room begins another transaction if there is no room for more rows in this one.
func (s *script) room(rows int) {
	if s.rows > 0 && s.rows+rows > s.most {
		s.begin(NATTable)
	}

	s.rows += rows
}

func (s *script) input() []byte {
	var b bytes.Buffer

	for _, l := range s.lines {
		b.WriteString(l.text + "\n")
	}

	b.WriteString(CmdCommit + "\n")

	return b.Bytes()
}

// repairs are the lines that change something and belong to no delta.
func (s *script) repairs() []row.Repair {
	var list []row.Repair

	for _, l := range s.lines {
		if l.delta == row.Shared && changes(l.text) {
			list = append(list, row.Repair{What: l.text, Row: l.row, Shared: l.row == nil})
		}
	}

	return list
}

// blame finds the delta that an error of iptables-restore is about. Where
// that is one rule of a row, what the kernel refused is that rule.
func (s *script) blame(err error) error {
	at := interface{ Line() int }(nil)
	if !errors.As(err, &at) {
		return err
	}

	i := at.Line() - 1
	if i < 0 || i >= len(s.lines) {
		return err
	}

	l := s.lines[i]
	if l.row != nil {
		err = &outcome.RowError{Row: l.row, Err: err}
	}

	if l.own && l.delta != row.Shared {
		return &outcome.RefusedError{Delta: l.delta, Err: err}
	}

	return err
}

// rollBack makes the model what it was before the script, which has not taken effect.
func (s *script) rollBack() {
	for chain, was := range s.before {
		if was.there {
			s.ruleset.nat.Chains[chain] = was.rules
		} else {
			delete(s.ruleset.nat.Chains, chain)
		}
	}
}

// rules returns the rules of a chain, to be changed.
func (s *script) rules(chain string) []SavedRule {
	rules, there := s.table.Chains[chain]

	if _, known := s.before[chain]; !known {
		s.before[chain] = chainBefore{rules, there}
		rules = slices.Clone(rules)
		s.table.Chains[chain] = rules
	}

	return rules
}

// makeChain makes a chain, or empties one that is there.
func (s *script) makeChain(i int, r *row.Row, chain string) {
	if _, there := s.table.Chains[chain]; !there {
		s.entries += chainEntries
	}

	s.entries -= len(s.rules(chain))
	s.table.Chains[chain] = nil
	s.emit(i, r, ":"+chain+" - [0:0]")
}

// newChain makes a chain unless it is there.
func (s *script) newChain(i int, r *row.Row, chain string) {
	if _, there := s.table.Chains[chain]; there {
		return
	}

	s.rules(chain)
	s.entries += chainEntries
	s.emit(i, r, cmdNewChain+chain)
}

func (s *script) flushChain(i int, r *row.Row, chain string) {
	s.entries -= len(s.rules(chain))
	s.table.Chains[chain] = nil
	s.emit(i, r, cmdFlushChain+chain)
}

// deleteChain deletes a chain without rules.
func (s *script) deleteChain(i int, r *row.Row, chain string) {
	s.rules(chain)
	delete(s.table.Chains, chain)
	s.entries -= chainEntries
	s.emit(i, r, CmdDelChain+chain)
}

// appendRule and insertRule put a rule after all others of its chain, and before them.
func (s *script) appendRule(i int, r *row.Row, rule Rule) {
	line := rule.String()
	s.table.Chains[rule.Chain] = append(s.rules(rule.Chain), SavedRule{Line: line, Target: rule.Target})
	s.entries++
	s.emit(i, r, CmdAppend+line)
}

func (s *script) insertRule(i int, r *row.Row, rule Rule) {
	line := rule.String()
	s.table.Chains[rule.Chain] = slices.Insert(s.rules(rule.Chain), 0, SavedRule{Line: line, Target: rule.Target})
	s.entries++
	s.emit(i, r, cmdInsert+line)
}

// deleteRule deletes a rule, the first where several have the same line, if it is there.
func (s *script) deleteRule(i int, r *row.Row, chain, line string) {
	at := s.table.find(chain, line)
	if at < 0 {
		return
	}

	s.table.Chains[chain] = slices.Delete(s.rules(chain), at, at+1)
	s.entries--
	s.emit(i, r, CmdDelete+line)
}

// assert makes the transaction fail unless a rule stands.
func (s *script) assert(line string) {
	if !s.asserted[line] {
		s.asserted[line] = true
		s.emit(row.Shared, nil, cmdCheck+line)
	}
}

// base makes the transaction fail unless the base chains and rules are in
// place. Those that are known not to be are put there. The guard is first, and
// committed by itself: it stands whatever becomes of the rest.
func (s *script) base(guard, nat []Rule) {
	if len(guard) > 0 {
		s.begin(RawTable)

		for _, g := range guard {
			s.ensure(g, s.insertRule) // before whatever may end the walk
		}
	}

	s.begin(NATTable)

	for _, b := range nat {
		if IsOurs(b.Target) {
			s.newChain(row.Shared, nil, b.Target)
		}

		// Services come before host ports, so those go last.
		put := s.appendRule
		if b.Chain == PostRouting {
			put = s.insertRule
		}

		s.ensure(b, put)
	}
}

// ensure makes the transaction fail unless a base rule is in place. If it is
// known not to be, or not alone, it is put there.
func (s *script) ensure(rule Rule, put func(int, *row.Row, Rule)) {
	line := rule.String()

	found, misplaced := s.ruleset.Misplaced[line]
	if !misplaced {
		s.assert(line)

		return
	}

	for _, w := range found.Lines {
		s.deleteRule(row.Shared, nil, rule.Chain, w)
	}

	put(row.Shared, nil, rule)
}

// delta writes what one operation changes.
func (s *script) delta(i int, d row.Delta) {
	for _, r := range d.Keep {
		s.room(1)
		s.keep(i, r)
	}

	of := func(*row.Row) int { return i }

	for _, part := range d.Parts(s.most) {
		s.room(part.Size())
		s.remove(of, part.Del)
		s.put(of, part.Add)
	}
}

// keep makes the transaction fail unless r stands.
func (s *script) keep(i int, r *row.Row) {
	for _, side := range SidesOf(r) {
		for _, j := range side.Path {
			s.assert(j.String())
		}

		s.emit(i, r, cmdCheck+side.Jump.String())
		s.emit(i, r, cmdCheck+side.Rule.String())
	}
}

// put writes rows and what leads to them. The DNAT sides come first and then
// the masquerade sides: what the kernel visits together, to look for loops, it
// has then made together, which makes that a tenth faster.
func (s *script) put(of func(*row.Row) int, rows []*row.Row) {
	sides := make([][]Side, len(rows))

	for j, r := range rows {
		s.chooseDepth(r)
		sides[j] = SidesOf(r)
		s.putPath(of(r), r, sides[j])
	}

	for which := range 2 {
		for j, r := range rows {
			s.putSide(of(r), r, sides[j][which])
		}
	}
}

// chooseDepth decides where a row is to stand. A row for one address goes as
// deep as can be: it has to come before one for any address of the same port,
// wherever that stands.
func (s *script) chooseDepth(r *row.Row) {
	for r.Depth = OwnRows; r.Depth < rangeLevels-1; r.Depth++ {
		parent, chain := RangeChain(r, DNATPrefix, r.Depth-1), RangeChain(r, DNATPrefix, r.Depth)
		if s.table.rowsBehind(parent, chain) < FewRows && !r.IP.IsValid() {
			return
		}
	}
}

func (s *script) putSide(i int, r *row.Row, side Side) {
	s.makeChain(i, r, side.Rule.Chain) // one may be left over
	s.appendRule(i, r, side.Rule)
	s.lines[len(s.lines)-1].own = true

	if side.first {
		s.insertRule(i, r, side.Jump)
	} else {
		s.appendRule(i, r, side.Jump)
	}
}

// putPath makes the range chains that lead to r, where they are missing. Of
// the jumps that are there it asserts the first: each takes time, as iptables
// reads the whole chain that a jump leads to.
func (s *script) putPath(i int, r *row.Row, sides []Side) {
	for _, side := range sides {
		for level, j := range side.Path {
			s.newChain(i, r, j.Target)

			line := j.String()
			there := s.table.find(j.Chain, line) >= 0

			switch {
			case there && level == 0:
				s.assert(line)
			case there:
			case level > OwnRows: // before the rows that stand beside it
				s.insertRule(i, r, j)
			default:
				s.appendRule(i, r, j)
			}

			if !there {
				s.asserted[line] = true
			}

			s.rules(j.Chain)[s.table.find(j.Chain, line)].rows++
		}
	}
}

// remove takes out whatever there is of rows. All are flushed first: one may lead to
// another, iptables-nft looks at every rule that is deleted before a flush, and forgets
// that it has deleted a rule if the rule's chain is flushed afterwards (1.8.9).
func (s *script) remove(of func(*row.Row) int, rows []*row.Row) {
	var (
		sides []Side
		whose []*row.Row
	)

	for _, r := range rows {
		for _, side := range SidesOf(r) {
			if _, there := s.table.Chains[side.Rule.Chain]; there {
				s.flushChain(of(r), r, side.Rule.Chain)

				sides, whose = append(sides, side), append(whose, r)
			}
		}
	}

	for i, side := range sides {
		ours := s.unlink(of(whose[i]), whose[i], side)
		s.deleteChain(of(whose[i]), whose[i], side.Rule.Chain)

		if ours {
			s.prunePath(of(whose[i]), whose[i], side.Path)
		}
	}
}

// unlink deletes the jumps to a row's own chain. It reports whether prunePath is to follow.
func (s *script) unlink(i int, r *row.Row, side Side) (ours bool) {
	leaf := side.Rule.Chain

	if s.table.Jumps != nil { // and prune takes out the rest
		for _, j := range s.table.Jumps[leaf] {
			s.deleteRule(i, r, j.Spec.Chain, j.Line)
		}

		return false
	}

	if line := side.Jump.String(); s.table.find(side.Jump.Chain, line) >= 0 {
		s.deleteRule(i, r, side.Jump.Chain, line)

		return true
	}

	dispatch := side.Path[0].Chain // where CRI-O puts them
	for _, j := range slices.Clone(s.table.Chains[dispatch]) {
		if j.Target == leaf {
			s.deleteRule(i, r, dispatch, j.Line)
		}
	}

	return false
}

// prunePath takes a row less into account for the jumps that lead to it. It takes out those
// that lead to no other, and their range chains.
func (s *script) prunePath(i int, r *row.Row, path []Rule) {
	for _, j := range slices.Backward(path) {
		line := j.String()

		at := s.table.find(j.Chain, line)
		if at < 0 {
			return
		}

		rules := s.rules(j.Chain)
		rules[at].rows--

		if rules[at].rows > 0 {
			continue
		}

		s.deleteRule(i, r, j.Chain, line)

		if !s.table.leadsInto(j.Chain, j.Target) {
			s.deleteChain(i, r, j.Target)
		}
	}
}

// prune takes out the range chains that lead to nothing any more, and jumps to others
// that no row needs.
func (s *script) prune() {
	unlink := func(chain string) {
		for _, j := range s.table.Jumps[chain] {
			if at := s.table.find(j.Spec.Chain, j.Line); at >= 0 && s.table.Chains[j.Spec.Chain][at].rows == 0 {
				s.deleteRule(row.Shared, nil, j.Spec.Chain, j.Line)
			}
		}
	}

	for again := true; again; {
		again = false

		for chain, rules := range s.table.Chains {
			if isRange(chain) && len(rules) == 0 {
				unlink(chain)
				s.deleteChain(row.Shared, nil, chain)

				again = true
			}
		}
	}

	for chain := range s.table.Chains {
		if isRange(chain) {
			unlink(chain)
		}
	}
}

// needed is what removeForeign leaves.
type needed struct {
	chains map[string]bool // that bear our names; false for one to be left as it is
	lines  map[string]bool
}

// needs returns what base and rows need, of which some stand as CRI-O puts them.
func (s *script) needs(base []Rule, rows []*row.Row, misplaced map[*row.Row]bool) needed {
	n := needed{chains: map[string]bool{DNATDispatch: true, MasqDispatch: true}, lines: map[string]bool{}}

	for _, rule := range base {
		n.lines[rule.String()] = true
	}

	for _, r := range rows {
		for _, side := range SidesOf(r) {
			leaf := side.Rule.Chain
			n.chains[leaf] = !misplaced[r]

			if misplaced[r] {
				for _, j := range s.table.Jumps[leaf] {
					n.lines[j.Line] = true
				}

				continue
			}

			n.lines[side.Rule.String()], n.lines[side.Jump.String()] = true, true

			for _, j := range side.Path {
				n.chains[j.Target], n.lines[j.String()] = true, true
			}
		}
	}

	return n
}

// foreign reports whether a chain bears one of our names and is not needed.
func (n needed) foreign(chain string) bool {
	_, ok := n.chains[chain]

	return IsOurs(chain) && !ok
}

// removeForeign takes out, of the chains that bear our names, those that are not needed, and
// whatever leads to any of them; and of the others the rules that are not needed.
func (s *script) removeForeign(n needed) {
	for chain, rules := range s.table.Chains {
		if n.foreign(chain) {
			continue
		}

		seen := map[string]bool{}

		for _, r := range slices.Clone(rules) {
			stays := n.lines[r.Line] && !seen[r.Line] || !n.chains[chain] && !IsOurs(r.Target)
			seen[r.Line] = true

			if !stays || n.foreign(r.Target) {
				s.room(1)
				s.deleteRule(row.Shared, nil, chain, r.Line)
			}
		}
	}

	var chains []string

	for chain := range s.table.Chains {
		if n.foreign(chain) {
			s.room(1)
			s.flushChain(row.Shared, nil, chain)

			chains = append(chains, chain)
		}
	}

	for _, chain := range chains {
		s.room(1)
		s.deleteChain(row.Shared, nil, chain)
	}
}
