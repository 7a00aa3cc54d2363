package nodeaddr_test

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"

	"github.com/cri-o/hostport/internal/nodeaddr"
	"github.com/cri-o/hostport/internal/testbed"
)

// tables are those of both families of a machine.
type tables []*nodeaddr.Table

// now returns the addresses of a family.
func (l tables) now(t *testing.T, v6 bool) *nodeaddr.Addresses {
	t.Helper()

	table := l[0]
	if v6 {
		table = l[1]
	}

	now, err := table.Now(t.Context())
	require.NoError(t, err)

	return now
}

// node is a machine whose addresses are followed.
func node(t *testing.T) (*testbed.Namespace, tables) {
	t.Helper()

	bed, err := testbed.New("pod") // with which the bridge's addresses are there
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, bed.Close()) })

	list := tables{nodeaddr.New(false), nodeaddr.New(true)}

	for _, table := range list {
		t.Cleanup(func() { assert.NoError(t, table.Close()) })
		require.NoError(t, bed.Host.Do(func() error {
			_, err := table.Now(t.Context())

			return err
		}))
	}

	return bed.Host, list
}

func addrs(list ...string) []netip.Addr {
	ips := make([]netip.Addr, len(list))
	for i, ip := range list {
		ips[i] = netip.MustParseAddr(ip)
	}

	return ips
}

// What is local in the routing table is the node's, but not what kube-ipvs0 alone
// has, nor what is link-local. Each change is seen by the next look.
func TestAddresses(t *testing.T) {
	host, both := node(t)
	prefix := netip.MustParsePrefix

	require.NoError(t, host.AddDevice("d0", true))
	require.NoError(t, host.AddDevice("other", true))

	for _, step := range []struct {
		name     string
		do       func() error
		has, not []netip.Addr
		services []netip.Addr
	}{
		{
			"at first", func() error { return nil },
			addrs("127.0.0.1", "127.8.9.10", "::1", "192.0.2.1", "192.0.2.11", "10.88.0.1", "2001:db8:1::1", "fd00:10:88::1"),
			addrs("192.0.2.2", "192.0.2.0", "192.0.2.255", "10.88.0.2", "2001:db8:1::2", "fd00:10:88::", "203.0.113.7", "fd00:9::7", "ff02::1"), nil,
		},
		{"an address", func() error { return host.AssignAddress("d0", prefix("203.0.113.7/24")) }, addrs("203.0.113.7"), addrs("203.0.113.8"), nil},
		{"and gone", func() error { return host.RemoveAddress("d0", prefix("203.0.113.7/24")) }, nil, addrs("203.0.113.7"), nil},
		{"of IPv6", func() error { return host.AssignAddress("d0", prefix("fd00:9::7/64")) }, addrs("fd00:9::7"), addrs("fd00:9::8"), nil},
		{"by route alone", func() error { return host.AddLocalRoute("d0", prefix("203.0.113.9/32")) }, addrs("203.0.113.9"), nil, nil},
		{"by route, IPv6", func() error { return host.AddLocalRoute("d0", prefix("fd00:9::9/128")) }, addrs("fd00:9::9"), nil, nil},
		{"a network", func() error { return host.AddLocalRoute("lo", prefix("198.18.0.0/15")) }, addrs("198.18.0.1", "198.19.255.254"), addrs("198.20.0.1"), nil},
		{"and gone again", func() error { return host.RemoveLocalRoute("lo", prefix("198.18.0.0/15")) }, nil, addrs("198.18.0.1"), nil},
		{"their device goes", func() error { return host.RemoveDevice("d0") }, nil, addrs("203.0.113.9", "fd00:9::7", "fd00:9::9"), nil},
		{"the device of Services", func() error { return host.AddDevice(nodeaddr.ServiceDevice, false) }, nil, nil, nil},
		{
			"a Service", func() error { return host.AssignAddress(nodeaddr.ServiceDevice, prefix("10.96.0.1/32")) },
			nil, addrs("10.96.0.1"), addrs("10.96.0.1"),
		},
		{
			"an address that is the node's as well", func() error { return host.AssignAddress(nodeaddr.ServiceDevice, prefix("192.0.2.11/32")) },
			addrs("192.0.2.11"), addrs("10.96.0.1"), addrs("10.96.0.1"),
		},
		{
			"which it loses", func() error { return host.RemoveAddress("eth0", prefix("192.0.2.11/24")) },
			nil, addrs("192.0.2.11"), addrs("10.96.0.1", "192.0.2.11"),
		},
		{
			"a Service goes", func() error { return host.RemoveAddress(nodeaddr.ServiceDevice, prefix("10.96.0.1/32")) },
			nil, addrs("10.96.0.1"), addrs("192.0.2.11"),
		},
		{"the device goes", func() error { return host.RemoveDevice(nodeaddr.ServiceDevice) }, nil, addrs("192.0.2.11"), nil},
	} {
		t.Run(step.name, func(t *testing.T) {
			require.NoError(t, step.do())

			for _, ip := range step.has {
				assert.Eventually(t, func() bool { // IPv6 addresses come a moment later
					return both.now(t, ip.Is6()).Has(ip)
				}, 10*time.Second, time.Millisecond, "%s", ip)
			}

			for _, ip := range step.not {
				assert.False(t, both.now(t, ip.Is6()).Has(ip), "%s", ip)
			}

			for _, v6 := range []bool{false, true} {
				now := both.now(t, v6)
				want := slices.DeleteFunc(slices.Clone(step.services), func(ip netip.Addr) bool { return ip.Is6() != v6 })
				assert.ElementsMatch(t, want, now.Services())
				assert.Same(t, now, both.now(t, v6), "again")
			}
		})
	}
}

// What has been local for a moment between two looks, or has not, is told as well.
func TestBriefly(t *testing.T) {
	host, both := node(t)
	prefix := netip.MustParsePrefix

	require.NoError(t, host.AddDevice(nodeaddr.ServiceDevice, false))

	for _, step := range []struct {
		name     string
		ip       string
		has      bool
		do, undo func() error
	}{
		{
			"an address", "203.0.113.7", false,
			func() error { return host.AssignAddress("eth0", prefix("203.0.113.7/32")) },
			func() error { return host.RemoveAddress("eth0", prefix("203.0.113.7/32")) },
		},
		{
			"of IPv6", "fd00:9::7", false,
			func() error { return host.AddAddress("eth0", prefix("fd00:9::7/128")) },
			func() error { return host.RemoveAddress("eth0", prefix("fd00:9::7/128")) },
		},
		{
			"by route alone", "203.0.113.9", false,
			func() error { return host.AddLocalRoute("eth0", prefix("203.0.113.8/29")) },
			func() error { return host.RemoveLocalRoute("eth0", prefix("203.0.113.8/29")) },
		},
		{
			"of a Service", "10.96.0.1", false,
			func() error { return host.AssignAddress(nodeaddr.ServiceDevice, prefix("10.96.0.1/32")) },
			func() error { return host.RemoveAddress(nodeaddr.ServiceDevice, prefix("10.96.0.1/32")) },
		},
		{
			"of a device that goes", "203.0.113.11", false,
			func() error {
				return errors.Join(host.AddDevice("d0", true), host.AddLocalRoute("d0", prefix("203.0.113.11/32")))
			},
			func() error { return host.RemoveDevice("d0") },
		},
		{
			"gone and back", "192.0.2.11", true,
			func() error { return host.RemoveAddress("eth0", prefix("192.0.2.11/24")) },
			func() error { return host.AssignAddress("eth0", prefix("192.0.2.11/24")) },
		},
	} {
		t.Run(step.name, func(t *testing.T) {
			ip := netip.MustParseAddr(step.ip)
			before := both.now(t, ip.Is6())

			require.NoError(t, step.do())
			require.NoError(t, step.undo())

			now := both.now(t, ip.Is6())
			assert.NotSame(t, before, now)
			assert.Equal(t, step.has, now.Has(ip))
			assert.True(t, now.HadLocal(ip))
			assert.Equal(t, step.has, before.HadLocal(ip))
			assert.True(t, before.Until(now).HadLocal(ip))
			assert.Equal(t, before.Has(ip), before.Until(now).Has(ip))
			assert.Same(t, now, both.now(t, ip.Is6()), "again")
		})
	}
}

// What is no address of the node changes nothing: pods come and go.
func TestOthersChange(t *testing.T) {
	host, both := node(t)
	news := make(chan struct{}, 1)
	before := []*nodeaddr.Addresses{both.now(t, false), both.now(t, true)}

	for _, table := range both {
		require.NoError(t, table.Watch(t.Context(), news))
	}

	require.NoError(t, host.AddDevice("pod", true))
	require.NoError(t, host.AddAddress("eth0", netip.MustParsePrefix("fe80::77/64")))
	require.NoError(t, host.RemoveDevice("pod"))

	for i, v6 := range []bool{false, true} {
		assert.Same(t, before[i], both.now(t, v6))
	}

	assert.Empty(t, news)
}

// What was there for a moment is not forgotten where others change meanwhile, so that the
// addresses have to be read again.
func TestBrieflyAmongOthers(t *testing.T) {
	host, both := node(t)
	brief, other := netip.MustParsePrefix("203.0.113.9/32"), netip.MustParsePrefix("203.0.113.10/32")
	stop, done := make(chan struct{}), make(chan error, 1)

	go func() {
		for {
			select {
			case <-stop:
				done <- nil

				return
			default:
			}

			if err := errors.Join(host.AddLocalRoute("eth0", other), host.RemoveLocalRoute("eth0", other)); err != nil {
				done <- err

				return
			}
		}
	}()

	for range 200 {
		before := both.now(t, false)

		require.NoError(t, host.AddLocalRoute("eth0", brief))
		require.NoError(t, host.RemoveLocalRoute("eth0", brief))

		if now := both.now(t, false); !assert.True(t, before.Until(now).HadLocal(brief.Addr())) {
			break
		}
	}

	close(stop)
	require.NoError(t, <-done)
}

// Whoever watches is told, as often as there is something new to be read.
func TestWatch(t *testing.T) {
	host, both := node(t)
	news := make(chan struct{}, 1)

	for range 2 { // again, once the first has ended
		ctx, cancel := context.WithCancel(t.Context())
		require.NoError(t, both[0].Watch(ctx, news))

		for i := range 3 {
			addr := netip.PrefixFrom(netip.AddrFrom4([4]byte{203, 0, 113, byte(i)}), 32)
			require.NoError(t, host.AssignAddress("eth0", addr))

			select {
			case <-news:
			case <-time.After(10 * time.Second):
				require.Fail(t, "no news")
			}

			assert.True(t, both.now(t, false).Has(addr.Addr()))
			require.NoError(t, host.RemoveAddress("eth0", addr))
			assert.False(t, both.now(t, false).Has(addr.Addr()))
			<-news
		}

		cancel()
	}
}

// Where more has come than fits, what is lost is not missed, be it gone by now.
func TestOverflow(t *testing.T) {
	host, both := node(t)
	gateway := netip.MustParseAddr("192.0.2.2")
	flood := func(network byte) {
		for i := range 6000 { // of no concern
			require.NoError(t, host.AddRoute(netip.PrefixFrom(netip.AddrFrom4([4]byte{203, network, byte(i >> 8), byte(i)}), 32), gateway))
		}
	}
	address := netip.MustParsePrefix("198.18.0.1/32")

	flood(0)
	require.NoError(t, host.AddLocalRoute("eth0", address))
	before := both.now(t, false)
	assert.True(t, before.Has(address.Addr()))

	flood(1)
	require.NoError(t, host.RemoveLocalRoute("eth0", address))
	require.NoError(t, host.AddLocalRoute("eth0", address))
	assert.NotSame(t, before, both.now(t, false))
}

// What does not fit into the buffer may be about an address of the node.
func TestLargeEvent(t *testing.T) {
	host, both := node(t)
	before := both.now(t, false)

	require.NoError(t, host.Do(func() error {
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}

		route := &netlink.Route{Dst: &net.IPNet{IP: net.IPv4(203, 0, 113, 0), Mask: net.CIDRMask(24, 32)}}
		for range 300 { // of 16 bytes each
			route.MultiPath = append(route.MultiPath, &netlink.NexthopInfo{LinkIndex: link.Attrs().Index, Gw: net.IPv4(192, 0, 2, 2)})
		}

		return netlink.RouteAdd(route)
	}))
	assert.NotSame(t, before, both.now(t, false))
}

// Addresses that could not be read are read by the next look.
func TestReadFails(t *testing.T) {
	host, both := node(t)
	address := netip.MustParsePrefix("203.0.113.9/32")
	late, cancel := context.WithDeadline(t.Context(), time.Now())

	defer cancel()

	require.NoError(t, host.AddLocalRoute("eth0", address))

	_, err := both[0].Now(late)
	require.ErrorIs(t, err, os.ErrDeadlineExceeded)
	assert.True(t, both.now(t, false).Has(address.Addr()))
}

func TestClosed(t *testing.T) {
	_, both := node(t)
	require.NoError(t, both[0].Close())

	_, err := both[0].Now(t.Context())
	require.ErrorIs(t, err, net.ErrClosed)
	require.ErrorIs(t, both[0].Watch(t.Context(), nil), net.ErrClosed)
}
