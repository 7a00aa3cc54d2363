package interop

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	v1 "k8s.io/api/core/v1"
	"k8s.io/klog/v2/ktesting"
	"sigs.k8s.io/knftables"

	"github.com/cri-o/hostport"
	"github.com/cri-o/hostport/internal/testbed"
)

// What a Service has is the Service's, whoever came first: a pod must not get at
// its traffic by asking for a host port (CVE-2019-9946).
//
// Where two programs for iptables are at work, or one beside kube-proxy's
// nftables, the kernel has two hooks of one priority, and takes the newest first.
// The rules of iptables cannot be given another.
func TestServicesComeFirst(t *testing.T) {
	const ours, theirs = "host port", "Service"

	for _, proxy := range []kubeProxy{proxyNFTables, proxyIPTablesNFT, proxyIPTablesLegacy} {
		for _, via := range []string{viaNFTables, viaIPTablesNFT, viaIPTablesLegacy} {
			for _, first := range []string{ours, theirs} {
				t.Run("kube-proxy "+string(proxy)+"/"+via+"/first the "+first, func(t *testing.T) {
					n := newNode(t)

					_, err := n.AddPod("late")
					require.NoError(t, err)

					for i := range n.Pods {
						n.serve(i, 80)
					}

					if first == theirs {
						n.startKubeProxy(proxy)
					}

					n.addOverService(n.managerVia(via))

					if first == ours {
						n.startKubeProxy(proxy)
					}

					winner := other // the Service's endpoint
					if orderDecides := via != viaNFTables && via != string(proxy); orderDecides && first == theirs {
						winner = web
					}

					n.serviceReaches(winner)
				})
			}
		}
	}
}

// A node goes from hostport to CRI-O, whose host ports come before Services that
// were there before it, and back.
func TestServicesComeFirstAfterCRIO(t *testing.T) {
	n := newNode(t)

	_, err := n.AddPod("late")
	require.NoError(t, err)

	for i := range n.Pods {
		n.serve(i, 80)
	}

	n.startKubeProxy(proxyNFTables)

	for range 2 {
		m := n.manager()
		n.addOverService(m)
		n.serviceReaches(other)
		require.NoError(t, m.Close())

		for _, f := range families() {
			n.crio(f).add(lateID, late, podMappings(n, f, 7070)...)
		}

		n.serviceReaches(web)

		m = n.manager() // which takes over what it finds
		n.serviceReaches(other)

		eachFamily(n, func(_ *testing.T, n *node, f knftables.Family) {
			n.works(late, f, 7070)
		})
		require.NoError(t, m.Close())

		eachFamily(n, func(_ *testing.T, n *node, f knftables.Family) {
			n.crio(f).remove(lateID)
			n.gone(f, 7070)
		})
	}
}

// The backends, by the name of the program that makes the same.
const (
	viaNFTables       = "nft"
	viaIPTablesNFT    = "iptables-nft"
	viaIPTablesLegacy = "iptables-legacy"
)

// managerVia is a manager with one of the backends, which for iptables the
// kubelet's hint leads to.
func (n *node) managerVia(via string) *hostport.Manager {
	n.t.Helper()

	if via == viaNFTables {
		return n.manager()
	}

	for _, program := range []string{via, strings.Replace(via, "ip", "ip6", 1)} {
		n.command("", program, "-t", "mangle", "-N", "KUBE-IPTABLES-HINT")
	}

	var m *hostport.Manager

	n.do(func() {
		var err error
		m, err = hostport.New(
			hostport.WithBackend(hostport.BackendIPTables),
			hostport.WithLogger(ktesting.NewLogger(n.t, ktesting.NewConfig(ktesting.Verbosity(2)))))
		require.NoError(n.t, err)
	})
	n.t.Cleanup(func() { assert.NoError(n.t, m.Close()) })

	return m
}

// addOverService adds a pod with the ports that the Service has, and one of its
// own.
func (n *node) addOverService(m *hostport.Manager) {
	n.t.Helper()

	for _, f := range families() {
		n.add(m, webID, web, f,
			&hostport.PortMapping{HostPort: nodePort, ContainerPort: 80},
			&hostport.PortMapping{HostPort: nodePort, ContainerPort: 80, Protocol: v1.ProtocolUDP},
			&hostport.PortMapping{HostPort: externalPort, ContainerPort: 80},
			&hostport.PortMapping{HostPort: externalPort, ContainerPort: 80, HostIP: n.OtherNodeIP(isV6(f)).String()},
			&hostport.PortMapping{HostPort: 8080, ContainerPort: 80})
	}
}

// serviceReaches asserts that what is the Service's leads to the i-th pod, and the
// rest of addOverService to the pod that it is of.
func (n *node) serviceReaches(i int) {
	n.t.Helper()

	for _, f := range families() {
		for _, from := range n.clients() {
			n.answers(from, "tcp", n.at(f, nodePort), n.Pods[i].Name)
			n.answers(from, "udp", n.at(f, nodePort), n.Pods[i].Name)
			n.answers(from, "tcp", n.atOther(f, externalPort), n.Pods[i].Name)

			n.answers(from, "tcp", n.at(f, externalPort), n.Pods[web].Name)
			n.answers(from, "tcp", n.at(f, 8080), n.Pods[web].Name)
		}
	}
}

// clients are who asks: one outside, the node itself and a pod.
func (n *node) clients() []*testbed.Namespace {
	return []*testbed.Namespace{n.Client, n.Host, n.Pods[late].Namespace}
}
