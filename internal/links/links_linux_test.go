package links

import (
	"strconv"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

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
