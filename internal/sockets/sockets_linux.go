package sockets

import (
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/cri-o/hostport/internal/row"
)

// New returns what holds ports of a family, or nothing if it is not on.
func New(f row.Family, on bool) Set { return NewSet(on, binder{f}) }

// binder binds the kernel's sockets.
type binder struct{ family row.Family }

// Close closes a socket.
func (binder) Close(fd int) { _ = unix.Close(fd) }

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

// Bind returns a socket bound to e.
func (b binder) Bind(e row.Endpoint, ours []*Holder) (fd int, err error) {
	domain, level, freebind := unix.AF_INET, unix.SOL_IP, unix.IP_FREEBIND
	if b.family == row.IPv6 {
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

	if b.family == row.IPv6 {
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

	if err := b.bindBeside(fd, e, ours); err != nil {
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
func (b binder) bindBeside(fd int, e row.Endpoint, holders []*Holder) error {
	addr := sockaddr(e.HostIP(b.family), e.Port)

	err := unix.Bind(fd, addr)
	if !errors.Is(err, unix.EADDRINUSE) {
		return err //nolint:wrapcheck // bind wraps it, having looked at what it is
	}

	// A pod may have a port both on one address and on any.
	var ours []*Holder

	for _, h := range holders {
		if h.fd >= 0 && h.Overlaps(e) {
			ours = append(ours, h)
		}
	}

	switch {
	case e.Proto == row.UDP && len(ours) > 0:
		err = b.bindUDPBeside(fd, e, addr, ours)
	case e.Proto == row.TCP && len(ours) > 0:
		err = b.bindTCPBeside(fd, e, addr, ours)
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
func (b binder) bindTCPBeside(fd int, e row.Endpoint, addr unix.Sockaddr, ours []*Holder) error {
	if err := unix.SetsockoptInt(fd, unix.SOL_TCP, unix.TCP_REPAIR, 1); err != nil {
		return unix.EADDRINUSE
	}

	if err := errors.Join(unix.Bind(fd, addr), unix.SetsockoptInt(fd, unix.SOL_TCP, unix.TCP_REPAIR, 0)); err != nil {
		return err
	}

	if inode, err := b.findServer(e, ours, fd); err != nil || inode != 0 {
		return unix.EADDRINUSE
	}

	return nil
}

// bindUDPBeside binds a UDP socket where ours have the port.
func (b binder) bindUDPBeside(fd int, e row.Endpoint, addr unix.Sockaddr, ours []*Holder) error {
	// SO_REUSEADDR is all it takes to share a UDP port with others.
	if inode, err := b.findServer(e, ours); err != nil || inode != 0 {
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
