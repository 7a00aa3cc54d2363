package hostport

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/cri-o/hostport/internal/localhost"
	"github.com/cri-o/hostport/internal/row"
)

// What the log says of a family's host ports. A line names the rows and whose they are, so
// that it is found by a port and by a pod. It is an error's where an operator has to act, for
// runtimes hide other lines.

// list is the texts of so many things, up to five, and how many more there are: it may be
// thousands.
func list(count int, text func(i int) string) string {
	const most = 5

	var texts []string
	for i := range min(count, most) {
		texts = append(texts, text(i))
	}

	if count > most {
		texts = append(texts, fmt.Sprintf("and %d more", count-most))
	}

	return strings.Join(texts, "; ")
}

// listRows names rows.
func listRows(rows []*row.Row) string {
	return list(len(rows), func(i int) string { return rows[i].String() })
}

// listWithPods names rows and whose they are.
func listWithPods(rows []*row.Row) string {
	return list(len(rows), func(i int) string { return rows[i].String() + " of " + podOf(rows[i]) })
}

// podOf is what is known of whose a row is.
func podOf(r *row.Row) string {
	if r.Owner.Known() {
		return r.Owner.String()
	}

	if r.Label != "" {
		return r.Label
	}

	return "podIDHash " + r.OwnerMark()
}

// oneLineError is an error whose text is one line. errors.Join puts each of its errors on one.
type oneLineError struct{ error }

func (e oneLineError) Error() string { return strings.ReplaceAll(e.error.Error(), "\n", "; ") }
func (e oneLineError) Unwrap() error { return e.error }

// tellDone tells of an operation that has succeeded.
func (m *hostportManager) tellDone(op *operation, took time.Duration) {
	var (
		delta row.Delta
		done  = "Added host ports"
		owner = op.owner
	)

	if op.change != nil {
		delta = op.change.delta
	}

	rows := slices.Concat(delta.Add, delta.Keep)

	if op.remove {
		done, rows = "Removed host ports", delta.Del

		if i := slices.IndexFunc(rows, func(r *row.Row) bool { return r.Owner.Known() }); i >= 0 { // Remove may not know its name
			owner = rows[i].Owner
		}
	}

	// Each line has the pod: a logger WithValues takes as long as the line.
	if delta.Empty() {
		m.log.V(4).Info("No host ports to "+op.name, "pod", owner, "podSandboxID", owner.ID, "took", took)

		return
	}

	m.log.Info(done, "pod", owner, "podSandboxID", owner.ID, "podIDHash", row.ShortHash(owner.ID), "rows", listRows(rows),
		"added", len(delta.Add), "removed", len(delta.Del), "kept", len(delta.Keep), "took", took)

	if v := m.log.V(4); v.Enabled() {
		v = v.WithValues("pod", owner, "podSandboxID", owner.ID)

		for i, rows := range [][]*row.Row{delta.Del, delta.Add, delta.Keep} {
			for _, r := range rows {
				v.Info("Host port row", "row", r, "change", []string{"removed", "added", "kept"}[i])
			}
		}
	}

	if !op.remove {
		m.tellTakenOver(delta.Del, owner)
		m.tellNotHeld(rows)
	}
}

// tellSynced tells of a Sync or Keep, and whose rows it has taken out. What it has changed in the
// kernel is what it was for, and what others had broken; where that is all, it is a repair.
func (m *hostportManager) tellSynced(
	kind EventKind, delta row.Delta, changes []row.Repair, pods []podRows, failed int, took time.Duration,
) {
	done, removed := "Synced host ports", "Sync removed host ports"
	if kind == EventKeep {
		done, removed = "Kept host ports", "Keep removed host ports"
	}

	m.log.Info(done, "pods", len(pods), "leftAsTheyAre", unknownIn(pods), "rows", listWithPods(delta.Add),
		"added", len(delta.Add), "removed", len(delta.Del), "kept", len(delta.Keep),
		"changes", len(changes), "failed", failed, "took", took)

	if len(delta.Del) > 0 {
		m.log.Info(removed, "rows", listWithPods(delta.Del))
	}

	if m.synced && len(delta.Add)+len(delta.Del) == 0 {
		m.tellRepaired(changes)
	}
}

// tellTakenOver tells of rows that were nobody's and have made way for a pod's.
func (m *hostportManager) tellTakenOver(rows []*row.Row, by row.Owner) {
	var gone, unknown []*row.Row

	for _, r := range rows {
		switch {
		case r.Gone:
			gone = append(gone, r)
		case !r.Owner.Known():
			unknown = append(unknown, r)
		}
	}

	if len(gone) > 0 {
		m.log.Info("Took over host ports that could not be removed before", "pod", by, "rows", listWithPods(gone))
	}

	if len(unknown) == 0 {
		return
	}

	m.observe(Event{Kind: EventTakeover, PodID: by.ID, Namespace: by.Namespace, Name: by.Name, Removed: len(unknown)})

	advice := "no pod of the last Sync had them"
	if !m.synced {
		advice = "their pod may be running: the runtime has to call Sync when it starts"
	}

	m.log.Error(nil, "Took over host ports from before the start", "pod", by, "rows", listWithPods(unknown), "advice", advice)
}

// tellNotHeld tells of rows that work and whose ports are not held.
func (m *hostportManager) tellNotHeld(rows []*row.Row) {
	rows = slices.DeleteFunc(rows, func(r *row.Row) bool { return !m.sockets.Lacks(r.Endpoint) })
	if len(rows) > 0 {
		m.log.Info("Host ports are not held yet: outgoing connections have them", "rows", listWithPods(rows))
	}
}

// tellHeld tells of rows whose ports could not be held before.
func (m *hostportManager) tellHeld() {
	var rows []*row.Row

	for _, e := range m.sockets.Gained() {
		for _, r := range m.rows[e.PortKey] {
			if r.Endpoint == e {
				rows = append(rows, r)
			}
		}
	}

	if len(rows) > 0 {
		m.log.Info("Host ports are held now", "rows", listWithPods(rows))
	}
}

// tellRepaired tells of what others had broken. At the start of a manager it is what has
// happened while there was none, and no alarm.
func (m *hostportManager) tellRepaired(repairs []row.Repair) {
	if len(repairs) == 0 {
		return
	}

	m.observe(Event{Kind: EventRepair, Repairs: len(repairs)})

	var rows []*row.Row

	concerned := map[*row.Row]bool{}
	for _, r := range repairs {
		concerned[r.Row] = true
	}

	shared := slices.ContainsFunc(repairs, func(r row.Repair) bool { return r.Shared })

	for r := range m.table() {
		if shared || concerned[r] {
			rows = append(rows, r)
		}
	}

	what := list(len(repairs), func(i int) string { return repairs[i].What })

	details := []any{"count", len(repairs), "what", what, "rows", listWithPods(rows)}

	if m.starting {
		m.log.Info("Repaired host ports at the start", details...)
	} else {
		m.log.Error(nil, "Repaired host ports", details...)
	}
}

// tellUnheld tells of adopted rows whose ports cannot be held.
func (m *hostportManager) tellUnheld(rows []*row.Row, why error) {
	if len(rows) > 0 {
		m.log.Error(oneLineError{why}, "Cannot hold the ports of rows from before", "count", len(rows), "rows", listWithPods(rows))
	}
}

// cannotEnd tells of flows that go on.
func (m *hostportManager) cannotEnd(err error) {
	m.log.Error(oneLineError{err}, "Cannot end stale flows")
}

// tellForwarding tells if the node has begun or ceased to forward, as far as can be seen.
func (m *hostportManager) tellForwarding() {
	set, err := m.localhost.IsSet(localhost.Forwarding(m.family))
	if err != nil || m.forwards == yesIf(set) { // there will be another time
		return
	}

	switch {
	case !set:
		m.log.Error(nil, "Host ports can only be reached from the node itself: it does not forward",
			"sysctl", localhost.Forwarding(m.family), "rows", listWithPods(slices.Collect(m.table())))
	case m.forwards == no:
		m.log.Info("The node forwards again", "sysctl", localhost.Forwarding(m.family))
	}

	m.forwards = yesIf(set)
}

// answer is what is known of something that can be looked at.
type answer uint8

const (
	unknown answer = iota
	no
	yes
)

func yesIf(is bool) answer {
	if is {
		return yes
	}

	return no
}

// unlock lets the next operation commit, and tells of ports that are held since, and of health.
func (m *hostportManager) unlock() {
	defer func() { <-m.commitLock }() // also if an observer panics

	m.tellHeld()
	m.publish()
}
