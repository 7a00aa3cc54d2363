package hostport

import (
	"net"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// On a thread in another network namespace nothing is done: a socket there would hold
// nothing here.
func TestOtherNamespace(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node, f IPFamily) {
		m := n.manager()
		stays := n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80})
		more := n.pod(1, f, &PortMapping{HostPort: 8081, ContainerPort: 80})
		require.NoError(t, n.add(m, "stays", stays))

		before := n.ours(f)

		require.NoError(t, n.Client.Do(func() error {
			require.ErrorIs(t, m.Add("more", more, ""), errOtherNamespace)
			require.ErrorIs(t, m.Remove("stays", nil), errOtherNamespace)
			require.ErrorIs(t, m.Sync(t.Context(), nil), errOtherNamespace)
			require.ErrorIs(t, m.Keep(t.Context(), nil), errOtherNamespace)
			require.ErrorIs(t, m.Check(t.Context(), "stays", stays), errOtherNamespace)
			require.ErrorIs(t, m.Run(t.Context()), errOtherNamespace)

			l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", ":8081")
			require.NoError(t, err, "not held")

			return l.Close()
		}))

		assert.Equal(t, before, n.ours(f))
		assert.Len(t, m.Mappings(), 1)
		n.do(func() { require.NoError(t, m.Check(t.Context(), "stays", stays)) })
		require.NoError(t, n.add(m, "more", more))
	})
}
