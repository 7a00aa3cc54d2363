package hostporttest_test

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	v1 "k8s.io/api/core/v1"
	"k8s.io/klog/v2"
	"k8s.io/klog/v2/ktesting"

	"github.com/cri-o/hostport"
	"github.com/cri-o/hostport/hostporttest"
)

// restart returns the manager of a runtime that has just been started on a node.
func restart(t *testing.T, node *hostporttest.Node, opts ...hostport.Option) *hostport.Manager {
	t.Helper()

	m, err := hostport.New(append(opts, node.Option(), hostport.WithLogger(logger(t)))...)
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, m.Close()) })

	return m
}

func logger(t *testing.T) klog.Logger {
	t.Helper()

	return ktesting.NewLogger(t, ktesting.NewConfig(ktesting.Verbosity(2)))
}

// pod is a pod that wants ports of the node.
func pod(name, ip string, hostPorts ...int32) *hostport.PodPortMapping {
	p := &hostport.PodPortMapping{Namespace: "default", Name: name, IP: net.ParseIP(ip)}
	for _, port := range hostPorts {
		p.PortMappings = append(p.PortMappings, &hostport.PortMapping{HostPort: port, ContainerPort: 80})
	}

	return p
}

// Two pods cannot have a port, and the second one's sandbox is not set up.
func TestConflict(t *testing.T) {
	t.Parallel()

	m := restart(t, &hostporttest.Node{})
	require.NoError(t, m.Add("a", pod("a", "10.88.0.2", 8080), ""))

	conflict := (*hostport.ConflictError)(nil)
	require.ErrorAs(t, m.Add("b", pod("b", "10.88.0.3", 8081, 8080), ""), &conflict)
	assert.Equal(t, "default/a", conflict.OtherPod)
	assert.Equal(t, "a", conflict.OtherID)
	assert.EqualValues(t, 8080, conflict.HostPort)
	assert.Len(t, m.Mappings(), 1, "all or nothing")

	require.NoError(t, m.Remove("b", pod("b", "", 8080)), "takes nothing from others")
	require.NoError(t, m.Add("v6", pod("v6", "fd00::2", 8080), ""), "another family")
	require.NoError(t, m.Remove("a", nil))
	require.NoError(t, m.Add("b", pod("b", "10.88.0.3", 8081, 8080), ""))
	assert.Len(t, m.Mappings(), 3)
}

// A kubelet repeats what it is not sure of.
func TestAgain(t *testing.T) {
	t.Parallel()

	m := restart(t, &hostporttest.Node{})

	for range 2 {
		require.NoError(t, m.Add("a", pod("a", "10.88.0.2", 8080), ""))
		assert.Len(t, m.Mappings(), 1)
		assert.True(t, m.Mappings()[0].Held)
	}

	require.NoError(t, m.Add("a", pod("a", "10.88.0.9", 8080), ""), "with another IP")
	require.Len(t, m.Mappings(), 1)
	assert.Equal(t, "10.88.0.9", m.Mappings()[0].PodIP.String())

	for range 2 {
		require.NoError(t, m.Remove("a", nil))
		assert.Empty(t, m.Mappings())
	}
}

func TestInvalid(t *testing.T) {
	t.Parallel()

	m := restart(t, &hostporttest.Node{})

	for _, p := range []*hostport.PodPortMapping{pod("a", "10.88.0.2", 70000), pod("a", "127.0.0.1", 80), pod("a", "", 80)} {
		require.ErrorIs(t, m.Add("a", p, ""), hostport.ErrInvalidMapping)
	}

	require.ErrorIs(t, m.Add("", pod("a", "10.88.0.2", 80), ""), hostport.ErrInvalidMapping)
	assert.Empty(t, m.Mappings())
}

// What a runtime finds when it comes up again: rows whose owner it has to name, those of
// sandboxes that are gone, and a port that a process has taken meanwhile.
func TestRestart(t *testing.T) {
	t.Parallel()

	var node hostporttest.Node

	before := restart(t, &node)
	for _, p := range []*hostport.PodPortMapping{pod("stays", "10.88.0.2", 8080), pod("goes", "10.88.0.3", 8081), pod("waits", "fd00::2", 8082)} {
		require.NoError(t, before.Add(p.Name, p, ""))
	}

	require.NoError(t, before.Close())
	require.ErrorIs(t, before.Add("late", pod("late", "10.88.0.4", 8083), ""), os.ErrClosed)

	list, err := hostport.List(t.Context(), node.Option())
	require.NoError(t, err)
	assert.Len(t, list, 3)

	free, err := node.Occupy(v1.ProtocolTCP, netip.MustParseAddrPort("[fd00::99]:8082"))
	require.NoError(t, err)

	m := restart(t, &node)
	require.Len(t, m.Mappings(), 3)

	for _, mapping := range m.Mappings() {
		assert.Empty(t, mapping.PodID)
		assert.Equal(t, hostport.Backend("memory"), mapping.Backend)
		assert.Equal(t, mapping.HostPort != 8082, mapping.Held)
	}

	pods := map[string][]*hostport.PodPortMapping{
		"stays": {pod("stays", "10.88.0.2", 8080)},
		"waits": {pod("waits", "fd00::2", 8082)},
		"comes": {pod("comes", "10.88.0.5", 8084), pod("comes", "fd00::5", 8084)},
		"taken": {pod("taken", "10.88.0.6", 8080)},
	}
	conflict := (*hostport.ConflictError)(nil)
	err = m.Sync(t.Context(), pods)
	require.ErrorAs(t, err, &conflict)
	require.ErrorIs(t, err, syscall.EADDRINUSE)
	free()
	delete(pods, "taken")
	require.NoError(t, m.Sync(t.Context(), pods))
	assert.Len(t, m.Mappings(), 4)

	for _, mapping := range m.Mappings() {
		assert.Contains(t, pods, mapping.PodID)
		assert.True(t, mapping.Held)
	}

	require.NoError(t, m.Sync(t.Context(), nil))
	assert.Empty(t, m.Mappings())
}

// Who has a port keeps everybody else from it, by protocol, family and address.
func TestOccupy(t *testing.T) {
	t.Parallel()

	var node hostporttest.Node

	m := restart(t, &node)
	require.NoError(t, m.Add("a", pod("a", "10.88.0.2", 8080), ""))

	for _, tc := range []struct {
		protocol v1.Protocol
		addr     string
		taken    bool
	}{
		{v1.ProtocolTCP, "0.0.0.0:8080", true},
		{v1.ProtocolTCP, "192.0.2.1:8080", true},
		{v1.ProtocolTCP, "[::ffff:192.0.2.1]:8080", true},
		{v1.ProtocolTCP, "[::]:8080", true},
		{v1.ProtocolTCP, "[::1]:8080", false},
		{v1.ProtocolUDP, "0.0.0.0:8080", false},
		{v1.ProtocolTCP, "0.0.0.0:8081", false},
	} {
		for range 2 {
			free, err := node.Occupy(tc.protocol, netip.MustParseAddrPort(tc.addr))
			if tc.taken {
				require.ErrorIs(t, err, syscall.EADDRINUSE, tc.addr)

				continue
			}

			require.NoError(t, err, tc.addr)
			free()
		}
	}

	for protocol, addr := range map[v1.Protocol]string{"TPC": "0.0.0.0:1", v1.ProtocolSCTP: "0.0.0.0:1", v1.ProtocolTCP: "0.0.0.0:0"} {
		_, err := node.Occupy(protocol, netip.MustParseAddrPort(addr))
		require.ErrorContains(t, err, "want TCP or UDP")
	}

	for _, protocol := range []v1.Protocol{"", "tcp", "Udp"} {
		free, err := node.Occupy(protocol, netip.MustParseAddrPort("0.0.0.0:8099"))
		require.NoError(t, err)
		free()
	}

	// Two addresses are two places, and a pod is in nobody's way itself.
	_, err := node.Occupy(v1.ProtocolTCP, netip.MustParseAddrPort("192.0.2.1:8090"))
	require.NoError(t, err)

	beside := pod("beside", "10.88.0.4", 8090, 8091, 8091)
	beside.PortMappings[0].HostIP, beside.PortMappings[1].HostIP = "192.0.2.2", "192.0.2.2"
	require.NoError(t, m.Add("beside", beside, ""))
	require.Len(t, m.Mappings(), 4)

	for _, mapping := range m.Mappings() {
		assert.True(t, mapping.Held, mapping)
	}

	// Both families or none.
	require.NoError(t, m.Add("v6", pod("v6", "fd00::2", 8085), ""))
	_, err = node.Occupy(v1.ProtocolTCP, netip.MustParseAddrPort("[::]:8085"))
	require.ErrorIs(t, err, syscall.EADDRINUSE)
	require.NoError(t, m.Add("v4", pod("v4", "10.88.0.5", 8085), ""))

	// Nobody holds the ports while the runtime is down.
	require.NoError(t, m.Close())
	_, err = node.Occupy(v1.ProtocolTCP, netip.MustParseAddrPort("0.0.0.0:8080"))
	require.NoError(t, err)
	require.ErrorIs(t, restart(t, &node).Add("b", pod("b", "10.88.0.3", 8080), ""), syscall.EADDRINUSE)
}

func TestWithoutSockets(t *testing.T) {
	t.Parallel()

	var node hostporttest.Node

	_, err := node.Occupy(v1.ProtocolTCP, netip.MustParseAddrPort("0.0.0.0:8080"))
	require.NoError(t, err)

	m := restart(t, &node, hostport.WithoutSockets())
	require.NoError(t, m.Add("a", pod("a", "10.88.0.2", 8080), ""))
	assert.False(t, m.Mappings()[0].Held)
}

// Run repairs, and ends with its context.
func TestRun(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var node hostporttest.Node

		m := restart(t, &node)
		require.NoError(t, m.Add("a", pod("a", "10.88.0.2", 8080), ""))

		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan error)

		go func() { ended <- m.Run(ctx) }()

		synctest.Wait()
		node.Wipe()
		require.ErrorContains(t, m.Check(t.Context(), "a", pod("a", "10.88.0.2", 8080)), "host port TCP 0.0.0.0:8080")

		time.Sleep(time.Second) //nolint:forbidigo // of the bubble: what is due within it has happened
		require.NoError(t, m.Check(t.Context(), "a", pod("a", "10.88.0.2", 8080)))

		stop()
		require.ErrorIs(t, <-ended, context.Canceled)
	})
}

// What is wiped comes back with the next Add, whichever pod's that is.
func TestWipedBeforeAdd(t *testing.T) {
	t.Parallel()

	var node hostporttest.Node

	m := restart(t, &node)
	require.NoError(t, m.Add("a", pod("a", "10.88.0.2", 8080), ""))
	node.Wipe()
	require.NoError(t, m.Add("b", pod("b", "10.88.0.3", 8081), ""))
	require.NoError(t, m.Check(t.Context(), "a", pod("a", "10.88.0.2", 8080)))
}

// What is wiped while a runtime is down is gone until it says that the pod is there.
func TestWipedWhileDown(t *testing.T) {
	t.Parallel()

	var node hostporttest.Node

	p := pod("a", "10.88.0.2", 8080)
	before := restart(t, &node)
	require.NoError(t, before.Add("a", p, ""))
	require.NoError(t, before.Close())
	node.Wipe()

	m := restart(t, &node)
	assert.Empty(t, m.Mappings())
	require.ErrorContains(t, m.Check(t.Context(), "a", p), "row TCP 0.0.0.0:8080")
	require.NoError(t, m.Sync(t.Context(), map[string][]*hostport.PodPortMapping{"a": {p}}))
	require.NoError(t, m.Check(t.Context(), "a", p))
}

// An operation whose time is up before it begins does nothing, and List lists nothing.
func TestContextEnded(t *testing.T) {
	t.Parallel()

	var node hostporttest.Node

	m := restart(t, &node)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()

	for range 20 { // of those that need not wait
		require.ErrorIs(t, m.AddContext(ctx, "a", pod("a", "10.88.0.2", 8080), ""), context.Canceled)
		require.Empty(t, m.Mappings())
	}

	_, err := hostport.List(ctx, node.Option())
	require.ErrorIs(t, err, context.Canceled)
}

// A second manager waits for the first one, as long as it is told to.
func TestSecondManager(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var node hostporttest.Node

		first := restart(t, &node)
		require.NoError(t, first.Add("a", pod("a", "10.88.0.2", 8080), ""))

		begun := time.Now()
		_, err := hostport.New(node.Option(), hostport.WithTimeout(time.Minute), hostport.WithLogger(logger(t)))
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.ErrorContains(t, err, "another manager has the host ports")
		assert.Equal(t, time.Minute, time.Since(begun))

		begun = time.Now()
		second := hostport.NewMetaHostportManager(node.Option(), hostport.WithTimeout(time.Minute), hostport.WithLogger(logger(t)))
		assert.Zero(t, time.Since(begun), "it leaves the waiting to the first operation")
		require.ErrorIs(t, second.Add("b", pod("b", "10.88.0.3", 8081), ""), context.DeadlineExceeded)

		added := make(chan error)

		go func() { added <- second.Add("b", pod("b", "10.88.0.3", 8081), "") }()

		synctest.Wait()
		require.NoError(t, first.Close())
		require.NoError(t, <-added)

		m, ok := second.(*hostport.Manager)
		require.True(t, ok)
		assert.Len(t, m.Mappings(), 2)

		third, err := hostport.New((&hostporttest.Node{}).Option(), hostport.WithLogger(logger(t)))
		require.NoError(t, err, "a node of its own")
		assert.Empty(t, third.Mappings())
		require.NoError(t, third.Close())
		require.NoError(t, m.Close())
	})
}

// Nothing of it is the host's: a port that is mapped can be bound.
func TestNothingOfTheHost(t *testing.T) {
	t.Parallel()

	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp4", "127.0.0.1:0")
	require.NoError(t, err)

	defer func() { _ = l.Close() }()

	addr := netip.MustParseAddrPort(l.Addr().String())
	m := restart(t, &hostporttest.Node{})
	require.NoError(t, m.Add("a", pod("a", "10.88.0.2", int32(addr.Port())), "no-such-interface"))
	assert.True(t, m.Mappings()[0].Held)
}

func TestUnknownBackend(t *testing.T) {
	t.Parallel()

	_, err := hostport.New((&hostporttest.Node{}).Option(), hostport.WithBackend("iptabels"))
	require.ErrorContains(t, err, "iptabels")
}

// A change that the kernel refuses leaves all as it was, and a Remove to others.
func TestFail(t *testing.T) {
	t.Parallel()

	var node hostporttest.Node

	m, err := hostport.New(node.Option())
	require.NoError(t, err)
	require.NoError(t, m.Add("web", pod("web", "10.88.0.2", 8080), ""))

	refused := errors.New("refused")
	node.Fail(refused)
	require.ErrorIs(t, m.Add("other", pod("other", "10.88.0.3", 8081), ""), refused)
	require.ErrorIs(t, m.Remove("web", nil), refused)
	require.ErrorIs(t, m.Sync(t.Context(), nil), refused)
	require.Len(t, m.Mappings(), 1)
	assert.Empty(t, m.Mappings()[0].PodID, "nobody's")

	node.Fail(nil)
	require.NoError(t, m.Add("other", pod("other", "10.88.0.3", 8080), ""))
	require.Len(t, m.Mappings(), 1)
	assert.Equal(t, "other", m.Mappings()[0].PodID)
}

// One family over an IPTables of the caller's works on the node as well.
func TestOneFamily(t *testing.T) {
	t.Parallel()

	var node hostporttest.Node

	m := hostport.NewHostportManager(noIPTables{}, node.Option())
	require.NoError(t, m.Add("web", pod("web", "10.88.0.2", 8080), ""))

	list, err := hostport.List(t.Context(), node.Option())
	require.NoError(t, err)
	require.Len(t, list, 1)
	assert.EqualValues(t, "memory", list[0].Backend)
}

// noIPTables is there for its family.
type noIPTables struct{ hostport.IPTables }

func (noIPTables) IsIPv6() bool { return false }
