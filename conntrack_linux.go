package hostport

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/cri-o/hostport/internal/nfnetlink"
)

// flows ends the UDP flows that a change of rows has made stale. The kernel
// translates the packets of a flow as it did the first, for as long as the
// sender does not pause: without this a flow would go on to a pod that has gone
// or to whoever gets its address next, and one that began without a row would
// never reach the pod.
type flows struct {
	family ipFamily
	conn   *nfnetlink.Conn // nil until it is needed
}

func newFlows(f ipFamily) flows { return flows{family: f} }

func (f *flows) close() error {
	if f.conn == nil {
		return nil
	}

	return f.conn.Close()
}

// flush ends the flows that do not go where they would if they began now, of
// the UDP ports that deltas are about. It comes after the rules: a packet in
// between would bring a flow back. rowFor returns the row for a destination, if
// that is the node's. One list is made, for as many deltas and ports as there
// are, and none where there is no UDP row.
func (f *flows) flush(ctx context.Context, deltas []delta, rowFor func(portKey, netip.Addr) *row) error {
	var removed []*row

	ports := map[uint16]bool{}

	for _, d := range deltas {
		for _, r := range slices.Concat(d.del, d.add, d.keep) {
			if r.proto == udp {
				ports[r.port] = true
			}
		}

		removed = append(removed, d.del...)
	}

	if len(ports) == 0 {
		return nil
	}

	list, family, err := f.list(ctx, ports)
	if err != nil || len(list) == 0 {
		return err
	}

	local, err := localAddrs()
	if err != nil {
		return err
	}

	stale := slices.DeleteFunc(list, func(flow nfnetlink.Flow) bool {
		to := flow.Destination
		key := portKey{proto: udp, port: to.Port()}

		if r := rowFor(key, to.Addr()); r != nil && (to.Addr().IsLoopback() || local[to.Addr()]) {
			return flow.Responder == r.pod
		}

		// Nobody translates it now. Was it one of the rows that have gone?
		return !flow.Translated || !slices.ContainsFunc(removed, func(r *row) bool {
			return r.portKey == key && r.overlaps(endpoint{ip: to.Addr()}) && r.pod == flow.Responder
		})
	})

	return f.conn.DeleteFlows(ctx, family, stale)
}

// list returns the flows to some ports, and if they are several, others besides.
func (f *flows) list(ctx context.Context, ports map[uint16]bool) (list []nfnetlink.Flow, family uint8, err error) {
	if f.conn == nil {
		if f.conn, err = nfnetlink.Dial(); err != nil {
			return nil, 0, err
		}
	}

	only := uint16(0)
	if len(ports) == 1 {
		for port := range ports {
			only = port
		}
	}

	family = newNFTLayout(f.family).table.Family
	list, err = f.conn.Flows(ctx, family, unix.IPPROTO_UDP, only)

	return list, family, err
}

// localAddrs are the node's addresses.
func localAddrs() (map[netip.Addr]bool, error) {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return nil, fmt.Errorf("list the node's addresses: %w", err)
	}

	local := map[netip.Addr]bool{}

	for _, a := range addrs {
		if prefix, err := netip.ParsePrefix(a.String()); err == nil {
			local[prefix.Addr()] = true
		}
	}

	return local, nil
}
