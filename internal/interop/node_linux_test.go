package interop

import (
	"context"
	"crypto/sha256"
	"encoding/base32"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	v1 "k8s.io/api/core/v1"
	"k8s.io/klog/v2/ktesting"
	"sigs.k8s.io/knftables"

	"github.com/cri-o/hostport"
	"github.com/cri-o/hostport/internal/testbed"
)

// The names in the kernel. They are written out again here: that hostport has
// the same is what the tests are about.
const (
	tableName   = "crio-hostports"
	hostPorts   = "hostports"
	hostIPPorts = "hostipports"
	hairpins    = "hairpins"
)

// Sandbox ids, as long as real ones.
const (
	webID   = "7c1f4e0b8a5d3962f0e1d2c3b4a5968778695a4b3c2d1e0f26939d5a8b0e4f1c"
	otherID = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	lateID  = "fedcba9876543210fedcba9876543210fedcba9876543210fedcba9876543210"
)

// Indexes of the node's pods.
const (
	web   = 0
	other = 1
	late  = 2 // where there is a third one
)

// families are those that everything is done in; a family's name is nft's.
func families() []knftables.Family {
	return []knftables.Family{knftables.IPv4Family, knftables.IPv6Family}
}

func isV6(f knftables.Family) bool { return f == knftables.IPv6Family }

// node is a host under test, with two pods behind it and a client before it.
// What touches its network runs in its namespace by way of do.
type node struct {
	*testbed.Bed

	t *testing.T
}

// newNode makes a node with two pods, web and other, without any rules.
func newNode(t *testing.T) *node {
	t.Helper()

	bed, err := testbed.New("web", "other")
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, bed.Close()) })

	return &node{Bed: bed, t: t}
}

// do runs f in the host's namespace, and so do the programs that f starts: a
// child process inherits the namespace of the thread that forks it.
func (n *node) do(f func()) {
	n.t.Helper()
	require.NoError(n.t, n.Host.Do(func() error {
		f()

		return nil
	}))
}

// manager returns a new hostport.Manager on the node.
func (n *node) manager() *hostport.Manager {
	n.t.Helper()

	var m *hostport.Manager

	n.do(func() {
		var err error
		m, err = hostport.New(
			hostport.WithBackend(hostport.BackendNFTables),
			hostport.WithLogger(ktesting.NewLogger(n.t, ktesting.NewConfig(ktesting.Verbosity(2)))))
		require.NoError(n.t, err)
	})
	n.t.Cleanup(func() { assert.NoError(n.t, m.Close()) })

	return m
}

// add has hostport add the rows of the node's i-th pod in one family.
func (n *node) add(m *hostport.Manager, id string, i int, f knftables.Family, mappings ...*hostport.PortMapping) {
	n.t.Helper()

	pod := &hostport.PodPortMapping{Namespace: "ns", Name: n.Pods[i].Name, IP: n.podIP(i, f).AsSlice(), PortMappings: mappings}

	n.do(func() { require.NoError(n.t, m.Add(id, pod, "")) })
}

// knftables is the family's table as CRI-O sees it.
func (n *node) knftables(f knftables.Family) knftables.Interface {
	n.t.Helper()

	var nft knftables.Interface

	n.do(func() {
		var err error
		nft, err = knftables.New(f, tableName)
		require.NoError(n.t, err)
	})

	return nft
}

// elements is everything that knftables lists of a family's maps and its set, a
// line for each element, in the order of the lines.
func (n *node) elements(f knftables.Family) []string {
	n.t.Helper()

	nft := n.knftables(f)

	var lines []string

	n.do(func() {
		for _, name := range []string{hostPorts, hostIPPorts, hairpins} {
			kind := "map"
			if name == hairpins {
				kind = "set"
			}

			list, err := nft.ListElements(n.t.Context(), kind, name)
			require.NoError(n.t, err)

			for _, e := range list {
				require.NotNil(n.t, e.Comment, "of %s %v", name, e.Key)
				lines = append(lines, element(name, *e.Comment, e.Key, e.Value))
			}
		}
	})

	return slices.Sorted(slices.Values(lines))
}

// element is a line of elements.
func element(set, comment string, key, value []string) string {
	line := set + " " + comment + " " + strings.Join(key, " . ")
	if len(value) > 0 {
		line += " : " + strings.Join(value, " . ")
	}

	return line
}

// hairpin is the line of the element that is to let the i-th pod reach itself.
func (n *node) hairpin(id string, i int, f knftables.Family) string {
	ip := n.podIP(i, f).String()

	return element(hairpins, hashOf(id), []string{ip, ip}, nil)
}

// hashOf is what an element's comment has of a sandbox id.
func hashOf(id string) string {
	sum := sha256.Sum256([]byte(id))

	return base32.StdEncoding.EncodeToString(sum[:])[:16]
}

func (n *node) podIP(i int, f knftables.Family) netip.Addr { return n.Pods[i].IP(isV6(f)) }

// at is an address of the node, with a port.
func (n *node) at(f knftables.Family, port uint16) netip.AddrPort {
	return netip.AddrPortFrom(n.NodeIP(isV6(f)), port)
}

// atOther is the node's other address, with a port.
func (n *node) atOther(f knftables.Family, port uint16) netip.AddrPort {
	return netip.AddrPortFrom(n.OtherNodeIP(isV6(f)), port)
}

// serve answers over TCP and UDP on a port of the i-th pod until the test ends.
func (n *node) serve(i int, port uint16) {
	n.t.Helper()

	for _, f := range families() {
		for _, network := range []string{"tcp", "udp"} {
			_, err := n.Pods[i].Serve(network, netip.AddrPortFrom(n.podIP(i, f), port))
			require.NoError(n.t, err)
		}
	}
}

const (
	// patience bounds what a test waits for that must come.
	patience = 3 * time.Second
	// silence is how long a test waits for what must not come. Answers in the
	// bed take microseconds.
	silence = 300 * time.Millisecond
)

// answers asserts that a request is answered, by whom, and returns how.
func (n *node) answers(from *testbed.Namespace, network string, to netip.AddrPort, by string) testbed.Answer {
	n.t.Helper()

	ctx, cancel := context.WithTimeout(n.t.Context(), patience)
	defer cancel()

	a, err := from.Ask(ctx, network, to)
	if assert.NoError(n.t, err, "%s %s from %s", network, to, from.Name) {
		assert.Equal(n.t, by, a.From, "%s %s from %s", network, to, from.Name)
	}

	return a
}

// reached asserts that requests from outside, from the node itself and from
// another pod are answered by the i-th pod, which sees where they come from.
func (n *node) reached(network string, to netip.AddrPort, i int) {
	n.t.Helper()

	neighbour := n.Pods[(i+1)%len(n.Pods)]

	a := n.answers(n.Client, network, to, n.Pods[i].Name)
	assert.Equal(n.t, n.ClientIP(to.Addr().Is6()), a.Source.Addr(), "%s %s: the client's address is kept", network, to)

	n.answers(n.Host, network, to, n.Pods[i].Name)

	a = n.answers(neighbour.Namespace, network, to, n.Pods[i].Name)
	assert.Equal(n.t, neighbour.IP(to.Addr().Is6()), a.Source.Addr(), "%s %s: the neighbour's address is kept", network, to)
}

// refused asserts that a request is refused, and at once. It comes from the node
// itself, to which alone the kernel answers without a limit on ICMP's rate, and
// over TCP, which needs no ICMP, from outside as well.
func (n *node) refused(network string, to netip.AddrPort) {
	n.t.Helper()

	from := []*testbed.Namespace{n.Host}
	if network == "tcp" {
		from = append(from, n.Client)
	}

	for _, ns := range from {
		ctx, cancel := context.WithTimeout(n.t.Context(), patience)
		_, err := ns.Ask(ctx, network, to)

		cancel()
		assert.ErrorContains(n.t, err, "connection refused", "%s %s from %s", network, to, ns.Name)
	}
}

// unanswered asserts that nothing comes back.
func (n *node) unanswered(from *testbed.Namespace, network string, to netip.AddrPort) {
	n.t.Helper()

	ctx, cancel := context.WithTimeout(n.t.Context(), silence)
	defer cancel()

	_, err := from.Ask(ctx, network, to)
	assert.ErrorIs(n.t, err, context.DeadlineExceeded, "%s %s from %s", network, to, from.Name)
}

// mapping is how hostport lists a row that leads to port 80 of the i-th pod, as
// long as it does not know whose it is.
func (n *node) mapping(id string, i int, f knftables.Family, proto v1.Protocol, hostIP string, hostPort int32) hostport.Mapping {
	return hostport.Mapping{
		PodIDHash: hashOf(id), Backend: hostport.BackendNFTables,
		Protocol: proto, HostIP: hostIP, HostPort: hostPort,
		PodIP: net.IP(n.podIP(i, f).AsSlice()), ContainerPort: 80,
		Held: proto != v1.ProtocolSCTP, // which hostport never opens a socket for
	}
}

// anyIP is how hostport writes any address of the node.
func anyIP(f knftables.Family) string {
	if isV6(f) {
		return "::"
	}

	return "0.0.0.0"
}
