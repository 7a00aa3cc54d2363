package hostport

import (
	"context"
	"errors"
	"iter"
	"maps"
	"net/netip"
	"slices"

	"github.com/cri-o/hostport/internal/nfnetlink"
)

// backend carries the rows of one family into the kernel and back. It sees
// rows only: validation, ownership and sockets are above it.
//
// Its methods are never called at the same time.
type backend interface {
	// kind is the Backend that carries r, or where r is nil the one that new
	// rows go to.
	kind(r *row) string

	// name is what names r in the kernel, where two rows with different
	// endpoints may come to have the same; else it is "".
	name(r *row) string

	// list returns the rows that the kernel holds, whoever made them. intact is
	// set if a reconcile of the whole would have nothing to do for them. With an
	// *unseenError there may be more: list again returns those that could not be looked
	// at, and no others.
	list(ctx context.Context) (rows []*row, intact bool, err error)

	// reconcile makes the kernel hold what the target says, in one transaction, or where
	// that would be too large in several. It returns what it has put right besides what the
	// deltas ask for, in words, even if it fails then.
	//
	// On an error nothing has changed, or the next reconcile takes back what has: a process
	// that was killed may have committed before. A *refusedError says which delta was at
	// fault. After any other error the outcome is unknown, and each of several deltas may
	// be tried alone. With a *leftBehindError the backend in use holds what it is to hold,
	// with a *partlyError it may hold some of it, and is to be told what it is to hold.
	reconcile(ctx context.Context, t target) (repairs []string, err error)

	// exempt makes the transactions to come leave addresses of Services untranslated,
	// which are local and not the node's. due is set if that takes one.
	exempt(services []netip.Addr) (due bool)

	// missing returns what the kernel does not hold of what rows take, in words.
	missing(ctx context.Context, rows []*row) ([]string, error)

	// disturbed reports whether somebody else may have broken something since the
	// last look, by one of the transactions or in a way that the kernel does
	// not tell of.
	disturbed(transactions []nfnetlink.Transaction) bool

	// ownedBy reports whether id is the owner of a row whose owner is known only
	// by what the kernel carries of it.
	ownedBy(id string, r *row) bool
}

// layers is a backend of several: the one in use, and those that carry rows
// from before. Rows are only added to the first.
type layers struct {
	backend

	others []finder
	listed bool     // the one in use is
	unseen []finder // of others, what could not be looked at
	before []backend
	at     map[*row]backend // where the rows stand that are in one of before
}

// finder returns a backend besides the one in use if that carries rows, or with all if it
// has anything of ours, and else nil. It fails where nobody can look.
type finder func(ctx context.Context, all bool) (backend, error)

func newLayers(inUse backend, others ...finder) *layers {
	return &layers{backend: inUse, others: others, unseen: others, at: map[*row]backend{}}
}

func (l *layers) list(ctx context.Context) (rows []*row, intact bool, err error) {
	if intact = true; !l.listed {
		if rows, intact, err = l.backend.list(ctx); err != nil {
			return nil, false, err
		}

		l.listed = true
	}

	var errs []error

	l.unseen = slices.DeleteFunc(slices.Clone(l.unseen), func(find finder) bool {
		old, oldIntact, err := l.listBefore(ctx, find)
		errs = append(errs, err)
		rows, intact = append(rows, old...), intact && oldIntact

		return err == nil
	})

	if err := errors.Join(errs...); err != nil {
		return rows, intact, &unseenError{err}
	}

	return rows, intact, nil
}

// listBefore lists the rows of a backend that may carry some from before.
func (l *layers) listBefore(ctx context.Context, find finder) (rows []*row, intact bool, err error) {
	b, err := find(ctx, false)
	if err != nil || b == nil {
		return nil, true, err
	}

	if rows, intact, err = b.list(ctx); err != nil {
		return nil, true, err
	}

	l.before = append(l.before, b)

	for _, r := range rows {
		r.astray = true
		l.at[r] = b
	}

	return rows, intact, nil
}

// each yields the backends by what they are in at, nil being the one in use.
func (l *layers) each() iter.Seq2[backend, backend] {
	return func(yield func(key, layer backend) bool) {
		if !yield(nil, l.backend) {
			return
		}

		for _, b := range l.before {
			if !yield(b, b) {
				return
			}
		}
	}
}

// of is the backend that carries r.
func (l *layers) of(r *row) backend {
	if b := l.at[r]; b != nil {
		return b
	}

	return l.backend
}

func (l *layers) kind(r *row) string             { return l.of(r).kind(r) }
func (l *layers) name(r *row) string             { return l.of(r).name(r) }
func (l *layers) ownedBy(id string, r *row) bool { return l.of(r).ownedBy(id, r) }

// reconcile takes the backend in use first, so that a row that moves over is at all times
// in one of the two.
func (l *layers) reconcile(ctx context.Context, t target) (repairs []string, err error) {
	if !t.whole {
		return l.commit(ctx, t)
	}

	inUse := t
	inUse.rows = l.rows(t.rows, nil)

	if repairs, err = l.backend.reconcile(ctx, inUse); err != nil {
		return repairs, err
	}

	more, err := l.reconcileBefore(ctx, t)
	if err != nil {
		err = &leftBehindError{err}
	}

	return append(repairs, more...), err
}

// commit commits deltas.
func (l *layers) commit(ctx context.Context, t target) (repairs []string, err error) {
	committed := false

	for b, layer := range l.each() {
		part := t
		part.deltas, part.rows = l.part(t.deltas, b), l.rows(t.rows, b)

		if allEmpty(part.deltas) && (b != nil || len(t.deltas) > 0) {
			continue
		}

		some, err := layer.reconcile(ctx, part)
		repairs = append(repairs, some...)

		if err != nil {
			if committed {
				err = &partlyError{err}
			}

			return repairs, err
		}

		committed = true
	}

	for _, d := range t.deltas {
		for _, r := range d.del {
			delete(l.at, r)
		}
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

// reconcileBefore makes right what is from before. What has no rows any more, and is to
// have nothing else, is done with, as is what could not be looked at.
func (l *layers) reconcileBefore(ctx context.Context, t target) ([]string, error) {
	var (
		all  []string
		errs []error
		stay []backend
	)

	if t.exactly {
		repairs, err := l.removeUnseen(ctx)
		all, errs = append(all, repairs...), append(errs, err)
	}

	for _, b := range l.before {
		part := t
		part.deltas = nil // no row is added here
		part.rows = l.rows(t.rows, b)
		part.base = hasRows(part.rows)

		var (
			repairs []string
			err     error
		)

		if part.base || t.exactly {
			repairs, err = b.reconcile(ctx, part)
		}

		if part.base || !t.exactly || err != nil {
			stay = append(stay, b)
		}

		all, errs = append(all, repairs...), append(errs, err)
	}

	l.before = stay

	standing := map[*row]bool{}
	for r := range t.rows {
		standing[r] = true
	}

	maps.DeleteFunc(l.at, func(r *row, _ backend) bool { return !standing[r] })

	return all, errors.Join(errs...)
}

func hasRows(rows iter.Seq[*row]) bool {
	for range rows {
		return true
	}

	return false
}

// removeUnseen takes out what is in backends that have no rows of the table.
func (l *layers) removeUnseen(ctx context.Context) ([]string, error) {
	if len(l.before) == 0 { // somebody may have restored it
		l.unseen = l.others
	}

	var (
		all  []string
		errs []error
	)

	l.unseen = slices.DeleteFunc(slices.Clone(l.unseen), func(find finder) bool {
		b, err := find(ctx, true)
		if err == nil && b != nil {
			var repairs []string

			repairs, err = b.reconcile(ctx, nothing())
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

func (l *layers) missing(ctx context.Context, rows []*row) ([]string, error) {
	var (
		all  []string
		errs []error
	)

	for b, layer := range l.each() {
		part := slices.Collect(l.rows(slices.Values(rows), b))
		if len(part) == 0 {
			continue
		}

		missing, err := layer.missing(ctx, part)
		all, errs = append(all, missing...), append(errs, err)
	}

	return all, errors.Join(errs...)
}

func (l *layers) disturbed(transactions []nfnetlink.Transaction) bool {
	disturbed := l.backend.disturbed(transactions)
	for _, b := range l.before {
		disturbed = b.disturbed(transactions) || disturbed // each takes note
	}

	return disturbed
}

// part is what of each delta concerns b, nil being the backend in use.
func (l *layers) part(deltas []delta, b backend) []delta {
	in := func(rows []*row) []*row {
		return slices.DeleteFunc(slices.Clone(rows), func(r *row) bool { return l.at[r] != b })
	}

	parts := make([]delta, len(deltas))
	for i, d := range deltas {
		parts[i] = delta{del: in(d.del), add: in(d.add), keep: in(d.keep)}
	}

	return parts
}

// rows is what of the table is in b, nil being the backend in use.
func (l *layers) rows(table iter.Seq[*row], b backend) iter.Seq[*row] {
	return func(yield func(*row) bool) {
		for r := range table {
			if l.at[r] == b && !yield(r) {
				return
			}
		}
	}
}

func allEmpty(deltas []delta) bool {
	return !slices.ContainsFunc(deltas, func(d delta) bool { return !d.empty() })
}
