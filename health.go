package hostport

import (
	"context"
	"errors"
	"time"
)

// condition is how the kernel stands to the table, as far as is known. What is worse is
// higher.
type condition uint8

const (
	inSync  condition = iota // the backend in use holds the table
	suspect                  // it may lack some of it
	inDoubt                  // nobody knows the outcome of a transaction, so it may have rows besides
)

const (
	// repairPause is how long a repair that has failed is not tried again.
	repairPause = time.Second
	// leftoverPause is added to that where only rows in another backend are left to be
	// removed. A try may wait for the xtables lock, and operations would wait behind it.
	leftoverPause = 10 * time.Second
)

// health is what is known of the kernel's state, and when Run is to do something about
// it. Nothing but its methods changes it.
//
//	           others, a failed repair        outcome unknown (from any state)
//	in sync ────────────────────────────▶ suspect ──────────────────▶ in doubt
//	   ▲                                     │                            │
//	   └────────── all rows reconciled ──────┴────────────────────────────┘
type health struct {
	condition condition
	// leftovers is set if there may be what Sync has not been able to take out.
	leftovers bool
	// unseen is why rows from before could not be looked for, nil once that is done.
	unseen error
	// lastError is that of a repair, for the log to have it once.
	lastError string
	// Run does not repair before repairAt, nor look for rows from before lookAt. From
	// pruneAt on it takes out rows that a Remove could not; zero: there are none.
	repairAt, lookAt, pruneAt time.Time
}

// suspects notes that somebody may have broken something.
func (h *health) suspects() { h.condition = max(h.condition, suspect) }

// doubts notes that nobody knows whether a transaction has taken effect.
func (h *health) doubts() { h.condition = inDoubt }

// reconciled notes what came of it to reconcile all rows, and reports whether the backend
// in use holds them.
func (h *health) reconciled(err error, exactly bool) (held bool) {
	held = err == nil || isLeftBehind(err)

	switch {
	case held:
		h.condition = inSync
	case exactly: // some of what was to go may have gone
		h.doubts()
	default:
		h.suspects()
	}

	if exactly {
		h.leftovers = err != nil
	}

	if exactly && held {
		h.unseen = nil
		if isUnseen(err) {
			h.unseen = err
		}
	}

	return held
}

// repairDue reports whether it is time for Run to repair.
func (h *health) repairDue() bool {
	if h.condition == inSync {
		return h.leftovers && time.Now().After(h.repairAt.Add(leftoverPause))
	}

	return time.Now().After(h.repairAt)
}

// repaired notes what came of a repair, and reports whether its error is news.
func (h *health) repaired(err error) (news bool) {
	if err == nil || errors.Is(err, context.Canceled) { // Run ends
		h.lastError = ""

		return false
	}

	news = err.Error() != h.lastError
	h.repairAt, h.lastError = time.Now().Add(repairPause), err.Error()

	return news
}

// looking notes that rows from before are looked for, and looked what came of it.
func (h *health) looking()         { h.lookAt = time.Now().Add(repairPause) }
func (h *health) looked(err error) { h.unseen = err }

// lookDue reports whether it is time for Run to look for rows from before. With leftovers
// a repair does it.
func (h *health) lookDue() bool {
	return h.unseen != nil && !h.leftovers && time.Now().After(h.lookAt)
}

// abandons notes that there are rows that a Remove could not take out.
func (h *health) abandons() {
	if h.pruneAt.IsZero() {
		h.pruneAt = time.Now()
	}
}

// hasAbandoned reports whether there are such rows, or were.
func (h *health) hasAbandoned() bool { return !h.pruneAt.IsZero() }

// pruneDue reports whether it is time for Run to take them out.
func (h *health) pruneDue() bool { return h.hasAbandoned() && time.Now().After(h.pruneAt) }

// pruned notes what came of that.
func (h *health) pruned(err error) {
	if h.pruneAt = (time.Time{}); err != nil {
		h.pruneAt = time.Now().Add(leftoverPause)
	}
}

// public is what others are told of it.
func (h *health) public() Health {
	switch {
	case h.condition == inDoubt:
		return HealthInDoubt
	case h.condition == suspect:
		return HealthSuspect
	case h.leftovers || h.unseen != nil || h.hasAbandoned():
		return HealthLeftovers
	default:
		return HealthInSync
	}
}
