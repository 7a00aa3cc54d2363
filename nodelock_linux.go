package hostport

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync/atomic"

	"k8s.io/klog/v2"

	"github.com/cri-o/hostport/internal/nodelock"
	"github.com/cri-o/hostport/internal/outcome"
	"github.com/cri-o/hostport/internal/sockets"
)

// nodeLock keeps other managers from the node's host ports, in one family or, had before
// that, in both.
type nodeLock struct {
	lock *nodelock.Lock
	log  klog.Logger
	// done is set when nothing is left to do: it is taken, or the kernel has no such locks.
	done atomic.Bool
}

func newNodeLock(cfg config, families ...IPFamily) *nodeLock {
	g := nodelock.Both
	if len(families) == 1 {
		g = map[IPFamily]nodelock.Group{IPv4: nodelock.IPv4, IPv6: nodelock.IPv6}[families[0]]
	}

	return &nodeLock{lock: nodelock.New(g), log: cfg.log}
}

// Take takes the lock, for which it waits until ctx ends if told to. Once it is taken this costs
// nothing.
func (l *nodeLock) Take(ctx context.Context, wait bool) error {
	if l.done.Load() {
		return nil
	}

	take := l.lock.TryTake
	if wait {
		take = l.lock.Take
	}

	err := take(ctx)
	held := (*nodelock.HeldError)(nil)

	switch {
	case errors.As(err, &held):
		return fmt.Errorf("another manager has the host ports: %s: %w", sockets.ProcessWith(held.Inode), err)
	case errors.Is(err, outcome.ErrOtherManager):
		return err
	case errors.Is(err, nodelock.ErrNotPermitted):
		return nil // which the backend tells, unless it is an IPTables of the caller's that can do without
	case errors.Is(err, os.ErrClosed):
		return errClosed
	case err != nil && !errors.Is(err, errors.ErrUnsupported):
		return fmt.Errorf("lock the host ports: %w", err)
	}

	if l.done.CompareAndSwap(false, true) && err != nil {
		l.log.Info("Nothing keeps a second manager from the host ports", "reason", err)
	}

	return nil
}

// Close gives the lock up.
func (l *nodeLock) Close() error { return l.lock.Close() }
