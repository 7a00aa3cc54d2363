package nodelock

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cri-o/hostport/internal/nfnetlink"
	"github.com/cri-o/hostport/internal/outcome"
)

// Group is an NFLOG group that stands for something that one manager has at a time. The
// numbers are those of two letters each: others count from 0.
type Group uint16

// The groups.
const (
	// IPv4 and IPv6 are the host ports of a family.
	IPv4 Group = 'h'<<8 | '4' // 26676
	IPv6 Group = 'h'<<8 | '6' // 26678
	// Both is had before either by managers of both families: else each of two might have
	// one family and wait for the other.
	Both Group = 'h'<<8 | 'p' // 26736
)

// HeldError says which socket has the lock.
type HeldError struct {
	Group Group
	// Inode is the socket's, 0 if /proc does not show it.
	Inode uint32
	// Err is why nobody waits any longer.
	Err error
}

func (e *HeldError) Error() string { return fmt.Sprintf("NFLOG group %d is taken: %v", e.Group, e.Err) }

// Unwrap returns outcome.ErrOtherManager as well.
func (e *HeldError) Unwrap() []error { return []error{outcome.ErrOtherManager, e.Err} }

// ErrNotPermitted says that CAP_NET_ADMIN is missing in the network namespace.
var ErrNotPermitted = errors.New("no lock without CAP_NET_ADMIN")

// Lock is what one manager at a time has.
type Lock struct {
	group Group

	mu     sync.Mutex
	conn   *nfnetlink.Conn
	closed bool
}

// New returns a lock that is not taken yet.
func New(g Group) *Lock { return &Lock{group: g} }

// pollInterval is how often a lock is tried that another socket has: the kernel does not
// tell when it gets free.
const pollInterval = 25 * time.Millisecond

// Take waits for the lock while another socket has it. When ctx ends it tries once more, and
// then returns a *HeldError. Otherwise it is TryTake.
func (l *Lock) Take(ctx context.Context) error {
	for {
		err := l.TryTake(context.WithoutCancel(ctx))
		if !errors.Is(err, outcome.ErrOtherManager) {
			return err
		}

		select {
		case <-time.After(pollInterval):
		case <-ctx.Done():
			inode, _ := Holder(l.group)

			return &HeldError{Group: l.group, Inode: inode, Err: ctx.Err()}
		}
	}
}

// TryTake takes the lock, in the network namespace of the thread that was the first to ask for
// it. Nothing happens if it is taken. Errors are outcome.ErrOtherManager, ErrNotPermitted, errors.ErrUnsupported
// if the kernel has no such locks, os.ErrClosed after Close, and what keeps a socket from being
// opened.
func (l *Lock) TryTake(ctx context.Context) error {
	l.mu.Lock()
	defer l.mu.Unlock()

	if l.closed {
		return os.ErrClosed
	}

	if l.conn == nil {
		conn, err := nfnetlink.Dial()
		if outcome.IsAbsence(err) {
			return fmt.Errorf("%w: %w", errors.ErrUnsupported, err)
		}

		if err != nil {
			return err
		}

		l.conn = conn
	}

	err := l.conn.BindLogGroup(ctx, uint16(l.group))

	switch {
	case errors.Is(err, unix.EBUSY): // by this socket
		return nil
	case errors.Is(err, unix.EINVAL):
		return fmt.Errorf("%w: the kernel has no nfnetlink_log: %w", errors.ErrUnsupported, err)
	case !errors.Is(err, unix.EPERM):
		return err
	case l.conn.Permitted(ctx):
		return outcome.ErrOtherManager
	default:
		return ErrNotPermitted
	}
}

// Close gives the lock up, and ends Take. Closing again does nothing.
func (l *Lock) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()

	l.closed = true

	if l.conn == nil {
		return nil
	}

	return l.conn.Close()
}

// Holder returns the inode of the socket that has a group, 0 if none has it. The error is that of
// reading /proc, which shows the groups to root alone.
func Holder(g Group) (uint32, error) {
	const tries = 100

	for range tries {
		portID, err := portOf(g)
		if err != nil || portID == "" {
			return 0, err
		}

		// The list lacks some sockets while others come and go: it is read in pieces, of a table that
		// is made anew meanwhile (rhashtable_walk_start, lib/rhashtable.c).
		if inode, err := inodeOf(portID); err != nil || inode != 0 {
			return inode, err
		}
	}

	return 0, fmt.Errorf("the socket that has group %d is in no list", g)
}

// portOf is the port id that has a group, "" if none has it.
func portOf(g Group) (portID string, err error) {
	// group, port id, and more (seq_show in net/netfilter/nfnetlink_log.c)
	groups, err := lines("netfilter/nfnetlink_log")
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil // without the module nobody has one
	}

	for _, f := range groups {
		if f[0] == strconv.Itoa(int(g)) {
			portID = f[1]
		}
	}

	return portID, err
}

// inodeOf is the inode of the socket with a port id, 0 if it is not listed.
func inodeOf(portID string) (uint32, error) {
	var inode uint64

	// address, protocol, port id, and more, inode (netlink_native_seq_show in net/netlink/af_netlink.c)
	sockets, err := lines("netlink")
	for _, f := range sockets {
		if f[1] == strconv.Itoa(unix.NETLINK_NETFILTER) && f[2] == portID {
			inode, _ = strconv.ParseUint(f[len(f)-1], 10, 32)
		}
	}

	return uint32(inode), err
}

// lines are the fields of each line of a file about the thread's network namespace.
func lines(file string) (all [][]string, err error) {
	data, err := os.ReadFile("/proc/thread-self/net/" + file)

	for line := range strings.Lines(string(data)) {
		if f := strings.Fields(line); len(f) > 2 {
			all = append(all, f)
		}
	}

	return all, err //nolint:wrapcheck // names the file
}
