package sockets

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/cri-o/hostport/internal/row"
)

// Set holds host ports of one family, so that no other process can bind
// them. A held TCP port does not listen: a client that gets there because its
// rule is missing is refused at once. A held UDP socket queues nothing.
type Set struct {
	family row.Family
	off    bool
	Held   map[row.PortKey][]*Holder
	// waiting are the holders without a socket.
	waiting map[*Holder]bool
	gained  []row.Endpoint // of those that were waiting, since Gained has last told
}

// Holder is the socket of one endpoint, shared by the rows that stand for it
// while one takes over from another.
type Holder struct {
	row.Endpoint

	fd   int // -1 where the port could not be bound (yet)
	rows int
}

// New returns what holds ports of a family, or nothing if it is not on.
func New(f row.Family, on bool) Set {
	return Set{family: f, off: !on, Held: map[row.PortKey][]*Holder{}, waiting: map[*Holder]bool{}}
}

// Acquire holds an endpoint for one more row. It fails with
// syscall.EADDRINUSE where another process serves the port. Where the port is
// merely the source port of an outgoing connection, it succeeds, and Retry
// will bind it later.
func (s *Set) Acquire(e row.Endpoint) error {
	if !s.wants(e) {
		return nil
	}

	if h := s.find(e); h != nil {
		if err := s.Ensure(e); err != nil {
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
func (s *Set) bindOrName(e row.Endpoint) (int, error) {
	fd, err := s.bind(e)
	if errors.Is(err, unix.EADDRINUSE) {
		err = s.portInUse(e)
	}

	return fd, err
}

// Ensure tries again to bind an endpoint that is not held yet, and fails as
// Acquire does.
func (s *Set) Ensure(e row.Endpoint) error {
	h := s.find(e)
	if h == nil || h.fd >= 0 {
		return nil
	}

	fd, err := s.bindOrName(e)
	s.fill(h, fd)

	return err
}

// Adopt is Acquire for a row that stands in any case.
func (s *Set) Adopt(e row.Endpoint) error {
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

func (s *Set) find(e row.Endpoint) *Holder {
	for _, h := range s.Held[e.PortKey] {
		if h.Endpoint == e {
			return h
		}
	}

	return nil
}

func (s *Set) put(e row.Endpoint, fd int) {
	h := &Holder{Endpoint: e, fd: fd, rows: 1}

	s.Held[e.PortKey] = append(s.Held[e.PortKey], h)
	if fd < 0 {
		s.waiting[h] = true
	}
}

// Release gives back one row's share of an endpoint.
func (s *Set) Release(e row.Endpoint) {
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

	s.Held[e.PortKey] = slices.DeleteFunc(s.Held[e.PortKey], func(o *Holder) bool { return o == h })
	if len(s.Held[e.PortKey]) == 0 {
		delete(s.Held, e.PortKey)
	}
}

// Holds reports whether a socket is bound to an endpoint.
func (s *Set) Holds(e row.Endpoint) bool {
	h := s.find(e)

	return h != nil && h.fd >= 0
}

// wants reports whether an endpoint is to be held. SCTP never is: to open a socket
// would load the kernel module. Nor is a link-local address: bind(2) wants its
// scope, which a HostIP does not have.
func (s *Set) wants(e row.Endpoint) bool {
	return !s.off && e.Proto != row.SCTP && !(e.IP.Is6() && e.IP.IsLinkLocalUnicast())
}

// Lacks reports whether an endpoint is to be held and is not.
func (s *Set) Lacks(e row.Endpoint) bool { return s.wants(e) && !s.Holds(e) }

// Obstacle says why an endpoint is not held.
func (s *Set) Obstacle(e row.Endpoint) string {
	fd, err := s.bindOrName(e)

	switch {
	case err != nil:
		return err.Error()
	case fd >= 0:
		_ = unix.Close(fd)

		return "nothing is in the way any more"
	default:
		return "an outgoing connection has it"
	}
}

// Retry tries again to bind some of what is waiting.
func (s *Set) Retry() {
	const some = 16 // so that an operation's cost stays its own

	left := some

	for h := range s.waiting {
		if left == 0 {
			return
		}

		left--

		fd, _ := s.bind(h.Endpoint) // there will be another time
		s.fill(h, fd)
	}
}

// fill gives a holder its socket, if there is one now.
func (s *Set) fill(h *Holder, fd int) {
	if fd >= 0 {
		h.fd = fd
		delete(s.waiting, h)
		s.gained = append(s.gained, h.Endpoint)
	}
}

// Gained returns the endpoints that could not be held and have been since it was last called.
func (s *Set) Gained() []row.Endpoint {
	gained := s.gained
	s.gained = nil

	return gained
}

// Close releases everything.
func (s *Set) Close() {
	for _, holders := range s.Held {
		for _, h := range holders {
			if h.fd >= 0 {
				_ = unix.Close(h.fd)
			}
		}
	}

	clear(s.Held)
	clear(s.waiting)
}

// Reserve is how many files are left for others than sockets that hold ports. Both families
// at once, with a process of iptables(8) each, open some 40; the rest is the runtime's, which
// needs files for each pod. It is an eighth of the 1024 that many processes may have.
const Reserve = 128

// mayHold reports whether a new socket leaves the reserve: it has the lowest number that is
// free.
func mayHold(fd int) bool {
	var limit unix.Rlimit

	err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit)

	return err != nil || uint64(fd)+min(Reserve, limit.Cur/2) < limit.Cur //nolint:gosec // is not negative
}

// bind returns a socket bound to e.
func (s *Set) bind(e row.Endpoint) (fd int, err error) {
	domain, level, freebind := unix.AF_INET, unix.SOL_IP, unix.IP_FREEBIND
	if s.family == row.IPv6 {
		domain, level, freebind = unix.AF_INET6, unix.SOL_IPV6, unix.IPV6_FREEBIND
	}

	kind := unix.SOCK_STREAM
	if e.Proto == row.UDP {
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

	if !mayHold(fd) {
		return -1, fmt.Errorf("open socket: %w", unix.EMFILE)
	}

	if s.family == row.IPv6 {
		if err := unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_V6ONLY, 1); err != nil {
			return -1, fmt.Errorf("set IPV6_V6ONLY: %w", err)
		}
	}

	// The address may come later: a VIP.
	if err := unix.SetsockoptInt(fd, level, freebind, 1); err != nil {
		return -1, fmt.Errorf("set FREEBIND: %w", err)
	}

	if e.Proto == row.UDP {
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

// bindBeside binds fd to e, if need be beside what only looks like a conflict.
//
// SO_REUSEADDR is not on at first. Linux 5.10 and 6.1 note of a TCP port that
// every socket bound to it had that on, and then let in whoever has it on too,
// whatever ours say by then. A bind without it, or a listen(2), ends that for as
// long as anybody has the port.
func (s *Set) bindBeside(fd int, e row.Endpoint) error {
	addr := sockaddr(e.HostIP(s.family), e.Port)

	err := unix.Bind(fd, addr)
	if !errors.Is(err, unix.EADDRINUSE) {
		return err //nolint:wrapcheck // bind wraps it, having looked at what it is
	}

	// A pod may have a port both on one address and on any.
	var ours []*Holder

	for _, h := range s.Held[e.PortKey] {
		if h.fd >= 0 && h.Overlaps(e) {
			ours = append(ours, h)
		}
	}

	switch {
	case e.Proto == row.UDP && len(ours) > 0:
		err = s.bindUDPBeside(fd, e, addr, ours)
	case e.Proto == row.TCP && len(ours) > 0:
		err = s.bindTCPBeside(fd, e, addr)
	case e.Proto == row.TCP:
		err = bindBesideConnections(fd, addr)
	}

	return err
}

// bindBesideConnections binds a TCP socket where connections of others have the
// port: those in TIME_WAIT that a server has left, or outgoing ones. SO_REUSEADDR
// passes those that have it on, and is off again before anybody else can make use
// of it: what listens refuses everybody, and who was bound in between is refused
// by listen(2), or we are. A client that connects in this instant is reset.
func bindBesideConnections(fd int, addr unix.Sockaddr) error {
	if err := setReuse(1, fd); err != nil {
		return err
	}

	if err := unix.Bind(fd, addr); err != nil {
		return err //nolint:wrapcheck // bind wraps it
	}

	if err := unix.Listen(fd, 0); err != nil {
		return err //nolint:wrapcheck // bind wraps it
	}

	return errors.Join(setReuse(0, fd), unix.Shutdown(fd, unix.SHUT_RD)) // no longer listens, and stays bound
}

// bindTCPBeside binds a TCP socket where ours have the port. TCP_REPAIR binds it
// without a look at others, so that ours let nobody in meanwhile. It takes
// CAP_NET_ADMIN, as rules do.
func (s *Set) bindTCPBeside(fd int, e row.Endpoint, addr unix.Sockaddr) error {
	if err := unix.SetsockoptInt(fd, unix.SOL_TCP, unix.TCP_REPAIR, 1); err != nil {
		return unix.EADDRINUSE
	}

	if err := errors.Join(unix.Bind(fd, addr), unix.SetsockoptInt(fd, unix.SOL_TCP, unix.TCP_REPAIR, 0)); err != nil {
		return err
	}

	if inode, err := s.findServer(e, fd); err != nil || inode != 0 {
		return unix.EADDRINUSE
	}

	return nil
}

// bindUDPBeside binds a UDP socket where ours have the port.
func (s *Set) bindUDPBeside(fd int, e row.Endpoint, addr unix.Sockaddr, ours []*Holder) error {
	// SO_REUSEADDR is all it takes to share a UDP port with others.
	if inode, err := s.findServer(e); err != nil || inode != 0 {
		return unix.EADDRINUSE
	}

	fds := []int{fd}
	for _, h := range ours {
		fds = append(fds, h.fd)
	}

	err := setReuse(1, fds...)
	if err == nil {
		err = unix.Bind(fd, addr)
	}

	return errors.Join(err, setReuse(0, fds...))
}

func setReuse(on int, fds ...int) error {
	var errs []error
	for _, fd := range fds {
		errs = append(errs, unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, on))
	}

	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("set SO_REUSEADDR to %d: %w", on, err)
	}

	return nil
}

// sockaddr is an address as system calls have it.
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
