package hostport

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/klog/v2"

	"github.com/cri-o/hostport/internal/nodeaddr"
	"github.com/cri-o/hostport/internal/outcome"
	"github.com/cri-o/hostport/internal/row"
)

// HostPortManager maps host ports to pods. It is safe for concurrent use.
//
// CRI-O 1.24 to 1.31 and cri-dockerd have the same interface. In CRI-O 1.32 Add has no
// natInterfaceName, and since 1.33 the arguments are others: docs/porting.md of the module
// has what stands between.
type HostPortManager interface {
	// Add maps the host ports of a pod. id is the pod's sandbox id, one per
	// pod and never empty. natInterfaceName is the host's interface towards
	// the pod; where pods hang on a bridge, it is the bridge. If it is empty, "lo"
	// or no interface's name, the route to the pod IP tells the interface. On that
	// interface Add sets the sysctl route_localnet; see WithoutLocalhost.
	//
	// Either all rows of podPortMapping work when Add returns nil, or nothing
	// has changed. Add again puts back what is missing, adds rows that are new
	// and moves rows whose pod IP or container port has changed, without a
	// packet in between that meets neither. Rows it does not name stay.
	//
	// A row from before a restart whose pod nobody has named makes way, so a runtime that
	// starts calls Sync first; see WithoutTakeover.
	//
	// A pod without host ports, on the host network, or nil costs nothing.
	//
	// Errors: ErrInvalidMapping; *ConflictError, where another pod has the
	// port; syscall.EADDRINUSE, where another process has it; context.DeadlineExceeded, and with
	// it ErrOtherManager where another manager has the host ports; ErrUnavailable, where the
	// node lacks what the family takes; os.ErrClosed; errors.ErrUnsupported on systems
	// other than Linux; a thread in another network namespace than the manager was
	// made in; else what the kernel or iptables(8) said.
	Add(id string, podPortMapping *PodPortMapping, natInterfaceName string) error

	// Remove takes out the rows of a pod that podPortMapping names, in both
	// families, or all of them if it is nil. Rows are compared by meaning, and
	// only ever removed for their owner. The pod's IP and names are not needed.
	// To remove what is not there is success, at no cost, and so is it where no
	// backend can hold rows. A mapping without rows removes nothing.
	//
	// In iptables, rows from before a restart are found with nil only if protocol
	// and host IP were given to Add as Kubernetes spells them.
	//
	// Errors: context.DeadlineExceeded, as of Add; os.ErrClosed; else what the kernel or
	// iptables(8) said, or why nobody could look, as if no file can be opened. Rows
	// that could not be removed are nobody's then: the next Add that wants their ports
	// gets them. Remove again tries again, and so does Run.
	Remove(id string, podPortMapping *PodPortMapping) error
}

// hostportManager is the manager of one family: the table, who owns its rows,
// and the order of an operation.
type hostportManager struct {
	kernel

	family IPFamily
	cfg    config
	log    klog.Logger
	open   func(ctx context.Context) (backend, error)

	status      atomic.Pointer[Status] // as of when the commit lock was last given back
	unavailable atomic.Pointer[error]  // why the family could not work at the last try, if it could not

	queueMu sync.Mutex
	queue   []*operation // waiting to be committed
	// unfinished are Removes that have failed, until the table knows, and as long as there
	// may be rows of theirs that nobody has seen.
	unfinished []*operation

	// commitLock is held by sending to it. Whoever holds it commits what has queued
	// up, and only that one touches the fields below.
	commitLock chan struct{}
	backend    backend                    // nil until open has succeeded
	rows       map[row.PortKey][]*row.Row // the table; slices are replaced, never changed
	count      int                        // of its rows
	names      map[string]*row.Row        // the table by what names a row in the kernel, where that may collide
	closed     bool
	node       *nodeaddr.Addresses // as the family has last seen them
	// nodeBefore are the node's addresses as they were when flows were last compared
	// with them, if they were others.
	nodeBefore *nodeaddr.Addresses
	flushAt    time.Time // not before this are they compared again: it has failed
	// lost are rows of operations whose outcome was unknown. Their flows end once a
	// reconcile has seen to it that the kernel does not have the rows.
	lost      []*row.Row
	exemptDue bool   // a transaction has yet to carry out what Exempt was told, as far as is known
	nodeErr   string // why they could not be looked at last

	// bridges are those that lead to pods, and whether pods there answer their neighbours
	// past the node. relocation is set if rows may have been made for something else.
	bridges    map[string]bool
	relocation bool
	forwards   answer // whether the node does, as last told
	health     health
	starting   bool // rows from before have yet to be adopted
	synced     bool // Sync has told whose rows are whose
}

// NewHostportManager returns the manager of one IP family that works through
// the caller's iptables, which is not nil. Rows that the kernel holds already are adopted.
//
// It never fails: if iptables does not answer now, the first Add says why.
// WithBackend has no effect on it. What others wipe comes back with an operation of
// the family. It is an io.Closer too, whose Close releases its sockets.
//
// For another manager of the family its operations wait, as those of NewMetaHostportManager
// do. Without CAP_NET_ADMIN nothing keeps others away.
func NewHostportManager(iptables IPTables, opts ...Option) HostPortManager {
	cfg := newConfig(opts)
	f, open := through(iptables, cfg)
	m := newHostportManager(f, cfg, open)
	_ = m.start(context.Background(), false) // told by the first Add

	return m
}

func newHostportManager(f IPFamily, cfg config, open func(context.Context) (backend, error)) *hostportManager {
	m := &hostportManager{
		family:     f,
		cfg:        cfg,
		log:        cfg.log.WithValues("family", string(f)),
		starting:   true,
		open:       open,
		commitLock: make(chan struct{}, 1),
		rows:       map[row.PortKey][]*row.Row{},
		names:      map[string]*row.Row{},
		bridges:    map[string]bool{},
	}
	m.status.Store(&Status{Family: f})
	m.kernel = newKernel(m)

	return m
}

// Add implements HostPortManager.
func (m *hostportManager) Add(id string, podPortMapping *PodPortMapping, natInterfaceName string) error {
	rows, err := rowsOf(id, podPortMapping)
	if err != nil {
		return err
	}

	if len(rows) == 0 || rows[0].Family() != m.family {
		return nil
	}

	ctx, cancel := m.cfg.withTimeout(context.Background())
	defer cancel()

	return m.add(ctx, rows, natInterfaceName)
}

// add puts in the rows of one pod, of which there is at least one. device is the
// interface to the pod, if known.
func (m *hostportManager) add(ctx context.Context, rows []*row.Row, device string) error {
	return m.do(ctx, &operation{
		name:  "add",
		owner: rows[0].Owner,
		rows:  rows,
		plan: func(c *change) error {
			m.locate(rows, device)

			for _, r := range rows {
				if err := m.planAdd(c, r); err != nil {
					return err
				}
			}

			return m.hold(c, savepoint{})
		},
	}, m.namespace.isCurrent)
}

// Remove implements HostPortManager.
func (m *hostportManager) Remove(id string, podPortMapping *PodPortMapping) error {
	ctx, cancel := m.cfg.withTimeout(context.Background())
	defer cancel()

	return m.remove(ctx, id, podPortMapping, m.namespace.isCurrent)
}

func (m *hostportManager) remove(ctx context.Context, id string, podPortMapping *PodPortMapping, allowed func() error) error {
	op := &operation{name: "remove", owner: row.Owner{ID: id}, remove: true}

	if podPortMapping == nil {
		op.plan = func(c *change) error {
			for r := range m.table() {
				if m.ownedBy(op.owner, "", r) {
					c.del(r)
				}
			}

			return nil
		}

		return m.do(ctx, op, allowed)
	}

	op.refs = refsOf(id, podPortMapping, m.family)
	if podPortMapping.HostNetwork || len(op.refs) == 0 {
		return nil
	}

	op.owner.Namespace, op.owner.Name = podPortMapping.Namespace, podPortMapping.Name
	op.plan = func(c *change) error {
		for _, ref := range op.refs {
			for _, r := range m.rows[ref.PortKey] {
				if r.Endpoint == ref.Endpoint && m.ownedBy(op.owner, ref.hash, r) {
					c.del(r)
				}
			}
		}

		return nil
	}

	return m.do(ctx, op, allowed)
}

// planAdd puts w into the table and out of it what w replaces: the pod's own
// row of the endpoint, if that leads elsewhere, and whatever overlaps it and
// is nobody's, or without takeover only what could not be removed.
func (m *hostportManager) planAdd(c *change, w *row.Row) error {
	kept := false

	for _, r := range m.rows[w.PortKey] {
		switch {
		case !r.Overlaps(w.Endpoint):
		case c.claim(w.Owner, w.Hash, r):
			switch {
			case r.StandsFor(w) && !kept:
				c.keep(r)

				r.Label, kept = w.Label, true // of a row from before a restart it may be lost
				r.Device = cmp.Or(w.Device, r.Device)
			case r.Endpoint == w.Endpoint:
				w.MovedFrom(r)
				c.del(r)
			case r.Misplaced: // beside w, on any address or on one: both stand, in order
				again := *r
				again.Misplaced = false

				c.del(r)
				c.add(&again)
			}
		case r.Owner.Known() || m.cfg.keepUnknown && !r.Gone:
			return &ConflictError{
				Pod: w.Owner.String(), OtherPod: podOf(r),
				ID: w.Owner.ID, OtherID: r.Owner.ID,
				Protocol: v1.Protocol(w.Proto.API()), HostPort: int32(w.Port),
				HostIP: w.HostIP(m.family).String(), OtherHostIP: r.HostIP(m.family).String(),
			}
		default:
			c.del(r)
		}
	}

	if kept {
		return nil
	}

	// CRI-O's way to make names has these two in one hash: ids of different
	// length, or 8 and 0::1 beside 80 and ::1.
	if name := m.backend.Name(w); m.names[name] != nil && m.names[name].Endpoint != w.Endpoint {
		return &outcome.RowError{Row: w, Err: fmt.Errorf("%w: its name in the kernel, %s, is taken by row %s of pod %s: "+
			"want another sandbox id, hostPort or hostIP", ErrInvalidMapping, name, m.names[name], m.names[name].Owner)}
	}

	c.add(w)

	return nil
}

// ownedBy reports whether r is o's; hash is the one that o would give it, if known.
func (m *hostportManager) ownedBy(o row.Owner, hash string, r *row.Row) bool {
	if r.Owner.Known() {
		return r.Owner.ID == o.ID
	}

	return o.Known() && (hash != "" && r.Hash == hash || m.backend.OwnedBy(o.ID, r))
}

// hold binds the ports of the change's rows since a point. Each row has its share of the
// endpoint's socket, so a row that takes over from another takes the socket
// over too.
func (m *hostportManager) hold(c *change, since savepoint) error {
	for _, r := range c.delta.Add[since.add:] {
		if err := m.sockets.Acquire(r.Endpoint); err != nil {
			return &outcome.RowError{Row: r, Err: err}
		}

		c.undos = append(c.undos, func() { m.sockets.Release(r.Endpoint) })
	}

	for _, r := range c.delta.Keep[since.keep:] {
		if err := m.sockets.Ensure(r.Endpoint); err != nil {
			return &outcome.RowError{Row: r, Err: err}
		}
	}

	m.sockets.Retry()

	return nil
}

// lockNode keeps other managers from the family's host ports. If told to it waits for one that
// has them until ctx ends: before the commit lock, for which Close waits.
func (m *hostportManager) lockNode(ctx context.Context, wait bool) error {
	for _, l := range m.locks {
		if err := l.Take(ctx, wait); err != nil {
			m.noteUnavailable(err)

			return err
		}
	}

	return nil
}

// noteUnavailable notes why the family cannot work, for Status.
func (m *hostportManager) noteUnavailable(err error) {
	if err == nil {
		m.unavailable.Store(nil)
	} else {
		m.unavailable.Store(&err)
	}
}

// ready opens the backend, if that has not succeeded yet, and adopts the rows
// that the kernel holds. The caller has locked the node.
func (m *hostportManager) ready(ctx context.Context) (err error) {
	if m.closed {
		return errClosed
	}

	if m.backend != nil {
		return nil
	}

	defer func() { m.noteUnavailable(err) }()

	b, err := m.open(ctx)
	if err != nil {
		return err
	}

	if m.node, err = m.addrs.Now(ctx); err != nil {
		return err
	}

	rows, intact, err := b.List(ctx)
	if err != nil && !isUnseen(err) {
		return err
	}

	if err != nil {
		m.log.Error(oneLineError{err}, "Cannot look for all host ports from before")
	}

	m.flows.Open()

	m.backend = b
	m.health.looked(err)
	m.adopt(rows)

	m.log.Info("Host port manager ready", "backend", b.Kind(nil), "count", len(rows), "rows", listWithPods(rows))

	b.Exempt(m.node.Services()) // with the next transaction

	// The rules may be of an earlier version, or nobody may have watched.
	if !intact && m.needsRules() {
		m.repair(ctx)
		m.flushAllFlows(ctx, nil)
	}

	m.starting = false

	return nil
}

// adopt takes over rows that stand, whether or not their ports can be held now.
func (m *hostportManager) adopt(rows []*row.Row) {
	var (
		unheld []*row.Row
		why    error
	)

	m.relocation = m.relocation || len(rows) > 0

	for _, r := range rows {
		m.setRows(r.PortKey, append(m.rows[r.PortKey], r))

		if err := m.sockets.Adopt(r.Endpoint); err != nil {
			unheld, why = append(unheld, r), cmp.Or(why, err)
		}
	}

	m.tellUnheld(unheld, why)
}

// lookAgain looks for the rows from before that could not be looked at, and fails if they
// still cannot be.
func (m *hostportManager) lookAgain(ctx context.Context) error {
	if m.health.unseen == nil {
		return nil
	}

	m.health.looking()

	if m.health.leftovers { // by Sync, which wants none of them
		if _, err := m.reconcile(ctx, true); err != nil && !isLeftBehind(err) {
			return err
		}

		return m.health.unseen
	}

	rows, intact, err := m.backend.List(ctx)
	m.health.looked(err)
	m.adopt(rows)

	if len(rows) > 0 {
		m.log.Info("Found more host ports from before", "count", len(rows), "rows", listWithPods(rows))
	}

	m.disownRemoved(rows)

	replaced := &operation{name: "replace", plan: func(c *change) error {
		for _, r := range rows {
			if m.isReplaced(r) {
				c.del(r)
			}
		}

		return nil
	}}

	m.commitAll(ctx, []*operation{replaced})

	if replaced.err != nil {
		m.log.Error(oneLineError{replaced.err}, "Cannot take out what other rows have replaced", "rows", listWithPods(rows))
	}

	if !intact {
		m.repair(ctx)
	}

	return err
}

// isReplaced reports whether an Add has taken the place of a row that was not known then.
func (m *hostportManager) isReplaced(r *row.Row) bool {
	return slices.ContainsFunc(m.rows[r.PortKey], func(o *row.Row) bool {
		beside := o.Endpoint != r.Endpoint && m.ownedBy(o.Owner, "", r)

		return o != r && o.Owner.Known() && o.Overlaps(r.Endpoint) && !beside
	})
}

// needsRules reports whether something of ours is to stand in the kernel: rows, or the
// guard because of a sysctl that somebody has set, a manager before perhaps.
func (m *hostportManager) needsRules() bool {
	return len(m.rows) > 0 || m.family == IPv4 && m.localhost.Routed()
}

// start is the constructors' attempt at ready, which waits for another manager until ctx ends if
// told to. The first Add reports what keeps it from succeeding.
func (m *hostportManager) start(ctx context.Context, wait bool) error {
	err := m.namespace.isCurrent()
	if err == nil {
		err = m.lockNode(ctx, wait)
	}

	m.commitLock <- struct{}{}
	defer m.unlock()

	if err != nil {
		return err
	}

	ctx, cancel := m.cfg.withTimeout(context.WithoutCancel(ctx))
	defer cancel()

	return m.ready(ctx)
}

func (m *hostportManager) setRows(k row.PortKey, rows []*row.Row) {
	m.count += len(rows) - len(m.rows[k])

	for _, r := range m.rows[k] {
		delete(m.names, m.backend.Name(r))
	}

	for _, r := range rows {
		if name := m.backend.Name(r); name != "" {
			m.names[name] = r
		}
	}

	if len(rows) == 0 {
		delete(m.rows, k)
	} else {
		m.rows[k] = rows
	}
}

// hasRows reports whether there are rows of a protocol.
func (m *hostportManager) hasRows(p row.Protocol) bool {
	for k := range m.rows {
		if k.Proto == p {
			return true
		}
	}

	return false
}

// rowFor returns the row for packets to a port on an address of the node's.
func (m *hostportManager) rowFor(k row.PortKey, ip netip.Addr) *row.Row {
	var found *row.Row

	for _, r := range m.rows[k] {
		if r.IP == ip || !r.IP.IsValid() && found == nil {
			found = r
		}
	}

	return found
}

// table yields every row.
func (m *hostportManager) table() iter.Seq[*row.Row] {
	return func(yield func(*row.Row) bool) {
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
	m.commitLock <- struct{}{}
	defer m.unlock()

	m.disownRemoved(nil)

	var list []Mapping

	for r := range m.table() {
		list = append(list, mappingOf(r, m.backend, m.sockets.Holds(r.Endpoint)))
	}

	return list
}

// Close releases the sockets and leaves the rules, so that traffic goes on
// while a runtime restarts. It waits for the operation that is being committed, and
// ends the TCP connections that were to end behind a Remove. Then another manager can
// have the host ports; without Close it can when the process ends, also by SIGKILL.
// Operations that come later and have something to do fail with os.ErrClosed.
// Closing again does nothing.
func (m *hostportManager) Close() error {
	m.flows.Stop()

	m.commitLock <- struct{}{}
	defer m.unlock()

	m.closed = true
	m.noteUnavailable(errClosed)
	m.sockets.Close()
	m.links.Close()
	m.localhost.Close()

	return errors.Join(m.flows.Close(m.view()), m.addrs.Close(), m.locks[len(m.locks)-1].Close())
}
