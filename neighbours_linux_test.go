package hostport

import (
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/cri-o/hostport/internal/links"
	"github.com/cri-o/hostport/internal/nftables"
)

// bridgeCalls sets whether the node's bridges call iptables.
func (n *node) bridgeCalls(f IPFamily, on bool) {
	n.t.Helper()

	key := map[IPFamily]string{IPv4: "iptables", IPv6: "ip6tables"}[f]
	value := map[bool]string{true: "1", false: "0"}[on]
	require.NoError(n.t, n.Host.Sysctl("net/bridge/bridge-nf-call-"+key, value))
}

// masqueradesNeighbours reports whether some rule does.
func (n *node) masqueradesNeighbours(f IPFamily) bool {
	n.t.Helper()

	return slices.ContainsFunc(n.leftOver(f), func(line string) bool {
		return strings.Contains(line, " element "+nftables.Neighbours) || strings.Contains(line, " -i cni0")
	})
}

// A pod reaches its neighbour through a host port whether bridges call iptables or not,
// and where they do, with its own address. The state is looked at with Add, and by Run.
func TestNeighbours(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node, f IPFamily) {
		n.addForeign(f)

		for _, network := range []string{"tcp", "udp"} {
			n.serve(0, network, f, 80)
		}

		pod := n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80}, &PortMapping{HostPort: 8080, ContainerPort: 80, Protocol: "UDP"},
			&PortMapping{HostPort: 8081, ContainerPort: 80, HostIP: n.otherNodeIP(f).String()})
		web, neighbour := n.Pods[0].Namespace, n.Pods[1].Namespace
		podIP, neighbourIP := n.Pods[0].IP(f == IPv6), n.Pods[1].IP(f == IPv6)

		works := func(n *node, masqueraded bool) {
			n.t.Helper()

			for _, network := range []string{"tcp", "udp"} {
				at := netip.AddrPortFrom(n.nodeIP(f), 8080)
				a := n.answers(neighbour, network, at, "web")

				if masqueraded {
					assert.NotEqual(n.t, neighbourIP, a.Source.Addr())
				} else {
					assert.Equal(n.t, neighbourIP, a.Source.Addr())
				}

				assert.NotEqual(n.t, podIP, n.answers(web, network, at, "web").Source.Addr(), "hairpin")
				assert.Equal(n.t, n.ClientIP(f == IPv6), n.answers(n.Client, network, at, "web").Source.Addr())
				assert.Equal(n.t, n.nodeIP(f), n.answers(n.Host, network, at, "web").Source.Addr())
			}

			n.answers(neighbour, "tcp", netip.AddrPortFrom(n.otherNodeIP(f), 8081), "web")
		}

		t.Run("add", func(t *testing.T) {
			n := n.within(t)
			m := n.manager()

			for _, calls := range []bool{false, true, false} {
				n.bridgeCalls(f, calls)
				require.NoError(t, n.add(m, "id", pod))
				works(n, !calls)
				n.do(func() { require.NoError(t, m.Check(t.Context(), "id", pod)) })
			}

			// Some of the pod's rows alone.
			n.bridgeCalls(f, true)
			require.NoError(t, n.add(m, "id", n.pod(0, f, pod.PortMappings[0])))
			a := n.answers(neighbour, "tcp", netip.AddrPortFrom(n.nodeIP(f), 8080), "web")
			assert.Equal(t, neighbourIP, a.Source.Addr())

			if n.variant == viaNFTables { // which has one element for all of them
				assert.False(t, n.masqueradesNeighbours(f))
			}

			n.bridgeCalls(f, false)
			require.NoError(t, n.add(m, "id", pod))
			works(n, true)

			// A new manager changes nothing.
			before := n.leftOver(f)
			require.NoError(t, m.Close())
			m = n.manager()
			assert.ElementsMatch(t, before, n.leftOver(f))
			works(n, true)

			require.NoError(t, n.remove(m, "id", nil))
			assert.Empty(t, n.leftOver(f))
			require.NoError(t, m.Close())
		})
		t.Run("run", func(t *testing.T) {
			n := n.within(t)
			n.bridgeCalls(f, true)
			n.leftBehind("id", pod)

			m := n.manager()
			n.run(m)

			for _, calls := range []bool{false, true, false} {
				n.bridgeCalls(f, calls)
				eventually(t, func() bool { return n.masqueradesNeighbours(f) != calls })
				works(n, !calls)
			}

			// An Add that is there first, of another pod, does not hide it from Run.
			n.bridgeCalls(f, true)
			require.NoError(t, n.add(m, "else", n.pod(1, f, &PortMapping{HostPort: 9999, ContainerPort: 99})))
			eventually(t, func() bool { return !n.masqueradesNeighbours(f) })
			works(n, false)
			n.bridgeCalls(f, false)

			n.do(func() { require.NoError(t, m.Sync(t.Context(), map[string][]*PodPortMapping{"id": {pod}})) })
			works(n, true)
			n.do(func() { require.NoError(t, m.Sync(t.Context(), nil)) })
			assert.Empty(t, n.leftOver(f))
		})
	})
}

// Where bridges have changed for a part of a pod's rows, the others take nothing from these when
// they go.
func TestNeighboursOfPart(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node, f IPFamily) {
		n.serve(0, "tcp", f, 80)
		n.bridgeCalls(f, true)

		m := n.manager()
		stays, goes := &PortMapping{HostPort: 8080, ContainerPort: 80}, &PortMapping{HostPort: 8081, ContainerPort: 80}
		require.NoError(t, n.add(m, "id", n.pod(0, f, stays, goes)))
		n.bridgeCalls(f, false)
		require.NoError(t, n.add(m, "id", n.pod(0, f, stays)))
		require.NoError(t, n.remove(m, "id", n.pod(0, f, goes)))
		n.answers(n.Pods[1].Namespace, "tcp", netip.AddrPortFrom(n.nodeIP(f), 8080), "web")
	})
}

// Where the sysctl is off, a bridge of its own accord may call iptables all the same.
func TestBridgeCallsOfItsOwn(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node, f IPFamily) {
		n.serve(0, "tcp", f, 80)
		n.bridgeCalls(f, false)
		require.NoError(t, n.Host.BridgeCalls("cni0", f == IPv6))

		m := n.manager()
		require.NoError(t, n.add(m, "id", n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80})))

		a := n.answers(n.Pods[1].Namespace, "tcp", netip.AddrPortFrom(n.nodeIP(f), 8080), "web")
		assert.Equal(t, n.Pods[1].IP(f == IPv6), a.Source.Addr())
		n.answers(n.Pods[0].Namespace, "tcp", netip.AddrPortFrom(n.nodeIP(f), 8080), "web")
	})
}

// mountOver hides a sysctl of the host, or a directory of them, until show is called.
func (n *node) mountOver(hidden, by, kind string, flags uintptr) (show func()) {
	n.t.Helper()
	n.do(func() { require.NoError(n.t, unix.Mount(by, hidden, kind, flags, "")) })

	show = sync.OnceFunc(func() {
		n.do(func() { assert.NoError(n.t, unix.Unmount(hidden, unix.MNT_DETACH)) })
	})
	n.t.Cleanup(show)

	return show
}

const bridgeSysctls = "/proc/sys/net/bridge"

// Without br_netfilter there are no sysctls of bridges, and no bridge calls iptables.
func TestNeighboursWithoutBridgeNetfilter(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node, f IPFamily) {
		n.serve(0, "tcp", f, 80)
		n.bridgeCalls(f, false)
		n.mountOver(bridgeSysctls, "none", "tmpfs", 0)

		log, logged := logs(t)
		require.NoError(t, n.add(n.manager(log), "id", n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80})))
		n.answers(n.Pods[1].Namespace, "tcp", netip.AddrPortFrom(n.nodeIP(f), 8080), "web")
		assert.NotContains(t, logged(), "The interface to a pod is not known")
	})
}

// Whether bridges call iptables is looked at again by Run where it could not be found out, be
// it for Add or for rows from before.
func TestBridgesLookedAtAgain(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node, f IPFamily) {
		n.serve(0, "tcp", f, 80)
		n.bridgeCalls(f, true)

		pod := n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80})
		unreadable := func(n *node) (show func()) {
			n.t.Helper()

			file := bridgeSysctls + "/bridge-nf-call-" + map[IPFamily]string{IPv4: "iptables", IPv6: "ip6tables"}[f]

			return n.mountOver(file, "/proc/self/mem", "", unix.MS_BIND) // which has nothing at 0
		}
		seenAgain := func(n *node, m *Manager, show func()) {
			n.t.Helper()

			fm := m.families[slices.Index([]IPFamily{IPv4, IPv6}, f)]
			n.runOnce(fm, false)
			assert.False(n.t, n.masqueradesNeighbours(f))
			show()
			n.bridgeCalls(f, false)
			n.runOnce(fm, false)
			n.answers(n.Pods[1].Namespace, "tcp", netip.AddrPortFrom(n.nodeIP(f), 8080), "web")
		}

		t.Run("rows from before", func(t *testing.T) {
			n := n.within(t)
			n.leftBehind("id", pod)

			show := unreadable(n)
			m := n.manager()
			seenAgain(n, m, show)
			require.NoError(t, n.remove(m, "id", nil))
			require.NoError(t, m.Close())
		})
		t.Run("Add", func(t *testing.T) {
			n := n.within(t)
			n.bridgeCalls(f, true)

			show := unreadable(n)
			log, logged := logs(t)
			m := n.manager(log)
			require.NoError(t, n.add(m, "id", pod))
			assert.Contains(t, logged(), "The interface to a pod is not known")
			seenAgain(n, m, show)
		})
	})
}

// Connections of others between neighbours keep their source.
func TestNeighboursOfOthers(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node, f IPFamily) {
		n.serve(0, "tcp", f, 80)
		n.serve(0, "tcp", f, 81)
		n.bridgeCalls(f, false)

		m := n.manager()
		require.NoError(t, n.add(m, "id", n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80})))

		a := n.answers(n.Pods[1].Namespace, "tcp", netip.AddrPortFrom(n.Pods[0].IP(f == IPv6), 81), "web")
		assert.Equal(t, n.Pods[1].IP(f == IPv6), a.Source.Addr())
		a = n.answers(n.Client, "tcp", netip.AddrPortFrom(n.Pods[0].IP(f == IPv6), 80), "web")
		assert.Equal(t, n.ClientIP(f == IPv6), a.Source.Addr())
	})
}

// Whatever has the numbers of a closed manager's files next keeps them when it is closed
// again.
func TestCloseAgain(t *testing.T) {
	n := anyNode(t)
	m := n.manager()
	require.NoError(t, n.add(m, "id", n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80}, &PortMapping{HostPort: 8080, ContainerPort: 80, Protocol: "UDP"})))
	require.NoError(t, n.remove(m, "id", nil))
	require.NoError(t, m.Close())

	var files []*os.File

	for range 50 {
		f, err := os.Open(os.DevNull)
		require.NoError(t, err)

		files = append(files, f)
	}

	require.NoError(t, m.Close())

	for _, f := range files {
		assert.NoError(t, f.Close())
	}
}

// An interface that is made again may be another kind of thing, for Add as well once Run has
// looked.
func TestInterfaceMadeAgain(t *testing.T) {
	n := anyNode(t)
	n.bridgeCalls(IPv4, false)

	m := n.manager()
	add := func(id string, pod int) {
		n.do(func() {
			require.NoError(t, m.Add(id, n.pod(pod, IPv4, &PortMapping{HostPort: 8080 + int32(pod), ContainerPort: 80}), "d0"))
		})
	}

	n.do(func() {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "d0"
		require.NoError(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "d1"}))
	})
	add("a", 0)
	assert.False(t, n.masqueradesNeighbours(IPv4))
	require.NoError(t, n.Host.RemoveDevice("d0"))
	require.NoError(t, n.Host.AddDevice("d0", true)) // a bridge
	n.runOnce(m.families[0], false)
	add("b", 1)
	assert.True(t, n.masqueradesNeighbours(IPv4))
}

// An interface that is made again may be another kind of thing.
func TestLinksLookAgain(t *testing.T) {
	n := anyNode(t)

	l := links.New(IPv4)
	defer l.Close()

	n.bridgeCalls(IPv4, false)
	require.NoError(t, n.Host.AddDevice("d0", true))
	n.do(func() {
		bypassed, err := l.Bypassed("d0")
		require.NoError(t, err)
		assert.True(t, bypassed)

		link, err := netlink.LinkByName("d0")
		require.NoError(t, err)
		require.NoError(t, netlink.LinkDel(link))

		attrs := netlink.NewLinkAttrs()
		attrs.Name = "d0"
		require.NoError(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "d1"}))
		l.Forget()

		bypassed, err = l.Bypassed("d0")
		require.NoError(t, err)
		assert.False(t, bypassed, "it leads to one pod")
	})
}
