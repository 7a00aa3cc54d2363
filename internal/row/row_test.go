package row

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
)

// The names are those that CRI-O gives: computed with sha256sum and base32.
func TestRowHash(t *testing.T) {
	t.Parallel()

	assert.Equal(t, "GBH6WWRSQ6MEASEE", HashOf("id1", 53, "UDP", ""))
	assert.Equal(t, "7S3ZEZ3XSEJU36AN", HashOf("id1", 8080, "tcp", "192.0.2.1"))
}

// What has a scope can be told from it, whatever follows it.
func TestScope(t *testing.T) {
	t.Parallel()

	// Computed with sha256sum and base32: six of net1/, ten of net1/id1 or net1/id153UDP.
	assert.Equal(t, "LCLRETLEFEMC7JYZ", ShortHash("net1/id1"))
	assert.Equal(t, "LCLRETFBXX4EW2WP", HashOf("net1/id1", 53, "UDP", ""))

	for _, r := range []*Row{{OwnerHash: ShortHash("net1/id1")}, {Hash: HashOf("net1/id1", 53, "UDP", "")}} {
		assert.True(t, r.InScope("net1"))
		assert.True(t, r.InScope(""))
		assert.False(t, r.InScope("net"))
		assert.False(t, r.InScope("net1/id1"))
	}

	assert.False(t, (&Row{OwnerHash: ShortHash("net1")}).InScope("net1"))
}

func TestRuleLabel(t *testing.T) {
	t.Parallel()

	assert.Equal(t, "web_default hostport 80", LabelOf(Owner{Namespace: "default", Name: "web"}, 80))
	assert.Equal(t, "k8s_web_default_uid_0 hostport 80", LabelOf(Owner{Name: "k8s_web_default_uid_0"}, 80))
	assert.Equal(t, "a-----b-_ns hostport 80", LabelOf(Owner{Namespace: "ns", Name: "a\"\n\\ $b\u00e9"}, 80))

	long := LabelOf(Owner{Namespace: strings.Repeat("n", 63), Name: strings.Repeat("p", 300)}, 65535)
	assert.Len(t, long, MaxLabel)
	assert.True(t, strings.HasSuffix(long, "p hostport 65535"), long)
}
