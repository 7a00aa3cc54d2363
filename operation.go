package hostport

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/cri-o/hostport/internal/flows"
	"github.com/cri-o/hostport/internal/localhost"
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

	change *change
	done   bool // guarded by commitLock, as is err
	err    error
}

// do brings op into the kernel, together with whatever else waits, unless allowed says
// why not.
func (m *hostportManager) do(op *operation, allowed func() error) error {
	if err := allowed(); err != nil {
		return m.wrap(op, err)
	}

	start := time.Now()

	ctx, cancel := context.WithTimeout(context.Background(), m.cfg.timeout)
	defer cancel()

	if err := m.lockNode(ctx, true); err != nil {
		if op.remove {
			m.remember(op)
		}

		return m.wrap(op, err)
	}

	m.queueMu.Lock()
	m.queue = append(m.queue, op)
	m.queueMu.Unlock()

	select {
	case m.commitLock <- struct{}{}:
	case <-ctx.Done():
		if m.withdraw(op) {
			if op.remove {
				m.remember(op)
			}

			return m.wrap(op, fmt.Errorf("waiting for operations before it: %w", ctx.Err()))
		}

		m.commitLock <- struct{}{} // somebody is at it already
	}

	defer func() { <-m.commitLock }()

	if !op.done {
		m.commit(m.takeQueue())
	}

	if op.err != nil {
		return m.wrap(op, op.err)
	}

	m.logDone(op, time.Since(start))

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

func (m *hostportManager) logDone(op *operation, took time.Duration) {
	log := m.cfg.log.WithValues("pod", op.owner, "podSandboxID", op.owner.ID, "family", m.family)

	c := op.change
	if c == nil || c.delta.Empty() {
		log.V(4).Info("No host ports to "+op.name, "took", took)

		return
	}

	done := "Added host ports"
	if op.remove {
		done = "Removed host ports"
	}

	log.Info(done, "podIDHash", row.ShortHash(op.owner.ID),
		"added", len(c.delta.Add), "removed", len(c.delta.Del), "kept", len(c.delta.Keep), "took", took)

	if v := log.V(4); v.Enabled() {
		for i, rows := range [][]*row.Row{c.delta.Del, c.delta.Add, c.delta.Keep} {
			for _, r := range rows {
				v.Info("Host port row", "row", r, "change", []string{"removed", "added", "kept"}[i])
			}
		}
	}
}

// commit gives each operation its outcome. The caller has the commit lock.
func (m *hostportManager) commit(ops []*operation) {
	ctx, cancel := context.WithTimeout(context.Background(), m.cfg.timeout)
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

		if op.remove && op.err != nil && !m.closed {
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
		case len(batch) > 1 && ctx.Err() == nil: // nobody knows whose fault it is
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

		if len(c.delta.Add)+len(c.delta.Keep) > 0 {
			m.warnOfForwarding()
		}
	}
}

// flushFlows ends the flows that deltas, or a change of the node's addresses, have made
// stale.
func (m *hostportManager) flushFlows(ctx context.Context, deltas []row.Delta) {
	ctx, cancel := outcome.WithGrace(ctx)
	defer cancel()

	before := m.nodeBefore
	if time.Now().Before(m.flushAt) { // it takes long then, and held others up
		before = nil
	}

	err := m.flows.Flush(ctx, deltas, before, m.view())
	if err != nil {
		m.flows.CannotEnd(err)
	}

	switch {
	case before == nil:
	case err != nil:
		m.flushAt = time.Now().Add(repairPause)
	default:
		m.nodeBefore = nil
	}
}

// view is what flows are compared with.
func (m *hostportManager) view() flows.View {
	return flows.View{
		Now: m.node, RowFor: m.rowFor, HasRows: m.hasRows, Localhost: m.cfg.localhostIn(m.family),
		Services: m.backend != nil && m.backend.Kind(nil) == string(BackendIPTables),
	}
}

// withView calls look with the commit lock held. Close calls flows.stop first, so the manager
// is open.
func (m *hostportManager) withView(ctx context.Context, look func(flows.View)) error {
	if err := m.lockCommit(ctx); err != nil {
		return err
	}
	defer func() { <-m.commitLock }()

	look(m.view())

	return nil
}

// observeNode takes note of the node's addresses. What could not be looked at is
// looked at by the next operation.
func (m *hostportManager) observeNode(ctx context.Context) {
	now, err := m.addrs.Now(ctx)
	if err != nil {
		if m.nodeErr != err.Error() {
			m.cfg.log.Error(err, "Cannot look at the node's addresses", "family", m.family)
		}

		m.nodeErr = err.Error()

		return
	}

	m.nodeErr = ""

	if now == m.node {
		return
	}

	if len(m.rows) > 0 {
		m.nodeBefore = cmp.Or(m.nodeBefore, m.node).Until(now)
	}

	m.node = now

	m.exemptDue = m.backend.Exempt(now.Services())
}

// watchNode sends to news when the node's addresses may have changed, until ctx ends. If
// it cannot, Run still looks, if later.
func (m *hostportManager) watchNode(ctx context.Context, news chan<- struct{}) {
	if err := m.addrs.Watch(ctx, news); err != nil && !errors.Is(err, net.ErrClosed) {
		m.cfg.log.Error(err, "No news of the node's addresses", "family", m.family)
	}
}

// flushAllFlows ends the flows that have begun while rows of the table were missing, and
// those of rows that turned out to be lost.
func (m *hostportManager) flushAllFlows(ctx context.Context, lost []*row.Row) {
	m.flushFlows(ctx, []row.Delta{{Del: lost, Keep: slices.Collect(m.table())}})
}

// prepareNode sees to what it takes besides rules for loopback addresses to lead
// to a row's pod. What is missing is told in the log: the rows themselves work.
func (m *hostportManager) prepareNode(r *row.Row) {
	if r.Device == "" || !m.cfg.localhostIn(m.family) { // it has been told why
		return
	}

	if err := m.localhost.Open(r.Device); err != nil {
		m.cfg.log.Error(err, "Host ports cannot be reached through 127.0.0.0/8", "pod", r.Owner, "podIP", r.Pod.Addr())
	}
}

// locate finds the interface to the pod of rows, and whether its neighbours there have
// to be masqueraded. named is what the caller takes for the interface. What cannot be
// found out is told in the log, and looked at again by Run: the rows themselves work.
func (m *hostportManager) locate(rows []*row.Row, named string) {
	pod := rows[0].Pod.Addr()

	device, bypassed, err := m.find(named, pod)
	if err != nil {
		m.cfg.log.Error(err, "The interface to a pod is not known: its neighbours and 127.0.0.0/8 may not reach its host ports",
			"pod", rows[0].Owner, "podIP", pod)

		m.relocation = true

		return
	}

	for _, r := range rows {
		r.SetDevice(device, bypassed)
	}
}

// find returns the interface to a pod, and whether the pod answers its neighbours there
// past the node.
func (m *hostportManager) find(named string, pod netip.Addr) (device string, bypassed bool, err error) {
	if device, err = m.links.To(named, pod); err == nil {
		bypassed, err = m.bypassedOn(device)
	}

	return device, bypassed, err
}

// bypassedOn reports whether pods on an interface answer their neighbours past the node.
// If it is a bridge where that has changed, all rows are to be looked at.
func (m *hostportManager) bypassedOn(device string) (bool, error) {
	now, err := m.links.Bypassed(device)
	if err != nil || !m.links.IsBridge(device) {
		return now, err
	}

	before, known := m.bridges[device]

	m.bridges[device] = now
	m.relocation = m.relocation || known && before != now

	return now, nil
}

// relocate looks again at the interfaces to pods, and reports whether rows have changed
// by that. It costs little as long as no bridge has.
func (m *hostportManager) relocate() (changed bool) {
	m.links.Forget()

	for device := range m.bridges {
		_, _ = m.bypassedOn(device) // there will be another time
	}

	if !m.relocation {
		return false
	}

	m.relocation = false

	type place struct {
		device   string
		bypassed bool
		err      error
	}

	found, at := map[netip.Addr]place{}, map[string]place{}

	for r := range m.table() {
		p, known := at[r.Device]
		if r.Device == "" {
			p, known = found[r.Pod.Addr()]
		}

		switch {
		case known:
		case r.Device == "":
			p.device, p.bypassed, p.err = m.find("", r.Pod.Addr())
			found[r.Pod.Addr()] = p
		default:
			p.device = r.Device
			p.bypassed, p.err = m.bypassedOn(r.Device)
			at[r.Device] = p
		}

		if p.err != nil {
			m.relocation = true

			continue
		}

		before := r.Link
		r.SetDevice(p.device, p.bypassed)
		changed = changed || r.Link != before
	}

	return changed
}

// warnOfForwarding says once if the node does not forward.
func (m *hostportManager) warnOfForwarding() {
	if m.warned {
		return
	}

	set, err := localhost.IsSet(localhost.Forwarding(m.family))
	if err != nil { // there will be another time
		return
	}

	m.warned = true

	if !set {
		m.cfg.log.Info("Host ports can only be reached from the node itself: it does not forward",
			"family", m.family, "sysctl", localhost.Forwarding(m.family))
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

// change is what one operation has done so far, and how to take it back.
type change struct {
	m       *hostportManager
	delta   row.Delta
	undos   []func()
	release []row.Endpoint // sockets of rows that go, once the rules have gone
}

func (c *change) add(r *row.Row) {
	c.delta.Add = append(c.delta.Add, r)
	c.set(r.PortKey, append(slices.Clip(c.m.rows[r.PortKey]), r))
}

func (c *change) del(r *row.Row) {
	c.delta.Del = append(c.delta.Del, r)
	c.release = append(c.release, r.Endpoint)

	rest := slices.Clone(c.m.rows[r.PortKey])
	c.set(r.PortKey, slices.DeleteFunc(rest, func(o *row.Row) bool { return o == r }))
}

func (c *change) keep(r *row.Row) { c.delta.Keep = append(c.delta.Keep, r) }

func (c *change) set(k row.PortKey, rows []*row.Row) {
	before := c.m.rows[k]
	c.undos = append(c.undos, func() { c.m.setRows(k, before) })
	c.m.setRows(k, rows)
}

func (c *change) undo() { c.rollBack(savepoint{}) }

// savepoint is how far a change had come.
type savepoint struct{ del, add, keep, undos, release int }

func (c *change) savepoint() savepoint {
	return savepoint{len(c.delta.Del), len(c.delta.Add), len(c.delta.Keep), len(c.undos), len(c.release)}
}

// rollBack undoes what the change has done since.
func (c *change) rollBack(to savepoint) {
	for _, undo := range slices.Backward(c.undos[to.undos:]) {
		undo()
	}

	c.delta = row.Delta{Del: c.delta.Del[:to.del], Add: c.delta.Add[:to.add], Keep: c.delta.Keep[:to.keep]}
	c.undos, c.release = c.undos[:to.undos], c.release[:to.release]
}

// finish lets go of what the operation no longer needs.
func (c *change) finish() {
	for _, e := range c.release {
		c.m.sockets.Release(e)
	}
}
