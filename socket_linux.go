package hostport

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// sockets holds host ports of one family, so that no other process can bind
// them. A held TCP port does not listen: a client that gets there because its
// rule is missing is refused at once. A held UDP socket queues nothing.
type sockets struct {
	family ipFamily
	off    bool
	held   map[portKey][]*holder
	// waiting are the holders without a socket.
	waiting map[*holder]bool
}

// holder is the socket of one endpoint, shared by the rows that stand for it
// while one takes over from another.
type holder struct {
	endpoint

	fd   int // -1 where the port could not be bound (yet)
	rows int
}

func newSockets(f ipFamily, on bool) sockets {
	return sockets{family: f, off: !on, held: map[portKey][]*holder{}, waiting: map[*holder]bool{}}
}

// acquire holds an endpoint for one more row. It fails with
// syscall.EADDRINUSE where another process serves the port. Where the port is
// merely the source port of an outgoing connection, it succeeds, and retry
// will bind it later.
func (s *sockets) acquire(e endpoint) error {
	if !s.wants(e) {
		return nil
	}

	if h := s.find(e); h != nil {
		if err := s.ensure(e); err != nil {
			return err
		}

		h.rows++

		return nil
	}

	fd, err := s.bindOrName(e)
	if err != nil {
		return err
	}

	s.put(e, fd)

	return nil
}

// bindOrName is bind, but that its error names who serves the port, and that
// it returns -1 without one where nobody does.
func (s *sockets) bindOrName(e endpoint) (int, error) {
	fd, err := s.bind(e)
	if errors.Is(err, unix.EADDRINUSE) {
		err = s.portInUse(e)
	}

	return fd, err
}

// ensure tries again to bind an endpoint that is not held yet, and fails as
// acquire does.
func (s *sockets) ensure(e endpoint) error {
	h := s.find(e)
	if h == nil || h.fd >= 0 {
		return nil
	}

	fd, err := s.bindOrName(e)
	s.fill(h, fd)

	return err
}

// adopt is acquire for a row that stands in any case.
func (s *sockets) adopt(e endpoint) error {
	if !s.wants(e) {
		return nil
	}

	if h := s.find(e); h != nil {
		h.rows++

		return nil
	}

	fd, err := s.bindOrName(e)
	s.put(e, fd)

	return err
}

func (s *sockets) find(e endpoint) *holder {
	for _, h := range s.held[e.portKey] {
		if h.endpoint == e {
			return h
		}
	}

	return nil
}

func (s *sockets) put(e endpoint, fd int) {
	h := &holder{endpoint: e, fd: fd, rows: 1}

	s.held[e.portKey] = append(s.held[e.portKey], h)
	if fd < 0 {
		s.waiting[h] = true
	}
}

// release gives back one row's share of an endpoint.
func (s *sockets) release(e endpoint) {
	h := s.find(e)
	if h == nil {
		return
	}

	h.rows--
	if h.rows > 0 {
		return
	}

	if h.fd >= 0 {
		_ = unix.Close(h.fd)
	}

	delete(s.waiting, h)

	s.held[e.portKey] = slices.DeleteFunc(s.held[e.portKey], func(o *holder) bool { return o == h })
	if len(s.held[e.portKey]) == 0 {
		delete(s.held, e.portKey)
	}
}

func (s *sockets) holds(e endpoint) bool {
	h := s.find(e)

	return h != nil && h.fd >= 0
}

// wants tells whether an endpoint is to be held. SCTP never is: to open a socket
// would load the kernel module. Nor is a link-local address: bind(2) wants its
// scope, which a HostIP does not have.
func (s *sockets) wants(e endpoint) bool {
	return !s.off && e.proto != sctp && !(e.ip.Is6() && e.ip.IsLinkLocalUnicast())
}

// lacks tells whether an endpoint is to be held and is not.
func (s *sockets) lacks(e endpoint) bool { return s.wants(e) && !s.holds(e) }

// retry tries again to bind some of what is waiting.
func (s *sockets) retry() {
	const some = 16 // so that an operation's cost stays its own

	left := some

	for h := range s.waiting {
		if left == 0 {
			return
		}

		left--

		fd, _ := s.bind(h.endpoint) // there will be another time
		s.fill(h, fd)
	}
}

// fill gives a holder its socket, if there is one now.
func (s *sockets) fill(h *holder, fd int) {
	if fd >= 0 {
		h.fd = fd
		delete(s.waiting, h)
	}
}

// close releases everything.
func (s *sockets) close() {
	for _, holders := range s.held {
		for _, h := range holders {
			if h.fd >= 0 {
				_ = unix.Close(h.fd)
			}
		}
	}

	clear(s.held)
	clear(s.waiting)
}

// bind returns a socket bound to e.
func (s *sockets) bind(e endpoint) (fd int, err error) {
	domain, level, freebind := unix.AF_INET, unix.SOL_IP, unix.IP_FREEBIND
	if s.family == IPv6 {
		domain, level, freebind = unix.AF_INET6, unix.SOL_IPV6, unix.IPV6_FREEBIND
	}

	kind := unix.SOCK_STREAM
	if e.proto == udp {
		kind = unix.SOCK_DGRAM
	}

	fd, err = unix.Socket(domain, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open socket: %w", err)
	}

	sock, kept := fd, false

	defer func() {
		if !kept {
			_ = unix.Close(sock)
		}
	}()

	if s.family == IPv6 {
		if err := unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_V6ONLY, 1); err != nil {
			return -1, fmt.Errorf("set IPV6_V6ONLY: %w", err)
		}
	}

	// The address may come later: a VIP.
	if err := unix.SetsockoptInt(fd, level, freebind, 1); err != nil {
		return -1, fmt.Errorf("set FREEBIND: %w", err)
	}

	if e.proto == udp {
		if err := dropAll(fd); err != nil {
			return -1, err
		}
	}

	if err := s.bindBeside(fd, e); err != nil {
		return -1, fmt.Errorf("bind: %w", err)
	}

	kept = true

	return fd, nil
}

// bindBeside binds fd to e.
//
// SO_REUSEADDR is on only for the bind: it lets a server's leftover TIME_WAIT
// connections pass, and sockets of ours for the same port, which have it on
// for as long: a pod may have a port both on one address and on any. Cleared,
// it makes the kernel refuse everybody else, with or without SO_REUSEADDR of
// theirs; one who binds in the instant between is refused by listen(2).
func (s *sockets) bindBeside(fd int, e endpoint) (err error) {
	reuse := []int{}
	if e.proto == tcp {
		reuse = append(reuse, fd)
	}

	for _, h := range s.held[e.portKey] {
		if h.fd >= 0 {
			reuse = append(reuse, fd, h.fd)
		}
	}

	if e.proto == udp && len(reuse) > 0 {
		// Among UDP sockets that is all it takes to share a port with others.
		if inode, err := s.findServer(e); err != nil || inode != 0 {
			return unix.EADDRINUSE
		}
	}

	defer func() { err = errors.Join(err, setReuse(reuse, 0)) }()

	if err := setReuse(reuse, 1); err != nil {
		return err
	}

	if err := unix.Bind(fd, sockaddr(e.hostIP(s.family), e.port)); err != nil {
		return err //nolint:wrapcheck // bind wraps it, having looked at what it is
	}

	return nil
}

func setReuse(fds []int, on int) error {
	var errs []error
	for _, fd := range fds {
		errs = append(errs, unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, on))
	}

	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("set SO_REUSEADDR to %d: %w", on, err)
	}

	return nil
}

func sockaddr(ip netip.Addr, port uint16) unix.Sockaddr {
	if ip.Is4() {
		return &unix.SockaddrInet4{Port: int(port), Addr: ip.As4()}
	}

	return &unix.SockaddrInet6{Port: int(port), Addr: ip.As16()}
}

// dropAll makes a socket drop whatever arrives, before it is queued.
func dropAll(fd int) error {
	filter := []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K, K: 0}}

	err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER,
		&unix.SockFprog{Len: 1, Filter: &filter[0]})
	if err != nil {
		return fmt.Errorf("set SO_ATTACH_FILTER: %w", err)
	}

	return nil
}
