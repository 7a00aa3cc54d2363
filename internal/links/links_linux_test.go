package links

import (
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cri-o/hostport/internal/row"
)

// Behind the loopback device there are no neighbours.
func TestLoopback(t *testing.T) {
	t.Parallel()

	l := New(row.IPv4)
	defer l.Close()

	bypassed, err := l.Bypassed("lo")
	require.NoError(t, err)
	assert.False(t, bypassed)
}

// What is remembered of interfaces is bounded.
func TestBound(t *testing.T) {
	t.Parallel()

	l := New(row.IPv4)
	defer l.Close()

	for i := range maxKinds {
		l.kinds[strconv.Itoa(i)] = "veth"
	}

	kind, err := l.kind("lo")
	require.NoError(t, err)
	assert.Equal(t, map[string]string{"lo": kind}, l.kinds)
}

// Behind what is no veth there may be neighbours whose answers do not come by the node.
func TestKinds(t *testing.T) {
	t.Parallel()

	l := New(row.IPv4)
	defer l.Close()

	for kind, want := range map[string]bool{"veth": false, "macvlan": true, "ipvlan": true} { // not every kernel has these
		l.kinds["pods"] = kind

		bypassed, err := l.Bypassed("pods")
		require.NoError(t, err)
		assert.Equal(t, want, bypassed, kind)
	}
}

// The sysctl of bridges goes with br_netfilter, and is another file when that is back.
func TestSysctlIsAnotherFile(t *testing.T) {
	t.Parallel()

	l := New(row.IPv4)
	defer l.Close()

	var err error

	l.calls, err = unix.Open(os.DevNull, unix.O_RDONLY|unix.O_CLOEXEC, 0) // reads as nothing
	require.NoError(t, err)

	path := filepath.Join(t.TempDir(), "sysctl")
	require.NoError(t, os.WriteFile(path, []byte("1\n"), 0o600))

	calls, err := l.readCalls(path)
	require.NoError(t, err)
	assert.True(t, calls)
}
