package interop

import (
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	v1 "k8s.io/api/core/v1"
	"sigs.k8s.io/knftables"

	"github.com/cri-o/hostport"
)

var update = flag.Bool("update", false, "write testdata anew") //nolint:gochecknoglobals // flags of go test are

// What nft lists is to the byte what is in testdata.
func TestGolden(t *testing.T) {
	t.Run("hostport", func(t *testing.T) {
		n := newNode(t)
		m := n.manager()

		for _, f := range families() {
			for i, mappings := range goldenMappings(n, f) {
				n.add(m, goldenID(i), i, f, mappings...)
			}

			file, got := goldenFile(f), n.nftList(f)
			if *update {
				require.NoError(t, os.WriteFile(file, []byte(got), 0o600))
			}

			want, err := os.ReadFile(file)
			require.NoError(t, err)
			assert.Equal(t, string(want), got)
		}
	})

	// What CRI-O would have made is the same, but for its rule for hairpin, the
	// chains that its rules are in, and what it does not know of.
	t.Run("CRI-O", func(t *testing.T) {
		n := newNode(t)
		hairpinRule := regexp.MustCompile(`\n\t\tct status .*`)
		others := regexp.MustCompile(hairpinRule.String() +
			`|(?s:\n\n\t(?:chain guard|chain nat-\w+|set services|set neighbours) \{.*?\n\t\})|\n\t\tcomment "kept for CRI-O.*|\n\t\tfib daddr type local goto hostports`)

		for _, f := range families() {
			for i, mappings := range goldenMappings(n, f) {
				n.crio(f).add(goldenID(i), i, mappings...)
			}

			want, err := os.ReadFile(goldenFile(f))
			require.NoError(t, err)

			got := n.nftList(f)
			assert.NotEqual(t, hairpinRule.FindString(string(want)), hairpinRule.FindString(got))
			assert.Equal(t, others.ReplaceAllString(string(want), ""), others.ReplaceAllString(got, ""))
		}
	})
}

func goldenFile(f knftables.Family) string { return filepath.Join("testdata", "nft-list-"+string(f)) }

func goldenID(i int) string { return []string{web: webID, other: otherID}[i] }

// goldenMappings are the rows of each pod.
func goldenMappings(n *node, f knftables.Family) [][]*hostport.PortMapping {
	nodeIP, otherIP := n.NodeIP(isV6(f)).String(), n.OtherNodeIP(isV6(f)).String()

	return [][]*hostport.PortMapping{
		web: {
			{HostPort: 8080, ContainerPort: 80, Protocol: v1.ProtocolTCP},
			{HostPort: 5353, ContainerPort: 53, Protocol: v1.ProtocolUDP},
			{HostPort: 3868, ContainerPort: 3868, Protocol: v1.ProtocolSCTP},
			{HostPort: 8443, ContainerPort: 443, Protocol: v1.ProtocolTCP, HostIP: nodeIP},
		},
		other: {
			{HostPort: 9090, ContainerPort: 80, Protocol: v1.ProtocolTCP},
			{HostPort: 8443, ContainerPort: 443, Protocol: v1.ProtocolTCP, HostIP: otherIP},
			{HostPort: 5353, ContainerPort: 53, Protocol: v1.ProtocolTCP, HostIP: otherIP},
		},
	}
}

// nftList is what nft lists of a family's table, with the elements of each set
// in the order of their lines: nft has them in the order of the kernel's hash,
// which is another for each set made.
func (n *node) nftList(f knftables.Family) string {
	n.t.Helper()

	var out []byte

	n.do(func() {
		var err error
		out, err = exec.CommandContext(n.t.Context(), "nft", "list", "table", string(f), tableName).CombinedOutput()
		require.NoError(n.t, err, "%s", out)
	})

	return regexp.MustCompile(`(?s)elements = \{.*?\}`).ReplaceAllStringFunc(string(out), func(s string) string {
		list := strings.Split(strings.TrimSuffix(strings.TrimPrefix(s, "elements = {"), "}"), ",")
		for i, e := range list {
			list[i] = "\n\t\t\t" + strings.TrimSpace(e)
		}

		return "elements = {" + strings.Join(slices.Sorted(slices.Values(list)), ",") + "\n\t\t}"
	})
}
