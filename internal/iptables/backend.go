package iptables

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"syscall"

	"github.com/cri-o/hostport/internal/nfnetlink"
	"github.com/cri-o/hostport/internal/outcome"
	"github.com/cri-o/hostport/internal/row"
)

// Backend keeps the rows in the nat table through iptables(8), and the
// guard of loopback addresses in the raw table.
//
// In the steady state a change is one iptables-restore with the delta alone.
// The backend has a model of the table, and the transaction itself asserts that
// what it stands on is still there. When that fails, the table is read, and the
// same transaction is made again for what is really there, with all that is missing.
type Backend struct {
	Ipt Programs
	// guard and nat are the rules that stand whatever rows there are.
	guard, nat []Rule
	// previous is set for a backend that is not the one in use: rows are only
	// taken out.
	previous bool
	variant  string
	watch    tableWatch
	// made is set once what rows share stands: what lacks of it from then on, others have
	// taken out.
	made bool
	// ruleset is what the kernel holds; nil: not known, has to be read.
	ruleset *Ruleset
	// inDoubt are rows, by hash, of transactions that failed: a process that
	// was killed may have committed before. They are removed where they are
	// found and are not in the table.
	inDoubt map[string]*row.Row
	// Most is how many rows one transaction changes; what changes more goes in
	// several, by one process.
	Most int
}

// Programs are those of iptables(8) for one family.
type Programs interface {
	// IsIPv6 is false for iptables and true for ip6tables.
	IsIPv6() bool
	// Save returns what iptables-save(8) prints for a table.
	Save(ctx context.Context, table string) ([]byte, error)
	// Restore feeds input to iptables-restore(8), each COMMIT block of which takes effect
	// as a whole or not at all.
	Restore(ctx context.Context, input []byte) error
}

// FamilyOf is the family of programs.
func FamilyOf(ipt Programs) row.Family {
	if ipt.IsIPv6() {
		return row.IPv6
	}

	return row.IPv4
}

// OnlyPrevious makes b a backend that only has rows from before. The guard is the matter of
// the backend in use.
func (b *Backend) OnlyPrevious() { b.previous, b.guard = true, nil }

// RowsAtOnce is Most for iptables-nft. What it does with the names of chains takes
// the square of their number: 10,000 rows in one transaction took 6 s of CPU to add
// and 34 s to remove, in ten 1.8 s and 1.7 s (1.8.9).
const RowsAtOnce = 1000

// New returns a backend that translates what comes from loopback addresses,
// and guards them, if told so.
func New(ipt Programs, localhost, guard bool) *Backend {
	f := FamilyOf(ipt)
	b := &Backend{Ipt: ipt, nat: NATRules(f, localhost), inDoubt: map[string]*row.Row{}, Most: RowsAtOnce}

	if guard {
		b.guard = GuardRules(f)
	}

	return b
}

// Kind is the same for all rows.
func (b *Backend) Kind(*row.Row) string { return "iptables" }

// Variant is that of the programs, "" where it is not known.
func (b *Backend) Variant() string { return b.variant }

// Name is in the names of a row's chains.
func (b *Backend) Name(r *row.Row) string { return r.Hash }

// OwnedBy reports whether a row's chains may have been named for id.
func (b *Backend) OwnedBy(id string, r *row.Row) bool { return r.HashedBy(id) }

// Exempt does nothing: kube-proxy's rules come first, and accept what is for a Service.
func (b *Backend) Exempt([]netip.Addr) (due bool) { return false }

// List finds all rows, and whether they stand as this package puts them.
func (b *Backend) List(ctx context.Context) (rows []*row.Row, intact bool, err error) {
	b.watch.begin(ctx)

	rs, err := b.look(ctx, len(b.guard) > 0)
	if err != nil {
		return nil, false, err
	}

	rows = rs.nat.Rows(FamilyOf(b.Ipt))
	whole := true

	for _, r := range rows {
		switch {
		case rs.nat.Holds(r):
			whole = rs.nat.countPath(r) && whole
		case rs.nat.leadsTo(r):
			r.Misplaced = true
		default:
			whole = false
		}
	}

	intact = whole && len(rs.Misplaced) == 0 && rs.nat.pruned()

	b.made = intact && len(rows) > 0

	if whole { // else the first operation repairs it
		b.ruleset = rs
		rs.lookOver()
	}

	return rows, intact, nil
}

// look reads the tables.
func (b *Backend) look(ctx context.Context, raw bool) (rs *Ruleset, err error) {
	rs = &Ruleset{raw: &Table{}, Misplaced: map[string]Misplaced{}}

	if raw {
		if rs.raw, err = b.save(ctx, RawTable); err != nil {
			return nil, err
		}
	}

	if rs.nat, err = b.save(ctx, NATTable); err != nil {
		return nil, err
	}

	for _, g := range b.guard {
		rs.Locate(rs.raw, g)
	}

	for _, rule := range b.nat {
		rs.Locate(rs.nat, rule)
	}

	return rs, nil
}

func (b *Backend) save(ctx context.Context, table string) (*Table, error) {
	save, err := b.Ipt.Save(ctx, table)
	if err != nil {
		return nil, fmt.Errorf("list rules: %w", err)
	}

	return ParseSave(save, table)
}

// Reconcile commits what the model says, if that will do, and else what it takes after a
// look. It tries again what may have failed because somebody else has come between.
func (b *Backend) Reconcile(ctx context.Context, t row.Target) (repairs []row.Repair, err error) {
	partly := false

	for try := -1; try <= outcome.MaxOvertaken; try++ {
		var s *script

		if try >= 0 {
			s, err = b.scriptFromLook(ctx, t)
		} else if s = b.scriptFromModel(ctx, t); s == nil {
			continue
		}

		if err == nil {
			if repairs = s.repairs(); !b.made {
				repairs = slices.DeleteFunc(repairs, func(r row.Repair) bool { return r.Row == nil })
			}

			err = b.run(ctx, s)
			partly = partly || err != nil && s.transactions > 1
		}

		if err == nil {
			clear(b.inDoubt)

			if b.made = t.Base; !t.Base {
				b.ruleset = nil
			}

			return repairs, nil
		}

		if ctx.Err() != nil || outcome.IsRefused(err) {
			break
		}
	}

	if partly {
		err = &outcome.PartlyError{Err: err}
	}

	return repairs, err
}

// scriptFromModel writes the deltas from the model, without reading the tables. It returns nil
// if there is no model, if the target is whole, or if rows are to be kept and others may have
// changed the tables: -C cannot assert the order of rules.
func (b *Backend) scriptFromModel(ctx context.Context, t row.Target) *script {
	keeps := slices.ContainsFunc(t.Deltas, func(d row.Delta) bool { return len(d.Keep) > 0 })
	if b.ruleset == nil || t.Whole || keeps && b.watch.changed(ctx) {
		return nil
	}

	s := newScript(b.ruleset, b.Most)
	s.base(b.guard, b.nat)

	for i, d := range t.Deltas {
		s.delta(i, d)
	}

	return s
}

// run commits a script, unless that changes nothing and has been made from a look.
func (b *Backend) run(ctx context.Context, s *script) error {
	if s.commits > 0 || s.ruleset == b.ruleset {
		done := b.watch.operation(ctx)
		err := b.Ipt.Restore(ctx, s.input())
		done(s, err)

		if err != nil {
			// In a user namespace net.core.wmem_default is the limit for iptables-nft.
			if errors.Is(err, syscall.EMSGSIZE) {
				b.Most = max(min(b.Most, RowsAtOnce)/4, 1)
			}

			return b.failed(s, s.blame(err))
		}
	}

	if s.ruleset != b.ruleset { // lookOver goes through all rules
		b.ruleset = s.ruleset
		b.ruleset.lookOver()
	}

	b.ruleset.Misplaced = nil

	return nil
}

// failed notes what is known of the kernel after a script has failed with err.
func (b *Backend) failed(s *script, err error) error {
	if outcome.IsRefused(err) && s.transactions == 1 {
		if s.ruleset == b.ruleset && len(s.ruleset.Misplaced) == 0 { // else the guard has been put there
			s.rollBack()
		} else {
			b.ruleset = nil
		}

		return err
	}

	b.ruleset = nil

	for _, l := range s.lines { // nobody knows how far it came
		if l.row != nil {
			b.inDoubt[l.row.Hash] = l.row
		}
	}

	return err
}

// scriptFromLook looks at the tables and writes what it takes from there to the target.
func (b *Backend) scriptFromLook(ctx context.Context, t row.Target) (*script, error) {
	b.ruleset = nil
	b.watch.begin(ctx)

	rs, err := b.look(ctx, len(b.guard) > 0 || !t.Base)
	if err != nil {
		return nil, err
	}

	s := newScript(rs, b.Most)

	if !t.Base {
		b.removeAll(s)

		return s, nil
	}

	s.base(b.guard, b.nat)

	of := map[*row.Row]int{} // the delta that a row is in
	gone := maps.Clone(b.inDoubt)

	for i, d := range t.Deltas {
		for _, r := range slices.Concat(d.Add, d.Keep, d.Del) {
			of[r] = i
		}

		for _, r := range d.Del {
			gone[r.Hash] = r
		}
	}

	index := func(r *row.Row) int {
		if i, ok := of[r]; ok {
			return i
		}

		return row.Shared
	}

	var wanted, missing []*row.Row

	misplacedRows := map[*row.Row]bool{}

	for r := range t.Rows {
		wanted = append(wanted, r)
		delete(gone, r.Hash)

		switch {
		case rs.nat.Holds(r):
			s.putPath(index(r), r, SidesOf(r))
		case rs.nat.leadsTo(r) && r.Misplaced:
			misplacedRows[r] = true
		default:
			missing = append(missing, r)
		}
	}

	broken := row.Delta{Del: slices.Collect(maps.Values(gone)), Add: missing}

	for _, part := range broken.Parts(b.Most) {
		s.room(part.Size())
		s.remove(index, slices.Concat(part.Add, part.Del))
		s.put(index, part.Add)
	}

	if t.Exactly {
		s.removeForeign(s.needs(b.nat, wanted, misplacedRows))
	}

	s.prune()

	return s, nil
}

// removeAll writes what takes out everything of ours.
func (b *Backend) removeAll(s *script) {
	ours := map[string]bool{}
	for _, g := range GuardRules(FamilyOf(b.Ipt)) {
		ours[g.String()] = true
	}

	guard := slices.DeleteFunc(slices.Clone(s.ruleset.raw.Chains[PreRouting]), func(r SavedRule) bool { return !ours[r.Line] })
	if len(guard) > 0 {
		s.begin(RawTable)
	}

	for _, g := range guard {
		s.deleteRule(row.Shared, nil, PreRouting, g.Line)
	}

	s.begin(NATTable)
	s.removeForeign(needed{})
}

// Missing returns the rules and chains that are not there, in words.
func (b *Backend) Missing(ctx context.Context, rows []*row.Row) ([]string, error) {
	rs, err := b.look(ctx, len(b.guard) > 0)
	if err != nil {
		return nil, err
	}

	var missing []string

	for _, rule := range slices.Concat(b.guard, b.nat) {
		found, misplaced := rs.Misplaced[rule.String()]
		if misplaced && !found.inPlace && !(b.previous && rs.nat.leadsInto(rule.Chain, rule.Target)) { // CRI-O's will do
			what := " is missing"
			if len(found.Lines) > 0 {
				what = " is not alone and in its place"
			}

			missing = append(missing, "rule "+rule.String()+what)
		}
	}

	for _, r := range rows {
		if rs.nat.leadsTo(r) {
			continue
		}

		some := rs.nat.missing(r)
		if len(some) == 0 && !rs.nat.Holds(r) {
			some = []string{"the rules of row " + r.String() + " are not alone and in their place"}
		}

		missing = append(missing, some...)
	}

	slices.Sort(missing) // several rows may miss one range chain

	return slices.Compact(missing), nil
}

// Disturbed reports whether others may have changed our tables.
func (b *Backend) Disturbed(transactions []nfnetlink.Transaction) bool {
	return b.watch.disturbed(transactions)
}
