package sockets

import (
	"net"
	"net/netip"
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

// listen has somebody else serve a TCP port until close is called.
func listen(t *testing.T, address string) (port uint16, closed func()) {
	t.Helper()

	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", address)
	require.NoError(t, err)

	return l.Addr().(*net.TCPAddr).AddrPort().Port(), func() { _ = l.Close() }
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
		port, closed := listen(t, "127.0.0.1:0")
		closed()

		e := endpoint(row.TCP, port)

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

	s := newSet(t)
	port, closed := listen(t, "127.0.0.1:0")
	e := endpoint(row.TCP, port)

	require.ErrorIs(t, s.Adopt(e), unix.EADDRINUSE)
	require.ErrorIs(t, s.Acquire(e), unix.EADDRINUSE, "somebody still serves it")
	closed()
	s.Retry()
	assert.True(t, s.Holds(e))

	s.Release(e)

	_, closed = listen(t, netip.AddrPortFrom(loopback, port).String())
	require.ErrorIs(t, s.Adopt(e), unix.EADDRINUSE)
	s.Release(e)
	closed()
	s.Retry()
	assert.False(t, s.Holds(e), "nobody wants it any more")

	_, closed = listen(t, netip.AddrPortFrom(loopback, port).String())
	closed()
}

// Retry binds some at a time, so that an operation's cost stays its own.
func TestRetrySome(t *testing.T) {
	t.Parallel()

	const many = 40

	s := newSet(t)

	for range many {
		port, closed := listen(t, "127.0.0.1:0")
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
	port, closed := listen(t, "127.0.0.2:0")
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
