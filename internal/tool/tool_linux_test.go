package tool

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/cri-o/hostport/internal/nfnetlink"
	"github.com/cri-o/hostport/internal/row"
	"github.com/cri-o/hostport/internal/testbed"
)

// state is what must not change: the ruleset without its counters, sysctls, interfaces, addresses,
// routes, and flows of TCP and UDP of the node, line by line.
func (b *bed) state() []string {
	b.t.Helper()

	var state strings.Builder

	for _, command := range []string{"nft list ruleset", "iptables-legacy-save", "ip6tables-legacy-save"} {
		args := strings.Fields(command)
		state.WriteString(command + "\n" + b.run(args[0], args[1:]...))
	}

	b.do(func() {
		paths, err := filepath.Glob("/proc/sys/net/ipv[46]/conf/*/*")
		require.NoError(b.t, err)

		for _, path := range append(paths, "/proc/sys/net/ipv4/ip_forward") {
			value, _ := os.ReadFile(path)
			state.WriteString(path + " " + string(value))
		}

		links, err := whole(netlink.LinkList)
		require.NoError(b.t, err)

		for _, l := range links {
			fmt.Fprintln(&state, l.Attrs().Name, l.Attrs().Flags, l.Attrs().MTU)
		}

		conn, err := nfnetlink.Dial()
		require.NoError(b.t, err)

		for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
			addrs, err := netlink.AddrList(nil, int(family))
			require.NoError(b.t, err)

			for _, a := range addrs {
				fmt.Fprintln(&state, a)
			}

			routes, err := netlink.RouteListFiltered(int(family), &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
			require.NoError(b.t, err)

			for _, r := range routes {
				fmt.Fprintln(&state, r)
			}

			for _, protocol := range []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
				flows, err := conn.Flows(b.t.Context(), family, protocol, 0)
				require.NoError(b.t, err)

				for _, f := range flows {
					fmt.Fprintln(&state, f.Source, f.Destination, f.Responder)
				}
			}
		}

		require.NoError(b.t, conn.Close())
	})

	counters := regexp.MustCompile(`(?m)counter packets \d+ bytes \d+|\[\d+:\d+\]|^# .* on .*$`)

	return strings.Split(counters.ReplaceAllString(state.String(), ""), "\n")
}

// onlyIn are the lines of one state that are not in another.
func onlyIn(one, other []string) (lines []string) {
	there := map[string]bool{}
	for _, line := range other {
		there[line] = true
	}

	return slices.DeleteFunc(slices.Clone(one), func(line string) bool { return there[line] })
}

// generation is that of nf_tables.
func (b *bed) generation() (gen uint32) {
	b.t.Helper()
	b.do(func() {
		conn, err := nfnetlink.Dial()
		require.NoError(b.t, err)

		gen, err = conn.Generation(b.t.Context())
		require.NoError(b.t, err)
		require.NoError(b.t, conn.Close())
	})

	return gen
}

// List and check change nothing, and nothing that explain makes is left, beside a manager and
// without one.
func TestNothingChanges(t *testing.T) {
	t.Parallel()

	for _, via := range []string{"nftables", "nft", "legacy"} {
		t.Run(via, func(t *testing.T) {
			t.Parallel()

			b := newBed(t, via)
			b.add(0, false, "TCP", 80)
			b.add(0, true, "UDP", 81)

			for _, managed := range []bool{true, false} {
				if !managed {
					require.NoError(t, b.m.Close())
				}

				state, gen := b.state(), b.generation()

				code, out := b.tool("list")
				assert.Equal(t, Good, code)
				assert.Contains(t, out, "TCP       0.0.0.0:8080  10.88.0.2:80")
				assert.Equal(t, managed, strings.Contains(out, "process "))

				code, out = b.tool("check")
				if managed {
					assert.Equal(t, Good, code)
					assert.Equal(t, "2 host ports, all as they should be\n", out)
				} else {
					assert.Equal(t, Bad, code)
					assert.Equal(t, 2, strings.Count(out, "no manager runs"))
				}

				assert.Equal(t, gen, b.generation())

				b.cause("answers", "8080")
				b.cause("nothing listens on UDP", "8080/udp")

				assert.Len(t, b.rows(), 2)

				after := b.state()
				assert.Empty(t, onlyIn(state, after))
				assert.Empty(t, onlyIn(after, state))
			}
		})
	}
}

// As the tool is killed, whenever that is, what it has made goes.
func TestKilled(t *testing.T) {
	t.Parallel()

	b := newBed(t, "nftables")
	b.add(0, false, "TCP", 80)
	b.run("nft", "add table inet firewall; add chain inet firewall forward { type filter hook forward priority 0; policy drop; }")

	interfaces := func() (count int) {
		b.do(func() {
			links, err := whole(netlink.LinkList)
			require.NoError(t, err)

			count = len(links)
		})

		return count
	}
	tables := func() string { return b.run("nft", "list", "tables") }
	links, before := interfaces(), tables()

	for i := range 40 {
		delay := time.Duration(i) * 4 * time.Millisecond
		cmd := exec.CommandContext(t.Context(), os.Args[0], "explain", "8080") //nolint:gosec // the tests themselves
		cmd.Env = append(os.Environ(), toolVariable+"=1")

		b.do(func() { require.NoError(t, cmd.Start()) })

		if i%2 == 1 { // from when it has a device on, else from its start
			require.Eventually(t, func() bool { return interfaces() > links }, testbed.Stretch(20*time.Second), time.Millisecond)
		}

		<-time.After(delay)

		require.NoError(t, cmd.Process.Kill())
		_ = cmd.Wait()

		require.Equal(t, links, interfaces())
		require.Equal(t, before, tables())
	}
}

// toolAs runs a binary of hostports with the rights that setpriv(1) leaves it.
func (b *bed) toolAs(binary, command string, rights ...string) (code int, out string) {
	b.t.Helper()

	args := append(append(rights, binary), strings.Fields(command)...)
	cmd := exec.CommandContext(b.t.Context(), "setpriv", args...) //nolint:gosec // the tests themselves
	cmd.Env = append(os.Environ(), toolVariable+"=1")

	var text []byte

	b.do(func() { text, _ = cmd.CombinedOutput() })
	b.t.Logf("%v %s: %s", rights, command, text)

	return cmd.ProcessState.ExitCode(), string(text)
}

// What is asked of a process without CAP_NET_ADMIN, and of one that has nothing else.
func TestCapabilities(t *testing.T) {
	t.Parallel()

	for _, via := range []string{"nftables", "nft", "legacy"} {
		t.Run(via, func(t *testing.T) {
			t.Parallel()

			b := newBed(t, via)
			b.add(0, false, "TCP", 80)

			for caps, want := range map[string]struct {
				code int
				out  string
			}{"-all": {CannotLook, "CAP_NET_ADMIN is missing"}, "-all,+net_admin": {Good, "8080/tcp answers"}} {
				if via == "legacy" && want.code == Good { // its programs want CAP_NET_RAW
					want.code, want.out = CannotLook, "iptables-legacy: open raw socket: operation not permitted"
				}

				for _, command := range []string{"list", "check", "explain 8080"} {
					code, out := b.toolAs(os.Args[0], command, "--bounding-set", caps)
					assert.Equal(t, want.code, code)

					if command == "explain 8080" || want.code != Good {
						assert.Contains(t, out, want.out)
						assert.NotContains(t, out, "all as they should be")
						assert.NotContains(t, out, "rules are gone")
					}
				}
			}
		})
	}
}

// Who may not read which process has the host ports does not say that none has.
func TestPlainUser(t *testing.T) {
	t.Parallel()

	b := newBed(t, "nftables")
	b.add(0, false, "TCP", 80)

	binary := filepath.Join(t.TempDir(), "hostports")
	b.run("cp", os.Args[0], binary)
	b.run("chmod", "-R", "go+rX", filepath.Dir(filepath.Dir(binary)))

	for _, command := range []string{"list", "check", "explain 8080", "explain 8081"} {
		code, out := b.toolAs(binary, command, "--reuid", "65534", "--regid", "65534", "--clear-groups",
			"--inh-caps", "-all,+net_admin", "--ambient-caps", "+net_admin")
		assert.Equal(t, CannotLook, code)
		assert.Contains(t, out, "look whether a manager runs: open /proc/thread-self/net/netfilter/nfnetlink_log: permission denied")
		assert.NotContains(t, out, "no manager runs")
		assert.NotContains(t, out, "as they should be")
		assert.NotContains(t, out, "cause: ")
	}
}

// The node may send the answer to a probe out by another interface than those to its clients.
func TestRoutingByRules(t *testing.T) {
	t.Parallel()

	for _, v6 := range []bool{false, true} {
		b := newBed(t, "nftables")
		b.add(0, v6, "TCP", 80)

		const table = 100

		b.route(v6, netlink.Route{Table: table})
		b.do(func() {
			rule := netlink.NewRule()
			rule.Src, rule.Table, rule.Priority = only(b.Pods[0].IP(v6)), table, table
			rule.Family = familyOf(map[bool]row.Family{false: row.IPv4, true: row.IPv6}[v6])
			require.NoError(t, netlink.RuleAdd(rule))
		})

		b.unknown("the pod answers a probe, and the node sends the answer out over eth0", "8080")
	}
}

// Clean takes everything out, unless a manager runs.
func TestClean(t *testing.T) {
	t.Parallel()

	for _, via := range []string{"nftables", "nft", "legacy"} {
		t.Run(via, func(t *testing.T) {
			t.Parallel()

			b := newBed(t, via)
			b.add(0, false, "TCP", 80)
			b.add(1, true, "UDP", 80)

			code, out := b.tool("clean")
			assert.Equal(t, CannotLook, code)
			assert.Regexp(t, `^hostports: another manager has the host ports: process \d+ \(\S+\)\n$`, out)
			assert.Len(t, b.rows(), 2)

			require.NoError(t, b.m.Close())

			code, out = b.tool("clean")
			assert.Equal(t, Good, code)
			assert.Contains(t, out, "2 host ports taken out")
			assert.Contains(t, out, "the guard of 127.0.0.0/8 stays")
			assert.Empty(t, b.rows())

			code, out = b.tool("clean", "-o", "json")
			assert.Equal(t, Good, code)
			assert.JSONEq(t, `{"removed": 0, "guard": true}`, out)
		})
	}
}

// asking has the client ask again and again, until the test ends.
func (b *bed) asking(v6 bool) {
	ctx, cancel := context.WithCancel(b.t.Context())
	done := make(chan struct{})
	b.t.Cleanup(func() { cancel(); <-done })

	go func() {
		defer close(done)

		for ask := time.NewTicker(20 * time.Millisecond); ctx.Err() == nil; <-ask.C {
			_, _ = b.Client.Ask(ctx, "tcp", netip.AddrPortFrom(b.NodeIP(v6), 8080))
		}
	}()
}

// Explain follows the next packet that really comes.
func TestWait(t *testing.T) {
	t.Parallel()

	b := newBed(t, "nftables")
	b.add(0, false, "TCP", 80)
	b.unknown("no packet came to prerouting within 100ms", "8080", "--wait", "100ms")

	b.asking(false)
	b.unknown("the packet has left the node for the pod", "-wait", "20s", "8080")

	b.run("nft", "add table inet firewall; add chain inet firewall forward { type filter hook forward priority 0; policy accept; }; "+
		"add rule inet firewall forward iifname eth0 tcp dport 80 reject with tcp reset")
	b.cause("the packet is dropped in the forward hook by table inet firewall, chain forward, handle", "-wait", "20s", "8080/tcp")
}

// Where a sysctl of one interface stops a packet, the interface is the one by which it came.
func TestWaitInterface(t *testing.T) {
	t.Parallel()

	b := newBed(t, "nftables")
	b.add(0, false, "TCP", 80)
	require.NoError(t, b.Host.Sysctl("net/ipv4/conf/eth0/forwarding", "0"))
	b.asking(false)
	b.cause("the node does not forward what comes in by eth0: /proc/sys/net/ipv4/conf/eth0/forwarding is 0", "-wait", "20s", "8080")
}

// One of the node's addresses can be asked about.
func TestAddress(t *testing.T) {
	t.Parallel()

	for _, v6 := range []bool{false, true} {
		b := newBed(t, "nftables")
		b.add(0, v6, "TCP", 80)
		b.run("nft", "add table inet firewall; add chain inet firewall p { type filter hook prerouting priority -200; }; "+
			"add rule inet firewall p "+nftFamily(v6)+" daddr "+b.OtherNodeIP(v6).String()+" tcp dport 8080 drop")

		b.cause("answers", netip.AddrPortFrom(b.NodeIP(v6), 8080).String())
		b.cause("dropped in the prerouting hook by table inet firewall", netip.AddrPortFrom(b.OtherNodeIP(v6), 8080).String()+"/tcp")
		b.cause("the node does not have the address "+b.ClientIP(v6).String(), netip.AddrPortFrom(b.ClientIP(v6), 8080).String())
		b.cause("no pod has the host port", netip.AddrPortFrom(b.NodeIP(!v6), 8080).String())
		b.cause("but one has "+netip.AddrPortFrom(anyAddress(v6), 8080).String()+"/tcp", netip.AddrPortFrom(b.NodeIP(!v6), 8080).String())
		b.cause("but one has "+netip.AddrPortFrom(anyAddress(v6), 8080).String()+"/tcp", "8080/udp")
		b.cause("answers", netip.AddrPortFrom(anyAddress(v6), 8080).String())

		b.asking(v6) // the one address: nobody asks the other one
		b.unknown("no packet came to prerouting within 300ms", netip.AddrPortFrom(b.OtherNodeIP(v6), 8080).String(), "-wait", "300ms")
		b.unknown("the packet has left the node for the pod", netip.AddrPortFrom(b.NodeIP(v6), 8080).String(), "-wait", "20s")
	}
}

// A loopback address is the node's own affair: it takes route_localnet, and no forwarding.
func TestLoopbackAddress(t *testing.T) {
	t.Parallel()

	b := newBed(t, "nftables")
	b.add(0, false, "TCP", 80)
	b.add(0, true, "TCP", 80)
	b.forward(false, "0")
	b.unknown("no packet from outside reaches a loopback address", "127.0.0.1:8080")
	b.cause("::1 leads to no pod", "[::1]:8080")

	b.forward(false, "1")
	require.NoError(t, b.Host.Sysctl("net/ipv4/conf/cni0/route_localnet", "0"))
	b.cause("127.0.0.1 does not reach the pod", "127.0.0.1:8080")
	b.cause("127.0.0.1 does not reach the pod", "8080")
	b.cause("answers", netip.AddrPortFrom(b.NodeIP(false), 8080).String())
}

// Of several rows the packet is judged by the one that it is for.
func TestWaitRows(t *testing.T) {
	t.Parallel()

	for _, v6 := range []bool{false, true} {
		b := newBed(t, "nftables")
		b.addAt(b.OtherNodeIP(v6).String(), 1, v6, "TCP", 80)
		b.addAt(b.NodeIP(v6).String(), 0, v6, "TCP", 80)

		b.asking(v6)
		b.unknown("the packet has left the node for the pod", "-wait", "20s", "8080")
	}
}

// Who ends the wait is not answered that nothing came.
func TestWaitEnded(t *testing.T) {
	t.Parallel()

	b := newBed(t, "nftables")
	b.add(0, false, "TCP", 80)

	ctx, cancel := context.WithCancel(t.Context())

	var ender sync.WaitGroup

	ender.Go(func() {
		b.soon(func() bool { return strings.Contains(b.run("nft", "list", "tables"), "hostports-explain-") }) // it waits
		cancel()
	})

	var stdout, stderr bytes.Buffer

	b.do(func() {
		assert.Equal(t, CannotLook, Run(ctx, []string{"explain", "8080", "-wait", "1m"}, &stdout, &stderr))
	})
	ender.Wait()
	assert.Contains(t, stdout.String(), "no packet has come to the port yet: context ")
}

// Check names what is not as it should be.
func TestCheckProblems(t *testing.T) {
	t.Parallel()

	b := newBed(t, "nftables")
	problems := func() (list []string) {
		_, out := b.tool("check", "-o", "json")
		require.NoError(t, json.Unmarshal([]byte(out), &list))

		return list
	}
	assert.Empty(t, problems())

	b.add(0, false, "TCP", 80)
	assert.Empty(t, problems())

	b.stale(false, "legacy")
	b.forward(false, "0")
	b.run("nft", "flush", "chain", "ip", "crio-hostports", "guard")

	list := strings.Join(problems(), "\n")
	for _, want := range []string{
		"IPv4: nftables: rule of chain guard is missing",
		"IPv4: the node does not forward",
		"another port mapper has the port: iptables-legacy -t nat -A PREROUTING",
	} {
		assert.Contains(t, list, want)
	}
}

// Check names what explain would.
func TestCheckRows(t *testing.T) {
	t.Parallel()

	for _, via := range []string{"nftables", "nft", "legacy"} {
		t.Run(via, func(t *testing.T) {
			t.Parallel()

			b := newBed(t, via)
			problems := func() string {
				_, out := b.tool("check", "-o", "json")

				return out
			}

			b.addAt("192.0.2.77", 1, false, "UDP", 80)
			assert.Contains(t, problems(), "the node does not have the address 192.0.2.77")
			b.do(func() { require.NoError(t, b.m.Remove("other", nil)) })

			b.add(0, false, "TCP", 80)
			b.add(1, true, "UDP", 80)
			assert.JSONEq(t, "[]", problems())

			// Of another address, and of a Service's.
			b.run("iptables-legacy", "-t", "nat", "-A", "OUTPUT", "-d", "203.0.113.7/32", "-p", "tcp", "--dport", "8080", "-j", "DNAT", "--to", "10.88.0.9")
			b.run("iptables-legacy", "-t", "nat", "-N", "CALLED")
			b.run("iptables-legacy", "-t", "nat", "-A", "OUTPUT", "-p", "tcp", "--dport", "8080", "-j", "CALLED")
			assert.JSONEq(t, "[]", problems())

			// A chain that is called for the port, and another that this calls.
			b.run("iptables-legacy", "-t", "nat", "-N", "CALLED2")
			b.run("iptables-legacy", "-t", "nat", "-A", "CALLED", "-j", "CALLED2")
			b.run("iptables-legacy", "-t", "nat", "-A", "CALLED2", "-j", "DNAT", "-p", "tcp", "--to", "10.88.0.9:80")
			assert.Contains(t, problems(), "another port mapper has the port: iptables-legacy -t nat -A OUTPUT -p tcp -m tcp --dport 8080 -j CALLED")
			b.run("iptables-legacy", "-t", "nat", "-F", "OUTPUT")

			if via != "legacy" { // which has put a jump of ours there
				assert.JSONEq(t, "[]", problems())
			}

			require.NoError(t, b.Host.Sysctl("net/ipv4/conf/cni0/route_localnet", "0"))
			assert.Contains(t, problems(), "from the node, 127.0.0.1 does not reach the pod: /proc/sys/net/ipv4/conf/cni0/route_localnet is 0")

			require.NoError(t, b.Host.Sysctl("net/ipv4/conf/cni0/forwarding", "0"))
			assert.Contains(t, problems(), "the node does not forward what comes in by cni0")

			b.flush()
			assert.Contains(t, problems(), "IPv4: TCP 0.0.0.0:8080: process ")
			assert.Contains(t, problems(), "IPv6: UDP [::]:8080: process ")
		})
	}
}

// What cannot be understood says how it is called.
func TestUsage(t *testing.T) {
	t.Parallel()

	for line, why := range map[string]string{
		"":                       "which command?",
		"exlpain 8080":           `no such command: "exlpain"`,
		"odd":                    `no such command: "odd"`,
		"explain":                "explain which port?",
		"list 8080":              `list takes no "8080"`,
		"explain 8080 8081":      `what is "8081"?`,
		"list -o yaml":           `-o "yaml": want text or json`,
		"list -odd":              "flag provided but not defined: -odd",
		"list -wait 1s":          "-wait is for explain",
		"explain 8080 -wait -1s": "not negative",
	} {
		var stdout, stderr bytes.Buffer

		args := strings.Fields(line)
		assert.Equal(t, CannotLook, Run(t.Context(), args, &stdout, &stderr), args)
		assert.Contains(t, stderr.String(), why)
		assert.Contains(t, stderr.String(), "\nusage: hostports", args)
		assert.Empty(t, stdout.String())
	}

	for _, args := range [][]string{{"-h"}, {"help"}, {"explain", "--help"}} {
		var stdout, stderr bytes.Buffer

		assert.Equal(t, Good, Run(t.Context(), args, &stdout, &stderr), args)
		assert.Contains(t, stdout.String(), "usage: hostports", args)
		assert.Empty(t, stderr.String())
	}

	for _, port := range []string{"0", "70000", "http", "80/icmp", "/tcp", "node:80", "[::1]:0"} {
		var stdout, stderr bytes.Buffer

		assert.Equal(t, CannotLook, Run(t.Context(), []string{"explain", port}, &stdout, &stderr), port)
		assert.Contains(t, stderr.String(), "want ", port)
	}
}

func anyAddress(v6 bool) netip.Addr {
	if v6 {
		return netip.IPv6Unspecified()
	}

	return netip.IPv4Unspecified()
}
