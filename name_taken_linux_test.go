package hostport

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cri-o/hostport/internal/nfnetlink"
)

// The kernel gives back our rules as they were sent, to the byte, and everything else as we
// would make it.
func TestMadeAsWanted(t *testing.T) {
	eachNFTFamily(t, func(t *testing.T, n *node, f ipFamily) {
		b := nftOver(t, n.nfnetlink(), f)
		n.commit(b.objects()...)

		found, err := b.observe(t.Context())
		require.NoError(t, err)

		there := map[string][]string{}
		for _, r := range found.rules {
			there[r.Chain] = append(there[r.Chain], r.Expressions)
		}

		sent := map[string][]string{}

		for _, m := range b.rules() {
			r, err := nfnetlink.ParseRule(m)
			require.NoError(t, err)

			sent[r.Chain] = append(sent[r.Chain], r.Expressions)
		}

		assert.Equal(t, sent, there)
	})
}

// What bears our names and is not as ours is put right by whoever comes to it, and Check
// says so.
func TestNamesTaken(t *testing.T) {
	for name, script := range map[string]string{
		"dormant table":               "add table %[1]s crio-hostports { flags dormant; }",
		"chain of another priority":   "flush chain %[1]s crio-hostports nat-prerouting; delete chain %[1]s crio-hostports nat-prerouting; add chain %[1]s crio-hostports nat-prerouting { type nat hook prerouting priority -90; }",
		"chain of another hook":       "flush chain %[1]s crio-hostports nat-prerouting; delete chain %[1]s crio-hostports nat-prerouting; add chain %[1]s crio-hostports nat-prerouting { type nat hook input priority -99; }",
		"map of other flags":          "delete table %[1]s crio-hostports; add table %[1]s crio-hostports; add map %[1]s crio-hostports hostports { type inet_proto . inet_service : %[2]s . inet_service; flags interval; }",
		"map of another type":         "delete table %[1]s crio-hostports; add table %[1]s crio-hostports; add map %[1]s crio-hostports hostports { type inet_service : %[2]s; }",
		"set of another size":         "delete table %[1]s crio-hostports; add table %[1]s crio-hostports; add set %[1]s crio-hostports hairpins { type %[2]s . %[2]s; size 1; }",
		"verdict of others before it": "insert rule %[1]s crio-hostports nat-prerouting accept",
	} {
		t.Run(name, func(t *testing.T) {
			eachNFTFamily(t, func(t *testing.T, n *node, f ipFamily) {
				n.serve(0, "tcp", f, 80)
				n.serve(1, "tcp", f, 80)

				pods := map[string][]*PodPortMapping{"id": {n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80})}}
				at := func(port uint16) netip.AddrPort { return netip.AddrPortFrom(n.nodeIP(f), port) }
				m := n.manager()
				require.NoError(t, n.add(m, "id", pods["id"][0]))

				breakTable := func() {
					n.command("nft", fmt.Sprintf(script, nftFamily(f), "ipv"+string(f)+"_addr"))
				}

				breakTable()
				n.do(func() { assert.Error(t, m.Check(t.Context(), "id", pods["id"][0])) })
				require.NoError(t, n.sync(m, pods))
				n.exactly(m, pods)

				breakTable()
				require.NoError(t, n.add(m, "id", pods["id"][0]))
				n.exactly(m, pods)

				breakTable()
				pods["more"] = []*PodPortMapping{n.pod(1, f, &PortMapping{HostPort: 9090, ContainerPort: 80})}
				require.NoError(t, n.add(m, "more", pods["more"][0]))
				n.exactly(m, pods)
				n.answers(n.Client, "tcp", at(8080), "web")
				n.answers(n.Client, "tcp", at(9090), "other")

				n.run(m)
				breakTable()
				n.soon(func() (whole bool) {
					n.do(func() { whole = m.Check(t.Context(), "id", pods["id"][0]) == nil })

					return whole
				})
				n.exactly(m, pods)
				n.answers(n.Client, "tcp", at(8080), "web")
			})
		})
	}
}
