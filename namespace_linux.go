package hostport

import (
	"errors"
	"fmt"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

var errOtherNamespace = errors.New("the calling thread is in another network namespace than the manager was made in")

// namespace is the network namespace of whoever asks about it first.
type namespace struct{ known atomic.Pointer[namespaceID] }

// namespaceID identifies a network namespace (namespaces(7)).
type namespaceID struct{ device, inode uint64 }

// isCurrent fails if the calling thread is in another network namespace: a socket or a
// process would be there, and the rules here. It takes some microseconds and no file
// descriptor.
func (n *namespace) isCurrent() error {
	var stat unix.Stat_t

	if err := unix.Stat("/proc/thread-self/ns/net", &stat); err != nil {
		return fmt.Errorf("look at the network namespace: %w", err)
	}

	now := namespaceID{uint64(stat.Dev), stat.Ino} //nolint:unconvert // 32 bits on some systems
	if n.known.CompareAndSwap(nil, &now) || *n.known.Load() == now {
		return nil
	}

	return errOtherNamespace
}
