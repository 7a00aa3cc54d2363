package hostport

import (
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// testRow is a row from an endpoint, on any address if hostIP is none, to a pod.
func testRow(proto protocol, hostIP string, port uint16, pod string) *row {
	r := &row{endpoint: endpoint{portKey: portKey{proto: proto, port: port}}, pod: netip.MustParseAddrPort(pod)}
	if hostIP != "" {
		r.ip = netip.MustParseAddr(hostIP)
	}

	r.setOwner(owner{id: "id", name: "web"})

	return r
}

// atLineError is an error about a line.
type atLineError int

func (e atLineError) Error() string { return fmt.Sprintf("line %d failed", e) }
func (e atLineError) Line() int     { return int(e) }

// What is written has to be understood again, to the letter.
func TestRulesParseBack(t *testing.T) {
	t.Parallel()

	rules := slices.Concat(guardRules(IPv4), natRules(IPv4, true), natRules(IPv4, false), natRules(IPv6, false))

	for _, r := range []*row{
		testRow(tcp, "", 8080, "10.88.0.5:80"),
		testRow(sctp, "192.0.2.1", 65535, "10.88.0.5:1"),
		testRow(udp, "2001:db8::1", 1, "[fd00::5]:65535"),
	} {
		for _, link := range []string{"", "cni0"} {
			r.link = link
			for _, s := range sidesOf(r) {
				rules = append(append(rules, s.path...), s.jump, s.rule)
			}
		}
	}

	for _, r := range rules {
		assert.Equal(t, r, parseRule(cmdAppend+r.String()))
		assert.LessOrEqual(t, len(r.chain), 28, "XT_EXTENSION_MAXNAMELEN")
		assert.LessOrEqual(t, len(r.target), 28)
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
	assert.Equal(t, iptRule{chain: "A", comment: `a "quoted" \ thing`, target: "B"}, r)
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

	s := newScript(&iptRuleset{nat: &iptTable{chains: map[string][]savedRule{}}}, rowsAtOnce)
	r := testRow(tcp, "", 8080, "10.88.0.5:80")
	s.begin(natTable)
	s.put(func(*row) int { return 0 }, []*row{r})

	lines := strings.Split(string(s.input()), "\n")

	for i, line := range lines {
		err := s.blame(atLineError(i + 1))
		if strings.HasPrefix(line, "-A KUBE-HP-"+r.hash) || strings.HasPrefix(line, "-A CRIO-MASQ-"+r.hash) {
			assert.True(t, isRefused(err), line)
		} else {
			assert.False(t, isRefused(err), line)
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
		table, err := parseSave([]byte(save), natTable)
		if err != nil {
			return
		}

		for _, family := range []ipFamily{IPv4, IPv6} {
			rows := table.rows(family)
			for _, r := range rows {
				assert.True(t, isHash(r.hash))
				assert.NotZero(t, r.port)
				assert.NotZero(t, r.pod.Port())
				assert.Equal(t, family, r.family())
				_ = table.holds(r)
				_ = table.leadsTo(r)
				_ = table.missing(r)
			}
		}

		rs := iptRuleset{nat: table, misplaced: map[string]misplaced{}}
		for _, rule := range natRules(IPv4, true) {
			rs.locate(table, rule)
		}

		_ = table.pruned()
	})
}

func FuzzParseRule(f *testing.F) {
	f.Add(`-A KUBE-HP-X -d 192.0.2.1/32 -p tcp -m comment --comment "ns_pod hostport 80" -j DNAT --to-destination 10.88.0.5:80`)
	f.Add(`-A PREROUTING -m addrtype --dst-type LOCAL -j KUBE-HOSTPORTS`)

	f.Fuzz(func(t *testing.T, line string) {
		r := parseRule(line)
		if r.other || strings.ContainsAny(r.comment+r.chain+r.target+r.notIn+r.notOut+string(r.proto), "\"\\ \n") ||
			r.chain == "" || r.to.Addr().Zone() != "" || (r.dports != ports{} && r.proto == "") {
			return
		}

		// What is understood in full can be written and read again.
		assert.Equal(t, r, parseRule(cmdAppend+r.String()), line)
	})
}
