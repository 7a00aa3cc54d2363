//go:build !linux

package hostport

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"k8s.io/klog/v2"

	"github.com/cri-o/hostport/internal/nfnetlink"
	"github.com/cri-o/hostport/internal/nodeaddr"
)

// NewIPTables returns errors.ErrUnsupported: iptables(8) is Linux's.
func NewIPTables(ipFamily) (IPTables, error) { return nil, errors.ErrUnsupported }

// opener finds nothing.
type opener struct{}

func newOpener(config) *opener { return nil }

func (*opener) open(ipFamily) func(context.Context) (backend, error) {
	return func(context.Context) (backend, error) {
		return nil, fmt.Errorf("host ports are %w: %w", errUnavailable, errors.ErrUnsupported)
	}
}

func (*opener) close() error { return nil }

func (*opener) watch(context.Context) <-chan nfnetlink.Transaction { return nil }

// sockets holds nothing.
type sockets struct{}

func newSockets(ipFamily, bool) sockets { return sockets{} }

func (*sockets) acquire(endpoint) error { return nil }
func (*sockets) ensure(endpoint) error  { return nil }
func (*sockets) adopt(endpoint) error   { return nil }
func (*sockets) release(endpoint)       {}
func (*sockets) retry()                 {}
func (*sockets) holds(endpoint) bool    { return false }
func (*sockets) lacks(endpoint) bool    { return false }
func (*sockets) close()                 {}

// flows ends nothing.
type flows struct{}

type nodeView struct {
	now                 *nodeaddr.Addresses
	rowFor              func(portKey, netip.Addr) *row
	hasRows             func(protocol) bool
	localhost, services bool
}

func newFlows(ipFamily, klog.Logger, func(context.Context, func(nodeView)) error) *flows { return nil }

func (*flows) flush(context.Context, []delta, *nodeaddr.Addresses, nodeView) error { return nil }
func (*flows) cannotEnd(error)                                                     {}
func (*flows) stop()                                                               {}
func (*flows) open()                                                               {}
func (*flows) resume()                                                             {}
func (*flows) close(nodeView) error                                                { return nil }

// namespace is the only one.
type namespace struct{}

func (*namespace) isCurrent() error { return nil }

// localhost opens nothing.
type localhost struct{}

func newLocalhost(klog.Logger) localhost { return localhost{} }

func (*localhost) open(string) error { return nil }

// links knows no interface.
type links struct{}

func newLinks(ipFamily) links { return links{} }

func (*links) to(string, netip.Addr) (string, error) { return "", errors.ErrUnsupported }
func (*links) bypassed(string) (bool, error)         { return false, nil }
func (*links) isBridge(string) bool                  { return false }
func (*links) forget()                               {}
func (*links) close()                                {}

func localnetRouted() bool       { return false }
func forwarding(ipFamily) string { return "" }
func isSet(string) (bool, error) { return true, nil }
