package testbed

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func newBed(t *testing.T, pods ...string) *Bed {
	t.Helper()
	bed, err := New(pods...)
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, bed.Close()) })
	return bed
}

// eachNetwork runs f for both families and both protocols.
func eachNetwork(t *testing.T, f func(t *testing.T, network string, v6 bool)) {
	for _, network := range []string{"tcp", "udp"} {
		for _, v6 := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/v6=%t", network, v6), func(t *testing.T) { f(t, network, v6) })
		}
	}
}

func TestTraffic(t *testing.T) {
	bed := newBed(t, "web", "db")
	web, db := bed.Pods[0], bed.Pods[1]
	for _, test := range []struct {
		name     string
		from, to *Namespace
		source   func(v6 bool) netip.Addr
		addr     func(v6 bool) netip.Addr
	}{
		{"client to node", bed.Client, bed.Host, bed.ClientIP, bed.NodeIP},
		{"client to other node address", bed.Client, bed.Host, bed.ClientIP, bed.OtherNodeIP},
		{"client to peer", bed.Client, bed.Peer, bed.ClientIP, bed.PeerIP},
		{"peer to node", bed.Peer, bed.Host, bed.PeerIP, bed.NodeIP},
		{"client to pod", bed.Client, web.Namespace, bed.ClientIP, web.IP},
		{"pod to pod", web.Namespace, db.Namespace, web.IP, db.IP},
		{"pod to node", db.Namespace, bed.Host, db.IP, bed.NodeIP},
		{"pod to client", db.Namespace, bed.Client, db.IP, bed.ClientIP},
		{"host to pod", bed.Host, web.Namespace, podGateway, web.IP},
		{"host to itself", bed.Host, bed.Host, bed.NodeIP, bed.NodeIP},
		{"loopback", web.Namespace, web.Namespace, loopback, loopback},
	} {
		t.Run(test.name, func(t *testing.T) {
			eachNetwork(t, func(t *testing.T, network string, v6 bool) {
				service, err := test.to.Serve(network, netip.AddrPortFrom(test.addr(v6), 0))
				require.NoError(t, err)
				for count := range uint64(2) {
					answer, err := test.from.Ask(t.Context(), network, service.Addr())
					require.NoError(t, err)
					assert.Equal(t, test.to.Name, answer.From)
					assert.Equal(t, test.source(v6), answer.Source.Addr())
					assert.Less(t, answer.Took, time.Second, "something was retransmitted")
					assert.Positive(t, answer.Took)
					assert.Equal(t, count+1, service.Count())
				}

				require.NoError(t, service.Close())
				_, err = test.from.Ask(t.Context(), network, service.Addr())
				require.ErrorIs(t, err, syscall.ECONNREFUSED)
			})
		})
	}
}

func loopback(v6 bool) netip.Addr { return family(v6, "127.0.0.1", "::1") }

// Without hairpin mode the bridge would not send a frame back to its port.
func TestHairpinMode(t *testing.T) {
	bed := newBed(t, "one", "two")
	require.NoError(t, bed.Host.configure(func(h *netlink.Handle) error {
		for _, name := range []string{"veth1", "veth2"} {
			port, err := h.LinkByName(name)
			require.NoError(t, err)
			info, err := undisturbed(func() (netlink.Protinfo, error) { return h.LinkGetProtinfo(port) })
			require.NoError(t, err)
			assert.True(t, info.Hairpin, name)
		}
		return nil
	}))
}

// Pods would send to the bridge's old address until their neighbour entry ages.
func TestBridgeKeepsItsAddress(t *testing.T) {
	bed := newBed(t)
	address := func() (address string) {
		require.NoError(t, bed.Host.configure(func(h *netlink.Handle) error {
			link, err := h.LinkByName(bridge)
			require.NoError(t, err)
			address = link.Attrs().HardwareAddr.String()
			return nil
		}))
		return address
	}
	before := address()
	_, err := bed.AddPod("one")
	require.NoError(t, err)
	assert.Equal(t, before, address())
}

// What New returns is ready: no device is left to the kernel's work queues.
func TestSettled(t *testing.T) {
	for range 20 {
		bed := newBed(t, "pod")
		for _, test := range []struct {
			n       *Namespace
			devices []string
		}{
			{bed.Host, []string{bridge, "veth1", "eth1", "eth0"}},
			{bed.Client, []string{"eth0"}},
			{bed.Peer, []string{"eth0"}},
			{bed.Pods[0].Namespace, []string{"eth0"}},
		} {
			require.NoError(t, test.n.configure(func(h *netlink.Handle) error {
				for _, device := range test.devices {
					ready, err := settled(h, device)
					require.NoError(t, err)
					require.True(t, ready, "%s in %s", device, test.n.Name)
				}
				return nil
			}))
		}
		require.NoError(t, bed.Close())
	}
}

// A dump is tried again while others change what it lists. It takes several
// messages, and others between them, for the kernel to notice that.
func TestDumpInterrupted(t *testing.T) {
	bed := newBed(t)
	link := func(h *netlink.Handle) netlink.Link {
		link, err := h.LinkByName("eth0")
		require.NoError(t, err)
		return link
	}
	address := func(i int) *netlink.Addr {
		ip := netip.AddrFrom16([16]byte{0: 0xfd, 14: byte(i >> 8), 15: byte(i)})
		return &netlink.Addr{IPNet: &net.IPNet{IP: ip.AsSlice(), Mask: net.CIDRMask(128, 128)}}
	}
	require.NoError(t, bed.Client.configure(func(h *netlink.Handle) error {
		eth0 := link(h)
		for i := range 1000 {
			require.NoError(t, h.AddrAdd(eth0, address(i)))
		}
		return nil
	}))

	var others sync.WaitGroup
	stop := make(chan struct{})
	others.Go(func() {
		assert.NoError(t, bed.Client.configure(func(h *netlink.Handle) error {
			for eth0 := link(h); ; {
				select {
				case <-stop:
					return nil
				default:
					if err := errors.Join(h.AddrAdd(eth0, address(1000)), h.AddrDel(eth0, address(1000))); err != nil {
						return err
					}
				}
			}
		}))
	})
	defer others.Wait()
	defer close(stop)

	require.NoError(t, bed.Client.configure(func(h *netlink.Handle) error {
		eth0 := link(h)
		deadline := time.Now().Add(4 * patience)
		for interrupted := 0; interrupted < 5; {
			require.True(t, time.Now().Before(deadline), "%d dumps were interrupted", interrupted)
			if _, err := h.AddrList(eth0, netlink.FAMILY_V6); errors.Is(err, netlink.ErrDumpInterrupted) {
				interrupted++
			}
			_, err := settled(h, "eth0")
			require.NoError(t, err)
		}
		return nil
	}))
}

// It does not go on forever.
func TestDumpAlwaysInterrupted(t *testing.T) {
	dumps := 0
	_, err := undisturbed(func() (int, error) {
		dumps++
		return 0, netlink.ErrDumpInterrupted
	})
	assert.ErrorIs(t, err, netlink.ErrDumpInterrupted)
	assert.Equal(t, 100, dumps)
}

func TestFamiliesAreApart(t *testing.T) {
	bed := newBed(t)
	eachNetwork(t, func(t *testing.T, network string, v6 bool) {
		unspecified := netip.AddrPortFrom(family(v6, "0.0.0.0", "::"), 80)
		_, err := bed.Host.Serve(network, unspecified)
		require.NoError(t, err)
		if network == "tcp" {
			answer, err := bed.Client.Ask(t.Context(), network, netip.AddrPortFrom(bed.NodeIP(v6), 80))
			require.NoError(t, err)
			assert.Equal(t, bed.ClientIP(v6), answer.Source.Addr())
		}
	})
}

func TestAskFrom(t *testing.T) {
	bed := newBed(t)
	eachNetwork(t, func(t *testing.T, network string, v6 bool) {
		service, err := bed.Client.Serve(network, netip.AddrPortFrom(bed.ClientIP(v6), 0))
		require.NoError(t, err)
		for _, source := range []netip.AddrPort{
			netip.AddrPortFrom(bed.OtherNodeIP(v6), 4000),
			netip.AddrPortFrom(peerGateway(v6), 0),
		} {
			answer, err := bed.Host.AskFrom(t.Context(), network, source, service.Addr())
			require.NoError(t, err)
			assert.Equal(t, source.Addr(), answer.Source.Addr())
			if source.Port() != 0 {
				assert.Equal(t, source.Port(), answer.Source.Port())
			}
		}
	})
}

// An answer that arrives after its asker gave up is not the next one's.
func TestLateAnswer(t *testing.T) {
	bed := newBed(t)
	var conn *net.UDPConn
	require.NoError(t, bed.Host.Do(func() (err error) {
		conn, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(bed.NodeIP(false), 53)))
		return err
	}))
	defer conn.Close()
	go func() {
		buf := make([]byte, maxDatagram)
		n, remote, err := conn.ReadFromUDPAddrPort(buf)
		if err != nil {
			return
		}
		for _, answer := range []string{"late 192.0.2.2:1 other", "host 192.0.2.2:2 " + string(buf[:n])} {
			_, _ = conn.WriteToUDPAddrPort([]byte(answer+"\n"), remote)
		}
	}()
	answer, err := bed.Client.Ask(t.Context(), "udp", netip.AddrPortFrom(bed.NodeIP(false), 53))
	require.NoError(t, err)
	assert.Equal(t, "host", answer.From)
}

func TestNoAnswer(t *testing.T) {
	bed := newBed(t)
	for _, test := range []struct {
		name string
		ctx  func(context.Context) (context.Context, context.CancelFunc)
		want error
	}{
		{"deadline", func(ctx context.Context) (context.Context, context.CancelFunc) {
			return context.WithTimeout(ctx, 20*time.Millisecond)
		}, context.DeadlineExceeded},
		{"cancelled", func(ctx context.Context) (context.Context, context.CancelFunc) {
			ctx, cancel := context.WithCancel(ctx)
			time.AfterFunc(20*time.Millisecond, cancel)
			return ctx, cancel
		}, context.Canceled},
	} {
		t.Run(test.name, func(t *testing.T) {
			// The host takes requests to the first address and does not answer;
			// nobody has the second one, and neighbour discovery goes on for 3 s.
			var listener net.Listener
			var conn net.PacketConn
			require.NoError(t, bed.Host.Do(func() (err error) {
				var tcpErr error
				listener, tcpErr = net.Listen("tcp", "192.0.2.1:80")
				conn, err = net.ListenPacket("udp", "192.0.2.1:80")
				return errors.Join(err, tcpErr)
			}))
			defer listener.Close()
			defer conn.Close()
			for _, network := range []string{"tcp", "udp"} {
				for _, to := range []string{"192.0.2.1:80", "192.0.2.99:80"} {
					ctx, cancel := test.ctx(t.Context())
					_, err := bed.Client.Ask(ctx, network, netip.MustParseAddrPort(to))
					cancel()
					require.ErrorIs(t, err, test.want, "%s %s", network, to)
				}
			}
		})
	}
}

func TestOneConnectionManyRequests(t *testing.T) {
	bed := newBed(t)
	service, err := bed.Host.Serve("tcp", netip.AddrPortFrom(bed.NodeIP(false), 0))
	require.NoError(t, err)
	var conn net.Conn
	require.NoError(t, bed.Client.Do(func() (err error) {
		conn, err = net.Dial("tcp", service.Addr().String())
		return err
	}))
	defer conn.Close()
	require.NoError(t, conn.SetDeadline(time.Now().Add(patience)))
	reader := bufio.NewReader(conn)
	for _, request := range []string{"a", "b"} {
		_, err := fmt.Fprintln(conn, request)
		require.NoError(t, err)
		line, err := reader.ReadString('\n')
		require.NoError(t, err)
		assert.Equal(t, fmt.Sprintf("host %s %s\n", conn.LocalAddr(), request), line)
	}
	require.NoError(t, service.Close(), "an open connection must not hold up Close")
	_, err = reader.ReadString('\n')
	require.Error(t, err)
	require.NotErrorIs(t, err, os.ErrDeadlineExceeded)
}

func TestDo(t *testing.T) {
	bed := newBed(t)
	assert.ErrorIs(t, bed.Host.Do(func() error { return os.ErrInvalid }), os.ErrInvalid)
	assert.Error(t, bed.Host.Do(func() error { runtime.Goexit(); return nil }))

	require.NoError(t, bed.Host.Do(func() error {
		assertIn(t, bed.Host)
		err := bed.Client.Do(func() error { assertIn(t, bed.Client); return nil })
		assertIn(t, bed.Host)
		return err
	}))
	t.Run("concurrent", func(t *testing.T) {
		for range 8 {
			t.Run("", func(t *testing.T) {
				t.Parallel()
				for i := range 50 {
					n := []*Namespace{bed.Client, bed.Host, bed.Peer}[i%3]
					assert.NoError(t, n.Do(func() error { assertIn(t, n); return nil }))
				}
			})
		}
	})
	// Every thread is back where it belongs, the main one not excepted.
	tasks, err := os.ReadDir("/proc/self/task")
	require.NoError(t, err)
	home, err := os.Readlink("/proc/self/ns/net")
	require.NoError(t, err)
	for _, task := range tasks {
		if link, err := os.Readlink("/proc/self/task/" + task.Name() + "/ns/net"); err == nil {
			assert.Equal(t, home, link)
		}
	}
}

func assertIn(t *testing.T, n *Namespace) {
	t.Helper()
	var got, want unix.Stat_t
	assert.NoError(t, unix.Stat(ownNamespace, &got))
	assert.NoError(t, unix.Fstat(n.FD(), &want))
	assert.Equal(t, want.Ino, got.Ino)
}

func TestAddPod(t *testing.T) {
	bed := newBed(t, "one")
	pod, err := bed.AddPod("two")
	require.NoError(t, err)
	assert.Equal(t, "10.88.0.3", pod.IPv4.String())
	assert.Equal(t, "fd00:10:88::3", pod.IPv6.String())
	assert.Equal(t, []*Pod{bed.Pods[0], pod}, bed.Pods)
	_, err = bed.AddPod("two words")
	assert.Error(t, err)
	assert.Len(t, bed.Pods, 2)
}

func TestInvalid(t *testing.T) {
	bed := newBed(t)
	_, err := bed.Host.Serve("sctp", netip.MustParseAddrPort("192.0.2.1:80"))
	assert.ErrorContains(t, err, "sctp")
	_, err = bed.Host.Serve("tcp", netip.AddrPort{})
	assert.Error(t, err)
	_, err = bed.Client.Ask(t.Context(), "sctp", netip.MustParseAddrPort("192.0.2.1:80"))
	assert.ErrorContains(t, err, "sctp")
	_, err = bed.Client.AskFrom(t.Context(), "tcp", netip.MustParseAddrPort("10.9.9.9:0"), netip.MustParseAddrPort("192.0.2.1:80"))
	assert.ErrorIs(t, err, syscall.EADDRNOTAVAIL)
	_, _, err = parseAnswer("name nonsense request\n")
	assert.Error(t, err)
	_, _, err = parseAnswer("nonsense\n")
	assert.Error(t, err)
}

func TestCloseLeavesNothing(t *testing.T) {
	// The first bed makes the runtime open what it keeps, such as the poller.
	require.NoError(t, newBed(t, "warm").Close())
	files, goroutines := openFiles(t), runtime.NumGoroutine()

	bed, err := New("pod")
	require.NoError(t, err)
	eachNetwork(t, func(t *testing.T, network string, v6 bool) {
		service, err := bed.Pods[0].Serve(network, netip.AddrPortFrom(bed.Pods[0].IP(v6), 80))
		require.NoError(t, err)
		_, err = bed.Client.Ask(t.Context(), network, service.Addr())
		require.NoError(t, err)
	})
	_, err = bed.AddPod("not one word")
	require.Error(t, err)
	require.NoError(t, bed.Close())
	require.NoError(t, bed.Close())

	assert.ErrorIs(t, bed.Host.Do(func() error { return nil }), os.ErrClosed)
	_, err = bed.Host.Serve("tcp", netip.MustParseAddrPort("192.0.2.1:80"))
	assert.ErrorIs(t, err, os.ErrClosed)
	assert.Equal(t, files, openFiles(t))
	// Close may return an instant before the goroutines are gone; one more runs
	// the condition.
	assert.Eventually(t, func() bool { return runtime.NumGoroutine() <= goroutines+1 }, patience, time.Millisecond)
}

// A failing New gives back what it had made.
func TestNewFails(t *testing.T) {
	require.NoError(t, newBed(t).Close())
	files := openFiles(t)
	_, err := New("pod", "not one word")
	require.ErrorContains(t, err, "not one word")
	assert.Equal(t, files, openFiles(t))
}

func openFiles(t *testing.T) string {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	var links []string
	for _, entry := range entries {
		// The directory being read is closed by now and has no link.
		if link, err := os.Readlink("/proc/self/fd/" + entry.Name()); err == nil {
			links = append(links, entry.Name()+" "+link)
		}
	}
	return strings.Join(links, "\n")
}
