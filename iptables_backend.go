package hostport

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"syscall"

	"github.com/cri-o/hostport/internal/nfnetlink"
)

// iptablesBackend keeps the rows in the nat table through iptables(8), and the
// guard of loopback addresses in the raw table.
//
// In the steady state a change is one iptables-restore with the delta alone.
// The backend has a model of the table, and the transaction itself asserts that
// what it stands on is still there. When that fails, the table is read, and the
// same transaction is made again for what is really there, with all that is missing.
type iptablesBackend struct {
	ipt programs
	// guard and nat are the rules that stand whatever rows there are.
	guard, nat []iptRule
	// before is set for a backend that is not the one in use: rows are only
	// taken out.
	before bool
	watch  tableWatch
	// ruleset is what the kernel holds; nil: not known, has to be read.
	ruleset *iptRuleset
	// inDoubt are rows, by hash, of transactions that failed: a process that
	// was killed may have committed before. They are removed where they are
	// found and are not in the table.
	inDoubt map[string]*row
	// most is how many rows one transaction changes; what changes more goes in
	// several, by one process.
	most int
}

// programs are those of iptables(8) for one family.
type programs = IPTables

// familyOfIPTables is the family of programs.
func familyOfIPTables(ipt programs) ipFamily {
	if ipt.IsIPv6() {
		return IPv6
	}

	return IPv4
}

// onlyBefore makes b one that is not in use: the guard stands with what is.
func (b *iptablesBackend) onlyBefore() { b.before, b.guard = true, nil }

// rowsAtOnce is most for iptables-nft. What it does with the names of chains takes
// the square of their number: 10,000 rows in one transaction took 6 s of CPU to add
// and 34 s to remove, in ten 1.8 s and 1.7 s (1.8.9).
const rowsAtOnce = 1000

// newIPTablesBackend returns a backend that translates what comes from loopback addresses,
// and guards them, if told so.
func newIPTablesBackend(ipt programs, localhost, guard bool) *iptablesBackend {
	f := familyOfIPTables(ipt)
	b := &iptablesBackend{ipt: ipt, nat: natRules(f, localhost), inDoubt: map[string]*row{}, most: rowsAtOnce}

	if guard {
		b.guard = guardRules(f)
	}

	return b
}

// kind is the same for all rows.
func (b *iptablesBackend) kind(*row) string { return "iptables" }

// name is in the names of a row's chains.
func (b *iptablesBackend) name(r *row) string { return r.hash }

// ownedBy reports whether a row's chains may have been named for id.
func (b *iptablesBackend) ownedBy(id string, r *row) bool { return r.hashedBy(id) }

// exempt does nothing: kube-proxy's rules come first, and accept what is for a Service.
func (b *iptablesBackend) exempt([]netip.Addr) (due bool) { return false }

// list finds all rows, and whether they stand as this package puts them.
func (b *iptablesBackend) list(ctx context.Context) (rows []*row, intact bool, err error) {
	b.watch.begin(ctx)

	rs, err := b.look(ctx, len(b.guard) > 0)
	if err != nil {
		return nil, false, err
	}

	rows = rs.nat.rows(familyOfIPTables(b.ipt))
	whole := true

	for _, r := range rows {
		switch {
		case rs.nat.holds(r):
			whole = rs.nat.countPath(r) && whole
		case rs.nat.leadsTo(r):
			r.astray = true
		default:
			whole = false
		}
	}

	intact = whole && len(rs.misplaced) == 0 && rs.nat.pruned()

	if whole { // else the first operation repairs it
		b.ruleset = rs
		rs.lookOver()
	}

	return rows, intact, nil
}

// look reads the tables.
func (b *iptablesBackend) look(ctx context.Context, raw bool) (rs *iptRuleset, err error) {
	rs = &iptRuleset{raw: &iptTable{}, misplaced: map[string]misplaced{}}

	if raw {
		if rs.raw, err = b.save(ctx, rawTable); err != nil {
			return nil, err
		}
	}

	if rs.nat, err = b.save(ctx, natTable); err != nil {
		return nil, err
	}

	for _, g := range b.guard {
		rs.locate(rs.raw, g)
	}

	for _, rule := range b.nat {
		rs.locate(rs.nat, rule)
	}

	return rs, nil
}

func (b *iptablesBackend) save(ctx context.Context, table string) (*iptTable, error) {
	save, err := b.ipt.Save(ctx, table)
	if err != nil {
		return nil, fmt.Errorf("list rules: %w", err)
	}

	return parseSave(save, table)
}

// reconcile commits what the model says, if that will do, and else what it takes after a
// look. It tries again what may have failed because somebody else has come between.
func (b *iptablesBackend) reconcile(ctx context.Context, t target) (repairs []string, err error) {
	partly := false

	for try := -1; try <= maxOvertaken; try++ {
		var s *script

		if try >= 0 {
			s, err = b.restoration(ctx, t)
		} else if s = b.change(ctx, t); s == nil {
			continue
		}

		if err == nil {
			repairs = s.repairs()
			err = b.run(ctx, s)
			partly = partly || err != nil && s.transactions > 1
		}

		if err == nil {
			clear(b.inDoubt)

			if !t.base {
				b.ruleset = nil
			}

			return repairs, nil
		}

		if ctx.Err() != nil || isRefused(err) {
			break
		}
	}

	if partly {
		err = &partlyError{err}
	}

	return repairs, err
}

// change writes deltas if the model can be relied on: for rows that are to stand only if
// nobody else may have changed something, for that a rule stands before another cannot be
// asserted. Else it returns nil.
func (b *iptablesBackend) change(ctx context.Context, t target) *script {
	keeps := slices.ContainsFunc(t.deltas, func(d delta) bool { return len(d.keep) > 0 })
	if b.ruleset == nil || t.whole || keeps && b.watch.changed(ctx) {
		return nil
	}

	s := newScript(b.ruleset, b.most)
	s.base(b.guard, b.nat)

	for i, d := range t.deltas {
		s.delta(i, d)
	}

	return s
}

// run commits a script, unless that changes nothing and has been made from a look.
func (b *iptablesBackend) run(ctx context.Context, s *script) error {
	if s.commits > 0 || s.ruleset == b.ruleset {
		done := b.watch.operation(ctx)
		err := b.ipt.Restore(ctx, s.input())
		done(s, err)

		if err != nil {
			// In a user namespace net.core.wmem_default is the limit for iptables-nft.
			if errors.Is(err, syscall.EMSGSIZE) {
				b.most = max(min(b.most, rowsAtOnce)/4, 1)
			}

			return b.failed(s, s.blame(err))
		}
	}

	b.ruleset = s.ruleset
	b.ruleset.misplaced = nil
	b.ruleset.lookOver()

	return nil
}

// failed notes what is known of the kernel after a script has failed with err.
func (b *iptablesBackend) failed(s *script, err error) error {
	if isRefused(err) && s.transactions == 1 {
		if s.ruleset == b.ruleset && len(s.ruleset.misplaced) == 0 { // else the guard has been put there
			s.rollBack()
		} else {
			b.ruleset = nil
		}

		return err
	}

	b.ruleset = nil

	for _, l := range s.lines { // nobody knows how far it came
		if l.row != nil {
			b.inDoubt[l.row.hash] = l.row
		}
	}

	return err
}

// restoration looks at the tables and writes what it takes from there to the target.
func (b *iptablesBackend) restoration(ctx context.Context, t target) (*script, error) {
	b.ruleset = nil
	b.watch.begin(ctx)

	rs, err := b.look(ctx, len(b.guard) > 0 || !t.base)
	if err != nil {
		return nil, err
	}

	s := newScript(rs, b.most)

	if !t.base {
		b.demolition(s)

		return s, nil
	}

	s.base(b.guard, b.nat)

	of := map[*row]int{} // the delta that a row is in
	gone := maps.Clone(b.inDoubt)

	for i, d := range t.deltas {
		for _, r := range slices.Concat(d.add, d.keep, d.del) {
			of[r] = i
		}

		for _, r := range d.del {
			gone[r.hash] = r
		}
	}

	index := func(r *row) int {
		if i, ok := of[r]; ok {
			return i
		}

		return shared
	}

	var wanted, missing []*row

	misfits := map[*row]bool{}

	for r := range t.rows {
		wanted = append(wanted, r)
		delete(gone, r.hash)

		switch {
		case rs.nat.holds(r):
			s.putPath(index(r), r, sidesOf(r))
		case rs.nat.leadsTo(r) && r.astray:
			misfits[r] = true
		default:
			missing = append(missing, r)
		}
	}

	broken := delta{del: slices.Collect(maps.Values(gone)), add: missing}

	for _, part := range broken.parts(b.most) {
		s.room(part.size())
		s.remove(index, slices.Concat(part.add, part.del))
		s.put(index, part.add)
	}

	if t.exactly {
		s.purge(s.needs(b.nat, wanted, misfits))
	}

	s.prune()

	return s, nil
}

// demolition writes what takes out everything of ours.
func (b *iptablesBackend) demolition(s *script) {
	ours := map[string]bool{}
	for _, g := range guardRules(familyOfIPTables(b.ipt)) {
		ours[g.String()] = true
	}

	guard := slices.DeleteFunc(slices.Clone(s.ruleset.raw.chains[preRouting]), func(r savedRule) bool { return !ours[r.line] })
	if len(guard) > 0 {
		s.begin(rawTable)
	}

	for _, g := range guard {
		s.deleteRule(shared, nil, preRouting, g.line)
	}

	s.begin(natTable)
	s.purge(needed{})
}

// missing returns the rules and chains that are not there, in words.
func (b *iptablesBackend) missing(ctx context.Context, rows []*row) ([]string, error) {
	rs, err := b.look(ctx, len(b.guard) > 0)
	if err != nil {
		return nil, err
	}

	var missing []string

	for _, rule := range slices.Concat(b.guard, b.nat) {
		found, misplaced := rs.misplaced[rule.String()]
		if misplaced && !found.inPlace && !(b.before && rs.nat.leadsInto(rule.chain, rule.target)) { // CRI-O's will do
			what := "rule " + rule.String()
			if len(found.lines) > 0 {
				what += ", alone and in its place"
			}

			missing = append(missing, what)
		}
	}

	for _, r := range rows {
		if rs.nat.leadsTo(r) {
			continue
		}

		some := rs.nat.missing(r)
		if len(some) == 0 && !rs.nat.holds(r) {
			some = []string{"row " + r.String() + ", alone and in its place"}
		}

		missing = append(missing, some...)
	}

	slices.Sort(missing) // several rows may miss one range chain

	return slices.Compact(missing), nil
}

// disturbed reports whether others may have changed our tables.
func (b *iptablesBackend) disturbed(transactions []nfnetlink.Transaction) bool {
	return b.watch.disturbed(transactions)
}
