package hostport

import (
	"context"
	"errors"
	"iter"
	"slices"
	"strings"

	"github.com/cri-o/hostport/internal/nfnetlink"
)

// tried tries again what may have failed because somebody else has come between.
func (b *iptablesBackend) tried(ctx context.Context, f func() ([]string, error)) ([]string, error) {
	b.partly = false

	for try := 0; ; try++ {
		repairs, err := f()
		if err != nil && b.partly {
			err = &partlyError{err}
		}

		if err == nil || ctx.Err() != nil || try >= maxOvertaken {
			return repairs, err
		}
	}
}

func (b *iptablesBackend) tryRepair(ctx context.Context, table iter.Seq[*row], purge bool) ([]string, error) {
	b.watch.begin(ctx)

	t, state, err := b.read(ctx)
	if err != nil {
		return nil, err
	}

	s := b.restoration(t, state, nil, table, purge)
	changes := s.changes()

	err = b.runChanges(ctx, s)
	if err == nil {
		clear(b.doubtful)

		return changes, nil
	}

	b.state = nil

	// Nobody knows how far it came.
	for _, l := range s.lines {
		if l.row != nil {
			b.doubtful[l.row.hash] = l.row
		}
	}

	return changes, err
}

// changes are the lines that do more than to look.
func (s *script) changes() []string {
	var lines []string

	for _, l := range s.lines {
		if changes(l.text) {
			lines = append(lines, l.text)
		}
	}

	return lines
}

// changes reports whether a line does more than to look.
func changes(line string) bool {
	return !strings.HasPrefix(line, cmdCheck) && !strings.HasPrefix(line, "*") && line != cmdCommit
}

// commits is how many transactions the script makes that change something.
func (s *script) commits() int {
	n, changed := 0, false

	for _, l := range append(slices.Clip(s.lines), scriptLine{text: cmdCommit}) {
		switch {
		case l.text != cmdCommit:
			changed = changed || changes(l.text)
		case changed:
			n, changed = n+1, false
		}
	}

	return n
}

// ours is what purge leaves of the chains that bear our names.
type ours struct {
	chains map[string]bool // false for one to be left as it is
	rules  map[iptRule]bool
	lines  map[string]bool
}

// ours is what base and rows need, once the script is through.
func (s *script) ours(base []iptRule, rows []*row) ours {
	o := ours{chains: map[string]bool{dnatDispatch: true, masqDispatch: true}, rules: map[iptRule]bool{}, lines: map[string]bool{}}

	for _, rule := range base {
		o.rules[rule] = true
	}

	for _, r := range rows {
		if found := s.stray(r); found != nil {
			for _, chain := range found.chains {
				o.chains[chain] = false
			}

			for _, j := range found.jumps {
				o.lines[j.line] = true
			}

			continue
		}

		for _, side := range r.sides() {
			o.chains[side.rule.chain] = true
			o.rules[side.rule], o.rules[side.jump] = true, true

			for _, j := range side.path {
				o.chains[j.target], o.rules[j] = true, true
			}
		}
	}

	return o
}

// alien tells whether a chain bears one of our names and is not needed.
func (o *ours) alien(chain string) bool {
	_, needed := o.chains[chain]

	return ourChain(chain) && !needed
}

// purge takes out, of the chains that bear our names, those that rows have no use
// for, and whatever leads to any of them and is not ours; and of the others the rules
// that are not ours.
func (s *script) purge(t *savedTable, base []iptRule, rows []*row) {
	o := s.ours(base, rows)

	for chain, rules := range t.chains {
		if o.alien(chain) {
			continue
		}

		seen := map[iptRule]bool{}

		for _, r := range s.left(rules) {
			stays := o.rules[r.iptRule] && !seen[r.iptRule] || o.lines[r.line] || !o.chains[chain] && !ourChain(r.target)
			seen[r.iptRule] = true

			if !stays || o.alien(r.target) {
				s.room(1)
				s.delete(shared, nil, r.line)
			}
		}
	}

	s.raze(t, o.alien)
}

// raze takes out chains to which nothing leads but from each other.
func (s *script) raze(t *savedTable, which func(chain string) bool) {
	var razed []string

	for chain := range t.chains {
		if hash := rowOfChain(chain); which(chain) && !s.gone[hash] {
			razed = append(razed, chain)
			s.room(1)
			s.emit(shared, nil, cmdFlushChain+chain)
		}
	}

	for _, chain := range razed {
		s.room(1)
		s.emit(shared, nil, cmdDelChain+chain)
		s.uses[chain] = -1

		for _, j := range t.jumps[chain] {
			s.uses[j.iptRule.String()] = -1
		}
	}
}

// rowOfChain is the hash in the name of a row's chain, and something else in
// another's.
func rowOfChain(chain string) string {
	return strings.TrimPrefix(strings.TrimPrefix(chain, dnatPrefix), masqPrefix)
}

func ourChain(chain string) bool {
	return chain == dnatDispatch || chain == masqDispatch ||
		strings.HasPrefix(chain, dnatPrefix) || strings.HasPrefix(chain, masqPrefix)
}

func (b *iptablesBackend) tryDemolish(ctx context.Context) ([]string, error) {
	b.state = nil

	raw, err := b.save(ctx, rawTable)
	if err != nil {
		return nil, err
	}

	t, err := b.save(ctx, natTable)
	if err != nil {
		return nil, err
	}

	s := newScript(t.state(nil), b.most)
	guard := slices.DeleteFunc(raw.chains[preRouting], func(r savedRule) bool {
		return !slices.Contains(guardRules(familyOfIPTables(b.ipt)), r.iptRule)
	})

	if len(guard) > 0 {
		s.emit(shared, nil, "*"+rawTable)

		for _, r := range guard {
			s.delete(shared, nil, r.line)
		}

		s.emit(shared, nil, cmdCommit)
	}

	s.emit(shared, nil, "*"+natTable)

	for chain, rules := range t.chains {
		for _, r := range rules {
			if ourChain(r.target) && !ourChain(chain) {
				s.delete(shared, nil, r.line)
			}
		}
	}

	s.raze(t, ourChain)

	changes := s.changes()
	if len(changes) > 0 {
		err = b.run(ctx, s)
		b.state = nil
	}

	if err == nil {
		clear(b.doubtful)
	}

	return changes, err
}

func (b *iptablesBackend) missing(ctx context.Context, rows []*row) ([]string, error) {
	t, state, err := b.read(ctx)
	if err != nil {
		return nil, err
	}

	var missing []string

	for _, rule := range slices.Concat(b.guard, b.nat) {
		if !state.base[rule.String()] && !(b.before && t.has(rule.chain, rule.target)) { // CRI-O's will do
			what := "rule " + rule.String()
			if len(state.wrong[rule.String()]) > 0 {
				what += ", alone and in its place"
			}

			missing = append(missing, what)
		}
	}

	for _, r := range rows {
		if t.leadsTo(r) {
			continue
		}

		some := t.missing(r)
		if len(some) == 0 && !t.holds(r) {
			some = []string{"row " + r.String() + ", alone and in its place"}
		}

		missing = append(missing, some...)
	}

	slices.Sort(missing) // several rows may miss one range chain

	return slices.Compact(missing), nil
}

// has tells whether some rule of a chain leads to target.
func (t *savedTable) has(chain, target string) bool {
	return slices.ContainsFunc(t.chains[chain], func(r savedRule) bool { return r.target == target })
}

func (t *savedTable) missing(r *row) (missing []string) {
	for _, side := range r.sides() {
		for _, rule := range append(side.path, side.jump, side.rule) {
			if _, ok := t.chains[rule.chain]; !ok {
				missing = append(missing, "chain "+rule.chain)
			} else if t.index(rule) < 0 {
				missing = append(missing, "rule "+rule.String())
			}
		}
	}

	return missing
}

func (b *iptablesBackend) disturbed(transactions []nfnetlink.Transaction) bool {
	return b.watch.disturbed(transactions)
}

// tableWatch tells whether others have changed a family's nat and raw tables.
// Where nothing is set, as with a caller's own IPTables, it tells nothing.
type tableWatch struct {
	// family and generation are for the nf_tables variant, which tells of each
	// transaction.
	family     uint8
	generation func(context.Context) (uint32, error)
	own        *nfnetlink.Generations
	looked     uint32 // the generation at the last look, or a later one of ours

	// state is for the legacy variant: something that changes with the tables.
	state func() (tablesState, error)
	seen  tablesState
	moved bool
	// fresh is set as long as nothing else than ours has happened since the last look.
	fresh bool
}

// tablesState is how many entries tables have, chains being two, and how these
// are spread over the hooks.
type tablesState struct {
	entries int
	hooks   string
}

// operation begins an operation of ours. What it returns is called when that has
// ended, and finds out whether others have come between: nobody tells of what they
// did.
func (w *tableWatch) operation(ctx context.Context) (done func(s *script, err error)) {
	switch {
	case w.generation != nil:
		before, beforeErr := w.generation(ctx)

		return func(s *script, err error) {
			after, afterErr := w.generation(ctx)
			if errors.Join(err, beforeErr, afterErr) != nil {
				return
			}

			var ours []uint32

			gen := before
			for range s.commits() {
				gen = nfnetlink.NextGeneration(gen)
				ours = append(ours, gen)
			}

			if gen != after { // who knows whose each is
				return
			}

			for _, gen := range ours {
				w.own.Add(gen)
			}
		}
	case w.state != nil:
		w.look()

		return func(s *script, err error) {
			expected := w.seen.entries + s.entries()
			after, afterErr := w.state()
			w.notice(errors.Join(err, afterErr) != nil || after.entries != expected)
			w.seen = after
		}
	default:
		return func(*script, error) {}
	}
}

// entries is by how many a script makes the tables larger, if the chains that it
// flushes have one rule each, as rows' have. Else what it did is taken for others'.
func (s *script) entries() int {
	perCommand := map[byte]int{':': chainEntries, 'N': chainEntries, 'X': -chainEntries, 'A': 1, 'I': 1, 'D': -1, 'F': -1}
	n := 0

	for _, line := range s.changes() {
		n += perCommand[strings.TrimPrefix(line, "-")[0]]
	}

	return n
}

// chainEntries are where a chain begins and where it ends.
const chainEntries = 2

// look finds out whether the legacy tables have changed.
func (w *tableWatch) look() {
	now, err := w.state()
	w.notice(err != nil || now != w.seen)
	w.seen = now
}

func (w *tableWatch) notice(changed bool) {
	w.moved, w.fresh = w.moved || changed, w.fresh && !changed
}

// begin begins a look at the tables that the state is made from.
func (w *tableWatch) begin(ctx context.Context) {
	switch {
	case w.state != nil:
		w.look()
		w.fresh = true
	case w.generation != nil:
		w.looked, _ = w.generation(ctx) // 0 is none
	}
}

// changed reports whether others may have changed the tables since the last look.
func (w *tableWatch) changed(ctx context.Context) bool {
	switch {
	case w.state != nil:
		w.look()

		return !w.fresh
	case w.generation != nil:
		now, err := w.generation(ctx)
		if err != nil {
			return true
		}

		for ; w.looked != now; w.looked = nfnetlink.NextGeneration(w.looked) {
			if !w.own.Has(nfnetlink.NextGeneration(w.looked)) {
				return true
			}
		}

		return false
	default:
		return true
	}
}

func (w *tableWatch) disturbed(transactions []nfnetlink.Transaction) bool {
	if w.state != nil {
		w.look()

		moved := w.moved
		w.moved = false

		return moved
	}

	return w.generation != nil && slices.ContainsFunc(transactions, func(t nfnetlink.Transaction) bool {
		return t.Generation == 0 || w.concerns(t) && !w.own.Has(t.Generation)
	})
}

// concerns reports whether a transaction has deleted what may be ours, changed what
// is, or put something before what is to be first.
func (w *tableWatch) concerns(t nfnetlink.Transaction) bool {
	for c := range t.Changes {
		if c.Family != w.family || c.Table != natTable && c.Table != rawTable {
			continue
		}

		first := c.Table == natTable && c.Chain == postRouting || c.Table == rawTable && c.Chain == preRouting
		if ourChain(c.Chain) || first && !c.Last || c.Deleted && slices.Contains([]string{"", preRouting, output, postRouting}, c.Chain) {
			return true
		}
	}

	return false
}
