package hostport

import (
	"context"
	"iter"
	"slices"
	"strings"

	"github.com/cri-o/hostport/internal/nfnetlink"
)

func (b *iptablesBackend) repair(ctx context.Context, table iter.Seq[*row], purge bool) ([]string, error) {
	rows := slices.Collect(table)
	table = slices.Values(rows)

	t, state, err := b.read(ctx)
	if err != nil {
		return nil, err
	}

	var s *script

	demolish := b.before && purge && len(rows) == 0
	if demolish {
		s, err = b.demolition(ctx, t, state)
		if err != nil {
			return nil, err
		}
	} else {
		s = b.restoration(t, state, nil, table)
		if purge {
			s.purge(t, table)
		}
	}

	changes := s.changes()
	if len(changes) > 0 {
		err = b.run(ctx, s)
	} else {
		s.settle()
		b.state = s.state
	}

	if demolish || err != nil {
		b.state = nil
	}

	if err == nil {
		clear(b.doubtful)

		return changes, nil
	}

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
	var changes []string

	for _, l := range s.lines {
		if !strings.HasPrefix(l.text, cmdCheck) && !strings.HasPrefix(l.text, "*") && l.text != cmdCommit {
			changes = append(changes, l.text)
		}
	}

	return changes
}

// purge takes out the chains of rows that are not in the table, whatever leads
// there and whatever is in them.
func (s *script) purge(t *savedTable, table iter.Seq[*row]) {
	wanted := map[string]bool{}
	for r := range table {
		wanted[r.dnatChain()], wanted[r.masqChain()] = true, true
	}

	for chain := range t.chains {
		hash, ok := rowOfChain(chain)
		if !ok || wanted[chain] || s.gone[hash] {
			continue
		}

		for _, j := range t.jumps[chain] {
			s.emit(shared, nil, cmdDelete+j.line)
			s.deleted[j.line] = true
		}

		s.emit(shared, nil, cmdFlushChain+chain)
		s.emit(shared, nil, cmdDelChain+chain)
	}

	s.sweep(t)
}

// rowOfChain is the hash in the name of a row's chain.
func rowOfChain(chain string) (hash string, ok bool) {
	if isRange(chain) {
		return "", false
	}

	for _, prefix := range []string{dnatPrefix, masqPrefix} {
		if hash, ok = strings.CutPrefix(chain, prefix); ok {
			return hash, true
		}
	}

	return "", false
}

func ourChain(chain string) bool {
	return chain == dnatDispatch || chain == masqDispatch ||
		strings.HasPrefix(chain, dnatPrefix) || strings.HasPrefix(chain, masqPrefix)
}

// demolition takes out everything that is ours.
func (b *iptablesBackend) demolition(ctx context.Context, t *savedTable, state *natState) (*script, error) {
	s := newScript(state)

	raw, err := b.save(ctx, rawTable)
	if err != nil {
		return nil, err
	}

	var guard []iptRule

	for _, g := range guardRules(familyOfIPTables(b.ipt)) {
		if raw.index(g) >= 0 {
			guard = append(guard, g)
		}
	}

	if len(guard) > 0 {
		s.emit(shared, nil, "*"+rawTable)

		for _, g := range guard {
			s.emit(shared, nil, cmdDelete+g.String())
		}

		s.emit(shared, nil, cmdCommit)
	}

	s.emit(shared, nil, "*"+natTable)

	var gone []string

	for chain := range t.chains {
		if !ourChain(chain) {
			continue
		}

		for _, j := range t.jumps[chain] {
			if !ourChain(j.chain) {
				s.emit(shared, nil, cmdDelete+j.line)
			}
		}

		s.emit(shared, nil, cmdFlushChain+chain)

		gone = append(gone, chain)
	}

	for _, chain := range gone {
		s.emit(shared, nil, cmdDelChain+chain)
	}

	return s, nil
}

func (b *iptablesBackend) missing(ctx context.Context, rows []*row) ([]string, error) {
	t, state, err := b.read(ctx)
	if err != nil {
		return nil, err
	}

	var missing []string

	for _, rule := range slices.Concat(b.guard, b.nat) {
		if !state.base[rule.String()] && !b.before {
			missing = append(missing, "rule "+rule.String())
		}
	}

	for _, r := range rows {
		if t.leadsTo(r) {
			continue
		}

		for _, side := range r.sides() {
			for _, rule := range append(side.path, side.jump, side.rule) {
				if _, ok := t.chains[rule.chain]; !ok {
					missing = append(missing, "chain "+rule.chain)
				} else if t.index(rule) < 0 {
					missing = append(missing, "rule "+rule.String())
				}
			}
		}
	}

	slices.Sort(missing) // several rows may miss one range chain

	return slices.Compact(missing), nil
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
	own        *generations

	// state is for the legacy variant: something that changes with the tables.
	state func() (string, error)
	seen  string
	moved bool
}

// operation begins an operation of ours, and returns what ends it.
func (w *tableWatch) operation(ctx context.Context) (done func()) {
	switch {
	case w.generation != nil:
		before, err := w.generation(ctx)

		return func() {
			// If it is two, who knows whose the other is.
			if after, afterErr := w.generation(ctx); err == nil && afterErr == nil && after == nfnetlink.NextGeneration(before) {
				w.own.add(after)
			}
		}
	case w.state != nil:
		w.look()

		return func() { w.seen, _ = w.state() }
	default:
		return func() {}
	}
}

// look finds out whether the legacy tables have changed.
func (w *tableWatch) look() {
	now, err := w.state()
	w.moved = w.moved || err != nil || now != w.seen
	w.seen = now
}

func (w *tableWatch) disturbed(transactions []nfnetlink.Transaction) bool {
	if w.state != nil {
		w.look()

		moved := w.moved
		w.moved = false

		return moved
	}

	return w.generation != nil && slices.ContainsFunc(transactions, func(t nfnetlink.Transaction) bool {
		return t.Generation == 0 || w.concerns(t) && !w.own.has(t.Generation)
	})
}

// concerns tells whether a transaction has deleted what may be ours.
func (w *tableWatch) concerns(t nfnetlink.Transaction) bool {
	for c := range t.Changes {
		if c.Deleted && c.Family == w.family && slices.Contains([]string{natTable, rawTable}, c.Table) {
			if ourChain(c.Chain) || slices.Contains([]string{"", preRouting, output, postRouting}, c.Chain) {
				return true
			}
		}
	}

	return false
}
