package main

import (
	"context"
	"io"
	"net"
	"net/netip"
	"regexp"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	v1 "k8s.io/api/core/v1"
	"k8s.io/klog/v2"

	"github.com/cri-o/hostport"
	"github.com/cri-o/hostport/internal/testbed"
)

func TestMain(m *testing.M) {
	if probed() { // the demo starts itself again, and here that is the test binary
		return
	}

	m.Run()
}

func TestRun(t *testing.T) {
	t.Run("default", func(t *testing.T) { allGood(t) })
	t.Run("iptables", func(t *testing.T) { allGood(t, hostport.WithBackend(hostport.BackendIPTables)) })
	t.Run("nothing installed", func(t *testing.T) {
		t.Setenv("PATH", t.TempDir())
		assert.Contains(t, allGood(t), "nft is not installed here.")
	})
}

func allGood(t *testing.T, opts ...hostport.Option) (out string) {
	t.Helper()

	out, err := story(t, opts...)
	require.NoError(t, err)

	good, all := verdict(t, out)
	assert.Equal(t, all, good)
	assert.NotContains(t, out, "✗")
	assert.NotContains(t, out, "\x1b", "colours are for terminals")

	// Rules are as long as they are, and explain tells them whole.
	report, said, found := strings.Cut(out, " hostports list")
	require.True(t, found)
	assert.Contains(t, said, "\n5353/udp answers a probe from outside. ")
	assert.Contains(t, said, "\ncause: IPv4: the node does not forward")

	for line := range strings.Lines(report) {
		assert.LessOrEqual(t, utf8.RuneCountInString(strings.TrimSpace(line)), 110, line)
	}

	return out
}

// Without sockets the ports are open to other processes, and the demo has to
// say so: in the rows, in the last line and by its error.
func TestRunTellsWhatIsWrong(t *testing.T) {
	out, err := story(t, hostport.WithoutSockets())
	require.ErrorIs(t, err, errUnexpected)

	good, all := verdict(t, out)
	assert.NotEqual(t, all, good)
	assert.Equal(t, 4, strings.Count(out, "✗ expected address already in use\n"))
}

func TestRunIsBounded(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	require.ErrorIs(t, run(ctx, io.Discard, hostport.WithLogger(klog.Logger{})), context.Canceled)
}

// The node has rows of one port for any address and for one of them, each in
// its family.
func TestCarrier(t *testing.T) {
	row := func(hostIP, podIP string) hostport.Mapping {
		return hostport.Mapping{
			Protocol: v1.ProtocolTCP, HostIP: hostIP, HostPort: 8080, PodIP: net.ParseIP(podIP), ContainerPort: 80,
			Backend: hostport.BackendNFTables,
		}
	}
	rows := []hostport.Mapping{row("0.0.0.0", "10.88.0.2"), row("192.0.2.11", "10.88.0.3"), row("::", "fd00:10:88::2")}

	for _, test := range []struct{ network, to, want string }{
		{"tcp", "192.0.2.1:8080", "hostports tcp . 8080 → 10.88.0.2:80"},
		{"tcp", "192.0.2.11:8080", "hostipports … tcp . 8080 → 10.88.0.3:80"},
		{"tcp", "[2001:db8:1::1]:8080", "hostports tcp . 8080 → [fd00:10:88::2]:80"},
		{"udp", "192.0.2.1:8080", noRule},
		{"tcp", "192.0.2.1:80", noRule},
	} {
		assert.Equal(t, test.want, carrier(rows, test.network, netip.MustParseAddrPort(test.to)), test)
	}
}

// What is asked may go wrong in many ways; a row tells the first of them.
func TestJudge(t *testing.T) {
	q := question{rule: "→ 10.88.0.2:80", want: "web", source: netip.MustParseAddr("192.0.2.2")}
	rule := "hostports tcp . 8080 " + q.rule
	good := testbed.Answer{From: "web", Source: netip.AddrPortFrom(q.source, 1), Took: time.Millisecond}
	require.NoError(t, q.judge(rule, good))

	for _, test := range []struct {
		name  string
		spoil func(rule *string, answer *testbed.Answer)
		want  string
	}{
		{"refused", func(_ *string, a *testbed.Answer) { a.From = refused }, "expected web"},
		{"no rule", func(rule *string, _ *testbed.Answer) { *rule = noRule }, "expected rule → 10.88.0.2:80"},
		{"source", func(_ *string, a *testbed.Answer) { a.Source = netip.MustParseAddrPort("10.88.0.1:1") }, "expected source 192.0.2.2"},
		{"slow", func(_ *string, a *testbed.Answer) { a.Took = atOnce }, "expected less than 1s"},
	} {
		t.Run(test.name, func(t *testing.T) {
			bearer, answer := rule, good
			test.spoil(&bearer, &answer)
			assert.EqualError(t, q.judge(bearer, answer), test.want)
		})
	}
}

func story(t *testing.T, opts ...hostport.Option) (string, error) {
	t.Helper()

	// Under the race detector a process takes a second to exit, and probes are
	// processes.
	t.Setenv("GORACE", "atexit_sleep_ms=0")

	var out strings.Builder
	err := run(t.Context(), &out, append(opts, hostport.WithLogger(klog.Logger{}))...)
	t.Log("\n" + out.String())

	return out.String(), err
}

// verdict reads the last line.
func verdict(t *testing.T, out string) (good, all string) {
	t.Helper()

	last := regexp.MustCompile(`\n(\d+) of (\d+) checks as they should be\n$`).FindStringSubmatch(out)
	require.NotNil(t, last)

	return last[1], last[2]
}
