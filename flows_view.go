package hostport

import (
	"context"
	"net/netip"

	"github.com/cri-o/hostport/internal/nodeaddr"
)

// nodeView is what flows are compared with.
type nodeView struct {
	now    *nodeaddr.Addresses // of the node
	rowFor func(portKey, netip.Addr) *row
	// hasRows reports whether there are rows of a protocol.
	hasRows func(protocol) bool
	// localhost is set if flows from loopback addresses are translated.
	localhost bool
	// services is set if those to a Service's address may be: with iptables, if kube-proxy
	// lets them pass.
	services bool
}

// viewer calls look with what flows are compared with.
type viewer func(ctx context.Context, look func(nodeView)) error
