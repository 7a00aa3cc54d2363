package hostport

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/cri-o/hostport/internal/outcome"
	"github.com/cri-o/hostport/internal/row"
)

// operation is one Add or Remove on its way through the queue.
type operation struct {
	name    string
	owner   row.Owner
	remove  bool
	rows    []*row.Row // of an Add
	refs    []ref      // of a Remove; nil: all rows of the pod
	applied bool       // the table knows that the Remove has failed
	// plan does the operation to the table and the sockets. It may be called
	// again after its change has been undone.
	plan func(*change) error
	// deadline is when its caller wants it done.
	deadline time.Time

	change *change
	done   bool // guarded by commitLock, as is err
	err    error
}

// do brings op into the kernel, together with whatever else waits, unless allowed says
// why not.
func (m *hostportManager) do(ctx context.Context, op *operation, allowed func() error) (err error) {
	start := time.Now()
	defer func() { m.observeOperation(op, time.Since(start), err) }()

	if err := allowed(); err != nil {
		return m.wrap(op, err)
	}

	op.deadline, _ = ctx.Deadline()

	if err = m.lockNode(ctx, true); err == nil {
		err = ctx.Err()
	}

	if err != nil {
		if op.remove {
			m.remember(op)
		}

		return m.wrap(op, err)
	}

	m.queueMu.Lock()
	m.queue = append(m.queue, op)
	m.queueMu.Unlock()

	if err := m.lockCommitInHalf(ctx); err != nil { // the other half is for the transaction
		if m.withdraw(op) {
			if op.remove {
				m.remember(op)
			}

			return m.wrap(op, err)
		}

		m.commitLock <- struct{}{} // somebody is at it already
	}

	defer m.unlock()

	if !op.done {
		m.commit(m.takeQueue()) //nolint:contextcheck // not of one caller alone
	}

	if op.err != nil {
		return m.wrap(op, op.err)
	}

	m.tellDone(op, time.Since(start))

	return nil
}

func (m *hostportManager) takeQueue() []*operation {
	m.queueMu.Lock()
	defer m.queueMu.Unlock()

	ops := m.queue
	m.queue = nil

	return ops
}

func (m *hostportManager) withdraw(op *operation) bool {
	m.queueMu.Lock()
	defer m.queueMu.Unlock()

	before := len(m.queue)
	m.queue = slices.DeleteFunc(m.queue, func(o *operation) bool { return o == op })

	return len(m.queue) < before
}

// remember keeps in mind a Remove that has failed, once.
func (m *hostportManager) remember(op *operation) {
	m.queueMu.Lock()
	defer m.queueMu.Unlock()

	same := func(o *operation) bool { return o.owner.ID == op.owner.ID && slices.Equal(o.refs, op.refs) }
	m.unfinished = append(slices.DeleteFunc(m.unfinished, same), op)
}

// disownRemoved disowns what Removes that have failed were to take out: of the table, once,
// and of rows that have been found since.
func (m *hostportManager) disownRemoved(found []*row.Row) {
	m.queueMu.Lock()
	defer m.queueMu.Unlock()

	for _, op := range m.unfinished {
		m.disown(slices.DeleteFunc(m.removedBy(op), func(r *row.Row) bool { return op.applied && !slices.Contains(found, r) }))
		op.applied = true
	}

	if m.health.unseen == nil {
		m.unfinished = nil
	}
}

// removedBy are the rows that a Remove is to take out.
func (m *hostportManager) removedBy(op *operation) []*row.Row {
	c := &change{m: m}
	_ = op.plan(c) // a Remove's does not fail
	rows := slices.Clone(c.delta.Del)
	c.undo()

	return rows
}

// disown makes rows that could not be removed nobody's: their pods are gone, whatever the
// kernel still holds. The next Add that wants their ports gets them, and Run takes the
// others out.
func (m *hostportManager) disown(rows []*row.Row) {
	for _, r := range rows {
		r.Owner, r.Gone = row.Owner{}, true
	}

	if len(rows) > 0 {
		m.health.abandons()
	}
}

// wrap names the pod and the family, unless the error does.
func (m *hostportManager) wrap(op *operation, err error) error {
	if conflict := (*ConflictError)(nil); errors.As(err, &conflict) {
		return err
	}

	return fmt.Errorf("%s IPv%s host ports of pod %s: %w", op.name, m.family, op.owner, err)
}

// until is how long a transaction of ops may take: until the first of them wants to be done.
// But one in a hurry does not leave the others less than what they have not waited.
func (m *hostportManager) until(ops []*operation) time.Time {
	byDeadline := func(a, b *operation) int { return a.deadline.Compare(b.deadline) }
	first, last := slices.MinFunc(ops, byDeadline).deadline, slices.MaxFunc(ops, byDeadline).deadline
	half := time.Now().Add(m.cfg.timeout / 2) // the other half is for waiting

	return slices.MaxFunc([]time.Time{first, slices.MinFunc([]time.Time{half, last}, time.Time.Compare)}, time.Time.Compare)
}

// commit gives each operation its outcome. The caller has the commit lock.
func (m *hostportManager) commit(ops []*operation) {
	ctx, cancel := context.WithDeadline(context.Background(), m.until(ops))
	defer cancel()

	err := m.ready(ctx)
	if err == nil {
		m.disownRemoved(nil)
		m.observeNode(ctx)
		unseen := m.lookAgain(ctx)
		m.commitAll(ctx, ops)
		m.removeInDoubt(ctx, ops)

		for _, op := range ops {
			if op.remove && op.err == nil { // what it names may be there
				op.err = unseen
			}
		}
	}

	for _, op := range ops {
		op.done = true
		if err != nil && !(op.remove && holdsNothing(err)) {
			op.err = err
		}

		if op.remove && op.err != nil {
			m.remember(op)
		}
	}
}

// commitAll commits ops in one transaction. An operation that the kernel
// refuses does not stop the others: they are planned anew without it.
func (m *hostportManager) commitAll(ctx context.Context, ops []*operation) {
	for len(ops) > 0 {
		batch, deltas := m.plan(ops)
		if len(batch) == 0 {
			return
		}

		repairs, err := m.backend.Reconcile(ctx, row.Target{Deltas: deltas, Rows: m.table(), Base: true})
		if err == nil {
			m.finishAll(ctx, batch)
		} else {
			undoAll(batch)
		}

		if len(repairs) > 0 {
			m.tellRepaired(repairs)
			m.flushAllFlows(ctx, nil)
		}

		refused := (*outcome.RefusedError)(nil)

		if err != nil && (!errors.As(err, &refused) || outcome.IsPartly(err)) {
			m.doubt(deltas)
		}

		err = m.revert(ctx, deltas, err)

		switch {
		case err == nil:
			return
		case refused != nil:
			ops = fail(ops, batch[refused.Delta:refused.Delta+1], err)
		case len(batch) > 1: // nobody knows whose fault it is
			for _, op := range ops {
				m.commitAll(ctx, []*operation{op})
			}

			return
		default:
			ops = fail(ops, batch, err)
		}
	}
}

// doubt notes that nobody knows whether the kernel has taken deltas.
func (m *hostportManager) doubt(deltas []row.Delta) {
	m.health.doubts()

	for _, d := range deltas {
		m.lost = append(m.lost, d.Add...)
	}
}

// removeInDoubt makes it true for the Removes among ops that nothing of their pods is left:
// what failed before may have left rows that are not in the table.
func (m *hostportManager) removeInDoubt(ctx context.Context, ops []*operation) {
	if m.health.condition != inDoubt {
		return
	}

	removes := slices.DeleteFunc(slices.Clone(ops), func(op *operation) bool { return !op.remove || op.err != nil })
	if len(removes) == 0 {
		return
	}

	_, err := m.reconcile(ctx, m.health.leftovers)
	if err == nil || isLeftBehind(err) {
		return
	}

	for _, op := range removes {
		op.err = err
	}
}

func undoAll(batch []*operation) {
	for _, op := range slices.Backward(batch) {
		op.change.undo()
	}
}

// fail returns those of ops that have not failed. They may have been planned on
// what the failed have done.
func fail(ops, failed []*operation, err error) []*operation {
	for _, op := range failed {
		op.err = err
	}

	return slices.DeleteFunc(slices.Clone(ops), func(op *operation) bool { return slices.Contains(failed, op) })
}

// finishAll does what is left of operations whose rules are committed.
func (m *hostportManager) finishAll(ctx context.Context, batch []*operation) {
	changes := make([]*change, len(batch))
	for i, op := range batch {
		changes[i] = op.change
	}

	m.finish(ctx, changes...)

	for _, op := range batch {
		if i := slices.IndexFunc(op.rows, (*row.Row).ForLoopback); i >= 0 {
			m.prepareNode(op.rows[i])
		}
	}
}

// finish ends the flows that changes have made stale, and lets go of what they
// no longer need.
func (m *hostportManager) finish(ctx context.Context, changes ...*change) {
	deltas := make([]row.Delta, len(changes))
	for i, c := range changes {
		deltas[i] = c.delta
	}

	m.flushFlows(ctx, deltas)

	for _, c := range changes {
		c.finish()

		if len(c.delta.Add)+len(c.delta.Keep) > 0 && m.forwards == unknown {
			m.tellForwarding()
		}
	}
}

// plan does ops to the table and the sockets, one after the other, and
// returns those that have something for the kernel to do.
func (m *hostportManager) plan(ops []*operation) ([]*operation, []row.Delta) {
	var (
		batch  []*operation
		deltas []row.Delta
	)

	for _, op := range ops {
		op.change = &change{m: m}

		if op.err = op.plan(op.change); op.err != nil {
			op.change.undo()
		} else if !op.change.delta.Empty() {
			batch = append(batch, op)
			deltas = append(deltas, op.change.delta)
		}
	}

	return batch, deltas
}
