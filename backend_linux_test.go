package hostport

import (
	"errors"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cri-o/hostport/internal/nfnetlink"
)

func TestUnknownBackend(t *testing.T) {
	t.Parallel()

	for _, b := range []Backend{"iptabels", ""} {
		_, err := New(WithBackend(b), WithLogger(testLogger(t)))
		require.ErrorIs(t, err, errors.ErrUnsupported)
		assert.ErrorContains(t, err, strconv.Quote(string(b)))
	}
}

// Without IPv6 on the host, IPv4 works.
func TestIPv6Off(t *testing.T) {
	eachBackend(t, func(t *testing.T, n *node) {
		n.serve(0, "tcp", IPv4, 80)
		n.do(func() {
			require.NoError(t, os.WriteFile("/proc/sys/net/ipv6/conf/all/disable_ipv6", []byte("1"), 0))
		})

		m := n.manager()
		require.NoError(t, n.add(m, "id", n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})))
		n.answers(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(IPv4), 8080), "web")
		require.NoError(t, n.remove(m, "id", nil))
	})
}

// Without CAP_NET_ADMIN both constructors' managers say so.
func TestNoNetAdmin(t *testing.T) {
	done := make(chan struct{})

	go func() {
		defer close(done)

		runtime.LockOSThread() // for good: the thread ends with this goroutine

		hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}

		var data [2]unix.CapUserData
		if !assert.NoError(t, unix.Capget(&hdr, &data[0])) {
			return
		}

		data[0].Effective &^= 1 << unix.CAP_NET_ADMIN
		if !assert.NoError(t, unix.Capset(&hdr, &data[0])) {
			return
		}

		_, err := New(WithLogger(testLogger(t)))
		assert.ErrorIs(t, err, unix.EPERM)
		assert.ErrorContains(t, err, "CAP_NET_ADMIN")

		err = NewMetaHostportManager(WithLogger(testLogger(t))).Add("id",
			podAt("10.88.0.2", &PortMapping{HostPort: 8080, ContainerPort: 80}), "")
		assert.ErrorIs(t, err, unix.EPERM)
		assert.ErrorContains(t, err, "CAP_NET_ADMIN")
	}()
	<-done
}

// By default it is nftables, and iptables where that cannot be; if neither can
// be, New and Add say why for both.
func TestBackendAuto(t *testing.T) {
	n := newNode(t, variantNFT)
	auto := WithBackend(BackendAuto)
	port := &PortMapping{HostPort: 8080, ContainerPort: 80}

	m := n.manager(auto)
	require.NoError(t, n.add(m, "id", n.pod(0, IPv4, port)))
	assert.Equal(t, BackendNFTables, m.Mappings()[0].Backend)
	require.NoError(t, n.remove(m, "id", nil))
	require.NoError(t, m.Close())

	for _, f := range []ipFamily{IPv4, IPv6} {
		// Somebody has a chain by our name elsewhere.
		table := newNFTLayout(f).table
		n.commit(table.Create(), table.Delete())
		n.commit(table.Create(), table.CreateChain(nfnetlink.Chain{
			Name: nftPrerouting, Type: "filter", Hook: unix.NF_INET_LOCAL_IN, Priority: 0,
		}))
	}

	m = n.manager(auto)
	require.NoError(t, n.add(m, "id", n.pod(0, IPv4, port)))
	assert.Equal(t, BackendIPTables, m.Mappings()[0].Backend)
	require.NoError(t, n.remove(m, "id", nil))

	t.Setenv("PATH", t.TempDir())
	n.do(func() {
		_, err := New(auto, WithLogger(testLogger(t)))
		require.ErrorContains(t, err, "add chain prerouting")
		require.ErrorIs(t, err, exec.ErrNotFound)

		err = NewMetaHostportManager(auto, WithLogger(testLogger(t))).Add("id", n.pod(0, IPv4, port), "")
		require.ErrorContains(t, err, "add chain prerouting")
		require.ErrorIs(t, err, exec.ErrNotFound)
	})
}
