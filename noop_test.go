package hostport

import (
	"testing"

	"github.com/stretchr/testify/assert"
)

// Whatever it is given, the manager that maps nothing does nothing.
func TestNoop(t *testing.T) {
	t.Parallel()

	m := NewNoopHostportManager()

	for _, pod := range []*PodPortMapping{nil, {}, podAt("10.88.0.2", &PortMapping{HostPort: 70000}), podAt("", &PortMapping{HostPort: 80})} {
		assert.NoError(t, m.Add("", pod, ""))
		assert.NoError(t, m.Add("id", pod, "lo"))
		assert.NoError(t, m.Remove("", pod))
	}
}
