package hostport

import (
	"bytes"
	"context"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/mdlayher/netlink"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	rtnetlink "github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2/ktesting"

	"github.com/cri-o/hostport/internal/iptables"
	"github.com/cri-o/hostport/internal/links"
	"github.com/cri-o/hostport/internal/localhost"
	"github.com/cri-o/hostport/internal/nfnetlink"
	"github.com/cri-o/hostport/internal/nftables"
	"github.com/cri-o/hostport/internal/sysctl"
	"github.com/cri-o/hostport/internal/testbed"
)

// bridgeIP is the node's address on the pods' network.
const bridgeIP = "10.88.0.1"

// logs returns an option, and what has been logged with it so far.
func logs(tb testing.TB) (Option, func() string) {
	tb.Helper()

	log := ktesting.NewLogger(tb, ktesting.NewConfig(ktesting.BufferLogs(true)))
	sink, ok := log.GetSink().(ktesting.Underlier)
	require.True(tb, ok)

	return WithLogger(log), sink.GetBuffer().String
}

// routeLocalnetOf is the file of the sysctl route_localnet of an interface.
func routeLocalnetOf(device string) string {
	return "/proc/sys/net/ipv4/conf/" + device + "/route_localnet"
}

// localnet lists the interfaces of the host that have route_localnet.
func (n *node) localnet() []string {
	n.t.Helper()

	var devices []string

	n.do(func() {
		paths, err := filepath.Glob(routeLocalnetOf("*"))
		require.NoError(n.t, err)
		require.NotEmpty(n.t, paths)

		for _, path := range paths {
			value, err := os.ReadFile(path)
			require.NoError(n.t, err)

			if strings.TrimSpace(string(value)) != "0" {
				devices = append(devices, filepath.Base(filepath.Dir(path)))
			}
		}
	})

	return devices
}

func (n *node) sysctl(key, value string) {
	n.t.Helper()
	require.NoError(n.t, n.Host.Sysctl(key, value))
}

// attempt is a request that is not to be answered.
type attempt struct {
	by       *testbed.Namespace
	network  string
	from, to string // from may be empty
}

// inVain makes attempts at once and asserts that nothing answers, nor refuses.
func (n *node) inVain(attempts ...attempt) {
	n.t.Helper()

	var wg sync.WaitGroup

	for _, a := range attempts {
		wg.Go(func() {
			var from netip.AddrPort
			if a.from != "" {
				from = netip.MustParseAddrPort(a.from)
			}

			// More than an answer takes, but for a packet that was lost.
			ctx, cancel := context.WithTimeout(n.t.Context(), patience/10)
			defer cancel()

			_, err := a.by.AskFrom(ctx, a.network, from, netip.MustParseAddrPort(a.to))
			assert.ErrorIs(n.t, err, context.DeadlineExceeded, "%s %s from %s", a.network, a.to, a.by.Name)
		})
	}

	wg.Wait()
}

func (n *node) hostService(network, addr string) *testbed.Service {
	n.t.Helper()

	s, err := n.Host.Serve(network, netip.MustParseAddrPort(addr))
	require.NoError(n.t, err)

	return s
}

// What the node itself gets at 127.0.0.0/8, however the runtime names the
// interface to the pod, and with strict reverse path filtering.
func TestLocalhost(t *testing.T) {
	for _, device := range []string{"", "cni0", "lo", "none0"} {
		eachBackend(t, func(t *testing.T, n *node) {
			for _, key := range []string{"all", "cni0", "eth0", "lo"} {
				n.sysctl("net/ipv4/conf/"+key+"/rp_filter", "1")
			}

			for _, network := range []string{"tcp", "udp"} {
				n.serve(0, network, IPv4, 80)
			}

			log, logged := logs(n.t)
			m := n.manager(log)
			pod := n.pod(0, IPv4,
				&PortMapping{HostPort: 8080, ContainerPort: 80}, &PortMapping{HostPort: 8080, ContainerPort: 80, Protocol: "UDP"},
				&PortMapping{HostPort: 8081, ContainerPort: 80, HostIP: "127.0.0.1"},
				&PortMapping{HostPort: 8082, ContainerPort: 80, HostIP: "127.0.0.5", Protocol: "UDP"})
			assert.Empty(t, n.localnet())

			for range 2 {
				n.do(func() { require.NoError(t, m.Add("id", pod, device)) })
			}

			assert.Equal(t, []string{"cni0"}, n.localnet())
			assert.Equal(t, 1, strings.Count(logged(), "route_localnet"), logged())

			for _, ask := range []struct{ network, to string }{
				{"tcp", "127.0.0.1:8080"},
				{"tcp", "127.1.2.3:8080"},
				{"tcp", "127.0.0.1:8081"},
				{"udp", "127.0.0.1:8080"},
				{"udp", "127.1.2.3:8080"},
				{"udp", "127.0.0.5:8082"},
			} {
				a := n.answers(n.Host, ask.network, netip.MustParseAddrPort(ask.to), "web")
				assert.Equal(t, bridgeIP, a.Source.Addr().String(), "a loopback source is masqueraded")
			}

			n.refused(n.Host, "tcp", netip.MustParseAddrPort("127.0.0.2:8081"))

			// From an address of its own, the node is seen as it is.
			a, err := n.Host.AskFrom(t.Context(), "tcp", netip.AddrPortFrom(n.nodeIP(IPv4), 0), netip.MustParseAddrPort("127.0.0.1:8080"))
			require.NoError(t, err)
			assert.Equal(t, n.nodeIP(IPv4), a.Source.Addr())
			n.answers(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(IPv4), 8080), "web")

			require.NoError(t, n.remove(m, "id", nil))
			n.refused(n.Host, "tcp", netip.MustParseAddrPort("127.0.0.1:8080"))
			assert.Equal(t, []string{"cni0"}, n.localnet(), "connections that are still open need it")
		})
	}
}

// A name that no interface has, or can have, is as none at all: it opens neither
// every interface nor those to come, which have directories beside the others.
func TestInterfaceNameIsNoPath(t *testing.T) {
	eachBackend(t, func(t *testing.T, n *node) {
		n.serve(0, "tcp", IPv4, 80)

		m := n.manager()
		pod := n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})

		for _, device := range []string{
			"all", "default", "none0", "longer-than-any-name", ".", "..", "/", "all/", "eth0/", "eth0/.", "./eth0", "../conf/eth0",
			"../../ipv4/conf/all", "/proc/sys/net/ipv4/conf/eth0", "eth0:1", "eth0 ", "eth0\n", "eth0\x00",
		} {
			n.sysctl("net/ipv4/conf/cni0/route_localnet", "0")
			n.do(func() { require.NoError(t, m.Add("id", pod, device)) })
			require.Equal(t, []string{"cni0"}, n.localnet(), "%q", device)
		}

		n.answers(n.Host, "tcp", netip.MustParseAddrPort("127.0.0.1:8080"), "web")

		// What somebody else has set for all of them counts, for the guard.
		n.sysctl("net/ipv4/conf/cni0/route_localnet", "0")
		n.do(func() { assert.False(t, localhost.Routed()) })
		n.sysctl("net/ipv4/conf/all/route_localnet", "1")
		n.do(func() { assert.True(t, localhost.Routed()) })
	})
}

// Names are valid that the kernel gives an interface, which may be unusual ones.
func TestInterfaceNames(t *testing.T) {
	n := anyNode(t)
	m := n.manager()
	pod := n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})

	l := links.New(IPv4)
	defer l.Close()

	n.do(func() {
		h, err := rtnetlink.NewHandle(unix.NETLINK_ROUTE)
		require.NoError(t, err)

		defer h.Close()

		for name, valid := range map[string]bool{
			"br.1": true, "...": true, "-": true, "fifteen-letters": true, "brücke": true, "br\xff": true, "br\x85": true, "br\x01": true,
			".": false, "..": false, "br/1": false, "br:1": false, "br 1": false, "br\t": false, "br\n": false,
			"br\v": false, "br\f": false, "br\r": false, "br\xa0": false, "sixteen-letters-": false,
		} {
			attrs := rtnetlink.NewLinkAttrs()
			attrs.Name = name
			err := h.LinkAdd(&rtnetlink.Bridge{LinkAttrs: attrs})
			assert.Equal(t, valid, err == nil, "the kernel and %q: %v", name, err)
			found, err := l.To(name, n.Pods[0].IPv4)
			require.NoError(t, err)
			assert.Equal(t, valid, found == name, "%q", name)

			if valid {
				require.NoError(t, m.Add("id", pod, name))
				set, err := sysctl.IsSet(routeLocalnetOf(name))
				require.NoError(t, err)
				assert.True(t, set, "%q", name)
			}
		}

		// These would be valid, but for their directories (net/ipv4/devinet.c).
		for _, name := range []string{"all", "default"} {
			attrs := rtnetlink.NewLinkAttrs()
			attrs.Name = name
			require.Error(t, h.LinkAdd(&rtnetlink.Bridge{LinkAttrs: attrs}))
			assert.FileExists(t, routeLocalnetOf(name))
			found, err := l.To(name, n.Pods[0].IPv4)
			require.NoError(t, err)
			assert.NotEqual(t, name, found)
		}
	})
}

// Each interface that leads to a pod is opened, and again if need be.
func TestLocalhostOfEachInterface(t *testing.T) {
	eachBackend(t, func(t *testing.T, n *node) {
		m := n.manager()
		port := &PortMapping{HostPort: 8080, ContainerPort: 80}
		require.NoError(t, n.add(m, "id", n.pod(0, IPv4, port)))

		second, err := n.SecondNetwork(n.Pods[0])
		require.NoError(t, err)

		pod := n.pod(0, IPv4, port)
		pod.IP = second(false).AsSlice()
		require.NoError(t, n.add(m, "id", pod))
		assert.Equal(t, []string{"cni0", "cni1"}, n.localnet())

		n.sysctl("net/ipv4/conf/cni1/route_localnet", "0")
		require.NoError(t, n.add(m, "id", pod))
		assert.Equal(t, []string{"cni0", "cni1"}, n.localnet())

		for _, device := range []string{"cni0", "cni1"} {
			n.sysctl("net/ipv4/conf/"+device+"/route_localnet", "0")
		}

		require.NoError(t, n.sync(m, map[string][]*PodPortMapping{"id": {pod}}))
		assert.Equal(t, []string{"cni1"}, n.localnet())

		// A row that no loopback address leads to does not need it.
		n.sysctl("net/ipv4/conf/cni1/route_localnet", "0")
		require.NoError(t, n.add(m, "other", n.pod(1, IPv4, &PortMapping{HostPort: 9090, ContainerPort: 80, HostIP: "192.0.2.1"})))
		assert.Empty(t, n.localnet())
	})
}

// Sync sees to a row from before as well.
func TestLocalhostOfRowFromBefore(t *testing.T) {
	eachBackend(t, func(t *testing.T, n *node) {
		pod := n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})
		n.leftBehind("id", pod)
		n.sysctl("net/ipv4/conf/cni0/route_localnet", "0")
		require.NoError(t, n.sync(n.manager(), map[string][]*PodPortMapping{"id": {pod}}))
		assert.Equal(t, []string{"cni0"}, n.localnet())
	})
}

// Where a sysctl cannot be read, it may be on.
func TestGuardStaysWhereUnreadable(t *testing.T) {
	eachBackend(t, func(t *testing.T, n *node) {
		m := n.manager()
		require.NoError(t, n.add(m, "id", n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})))
		n.sysctl("net/ipv4/conf/cni0/route_localnet", "0")
		show := n.mountOver(routeLocalnetOf("cni0"), "/proc/self/mem", "", unix.MS_BIND) // which has nothing at 0
		require.NoError(t, n.sync(m, nil))
		n.guarded()
		show()
		require.NoError(t, n.sync(m, nil))
		assert.Empty(t, n.ours(IPv4))
	})
}

// The loopback interface is left as it is, also if it leads to a pod: on the host's network.
func TestLoopbackInterface(t *testing.T) {
	n := anyNode(t)
	pod := n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})
	pod.IP = n.nodeIP(IPv4).AsSlice()
	require.NoError(t, n.add(n.manager(), "id", pod))
	assert.Empty(t, n.localnet())
}

// What the attacks of TestLoopbackIsGuarded come to where nobody stops them.
func TestLoopbackUnguarded(t *testing.T) {
	n := anyNode(t)
	for _, device := range []string{"cni0", "eth0"} {
		n.sysctl("net/ipv4/conf/"+device+"/route_localnet", "1")
		n.sysctl("net/ipv4/conf/"+device+"/rp_filter", "0")
	}

	n.sysctl("net/ipv4/conf/all/rp_filter", "0")
	n.hostService("tcp", "127.0.0.1:9000")
	n.hostService("udp", "127.0.0.1:9000")

	for _, attacker := range []*testbed.Namespace{n.Pods[1].Namespace, n.Client} {
		require.NoError(t, attacker.SendLoopback())
		n.answers(attacker, "tcp", netip.MustParseAddrPort("127.0.0.1:9000"), "host")
		n.answers(attacker, "udp", netip.MustParseAddrPort("127.0.0.1:9000"), "host")

		to := netip.AddrPortFrom(n.nodeIP(IPv4), 9001)
		service := n.hostService("udp", to.String())
		n.inVain(attempt{attacker, "udp", "127.0.0.2:0", to.String()}) // as the answer does not find back
		assert.NotZero(t, service.Count(), "who passes for the node is heard")
		require.NoError(t, service.Close())
	}
}

// Neither a pod nor a neighbour of the node gets through the interfaces that
// Add has opened: not to services of the node, not to rows at 127.0.0.1, and not
// by passing for the node.
func TestLoopbackIsGuarded(t *testing.T) {
	for name, opts := range map[string][]Option{"with localhost": nil, "without": {WithoutLocalhost()}} {
		t.Run(name, func(t *testing.T) {
			eachBackend(t, func(t *testing.T, n *node) {
				for _, key := range []string{"all", "cni0", "eth0"} {
					n.sysctl("net/ipv4/conf/"+key+"/rp_filter", "0")
				}

				var web []*testbed.Service

				for _, network := range []string{"tcp", "udp"} {
					s, err := n.Pods[0].Serve(network, netip.AddrPortFrom(n.Pods[0].IPv4, 80))
					require.NoError(t, err)

					web = append(web, s)
				}

				if len(opts) > 0 {
					for _, device := range []string{"cni0", "eth0"} { // by the administrator, or a manager before
						n.sysctl("net/ipv4/conf/"+device+"/route_localnet", "1")
					}
				}

				m := n.manager(opts...)
				pod := n.pod(0, IPv4,
					&PortMapping{HostPort: 8080, ContainerPort: 80},
					&PortMapping{HostPort: 8081, ContainerPort: 80, HostIP: "127.0.0.1"},
					&PortMapping{HostPort: 8081, ContainerPort: 80, HostIP: "127.0.0.1", Protocol: "UDP"})

				for _, device := range []string{"cni0", "eth0"} {
					n.do(func() { require.NoError(t, m.Add("id", pod, device)) })
				}

				assert.Equal(t, []string{"cni0", "eth0"}, n.localnet())

				tcp, udp := n.hostService("tcp", "127.0.0.1:9000"), n.hostService("udp", "127.0.0.1:9000")
				spoofed := n.hostService("udp", netip.AddrPortFrom(n.nodeIP(IPv4), 9001).String())

				var attempts []attempt

				for _, by := range []*testbed.Namespace{n.Pods[1].Namespace, n.Pods[0].Namespace, n.Client} {
					require.NoError(t, by.SendLoopback())

					attempts = append(attempts,
						attempt{by, "tcp", "", "127.0.0.1:9000"}, attempt{by, "udp", "", "127.0.0.1:9000"},
						attempt{by, "tcp", "", "127.0.0.1:8080"},
						attempt{by, "tcp", "", "127.0.0.1:8081"}, attempt{by, "udp", "", "127.0.0.1:8081"},
						attempt{by, "udp", "127.0.0.2:0", spoofed.Addr().String()})
				}

				n.inVain(attempts...)

				for _, s := range append(web, tcp, udp, spoofed) {
					assert.Zero(t, s.Count(), s.Addr())
				}

				n.answers(n.Host, "tcp", tcp.Addr(), "host")
				n.answers(n.Host, "udp", udp.Addr(), "host")

				if len(opts) == 0 {
					n.answers(n.Host, "tcp", netip.MustParseAddrPort("127.0.0.1:8081"), "web")
					n.answers(n.Host, "udp", netip.MustParseAddrPort("127.0.0.1:8081"), "web")
				}
			})
		})
	}
}

// What comes from outside for a loopback address is not translated either, not
// even with what CRI-O leaves, and until an operation finds that the guard has
// gone.
func TestLoopbackFromOutsideIsNotTranslated(t *testing.T) {
	eachBackend(t, func(t *testing.T, n *node) {
		n.serve(0, "tcp", IPv4, 80)

		if n.variant != viaNFTables {
			n.iptables(IPv4, "-N", iptables.DNATDispatch)
			n.iptables(IPv4, "-A", iptables.PreRouting, "-m", "comment", "--comment", iptables.DNATComment, "-m", "addrtype", "--dst-type", "LOCAL", "-j", iptables.DNATDispatch)
		}

		m := n.manager()
		require.NoError(t, n.add(m, "id", n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80, HostIP: "127.0.0.1"})))

		if n.variant == viaNFTables {
			n.commit(nftables.NewLayout(IPv4).Table.FlushChain(nftables.GuardChain))
		} else {
			n.command("iptables-"+string(n.variant), "-t", iptables.RawTable, "-F")
		}

		to := netip.MustParseAddrPort("127.0.0.1:8080")
		attacker := n.Pods[1].Namespace
		require.NoError(t, attacker.SendLoopback())
		n.refused(attacker, "tcp", to) // by the socket that holds the port
		n.answers(n.Host, "tcp", to, "web")
	})
}

// guarded asserts that the guard stands, as the node's operator sees it.
func (n *node) guarded() {
	n.t.Helper()

	if n.variant == viaNFTables {
		rules, err := n.nfnetlink().Dump(n.t.Context(), nftables.NewLayout(IPv4).Table.Rules())
		require.NoError(n.t, err)

		guards := 0

		for _, m := range rules {
			rule, err := nfnetlink.ParseRule(m)
			require.NoError(n.t, err)

			if rule.Chain == nftables.GuardChain {
				guards++
			}
		}

		assert.Equal(n.t, 2, guards)

		return
	}

	save := n.command("iptables-"+string(n.variant)+"-save", "-t", iptables.RawTable)
	for _, rule := range iptables.GuardRules(IPv4) {
		assert.Equal(n.t, 1, strings.Count(save, iptables.CmdAppend+rule.String()), save)
	}
}

// wipeAll deletes all rules and chains that there are for IPv4, whoever made
// them, but for the hint that says which iptables the node uses.
func (n *node) wipeAll() {
	n.t.Helper()

	if n.variant == viaNFTables {
		n.commit(nftables.NewLayout(IPv4).Table.Delete())

		return
	}

	// Between -F and -X Run may put back what leads to a chain.
	n.commandWith("*nat\nCOMMIT\n", iptables.Command(IPv4)+"-"+string(n.variant)+"-restore")
}

// The sysctl outlives a ruleset, its rows and its manager, so the guard does too.
func TestGuardStays(t *testing.T) {
	eachBackend(t, func(t *testing.T, n *node) {
		m := n.manager()
		pod := n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})
		another := n.pod(1, IPv4, &PortMapping{HostPort: 9090, ContainerPort: 80})
		require.NoError(t, n.add(m, "id", pod))
		n.guarded()

		// Each operation puts it back.
		n.wipeAll()
		require.NoError(t, n.add(m, "another", another))
		n.guarded()
		n.wipeAll()
		require.NoError(t, n.remove(m, "another", another))
		n.guarded()

		if n.variant != viaNFTables { // where it stands in a table of its own
			n.command("iptables-"+string(n.variant), "-t", iptables.RawTable, "-F")
			require.NoError(t, n.add(m, "id", pod))
			n.guarded()
		}

		require.NoError(t, n.remove(m, "id", nil))
		n.guarded()
		require.NoError(t, m.Close())
		n.guarded()

		// And so does a manager that starts, if there is anything to guard.
		for _, opts := range [][]Option{nil, {WithoutLocalhost()}} {
			n.wipeAll()
			require.NoError(t, n.manager(opts...).Close())
			n.guarded()
		}

		n.sysctl("net/ipv4/conf/cni0/route_localnet", "0")
		n.wipeAll()
		require.NoError(t, n.manager().Close())
		assert.Empty(t, n.ours(IPv4))
	})
}

// The sysctl is set once the guard stands, and not at all if it does not.
func TestGuardComesFirst(t *testing.T) {
	eachVariant(t, func(t *testing.T, n *node) {
		fake := &fakeIPTables{IPTables: n.realIPTables()}
		m := n.oneFamily(fake)
		fake.restore = func([]byte) ([]byte, error) { return nil, errInjected }
		pod := n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})
		require.ErrorIs(t, n.add(m, "id", pod), errInjected)
		assert.Empty(t, n.localnet())

		fake.restore = func(input []byte) ([]byte, error) {
			assert.Empty(t, n.localnet())

			return input, nil
		}
		require.NoError(t, n.add(m, "id", pod))
		assert.NotEmpty(t, n.localnet())
		n.guarded()
		n.guarded()
	})

	t.Run(string(viaNFTables), func(t *testing.T) {
		n := newNode(t, viaNFTables)
		m, fake := n.viaFake()
		fake.commit = func([]netlink.Message) ([]netlink.Message, error) { return nil, errInjected }
		pod := n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})
		require.ErrorIs(t, n.add(m, "id", pod), errInjected)
		assert.Empty(t, n.localnet())

		fake.commit = func(msgs []netlink.Message) ([]netlink.Message, error) {
			assert.Empty(t, n.localnet())

			return msgs, nil
		}
		require.NoError(t, n.add(m, "id", pod))
		assert.NotEmpty(t, n.localnet())
		n.guarded()
		n.guarded()
	})
}

// The guard is put there once, whatever comes after it.
func TestGuardBesideRefusedRow(t *testing.T) {
	eachVariant(t, func(t *testing.T, n *node) {
		fake := &fakeIPTables{IPTables: n.realIPTables()}
		m := n.oneFamily(fake)
		fake.restore = func(input []byte) ([]byte, error) {
			return bytes.ReplaceAll(input, []byte("--to-destination 10.88.0.2:80"), []byte("--to-destination refused")), nil
		}

		pod := n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})

		for range 3 {
			require.Error(t, n.add(m, "id", pod))
		}

		fake.restore = nil
		require.NoError(t, n.add(m, "id", pod))
		n.guarded()
	})
}

// What cannot work is refused and does not hang.
func TestLoopbackSourcesRefused(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node, f IPFamily) {
		n.serve(0, "tcp", f, 80)

		m := n.manager(WithoutLocalhost())
		loopback := f.Loopback().Addr()

		if f == IPv4 {
			loopback = loopback.Next()
		}

		require.NoError(t, n.add(m, "id", n.pod(0, f,
			&PortMapping{HostPort: 8080, ContainerPort: 80},
			&PortMapping{HostPort: 8081, ContainerPort: 80, HostIP: loopback.String()})))

		for _, port := range []uint16{8080, 8081} {
			to := netip.AddrPortFrom(loopback, port)
			n.refused(n.Host, "tcp", to)

			a, err := n.Host.AskFrom(t.Context(), "tcp", netip.AddrPortFrom(n.nodeIP(f), 0), to)
			require.NoError(t, err)
			assert.Equal(t, "web", a.From)
		}

		assert.Empty(t, n.localnet())
	})
}

// A name that leads to ::1 first.
func TestLocalhostByName(t *testing.T) {
	eachBackend(t, func(t *testing.T, n *node) {
		m := n.manager()
		mapping := &PortMapping{HostPort: 8080, ContainerPort: 80}

		for _, f := range []IPFamily{IPv4, IPv6} {
			n.serve(0, "tcp", f, 80)
			require.NoError(t, n.add(m, "id", n.pod(0, f, mapping)))
		}

		n.refused(n.Host, "tcp", netip.MustParseAddrPort("[::1]:8080"))
		n.answers(n.Host, "tcp", netip.MustParseAddrPort("127.0.0.1:8080"), "web")
	})
}
