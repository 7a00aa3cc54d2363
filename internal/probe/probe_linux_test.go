package probe

import (
	"bufio"
	"context"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/cri-o/hostport/internal/row"
	"github.com/cri-o/hostport/internal/testbed"
)

// node is a node with a pod, and a place outside it.
type node struct {
	*testbed.Bed
	*Outside

	t  *testing.T
	v6 bool
}

func eachFamily(t *testing.T, test func(t *testing.T, n *node)) {
	t.Helper()

	for _, f := range []row.Family{row.IPv4, row.IPv6} {
		t.Run("IPv"+string(f), func(t *testing.T) {
			n := &node{Bed: newBed(t), t: t, v6: f == row.IPv6}
			n.Outside = open(t, n.Host, f)
			test(t, n)
		})
	}
}

func newBed(t *testing.T) *testbed.Bed {
	t.Helper()

	bed, err := testbed.New("pod")
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, bed.Close()) })

	return bed
}

func tryOpen(ns *testbed.Namespace, f row.Family) (o *Outside, err error) {
	err = ns.Do(func() error {
		o, err = Open(f)

		return err
	})

	return o, err
}

func open(t *testing.T, ns *testbed.Namespace, f row.Family) *Outside {
	t.Helper()

	o, err := tryOpen(ns, f)
	require.NoError(t, err)
	t.Cleanup(func() { _ = o.Close() })

	return o
}

// ask waits long enough for whoever answers at all.
func (n *node) ask(p row.Protocol, ip netip.Addr, port uint16) Answer {
	n.t.Helper()

	return n.askFor(testbed.Stretch(15*time.Second), p, ip, port)
}

func (n *node) askFor(limit time.Duration, p row.Protocol, ip netip.Addr, port uint16) Answer {
	n.t.Helper()

	ctx, cancel := context.WithTimeout(n.t.Context(), limit)
	defer cancel()

	answer, err := n.Ask(ctx, p, netip.AddrPortFrom(ip, port))
	require.NoError(n.t, err)
	assert.Equal(n.t, n.Addr(), answer.Source.Addr())
	assert.GreaterOrEqual(n.t, answer.Source.Port(), uint16(32768))
	assert.LessOrEqual(n.t, answer.Source.Port(), uint16(60999))

	return answer
}

// gives asserts what somebody answers.
func (n *node) gives(p row.Protocol, ip netip.Addr, port uint16, kind Kind, from netip.AddrPort, why string) {
	n.t.Helper()

	answer := n.ask(p, ip, port)
	assert.Equal(n.t, Answer{Kind: kind, From: from, Why: why, Source: answer.Source}, answer, "%s %s %d", p, ip, port)
}

// nft changes the rules of the node, and returns them.
func (n *node) nft(rules string) string {
	n.t.Helper()

	var out []byte

	require.NoError(n.t, n.Host.Do(func() (err error) {
		cmd := exec.CommandContext(n.t.Context(), "nft", "-f", "-")
		cmd.Stdin = strings.NewReader(rules + "\nlist ruleset")
		out, err = cmd.CombinedOutput()

		return err
	}), "%s", out)

	return string(out)
}

func (n *node) pick(ipv4, ipv6 string) string {
	if n.v6 {
		return ipv6
	}

	return ipv4
}

func (n *node) ip(ipv4, ipv6 string) netip.Addr { return netip.MustParseAddr(n.pick(ipv4, ipv6)) }

func (n *node) deadPod() netip.Addr { return n.ip("10.88.0.99", "fd00:10:88::99") }

// Who has a port answers, in the pod and in the node; where nobody has it, their kernel does.
func TestAnswers(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node) {
		pod := n.Pods[0]

		for ip, ns := range map[netip.Addr]*testbed.Namespace{pod.IP(n.v6): pod.Namespace, n.NodeIP(n.v6): n.Host} {
			for _, p := range []row.Protocol{row.TCP, row.UDP} {
				_, err := ns.Serve(string(p), netip.AddrPortFrom(ip, 80))
				require.NoError(t, err)
				n.gives(p, ip, 80, Accepted, netip.AddrPortFrom(ip, 80), "")
			}

			n.gives(row.TCP, ip, 81, Refused, netip.AddrPortFrom(ip, 81), "")
			n.gives(row.UDP, ip, 81, Refused, netip.AddrPortFrom(ip, 0), "port unreachable")
		}
	})
}

// What the node translates is seen as a machine outside sees it. All packets are good ones:
// connection tracking calls none invalid, be it the first or the last.
func TestHostPorts(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node) {
		pod, ip := n.Pods[0], n.NodeIP(n.v6)
		ends := listenSCTP(t, pod, n.v6)

		for _, p := range []string{"tcp", "udp"} {
			_, err := pod.Serve(p, netip.AddrPortFrom(pod.IP(n.v6), 80))
			require.NoError(t, err)
		}

		require.NoError(t, n.Host.Sysctl("net/ipv4/conf/all/rp_filter", "1"))
		require.NoError(t, n.Host.Sysctl("net/"+n.pick("ipv4", "ipv6")+"/neigh/cni0/mcast_solicit", "1")) // and a second for each
		n.nft(fmt.Sprintf(`
			table inet hostports {
				chain prerouting {
					type nat hook prerouting priority -100;
					meta l4proto { tcp, udp, sctp } th dport 8080 dnat %[1]s to %[2]s
					meta l4proto { tcp, udp, sctp } th dport 8081 dnat %[1]s to %[3]s
					meta l4proto { tcp, udp, sctp } th dport 8082 dnat %[1]s to %[4]s
				}
				chain forward { type filter hook forward priority 0; ct state invalid counter drop; }
			}`, n.pick("ip", "ip6"), netip.AddrPortFrom(pod.IP(n.v6), 80), netip.AddrPortFrom(pod.IP(n.v6), 81),
			netip.AddrPortFrom(n.deadPod(), 80)))

		for _, p := range []row.Protocol{row.TCP, row.UDP, row.SCTP} {
			n.gives(p, ip, 8080, Accepted, netip.AddrPortFrom(ip, 8080), "")

			if p == row.UDP {
				n.gives(p, ip, 8081, Refused, netip.AddrPortFrom(ip, 0), "port unreachable")
			} else {
				n.gives(p, ip, 8081, Refused, netip.AddrPortFrom(ip, 8081), "")
			}

			n.gives(p, ip, 8082, Unreachable, netip.AddrPortFrom(ip, 0), n.pick("host unreachable", "address unreachable"))
		}

		ends()
		assert.Contains(t, n.nft(""), "counter packets 0 bytes 0 drop")
	})
}

// A connection that was accepted is reset before the pod would wait for its client.
func TestHalfOpen(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node) {
		pod := n.Pods[0]
		_, err := pod.Serve("tcp", netip.AddrPortFrom(pod.IP(n.v6), 80))
		require.NoError(t, err)
		n.gives(row.TCP, pod.IP(n.v6), 80, Accepted, netip.AddrPortFrom(pod.IP(n.v6), 80), "")

		assert.Eventually(t, func() bool {
			var table []byte

			require.NoError(t, pod.Do(func() (err error) {
				table, err = os.ReadFile("/proc/thread-self/net/" + n.pick("tcp", "tcp6"))

				return err
			}))
			require.Contains(t, string(table), " 0A ", "it listens")

			return !strings.Contains(string(table), " 03 ") // SYN_RECV
		}, testbed.Stretch(500*time.Millisecond), time.Millisecond)
	})
}

// The node itself answers for what it cannot or must not reach.
func TestRouters(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node) {
		pod := n.Pods[0].IP(n.v6)
		unrouted := n.ip("203.0.113.1", "2001:db8:99::1")

		for _, p := range []row.Protocol{row.TCP, row.UDP, row.SCTP} {
			answer := n.ask(p, unrouted, 80)
			assert.Equal(t, Unreachable, answer.Kind, p)
			assert.Equal(t, n.pick("network unreachable", "no route"), answer.Why)
			assert.Zero(t, answer.From.Port())
			assert.NotEqual(t, unrouted, answer.From.Addr())
			assert.True(t, answer.From.IsValid())
		}

		for _, c := range []struct {
			p    row.Protocol
			with string
			kind Kind
			why  string
		}{
			{row.TCP, "icmpx admin-prohibited", Unreachable, "administratively prohibited"},
			{row.UDP, "icmpx host-unreachable", Unreachable, n.pick("host unreachable", "address unreachable")},
			{row.SCTP, "icmpx no-route", Unreachable, n.pick("network unreachable", "no route")},
			{row.TCP, "icmpx port-unreachable", Refused, "port unreachable"},
			{row.TCP, "tcp reset", Refused, ""},
		} {
			n.nft("flush ruleset\n" + `table inet t { chain forward { type filter hook forward priority 0; meta l4proto ` +
				string(c.p) + ` reject with ` + c.with + `; }; }`)

			answer := n.ask(c.p, pod, 80)
			assert.Equal(t, c.kind, answer.Kind, c.with)
			assert.Equal(t, c.why, answer.Why, c.with)
			assert.Equal(t, c.why == "", answer.From == netip.AddrPortFrom(pod, 80), c.with)
		}
	})
}

// A question that nobody answers is repeated each second.
func TestSilence(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node) {
		n.nft(`table inet t { chain forward { type filter hook forward priority 0; meta l4proto tcp counter drop; }; }`)

		answer := n.askFor(1500*time.Millisecond, row.TCP, n.Pods[0].IP(n.v6), 80)
		assert.Equal(t, Answer{Kind: Silence, Source: answer.Source}, answer)
		assert.Contains(t, n.nft(""), "counter packets 2 ")
	})
}

// The end of the context ends a question; its being cancelled is no silence.
func TestCancel(t *testing.T) {
	n := &node{Bed: newBed(t), t: t}
	n.Outside = open(t, n.Host, row.IPv4)
	n.nft(`table inet t { chain forward { type filter hook forward priority 0; drop; }; }`)

	to := netip.AddrPortFrom(n.Pods[0].IPv4, 80)
	ctx, cancel := context.WithCancel(t.Context())
	start := time.Now()

	time.AfterFunc(10*time.Millisecond, cancel)

	_, err := n.Ask(ctx, row.TCP, to)
	require.ErrorIs(t, err, context.Canceled)
	assert.Less(t, time.Since(start), testbed.Stretch(900*time.Millisecond))

	_, err = n.Ask(ctx, row.TCP, to)
	require.ErrorIs(t, err, context.Canceled)
}

// What cannot be asked is an error.
func TestCannotAsk(t *testing.T) {
	bed := newBed(t)
	o := open(t, bed.Host, row.IPv4)

	_, err := o.Ask(t.Context(), row.TCP, netip.MustParseAddrPort("[2001:db8:1::1]:80"))
	require.ErrorContains(t, err, "two IP families")

	require.NoError(t, bed.Host.RemoveDevice(o.Device()))

	_, err = o.Ask(t.Context(), row.TCP, netip.MustParseAddrPort("192.0.2.1:80"))
	require.ErrorContains(t, err, o.Device())

	require.NoError(t, o.Close())

	_, err = o.Ask(t.Context(), row.TCP, netip.MustParseAddrPort("192.0.2.1:80"))
	require.ErrorIs(t, err, os.ErrClosed)
}

// state is what a node has of devices and routes.
func state(t *testing.T, ns *testbed.Namespace) (list []string) {
	t.Helper()

	require.NoError(t, ns.Do(func() error {
		links, err := netlink.LinkList()
		require.NoError(t, err)

		for _, l := range links {
			list = append(list, l.Attrs().Name)
		}

		for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
			routes, err := netlink.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
			require.NoError(t, err)

			for _, r := range routes {
				list = append(list, r.String())
			}
		}

		return nil
	}))

	return list
}

// Nothing is left of a place that was closed, nor of one whose process was killed. There may
// be several.
func TestNothingIsLeft(t *testing.T) {
	for _, f := range []row.Family{row.IPv4, row.IPv6} {
		host := newBed(t).Host
		before := state(t, host)

		first, second := open(t, host, f), open(t, host, f)
		assert.Equal(t, []string{"hostports0", "hostports1"}, []string{first.Device(), second.Device()})
		assert.NotEqual(t, first.Addr(), second.Addr())

		child := startChild(t, host, f) // to which nothing of the others goes over
		assert.Contains(t, child.says, "hostports2")
		require.NoError(t, first.Close())
		require.NoError(t, second.Close())

		left := state(t, host)
		assert.Contains(t, left, "hostports2")
		assert.NotContains(t, left, "hostports0")
		assert.NotContains(t, left, "hostports1")
		child.kill()
		assert.ElementsMatch(t, before, state(t, host))
	}
}

// Without what it takes, the error says so.
func TestCannotOpen(t *testing.T) {
	host := newBed(t).Host
	before := state(t, host)

	t.Run("privilege", func(t *testing.T) {
		require.NoError(t, host.Do(func() error {
			withCapabilities(t, 0, func() {
				_, err := Open(row.IPv4)
				require.ErrorIs(t, err, unix.EPERM)
				require.ErrorContains(t, err, "TUNSETIFF")
			})

			return nil
		}))
	})

	t.Run("device", func(t *testing.T) {
		child := startChild(t, host, "no device")
		assert.Contains(t, child.says, "open /dev/net/tun: no such file or directory")
	})

	t.Run("IPv6", func(t *testing.T) {
		require.NoError(t, host.Sysctl("net/ipv6/conf/default/disable_ipv6", "1"))

		_, err := tryOpen(host, row.IPv6)
		require.ErrorContains(t, err, "disable_ipv6")

		open(t, host, row.IPv4)
		require.NoError(t, host.Sysctl("net/ipv6/conf/default/disable_ipv6", "0"))
	})

	t.Run("rule", func(t *testing.T) {
		require.NoError(t, host.Do(func() error {
			rule := netlink.NewRule()
			rule.Table, rule.Priority = 77, 100
			require.NoError(t, netlink.RuleAdd(rule))

			return netlink.RouteAdd(&netlink.Route{Table: 77, Gw: []byte{192, 0, 2, 2}})
		}))

		_, err := tryOpen(host, row.IPv4)
		require.ErrorContains(t, err, "elsewhere: a rule")
	})

	assert.Subset(t, state(t, host), before)
	assert.NotContains(t, state(t, host), "hostports0")
}

// CAP_NET_ADMIN alone will do.
func TestPrivilege(t *testing.T) {
	for _, f := range []row.Family{row.IPv4, row.IPv6} {
		require.NoError(t, newBed(t).Host.Do(func() error {
			withCapabilities(t, 1<<unix.CAP_NET_ADMIN, func() {
				o, err := Open(f)
				require.NoError(t, err)
				require.NoError(t, o.Close())
			})

			return nil
		}))
	}
}

// withCapabilities calls f with some of the thread's capabilities in effect.
func withCapabilities(t *testing.T, effective uint32, f func()) {
	t.Helper()

	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}

	var all [2]unix.CapUserData

	require.NoError(t, unix.Capget(&header, &all[0]))

	some := all
	some[0].Effective, some[1].Effective = effective, 0
	require.NoError(t, unix.Capset(&header, &some[0]))

	defer func() { require.NoError(t, unix.Capset(&header, &all[0])) }()

	f()
}

// An address that a route leads to is left to whom it belongs to, unless that leads to half of
// the world.
func TestTaken(t *testing.T) {
	host := newBed(t).Host

	for _, r := range []string{"0.0.0.0/0", "::/0", "128.0.0.0/1", "fc00::/7", "198.19.0.0/16", "fd00:1::/32"} {
		prefix := netip.MustParsePrefix(r)
		gateway := netip.MustParseAddr("192.0.2.2")

		if prefix.Addr().Is6() {
			gateway = netip.MustParseAddr("2001:db8:1::2")
		}

		require.NoError(t, host.AddRoute(prefix, gateway))
	}

	require.NoError(t, host.Do(func() error {
		routing, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		require.NoError(t, err)
		defer routing.Close()

		for addr, want := range map[string]bool{
			"198.18.1.1": false, "198.19.1.1": true, "192.0.2.1": true, "203.0.113.1": false, "10.88.0.2": true,
			"fd00:2::1": false, "fd00:1::1": true, "2001:db8:1::1": true, "fd00:10:88::7": true,
		} {
			assert.Equal(t, want, taken(routing, netip.MustParseAddr(addr)), addr)
		}

		return nil
	}))

	for range 8 {
		assert.Contains(t, open(t, host, row.IPv4).Addr().String(), "198.18.")
		assert.Equal(t, byte(0xfd), open(t, host, row.IPv6).Addr().As16()[0])
	}

	require.NoError(t, host.AddRoute(netip.MustParsePrefix("198.18.0.0/15"), netip.MustParseAddr("192.0.2.2")))

	_, err := tryOpen(host, row.IPv4)
	require.ErrorContains(t, err, "routes to 32 addresses")
}

// listenSCTP has a pod accept associations at port 80 and abort them at port 81: its kernel, if
// that has SCTP, and else a socket for packets. The function returned waits until the one that
// was accepted has been aborted.
func listenSCTP(t *testing.T, pod *testbed.Pod, v6 bool) (ends func()) {
	t.Helper()

	domain, local := unix.AF_INET, unix.Sockaddr(&unix.SockaddrInet4{Port: 80})
	if v6 {
		domain, local = unix.AF_INET6, &unix.SockaddrInet6{Port: 80}
	}

	var fd int

	err := pod.Do(func() (err error) {
		fd, err = unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_SCTP)

		return err
	})
	if err == nil {
		t.Log("the kernel has SCTP")
		t.Cleanup(func() { assert.NoError(t, unix.Close(fd)) })
		require.NoError(t, unix.Bind(fd, local))
		require.NoError(t, unix.Listen(fd, 1))

		return func() {}
	}

	require.NoError(t, pod.Do(func() (err error) {
		fd, err = unix.Socket(domain, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_SCTP)

		return err
	}))
	require.NoError(t, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 10_000}))

	const tag = 0x01020304

	ctx, stop := context.WithCancel(context.Background())
	done, aborted := make(chan struct{}), make(chan struct{})

	go func() {
		defer close(done)

		for ctx.Err() == nil {
			buf := make([]byte, 1500)

			size, from, err := unix.Recvfrom(fd, buf, 0)
			if err != nil {
				continue
			}

			in := buf[:size]
			if !v6 {
				in = in[20:]
			}

			switch {
			case in[12] == 6 && binary.BigEndian.Uint32(in[4:]) == tag:
				close(aborted)
			case in[12] == 1 && len(in) == 32:
				out := append([]byte{in[2], in[3], in[0], in[1]}, in[16:20]...)
				if in[3] == 80 {
					out = append(out, 0, 0, 0, 0, 2, 0, 0, 20, 1, 2, 3, 4, 0, 1, 0, 0, 0, 1, 0, 1, 5, 6, 7, 8)
				} else {
					out = append(out, 0, 0, 0, 0, 6, 0, 0, 4)
				}

				binary.LittleEndian.PutUint32(out[8:], crc32.Checksum(out, crc32.MakeTable(crc32.Castagnoli)))
				_ = unix.Sendto(fd, out, 0, from)
			}
		}
	}()

	t.Cleanup(func() {
		stop()
		<-done
		assert.NoError(t, unix.Close(fd))
	})

	return func() {
		select {
		case <-aborted:
		case <-time.After(testbed.Stretch(5 * time.Second)):
			assert.Fail(t, "no ABORT")
		}
	}
}

const childVariable = "HOSTPORT_PROBE_CHILD"

// TestMain lets the test's program be a process that has a place open until it is killed.
func TestMain(m *testing.M) {
	family, ok := os.LookupEnv(childVariable)
	if !ok {
		m.Run()

		return
	}

	if family == "no device" {
		if err := unix.Mount("tmpfs", "/dev/net", "tmpfs", 0, ""); err != nil {
			_, _ = fmt.Fprintln(os.Stdout, err)

			return
		}
	}

	o, err := Open(row.Family(family))
	_, _ = fmt.Fprintln(os.Stdout, o, err)
	_, _ = io.Copy(io.Discard, os.Stdin)
}

type child struct {
	says string
	kill func()
}

func startChild(t *testing.T, ns *testbed.Namespace, mode row.Family) child {
	t.Helper()

	self, err := os.Executable()
	require.NoError(t, err)

	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), childVariable+"="+string(mode))
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS}
	in, err := cmd.StdinPipe()
	require.NoError(t, err)
	t.Cleanup(func() { in.Close() })

	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, ns.Do(cmd.Start))

	kill := func() {
		if cmd.ProcessState == nil {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
	}
	t.Cleanup(kill)

	says, err := bufio.NewReader(out).ReadString('\n')
	require.NoError(t, err)

	return child{says, kill}
}
