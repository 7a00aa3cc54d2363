package interop

import (
	"net"
	"slices"
	"strconv"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	"sigs.k8s.io/knftables"

	"github.com/cri-o/hostport"
)

// eachFamily runs f as a subtest for each family.
func eachFamily(n *node, f func(t *testing.T, n *node, family knftables.Family)) {
	n.t.Helper()

	for _, family := range families() {
		n.t.Run(string(family), func(t *testing.T) { f(t, &node{Bed: n.Bed, t: t}, family) })
	}
}

// What CRI-O lists, and removes by, is what hostport has added.
func TestKnftablesListsOurElements(t *testing.T) {
	n := newNode(t)
	m := n.manager()

	eachFamily(n, func(t *testing.T, n *node, f knftables.Family) {
		var (
			ids             = []string{web: webID, other: otherID}
			nodeIP, otherIP = n.NodeIP(isV6(f)).String(), n.OtherNodeIP(isV6(f)).String()
			adds            = make([][]*hostport.PortMapping, len(ids))
			want            = []string{n.hairpin(webID, web, f), n.hairpin(otherID, other, f)}
		)

		for _, row := range []struct {
			pod     int
			mapping hostport.PortMapping
			set     string
			key     []string
		}{
			{web, hostport.PortMapping{HostPort: 8080, ContainerPort: 80}, hostPorts, []string{"tcp", "8080"}},
			{web, hostport.PortMapping{HostPort: 8080, ContainerPort: 81, Protocol: "UDP"}, hostPorts, []string{"udp", "8080"}},
			{web, hostport.PortMapping{HostPort: 8080, ContainerPort: 82, Protocol: "SCTP"}, hostPorts, []string{"sctp", "8080"}},
			{web, hostport.PortMapping{HostPort: 1, ContainerPort: 65535, HostIP: anyIP(f)}, hostPorts, []string{"tcp", "1"}},
			// Beside the pod's own row for any address.
			{web, hostport.PortMapping{HostPort: 8080, ContainerPort: 83, HostIP: otherIP}, hostIPPorts, []string{otherIP, "tcp", "8080"}},
			{web, hostport.PortMapping{HostPort: 8081, ContainerPort: 84, HostIP: otherIP, Protocol: "UDP"}, hostIPPorts, []string{otherIP, "udp", "8081"}},
			{web, hostport.PortMapping{HostPort: 8081, ContainerPort: 85, HostIP: nodeIP, Protocol: "SCTP"}, hostIPPorts, []string{nodeIP, "sctp", "8081"}},
			{other, hostport.PortMapping{HostPort: 65535, ContainerPort: 1}, hostPorts, []string{"tcp", "65535"}},
			// Beside the other pod's row for another address.
			{other, hostport.PortMapping{HostPort: 8081, ContainerPort: 86, HostIP: nodeIP, Protocol: "UDP"}, hostIPPorts, []string{nodeIP, "udp", "8081"}},
		} {
			adds[row.pod] = append(adds[row.pod], &row.mapping)
			value := []string{n.podIP(row.pod, f).String(), strconv.Itoa(int(row.mapping.ContainerPort))}
			want = append(want, element(row.set, hashOf(ids[row.pod]), row.key, value))
		}

		for i, id := range ids {
			n.add(m, id, i, f, adds[i]...)
		}

		assert.Equal(t, slices.Sorted(slices.Values(want)), n.elements(f))
	})
}

// A node goes from hostport to CRI-O and back.
func TestCRIORemovesOurs(t *testing.T) {
	n := newNode(t)

	_, err := n.AddPod("late")
	require.NoError(t, err)

	for i := range n.Pods {
		n.serve(i, 80)
	}

	m := n.manager()

	for _, f := range families() {
		n.add(m, webID, web, f, podMappings(n, f, 8080)...)
		n.add(m, otherID, other, f, podMappings(n, f, 9090)...)
	}

	require.NoError(t, m.Close())

	eachFamily(n, func(t *testing.T, n *node, f knftables.Family) {
		c := n.crio(f)
		c.remove(webID)

		assert.Equal(t, slices.Sorted(slices.Values(n.podElements(otherID, other, f, 9090))), n.elements(f))
		n.gone(f, 8080)
		n.works(other, f, 9090)

		// To add, CRI-O makes all it needs anew, over what is there.
		c.add(lateID, late, podMappings(n, f, 7070)...)

		assert.Equal(t, slices.Sorted(slices.Values(append(
			n.podElements(otherID, other, f, 9090), n.podElements(lateID, late, f, 7070)...))), n.elements(f))
		n.gone(f, 8080)
		n.works(other, f, 9090)
		n.works(late, f, 7070)
	})

	var want []hostport.Mapping
	for _, f := range families() {
		want = append(want, n.podMappingsListed(otherID, other, f, 9090)...)
		want = append(want, n.podMappingsListed(lateID, late, f, 7070)...)
	}

	assert.ElementsMatch(t, want, n.manager().Mappings())
}

// A node goes from CRI-O to hostport.
func TestWeAdoptCRIOs(t *testing.T) {
	n := newNode(t)
	n.serve(web, 80)
	n.serve(other, 80)

	var want []hostport.Mapping

	for _, f := range families() {
		c := n.crio(f)
		c.add(webID, web, podMappings(n, f, 8080)...)
		c.add(otherID, other, podMappings(n, f, 9090)...)

		want = append(want, n.podMappingsListed(webID, web, f, 8080)...)
		want = append(want, n.podMappingsListed(otherID, other, f, 9090)...)
	}

	// CRI-O's rule for a pod that reaches itself never matches.
	eachFamily(n, func(_ *testing.T, n *node, f knftables.Family) {
		for _, network := range []string{"tcp", "udp"} {
			n.unanswered(n.Pods[web].Namespace, network, n.at(f, 8080))
		}
	})

	m := n.manager()
	assert.ElementsMatch(t, want, m.Mappings())

	eachFamily(n, func(t *testing.T, n *node, f knftables.Family) {
		n.held(f, 8080)
		n.held(f, 9090)
		n.works(web, f, 8080)
		n.works(other, f, 9090)

		for _, network := range []string{"tcp", "udp"} {
			a := n.answers(n.Pods[web].Namespace, network, n.at(f, 8080), "web")
			assert.NotEqual(t, n.podIP(web, f), a.Source.Addr(), "a pod that reaches itself is masqueraded")
		}

		// CRI-O's elements are what hostport would have made itself.
		before := n.elements(f)
		n.add(m, webID, web, f, podMappings(n, f, 8080)...)
		assert.Equal(t, before, n.elements(f))
	})

	for i, mapping := range want {
		if mapping.PodIDHash == hashOf(webID) {
			want[i].PodID, want[i].Namespace, want[i].Name = webID, "ns", "web"
		}
	}

	assert.ElementsMatch(t, want, m.Mappings(), "the pod added is known by name")

	// To the next manager either pod is a hash again. It takes out the rows of one.
	require.NoError(t, m.Close())
	m = n.manager()
	n.do(func() { require.NoError(t, m.Remove(otherID, nil)) })

	want = nil
	for _, f := range families() {
		want = append(want, n.podMappingsListed(webID, web, f, 8080)...)
	}

	assert.ElementsMatch(t, want, m.Mappings())

	eachFamily(n, func(t *testing.T, n *node, f knftables.Family) {
		assert.Equal(t, slices.Sorted(slices.Values(n.podElements(webID, web, f, 8080))), n.elements(f))
		n.works(web, f, 8080)
		n.gone(f, 9090)
	})
}

// podMappings are the rows of a pod in two tests: three for any address, and two
// on the port behind for the node's other one.
func podMappings(n *node, f knftables.Family, port int32) []*hostport.PortMapping {
	otherIP := n.OtherNodeIP(isV6(f)).String()

	return []*hostport.PortMapping{
		{HostPort: port, ContainerPort: 80, Protocol: v1.ProtocolTCP},
		{HostPort: port, ContainerPort: 80, Protocol: v1.ProtocolUDP},
		{HostPort: port, ContainerPort: 80, Protocol: v1.ProtocolSCTP},
		{HostPort: port + 1, ContainerPort: 80, Protocol: v1.ProtocolTCP, HostIP: otherIP},
		{HostPort: port + 1, ContainerPort: 80, Protocol: v1.ProtocolUDP, HostIP: otherIP},
	}
}

// podElements are the lines of elements that stand for podMappings.
func (n *node) podElements(id string, i int, f knftables.Family, port int) []string {
	var (
		hash      = hashOf(id)
		otherIP   = n.OtherNodeIP(isV6(f)).String()
		at, above = strconv.Itoa(port), strconv.Itoa(port + 1)
		pod       = []string{n.podIP(i, f).String(), "80"}
	)

	return []string{
		element(hostPorts, hash, []string{"tcp", at}, pod),
		element(hostPorts, hash, []string{"udp", at}, pod),
		element(hostPorts, hash, []string{"sctp", at}, pod),
		element(hostIPPorts, hash, []string{otherIP, "tcp", above}, pod),
		element(hostIPPorts, hash, []string{otherIP, "udp", above}, pod),
		n.hairpin(id, i, f),
	}
}

// podMappingsListed is how hostport lists podMappings, without the pod's name.
func (n *node) podMappingsListed(id string, i int, f knftables.Family, port int32) []hostport.Mapping {
	otherIP := n.OtherNodeIP(isV6(f)).String()

	return []hostport.Mapping{
		n.mapping(id, i, f, v1.ProtocolTCP, anyIP(f), port),
		n.mapping(id, i, f, v1.ProtocolUDP, anyIP(f), port),
		n.mapping(id, i, f, v1.ProtocolSCTP, anyIP(f), port),
		n.mapping(id, i, f, v1.ProtocolTCP, otherIP, port+1),
		n.mapping(id, i, f, v1.ProtocolUDP, otherIP, port+1),
	}
}

// works asserts that podMappings lead to the i-th pod.
func (n *node) works(i int, f knftables.Family, port uint16) {
	n.t.Helper()

	for _, network := range []string{"tcp", "udp"} {
		n.reached(network, n.at(f, port), i)
		n.reached(network, n.atOther(f, port), i)
		n.reached(network, n.atOther(f, port+1), i)
		n.refused(network, n.at(f, port+1))
	}
}

// gone asserts that podMappings lead nowhere.
func (n *node) gone(f knftables.Family, port uint16) {
	n.t.Helper()

	for _, network := range []string{"tcp", "udp"} {
		n.refused(network, n.at(f, port))
		n.refused(network, n.atOther(f, port))
		n.refused(network, n.atOther(f, port+1))
	}
}

// held asserts that no other process gets the ports of podMappings.
func (n *node) held(f knftables.Family, port uint16) {
	n.t.Helper()

	var config net.ListenConfig

	n.do(func() {
		for _, to := range []string{n.at(f, port).String(), n.atOther(f, port+1).String()} {
			_, err := config.Listen(n.t.Context(), "tcp", to)
			assert.ErrorIs(n.t, err, unix.EADDRINUSE, "tcp %s", to)

			_, err = config.ListenPacket(n.t.Context(), "udp", to)
			assert.ErrorIs(n.t, err, unix.EADDRINUSE, "udp %s", to)
		}
	})
}
