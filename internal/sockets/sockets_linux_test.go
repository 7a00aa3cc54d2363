package sockets

import (
	"net"
	"net/netip"
	"strconv"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cri-o/hostport/internal/row"
)

var loopback = netip.MustParseAddr("127.0.0.1") //nolint:gochecknoglobals // a constant

func endpoint(p row.Protocol, port uint16) row.Endpoint {
	return row.Endpoint{PortKey: row.PortKey{Proto: p, Port: port}, IP: loopback}
}

// listen has somebody else serve a TCP port until close is called. Each test has ports of its own,
// below those that the kernel hands out: a port that is free again may come back at once, to the
// same test or to one beside it.
func listen(t *testing.T, host string, port uint16) (closed func()) {
	t.Helper()

	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", net.JoinHostPort(host, strconv.Itoa(int(port))))
	require.NoError(t, err)

	return func() { _ = l.Close() }
}

func newSet(t *testing.T) *Set {
	t.Helper()

	s := New(row.IPv4, true)
	t.Cleanup(s.Close)

	return &s
}

// Rows that stand for one endpoint share its socket, however they came.
func TestShares(t *testing.T) {
	t.Parallel()

	for name, hold := range map[string]func(*Set, row.Endpoint) error{"acquire": (*Set).Acquire, "adopt": (*Set).Adopt} {
		s := newSet(t)
		e := endpoint(row.TCP, 20001)

		require.NoError(t, s.Adopt(e))
		require.NoError(t, hold(s, e))
		s.Release(e)
		assert.True(t, s.Holds(e), name)
		s.Release(e)
		assert.False(t, s.Holds(e), name)
	}
}

// What could not be held yet is tried again by Acquire and Retry, until it is released.
func TestWaits(t *testing.T) {
	t.Parallel()

	const port = 20002

	s := newSet(t)
	closed := listen(t, "127.0.0.1", port)
	e := endpoint(row.TCP, port)

	require.ErrorIs(t, s.Adopt(e), unix.EADDRINUSE)
	require.ErrorIs(t, s.Acquire(e), unix.EADDRINUSE, "somebody still serves it")
	closed()
	s.Retry()
	assert.True(t, s.Holds(e))

	s.Release(e)

	closed = listen(t, "127.0.0.1", port)
	require.ErrorIs(t, s.Adopt(e), unix.EADDRINUSE)
	s.Release(e)
	closed()
	s.Retry()
	assert.False(t, s.Holds(e), "nobody wants it any more")

	listen(t, "127.0.0.1", port)()
}

// Retry binds some at a time, so that an operation's cost stays its own.
func TestRetrySome(t *testing.T) {
	t.Parallel()

	const many = 40

	s := newSet(t)

	for port := uint16(20100); port < 20100+many; port++ {
		closed := listen(t, "127.0.0.1", port)
		t.Cleanup(closed)

		require.ErrorIs(t, s.Adopt(endpoint(row.TCP, port)), unix.EADDRINUSE)
		closed()
	}

	s.Retry()
	assert.Len(t, s.waiting, many-16)
	s.Retry()
	s.Retry()
	assert.Empty(t, s.waiting)
}

// A server on another address of the port is in nobody's way.
func TestServerElsewhere(t *testing.T) {
	t.Parallel()

	b := binder{row.IPv4}
	const port = 20003

	closed := listen(t, "127.0.0.2", port)
	defer closed()

	inode, err := b.findServer(endpoint(row.TCP, port), nil)
	require.NoError(t, err)
	assert.Zero(t, inode)

	everywhere := endpoint(row.TCP, port)
	everywhere.IP = netip.Addr{}

	inode, err = b.findServer(everywhere, nil)
	require.NoError(t, err)
	assert.NotZero(t, inode)
}
