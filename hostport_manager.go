package hostport

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"os"
	"slices"
	"sync"
	"time"
)

// HostPortManager maps host ports to pods. It is safe for concurrent use.
type HostPortManager interface {
	// Add maps the host ports of a pod. id is the pod's sandbox id, one per
	// pod and never empty. natInterfaceName is the host's interface towards
	// the pod; it may be empty, and this version does not use it.
	//
	// Either all rows of podPortMapping work when Add returns nil, or nothing
	// has changed. Add again puts back what is missing, adds rows that are new
	// and moves rows whose pod IP or container port has changed, without a
	// packet in between that meets neither. Rows it does not name stay.
	//
	// A pod without host ports, on the host network, or nil costs nothing.
	//
	// Errors: ErrInvalidMapping; *ConflictError, where another pod has the
	// port; syscall.EADDRINUSE, where another process has it;
	// context.DeadlineExceeded; errors.ErrUnsupported on systems other than
	// Linux; else what the kernel or iptables(8) said.
	Add(id string, podPortMapping *PodPortMapping, natInterfaceName string) error

	// Remove takes out the rows of a pod that podPortMapping names, in both
	// families, or all of them if it is nil. Rows are compared by meaning, and
	// only ever removed for their owner. The pod's IP and names are not needed.
	// To remove what is not there is success, at no cost.
	Remove(id string, podPortMapping *PodPortMapping) error
}

// hostportManager is the manager of one family: the table, who owns its rows,
// and the order of an operation.
type hostportManager struct {
	family ipFamily
	cfg    config
	open   func(ctx context.Context) (backend, error)

	queueMu sync.Mutex
	queue   []*operation // waiting to be committed

	// turn is held by sending to it. Whoever holds it commits what has queued
	// up, and only that one touches the fields below.
	turn    chan struct{}
	backend backend            // nil until open has succeeded
	rows    map[portKey][]*row // the table; slices are replaced, never changed
	hashes  map[string]*row    // the table by what names a row in the kernel
	sockets sockets
	closed  bool
}

// NewHostportManager returns the manager of one IP family that works through
// the caller's iptables. Rows that the kernel holds already are adopted.
//
// It never fails: if iptables does not answer now, the first Add says why.
// Its sockets are released by a Close method: io.Closer tells.
func NewHostportManager(iptables IPTables, opts ...Option) HostPortManager {
	m := newHostportManager(familyOfIPTables(iptables), newConfig(opts), func(context.Context) (backend, error) {
		return newIPTablesBackend(iptables), nil
	})
	_ = m.start() // told by the first Add

	return m
}

func newHostportManager(f ipFamily, cfg config, open func(context.Context) (backend, error)) *hostportManager {
	return &hostportManager{
		family:  f,
		cfg:     cfg,
		open:    open,
		turn:    make(chan struct{}, 1),
		rows:    map[portKey][]*row{},
		hashes:  map[string]*row{},
		sockets: newSockets(f, cfg.sockets),
	}
}

// Add implements HostPortManager.
func (m *hostportManager) Add(id string, podPortMapping *PodPortMapping, _ string) error {
	rows, err := rowsOf(id, podPortMapping)
	if err != nil {
		return err
	}

	if len(rows) == 0 || rows[0].family() != m.family {
		return nil
	}

	return m.do(&operation{
		name:  "add",
		owner: rows[0].owner,
		plan: func(c *change) error {
			for _, r := range rows {
				if err := m.place(c, r); err != nil {
					return err
				}
			}

			return m.hold(c)
		},
	})
}

// Remove implements HostPortManager.
func (m *hostportManager) Remove(id string, podPortMapping *PodPortMapping) error {
	op := &operation{name: "remove", owner: owner{id: id}, remove: true}

	if podPortMapping == nil {
		op.plan = func(c *change) error {
			for r := range m.table() {
				if m.owns(op.owner, "", r) {
					c.del(r)
				}
			}

			return nil
		}

		return m.do(op)
	}

	claims := claimsOf(id, podPortMapping, m.family)
	if podPortMapping.HostNetwork || len(claims) == 0 {
		return nil
	}

	op.owner.namespace, op.owner.name = podPortMapping.Namespace, podPortMapping.Name
	op.plan = func(c *change) error {
		for _, claim := range claims {
			for _, r := range m.rows[claim.portKey] {
				if r.endpoint == claim.endpoint && m.owns(op.owner, claim.hash, r) {
					c.del(r)
				}
			}
		}

		return nil
	}

	return m.do(op)
}

// place puts w into the table and out of it what w replaces: the pod's own
// row of the endpoint, if that leads elsewhere, and whatever overlaps it and
// is nobody's.
func (m *hostportManager) place(c *change, w *row) error {
	kept := false

	for _, r := range m.rows[w.portKey] {
		switch {
		case !r.overlaps(w.endpoint):
		case m.owns(w.owner, w.hash, r):
			switch {
			case r.endpoint == w.endpoint && r.pod == w.pod && !r.astray && !kept:
				r.label, kept = w.label, true // of a row from before it may be lost
				c.keep(r)
			case r.endpoint == w.endpoint:
				c.del(r)
			case r.astray: // beside w, on any address or on one: both stand, in order
				again := *r
				again.astray = false

				c.del(r)
				c.add(&again)
			}
		case r.owner.known():
			return &ConflictError{
				Pod: w.owner.String(), OtherPod: r.owner.String(),
				Protocol: w.proto.api(), HostPort: int32(w.port),
				HostIP: w.hostIP(m.family).String(), OtherHostIP: r.hostIP(m.family).String(),
			}
		default:
			m.cfg.log.Info("Replacing a host port whose owner is unknown",
				"row", r, "label", r.label, "pod", w.owner)
			c.del(r)
		}
	}

	if kept {
		return nil
	}

	// CRI-O's way to make names has these two in one hash: ids of different
	// length, or 8 and 0::1 beside 80 and ::1.
	if r := m.hashes[w.hash]; r != nil && r.endpoint != w.endpoint {
		return &rowError{w, fmt.Errorf("%w: its name in the kernel, %s, is taken by row %s of pod %s",
			ErrInvalidMapping, w.hash, r, r.owner)}
	}

	c.add(w)

	return nil
}

// owns tells whether r is o's. A row whose owner was not known is o's from
// now on if its marks say so; hash is the one that o would give it, if known.
func (m *hostportManager) owns(o owner, hash string, r *row) bool {
	if !r.owner.known() && o.known() && (r.hash == hash || m.backend.owns(o.id, r)) {
		r.owner = o
	}

	return r.owner.known() && r.owner.id == o.id
}

// operation is one Add or Remove on its way through the queue.
type operation struct {
	name   string
	owner  owner
	remove bool
	// plan does the operation to the table and the sockets. It may be called
	// again after its change has been undone.
	plan func(*change) error

	change *change
	done   bool // guarded by turn, as is err
	err    error
}

// do brings op into the kernel, together with whatever else waits.
func (m *hostportManager) do(op *operation) error {
	start := time.Now()

	ctx, cancel := context.WithTimeout(context.Background(), m.cfg.timeout)
	defer cancel()

	m.queueMu.Lock()
	m.queue = append(m.queue, op)
	m.queueMu.Unlock()

	select {
	case m.turn <- struct{}{}:
	case <-ctx.Done():
		if m.withdraw(op) {
			return m.wrap(op, fmt.Errorf("waiting for operations before it: %w", ctx.Err()))
		}

		m.turn <- struct{}{} // somebody is at it already
	}

	defer func() { <-m.turn }()

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

// wrap names the pod, unless the error does.
func (m *hostportManager) wrap(op *operation, err error) error {
	if conflict := (*ConflictError)(nil); errors.As(err, &conflict) {
		return err
	}

	return fmt.Errorf("%s host ports of pod %s: %w", op.name, op.owner, err)
}

func (m *hostportManager) logDone(op *operation, took time.Duration) {
	log := m.cfg.log.WithValues("pod", op.owner, "podSandboxID", op.owner.id, "family", m.family)

	c := op.change
	if c == nil || c.delta.empty() {
		log.V(4).Info("No host ports to "+op.name, "took", took)

		return
	}

	log.Info("Host ports done", "operation", op.name,
		"added", len(c.delta.add), "removed", len(c.delta.del), "kept", len(c.delta.keep), "took", took)

	if v := log.V(4); v.Enabled() {
		for _, r := range slices.Concat(c.delta.del, c.delta.add, c.delta.keep) {
			v.Info("Host port row", "operation", op.name, "row", r)
		}
	}
}

// commit gives each operation its outcome. The caller has the turn.
func (m *hostportManager) commit(ops []*operation) {
	ctx, cancel := context.WithTimeout(context.Background(), m.cfg.timeout)
	defer cancel()

	err := m.ready(ctx)
	if err == nil {
		m.commitAll(ctx, ops)
	}

	for _, op := range ops {
		op.done = true
		if err != nil && !(op.remove && errors.Is(err, errUnavailable)) {
			op.err = err
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

		err := m.backend.apply(ctx, deltas, m.table())
		if err == nil {
			for _, op := range batch {
				op.change.finish()
			}

			return
		}

		for _, op := range slices.Backward(batch) {
			op.change.undo()
		}

		failed := batch

		if refused := (*refusedError)(nil); errors.As(err, &refused) {
			failed = batch[refused.delta : refused.delta+1]
		} else if len(batch) > 1 && ctx.Err() == nil { // nobody knows whose fault it is
			for _, op := range ops {
				m.commitAll(ctx, []*operation{op})
			}

			return
		}

		for _, op := range failed {
			op.err = err
		}

		// The others may have been planned on what has just been undone.
		ops = slices.DeleteFunc(slices.Clone(ops), func(op *operation) bool { return slices.Contains(failed, op) })
	}
}

// plan does ops to the table and the sockets, one after the other, and
// returns those that have something for the kernel to do.
func (m *hostportManager) plan(ops []*operation) ([]*operation, []delta) {
	var (
		batch  []*operation
		deltas []delta
	)

	for _, op := range ops {
		op.change = &change{m: m}

		if op.err = op.plan(op.change); op.err != nil {
			op.change.undo()
		} else if !op.change.delta.empty() {
			batch = append(batch, op)
			deltas = append(deltas, op.change.delta)
		}
	}

	return batch, deltas
}

// change is what one operation has done so far, and how to take it back.
type change struct {
	m       *hostportManager
	delta   delta
	undos   []func()
	release []endpoint // sockets of rows that go, once the rules have gone
}

func (c *change) add(r *row) {
	c.delta.add = append(c.delta.add, r)
	c.set(r.portKey, append(slices.Clip(c.m.rows[r.portKey]), r))
}

func (c *change) del(r *row) {
	c.delta.del = append(c.delta.del, r)
	c.release = append(c.release, r.endpoint)

	rest := slices.Clone(c.m.rows[r.portKey])
	c.set(r.portKey, slices.DeleteFunc(rest, func(o *row) bool { return o == r }))
}

func (c *change) keep(r *row) { c.delta.keep = append(c.delta.keep, r) }

func (c *change) set(k portKey, rows []*row) {
	before := c.m.rows[k]
	c.undos = append(c.undos, func() { c.m.setRows(k, before) })
	c.m.setRows(k, rows)
}

func (c *change) undo() {
	for _, undo := range slices.Backward(c.undos) {
		undo()
	}
}

// finish lets go of what the operation no longer needs.
func (c *change) finish() {
	for _, e := range c.release {
		c.m.sockets.release(e)
	}
}

// hold binds the ports of the change's rows. Each row has its share of the
// endpoint's socket, so a row that takes over from another takes the socket
// over too.
func (m *hostportManager) hold(c *change) error {
	for _, r := range c.delta.add {
		if err := m.sockets.acquire(r.endpoint); err != nil {
			return &rowError{r, err}
		}

		c.undos = append(c.undos, func() { m.sockets.release(r.endpoint) })
	}

	for _, r := range c.delta.keep {
		if err := m.sockets.ensure(r.endpoint); err != nil {
			return &rowError{r, err}
		}
	}

	m.sockets.retry()

	return nil
}

// ready opens the backend, if that has not succeeded yet, and adopts the rows
// that the kernel holds.
func (m *hostportManager) ready(ctx context.Context) error {
	if m.closed {
		return fmt.Errorf("host port manager: %w", os.ErrClosed)
	}

	if m.backend != nil {
		return nil
	}

	b, err := m.open(ctx)
	if err != nil {
		return err
	}

	rows, err := b.list(ctx)
	if err != nil {
		return err
	}

	m.backend = b

	for _, r := range rows {
		m.setRows(r.portKey, append(m.rows[r.portKey], r))

		if err := m.sockets.adopt(r.endpoint); err != nil {
			m.cfg.log.Error(err, "Cannot hold the port of a row from before", "row", r, "label", r.label)
		}
	}

	m.cfg.log.Info("Host port manager ready", "family", m.family, "backend", b.kind(), "rows", len(rows))

	return nil
}

// start is the constructors' attempt at ready. What keeps it from succeeding
// is told by the first Add.
func (m *hostportManager) start() error {
	m.turn <- struct{}{}
	defer func() { <-m.turn }()

	ctx, cancel := context.WithTimeout(context.Background(), m.cfg.timeout)
	defer cancel()

	return m.ready(ctx)
}

func (m *hostportManager) setRows(k portKey, rows []*row) {
	for _, r := range m.rows[k] {
		delete(m.hashes, r.hash)
	}

	for _, r := range rows {
		m.hashes[r.hash] = r
	}

	if len(rows) == 0 {
		delete(m.rows, k)
	} else {
		m.rows[k] = rows
	}
}

// table yields every row.
func (m *hostportManager) table() iter.Seq[*row] {
	return func(yield func(*row) bool) {
		for _, rows := range m.rows {
			for _, r := range rows {
				if !yield(r) {
					return
				}
			}
		}
	}
}

// mappings lists the table. It waits for an operation that is being committed.
func (m *hostportManager) mappings() []Mapping {
	m.turn <- struct{}{}
	defer func() { <-m.turn }()

	var list []Mapping

	for r := range m.table() {
		list = append(list, Mapping{
			PodID: r.owner.id, Namespace: r.owner.namespace, Name: r.owner.name,
			PodIDHash: r.hash,
			Protocol:  r.proto.api(),
			HostIP:    r.hostIP(m.family).String(), HostPort: int32(r.port),
			PodIP: r.pod.Addr().AsSlice(), ContainerPort: int32(r.pod.Port()),
			Backend: m.backend.kind(),
			Held:    m.sockets.holds(r.endpoint),
		})
	}

	return list
}

// Close releases the sockets and leaves the rules, so that traffic goes on
// while a runtime restarts. Add and Remove fail with os.ErrClosed then.
// Closing again does nothing.
func (m *hostportManager) Close() error {
	m.turn <- struct{}{}
	defer func() { <-m.turn }()

	m.closed = true
	m.sockets.close()

	return nil
}
