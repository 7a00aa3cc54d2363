package hostport

import (
	"context"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	v1 "k8s.io/api/core/v1"

	"github.com/cri-o/hostport/internal/localhost"
	"github.com/cri-o/hostport/internal/testbed"
)

// The tests that runtimes are tested with, as far as they concern host ports.

// serveHTTP has a pod answer HTTP requests until the test ends.
func (n *node) serveHTTP(pod *testbed.Pod, port string) {
	n.t.Helper()

	server := &http.Server{
		ReadHeaderTimeout: patience,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			_, _ = w.Write([]byte("ok"))
		}),
	}

	require.NoError(n.t, pod.Do(func() error {
		l, err := (&net.ListenConfig{}).Listen(n.t.Context(), "tcp", net.JoinHostPort(pod.IPv4.String(), port))
		if err == nil {
			go func() { _ = server.Serve(l) }() // ends with Close
		}

		return err
	}))
	n.t.Cleanup(func() { assert.NoError(n.t, server.Close()) })
}

// answersHTTP asserts that a request from the host is answered with 200.
func (n *node) answersHTTP(url string) {
	n.t.Helper()

	// The client dials in a goroutine of its own, whose thread is elsewhere.
	dial := func(ctx context.Context, network, addr string) (conn net.Conn, err error) {
		err = n.Host.Do(func() error {
			conn, err = (&net.Dialer{}).DialContext(ctx, network, addr)

			return err
		})

		return conn, err
	}
	transport := &http.Transport{DialContext: dial}
	defer transport.CloseIdleConnections()

	client := &http.Client{Transport: transport, Timeout: patience}

	answer, err := client.Get(url)
	if assert.NoError(n.t, err) {
		assert.Equal(n.t, http.StatusOK, answer.StatusCode)
		require.NoError(n.t, answer.Body.Close())
	}
}

// critest: runtime should support port mapping with host port and container port.
func TestCritestHostPortAndContainerPort(t *testing.T) {
	eachBackend(t, func(t *testing.T, n *node) {
		n.serveHTTP(n.Pods[0], "80")
		require.NoError(t, n.add(n.manager(), "id", n.pod(0, IPv4, &PortMapping{HostPort: 12000, ContainerPort: 80})))
		n.answersHTTP("http://127.0.0.1:12000")
	})
}

// critest: runtime should support port mapping with only container port.
func TestCritestOnlyContainerPort(t *testing.T) {
	eachBackend(t, func(t *testing.T, n *node) {
		n.serveHTTP(n.Pods[0], "80")

		m := n.manager()
		require.NoError(t, n.add(m, "id", n.pod(0, IPv4, &PortMapping{ContainerPort: 80})))
		n.answersHTTP("http://" + net.JoinHostPort(n.Pods[0].IPv4.String(), "80"))
		assert.Empty(t, m.Mappings())
	})
}

// Kubernetes: HostPort validates that there is no conflict between pods with
// same hostPort but different hostIP and protocol.
func TestKubernetesSamePortOtherAddressAndProtocol(t *testing.T) {
	eachBackend(t, func(t *testing.T, n *node) {
		_, err := n.AddPod("third")
		require.NoError(t, err)

		m := n.manager()
		nodeIP := n.nodeIP(IPv4)

		for i, pm := range []*PortMapping{{HostIP: "127.0.0.1"}, {HostIP: nodeIP.String()}, {HostIP: nodeIP.String(), Protocol: "UDP"}} {
			n.serve(i, "tcp", IPv4, 8080)
			n.serve(i, "udp", IPv4, 8080)

			pm.HostPort, pm.ContainerPort = 54323, 8080
			require.NoError(t, n.add(m, n.Pods[i].Name, n.pod(i, IPv4, pm)))
		}

		a, err := n.Host.AskFrom(t.Context(), "tcp", netip.AddrPortFrom(nodeIP, 0), netip.MustParseAddrPort("127.0.0.1:54323"))
		require.NoError(t, err)
		assert.Equal(t, "web", a.From)
		n.answers(n.Host, "tcp", netip.AddrPortFrom(nodeIP, 54323), "other")
		n.answers(n.Host, "udp", netip.AddrPortFrom(nodeIP, 54323), "third")
	})
}

// Kubernetes: HostPort validates that there is conflict between pods with same
// hostPort and protocol but one using 0.0.0.0 hostIP.
func TestKubernetesConflictWithAnyAddress(t *testing.T) {
	eachNode(t, func(t *testing.T, n *node) {
		n.serve(0, "tcp", IPv4, 8080)

		m := n.manager()
		first := n.pod(0, IPv4, &PortMapping{HostPort: 54322, ContainerPort: 8080, HostIP: "0.0.0.0"})
		require.NoError(t, n.add(m, "first", first))

		err := n.add(m, "second", n.pod(1, IPv4, &PortMapping{HostPort: 54322, ContainerPort: 8080, HostIP: "127.0.0.1"}))
		conflict := (*ConflictError)(nil)
		require.ErrorAs(t, err, &conflict)
		assert.Equal(t, "ns/web", conflict.OtherPod)
		n.answers(n.Host, "tcp", netip.MustParseAddrPort("127.0.0.1:54322"), "web")
	})
}

// Kubernetes: SCTP [LinuxOnly] should create a Pod with SCTP HostPort, which
// must not load the module.
func TestKubernetesSCTPHostPort(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node, f IPFamily) {
		known := func() bool { // a socket of the protocol would have made it so
			protocols, err := os.ReadFile("/proc/net/protocols")
			require.NoError(t, err)

			return slices.ContainsFunc(strings.Split(string(protocols), "\n"), func(line string) bool { return strings.HasPrefix(line, "SCTP") })
		}
		before := known()

		m := n.manager()
		require.NoError(t, n.add(m, "id", n.pod(0, f, &PortMapping{HostPort: 5060, ContainerPort: 5060, Protocol: "SCTP"})))
		assert.Equal(t, before, known())

		mappings := m.Mappings()
		require.Len(t, mappings, 1)
		assert.False(t, mappings[0].Held)
		assert.NotEmpty(t, n.leftOver(f))
	})
}

// CRI-O: connect to pod hostport from the host, at the node's own address.
func TestCRIOHostPortAtNodeAddress(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node, f IPFamily) {
		n.serve(0, "tcp", f, 7777)
		require.NoError(t, n.add(n.manager(), "id", n.pod(0, f, &PortMapping{HostPort: 4888, ContainerPort: 7777})))
		n.answers(n.Host, "tcp", netip.AddrPortFrom(n.nodeIP(f), 4888), "web")
	})
}

// And those that nobody tests, until they happen.

// A pod on two networks, with rows at its address in each, on a node with strict
// reverse path filtering. Its own way out is the first: answers to others that
// come by the second go there, and are dropped by such a node.
func TestTwoNetworks(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node, f IPFamily) {
		second, err := n.SecondNetwork(n.Pods[0])
		require.NoError(t, err)

		filter := func(value string) {
			for _, key := range []string{"all", "cni0", "cni1", "eth0"} {
				n.sysctl("net/ipv4/conf/"+key+"/rp_filter", value)
			}
		}

		m := n.manager()
		secondIP := second(f == IPv6)

		for _, network := range []string{"tcp", "udp"} {
			filter("1")
			n.serve(0, network, f, 80)

			_, err := n.Pods[0].Serve(network, netip.AddrPortFrom(secondIP, 80))
			require.NoError(t, err)

			require.NoError(t, n.add(m, "id", n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80, Protocol: v1.Protocol(network)})))

			pod := n.pod(0, f, &PortMapping{HostPort: 8081, ContainerPort: 80, Protocol: v1.Protocol(network)})
			pod.IP = secondIP.AsSlice()
			require.NoError(t, n.add(m, "id", pod))

			n.answers(n.Client, network, netip.AddrPortFrom(n.nodeIP(f), 8080), "web")
			n.answers(n.Host, network, netip.AddrPortFrom(n.nodeIP(f), 8080), "web")

			if f == IPv4 {
				for _, to := range []string{"127.0.0.1:8080", "127.0.0.1:8081"} {
					n.answers(n.Host, network, netip.MustParseAddrPort(to), "web")
				}
			}

			filter("0") // which IPv6 does not have, and then it does not matter
			n.answers(n.Client, network, netip.AddrPortFrom(n.nodeIP(f), 8081), "web")
			n.answers(n.Host, network, netip.AddrPortFrom(n.nodeIP(f), 8081), "web")
		}
	})
}

// A row for an address that comes to the node and goes again.
func TestAddressMoves(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node, f IPFamily) {
		n.serve(0, "tcp", f, 80)

		vip := netip.MustParsePrefix("192.0.2.99/24")
		if f == IPv6 {
			vip = netip.MustParsePrefix("2001:db8:1::99/64")
		}

		to := netip.AddrPortFrom(vip.Addr(), 8080)
		m := n.manager()
		require.NoError(t, n.add(m, "id", n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80, HostIP: vip.Addr().String()})))

		for range 2 {
			require.NoError(t, n.Host.AddAddress("eth0", vip))
			n.answers(n.Client, "tcp", to, "web")
			n.answers(n.Host, "tcp", to, "web")
			n.answers(n.Pods[1].Namespace, "tcp", to, "web")
			require.NoError(t, n.Host.RemoveAddress("eth0", vip))

			// Another machine has it: what is for that one is not touched.
			require.NoError(t, n.Client.AddAddress("eth0", vip))

			s, err := n.Client.Serve("tcp", to)
			require.NoError(t, err)
			n.answers(n.Host, "tcp", to, "client")
			n.answers(n.Pods[1].Namespace, "tcp", to, "client")
			require.NoError(t, s.Close())
			require.NoError(t, n.Client.RemoveAddress("eth0", vip))
		}
	})
}

// The address of a pod that has gone is another's a second later.
func TestPodIPIsReused(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node, f IPFamily) {
		to := netip.AddrPortFrom(n.nodeIP(f), 5353)

		for _, network := range []string{"tcp", "udp"} {
			n.serve(0, network, f, 53)
		}

		m := n.manager()
		both := []*PortMapping{{HostPort: 5353, ContainerPort: 53}, {HostPort: 5353, ContainerPort: 53, Protocol: "UDP"}}
		require.NoError(t, n.add(m, "stays", n.pod(1, f, &PortMapping{HostPort: 7777, ContainerPort: 53, Protocol: "UDP"})))
		require.NoError(t, n.add(m, "old", n.pod(0, f, both...)))

		s := n.send(to)
		s.reaches(t, "web")
		n.answers(n.Client, "tcp", to, "web")

		require.NoError(t, n.remove(m, "old", nil))
		require.NoError(t, n.ReplacePod(0, "new"))

		service, err := n.Pods[0].Serve("udp", netip.AddrPortFrom(n.Pods[0].IP(f == IPv6), 53))
		require.NoError(t, err)
		n.serve(0, "tcp", f, 53)
		n.refused(n.Client, "tcp", to)
		n.answers(n.Client, "udp", netip.AddrPortFrom(n.Pods[0].IP(f == IPv6), 53), "new") // it is there, and can be reached

		s.goesOn(t)
		assert.EqualValues(t, 1, service.Count())

		require.NoError(t, n.add(m, "new", n.pod(0, f, both...)))
		s.reaches(t, "new")
		n.answers(n.Client, "tcp", to, "new")
	})
}

// A node that does not forward is told of once.
func TestNodeDoesNotForward(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node, f IPFamily) {
		n.serve(0, "tcp", f, 80)

		for _, off := range []bool{false, true} {
			if off {
				n.sysctl(strings.TrimPrefix(localhost.Forwarding(f), "/proc/sys/"), "0")
			}

			log, logged := logs(n.t)
			m := n.manager(log)

			for _, port := range []int32{8080, 8081} {
				require.NoError(t, n.add(m, "id", n.pod(0, f, &PortMapping{HostPort: port, ContainerPort: 80})))
			}

			warnings := strings.Count(logged(), "does not forward")
			if off {
				assert.Equal(t, 1, warnings)
				n.answers(n.Host, "tcp", netip.AddrPortFrom(n.nodeIP(f), 8080), "web")
			} else {
				assert.Zero(t, warnings)
				n.answers(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(f), 8080), "web")
			}

			require.NoError(t, m.Close())
		}
	})
}
