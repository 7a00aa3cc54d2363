package hostport

import (
	"cmp"
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/cri-o/hostport/internal/flows"
	"github.com/cri-o/hostport/internal/row"
)

// flushFlows ends the flows that deltas, or a change of the node's addresses, have made
// stale.
func (m *hostportManager) flushFlows(ctx context.Context, deltas []row.Delta) {
	before := m.nodeBefore
	if time.Now().Before(m.flushAt) { // it takes long then, and held others up
		before = nil
	}

	err := m.flows.Flush(ctx, deltas, before, m.view())
	if err != nil {
		m.cannotEnd(err)
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

// withView calls look with the commit lock held. Close calls flows.Stop first, so the manager
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
			m.log.Error(oneLineError{err}, "Cannot look at the node's addresses")
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
		m.log.Error(oneLineError{err}, "No news of the node's addresses")
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
		m.log.Error(err, "Host ports cannot be reached through 127.0.0.0/8", "rows", listWithPods([]*row.Row{r}))
	}
}

// locate finds the interface to the pod of rows, and whether its neighbours there have
// to be masqueraded. named is what the caller takes for the interface. What cannot be
// found out is told in the log, and looked at again by Run: the rows themselves work.
func (m *hostportManager) locate(rows []*row.Row, named string) {
	pod := rows[0].Pod.Addr()

	device, bypassed, err := m.find(named, pod)
	if err != nil {
		m.log.Error(err, "The interface to a pod is not known: its neighbours and 127.0.0.0/8 may not reach its host ports",
			"rows", listWithPods(rows))

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
