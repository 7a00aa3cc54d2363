package links

import (
	"encoding/binary"
	"errors"
	"net/netip"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// linkTo asks for the interface by which the node reaches an address (rtnetlink(7)). It is asked at
// each Add, and libraries that have such a question take three times as long and more.
func (l *Finder) linkTo(ip netip.Addr) (index uint32, err error) {
	if err := l.openSocket(); err != nil {
		return 0, err
	}

	l.asked++

	request, err := routeRequest(ip, l.asked)
	if err != nil {
		return 0, err
	}

	if err := unix.Sendto(l.socket, request, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return 0, err //nolint:wrapcheck // To does
	}

	var buf [1024]byte // one route fits

	for {
		n, _, err := unix.Recvfrom(l.socket, buf[:], 0)
		if errors.Is(err, unix.EINTR) { // with a timeout the kernel does not go on by itself (signal(7))
			continue
		}

		if err != nil {
			return 0, err //nolint:wrapcheck // likewise
		}

		var m netlink.Message
		if m.UnmarshalBinary(buf[:n]) == nil && m.Header.Sequence == l.asked { // or of a request whose time was up
			return outputOf(m)
		}
	}
}

// routeRequest asks for the route to an address.
func routeRequest(ip netip.Addr, sequence uint32) ([]byte, error) {
	family := byte(unix.AF_INET)
	if ip.Is6() {
		family = unix.AF_INET6
	}

	to, err := netlink.MarshalAttributes([]netlink.Attribute{{Type: unix.RTA_DST, Data: ip.AsSlice()}})
	if err != nil {
		return nil, err //nolint:wrapcheck // To does
	}

	route := [unix.SizeofRtMsg]byte{family, byte(ip.BitLen())} //nolint:gosec // 32 or 128

	m := netlink.Message{
		Header: netlink.Header{
			Length: uint32(unix.NLMSG_HDRLEN + len(route) + len(to)), //nolint:gosec // small
			Type:   unix.RTM_GETROUTE, Flags: netlink.Request, Sequence: sequence,
		},
		Data: append(route[:], to...),
	}

	return m.MarshalBinary() //nolint:wrapcheck // likewise
}

// outputOf is the interface of a route.
func outputOf(m netlink.Message) (index uint32, err error) {
	if m.Header.Type == netlink.Error {
		return 0, unix.Errno(-int32(binary.NativeEndian.Uint32(m.Data))) //nolint:gosec,wrapcheck // struct nlmsgerr; To does
	}

	attrs, err := netlink.NewAttributeDecoder(m.Data[unix.SizeofRtMsg:])
	if err != nil {
		return 0, err //nolint:wrapcheck // likewise
	}

	for attrs.Next() {
		if attrs.Type() == unix.RTA_OIF {
			return attrs.Uint32(), nil
		}
	}

	return 0, unix.ENODEV
}
