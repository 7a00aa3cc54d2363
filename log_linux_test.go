package hostport

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cri-o/hostport/internal/localhost"
)

// line returns the one line of a log that has a text.
func line(t *testing.T, log, text string) string {
	t.Helper()

	var found []string

	for l := range strings.Lines(log) {
		if strings.Contains(l, text) {
			found = append(found, l)
		}
	}

	require.Len(t, found, 1, "%s in %s", text, log)

	return found[0]
}

// Whoever looks for a port or for a pod finds what has happened to it, and what an operator has
// to act on is an error.
func TestLog(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node, f IPFamily) {
		n.serve(0, "tcp", f, 80)

		pod := n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80})
		other := n.pod(1, f, &PortMapping{HostPort: 8080, ContainerPort: 80})
		to := netip.AddrPortFrom(n.nodeIP(f), 8080)

		tells := func(log, text, level string, others ...string) {
			t.Helper()

			l := line(t, log, text)
			assert.True(t, strings.HasPrefix(l, level), l)

			for _, other := range append(others, "8080", "web") {
				assert.Contains(t, l, other)
			}
		}

		log, logged := logs(t)
		first := n.manager(log)
		require.NoError(t, n.add(first, "id", pod))
		tells(logged(), "Added host ports", "I")
		assert.NotContains(t, logged(), "Repaired", "there was nothing")
		require.NoError(t, n.remove(first, "id", nil))
		tells(logged(), "Removed host ports", "I")
		require.NoError(t, n.add(first, "id", pod))
		require.NoError(t, first.Close())

		// Nobody has called Sync.
		log, logged = logs(t)
		second := n.manager(log)
		require.NoError(t, n.add(second, "new", other))
		l := line(t, logged(), "Took over")
		assert.True(t, strings.HasPrefix(l, "E"), l)
		assert.Contains(t, l, "8080")
		assert.Contains(t, l, `pod="ns/other"`)
		assert.Contains(t, l, "call Sync")

		require.NoError(t, n.sync(second, map[string][]*PodPortMapping{"id": {pod}}))
		assert.Contains(t, line(t, logged(), "Sync removed host ports"), " of ns/other")
		n.answers(n.Client, "tcp", to, "web")

		n.run(second)
		n.wipe(f)
		n.soon(func() bool { return strings.Contains(logged(), "Repaired host ports") })
		tells(logged(), "Repaired host ports", "E")

		n.sysctl(strings.TrimPrefix(localhost.Forwarding(f), "/proc/sys/"), "0")
		n.soon(func() bool { return strings.Contains(logged(), "does not forward") })
		tells(logged(), "does not forward", "E")
		n.sysctl(strings.TrimPrefix(localhost.Forwarding(f), "/proc/sys/"), "1")
		n.soon(func() bool { return strings.Contains(logged(), "forwards again") })
	})
}
