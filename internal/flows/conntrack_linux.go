package flows

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cri-o/hostport/internal/nfnetlink"
	"github.com/cri-o/hostport/internal/nodeaddr"
	"github.com/cri-o/hostport/internal/row"
)

// turnover is what may have made flows of some protocols stale.
type turnover struct {
	protocols []row.Protocol
	ports     map[row.PortKey]bool // whose rows have changed
	gone      []*row.Row           // whose pods are to get nothing any more
	before    *nodeaddr.Addresses  // of the node; nil: they have not changed
}

// turnovers is what deltas come to, and a change of the node's addresses since before: for
// UDP and SCTP, and for TCP.
func turnovers(deltas []row.Delta, before *nodeaddr.Addresses, hasRows func(row.Protocol) bool) (datagrams, connections turnover) {
	if before != nil {
		datagrams.lookAtAll(before, hasRows, row.UDP, row.SCTP)
		connections.lookAtAll(before, hasRows, row.TCP)
	}

	for _, d := range deltas {
		for _, rows := range [][]*row.Row{d.Del, d.Add, d.Keep} {
			for _, r := range rows {
				if r.Proto != row.TCP {
					datagrams.note(r)
				}
			}
		}

		for _, r := range d.Del {
			t := &datagrams
			if r.Proto == row.TCP {
				t = &connections
			}

			// Connections and associations of a row that moves go on to where they began.
			if r.Proto == row.UDP || !slices.ContainsFunc(d.Add, r.MovesTo) {
				t.gone = append(t.gone, r)
				t.note(r)
			}
		}
	}

	return datagrams, connections
}

// lookAtAll has all flows of some protocols looked at, as far as there are rows.
func (t *turnover) lookAtAll(before *nodeaddr.Addresses, hasRows func(row.Protocol) bool, protocols ...row.Protocol) {
	for _, p := range protocols {
		if hasRows(p) {
			t.protocols, t.before = append(t.protocols, p), before
		}
	}
}

// note has the flows to r's port looked at.
func (t *turnover) note(r *row.Row) {
	if t.ports == nil {
		t.ports = map[row.PortKey]bool{}
	}

	t.ports[r.PortKey] = true

	if !slices.Contains(t.protocols, r.Proto) {
		t.protocols = append(t.protocols, r.Proto)
	}
}

func (t *turnover) empty() bool { return len(t.protocols) == 0 }

// concerns reports whether flows to a port may be stale.
func (t *turnover) concerns(k row.PortKey) bool {
	return slices.Contains(t.protocols, k.Proto) && (t.before != nil || t.ports[k])
}

// port is the one that all flows concerned of a protocol have; 0: they may have several.
func (t *turnover) port(p row.Protocol) (port uint16) {
	if t.before != nil {
		return 0
	}

	for k := range t.ports {
		switch {
		case k.Proto != p:
		case port != 0:
			return 0
		default:
			port = k.Port
		}
	}

	return port
}

// isStale reports whether a flow does not go where it would if it began now. What
// others translate is theirs, whatever its port.
func (t *turnover) isStale(flow nfnetlink.Flow, v View) bool {
	to := flow.Destination
	key := row.PortKey{Proto: row.ProtocolOf(flow.Protocol), Port: to.Port()}

	if !t.concerns(key) {
		return false
	}

	r := v.RowFor(key, to.Addr())
	has := v.leads(flow)

	switch {
	case has && r != nil && r.Pod == flow.Responder:
		return false
	case flow.Translated:
		return t.isMisled(key, flow, v, has)
	case key.Proto == row.TCP && !t.came(to.Addr()): // of somebody who had the port before
		return false
	default: // begun before there was the row, or the address
		return has && r != nil
	}
}

// isMisled reports whether a translated flow leads where no row for it does. has is set
// if rows are asked for it.
func (t *turnover) isMisled(key row.PortKey, flow nfnetlink.Flow, v View, has bool) bool {
	ended, led := t.ended(key, flow), v.haveLed(key, flow)

	switch {
	case !has:
		return ended || led && t.strays(flow.Destination.Addr(), v)
	case key.Proto == row.UDP:
		return ended || v.narrowed(key, flow)
	default: // what a row that stays has led goes on
		return ended && !led
	}
}

// came reports whether the node did not have an address before.
func (t *turnover) came(ip netip.Addr) bool { return t.before != nil && !t.before.Has(ip) }

// strays reports whether rows have led to an address that is not the node's: it had that
// before, or it is a Service's, of which CRI-O's rules know nothing.
func (t *turnover) strays(to netip.Addr, v View) bool {
	return t.before != nil && t.before.HadLocal(to) || v.Now.HasService(to)
}

// leads reports whether rows are asked where a flow is to go. What comes from a
// link-local address of IPv6 is not translated, nor what does from a loopback address
// without localhost.
func (v View) leads(flow nfnetlink.Flow) bool {
	from, to := flow.Source.Addr(), flow.Destination.Addr()

	return (v.Now.Has(to) || v.Services && flow.Translated && v.Now.HasService(to)) &&
		!(from.Is6() && from.IsLinkLocalUnicast()) && (v.Localhost || !from.IsLoopback())
}

// narrowed reports whether a flow leads to the pod of the row for any address, in whose
// place there is one for its address now.
func (v View) narrowed(key row.PortKey, flow nfnetlink.Flow) bool {
	wide := v.RowFor(key, netip.Addr{})

	return wide != nil && wide.Pod == flow.Responder
}

// haveLed reports whether a row has led a flow: that for its address, or that for any,
// beside which there is one for its address since.
func (v View) haveLed(key row.PortKey, flow nfnetlink.Flow) bool {
	for _, ip := range []netip.Addr{flow.Destination.Addr(), {}} {
		if r := v.RowFor(key, ip); r != nil && r.HasLedTo(flow.Responder) {
			return true
		}
	}

	return false
}

// ended reports whether a flow leads to the pod of a row that has gone.
func (t *turnover) ended(key row.PortKey, flow nfnetlink.Flow) bool {
	return slices.ContainsFunc(t.gone, func(r *row.Row) bool {
		return r.PortKey == key && r.Overlaps(row.Endpoint{IP: flow.Destination.Addr()}) && r.HasLedTo(flow.Responder)
	})
}

// Conn is what flows take of a nfnetlink.Conn.
type Conn interface {
	Flows(ctx context.Context, family, protocol uint8, port uint16) ([]nfnetlink.Flow, error)
	DeleteFlows(ctx context.Context, family uint8, flows []nfnetlink.Flow) error
	Close() error
}

// Dial opens a socket to the kernel's table.
func Dial() (Conn, error) {
	conn, err := nfnetlink.Dial()
	if err != nil {
		return nil, err // and no interface around a nil pointer
	}

	return conn, nil
}

// flowTable is the kernel's table of a family's flows.
type flowTable struct {
	family row.Family
	dial   func() (Conn, error)
	conn   Conn // nil until it is needed
}

// open opens a socket in the namespace of the calling thread, unless there is one.
func (f *flowTable) open() error {
	if f.conn != nil {
		return nil
	}

	conn, err := f.dial()
	if err == nil {
		f.conn = conn
	}

	return err
}

// end ends what t has made stale, and returns that. The view is asked for once the flows
// are listed, protocol by protocol: the kernel picks out none of several, and what it does
// not leave out takes ten times as long.
func (f *flowTable) end(ctx context.Context, t turnover, view Viewer) (ended []nfnetlink.Flow, err error) {
	for _, p := range t.protocols {
		some, err := f.delete(ctx, p, t.port(p), func(list []nfnetlink.Flow) ([]nfnetlink.Flow, error) {
			err := view(ctx, func(v View) {
				list = slices.DeleteFunc(list, func(flow nfnetlink.Flow) bool { return !t.isStale(flow, v) })
			})

			return list, err
		})
		if err != nil {
			return ended, err
		}

		ended = append(ended, some...)
	}

	return ended, nil
}

// endAnswers ends what answers that were under way have begun when their flows were
// ended: the client's next packet would belong to that, from the other side, and meet no
// row. It happens with IPv6 alone: of IPv4 the kernel drops what comes from an address
// that it has itself.
func (f *flowTable) endAnswers(ctx context.Context, early []nfnetlink.Flow) error {
	type ends struct{ from, to netip.AddrPort }

	answers := map[row.Protocol]map[ends]bool{}

	for _, flow := range early {
		p := row.ProtocolOf(flow.Protocol)
		if answers[p] == nil {
			answers[p] = map[ends]bool{}
		}

		answers[p][ends{flow.Destination, flow.Source}] = true
	}

	for p, some := range answers {
		_, err := f.delete(ctx, p, 0, func(list []nfnetlink.Flow) ([]nfnetlink.Flow, error) {
			return slices.DeleteFunc(list, func(flow nfnetlink.Flow) bool { return !some[ends{flow.Source, flow.Destination}] }), nil
		})
		if err != nil {
			return err
		}
	}

	return nil
}

// kernelTimeout is for what is asked of the kernel.
const kernelTimeout = 5 * time.Second

// delete lists the flows of a protocol, to one port unless that is 0, and deletes those
// that are chosen. What it asks of the kernel has its own time: to choose may take long.
func (f *flowTable) delete(
	ctx context.Context, p row.Protocol, port uint16, choose func([]nfnetlink.Flow) ([]nfnetlink.Flow, error),
) ([]nfnetlink.Flow, error) {
	if err := f.open(); err != nil {
		return nil, err
	}

	family := uint8(unix.AF_INET)
	if f.family == row.IPv6 {
		family = unix.AF_INET6
	}

	listCtx, cancel := context.WithTimeout(ctx, kernelTimeout)
	defer cancel()

	list, err := f.conn.Flows(listCtx, family, p.Number(), port)
	if err != nil {
		return nil, fmt.Errorf("list flows: %w", err)
	}

	if len(list) == 0 {
		return nil, nil
	}

	if list, err = choose(list); err != nil {
		return nil, err
	}

	deleteCtx, cancel := context.WithTimeout(ctx, kernelTimeout)
	defer cancel()

	if err := f.conn.DeleteFlows(deleteCtx, family, list); err != nil {
		return nil, fmt.Errorf("delete flows: %w", err)
	}

	return list, nil
}

func (f *flowTable) close() error {
	if f.conn == nil {
		return nil
	}

	return f.conn.Close()
}
