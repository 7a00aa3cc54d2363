//go:build !linux

package hostport

import (
	"context"
	"errors"
	"fmt"

	"github.com/cri-o/hostport/internal/nfnetlink"
	"github.com/cri-o/hostport/internal/outcome"
)

// NewIPTables returns errors.ErrUnsupported: iptables(8) is Linux's.
func NewIPTables(ipFamily) (IPTables, error) { return nil, errors.ErrUnsupported }

// opener finds nothing.
type opener struct{}

func newOpener(config) *opener { return nil }

func (*opener) open(ipFamily) func(context.Context) (backend, error) {
	return func(context.Context) (backend, error) {
		return nil, fmt.Errorf("host ports are %w: %w", outcome.ErrUnavailable, errors.ErrUnsupported)
	}
}

func (*opener) list(context.Context, ipFamily) ([]Mapping, error) { return nil, errors.ErrUnsupported }

func (*opener) close() error { return nil }

func (*opener) watch(context.Context) <-chan nfnetlink.Transaction { return nil }

// namespace is the only one.
type namespace struct{}

func (*namespace) isCurrent() error { return nil }

// nodeLock has nobody to keep away.
type nodeLock struct{}

func newNodeLock(config, ...ipFamily) *nodeLock { return nil }

func (*nodeLock) take(context.Context, bool) error { return nil }

func (*nodeLock) close() error { return nil }
