package iptables

import (
	"context"
	"errors"
	"slices"

	"github.com/cri-o/hostport/internal/nfnetlink"
)

// tableWatch reports whether others have changed a family's nat and raw tables.
// Where nothing is set, as with a caller's own IPTables, it reports nothing.
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
			for range s.commits {
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
			expected := w.seen.entries + s.entries
			after, afterErr := w.state()
			w.notice(errors.Join(err, afterErr) != nil || after.entries != expected)
			w.seen = after
		}
	default:
		return func(*script, error) {}
	}
}

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
		if c.Family != w.family || c.Table != NATTable && c.Table != RawTable {
			continue
		}

		first := c.Table == NATTable && c.Chain == PostRouting || c.Table == RawTable && c.Chain == PreRouting
		if IsOurs(c.Chain) || first && !c.Last || c.Deleted && slices.Contains([]string{"", PreRouting, Output, PostRouting}, c.Chain) {
			return true
		}
	}

	return false
}
