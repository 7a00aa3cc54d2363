package iptables

import (
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cri-o/hostport/internal/outcome"
	"github.com/cri-o/hostport/internal/row"
)

// testRow is a row from an endpoint, on any address if hostIP is none, to a pod.
func testRow(proto row.Protocol, hostIP string, port uint16, pod string) *row.Row {
	r := &row.Row{Endpoint: row.Endpoint{PortKey: row.PortKey{Proto: proto, Port: port}}, Pod: netip.MustParseAddrPort(pod)}
	if hostIP != "" {
		r.IP = netip.MustParseAddr(hostIP)
	}

	r.SetOwner(row.Owner{ID: "id", Name: "web"})

	return r
}

// atLineError is an error about a line.
type atLineError int

func (e atLineError) Error() string { return fmt.Sprintf("line %d failed", e) }
func (e atLineError) Line() int     { return int(e) }

// What is written has to be understood again, to the letter.
func TestRulesParseBack(t *testing.T) {
	t.Parallel()

	rules := slices.Concat(GuardRules(row.IPv4), NATRules(row.IPv4, true), NATRules(row.IPv4, false), NATRules(row.IPv6, false))

	for _, r := range []*row.Row{
		testRow(row.TCP, "", 8080, "10.88.0.5:80"),
		testRow(row.SCTP, "192.0.2.1", 65535, "10.88.0.5:1"),
		testRow(row.UDP, "2001:db8::1", 1, "[fd00::5]:65535"),
	} {
		for _, link := range []string{"", "cni0"} {
			r.Link = link
			for _, s := range SidesOf(r) {
				rules = append(append(rules, s.Path...), s.Jump, s.Rule)
			}
		}
	}

	for _, r := range rules {
		assert.Equal(t, r, parseRule(CmdAppend+r.String()))
		assert.LessOrEqual(t, len(r.Chain), 28, "XT_EXTENSION_MAXNAMELEN")
		assert.LessOrEqual(t, len(r.Target), 28)
	}
}

func TestParseRuleOther(t *testing.T) {
	t.Parallel()

	for _, line := range []string{
		`-A KUBE-HOSTPORTS ! -p tcp -j KUBE-HP-X`,
		`-A KUBE-HOSTPORTS -j KUBE-HP-X !`,
		`-A KUBE-HOSTPORTS -o eth0 -j KUBE-HP-X`,
		`-A KUBE-HOSTPORTS -m comment --comment "open -j KUBE-HP-X`,
		`-A KUBE-HOSTPORTS -d 10.0.0.0/255.0.255.0 -j KUBE-HP-X`,
		`-A KUBE-HOSTPORTS -p tcp -m tcp --dport 99999 -j KUBE-HP-X`,
		`-A KUBE-HOSTPORTS -j`,
	} {
		assert.True(t, parseRule(line).other, line)
	}

	r := parseRule(`-A A -m comment --comment "a \"quoted\" \\ thing" -j B`)
	assert.Equal(t, Rule{Chain: "A", comment: `a "quoted" \ thing`, Target: "B"}, r)
}

func TestRangeAt(t *testing.T) {
	t.Parallel()

	for _, tc := range []struct {
		port uint16
		want [rangeLevels]ports
	}{
		{0, [rangeLevels]ports{{0, 16383}, {0, 4095}, {0, 1023}, {0, 255}, {0, 63}, {0, 15}}},
		{8080, [rangeLevels]ports{{0, 16383}, {4096, 8191}, {7168, 8191}, {7936, 8191}, {8064, 8127}, {8080, 8095}}},
		{65535, [rangeLevels]ports{{49152, 65535}, {61440, 65535}, {64512, 65535}, {65280, 65535}, {65472, 65535}, {65520, 65535}}},
	} {
		for level, want := range tc.want {
			assert.Equal(t, want, rangeAt(tc.port, level))
		}
	}
}

func TestLineIn(t *testing.T) {
	t.Parallel()

	s := newScript(&Ruleset{nat: &Table{Chains: map[string][]SavedRule{}}}, RowsAtOnce)
	r := testRow(row.TCP, "", 8080, "10.88.0.5:80")
	s.begin(NATTable)
	s.put(func(*row.Row) int { return 0 }, []*row.Row{r})

	lines := strings.Split(string(s.input()), "\n")

	for i, line := range lines {
		err := s.blame(atLineError(i + 1))
		if strings.HasPrefix(line, "-A KUBE-HP-"+r.Hash) || strings.HasPrefix(line, "-A CRIO-MASQ-"+r.Hash) {
			assert.True(t, outcome.IsRefused(err), line)
		} else {
			assert.False(t, outcome.IsRefused(err), line)
		}
	}
}

func FuzzParseSave(f *testing.F) {
	crioSave, err := os.ReadFile("testdata/crio-iptables-save")
	require.NoError(f, err)

	f.Add(string(crioSave))
	f.Add("*nat\n:KUBE-HP-AAAAAAAAAAAAAAAA - [0:0]\n-A KUBE-HP-AAAAAAAAAAAAAAAA -j DNAT --to-destination [::1]:80\nCOMMIT\n")
	f.Add("*nat\n:\n-A\n-A x -j\n\"\\")

	f.Fuzz(func(t *testing.T, save string) {
		table, err := ParseSave([]byte(save), NATTable)
		if err != nil {
			return
		}

		for _, family := range []row.Family{row.IPv4, row.IPv6} {
			rows := table.Rows(family)
			for _, r := range rows {
				assert.True(t, isHash(r.Hash))
				assert.NotZero(t, r.Port)
				assert.NotZero(t, r.Pod.Port())
				assert.Equal(t, family, r.Family())
				_ = table.Holds(r)
				_ = table.leadsTo(r)
				_ = table.missing(r)
			}
		}

		rs := Ruleset{nat: table, Misplaced: map[string]Misplaced{}}
		for _, rule := range NATRules(row.IPv4, true) {
			rs.Locate(table, rule)
		}

		_ = table.pruned()
	})
}

func FuzzParseRule(f *testing.F) {
	f.Add(`-A KUBE-HP-X -d 192.0.2.1/32 -p tcp -m comment --comment "ns_pod hostport 80" -j DNAT --to-destination 10.88.0.5:80`)
	f.Add(`-A PREROUTING -m addrtype --dst-type LOCAL -j KUBE-HOSTPORTS`)

	f.Fuzz(func(t *testing.T, line string) {
		r := parseRule(line)
		if r.other || strings.ContainsAny(r.comment+r.Chain+r.Target+r.notIn+r.notOut+string(r.proto), "\"\\ \n") ||
			r.Chain == "" || r.to.Addr().Zone() != "" || (r.dports != ports{} && r.proto == "") {
			return
		}

		// What is understood in full can be written and read again.
		assert.Equal(t, r, parseRule(CmdAppend+r.String()), line)
	})
}
