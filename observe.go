package hostport

import (
	"time"

	"github.com/cri-o/hostport/internal/row"
)

// Observer is told what a manager does, for metrics and alarms. See WithObserver.
type Observer interface {
	// Observe is called once for each event, by several goroutines at once. Operations wait for
	// it: it has to return soon, and must not call the manager.
	Observe(e Event)
}

// EventKind says what an Event is.
type EventKind string

// The kinds of events.
const (
	// EventAdd, EventRemove and EventSync are operations that have ended, in one family, with
	// Took and Err. What had nothing to do in the family is none.
	EventAdd    EventKind = "add"
	EventRemove EventKind = "remove"
	EventSync   EventKind = "sync"
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
	// Family is IPv4 or IPv6.
	Family ipFamily
	// PodID, Namespace and Name are the pod of an Add, of a Remove or of a takeover: that which
	// has the ports now. Namespace and Name may be empty.
	PodID, Namespace, Name string
	// Added, Removed and Kept are how many rows an operation has changed, or found as they
	// should be. Of a takeover Removed counts the rows of others.
	Added, Removed, Kept int
	// Repairs is how many things an EventRepair is about.
	Repairs int
	// Took is how long the operation took, from its call on.
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
	Family ipFamily
	// Backend carries new rows. It is "" where the family cannot work.
	Backend Backend
	// Variant is that of iptables, "nft" or "legacy", where it is known.
	Variant string
	// Health is how the kernel stands to what it should hold.
	Health Health
	// Rows is how many rows there are, and Held how many of their ports are held by sockets.
	// SCTP's never are.
	Rows, Held int
	// Err is why the family cannot work, nil if it can.
	Err error
}

// Status returns how each family stands, IPv4 first. It looks at what the manager knows, not at
// the kernel, as Check does, and waits for operations that are being committed.
func (m *Manager) Status() []Status {
	list := make([]Status, 0, len(m.families))
	for _, fm := range m.families {
		list = append(list, fm.status())
	}

	return list
}

func (m *hostportManager) status() Status {
	m.commitLock <- struct{}{}
	defer m.unlock()

	s := Status{Family: m.family, Health: m.healthNow()}

	if m.closed {
		s.Err = errClosed
	} else if err := m.unavailable.Load(); err != nil {
		s.Err = *err
	}

	if m.backend != nil {
		s.Backend, s.Variant = Backend(m.backend.Kind(nil)), m.backend.Variant()
	}

	for r := range m.table() {
		s.Rows++

		if m.sockets.Holds(r.Endpoint) {
			s.Held++
		}
	}

	return s
}

// healthNow is the health that others are told.
func (m *hostportManager) healthNow() Health {
	if m.backend == nil || m.closed {
		return HealthUnavailable
	}

	return m.health.public()
}

// observe tells the observer of an event.
func (m *hostportManager) observe(e Event) {
	if m.cfg.observer == nil {
		return
	}

	e.Family = m.family
	m.cfg.observer.Observe(e)
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
