package hostport

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cri-o/hostport/internal/iptables"
	"github.com/cri-o/hostport/internal/nftables"
	"github.com/cri-o/hostport/internal/nodeaddr"
	"github.com/cri-o/hostport/internal/row"
	"github.com/cri-o/hostport/internal/testbed"
)

// serviceIP is the address of the i-th Service.
func serviceIP(f IPFamily, i int) netip.Addr {
	if f == IPv6 {
		return netip.MustParseAddr(fmt.Sprintf("fd00:10:96::%d", i))
	}

	return netip.AddrFrom4([4]byte{10, 96, 0, byte(i)})
}

// addService puts the address of a Service on the node as kube-proxy does in its IPVS
// mode. A program of the host's stands for the Service.
func (n *node) addService(f IPFamily, ip netip.Addr) {
	n.t.Helper()
	n.assignService(ip)

	if n.variant != viaNFTables { // kube-proxy asks an ipset
		n.iptables(f, "-I", iptables.PreRouting, "-d", ip.String(), "-p", "tcp", "--dport", "443", "-j", "ACCEPT")
		n.iptables(f, "-I", iptables.Output, "-d", ip.String(), "-p", "tcp", "--dport", "443", "-j", "ACCEPT")
	}

	_, err := n.Host.Serve("tcp", netip.AddrPortFrom(ip, 443))
	require.NoError(n.t, err)
}

// assignService puts the address of a Service on the node, and waits until it is local.
func (n *node) assignService(ip netip.Addr) {
	n.t.Helper()
	require.NoError(n.t, n.Host.AssignAddress(nodeaddr.ServiceDevice, row.HostPrefix(ip)))
	eventually(n.t, func() bool { // no longer tentative
		s, err := n.Host.Serve("udp", netip.AddrPortFrom(ip, 0))
		if err != nil {
			return false
		}

		require.NoError(n.t, s.Close())

		return true
	})
}

// With kube-proxy's IPVS mode, the addresses of Services are local. A host port of a
// Service's number is not for them: whether they were there before or come later, and
// whoever asks.
func TestServiceAddresses(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node, f IPFamily) {
		n.serve(0, "tcp", f, 80)
		require.NoError(t, n.Host.AddDevice(nodeaddr.ServiceDevice, false))

		askers := []*testbed.Namespace{n.Pods[1].Namespace, n.Host, n.Client}
		for _, ns := range askers[2:] {
			require.NoError(t, ns.AddRoute(netip.PrefixFrom(serviceIP(f, 0), serviceIP(f, 0).BitLen()-8).Masked(), n.nodeIP(f)))
		}

		n.addService(f, serviceIP(f, 1))

		asked := func(t *testing.T, services int) {
			t.Helper()

			n := n.within(t)

			for _, from := range askers {
				for i := range services {
					n.answers(from, "tcp", netip.AddrPortFrom(serviceIP(f, i+1), 443), "host")
				}

				n.answers(from, "tcp", netip.AddrPortFrom(n.nodeIP(f), 443), "web")
			}
		}

		m := n.manager(WithoutSockets())
		pod := n.pod(0, f, &PortMapping{HostPort: 443, ContainerPort: 80})
		require.NoError(t, n.add(m, "id", pod))
		asked(t, 1)

		// With the next operation.
		n.addService(f, serviceIP(f, 2))
		require.NoError(t, n.add(m, "id", pod))
		asked(t, 2)

		// The table made anew.
		if n.variant == viaNFTables {
			n.command("nft", "flush", "ruleset")
			require.NoError(t, n.add(m, "id", pod))
			asked(t, 2)
		}

		// With Run.
		n.run(m)
		n.addService(f, serviceIP(f, 3))
		eventually(t, func() bool {
			a, err := n.Host.Ask(t.Context(), "tcp", netip.AddrPortFrom(serviceIP(f, 3), 443))

			return err == nil && a.From == "host"
		})
		asked(t, 3)

		// An address that the node gets for itself is its own.
		require.NoError(t, n.Host.AddAddress("eth0", row.HostPrefix(serviceIP(f, 3))))

		if n.variant == viaNFTables {
			eventually(t, func() bool {
				a, err := n.Host.Ask(t.Context(), "tcp", netip.AddrPortFrom(serviceIP(f, 3), 443))

				return err == nil && a.From == "web"
			})
		}

		// Nothing is left of what has gone.
		require.NoError(t, n.Host.RemoveDevice(nodeaddr.ServiceDevice))
		require.NoError(t, n.add(m, "id", pod))

		for _, line := range n.rules(f) {
			assert.NotContains(t, line, nftables.TableName+" element "+nftables.Services)
		}
	})
}

// Run exempts the address of a Service also where an operation that had nothing to do
// has seen it first.
func TestServiceAddressSeenBefore(t *testing.T) {
	n := newNode(t, viaNFTables)
	require.NoError(t, n.Host.AddDevice(nodeaddr.ServiceDevice, false))

	m := n.manager()
	require.NoError(t, n.add(m, "id", n.pod(0, IPv4, &PortMapping{HostPort: 443, ContainerPort: 80})))
	n.assignService(serviceIP(IPv4, 1))
	require.NoError(t, n.remove(m, "nothing", nil))
	n.do(func() {
		require.NoError(t, m.families[0].runOnce(t.Context(), func(backend) bool { return false }))
	})
	assert.Contains(t, n.command("nft", "list", "set", "ip", nftables.TableName, nftables.Services), serviceIP(IPv4, 1).String())
}

// Sync exempts it as well.
func TestServiceAddressSync(t *testing.T) {
	n := newNode(t, viaNFTables)
	require.NoError(t, n.Host.AddDevice(nodeaddr.ServiceDevice, false))

	m := n.manager()
	pods := map[string][]*PodPortMapping{"id": {n.pod(0, IPv4, &PortMapping{HostPort: 443, ContainerPort: 80})}}
	require.NoError(t, n.sync(m, pods))
	n.assignService(serviceIP(IPv4, 1))
	require.NoError(t, n.sync(m, pods))
	assert.Contains(t, n.command("nft", "list", "set", "ip", nftables.TableName, nftables.Services), serviceIP(IPv4, 1).String())
}

// failingOnce fails the next time.
type failingOnce struct {
	backend

	done bool
}

func (b *failingOnce) Reconcile(ctx context.Context, t row.Target) ([]row.Repair, error) {
	if !b.done {
		b.done = true

		return nil, errInjected
	}

	return b.backend.Reconcile(ctx, t)
}

// Where that fails, the repair that follows does it.
func TestServiceAddressFails(t *testing.T) {
	n := newNode(t, viaNFTables)
	require.NoError(t, n.Host.AddDevice(nodeaddr.ServiceDevice, false))

	m := n.manager()
	require.NoError(t, n.add(m, "id", n.pod(0, IPv4, &PortMapping{HostPort: 443, ContainerPort: 80})))
	n.assignService(serviceIP(IPv4, 1))

	m.families[0].backend = &failingOnce{backend: m.families[0].backend}
	n.runOnce(m.families[0], false)
	assert.Contains(t, n.command("nft", "list", "set", "ip", nftables.TableName, nftables.Services), serviceIP(IPv4, 1).String())
}

// That the node's addresses cannot be looked at is told once, and again when it could be
// meanwhile.
func TestAddressesUnknown(t *testing.T) {
	n := anyNode(t)
	log, logged := logs(t)
	m := n.manager(log)
	pod := n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})

	for i := range 2 {
		require.NoError(t, m.families[0].addrs.Close())
		require.NoError(t, n.add(m, "id", pod))
		require.NoError(t, n.remove(m, "id", pod))
		assert.Equal(t, i+1, strings.Count(logged(), "Cannot look at the node's addresses"))

		m.families[0].addrs = nodeaddr.New(false)

		require.NoError(t, n.add(m, "id", pod))
	}
}

// Where that makes a flushed table again, flows that have begun without it follow.
func TestFlowsAfterServiceAddress(t *testing.T) {
	n := newNode(t, viaNFTables)
	n.serve(0, "udp", IPv4, 53)
	require.NoError(t, n.Host.AddDevice(nodeaddr.ServiceDevice, false))

	m := n.manager()
	pod := n.pod(0, IPv4, &PortMapping{HostPort: 5353, ContainerPort: 53, Protocol: "UDP"})
	require.NoError(t, n.add(m, "id", pod))
	n.assignService(serviceIP(IPv4, 1))
	require.NoError(t, n.add(m, "id", pod))
	n.wipe(IPv4)

	s := n.sendUntranslated(t, 5353)
	n.do(func() {
		require.NoError(t, m.families[0].runOnce(t.Context(), func(backend) bool { return false }))
	})
	s.reaches(t, "web")
}
