package hostport

import (
	"context"
	"errors"
	"iter"
	"net/netip"
	"slices"

	"github.com/cri-o/hostport/internal/nfnetlink"
	"github.com/cri-o/hostport/internal/outcome"
	"github.com/cri-o/hostport/internal/row"
)

// backend carries the rows of one family into the kernel and back. It sees
// rows only: validation, ownership and sockets are above it.
//
// Its methods are never called at the same time.
type backend interface {
	// Kind is the Backend that carries r, or where r is nil the one that new
	// rows go to.
	Kind(r *row.Row) string

	// Variant is that of iptables, where the backend drives one that is known, and else "".
	Variant() string

	// Name is what names r in the kernel, where two rows with different
	// endpoints may come to have the same; else it is "".
	Name(r *row.Row) string

	// List returns the rows that the kernel holds, whoever made them. intact is
	// set if a reconcile of the whole would have nothing to do for them. With an
	// *unseenError, which is migration's, there may be more: List again returns those that could not be looked
	// at, and no others.
	List(ctx context.Context) (rows []*row.Row, intact bool, err error)

	// Reconcile makes the kernel hold what the target says, in one transaction, or where
	// that would be too large in several. It returns what it has put right besides what the
	// deltas ask for, even if it fails then.
	//
	// An *outcome.RefusedError says which delta is at fault: nothing has changed. After any
	// other error the outcome is unknown, for a process that was killed may have committed
	// before: the next Reconcile removes what is not to stand, and each of several deltas may
	// be tried alone. With an *outcome.PartlyError some of it may be committed, and a Reconcile
	// of the whole is to follow. A *leftBehindError is migration's: the backend in use holds
	// what it is to hold.
	Reconcile(ctx context.Context, t row.Target) (repairs []row.Repair, err error)

	// Exempt makes the transactions to come leave addresses of Services untranslated,
	// which are local and not the node's. due is set if that takes one.
	Exempt(services []netip.Addr) (due bool)

	// Missing returns what the kernel does not hold of what rows take, in words.
	Missing(ctx context.Context, rows []*row.Row) ([]string, error)

	// Disturbed reports whether somebody else may have broken something since the
	// last look, by one of the transactions or in a way that the kernel does
	// not tell of.
	Disturbed(transactions []nfnetlink.Transaction) bool

	// OwnedBy reports whether id is the owner of a row whose owner is known only
	// by what the kernel carries of it.
	OwnedBy(id string, r *row.Row) bool
}

// migration is a backend of several: the one in use, and those that carry rows
// from before. Rows are only added to the first.
type migration struct {
	backend

	others   []finder
	listed   bool     // the one in use is
	unseen   []finder // of others, what could not be looked at
	previous []backend
	location map[*row.Row]backend // where rows stand, or stood, that are not in the one in use
}

// finder returns a backend besides the one in use, or nil if that has no rows; with all, nil
// if it has nothing of ours at all. It fails where nobody can look.
type finder func(ctx context.Context, all bool) (backend, error)

func newMigration(inUse backend, others ...finder) *migration {
	return &migration{backend: inUse, others: others, unseen: others, location: map[*row.Row]backend{}}
}

func (l *migration) List(ctx context.Context) (rows []*row.Row, intact bool, err error) {
	if intact = true; !l.listed {
		if rows, intact, err = l.backend.List(ctx); err != nil {
			return nil, false, err
		}

		l.listed = true
	}

	var errs []error

	l.unseen = slices.DeleteFunc(slices.Clone(l.unseen), func(find finder) bool {
		old, oldIntact, err := l.listPrevious(ctx, find)
		errs = append(errs, err)
		rows, intact = append(rows, old...), intact && oldIntact

		return err == nil
	})

	if err := errors.Join(errs...); err != nil {
		return rows, intact, &unseenError{err}
	}

	return rows, intact, nil
}

// listPrevious lists the rows of a backend that may carry some from before.
func (l *migration) listPrevious(ctx context.Context, find finder) (rows []*row.Row, intact bool, err error) {
	b, err := find(ctx, false)
	if err != nil || b == nil {
		return nil, true, err
	}

	if rows, intact, err = b.List(ctx); err != nil {
		return nil, true, err
	}

	l.previous = append(l.previous, b)

	for _, r := range rows {
		r.Misplaced = true
		l.location[r] = b
	}

	return rows, intact, nil
}

// each yields the backends by what they are in at, nil being the one in use.
func (l *migration) each() iter.Seq2[backend, backend] {
	return func(yield func(key, layer backend) bool) {
		if !yield(nil, l.backend) {
			return
		}

		for _, b := range l.previous {
			if !yield(b, b) {
				return
			}
		}
	}
}

// of is the backend that carries r.
func (l *migration) of(r *row.Row) backend {
	if b := l.location[r]; b != nil {
		return b
	}

	return l.backend
}

func (l *migration) Kind(r *row.Row) string             { return l.of(r).Kind(r) }
func (l *migration) Name(r *row.Row) string             { return l.of(r).Name(r) }
func (l *migration) OwnedBy(id string, r *row.Row) bool { return l.of(r).OwnedBy(id, r) }

// Reconcile takes the backend in use first, so that a row that moves over is at all times
// in one of the two.
func (l *migration) Reconcile(ctx context.Context, t row.Target) (repairs []row.Repair, err error) {
	if !t.Whole {
		return l.commit(ctx, t)
	}

	inUse := t
	inUse.Rows = l.rows(t.Rows, nil)

	if repairs, err = l.backend.Reconcile(ctx, inUse); err != nil {
		return repairs, err
	}

	more, err := l.reconcilePrevious(ctx, t)
	if err != nil {
		err = &leftBehindError{err}
	}

	return append(repairs, more...), err
}

// commit commits deltas.
func (l *migration) commit(ctx context.Context, t row.Target) (repairs []row.Repair, err error) {
	committed := false

	for b, layer := range l.each() {
		part := t
		part.Deltas, part.Rows = l.part(t.Deltas, b), l.rows(t.Rows, b)

		if allEmpty(part.Deltas) && (b != nil || len(t.Deltas) > 0) {
			continue
		}

		some, err := layer.Reconcile(ctx, part)
		repairs = append(repairs, some...)

		if err != nil {
			if committed {
				err = &outcome.PartlyError{Err: err}
			}

			return repairs, err
		}

		committed = true
	}

	return repairs, nil
}

// leftBehindError says that the backend in use holds the table, but another one
// still has what is not in it.
type leftBehindError struct{ err error }

func (e *leftBehindError) Error() string { return "take out what is from before: " + e.err.Error() }
func (e *leftBehindError) Unwrap() error { return e.err }

func isLeftBehind(err error) bool {
	leftBehind := (*leftBehindError)(nil)

	return errors.As(err, &leftBehind)
}

// unseenError says that nobody could look whether another backend has something.
type unseenError struct{ err error }

func (e *unseenError) Error() string { return "look for what is from before: " + e.err.Error() }
func (e *unseenError) Unwrap() error { return e.err }

func isUnseen(err error) bool {
	unseen := (*unseenError)(nil)

	return errors.As(err, &unseen)
}

// reconcilePrevious reconciles the backends that have rows from before. With exactly, one is
// forgotten once nothing of ours is left in it; so is one that could not be looked at before.
func (l *migration) reconcilePrevious(ctx context.Context, t row.Target) ([]row.Repair, error) {
	var (
		all  []row.Repair
		errs []error
		stay []backend
	)

	if t.Exactly {
		repairs, err := l.removeUnseen(ctx)
		all, errs = append(all, repairs...), append(errs, err)
	}

	for _, b := range l.previous {
		part := t
		part.Rows = l.rows(t.Rows, b)
		part.Base = hasRows(part.Rows)

		var (
			repairs []row.Repair
			err     error
		)

		if part.Base || t.Exactly {
			repairs, err = b.Reconcile(ctx, part)
		}

		if part.Base || !t.Exactly || err != nil {
			stay = append(stay, b)
		}

		all, errs = append(all, repairs...), append(errs, err)
	}

	l.previous = stay

	return all, errors.Join(errs...)
}

func hasRows(rows iter.Seq[*row.Row]) bool {
	for range rows {
		return true
	}

	return false
}

// removeUnseen takes out what is in backends that have no rows of the table.
func (l *migration) removeUnseen(ctx context.Context) ([]row.Repair, error) {
	if len(l.previous) == 0 { // somebody may have restored it
		l.unseen = l.others
	}

	var (
		all  []row.Repair
		errs []error
	)

	l.unseen = slices.DeleteFunc(slices.Clone(l.unseen), func(find finder) bool {
		b, err := find(ctx, true)
		if err == nil && b != nil {
			var repairs []row.Repair

			repairs, err = b.Reconcile(ctx, row.Nothing())
			all = append(all, repairs...)
		}

		errs = append(errs, err)

		return err == nil
	})

	if err := errors.Join(errs...); err != nil {
		return all, &unseenError{err}
	}

	return all, nil
}

func (l *migration) Missing(ctx context.Context, rows []*row.Row) ([]string, error) {
	var (
		all  []string
		errs []error
	)

	for b, layer := range l.each() {
		part := slices.Collect(l.rows(slices.Values(rows), b))
		if len(part) == 0 {
			continue
		}

		missing, err := layer.Missing(ctx, part)
		all, errs = append(all, missing...), append(errs, err)
	}

	return all, errors.Join(errs...)
}

func (l *migration) Disturbed(transactions []nfnetlink.Transaction) bool {
	disturbed := l.backend.Disturbed(transactions)
	for _, b := range l.previous {
		disturbed = b.Disturbed(transactions) || disturbed // each takes note
	}

	return disturbed
}

// part is what of each delta concerns b, nil being the backend in use.
func (l *migration) part(deltas []row.Delta, b backend) []row.Delta {
	in := func(rows []*row.Row) []*row.Row {
		return slices.DeleteFunc(slices.Clone(rows), func(r *row.Row) bool { return l.location[r] != b })
	}

	parts := make([]row.Delta, len(deltas))
	for i, d := range deltas {
		parts[i] = row.Delta{Del: in(d.Del), Add: in(d.Add), Keep: in(d.Keep)}
	}

	return parts
}

// rows is what of the table is in b, nil being the backend in use.
func (l *migration) rows(table iter.Seq[*row.Row], b backend) iter.Seq[*row.Row] {
	return func(yield func(*row.Row) bool) {
		for r := range table {
			if l.location[r] == b && !yield(r) {
				return
			}
		}
	}
}

func allEmpty(deltas []row.Delta) bool {
	return !slices.ContainsFunc(deltas, func(d row.Delta) bool { return !d.Empty() })
}
