package hostport

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/cri-o/hostport/internal/outcome"
	"github.com/cri-o/hostport/internal/row"
)

// sync makes the table, the kernel and the sockets what pods, in the order of
// their ids, say: for Sync or for Keep. It returns what could not be done.
func (m *hostportManager) sync(ctx context.Context, kind EventKind, pods []podRows) (errs []error) {
	var (
		start = time.Now()
		c     = &change{m: m}
	)

	defer func() {
		e := Event{Kind: kind, Unknown: unknownIn(pods), Took: time.Since(start), Err: errors.Join(errs...)}
		e.count(c.delta)
		m.observe(e)
	}()

	if err := m.enter(ctx); err != nil {
		return []error{m.inFamily(err)}
	}
	defer m.unlock()

	pods = slices.DeleteFunc(pods, func(p podRows) bool { return len(p.rows) == 0 && !p.stays })

	if err := m.ready(ctx); err != nil {
		if holdsNothing(err) && !slices.ContainsFunc(pods, func(p podRows) bool { return len(p.rows) > 0 }) {
			return nil
		}

		return []error{m.inFamily(err)}
	}

	m.observeNode(ctx)

	_ = m.lookAgain(ctx) // what it cannot look at, reconcile tells

	m.planRemovals(c, pods)

	for _, pod := range pods {
		if err := m.planPod(c, pod.rows); err != nil {
			errs = append(errs, &PodError{ID: pod.owner.ID, Err: m.wrap(&operation{name: string(kind), owner: pod.owner}, err)})
		}
	}

	changes, err := m.reconcile(ctx, true)
	if err != nil && !isLeftBehind(err) {
		c.undo()

		return append(errs, m.inFamily(m.revert(ctx, []row.Delta{c.delta}, err)))
	}

	if err != nil {
		errs = append(errs, m.inFamily(err))
	}

	m.finish(ctx, c)

	prepared := map[netip.Addr]bool{}

	for r := range m.table() {
		if ip := r.Pod.Addr(); r.ForLoopback() && !prepared[ip] {
			prepared[ip] = true

			m.prepareNode(r)
		}
	}

	m.tellSynced(kind, c.delta, changes, pods, len(errs), time.Since(start))
	m.synced = true

	return errs
}

// inFamily names the family in an error that names no row.
func (m *hostportManager) inFamily(err error) error { return fmt.Errorf("IPv%s: %w", m.family, err) }

// enter waits for the node and the commit lock until ctx ends, for an operation that is called in
// the right network namespace.
func (m *hostportManager) enter(ctx context.Context) error {
	if err := m.namespace.isCurrent(); err != nil {
		return err
	}

	if err := m.lockNode(ctx, true); err != nil {
		return err
	}

	if err := ctx.Err(); err != nil { // of two cases that are ready select takes either
		return err
	}

	return m.lockCommit(ctx)
}

// lockCommit waits for the commit lock until ctx ends.
func (m *hostportManager) lockCommit(ctx context.Context) error {
	select {
	case m.commitLock <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("waiting for operations before it: %w", ctx.Err())
	}
}

// lockCommitInHalf is lockCommit for half of the time until ctx ends.
func (m *hostportManager) lockCommitInHalf(ctx context.Context) error {
	select {
	case m.commitLock <- struct{}{}: // mostly, and a timer takes longer than that
		return nil
	default:
	}

	ctx, cancel := partOf(ctx, 2)
	defer cancel()

	return m.lockCommit(ctx)
}

// planRemovals takes out of the table what none of pods is to have, if it is in scope.
func (m *hostportManager) planRemovals(c *change, pods []podRows) {
	stay, wanted := staying{}, map[row.PortKey][]*row.Row{}

	for _, pod := range pods {
		if pod.stays {
			stay[row.ShortHash(pod.owner.ID)] = pod.owner
		}

		for _, w := range pod.rows {
			wanted[w.PortKey] = append(wanted[w.PortKey], w)
		}
	}

	for r := range m.table() {
		stays := !r.InScope(m.cfg.scope) || stay.claim(c, r) ||
			slices.ContainsFunc(wanted[r.PortKey], func(w *row.Row) bool { return r.Endpoint == w.Endpoint && c.claim(w.Owner, w.Hash, r) })
		if !stays {
			c.del(r)
		}
	}
}

// staying are the pods that keep what they have, by the hash of their ids.
type staying map[string]row.Owner

// claim reports whether r is one of theirs, and makes the pod known as the owner. A row of which
// the kernel carries the hash is looked up: with each id compared to each row, a thousand pods
// would be a million hashes.
func (s staying) claim(c *change, r *row.Row) bool {
	if r.OwnerHash != "" {
		return c.claim(s[r.OwnerHash], "", r)
	}

	for _, o := range s {
		if c.claim(o, "", r) {
			return true
		}
	}

	return false
}

// planPod does to the table and the sockets what Add does, or nothing.
func (m *hostportManager) planPod(c *change, rows []*row.Row) error {
	before := c.savepoint()

	if len(rows) > 0 {
		m.locate(rows, "")
	}

	for _, r := range rows {
		if err := m.planAdd(c, r); err != nil {
			c.rollBack(before)

			return err
		}
	}

	if err := m.hold(c, before); err != nil {
		c.rollBack(before)

		return err
	}

	return nil
}

// reconcile makes the kernel hold the table, and exactly that if asked: nothing else of
// ours, and where no rules are needed nothing at all. What it cannot do is for Run, or the
// next Sync.
func (m *hostportManager) reconcile(ctx context.Context, exactly bool) (repairs []row.Repair, err error) {
	return m.reconcileAfter(ctx, nil, exactly)
}

// reconcileAfter is reconcile, and takes out rows that are not in the table.
func (m *hostportManager) reconcileAfter(ctx context.Context, gone []*row.Row, exactly bool) (repairs []row.Repair, err error) {
	t := row.Target{Rows: m.table(), Base: m.needsRules() || !exactly, Whole: true, Exactly: exactly}
	if len(gone) > 0 {
		t.Deltas = []row.Delta{{Del: gone}}
	}

	if exactly || m.needsRules() || m.health.condition == inDoubt {
		repairs, err = m.backend.Reconcile(ctx, t)
	}

	held := m.health.reconciled(err, exactly)

	if held && exactly { // nothing of what is found later is to stay
		m.queueMu.Lock()
		m.unfinished = nil
		m.queueMu.Unlock()
	}

	var lost []*row.Row
	if held {
		lost, m.lost = m.lost, nil
	}

	if len(repairs) > 0 || len(lost) > 0 {
		m.flushAllFlows(ctx, lost)
	}

	return repairs, err
}

// revert makes the kernel hold the table as it was before deltas, of which some may have
// been committed before err. What it cannot do is for Run, or the next operation.
func (m *hostportManager) revert(ctx context.Context, deltas []row.Delta, err error) error {
	if !outcome.IsPartly(err) {
		return err
	}

	ctx, cancel := outcome.WithGrace(ctx)
	defer cancel()

	var added []*row.Row
	for _, d := range deltas {
		added = append(added, d.Add...)
	}

	if _, backErr := m.reconcileAfter(ctx, added, false); backErr != nil {
		err = fmt.Errorf("%w; what is done could not be taken back: %v", err, backErr) //nolint:errorlint // is not the cause
	}

	return err
}

// runOnce puts back what others have broken, if they may have, and holds ports that
// could not be held. It fails only where there will be nothing to do any more.
func (m *hostportManager) runOnce(ctx context.Context, disturbed func(backend) bool) error {
	if err := m.namespace.isCurrent(); err != nil {
		return err
	}

	if err := m.lockNode(ctx, false); errors.Is(err, os.ErrClosed) {
		return err
	} else if err != nil { // which Add tells
		return nil
	}

	if err := m.lockCommit(ctx); err != nil {
		return err
	}
	defer m.unlock()

	ctx, cancel := m.cfg.withTimeout(ctx)
	defer cancel()

	if err := m.ready(ctx); errors.Is(err, os.ErrClosed) {
		return err
	} else if err != nil { // which Add tells
		return nil
	}

	m.sockets.Retry()

	m.disownRemoved(nil)
	m.observeNode(ctx)
	m.exempt(ctx)

	if m.nodeBefore != nil {
		m.flushFlows(ctx, nil)
	}

	m.flows.Resume()

	if m.health.lookDue() {
		_ = m.lookAgain(ctx) // there will be another time
	}

	if disturbed(m.backend) || m.relocate() {
		m.health.suspects()
	}

	if m.health.repairDue() {
		m.repair(ctx)
	}

	m.prune(ctx)

	if len(m.rows) > 0 {
		m.tellForwarding()
	}

	return nil
}

// hasGone reports whether there are rows that a Remove could not take out.
func (m *hostportManager) hasGone() bool {
	for r := range m.table() {
		if r.Gone {
			return true
		}
	}

	return false
}

// prune takes out the rows that could not be removed, if that is due.
func (m *hostportManager) prune(ctx context.Context) {
	if !m.health.pruneDue() {
		return
	}

	op := &operation{remove: true, plan: func(c *change) error {
		for r := range m.table() {
			if r.Gone {
				c.del(r)
			}
		}

		return nil
	}}

	rows := m.removedBy(op) // none if their pods have them again

	m.commitAll(ctx, []*operation{op})
	m.health.pruned(op.err)

	if op.err != nil {
		m.log.Error(oneLineError{op.err}, "Cannot remove host ports of pods that are gone", "rows", listWithPods(rows))
	} else if len(rows) > 0 {
		m.log.Info("Removed host ports of pods that are gone", "rows", listWithPods(rows))
	}
}

// exempt has what is for addresses of Services left alone, if that is due.
func (m *hostportManager) exempt(ctx context.Context) {
	if !m.exemptDue || !m.needsRules() {
		return
	}

	repairs, err := m.backend.Reconcile(ctx, row.Target{Rows: m.table(), Base: true})
	if m.exemptDue = false; err != nil {
		m.health.suspects()
	}

	if len(repairs) > 0 {
		m.tellRepaired(repairs)
		m.flushAllFlows(ctx, nil)
	}
}

// repair reconciles all rows, and tells of it.
func (m *hostportManager) repair(ctx context.Context) {
	repairs, err := m.reconcile(ctx, m.health.leftovers)
	if m.health.repaired(err) {
		m.log.Error(oneLineError{err}, "Cannot repair host ports")
		m.observe(Event{Kind: EventRepair, Err: err})
	} else if err == nil {
		m.tellRepaired(repairs)
	}
}

// check looks for rows that a pod ought to have. Its error is a *MissingError, or says why it
// could not look at everything.
func (m *hostportManager) check(ctx context.Context, rows []*row.Row) error {
	if err := m.enter(ctx); err != nil {
		return err
	}
	defer m.unlock()

	if err := m.ready(ctx); err != nil {
		return err
	}

	var (
		missing MissingError
		stand   []*row.Row
		err     error
	)

	for _, w := range rows {
		r, holder := m.standing(w)
		if r != nil {
			stand = append(stand, r)
		} else {
			missing.Rows = append(missing.Rows, w.String()+holder)
		}

		if !m.sockets.Lacks(w.Endpoint) {
			continue
		}

		if obstacle := m.sockets.Obstacle(w.Endpoint); r != nil || obstacle != "" {
			missing.Sockets = append(missing.Sockets, w.String()+": "+cmp.Or(obstacle, "nothing is in the way any more"))
		}
	}

	if missing.Rules, err = m.backend.Missing(ctx, stand); err == nil && len(stand) < len(rows) {
		err = m.health.unseen // the row may be where nobody could look
	}

	if err == nil && len(missing.Rows)+len(missing.Sockets)+len(missing.Rules) > 0 {
		missing.Pod, missing.ID = rows[0].Owner.String(), rows[0].Owner.ID
		err = &missing
	}

	return err
}

// standing returns the row of the table that is as a pod wants it, or nil and who has the port.
func (m *hostportManager) standing(w *row.Row) (found *row.Row, holder string) {
	for _, r := range m.rows[w.PortKey] {
		switch {
		case !m.ownedBy(w.Owner, w.Hash, r):
			if r.Overlaps(w.Endpoint) {
				holder += fmt.Sprintf(" (%s has %s)", podOf(r), r)
			}
		case r.Endpoint == w.Endpoint && r.Pod == w.Pod:
			found = r
		}
	}

	return found, holder
}
