package nodelock_test

import (
	"context"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cri-o/hostport/internal/nodelock"
	"github.com/cri-o/hostport/internal/outcome"
	"github.com/cri-o/hostport/internal/testbed"
)

func bed(t *testing.T) *testbed.Bed {
	t.Helper()

	b, err := testbed.New()
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, b.Close()) })

	return b
}

func newLock(t *testing.T, g nodelock.Group) *nodelock.Lock {
	t.Helper()

	l := nodelock.New(g)
	t.Cleanup(func() { assert.NoError(t, l.Close()) })

	return l
}

// tryTake tries to take a lock in a network namespace.
func tryTake(t *testing.T, at *testbed.Namespace, l *nodelock.Lock) error {
	t.Helper()

	return at.Do(func() error { return l.TryTake(t.Context()) })
}

// One has the lock, until it closes it.
func TestOneAtATime(t *testing.T) {
	b := bed(t)
	first, second := newLock(t, nodelock.IPv4), newLock(t, nodelock.IPv4)

	require.NoError(t, tryTake(t, b.Host, first))
	require.NoError(t, tryTake(t, b.Host, first), "again")
	require.ErrorIs(t, tryTake(t, b.Host, second), outcome.ErrOtherManager)

	require.NoError(t, first.Close())
	require.NoError(t, tryTake(t, b.Host, second))
	require.NoError(t, first.Close(), "again")
	require.ErrorIs(t, tryTake(t, b.Host, first), os.ErrClosed)
	require.ErrorIs(t, tryTake(t, b.Host, newLock(t, nodelock.IPv4)), outcome.ErrOtherManager)
}

// Who has the lock is found among sockets that come and go.
func TestHolderAmongOthers(t *testing.T) {
	b := bed(t)
	require.NoError(t, tryTake(t, b.Host, newLock(t, nodelock.IPv4)))

	ctx, cancel := context.WithCancel(t.Context())

	var others sync.WaitGroup
	defer others.Wait()
	defer cancel()

	others.Go(func() {
		assert.NoError(t, b.Host.Do(func() error {
			for ctx.Err() == nil {
				var fds []int

				for range 20 {
					fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
					if err != nil {
						return err
					}

					fds = append(fds, fd)

					if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil { // which lists it
						return err
					}
				}

				for _, fd := range fds {
					_ = unix.Close(fd)
				}
			}

			return nil
		}))
	})

	require.NoError(t, b.Host.Do(func() error {
		for range 500 {
			inode, err := nodelock.Holder(nodelock.IPv4)
			require.NoError(t, err)
			require.NotZero(t, inode)
		}

		return nil
	}))
}

// Take waits, and says in the end which socket it has waited for.
func TestTakeWaits(t *testing.T) {
	b := bed(t)
	first, second := newLock(t, nodelock.IPv6), newLock(t, nodelock.IPv6)
	fds := openFiles(t)

	require.NoError(t, tryTake(t, b.Host, first))

	var mine []uint64

	for fd := range openFiles(t) {
		var stat unix.Stat_t
		if !fds[fd] && unix.Stat("/proc/self/fd/"+fd, &stat) == nil && stat.Mode&unix.S_IFMT == unix.S_IFSOCK {
			mine = append(mine, stat.Ino)
		}
	}

	require.Len(t, mine, 1, "a socket")

	limit, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()

	begun := time.Now()
	held := (*nodelock.HeldError)(nil)

	err := b.Host.Do(func() error { return second.Take(limit) })
	require.ErrorAs(t, err, &held)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	assert.GreaterOrEqual(t, time.Since(begun), 100*time.Millisecond)
	assert.Equal(t, mine[0], uint64(held.Inode))

	waits := make(chan error)

	go func() { waits <- second.Take(t.Context()) }() // with the socket that it has

	require.NoError(t, first.Close())
	require.NoError(t, <-waits)
}

// Close ends Take.
func TestCloseEndsTake(t *testing.T) {
	b := bed(t)
	first, second := newLock(t, nodelock.IPv4), newLock(t, nodelock.IPv4)
	require.NoError(t, tryTake(t, b.Host, first))
	require.ErrorIs(t, tryTake(t, b.Host, second), outcome.ErrOtherManager)

	waits := make(chan error)

	go func() { waits <- second.Take(t.Context()) }()

	require.NoError(t, second.Close())
	require.ErrorIs(t, <-waits, os.ErrClosed)
}

// Groups and network namespaces do not hinder each other.
func TestIndependent(t *testing.T) {
	b := bed(t)

	for _, at := range []*testbed.Namespace{b.Host, b.Client} {
		for _, g := range []nodelock.Group{nodelock.IPv4, nodelock.IPv6, nodelock.Both} {
			require.NoError(t, tryTake(t, at, newLock(t, g)), "%s, group %d", at.Name, g)
		}
	}
}

// Without CAP_NET_ADMIN nobody takes it, and the error gives the right reason.
func TestUnprivileged(t *testing.T) {
	b := bed(t)
	holder := newLock(t, nodelock.IPv4)

	unprivileged := func(l *nodelock.Lock) error {
		done := make(chan error)

		go func() {
			runtime.LockOSThread() // for good: the thread ends with this goroutine

			done <- func() error {
				if err := unix.Setns(b.Host.FD(), unix.CLONE_NEWNET); err != nil {
					return err
				}

				hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}

				var data [2]unix.CapUserData // none
				if err := unix.Capset(&hdr, &data[0]); err != nil {
					return err
				}

				return l.TryTake(t.Context())
			}()
		}()

		return <-done
	}

	require.ErrorIs(t, unprivileged(newLock(t, nodelock.IPv4)), nodelock.ErrNotPermitted)
	require.NoError(t, tryTake(t, b.Host, holder))
	require.ErrorIs(t, unprivileged(newLock(t, nodelock.IPv4)), nodelock.ErrNotPermitted)
	require.ErrorIs(t, tryTake(t, b.Host, newLock(t, nodelock.IPv4)), outcome.ErrOtherManager)
}

func openFiles(t *testing.T) map[string]bool {
	t.Helper()

	entries, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)

	open := map[string]bool{}
	for _, e := range entries {
		open[e.Name()] = true
	}

	return open
}
