package hostport

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// What contributors run before a pull request is what CI runs on it.
func TestCISteps(t *testing.T) {
	t.Parallel()

	script, err := os.ReadFile(".ci/run")
	require.NoError(t, err)
	workflow, err := os.ReadFile(".github/workflows/ci.yml")
	require.NoError(t, err)

	loop := regexp.MustCompile(`(?m)^for step in ([a-z -]+); do`).FindSubmatch(script)
	require.NotNil(t, loop, "the steps of .ci/run")

	var jobs []string
	for _, job := range regexp.MustCompile(`(?m)\bmake ([a-z-]+)\r?$|^ +target: \[([a-z, -]+)\]`).FindAllSubmatch(workflow, -1) {
		jobs = append(jobs, strings.FieldsFunc(string(job[1])+string(job[2]), func(r rune) bool { return strings.ContainsRune(", ", r) })...)
	}

	steps := strings.Fields(string(loop[1]))

	slices.Sort(steps)
	slices.Sort(jobs)
	assert.Equal(t, steps, slices.Compact(jobs))
}
