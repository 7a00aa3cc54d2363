package links

import (
	"net/netip"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/cri-o/hostport/internal/row"
	"github.com/cri-o/hostport/internal/testbed"
)

// Behind the loopback device there are no neighbours.
func TestLoopback(t *testing.T) {
	t.Parallel()

	l := New(row.IPv4)
	defer l.Close()

	bypassed, err := l.Bypassed("lo")
	require.NoError(t, err)
	assert.False(t, bypassed)
}

// What is remembered of interfaces is bounded.
func TestBound(t *testing.T) {
	t.Parallel()

	l := New(row.IPv4)
	defer l.Close()

	for i := range maxKinds {
		l.kinds[strconv.Itoa(i)] = "veth"
	}

	kind, err := l.kind("lo")
	require.NoError(t, err)
	assert.Equal(t, map[string]string{"lo": kind}, l.kinds)
}

// Behind what is no veth there may be neighbours whose answers do not come by the node.
func TestKinds(t *testing.T) {
	t.Parallel()

	l := New(row.IPv4)
	defer l.Close()

	for kind, want := range map[string]bool{"veth": false, "macvlan": true, "ipvlan": true} { // not every kernel has these
		l.kinds["pods"] = kind

		bypassed, err := l.Bypassed("pods")
		require.NoError(t, err)
		assert.Equal(t, want, bypassed, kind)
	}
}

// The interface is that of the route, whoever has asked before and not waited.
func TestTo(t *testing.T) {
	t.Parallel()

	bed, err := testbed.New("pod")
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, bed.Close()) })

	for _, f := range []row.Family{row.IPv4, row.IPv6} {
		l := New(f)
		t.Cleanup(l.Close)

		pod := bed.Pods[0].IP(f == row.IPv6)

		require.NoError(t, bed.Host.Do(func() error {
			for _, named := range []string{"", "lo", "none", "eth1"} {
				device, err := l.To(named, pod)
				require.NoError(t, err)
				assert.Equal(t, map[string]string{"eth1": "eth1"}[named], strings.TrimPrefix(device, "cni0"))
			}

			device, err := l.To("", bed.ClientIP(f == row.IPv6))
			require.NoError(t, err)
			assert.Equal(t, "eth0", device)

			// An answer that nobody has waited for.
			other := nl.NewNetlinkRequest(unix.RTM_GETLINK, unix.NLM_F_DUMP)
			other.Seq = l.asked
			other.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
			require.NoError(t, unix.Sendto(l.socket, other.Serialize(), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}))

			device, err = l.To("", pod)
			require.NoError(t, err)
			assert.Equal(t, "cni0", device)

			nowhere := netlink.Route{Type: unix.RTN_UNREACHABLE, Dst: netlink.NewIPNet(pod.AsSlice())}
			require.NoError(t, netlink.RouteAdd(&nowhere))

			_, err = l.To("", pod)
			require.ErrorIs(t, err, unix.EHOSTUNREACH)

			_, err = l.To("", netip.MustParseAddr(map[row.Family]string{row.IPv4: "203.0.113.1", row.IPv6: "2001:db8:ffff::1"}[f]))
			require.ErrorIs(t, err, unix.ENETUNREACH)

			return nil
		}))
	}
}
