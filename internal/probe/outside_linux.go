package probe

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/cri-o/hostport/internal/row"
)

// Outside is a place outside the node, at the other end of a TUN device of its own: what it
// sends enters the node's prerouting hook as any packet from the network does. The device goes
// with its file descriptor, and the route to the place with the device, however the process
// ends.
type Outside struct {
	file   *os.File
	device string
	addr   netip.Addr
}

// Kind is what became of a question.
type Kind string

// The kinds of answers.
const (
	Silence     Kind = "silence"     // none
	Accepted    Kind = "accepted"    // SYN-ACK, a datagram, INIT-ACK
	Refused     Kind = "refused"     // RST, ABORT, ICMP port unreachable
	Unreachable Kind = "unreachable" // another ICMP error
)

// Answer is what came back.
type Answer struct {
	Kind   Kind
	From   netip.AddrPort // who answered, as the asker sees it; of ICMP the router, port 0
	Why    string         // of ICMP, in words: "host unreachable"
	Source netip.AddrPort // the asker's side
}

// Open makes a place outside the network namespace of the calling thread. The error is
// unix.EPERM without CAP_NET_ADMIN.
func Open(f row.Family) (*Outside, error) {
	file, device, err := newDevice()
	if err != nil {
		return nil, fmt.Errorf("make a TUN device: %w", err)
	}

	addr, err := connect(device, f)
	if err != nil {
		_ = file.Close()

		return nil, fmt.Errorf("set up %s: %w", device, err)
	}

	return &Outside{file: file, device: device, addr: addr}, nil
}

// newDevice makes a device and returns what is written to and read at its other end.
func newDevice() (*os.File, string, error) {
	const path = "/dev/net/tun"

	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, "", &os.PathError{Op: "open", Path: path, Err: err}
	}

	request, _ := unix.NewIfreq("hostports%d") // fails on longer names alone
	request.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)

	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); err != nil {
		_ = unix.Close(fd)

		return nil, "", fmt.Errorf("TUNSETIFF: %w", err)
	}

	return os.NewFile(uintptr(fd), path), request.Name(), nil
}

// connect raises the device, and makes it lead to an address, which it returns.
func connect(device string, f row.Family) (netip.Addr, error) {
	routing, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return netip.Addr{}, fmt.Errorf("open rtnetlink: %w", err)
	}
	defer routing.Close()

	link, err := routing.LinkByName(device)
	if err != nil {
		return netip.Addr{}, fmt.Errorf("look it up: %w", err)
	}

	if err := routing.LinkSetUp(link); err != nil {
		return netip.Addr{}, fmt.Errorf("raise it: %w", err)
	}

	// It may be off on new devices. Where this cannot be written, a probe shows what that does.
	_ = os.WriteFile("/proc/sys/net/ipv4/conf/"+device+"/forwarding", []byte("1"), 0)

	addr, err := pick(routing, f)
	if err != nil {
		return netip.Addr{}, err
	}

	if err := addAddress(routing, link, f); err != nil {
		return netip.Addr{}, err
	}

	err = routing.RouteAdd(&netlink.Route{
		LinkIndex: link.Attrs().Index,
		Scope:     netlink.SCOPE_LINK,
		Dst:       &net.IPNet{IP: addr.AsSlice(), Mask: net.CIDRMask(addr.BitLen(), addr.BitLen())},
	})

	switch {
	case f == row.IPv6 && errors.Is(err, unix.EACCES): // fib6_nh_init in net/ipv6/route.c
		return netip.Addr{}, fmt.Errorf("IPv6 is off on new devices (net.ipv6.conf.default.disable_ipv6): %w", err)
	case err != nil:
		return netip.Addr{}, fmt.Errorf("add the route to %s: %w", addr, err)
	}

	routes, err := routing.RouteGet(addr.AsSlice())

	switch {
	case err != nil:
		return netip.Addr{}, fmt.Errorf("look up the route to %s: %w", addr, err)
	case routes[0].LinkIndex != link.Attrs().Index:
		return netip.Addr{}, fmt.Errorf("the node sends what is for %s elsewhere: a rule (ip rule) comes before the main table", addr)
	default:
		return addr, nil
	}
}

// addAddress gives the device an address, as any way into a node has: a rule that redirects drops what
// comes in by a device without (net/netfilter/nf_nat_redirect.c). IPv6's own link-local one comes
// when it comes.
func addAddress(routing *netlink.Handle, link netlink.Link, f row.Family) error {
	addr, err := pick(routing, f)
	if err != nil {
		return err
	}

	err = routing.AddrAdd(link, &netlink.Addr{
		IPNet: &net.IPNet{IP: addr.AsSlice(), Mask: net.CIDRMask(addr.BitLen(), addr.BitLen())},
		Scope: unix.RT_SCOPE_LINK, // it is no source for what goes elsewhere
		Flags: unix.IFA_F_NODAD,   // usable at once
	})
	if err != nil && !errors.Is(err, unix.EACCES) { // IPv6 is off, which the route tells
		return fmt.Errorf("add the address %s: %w", addr, err)
	}

	return nil
}

// pick returns an address that the node has no use for. Firewalls take packets from the networks
// of examples (RFC 5737) and from link-local ones for forged. IPv4's is of those for benchmarks
// (RFC 2544), IPv6's a random local one (RFC 4193).
func pick(routing *netlink.Handle, f row.Family) (netip.Addr, error) {
	const attempts = 32

	addr := randomAddr(f)
	for range attempts - 1 {
		if !taken(routing, addr) {
			return addr, nil
		}

		addr = randomAddr(f)
	}

	return netip.Addr{}, fmt.Errorf("the node has routes to %d addresses of no use, such as %s", attempts, addr)
}

// taken reports whether the node knows a way to an address besides one to everywhere.
func taken(routing *netlink.Handle, addr netip.Addr) bool {
	// A route to more than this is no sign that somebody has the address: a VPN's to half of
	// the internet, or one to all private networks.
	const general = 15

	routes, err := routing.RouteGetWithOptions(addr.AsSlice(), &netlink.RouteGetOptions{FIBMatch: true})
	if err != nil || routes[0].Dst == nil { // no way, or by default
		return false
	}

	bits, _ := routes[0].Dst.Mask.Size()

	return bits >= general
}

func randomAddr(f row.Family) netip.Addr {
	var b [16]byte

	_, _ = rand.Read(b[:]) // never fails

	if f == row.IPv4 {
		return netip.AddrFrom4([4]byte{198, 18 | b[0]&1, b[1], b[2]}) // 198.18.0.0/15
	}

	b[0] = 0xfd

	return netip.AddrFrom16(b)
}

// Device returns the name of the device in the node, such as "hostports0".
func (o *Outside) Device() string { return o.device }

// Addr returns the address of the place.
func (o *Outside) Addr() netip.Addr { return o.addr }

// Close ends the place: device and route are gone when it returns.
func (o *Outside) Close() error {
	if err := o.file.Close(); err != nil {
		return fmt.Errorf("close %s: %w", o.device, err)
	}

	return nil
}

// Ask sends a first packet to a port and returns the answer. It repeats the packet after one
// second, two more, four more, until the context's deadline, which makes it Silence. It takes one
// question at a time. No service sees a connection: that is reset before it stands.
func (o *Outside) Ask(ctx context.Context, p row.Protocol, to netip.AddrPort) (Answer, error) {
	if row.FamilyOf(to.Addr()) != row.FamilyOf(o.addr) {
		return Answer{}, fmt.Errorf("ask %s from %s: two IP families", to, o.addr)
	}

	answer, err := o.ask(ctx, newFlow(p, o.addr, to))
	if err != nil {
		return Answer{}, fmt.Errorf("ask %s by %s: %w", to, o.device, err)
	}

	return answer, nil
}

func (o *Outside) ask(ctx context.Context, f flow) (Answer, error) {
	defer context.AfterFunc(ctx, func() { _ = o.file.SetReadDeadline(time.Now()) })()

	// As TCP does: Linux never gets to tell whoever asks each second that it has no route. Both
	// ip_error (net/ipv4/route.c) and icmpv4_xrlim_allow take what they may send in a second.
	for wait := time.Second; ; wait *= 2 {
		if _, err := o.file.Write(f.first()); err != nil {
			return Answer{}, err //nolint:wrapcheck // Ask does
		}

		r, err := o.hear(ctx, f, time.Now().Add(wait))

		switch {
		case err == nil:
			if last := f.last(r); last != nil {
				_, err = o.file.Write(last)
			}

			return Answer{Kind: r.kind, From: r.from, Why: r.why, Source: f.from}, err //nolint:wrapcheck // Ask does
		case errors.Is(ctx.Err(), context.DeadlineExceeded):
			return Answer{Kind: Silence, Source: f.from}, nil
		case ctx.Err() != nil:
			return Answer{}, ctx.Err()
		case !errors.Is(err, os.ErrDeadlineExceeded):
			return Answer{}, err //nolint:wrapcheck // Ask does
		}
	}
}

// hear waits for an answer. The node sends other packets as well: it greets its neighbours.
func (o *Outside) hear(ctx context.Context, f flow, until time.Time) (reply, error) {
	if err := o.file.SetReadDeadline(until); err != nil {
		return reply{}, err //nolint:wrapcheck // Ask does
	}

	var buf [65536]byte

	for ctx.Err() == nil { // if it has ended before, nothing else ends Read
		n, err := o.file.Read(buf[:])
		if err != nil {
			return reply{}, err //nolint:wrapcheck // Ask does
		}

		if r, ok := parse(buf[:n]); ok && f.hears(r) {
			return r, nil
		}
	}

	return reply{}, ctx.Err()
}
