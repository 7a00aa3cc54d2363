package hostport

import (
	"net"
	"net/netip"
	"slices"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	v1 "k8s.io/api/core/v1"

	"github.com/cri-o/hostport/internal/row"
)

// nowhere lists addresses of a family that lead no packet to a pod, as a host IP
// and as a pod IP.
func nowhere(f IPFamily) (hostIPs, podIPs []string) {
	if f == IPv6 {
		hostIPs = []string{"ff01::1", "ff02::1", "ff0e::1"}

		return hostIPs, append(slices.Clone(hostIPs), "::", "::1", "fe80::1")
	}

	hostIPs = []string{"224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255", "0.1.2.3"}

	return hostIPs, append(slices.Clone(hostIPs), "0.0.0.0", "127.0.0.1")
}

func TestAddressesThatLeadNowhere(t *testing.T) {
	eachFamilyOf(t, everywhere(), func(t *testing.T, n *node, f IPFamily) {
		m := n.manager()
		good := &PortMapping{HostPort: 8080, ContainerPort: 80}
		require.NoError(t, n.add(m, "id", n.pod(0, f, good)))

		before := n.dump(m)
		refused := func(pod *PodPortMapping) {
			t.Helper()
			require.ErrorIs(t, n.add(m, "id", pod), ErrInvalidMapping)
			require.ErrorIs(t, n.sync(m, map[string][]*PodPortMapping{"id": {pod}}), ErrInvalidMapping)
			n.do(func() { require.ErrorIs(t, m.Check(t.Context(), "id", pod), ErrInvalidMapping) })
			assert.Equal(t, before, n.dump(m))
		}

		hostIPs, podIPs := nowhere(f)
		for _, ip := range hostIPs {
			for _, protocol := range []row.Protocol{row.TCP, row.UDP, row.SCTP} {
				bad := &PortMapping{HostPort: 8081, ContainerPort: 80, HostIP: ip, Protocol: v1.Protocol(protocol.API())}
				refused(n.pod(0, f, good, bad))
				require.NoError(t, n.remove(m, "id", n.pod(0, f, bad)))
				assert.Equal(t, before, n.dump(m))
			}
		}

		for _, ip := range podIPs {
			pod := n.pod(0, f, good)
			pod.IP = net.ParseIP(ip)
			refused(pod)
		}
	})
}

// Rows from before with such addresses, of an earlier version or of CRI-O, are
// listed and go like others.
func TestAddressesFromBefore(t *testing.T) {
	eachFamilyOf(t, everywhere(), func(t *testing.T, n *node, f IPFamily) {
		hostIPs, podIPs := nowhere(f)

		var pods []*PodPortMapping

		leave := func() {
			t.Helper()

			gone := n.manager(WithoutSockets())
			fm := gone.familyOf([]*row.Row{{Pod: netip.AddrPortFrom(n.Pods[0].IP(f == IPv6), 80)}})
			pods = nil

			for i, ip := range append(slices.Clone(hostIPs), podIPs...) {
				pm := &PortMapping{HostPort: int32(8000 + i), ContainerPort: 80, Protocol: v1.Protocol([]row.Protocol{row.TCP, row.UDP, row.SCTP}[i%3])}
				rows, err := rowsOf("id", n.pod(0, f, pm))
				require.NoError(t, err)

				if i < len(hostIPs) {
					pm.HostIP = ip
					rows[0].IP = netip.MustParseAddr(ip)
					rows[0].Hash = row.HashOf("id", pm.HostPort, string(pm.Protocol), ip)
				} else {
					rows[0].Pod = netip.AddrPortFrom(netip.MustParseAddr(ip), 80)
				}

				ctx, cancel := fm.cfg.withTimeout(t.Context())
				n.do(func() { require.NoError(t, fm.add(ctx, rows, "")) })
				cancel()

				pods = append(pods, &PodPortMapping{IP: rows[0].Pod.Addr().AsSlice(), PortMappings: []*PortMapping{pm}})
			}

			require.NoError(t, gone.Close())
		}

		leave()

		m := n.manager()
		require.Len(t, m.Mappings(), len(pods))

		for i, pod := range pods {
			require.ErrorIs(t, n.add(m, "id", pod), ErrInvalidMapping)
			require.ErrorIs(t, n.sync(m, map[string][]*PodPortMapping{"id": pods[i:]}), ErrInvalidMapping)
			require.Len(t, m.Mappings(), len(pods)-i)

			pod.IP = nil
			require.NoError(t, n.remove(m, "id", pod))
			require.Len(t, m.Mappings(), len(pods)-i-1, "%v", pod.PortMappings[0])
		}

		assert.Empty(t, n.leftOver(f))
		require.NoError(t, m.Close())
		leave()

		m = n.manager()
		require.Len(t, m.Mappings(), len(pods))
		require.NoError(t, n.remove(m, "id", nil))
		assert.Empty(t, m.Mappings())
		assert.Empty(t, n.leftOver(f))
		require.NoError(t, m.Close())
		leave()

		m = n.manager()
		require.Len(t, m.Mappings(), len(pods))
		require.NoError(t, n.sync(m, nil))
		assert.Empty(t, m.Mappings())
		assert.Empty(t, n.leftOver(f))
	})
}

// Addresses that hardly anybody has are nobody's business as long as the kernel
// carries their packets.
func TestAddressesThatAreUnusual(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node, f IPFamily) {
		m := n.manager()
		unusual := map[IPFamily][]string{IPv4: {"169.254.7.7"}, IPv6: {"fec0::7", "::192.0.2.7"}}[f]

		for i, ip := range unusual {
			addr := netip.MustParseAddr(ip)
			bits := addr.BitLen()
			require.NoError(t, n.Pods[0].AddAddress("eth0", netip.PrefixFrom(addr, bits)))
			require.NoError(t, n.Host.AddAddress("cni0", netip.PrefixFrom(addr.Next(), bits-8)))

			hostPort := uint16(8080 + i)
			pod := n.pod(0, f,
				&PortMapping{HostPort: int32(hostPort), ContainerPort: 80},
				&PortMapping{HostPort: int32(hostPort), ContainerPort: 81, HostIP: addr.Next().String()})
			pod.IP = addr.AsSlice()
			require.NoError(t, n.add(m, "id", pod))

			for _, port := range []uint16{80, 81} {
				_, err := n.Pods[0].Serve("tcp", netip.AddrPortFrom(addr, port))
				require.NoError(t, err)
			}

			n.answers(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(f), hostPort), "web")
			n.answers(n.Host, "tcp", netip.AddrPortFrom(n.nodeIP(f), hostPort), "web")
			n.answers(n.Pods[1].Namespace, "tcp", netip.AddrPortFrom(addr.Next(), hostPort), "web")
			n.answers(n.Host, "tcp", netip.AddrPortFrom(addr.Next(), hostPort), "web")

			_, err := n.Pods[0].AskFrom(t.Context(), "tcp", netip.AddrPortFrom(addr, 0), netip.AddrPortFrom(n.nodeIP(f), hostPort))
			require.NoError(t, err)
		}
	})
}
