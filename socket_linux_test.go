package hostport

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"

	"github.com/cri-o/hostport/internal/iptables"
	"github.com/cri-o/hostport/internal/row"
	"github.com/cri-o/hostport/internal/sockets"
)

// sockaddrOf is an address as system calls have it.
func sockaddrOf(ip netip.Addr, port uint16) unix.Sockaddr {
	if ip.Is4() {
		return &unix.SockaddrInet4{Port: int(port), Addr: ip.As4()}
	}

	return &unix.SockaddrInet6{Port: int(port), Addr: ip.As16()}
}

// tryBind binds a socket as another process might, and listens on it. It
// returns the socket's descriptor.
func tryBind(tb testing.TB, to netip.AddrPort, kind int, options ...int) (int, error) {
	tb.Helper()

	domain := unix.AF_INET
	if to.Addr().Is6() {
		domain = unix.AF_INET6
	}

	fd, err := unix.Socket(domain, kind|unix.SOCK_CLOEXEC, 0)
	require.NoError(tb, err)

	for _, opt := range options {
		require.NoError(tb, unix.SetsockoptInt(fd, unix.SOL_SOCKET, opt, 1))
	}

	err = unix.Bind(fd, sockaddrOf(to.Addr(), to.Port()))
	if err == nil && kind == unix.SOCK_STREAM {
		err = unix.Listen(fd, 1)
	}

	if err != nil {
		require.NoError(tb, unix.Close(fd))
	}

	return fd, err
}

// refusesOthers asserts that nobody else gets a held port at any of some
// addresses, however they ask.
func (n *node) refusesOthers(kind int, port uint16, at ...netip.Addr) {
	n.t.Helper()

	if n.variant == viaMemory {
		proto := map[int]row.Protocol{unix.SOCK_STREAM: row.TCP, unix.SOCK_DGRAM: row.UDP}[kind]
		for _, ip := range at {
			_, err := n.memory.Occupy(row.Endpoint{PortKey: row.PortKey{Proto: proto, Port: port}, IP: ip}, row.FamilyOf(ip))
			assert.ErrorIs(n.t, err, unix.EADDRINUSE, ip)
		}

		return
	}

	n.do(func() {
		for _, options := range [][]int{nil, {unix.SO_REUSEADDR}, {unix.SO_REUSEPORT}, {unix.SO_REUSEADDR, unix.SO_REUSEPORT}} {
			for _, ip := range at {
				fd, err := tryBind(n.t, netip.AddrPortFrom(ip, port), kind, options...)
				if !assert.ErrorIs(n.t, err, unix.EADDRINUSE, "%s options %v", ip, options) {
					require.NoError(n.t, unix.Close(fd))
				}
			}
		}
	})
}

// besideConnection has an outgoing connection with the port as its source, and
// with SO_REUSEADDR.
func besideConnection(n *node, from netip.AddrPort, _ int) {
	n.t.Helper()
	n.do(func() {
		l, err := net.Listen("tcp", netip.AddrPortFrom(from.Addr(), 0).String())
		require.NoError(n.t, err)
		n.t.Cleanup(func() { assert.NoError(n.t, l.Close()) })

		d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(from), Control: func(_, _ string, c syscall.RawConn) error {
			var err error

			controlErr := c.Control(func(fd uintptr) {
				err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
			})

			return errors.Join(controlErr, err)
		}}

		conn, err := d.DialContext(n.t.Context(), "tcp", l.Addr().String())
		require.NoError(n.t, err)
		n.t.Cleanup(func() { assert.NoError(n.t, conn.Close()) })
	})
}

// besideServer has a server on the node's other address.
func besideServer(n *node, at netip.AddrPort, kind int) {
	n.t.Helper()
	n.do(func() {
		other := netip.AddrPortFrom(n.OtherNodeIP(at.Addr().Is6()), at.Port())
		fd, err := tryBind(n.t, other, kind, unix.SO_REUSEADDR, unix.SO_REUSEPORT)
		require.NoError(n.t, err)
		n.t.Cleanup(func() { assert.NoError(n.t, unix.Close(fd)) })
	})
}

// Nobody else gets a held port, however they ask, and however it came to be
// held. Sockets know nothing of backends: one will do.
func TestHeldPortsRefuseOthers(t *testing.T) {
	eachFamilyOf(t, backends()[:1], func(t *testing.T, n *node, f IPFamily) {
		anyIP, ip, other := f.AnyAddr(), n.nodeIP(f), n.otherNodeIP(f)
		anywhere, overlapping := []netip.Addr{anyIP, ip, other, netip.IPv6Unspecified()}, []netip.Addr{anyIP, ip, netip.IPv6Unspecified()}

		for i, tc := range []struct {
			name   string
			before func(n *node, at netip.AddrPort, kind int)
			rows   []netip.Addr // come one after the other
			gone   netip.Addr   // goes again
			at     []netip.Addr
		}{
			{name: "any", rows: []netip.Addr{anyIP}, at: anywhere},
			{name: "one", rows: []netip.Addr{ip}, at: overlapping},
			{name: "any and one", rows: []netip.Addr{anyIP, ip}, at: anywhere},
			{name: "one and any", rows: []netip.Addr{ip, anyIP}, at: anywhere},
			{name: "two and any", rows: []netip.Addr{ip, other, anyIP}, at: anywhere},
			{name: "any has gone", rows: []netip.Addr{anyIP, ip}, gone: anyIP, at: overlapping},
			{name: "one has gone", rows: []netip.Addr{ip, anyIP}, gone: ip, at: anywhere},
			{name: "TIME_WAIT, any", before: leaveTimeWait, rows: []netip.Addr{anyIP}, at: anywhere},
			{name: "TIME_WAIT, one", before: leaveTimeWait, rows: []netip.Addr{ip}, at: overlapping},
			{name: "TIME_WAIT, any and one", before: leaveTimeWait, rows: []netip.Addr{anyIP, ip}, at: anywhere},
			{name: "TIME_WAIT, one and any", before: leaveTimeWait, rows: []netip.Addr{ip, anyIP}, at: anywhere},
			{name: "TIME_WAIT, one has gone", before: leaveTimeWait, rows: []netip.Addr{ip, anyIP}, gone: ip, at: anywhere},
			{name: "beside a connection, any", before: besideConnection, rows: []netip.Addr{anyIP}, at: anywhere},
			{name: "beside a connection, one", before: besideConnection, rows: []netip.Addr{ip}, at: overlapping},
			{name: "beside a connection, one and any", before: besideConnection, rows: []netip.Addr{ip, anyIP}, at: anywhere},
			{name: "beside a server", before: besideServer, rows: []netip.Addr{ip}, at: overlapping},
		} {
			for proto, kind := range map[v1.Protocol]int{v1.ProtocolTCP: unix.SOCK_STREAM, v1.ProtocolUDP: unix.SOCK_DGRAM} {
				t.Run(fmt.Sprintf("%s/%s", tc.name, proto), func(t *testing.T) {
					n, port := n.within(t), uint16(8080+i)
					if tc.before != nil {
						tc.before(n, netip.AddrPortFrom(ip, port), kind)
					}

					m := n.manager()
					line := func(ip netip.Addr) *PodPortMapping {
						return n.pod(0, f, &PortMapping{HostPort: int32(port), ContainerPort: 80, HostIP: ip.String(), Protocol: proto})
					}

					for _, ip := range tc.rows {
						require.NoError(t, n.add(m, "id", line(ip)))
					}

					if tc.gone.IsValid() {
						require.NoError(t, n.remove(m, "id", line(tc.gone)))
					}

					n.refusesOthers(kind, port, tc.at...)
					require.NoError(t, m.Close())

					m = n.manager()
					for _, mapping := range m.Mappings() {
						assert.True(t, mapping.Held, "%s after a restart", mapping.HostIP)
					}

					n.refusesOthers(kind, port, tc.at...)
					require.NoError(t, n.remove(m, "id", nil))
					n.do(func() {
						fd, err := tryBind(t, netip.AddrPortFrom(ip, port), kind, unix.SO_REUSEADDR)
						if assert.NoError(t, err, "free after Remove") {
							assert.NoError(t, unix.Close(fd))
						}
					})
				})
			}
		}

		// What is not held is free.
		m := n.manager()
		require.NoError(t, n.add(m, "id", n.pod(0, f,
			&PortMapping{HostPort: 8079, ContainerPort: 80, HostIP: ip.String()},
			&PortMapping{HostPort: 8079, ContainerPort: 80, HostIP: ip.String(), Protocol: "UDP"},
			&PortMapping{HostPort: 8078, ContainerPort: 80, Protocol: "SCTP"})))

		for _, kind := range []int{unix.SOCK_STREAM, unix.SOCK_DGRAM} {
			n.do(func() {
				for _, to := range []netip.AddrPort{netip.AddrPortFrom(other, 8079), netip.AddrPortFrom(anyIP, 8078)} {
					fd, err := tryBind(t, to, kind)
					if assert.NoError(t, err, "%s kind %d", to, kind) {
						assert.NoError(t, unix.Close(fd))
					}
				}
			})
		}
	})
}

// Nobody gets in either while a pod's second socket for a port is bound beside
// its first.
func TestNobodySlipsIn(t *testing.T) {
	n := anyNode(t)

	for _, f := range []IPFamily{IPv4, IPv6} {
		one, other, anyIP := n.nodeIP(f), n.otherNodeIP(f), netip.Addr{}

		for _, tc := range []struct {
			name                string
			stays, comes, tried netip.Addr
		}{
			{"one beside any", anyIP, one, one},
			{"one beside any, at another", anyIP, one, other},
			{"any beside one", one, anyIP, one},
		} {
			t.Run(fmt.Sprintf("%s/IPv%s", tc.name, f), func(t *testing.T) {
				n, s, key := n.within(t), sockets.New(f, true), row.PortKey{Proto: row.TCP, Port: 8080}
				defer s.Close()

				n.do(func() { require.NoError(t, s.Acquire(row.Endpoint{PortKey: key, IP: tc.stays})) })

				done := make(chan error)
				go func() {
					done <- n.Host.Do(func() error {
						for range 500 {
							if err := s.Acquire(row.Endpoint{PortKey: key, IP: tc.comes}); err != nil {
								return err
							}

							s.Release(row.Endpoint{PortKey: key, IP: tc.comes})
						}

						return nil
					})
				}()

				n.do(func() {
					for {
						select {
						case err := <-done:
							require.NoError(t, err)

							return
						default:
							fd, err := tryBind(t, netip.AddrPortFrom(tc.tried, key.Port), unix.SOCK_STREAM, unix.SO_REUSEADDR, unix.SO_REUSEPORT)
							if !assert.ErrorIs(t, err, unix.EADDRINUSE) {
								require.NoError(t, unix.Close(fd))
							}
						}
					}
				})
			})
		}
	}
}

// Whoever serves a port keeps it, and is named.
func TestPortsOfOthers(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node, f IPFamily) {
		m := n.manager()

		for _, tc := range []struct {
			name    string
			kind    int
			addr    netip.Addr
			options []int
			row     PortMapping
		}{
			{"any", unix.SOCK_STREAM, f.AnyAddr(), nil, PortMapping{}},
			{"any reusing", unix.SOCK_STREAM, f.AnyAddr(), []int{unix.SO_REUSEADDR, unix.SO_REUSEPORT}, PortMapping{}},
			{"one address", unix.SOCK_STREAM, n.nodeIP(f), nil, PortMapping{}},
			{"any, and a row for one address", unix.SOCK_STREAM, f.AnyAddr(), nil, PortMapping{HostIP: n.nodeIP(f).String()}},
			{"dual stack", unix.SOCK_STREAM, netip.IPv6Unspecified(), nil, PortMapping{}},
			{"one address, in 16 bytes", unix.SOCK_STREAM, netip.AddrFrom16(n.nodeIP(f).As16()), nil, PortMapping{}},
			{"UDP", unix.SOCK_DGRAM, f.AnyAddr(), nil, PortMapping{Protocol: "UDP"}},
			{"UDP reusing", unix.SOCK_DGRAM, n.nodeIP(f), []int{unix.SO_REUSEADDR, unix.SO_REUSEPORT}, PortMapping{Protocol: "UDP"}},
		} {
			t.Run(tc.name, func(t *testing.T) {
				n := n.within(t)
				tc.row.HostPort, tc.row.ContainerPort = 8080, 80

				var fd int

				n.do(func() {
					var err error
					fd, err = tryBind(t, netip.AddrPortFrom(tc.addr, 8080), tc.kind, tc.options...)
					require.NoError(t, err)
				})

				err := n.add(m, "id", n.pod(0, f, &tc.row))
				require.ErrorIs(t, err, unix.EADDRINUSE)
				assert.ErrorContains(t, err, fmt.Sprintf("by process %d (", os.Getpid()))
				assert.Empty(t, m.Mappings())

				require.NoError(t, unix.Close(fd))
				require.NoError(t, n.add(m, "id", n.pod(0, f, &tc.row)))
				require.NoError(t, n.remove(m, "id", nil))
			})
		}

		// Only another family's, or another address: not in the way.
		n.do(func() {
			fd, err := tryBind(t, netip.AddrPortFrom(n.otherNodeIP(f), 8080), unix.SOCK_STREAM)
			require.NoError(t, err)

			defer unix.Close(fd)

			require.NoError(t, m.Add("id", n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80, HostIP: n.nodeIP(f).String()}), ""))
		})
	})
}

// So does whoever has bound a port and does not listen yet, where the kernel shows that.
func TestPortBoundByOthers(t *testing.T) {
	if !kernelHas(t, 6, 8) {
		return
	}

	eachFamily(t, func(t *testing.T, n *node, f IPFamily) {
		n.do(func() {
			fd, err := unix.Socket(map[IPFamily]int{IPv4: unix.AF_INET, IPv6: unix.AF_INET6}[f], unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			require.NoError(t, err)

			defer unix.Close(fd)

			require.NoError(t, unix.Bind(fd, sockaddrOf(f.AnyAddr(), 8080)))

			m := metaManager(t, WithBackend(n.backend()))
			err = m.Add("id", n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80}), "")
			require.ErrorIs(t, err, unix.EADDRINUSE)
			assert.ErrorContains(t, err, fmt.Sprintf("by process %d (", os.Getpid()))
		})
	})
}

// An outgoing connection that happens to have a port as its source is no
// server: the row works, and is held as soon as that has gone.
func TestBystander(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node, f IPFamily) {
		n.serve(0, "tcp", f, 80)
		n.serve(0, "udp", f, 80)

		for _, network := range []string{"tcp", "udp"} {
			log, logged := logs(t)
			m := n.manager(log)

			var conn net.Conn

			n.do(func() {
				d := net.Dialer{LocalAddr: addrOf(network, netip.AddrPortFrom(podGatewayOf(n, f), 8080))}

				var err error
				conn, err = d.DialContext(t.Context(), network, netip.AddrPortFrom(n.Pods[0].IP(f == IPv6), 80).String())
				require.NoError(t, err)
			})

			mapping := &PortMapping{HostPort: 8080, ContainerPort: 80}
			if network == "udp" {
				mapping.Protocol = "UDP"
			}

			require.NoError(t, n.add(m, "id", n.pod(0, f, mapping)))
			require.Len(t, m.Mappings(), 1)
			assert.False(t, m.Mappings()[0].Held)

			check := func() (err error) {
				n.do(func() { err = m.Check(t.Context(), "id", n.pod(0, f, mapping)) })

				return err
			}
			assert.Contains(t, line(t, logged(), "not held yet"), ":8080 -> ")
			missing := (*MissingError)(nil)
			require.ErrorAs(t, check(), &missing)
			assert.Empty(t, append(missing.Rows, missing.Rules...))
			assert.Equal(t, []string{fmt.Sprintf("%s %s -> %s: an outgoing connection has it", strings.ToUpper(network),
				netip.AddrPortFrom(f.AnyAddr(), 8080), netip.AddrPortFrom(n.Pods[0].IP(f == IPv6), 80))}, missing.Sockets)
			n.answers(n.Client, network, netip.AddrPortFrom(n.nodeIP(f), 8080), "web")

			if tcp, ok := conn.(*net.TCPConn); ok {
				require.NoError(t, tcp.SetLinger(0)) // no TIME_WAIT
			}

			require.NoError(t, conn.Close())

			if network == "tcp" {
				require.NoError(t, n.add(m, "id", n.pod(0, f, mapping)))
			} else {
				require.NoError(t, n.sync(m, map[string][]*PodPortMapping{"id": {n.pod(0, f, mapping)}}))
			}

			assert.True(t, m.Mappings()[0].Held, "held later")
			assert.Contains(t, line(t, logged(), "held now"), ":8080 -> ")
			require.NoError(t, check())
			require.NoError(t, n.remove(m, "id", nil))
			require.NoError(t, m.Close())
		}
	})
}

// Nor is a server of IPv6 alone one of the port in IPv4.
func TestBystanderBesideIPv6(t *testing.T) {
	n := anyNode(t)
	n.serve(0, "tcp", IPv4, 80)
	n.serve(0, "udp", IPv4, 80)

	for network, kind := range map[string]int{"tcp": unix.SOCK_STREAM, "udp": unix.SOCK_DGRAM} {
		for _, server := range []netip.Addr{netip.IPv6Unspecified(), n.nodeIP(IPv6)} {
			t.Run(network+" "+server.String(), func(t *testing.T) {
				n := n.within(t)
				n.do(func() {
					fd, err := unix.Socket(unix.AF_INET6, kind|unix.SOCK_CLOEXEC, 0)
					require.NoError(t, err)
					t.Cleanup(func() { assert.NoError(t, unix.Close(fd)) })

					if server.IsUnspecified() {
						require.NoError(t, unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_V6ONLY, 1))
					}

					require.NoError(t, unix.Bind(fd, sockaddrOf(server, 8080)))

					if network == "tcp" {
						require.NoError(t, unix.Listen(fd, 1))
					}

					d := net.Dialer{LocalAddr: addrOf(network, netip.AddrPortFrom(podGatewayOf(n, IPv4), 8080))}
					conn, err := d.DialContext(t.Context(), network, netip.AddrPortFrom(n.Pods[0].IPv4, 80).String())
					require.NoError(t, err)
					t.Cleanup(func() { assert.NoError(t, conn.Close()) })

					if tcp, ok := conn.(*net.TCPConn); ok {
						require.NoError(t, tcp.SetLinger(0)) // no TIME_WAIT
					}
				})

				m := n.manager()
				mapping := &PortMapping{HostPort: 8080, ContainerPort: 80, Protocol: v1.Protocol(network)}
				require.NoError(t, n.add(m, "id", n.pod(0, IPv4, mapping)))
				n.answers(n.Client, network, netip.AddrPortFrom(n.nodeIP(IPv4), 8080), "web")
				require.NoError(t, n.remove(m, "id", nil))
			})
		}
	}
}

func podGatewayOf(n *node, f IPFamily) netip.Addr { return n.Pods[0].IP(f == IPv6).Prev() }

func addrOf(network string, a netip.AddrPort) net.Addr {
	if network == "udp" {
		return net.UDPAddrFromAddrPort(a)
	}

	return net.TCPAddrFromAddrPort(a)
}

// leaveTimeWait leaves what a server may leave behind: a connection in TIME_WAIT.
func leaveTimeWait(n *node, to netip.AddrPort, _ int) {
	n.t.Helper()
	n.do(func() {
		l, err := net.Listen("tcp", to.String())
		require.NoError(n.t, err)

		client, err := net.Dial("tcp", to.String())
		require.NoError(n.t, err)
		server, err := l.Accept()
		require.NoError(n.t, err)

		require.NoError(n.t, server.Close()) // the first to close is the one in TIME_WAIT
		_, err = client.Read(make([]byte, 1))
		require.Error(n.t, err)
		require.NoError(n.t, client.Close())
		require.NoError(n.t, l.Close())

		_, err = tryBind(n.t, to, unix.SOCK_STREAM)
		require.ErrorIs(n.t, err, unix.EADDRINUSE, "there is a TIME_WAIT")
	})
}

// A server's leftover connections do not keep its port from being held.
func TestTimeWait(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node, f IPFamily) {
		leaveTimeWait(n, netip.AddrPortFrom(n.nodeIP(f), 8080), unix.SOCK_STREAM)

		m := n.manager()
		require.NoError(t, n.add(m, "id", n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80})))
		assert.True(t, m.Mappings()[0].Held)
		n.wipe(f)
		n.refused(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(f), 8080))
	})
}

// A client that meets a held port without a rule is refused at once, and a
// UDP socket keeps nothing of what it is sent.
func TestHeldPortWithoutRule(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node, f IPFamily) {
		m := n.manager()
		require.NoError(t, n.add(m, "id", n.pod(0, f,
			&PortMapping{HostPort: 8080, ContainerPort: 80},
			&PortMapping{HostPort: 8080, ContainerPort: 80, Protocol: "UDP"})))
		n.wipe(f)

		start := time.Now()

		n.refused(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(f), 8080))
		assert.Less(t, time.Since(start), time.Second, "not after a retransmission")

		require.NoError(t, n.Client.Do(func() error {
			conn, err := net.Dial("udp", netip.AddrPortFrom(n.nodeIP(f), 8080).String())
			require.NoError(t, err)

			defer conn.Close()

			for range 100 {
				_, err = conn.Write(make([]byte, 1000))
				require.NoError(t, err)
			}

			return nil
		}))

		assert.Equal(t, []string{"00000000"}, n.udpQueued(f, 8080))
	})
}

// udpQueued is how many bytes wait in each UDP socket of the node's with a port, in
// hexadecimal (proc_pid_net(5)).
func (n *node) udpQueued(f IPFamily, port uint16) (queued []string) {
	n.t.Helper()

	n.do(func() {
		table, err := os.ReadFile("/proc/thread-self/net/" + map[IPFamily]string{IPv4: "udp", IPv6: "udp6"}[f])
		require.NoError(n.t, err)

		for line := range strings.Lines(string(table)) {
			if fields := strings.Fields(line); strings.HasSuffix(fields[1], fmt.Sprintf(":%04X", port)) {
				_, received, _ := strings.Cut(fields[4], ":")
				queued = append(queued, received)
			}
		}
	})

	return queued
}

// A host IP need not be on the node.
func TestAddressToCome(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node, f IPFamily) {
		m := n.manager()

		vip := map[IPFamily]string{IPv4: "203.0.113.7", IPv6: "2001:db8:99::7"}[f]
		require.NoError(t, n.add(m, "id", n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80, HostIP: vip})))
		assert.True(t, m.Mappings()[0].Held)

		if f == IPv6 {
			require.NoError(t, n.add(m, "id", n.pod(0, f, &PortMapping{HostPort: 8081, ContainerPort: 80, HostIP: "fe80::1"})))
			assert.False(t, m.Mappings()[1].Held, "a link-local address cannot be bound without a scope")
		}
	})
}

func TestWithoutSockets(t *testing.T) {
	n := anyNode(t)
	m := n.manager(WithoutSockets())
	require.NoError(t, n.add(m, "id", n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})))
	assert.False(t, m.Mappings()[0].Held)

	n.do(func() {
		fd, err := tryBind(t, netip.AddrPortFrom(netip.IPv4Unspecified(), 8080), unix.SOCK_STREAM)
		require.NoError(t, err)
		require.NoError(t, unix.Close(fd))
	})
}

// Descriptors are as many after hundreds of operations as before, whether
// these succeed or not.
func TestDescriptorLeaks(t *testing.T) {
	n := newNode(t, iptables.NFT)

	var fail bool

	fake := &fakeIPTables{IPTables: n.realIPTables(), restore: func(input []byte) ([]byte, error) {
		if fail {
			return nil, errInjected
		}

		return input, nil
	}}
	m := n.oneFamily(fake)

	n.do(func() {
		l, err := net.Listen("tcp4", ":9000") //nolint:gosec // in a namespace of its own
		require.NoError(t, err)

		defer l.Close()

		ports := []*PortMapping{{HostPort: 8080, ContainerPort: 80}, {HostPort: 8080, ContainerPort: 80, Protocol: "UDP"}}
		one := func() {
			require.NoError(t, m.Add("id", n.pod(0, IPv4, ports...), ""))
			require.NoError(t, m.Add("id", n.pod(1, IPv4, ports...), ""))
			require.Error(t, m.Add("other", n.pod(0, IPv4, &PortMapping{HostPort: 8081, ContainerPort: 80}, ports[0]), ""))
			require.ErrorIs(t, m.Add("id", n.pod(0, IPv4, &PortMapping{HostPort: 8082, ContainerPort: 80},
				&PortMapping{HostPort: 9000, ContainerPort: 80}), ""), unix.EADDRINUSE)

			fail = true

			require.ErrorIs(t, m.Add("id", n.pod(1, IPv4, &PortMapping{HostPort: 8083, ContainerPort: 80}), ""), errInjected)
			require.ErrorIs(t, m.Remove("id", nil), errInjected)

			fail = false

			require.NoError(t, m.Remove("id", nil))
		}

		one()

		before := openFiles(t)

		for range 72 { // 7 operations each
			one()
		}

		assert.Equal(t, before, openFiles(t))
	})
}

// A port is held in each family for itself, whichever comes first.
func TestHeldInEachFamily(t *testing.T) {
	for _, families := range [][]IPFamily{{IPv4, IPv6}, {IPv6, IPv4}} {
		n := anyNode(t)
		m := n.manager()

		for i, f := range families {
			require.NoError(t, n.add(m, "id"+string(f), n.pod(i, f, &PortMapping{HostPort: 8080, ContainerPort: 80})))
		}

		for _, mapping := range m.Mappings() {
			assert.True(t, mapping.Held, mapping)
		}
	}
}

// A closed manager has nothing open any more.
func TestCloseClosesAll(t *testing.T) {
	eachBackend(t, func(t *testing.T, n *node) {
		one := func() {
			m := n.manager()
			require.NoError(t, n.add(m, "id", n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})))
			require.NoError(t, m.Close())
		}
		one()

		before := openFiles(t)

		for range 5 {
			one()
		}

		assert.Equal(t, before, openFiles(t))
	})
}

func openFiles(t *testing.T) int {
	t.Helper()

	fds, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)

	return len(fds)
}

// A pod's row for any address and its row for one have a socket each.
func TestSocketsOfOnePort(t *testing.T) {
	n := anyNode(t)
	anyIP := &PortMapping{HostPort: 8080, ContainerPort: 80}
	one := &PortMapping{HostPort: 8080, ContainerPort: 80, HostIP: n.nodeIP(IPv4).String()}

	for _, proto := range []string{"TCP", "UDP"} {
		for _, order := range [][]*PortMapping{{anyIP, one}, {one, anyIP}} {
			m := n.manager()

			for _, pm := range order {
				pm.Protocol = v1.Protocol(proto)
				require.NoError(t, n.add(m, "id", n.pod(0, IPv4, pm)))
			}

			for _, mapping := range m.Mappings() {
				assert.True(t, mapping.Held)
			}

			require.NoError(t, n.remove(m, "id", n.pod(0, IPv4, order[0])))
			require.Len(t, m.Mappings(), 1)

			n.do(func() {
				kind := map[string]int{"TCP": unix.SOCK_STREAM, "UDP": unix.SOCK_DGRAM}[proto]
				_, err := tryBind(t, netip.AddrPortFrom(n.nodeIP(IPv4), 8080), kind, unix.SO_REUSEADDR)
				assert.ErrorIs(t, err, unix.EADDRINUSE, "the other row is still held")
			})
			require.NoError(t, n.remove(m, "id", nil))
			require.NoError(t, m.Close())
		}
	}
}

// A row from before does not stand for its port: who serves it meanwhile is
// found when a pod wants it.
func TestPortTakenWhileAway(t *testing.T) {
	eachBackend(t, func(t *testing.T, n *node) {
		pod := n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})
		n.leftBehind("id", pod)

		var fd int

		n.do(func() {
			var err error
			fd, err = tryBind(t, netip.AddrPortFrom(netip.IPv4Unspecified(), 8080), unix.SOCK_STREAM)
			require.NoError(t, err)
		})

		m := n.manager()
		require.Len(t, m.Mappings(), 1)
		assert.False(t, m.Mappings()[0].Held)

		before := n.dump(m)

		for _, id := range []string{"other", "id"} {
			require.ErrorIs(t, n.add(m, id, pod), unix.EADDRINUSE)
		}

		assert.Equal(t, before, n.dump(m))
		require.NoError(t, unix.Close(fd))
		require.NoError(t, n.add(m, "id", pod))
		assert.True(t, m.Mappings()[0].Held)
	})
}

// A pod's second socket for a port does not take it from others, nor let them in.
func TestSecondSocketBesideOthers(t *testing.T) {
	for _, f := range []IPFamily{IPv4, IPv6} {
		n := anyNode(t)
		m := n.manager()

		for proto, kind := range map[v1.Protocol]int{v1.ProtocolTCP: unix.SOCK_STREAM, v1.ProtocolUDP: unix.SOCK_DGRAM} {
			besideServer(n, netip.AddrPortFrom(n.nodeIP(f), 5353), kind)

			one := &PortMapping{HostPort: 5353, ContainerPort: 53, Protocol: proto, HostIP: n.nodeIP(f).String()}
			require.NoError(t, n.add(m, "id", n.pod(0, f, one)))
			require.ErrorIs(t, n.add(m, "id", n.pod(0, f, &PortMapping{HostPort: 5353, ContainerPort: 53, Protocol: proto})), unix.EADDRINUSE)
			assert.Len(t, m.Mappings(), 1)
			n.refusesOthers(kind, 5353, n.nodeIP(f))
			require.NoError(t, n.remove(m, "id", nil))
		}
	}
}
