//go:build !linux

package hostport

import (
	"context"
	"errors"
	"fmt"

	"github.com/cri-o/hostport/internal/memory"
	"github.com/cri-o/hostport/internal/nfnetlink"
	"github.com/cri-o/hostport/internal/nodeaddr"
	"github.com/cri-o/hostport/internal/outcome"
)

// NewIPTables returns errors.ErrUnsupported: iptables(8) is Linux's.
func NewIPTables(IPFamily) (IPTables, error) { return nil, errors.ErrUnsupported }

// newSystemOpener finds nothing.
func newSystemOpener(config) opener { return noOpener{} }

type noOpener struct{}

func (noOpener) open(IPFamily) func(context.Context) (backend, error) {
	return func(context.Context) (backend, error) {
		return nil, fmt.Errorf("host ports are %w: %w", outcome.ErrUnavailable, errors.ErrUnsupported)
	}
}

func (noOpener) list(context.Context, IPFamily) ([]Mapping, error) { return nil, errors.ErrUnsupported }

func (noOpener) watch(context.Context) (<-chan nfnetlink.Transaction, error) {
	return nil, errors.ErrUnsupported
}

func (noOpener) close() error { return nil }

// newNodeLock has nobody to keep away.
func newNodeLock(_ config, families ...IPFamily) locker {
	return (&memory.Node{}).Lock(families...)
}

// newSystemKernel has nothing to ask.
func newSystemKernel(m *hostportManager) kernel {
	k := newMemoryKernel(&memory.Node{}, m)
	k.addrs = &noAddresses{}

	return k
}

// noAddresses keep a manager over an IPTables of the caller's from work.
type noAddresses struct{ memory.Addresses }

func (*noAddresses) Now(context.Context) (*nodeaddr.Addresses, error) {
	return nil, errors.ErrUnsupported
}
