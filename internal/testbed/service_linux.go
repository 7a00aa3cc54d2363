package testbed

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// patience bounds every operation that waits for something. Within the bed
// answers take microseconds; this leaves room for a retransmitted SYN (1 s, 3 s).
var patience = Stretch(5 * time.Second) //nolint:gochecknoglobals // would be a constant if nothing were measured

// Stretch makes a time limit longer on a slow machine, such as an emulated one,
// by as much as that takes longer than 1.5 µs for a page of memory. There a process
// takes longer still.
func Stretch(limit time.Duration) time.Duration { return limit * time.Duration(slowness) }

var slowness = int64(max(1, timeOfPage()/(1500*time.Nanosecond))) //nolint:gochecknoglobals // measured once

func timeOfPage() time.Duration {
	const runs, pages = 5, 256
	size := os.Getpagesize()
	least := time.Duration(math.MaxInt64)
	for range runs { // one of them is not interrupted by others
		start := time.Now()
		memory, err := unix.Mmap(-1, 0, pages*size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
		if err != nil {
			return 0
		}
		for i := range pages {
			memory[i*size] = 1
		}
		_ = unix.Munmap(memory)
		least = min(least, time.Since(start))
	}
	return least / pages
}

// maxDatagram is more than any request or answer.
const maxDatagram = 1024

// A Service answers requests on one address of a namespace.
type Service struct {
	name   string
	addr   netip.AddrPort
	count  atomic.Uint64
	ctx    context.Context // ends with the service
	cancel context.CancelFunc
	socket io.Closer
	closed func() error
	wg     sync.WaitGroup
}

// Serve answers each request to addr with one line: the namespace's name, the
// remote address and the request. The network is "tcp", where each line is a
// request and a connection stays open until the client closes it, or "udp",
// where each datagram is. Port 0 picks a free port, see [Service.Addr]. The
// service ends with Close of the service, of the namespace or of the bed. UDP
// services want a specific address: at 0.0.0.0 or :: the kernel picks the source
// of the answer anew, and a client only accepts answers from where it asked.
func (n *Namespace) Serve(network string, addr netip.AddrPort) (*Service, error) {
	s := &Service{name: n.Name}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.closed = sync.OnceValue(func() error {
		s.cancel()
		err := s.socket.Close()
		s.wg.Wait()
		return err
	})
	if err := n.Do(func() error { return s.listen(network, addr) }); err != nil {
		s.cancel()
		return nil, fmt.Errorf("serve %s %s in %s: %w", network, addr, n.Name, err)
	}
	if err := n.register(s); err != nil {
		return nil, fmt.Errorf("serve %s %s in %s: %w", network, addr, n.Name, errors.Join(err, s.Close()))
	}
	return s, nil
}

// Addr returns the address the service listens on.
func (s *Service) Addr() netip.AddrPort { return s.addr }

// Count returns the number of requests answered. A request whose answer has
// arrived is counted.
func (s *Service) Count() uint64 { return s.count.Load() }

// Close ends the service and its connections. Further calls return what the
// first one did.
func (s *Service) Close() error { return s.closed() }

// listen opens the socket and starts serving it. Naming the family keeps an
// IPv6 service from claiming the port of the IPv4 one.
func (s *Service) listen(network string, addr netip.AddrPort) error {
	family, err := withFamily(network, addr.Addr())
	if err != nil {
		return err
	}
	if network == "udp" {
		conn, err := net.ListenUDP(family, net.UDPAddrFromAddrPort(addr))
		if err != nil {
			return err
		}
		s.socket, s.addr = conn, conn.LocalAddr().(*net.UDPAddr).AddrPort()
		s.wg.Go(func() { s.serveUDP(conn) })
		return nil
	}
	listener, err := net.ListenTCP(family, net.TCPAddrFromAddrPort(addr))
	if err != nil {
		return err
	}
	s.socket, s.addr = listener, listener.Addr().(*net.TCPAddr).AddrPort()
	s.wg.Go(func() { s.serveTCP(listener) })
	return nil
}

func (s *Service) serveTCP(listener *net.TCPListener) {
	for {
		conn, err := listener.AcceptTCP()
		if err != nil {
			return
		}
		s.wg.Go(func() {
			defer conn.Close()
			defer context.AfterFunc(s.ctx, func() { conn.Close() })()
			remote := conn.RemoteAddr().(*net.TCPAddr).AddrPort()
			for lines := bufio.NewScanner(conn); lines.Scan(); {
				if _, err := conn.Write(s.answer(remote, lines.Text())); err != nil {
					return
				}
			}
		})
	}
}

func (s *Service) serveUDP(conn *net.UDPConn) {
	buf := make([]byte, maxDatagram)
	for {
		n, remote, err := conn.ReadFromUDPAddrPort(buf)
		if err != nil {
			return
		}
		// A firewall rule may refuse the answer; the next one may pass.
		_, _ = conn.WriteToUDPAddrPort(s.answer(remote, string(buf[:n])), remote)
	}
}

func (s *Service) answer(remote netip.AddrPort, request string) []byte {
	s.count.Add(1) // before the answer is sent: see Count
	return fmt.Appendf(nil, "%s %s %s\n", s.name, remote, strings.TrimSpace(request))
}

// An Answer is what a service said.
type Answer struct {
	From   string         // the name of the namespace that answered
	Source netip.AddrPort // the sender's address as the service saw it
	Took   time.Duration  // from before the connection to the end of the answer
}

// Ask sends one request from the namespace and waits for the answer, for at
// most five seconds, stretched. Nothing answering in time is a context.DeadlineExceeded,
// a closed port a syscall.ECONNREFUSED. A UDP request is a single datagram:
// nothing in the bed loses one, so a lost one is a finding.
func (n *Namespace) Ask(ctx context.Context, network string, to netip.AddrPort) (Answer, error) {
	return n.AskFrom(ctx, network, netip.AddrPort{}, to)
}

// AskFrom is [Namespace.Ask] with a given local address. Its port may be 0; a
// UDP port that is used again continues the flow that connection tracking
// knows.
func (n *Namespace) AskFrom(ctx context.Context, network string, from, to netip.AddrPort) (Answer, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	start := time.Now()
	answer, err := n.ask(ctx, network, from, to)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		// A socket's deadline may pass an instant before the context's does.
		err = fmt.Errorf("%w: %w", cmp.Or(ctx.Err(), context.DeadlineExceeded), err)
	}
	if err != nil {
		return Answer{}, fmt.Errorf("ask %s %s from %s: %w", network, to, n.Name, err)
	}
	answer.Took = time.Since(start)
	return answer, nil
}

func (n *Namespace) ask(ctx context.Context, network string, from, to netip.AddrPort) (Answer, error) {
	conn, err := n.dial(ctx, network, from, to)
	if err != nil {
		return Answer{}, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Now()) })()

	request := strconv.FormatUint(rand.Uint64(), 36)
	if _, err := fmt.Fprintln(conn, request); err != nil {
		return Answer{}, err
	}
	// The answer to an earlier request from the same UDP port may arrive late.
	for lines := bufio.NewReaderSize(conn, maxDatagram); ; {
		line, err := lines.ReadString('\n')
		if err != nil {
			return Answer{}, err
		}
		answer, echo, err := parseAnswer(line)
		if err != nil || echo == request {
			return answer, err
		}
	}
}

func (n *Namespace) dial(ctx context.Context, network string, from, to netip.AddrPort) (conn net.Conn, err error) {
	family, err := withFamily(network, to.Addr())
	if err != nil {
		return nil, err
	}
	var dialer net.Dialer
	if from.IsValid() && network == "udp" {
		dialer.LocalAddr = net.UDPAddrFromAddrPort(from)
	} else if from.IsValid() {
		dialer.LocalAddr = net.TCPAddrFromAddrPort(from)
	}
	err = n.Do(func() error {
		conn, err = dialer.DialContext(ctx, family, to.String())
		return err
	})
	return conn, err
}

func parseAnswer(line string) (answer Answer, echo string, err error) {
	fields := strings.Fields(line)
	if len(fields) != 3 {
		return Answer{}, "", fmt.Errorf("unexpected answer %q", line)
	}
	source, err := netip.ParseAddrPort(fields[1])
	if err != nil {
		return Answer{}, "", fmt.Errorf("unexpected answer %q: %w", line, err)
	}
	return Answer{From: fields[0], Source: source}, fields[2], nil
}

// withFamily turns "tcp" into "tcp4" or "tcp6", and "udp" likewise.
func withFamily(network string, addr netip.Addr) (string, error) {
	switch {
	case network != "tcp" && network != "udp":
		return "", net.UnknownNetworkError(network)
	case !addr.IsValid():
		return "", errors.New("no address")
	case addr.Is4():
		return network + "4", nil
	default:
		return network + "6", nil
	}
}
