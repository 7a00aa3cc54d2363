package hostport

import (
	"context"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// Whatever it is given, the manager that maps nothing does nothing.
func TestNoop(t *testing.T) {
	t.Parallel()

	m, ok := NewNoopHostportManager().(*Manager)
	require.True(t, ok)

	for range 2 {
		for _, pod := range []*PodPortMapping{nil, {}, podAt("10.88.0.2", &PortMapping{HostPort: 70000}), podAt("", &PortMapping{HostPort: 80})} {
			for _, id := range []string{"", "id"} {
				require.NoError(t, m.Add(id, pod, "lo"))
				require.NoError(t, m.Check(t.Context(), id, pod))
				require.NoError(t, m.Sync(t.Context(), map[string][]*PodPortMapping{id: {pod}}))
				require.NoError(t, m.Keep(t.Context(), []string{id}))
				require.NoError(t, m.Remove(id, pod))
			}
		}

		assert.Empty(t, m.Mappings())
		assert.Empty(t, m.Status())
		require.NoError(t, m.Close())
	}

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	assert.ErrorIs(t, m.Run(ctx), context.Canceled)
}
