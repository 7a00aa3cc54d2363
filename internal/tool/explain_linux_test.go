package tool

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"flag"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	"k8s.io/klog/v2"

	"github.com/cri-o/hostport"
	"github.com/cri-o/hostport/internal/row"
	"github.com/cri-o/hostport/internal/testbed"
)

// node has a client, a pod web that serves port 80 and a manager.
type bed struct {
	*testbed.Bed

	t   *testing.T
	via string // nftables, nft or legacy
	m   *hostport.Manager
}

func newBed(t *testing.T, via string) *bed {
	t.Helper()

	b, err := testbed.New("web", "other")
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, b.Close()) })

	n := &bed{Bed: b, t: t, via: via}
	if via != "nftables" {
		for _, iptables := range []string{"iptables-", "ip6tables-"} {
			n.run(iptables+via, "-t", "mangle", "-N", "KUBE-IPTABLES-HINT")
		}
	}

	for _, pod := range n.Pods {
		for _, v6 := range []bool{false, true} {
			for _, network := range []string{"tcp", "udp"} {
				_, err := pod.Serve(network, netip.AddrPortFrom(pod.IP(v6), 80))
				require.NoError(t, err)
			}
		}
	}

	n.start()

	return n
}

// start makes a manager, in place of the one before.
func (b *bed) start() {
	b.t.Helper()

	if b.m != nil {
		require.NoError(b.t, b.m.Close())
	}

	backend := hostport.BackendNFTables
	if b.via != "nftables" {
		backend = hostport.BackendIPTables
	}

	b.do(func() {
		var err error
		b.m, err = hostport.New(hostport.WithLogger(klog.Logger{}), hostport.WithBackend(backend))
		require.NoError(b.t, err)
	})
	b.t.Cleanup(func() { assert.NoError(b.t, b.m.Close()) })
}

// do runs f in the node's network namespace.
func (b *bed) do(f func()) {
	b.t.Helper()
	require.NoError(b.t, b.Host.Do(func() error { f(); return nil }))
}

// run runs a program in the node's network namespace.
func (b *bed) run(name string, args ...string) string {
	b.t.Helper()

	var (
		out []byte
		err error
	)

	b.do(func() {
		out, err = exec.CommandContext(b.t.Context(), name, args...).CombinedOutput() //nolint:gosec // what the test says
	})
	require.NoError(b.t, err, "%s %v: %s", name, args, out)

	return string(out)
}

// route adds a route over eth0, if it is not one to nowhere.
func (b *bed) route(v6 bool, r netlink.Route) {
	b.t.Helper()
	b.do(func() {
		link, err := netlink.LinkByName("eth0")
		require.NoError(b.t, err)

		r.Family = familyOf(map[bool]row.Family{false: row.IPv4, true: row.IPv6}[v6])
		if r.Type == 0 {
			r.LinkIndex = link.Attrs().Index
		}

		if r.Dst == nil {
			r.Dst = everywhere(v6)
		}

		require.NoError(b.t, netlink.RouteAdd(&r))
	})
}

// everywhere is where a default route leads.
func everywhere(v6 bool) *net.IPNet {
	size := map[bool]int{false: net.IPv4len, true: net.IPv6len}[v6]

	return &net.IPNet{IP: make(net.IP, size), Mask: make(net.IPMask, size)}
}

// only is the network of one address.
func only(ip netip.Addr) *net.IPNet {
	return &net.IPNet{IP: ip.AsSlice(), Mask: net.CIDRMask(ip.BitLen(), ip.BitLen())}
}

// add maps host port 8080 to port 80 of a pod, or to another one.
func (b *bed) add(pod int, v6 bool, protocol v1.Protocol, containerPort int32) {
	b.t.Helper()
	b.addAt("", pod, v6, protocol, containerPort)
}

// addAt is add for one address of the node.
func (b *bed) addAt(hostIP string, pod int, v6 bool, protocol v1.Protocol, containerPort int32) {
	b.t.Helper()

	p := b.Pods[pod]
	b.do(func() {
		require.NoError(b.t, b.m.Add(p.Name, &hostport.PodPortMapping{
			Namespace: "ns", Name: p.Name, IP: p.IP(v6).AsSlice(),
			PortMappings: []*hostport.PortMapping{{HostPort: 8080, ContainerPort: containerPort, Protocol: protocol, HostIP: hostIP}},
		}, ""))
	})
}

// tool runs hostports on the node.
func (b *bed) tool(args ...string) (code int, out string) {
	b.t.Helper()

	var stdout, stderr bytes.Buffer

	b.do(func() { code = Run(b.t.Context(), args, &stdout, &stderr) })
	b.t.Logf("hostports %s: %d\n%s%s", strings.Join(args, " "), code, stdout.String(), stderr.String())

	return code, stdout.String() + stderr.String()
}

// cause asserts what explain says in its last line.
func (b *bed) cause(want string, args ...string) {
	b.t.Helper()

	code, out := b.tool(append([]string{"explain"}, args...)...)
	lines := strings.Split(strings.TrimSpace(out), "\n")
	assert.Contains(b.t, lines[len(lines)-1], want)
	assert.Equal(b.t, map[bool]int{true: Good, false: Bad}[want == "answers"], code)
}

// unknown asserts why explain does not know.
func (b *bed) unknown(want string, args ...string) {
	b.t.Helper()

	code, out := b.tool(append([]string{"explain"}, args...)...)
	assert.Contains(b.t, out, "\nnot known, and nothing is seen in the way: "+want)
	assert.Equal(b.t, CannotLook, code)
}

// fault is something that keeps a host port from answering.
type fault struct {
	name string
	via  string // where it is about one backend alone
	v6   bool   // it is about IPv6 alone
	how  func(b *bed, v6 bool)
	port string // 8080/tcp, if it is ""
	want string
}

var faults = []fault{ //nolint:gochecknoglobals // a table
	{name: "none", how: func(b *bed, v6 bool) { b.add(0, v6, "TCP", 80) }, want: "answers"},
	{name: "none added", how: func(*bed, bool) {}, want: "no pod has the host port"},
	{
		name: "ruleset flushed, without Run", how: func(b *bed, v6 bool) {
			b.add(0, v6, "TCP", 80)
			b.flush()
		}, want: "the rules are gone: process",
	},
	{
		name: "the rules of one family gone", how: func(b *bed, v6 bool) {
			b.add(0, v6, "TCP", 80)
			b.add(0, !v6, "TCP", 80)

			if b.via == "nftables" {
				b.run("nft", "delete", "table", nftFamily(v6), "crio-hostports")
			} else {
				b.run(program(v6)+"-"+b.via, "-t", "nat", "-F")
			}
		}, want: "the rules are gone: process",
	},
	{
		name: "another protocol", how: func(b *bed, v6 bool) { b.add(0, v6, "UDP", 80) },
		want: ":8080/udp",
	},
	{
		name: "a process has the port, and no manager runs", how: func(b *bed, v6 bool) {
			b.add(0, v6, "TCP", 80)
			require.NoError(b.t, b.m.Close())
			b.take(v6)
		}, want: "the port is not held: process",
	},
	{
		name: "the pod refuses by ICMP", how: func(b *bed, v6 bool) {
			b.add(0, v6, "TCP", 80)
			require.NoError(b.t, b.Pods[0].Do(func() error {
				return exec.CommandContext(b.t.Context(), "nft", "add table inet f; "+
					"add chain inet f i { type filter hook input priority 0; }; "+
					"add rule inet f i tcp dport 80 reject with icmpx admin-prohibited").Run()
			}))
		}, want: "the pod says: ",
	},
	{
		name: "the pod answers past the node", how: func(b *bed, v6 bool) {
			b.add(0, v6, "TCP", 80)
			require.NoError(b.t, b.Host.BridgeCalls("cni0", v6))
			require.NoError(b.t, b.Pods[0].Do(func() error {
				return netlink.RouteReplace(&netlink.Route{Dst: everywhere(v6), Gw: b.Pods[1].IP(v6).AsSlice()})
			}))
		}, want: "the pod sends its answer to another machine on cni0",
	},
	{
		name: "the pod has no route back", how: func(b *bed, v6 bool) {
			b.add(0, v6, "TCP", 80)
			require.NoError(b.t, b.Pods[0].Do(func() error { return netlink.RouteDel(&netlink.Route{Dst: everywhere(v6)}) }))
		}, want: "no answer came back: the pod drops it, has no route back, or went a moment ago",
	},
	{
		name: "the pod's address is the node's", how: func(b *bed, v6 bool) {
			ip := b.NodeIP(v6)
			_, err := b.Host.Serve("tcp", netip.AddrPortFrom(ip, 80))
			require.NoError(b.t, err)
			b.do(func() {
				require.NoError(b.t, b.m.Add("host", &hostport.PodPortMapping{
					IP: ip.AsSlice(), PortMappings: []*hostport.PortMapping{{HostPort: 8080, ContainerPort: 80}},
				}, ""))
			})
		}, want: "answers",
	},
	{
		name: "ruleset flushed, with Run", how: func(b *bed, v6 bool) {
			b.add(0, v6, "TCP", 80)
			b.runManager()
			b.flush()
			b.soon(func() bool { return len(b.rows()) == 1 })
		}, want: "answers",
	},
	{
		name: "a process has the port at Add", how: func(b *bed, v6 bool) { b.take(v6) },
		want: "has the port, so that no pod can get it",
	},
	{
		name: "a process has the port after a restart", how: func(b *bed, v6 bool) {
			b.add(0, v6, "TCP", 80)
			require.NoError(b.t, b.m.Close())
			b.take(v6)
			b.start()
		}, want: "the port is not held: process",
	},
	{
		name: "FORWARD drop by nftables", how: func(b *bed, v6 bool) {
			b.add(0, v6, "TCP", 80)
			b.run("nft", "add table inet firewall; add chain inet firewall forward { type filter hook forward priority 0; policy accept; }; "+
				"add rule inet firewall forward tcp dport 80 counter drop")
		}, want: "the packet is dropped in the forward hook by table inet firewall, chain forward, handle",
	},
	{
		name: "FORWARD policy drop by nftables", how: func(b *bed, v6 bool) {
			b.add(0, v6, "TCP", 80)
			b.run("nft", "add table inet firewall; add chain inet firewall forward { type filter hook forward priority 0; policy drop; }")
		}, want: "the packet is dropped in the forward hook by table inet firewall, chain forward, its policy",
	},
	{
		name: "answers dropped by nftables", how: func(b *bed, v6 bool) {
			b.add(0, v6, "TCP", 80)
			b.run("nft", "add table inet firewall; add chain inet firewall forward { type filter hook forward priority 0; policy accept; }; "+
				"add rule inet firewall forward ct direction reply counter drop")
		}, want: "the pod's answer is dropped in the forward hook by table inet firewall, chain forward, handle",
	},
	{
		name: "FORWARD policy drop by iptables-nft", how: func(b *bed, v6 bool) {
			b.add(0, v6, "TCP", 80)
			b.run(program(v6)+"-nft", "-P", "FORWARD", "DROP")
		}, want: "filter, chain FORWARD, its policy",
	},
	{
		name: "FORWARD drop by iptables-legacy", how: func(b *bed, v6 bool) {
			b.add(0, v6, "TCP", 80)
			b.run(program(v6)+"-legacy", "-A", "FORWARD", "-p", "tcp", "--dport", "80", "-j", "DROP")
		}, want: "the packet ended in the forward hook, and no rule of nf_tables has dropped it: look at ip",
	},
	{
		name: "no forwarding at the start", how: func(b *bed, v6 bool) {
			b.forward(v6, "0")
			b.add(0, v6, "TCP", 80)
		}, want: "the node does not forward",
	},
	{
		name: "no forwarding later", how: func(b *bed, v6 bool) {
			b.add(0, v6, "TCP", 80)
			b.forward(v6, "0")
		}, want: "the node does not forward",
	},
	{
		name: "route_localnet taken back", how: func(b *bed, _ bool) {
			b.add(0, false, "TCP", 80)
			require.NoError(b.t, b.Host.Sysctl("net/ipv4/conf/cni0/route_localnet", "0"))
		}, want: "127.0.0.1 does not reach the pod: /proc/sys/net/ipv4/conf/cni0/route_localnet is 0",
	},
	{
		name: "leaked row", how: func(b *bed, v6 bool) {
			b.add(0, v6, "TCP", 80)
			require.NoError(b.t, b.Host.RemoveDevice("veth1"))
		}, want: "the pod is gone, and its row has leaked",
	},
	{
		name: "link of the pod down", how: func(b *bed, v6 bool) {
			b.add(0, v6, "TCP", 80)
			require.NoError(b.t, b.Pods[0].Do(func() error {
				return netlink.LinkSetDown(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}})
			}))
		}, want: "the pod's link is down (no carrier: veth1)",
	},
	{
		name: "pod does not listen", how: func(b *bed, v6 bool) { b.add(0, v6, "TCP", 81) },
		want: "the pod refuses: nothing listens on TCP ",
	},
	{
		name: "UDP, pod does not listen", how: func(b *bed, v6 bool) { b.add(0, v6, "UDP", 81) },
		port: "8080/udp", want: "the pod refuses: nothing listens on UDP ",
	},
	{
		name: "stale DNAT of another mapper, iptables-legacy", via: "nftables", how: func(b *bed, v6 bool) {
			b.stale(v6, "legacy")
			b.add(0, v6, "TCP", 80)
		}, want: "something else has the port: packets go to ",
	},
	{
		name: "stale DNAT of another mapper, iptables-nft", via: "nftables", how: func(b *bed, v6 bool) {
			b.stale(v6, "nft")
			b.add(0, v6, "TCP", 80)
		}, want: "something else has the port: packets go to ",
	},
	{
		name: "DNAT of another mapper, nftables", how: func(b *bed, v6 bool) {
			b.add(0, v6, "TCP", 80)
			b.run("nft", "add table inet mapper; add chain inet mapper p { type nat hook prerouting priority -150; }; "+
				"add rule inet mapper p tcp dport 8080 redirect to :9090")
		}, want: ", by table inet mapper, chain p, handle 2: tcp dport 8080 redirect to :9090",
	},
	{
		name: "a redirection that the node drops", how: func(b *bed, v6 bool) {
			b.add(0, v6, "TCP", 80)
			b.run("nft", "add table inet mapper; add chain inet mapper p { type nat hook prerouting priority -150; }; "+
				"add rule inet mapper p tcp dport 8080 redirect to :9090; "+
				"add chain inet mapper i { type filter hook input priority 0; policy drop; }")
		}, want: "something else has the port: packets go to ",
	},
	{
		name: "not tracked, nftables", how: func(b *bed, v6 bool) {
			b.add(0, v6, "TCP", 80)
			b.run("nft", "add table inet firewall; add chain inet firewall p { type filter hook prerouting priority -300; }; "+
				"add rule inet firewall p tcp dport 8080 notrack")
		}, want: "stays with the node: it is not tracked (notrack), or a rule accepts it before ours, by table inet firewall, chain p, handle 2",
	},
	{
		name: "drop before tracking by iptables-legacy", how: func(b *bed, v6 bool) {
			b.add(0, v6, "TCP", 80)
			b.run(program(v6)+"-legacy", "-t", "raw", "-A", "PREROUTING", "-p", "tcp", "--dport", "8080", "-j", "DROP")
		}, want: "the packet ended in the prerouting hook, and no rule of nf_tables has dropped it: look at ip",
	},
	{
		name: "answers dropped by iptables-legacy", how: func(b *bed, v6 bool) {
			b.add(0, v6, "TCP", 80)
			b.run(program(v6)+"-legacy", "-A", "FORWARD", "-p", "tcp", "--sport", "80", "-j", "DROP")
		}, want: "the pod's answer ended in the forward hook, and no rule of nf_tables has dropped it: look at ip",
	},
	{
		name: "no route to the pod", how: func(b *bed, v6 bool) {
			b.add(0, v6, "TCP", 80)
			b.route(v6, netlink.Route{Type: unix.RTN_BLACKHOLE, Dst: only(b.Pods[0].IP(v6))})
		}, want: "leads nowhere",
	},
	{
		name: "no route to the pod but the default one", how: func(b *bed, v6 bool) {
			b.add(0, v6, "TCP", 80)
			b.do(func() { require.NoError(b.t, b.Host.RemoveDevice("cni0")) })
			b.route(v6, netlink.Route{Dst: nil})
		}, want: "but the default one, over eth0: the pod is gone, or its network is",
	},
	{
		name: "an interface does not forward", how: func(b *bed, _ bool) {
			b.add(0, false, "TCP", 80)
			b.route(false, netlink.Route{Dst: nil})
			require.NoError(b.t, b.Host.Sysctl("net/ipv4/conf/eth0/forwarding", "0"))
		}, want: "the node does not forward what comes in by eth0",
	},
	{
		name: "new interfaces do not forward", how: func(b *bed, _ bool) {
			b.add(0, false, "TCP", 80)
			require.NoError(b.t, b.Host.Sysctl("net/ipv4/conf/default/forwarding", "0"))
		}, want: "answers",
	},
	{
		name: "the node lacks the host IP", how: func(b *bed, v6 bool) {
			b.addAt(map[bool]string{false: "192.0.2.77", true: "2001:db8:1::77"}[v6], 0, v6, "TCP", 80)
		}, want: "the node does not have the address ",
	},
	{
		name: "link of the pod down, a moment ago", how: func(b *bed, v6 bool) {
			b.add(0, v6, "TCP", 80)

			_, err := b.Client.Ask(b.t.Context(), "tcp", netip.AddrPortFrom(b.NodeIP(v6), 8080))
			require.NoError(b.t, err)
			require.NoError(b.t, b.Pods[0].Do(func() error {
				return netlink.LinkSetDown(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}})
			}))
		}, want: "the pod's link is down (no carrier: veth1)",
	},
	{
		name: "the manager's process serves the port", port: "9537", how: func(b *bed, v6 bool) {
			_, err := b.Host.Serve("tcp", netip.AddrPortFrom(b.NodeIP(v6), 9537))
			require.NoError(b.t, err)
		}, want: "has the port, so that no pod can get it",
	},
	{
		name: "IPv6 off", v6: true, how: func(b *bed, _ bool) {
			b.add(0, true, "TCP", 80)
			require.NoError(b.t, b.Host.Sysctl("net/ipv6/conf/all/disable_ipv6", "1"))
		}, want: "IPv6 is off",
	},
	{
		name: "chains flushed", how: func(b *bed, v6 bool) {
			b.add(0, v6, "TCP", 80)

			if b.via == "nftables" {
				b.run("nft", "flush", "chain", nftFamily(v6), "crio-hostports", "nat-prerouting")
			} else {
				b.run(program(v6)+"-"+b.via, "-t", "nat", "-F", "PREROUTING")
			}
		}, want: "rules are not as they should be: ",
	},
}

// nftFamily is the family of a table.
func nftFamily(v6 bool) string {
	if v6 {
		return "ip6"
	}

	return "ip"
}

// program is the iptables of a family.
func program(v6 bool) string {
	if v6 {
		return "ip6tables"
	}

	return "iptables"
}

// flush does what a reload of a firewall does.
func (b *bed) flush() {
	b.t.Helper()

	if b.via != "legacy" {
		b.run("nft", "flush", "ruleset")

		return
	}

	for _, v6 := range []bool{false, true} {
		b.run("sh", "-c", "printf '*nat\nCOMMIT\n' | "+program(v6)+"-legacy-restore")
	}
}

// What the test binary does in place of tests: serve a port, or be the tool.
const (
	addressVariable = "HOSTPORTS_TEST_SERVE"
	toolVariable    = "HOSTPORTS_TEST_TOOL"
)

func TestMain(m *testing.M) {
	if os.Getenv(toolVariable) != "" {
		os.Exit(Run(context.Background(), os.Args[1:], os.Stdout, os.Stderr))
	}

	address := os.Getenv(addressVariable)
	if address == "" {
		_ = flag.Set("test.parallel", "8") // they wait more than they work

		m.Run()

		return
	}

	l, err := (&net.ListenConfig{}).Listen(context.Background(), "tcp", address)
	_, _ = fmt.Fprintln(os.Stdout, err)

	_, _ = io.Copy(io.Discard, os.Stdin) // until the test ends

	if err == nil {
		_ = l.Close()
	}
}

// take has another process of the node serve the port.
func (b *bed) take(v6 bool) {
	b.t.Helper()

	cmd := exec.CommandContext(b.t.Context(), os.Args[0]) //nolint:gosec // the tests themselves
	cmd.Env = append(os.Environ(), addressVariable+"="+map[bool]string{false: "0.0.0.0:8080", true: "[::]:8080"}[v6])

	stdin, err := cmd.StdinPipe()
	require.NoError(b.t, err)
	stdout, err := cmd.StdoutPipe()
	require.NoError(b.t, err)
	b.do(func() { require.NoError(b.t, cmd.Start()) })
	b.t.Cleanup(func() {
		_ = stdin.Close()
		_ = cmd.Wait()
	})

	said, err := bufio.NewReader(stdout).ReadString('\n')
	require.NoError(b.t, err)
	require.Equal(b.t, "<nil>\n", said)
}

func (b *bed) forward(v6 bool, value string) {
	b.t.Helper()
	require.NoError(b.t, b.Host.Sysctl(map[bool]string{false: "net/ipv4/ip_forward", true: "net/ipv6/conf/all/forwarding"}[v6], value))
}

// stale leaves a rule of a port mapper before.
func (b *bed) stale(v6 bool, variant string) {
	b.t.Helper()
	b.run(program(v6)+"-"+variant, "-t", "nat", "-A", "PREROUTING", "-p", "tcp", "--dport", "8080", "-j", "DNAT", "--to-destination",
		netip.AddrPortFrom(b.Pods[1].IP(v6), 80).String())
}

func (b *bed) runManager() {
	ctx, cancel := context.WithCancel(b.t.Context())
	done := make(chan struct{})

	go func() {
		defer close(done)

		_ = b.Host.Do(func() error { return b.m.Run(ctx) })
	}()
	b.t.Cleanup(func() { cancel(); <-done })
}

// rows are those of the kernel.
func (b *bed) rows() (list []hostport.Mapping) {
	b.t.Helper()
	b.do(func() {
		var err error
		list, err = hostport.List(b.t.Context())
		require.NoError(b.t, err)
	})

	return list
}

// soon waits for something that comes by itself.
func (b *bed) soon(is func() bool) {
	b.t.Helper()
	require.Eventually(b.t, is, testbed.Stretch(20*time.Second), 20*time.Millisecond)
}

// explain names the cause of each fault in its last line, on every backend, in both families.
func TestFaults(t *testing.T) {
	t.Parallel()

	for _, f := range faults {
		for _, via := range []string{"nftables", "nft", "legacy"} {
			for _, v6 := range []bool{false, true} {
				if f.via != "" && f.via != via || f.v6 && !v6 {
					continue
				}

				t.Run(f.name+"/"+via+map[bool]string{false: "/IPv4", true: "/IPv6"}[v6], func(t *testing.T) {
					t.Parallel()

					b := newBed(t, via)
					f.how(b, v6)
					b.cause(f.want, cmp.Or(f.port, "8080"))
				})
			}
		}
	}
}
