package flows

import (
	"context"
	"net/netip"

	"github.com/cri-o/hostport/internal/nodeaddr"
	"github.com/cri-o/hostport/internal/row"
)

// View is what flows are compared with.
type View struct {
	Now    *nodeaddr.Addresses // of the node
	RowFor func(row.PortKey, netip.Addr) *row.Row
	// HasRows reports whether there are rows of a protocol.
	HasRows func(row.Protocol) bool
	// Localhost is set if flows from loopback addresses are translated.
	Localhost bool
	// Services is set if those to a Service's address may be: with iptables, if kube-proxy
	// lets them pass.
	Services bool
}

// Viewer calls look with what flows are compared with.
type Viewer func(ctx context.Context, look func(View)) error
