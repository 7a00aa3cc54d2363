package hostport

import (
	"time"

	"github.com/cri-o/hostport/internal/row"
)

// Observer is told what a manager does, for metrics and alarms. See WithObserver.
type Observer interface {
	// Observe is called once for each event, by several goroutines at once, and by the constructor
	// before it returns. Operations wait for it: it has to return soon, and must not call the
	// manager.
	Observe(e Event)
}

// EventKind says what an Event is.
type EventKind string

// The kinds of events.
const (
	// EventAdd, EventRemove, EventSync and EventKeep are operations that have ended, in one family,
	// with Took and Err. An Add or Remove that had nothing to do in the family is none.
	EventAdd    EventKind = "add"
	EventRemove EventKind = "remove"
	EventSync   EventKind = "sync"
	EventKeep   EventKind = "keep"
	// EventRepair is that something that others had broken has been put right, or could not be:
	// Err.
	EventRepair EventKind = "repair"
	// EventTakeover is that an Add got ports of pods from before that nobody had named. It comes
	// beside EventAdd.
	EventTakeover EventKind = "takeover"
	// EventHealth is that Health has changed.
	EventHealth EventKind = "health"
)

// Event is what a manager has done, or found.
type Event struct {
	Kind EventKind
	// Family is IPv4 or IPv6, and "" where an Add, Sync or Keep is refused what it was given.
	Family IPFamily
	// PodID, Namespace and Name are the pod of an Add, of a Remove or of a takeover: that which
	// has the ports now. Namespace and Name may be empty.
	PodID, Namespace, Name string
	// Added, Removed and Kept are how many rows an operation has changed, or found as they
	// should be. Of a takeover Removed counts the rows of others.
	Added, Removed, Kept int
	// Unknown is how many pods of a Sync keep what they have in the family: their IPs are not
	// known, or what they want is invalid. Of a Keep they are all pods named.
	Unknown int
	// Repairs is how many things an EventRepair is about.
	Repairs int
	// Took is how long the operation took in the family.
	Took time.Duration
	// Err is what it returned, nil if it succeeded.
	Err error
	// Health is the new one, of an EventHealth.
	Health Health
}

// Health is how a family's host ports stand in the kernel, as far as the manager knows.
type Health string

// What is not HealthInSync is looked at by Run, and by each operation.
const (
	// HealthInSync is that the kernel holds what it should.
	HealthInSync Health = "in sync"
	// HealthSuspect is that somebody may have broken something that is not repaired yet.
	HealthSuspect Health = "suspect"
	// HealthInDoubt is that nobody knows what came of a transaction.
	HealthInDoubt Health = "in doubt"
	// HealthLeftovers is that the kernel holds what it should, and may hold more: what a Remove
	// or Sync could not take out, or what could not be looked for.
	HealthLeftovers Health = "leftovers"
	// HealthUnavailable is that the family cannot work; Status says why.
	HealthUnavailable Health = "unavailable"
)

// Status is how one family of a manager stands.
type Status struct {
	// Family is IPv4 or IPv6.
	Family IPFamily
	// Backend carries new rows. It is "" where the family cannot work.
	Backend Backend
	// Variant is that of iptables, "nft" or "legacy", where it is known.
	Variant string
	// Health is how the kernel stands to what it should hold.
	Health Health
	// Rows is how many rows there are, and Unheld how many ports are not held that are to be:
	// another process has them, or an outgoing connection.
	Rows, Unheld int
	// Err is why the family cannot work, nil if it can.
	Err error
}

// Status returns how each family stands, IPv4 first, as of the last operation that has ended. It
// waits for nothing. It looks at what the manager knows, not at the kernel, as Check does: what
// others have broken is known only while Run runs. After Close the families are unavailable.
func (m *Manager) Status() []Status {
	list := make([]Status, 0, len(m.families))
	for _, fm := range m.families {
		list = append(list, fm.statusNow())
	}

	return list
}

// statusNow is the last status, and what needs no commit lock to be known.
func (m *hostportManager) statusNow() Status {
	s := *m.status.Load()

	if err := m.unavailable.Load(); err != nil {
		s.Err = *err
	}

	m.queueMu.Lock()
	defer m.queueMu.Unlock()

	if len(m.unfinished) > 0 && s.Health == HealthInSync {
		s.Health = HealthLeftovers
	}

	return s
}

// publish has Status say what is so now, and tells the observer of a change of health. The
// caller has the commit lock.
func (m *hostportManager) publish() {
	if m.health.hasAbandoned() && !m.hasGone() {
		m.health.pruned(nil)
	}

	now := Status{Family: m.family, Health: HealthUnavailable}
	if m.backend != nil && !m.closed {
		now = Status{
			Family: m.family, Backend: Backend(m.backend.Kind(nil)), Variant: m.backend.Variant(),
			Health: m.health.public(), Rows: m.count, Unheld: m.sockets.Waiting(),
		}
	}

	before := m.status.Load()
	if now == *before {
		return
	}

	changed := now // of its own, or each operation would allocate
	m.status.Store(&changed)

	if now.Health != before.Health {
		m.observe(Event{Kind: EventHealth, Health: now.Health})
	}
}

// isEmpty reports whether the family has no rows and the kernel has none of ours either, as of
// when the last operation ended.
func (m *hostportManager) isEmpty() bool {
	s := m.status.Load()

	return s.Health == HealthInSync && s.Rows == 0
}

// observe tells the observer of an event.
func (c config) observe(e Event) {
	if c.observer != nil {
		c.observer.Observe(e)
	}
}

// observe tells the observer of an event of the family.
func (m *hostportManager) observe(e Event) {
	e.Family = m.family
	m.cfg.observe(e)
}

// observeOperation tells the observer of an Add or a Remove that had something to do.
func (m *hostportManager) observeOperation(op *operation, took time.Duration, err error) {
	e := Event{
		Kind: EventAdd, PodID: op.owner.ID, Namespace: op.owner.Namespace, Name: op.owner.Name, Took: took, Err: err,
	}
	if op.remove {
		e.Kind = EventRemove
	}

	if op.change != nil && err == nil {
		e.count(op.change.delta)
	}

	if err != nil || e.Added+e.Removed+e.Kept > 0 {
		m.observe(e)
	}
}

// count sets how many rows have changed.
func (e *Event) count(d row.Delta) {
	e.Added, e.Removed, e.Kept = len(d.Add), len(d.Del), len(d.Keep)
}
