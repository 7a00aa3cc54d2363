package hostport

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
)

// The names are those that CRI-O gives: computed with sha256sum and base32.
func TestRowHash(t *testing.T) {
	t.Parallel()

	assert.Equal(t, "GBH6WWRSQ6MEASEE", rowHash("id1", 53, "UDP", ""))
	assert.Equal(t, "7S3ZEZ3XSEJU36AN", rowHash("id1", 8080, "tcp", "192.0.2.1"))
}

func TestRuleLabel(t *testing.T) {
	t.Parallel()

	assert.Equal(t, "web_default hostport 80", ruleLabel(owner{namespace: "default", name: "web"}, 80))
	assert.Equal(t, "k8s_web_default_uid_0 hostport 80", ruleLabel(owner{name: "k8s_web_default_uid_0"}, 80))
	assert.Equal(t, "a-----b-_ns hostport 80", ruleLabel(owner{namespace: "ns", name: "a\"\n\\ $b\u00e9"}, 80))

	long := ruleLabel(owner{namespace: strings.Repeat("n", 63), name: strings.Repeat("p", 300)}, 65535)
	assert.Len(t, long, maxLabel)
	assert.True(t, strings.HasSuffix(long, "p hostport 65535"), long)
}
