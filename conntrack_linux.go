package hostport

import (
	"context"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/cri-o/hostport/internal/nfnetlink"
	"github.com/cri-o/hostport/internal/nodeaddr"
)

// turnover is what may have made flows stale: those of TCP, or those of UDP and SCTP.
type turnover struct {
	tcp    bool
	ports  map[portKey]bool    // whose rows have changed
	gone   []*row              // whose pods are to get nothing any more
	before *nodeaddr.Addresses // of the node; nil: they have not changed
}

// turnovers is what deltas come to: for UDP and SCTP, and for TCP. Connections and
// associations of a row that moves go on to where they began.
func turnovers(deltas []delta, before *nodeaddr.Addresses) (datagrams, connections turnover) {
	datagrams, connections = turnover{before: before}, turnover{before: before, tcp: true}

	for _, d := range deltas {
		for _, rows := range [][]*row{d.del, d.add, d.keep} {
			for _, r := range rows {
				if r.proto != tcp {
					datagrams.note(r)
				}
			}
		}

		for _, r := range d.del {
			switch moved := slices.ContainsFunc(d.add, r.movesTo); {
			case r.proto == udp, r.proto == sctp && !moved:
				datagrams.gone = append(datagrams.gone, r)
			case r.proto == tcp && !moved:
				connections.gone = append(connections.gone, r)
				connections.note(r)
			}
		}
	}

	return datagrams, connections
}

// note has the flows to r's port looked at.
func (t *turnover) note(r *row) {
	if t.ports == nil {
		t.ports = map[portKey]bool{}
	}

	t.ports[r.portKey] = true
}

func (t *turnover) empty() bool { return len(t.ports) == 0 && t.before == nil }

// concerns reports whether flows to a port may be stale.
func (t *turnover) concerns(k portKey) bool {
	return (k.proto == tcp) == t.tcp && (t.before != nil || t.ports[k])
}

// filter is what the flows concerned have in common; 0: nothing.
func (t *turnover) filter() (protocol uint8, port uint16) {
	if t.tcp {
		protocol = unix.IPPROTO_TCP
	}

	if t.before != nil {
		return protocol, 0
	}

	for k := range t.ports {
		protocol, port = protocolNumber(k.proto), k.port
	}

	for k := range t.ports {
		if k.port != port {
			port = 0
		}

		if protocolNumber(k.proto) != protocol {
			return 0, 0
		}
	}

	return protocol, port
}

// nodeView is what flows are compared with.
type nodeView struct {
	now    *nodeaddr.Addresses // of the node
	rowFor func(portKey, netip.Addr) *row
	// localhost is set if flows from loopback addresses are translated.
	localhost bool
}

// isStale reports whether a flow does not go where it would if it began now. What
// others translate is theirs, whatever its port.
func (t *turnover) isStale(flow nfnetlink.Flow, v nodeView) bool {
	to := flow.Destination
	key := portKey{proto: protocolOf(flow.Protocol), port: to.Port()}

	if !t.concerns(key) {
		return false
	}

	r := v.rowFor(key, to.Addr())
	has := v.leads(flow)
	had := t.nodeHad(to.Addr(), has)

	switch {
	case has && r != nil && r.pod == flow.Responder:
		return false
	case flow.Translated:
		return had && !has && r != nil && r.hasLedTo(flow.Responder) || t.ended(key, flow)
	case t.tcp && had: // of somebody who had the port before
		return false
	default: // begun before there was the row, or the address
		return has && r != nil
	}
}

// leads reports whether rows are asked where a flow is to go. What comes from a
// link-local address of IPv6 is not translated, nor what does from a loopback address
// without localhost.
func (v nodeView) leads(flow nfnetlink.Flow) bool {
	from := flow.Source.Addr()

	return v.now.Has(flow.Destination.Addr()) &&
		!(from.Is6() && from.IsLinkLocalUnicast()) && (v.localhost || !from.IsLoopback())
}

// nodeHad reports whether the node had an address before, if it has it now or not.
func (t *turnover) nodeHad(ip netip.Addr, has bool) bool {
	if t.before == nil {
		return has
	}

	return t.before.Has(ip)
}

// ended reports whether a flow leads to the pod of a row that has gone.
func (t *turnover) ended(key portKey, flow nfnetlink.Flow) bool {
	return slices.ContainsFunc(t.gone, func(r *row) bool {
		return r.portKey == key && r.overlaps(endpoint{ip: flow.Destination.Addr()}) && r.hasLedTo(flow.Responder)
	})
}

// flowConn is what flows take of a nfnetlink.Conn.
type flowConn interface {
	Flows(ctx context.Context, family, protocol uint8, port uint16) ([]nfnetlink.Flow, error)
	DeleteFlows(ctx context.Context, family uint8, flows []nfnetlink.Flow) error
	Close() error
}

// flowTable is the kernel's table of a family's flows.
type flowTable struct {
	family ipFamily
	conn   flowConn // nil until it is needed
}

// open opens a socket in the namespace of the calling thread, unless there is one.
func (f *flowTable) open() error {
	if f.conn != nil {
		return nil
	}

	conn, err := nfnetlink.Dial()
	if err == nil {
		f.conn = conn
	}

	return err
}

// end ends what t has made stale. Once the flows are listed, view calls look with what
// they are compared with.
func (f *flowTable) end(ctx context.Context, t turnover, view func(ctx context.Context, look func(nodeView)) error) error {
	if t.empty() {
		return nil
	}

	if err := f.open(); err != nil {
		return err
	}

	family := newNFTLayout(f.family).table.Family
	protocol, port := t.filter()

	list, err := f.conn.Flows(ctx, family, protocol, port)
	if err != nil {
		return fmt.Errorf("list flows: %w", err)
	}

	if len(list) == 0 {
		return nil
	}

	err = view(ctx, func(v nodeView) {
		list = slices.DeleteFunc(list, func(flow nfnetlink.Flow) bool { return !t.isStale(flow, v) })
	})
	if err != nil {
		return err
	}

	if err := f.conn.DeleteFlows(ctx, family, list); err != nil {
		return fmt.Errorf("delete flows: %w", err)
	}

	return nil
}

func (f *flowTable) close() error {
	if f.conn == nil {
		return nil
	}

	return f.conn.Close() //nolint:wrapcheck // says itself what it is about
}
