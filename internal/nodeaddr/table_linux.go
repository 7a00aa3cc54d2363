package nodeaddr

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// ServiceDevice is the dummy device on which kube-proxy puts the addresses of
// Services in its IPVS mode, to have their packets come in.
const ServiceDevice = "kube-ipvs0"

// eventsBuffer takes what a busy node says before anybody reads it.
const eventsBuffer = 1 << 20

// Table follows the node's addresses of one IP family, in the network namespace of the
// thread that first asks for them. Its methods may be called from several goroutines.
type Table struct {
	family uint8

	mu       sync.Mutex // guards what follows
	news     chan<- struct{}
	watching chan struct{} // closed when that ends
	requests *netlink.Conn
	events   *netlink.Conn
	closed   bool
	last     *Addresses      // as they were read last
	devices  map[uint32]bool // that had any of these, or have had since, by index
	stale    bool            // something has changed since
	passed   prefixes        // that have come or gone since Now returned last
	gone     bool            // some have gone since, if only for a moment, or may have
	buf      [4096]byte
}

// New returns a table that has yet to ask.
func New(v6 bool) *Table {
	if v6 {
		return &Table{family: unix.AF_INET6, stale: true, passed: newPrefixes(), devices: map[uint32]bool{}}
	}

	return &Table{family: unix.AF_INET, stale: true, passed: newPrefixes(), devices: map[uint32]bool{}}
}

// open opens the sockets, unless they are open. The caller holds the lock.
func (t *Table) open() (err error) {
	if t.closed {
		return net.ErrClosed
	}

	if t.requests == nil {
		if t.requests, err = netlink.Dial(unix.NETLINK_ROUTE, nil); err != nil {
			return fmt.Errorf("open rtnetlink: %w", err)
		}

		// The kernel leaves out other tables then, from Linux 4.20 on.
		_ = t.requests.SetOption(netlink.GetStrictCheck, true)
	}

	if t.events == nil {
		// An address that comes or goes is a local route that does. Only of IPv4 routes
		// that go with their device the kernel says no more than that the device goes
		// (Linux 6.18).
		groups := uint32(unix.RTMGRP_IPV4_ROUTE)
		if t.family == unix.AF_INET6 {
			groups = unix.RTMGRP_IPV6_ROUTE
		}

		t.events, err = netlink.Dial(unix.NETLINK_ROUTE, &netlink.Config{Groups: groups | 1<<(unix.RTNLGRP_LINK-1)})
		if err != nil {
			return fmt.Errorf("listen to rtnetlink: %w", err)
		}

		_ = t.events.SetReadBuffer(eventsBuffer) // with less, more is lost, and said to be
	}

	return nil
}

// Close ends it. Closing again does nothing.
func (t *Table) Close() error {
	t.mu.Lock()
	conns := []*netlink.Conn{t.requests, t.events}
	t.requests, t.events, t.closed = nil, nil, true
	t.mu.Unlock()

	var errs []error

	for _, conn := range conns { // without the lock: to close waits for whoever watches
		if conn != nil {
			errs = append(errs, conn.Close())
		}
	}

	return errors.Join(errs...)
}

// Now returns the addresses. It returns the same pointer as before where nothing has
// changed, not even for a moment, and asks the kernel only if something may have.
func (t *Table) Now(ctx context.Context) (*Addresses, error) {
	t.mu.Lock()
	defer t.mu.Unlock()

	const tries = 3 // then somebody changes them faster than they can be read

	if err := t.open(); err != nil {
		return nil, err
	}

	if err := t.drain(); err != nil {
		return nil, err
	}

	for try := 0; t.stale && try < tries; try++ {
		t.stale = false

		now, err := t.read(ctx)
		if err != nil {
			t.stale = true

			return nil, fmt.Errorf("list the node's addresses: %w", err)
		}

		if t.last == nil || t.gone || !now.equal(t.last) {
			for p := range t.passed.in {
				now.local.add(p)
			}

			t.last = now
		}

		if err := t.drain(); err != nil { // what came meanwhile may be missing
			return nil, err
		}
	}

	if !t.stale {
		t.passed, t.gone = newPrefixes(), false
	}

	return t.last, nil
}

// Watch sends to news when the addresses may have changed, until ctx ends; where news
// is full it need not be told again. It is to be called once at a time.
func (t *Table) Watch(ctx context.Context, news chan<- struct{}) error {
	t.mu.Lock()
	before := t.watching
	t.mu.Unlock()

	if before != nil { // it is about to end
		<-before
	}

	t.mu.Lock()
	defer t.mu.Unlock()

	if err := t.open(); err != nil {
		return err
	}

	events := t.events

	raw, err := events.SyscallConn()
	if err == nil {
		err = events.SetReadDeadline(time.Time{})
	}

	if err != nil {
		return fmt.Errorf("listen to rtnetlink: %w", err)
	}

	done := make(chan struct{})
	t.news, t.watching = news, done

	go func() {
		defer close(done)
		defer context.AfterFunc(ctx, func() { _ = events.SetReadDeadline(time.Unix(1, 0)) })()

		_ = raw.Read(func(uintptr) bool { // waits for more while that returns false
			t.mu.Lock()
			defer t.mu.Unlock()

			return t.closed || t.drain() != nil || ctx.Err() != nil
		})
	}()

	return nil
}

// drain reads what has come, and notes whether the addresses may have changed. The
// caller holds the lock.
func (t *Table) drain() error {
	raw, err := t.events.SyscallConn()
	if err != nil {
		return fmt.Errorf("listen to rtnetlink: %w", err)
	}

	news := false

	ctlErr := raw.Control(func(fd uintptr) {
		for err == nil || errors.Is(err, unix.ENOBUFS) || errors.Is(err, unix.EINTR) {
			var n int

			n, _, err = unix.Recvfrom(int(fd), t.buf[:], unix.MSG_DONTWAIT)

			switch {
			case errors.Is(err, unix.ENOBUFS): // something has been lost
				news, t.gone = true, true
			case err == nil:
				news = t.note(t.buf[:n]) || news
			}
		}
	})

	if news {
		t.stale = true

		select {
		case t.news <- struct{}{}:
		default: // has been told, or nobody watches
		}
	}

	if ctlErr == nil && errors.Is(err, unix.EAGAIN) {
		return nil
	}

	return fmt.Errorf("listen to rtnetlink: %w", errors.Join(ctlErr, err))
}

// note takes in a message, and reports whether it is about addresses of the node, or
// may be because it did not fit.
func (t *Table) note(data []byte) (news bool) {
	msgs, err := syscall.ParseNetlinkMessage(data)
	if err != nil {
		t.gone = true

		return true
	}

	for _, m := range msgs {
		switch m.Header.Type {
		case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
			r, err := parseRoute(m.Data)
			if err == nil && !r.local() {
				continue
			}

			t.passed.add(r.to)
			t.devices[r.device] = true
			t.gone = t.gone || err != nil || m.Header.Type == unix.RTM_DELROUTE
		case unix.RTM_DELLINK:
			if len(m.Data) >= unix.SizeofIfInfomsg && !t.devices[binary.NativeEndian.Uint32(m.Data[4:])] {
				continue
			}

			t.gone = true
		default:
			continue
		}

		news = true
	}

	return news
}

// read asks for the addresses.
func (t *Table) read(ctx context.Context) (*Addresses, error) {
	deadline, _ := ctx.Deadline() // the zero time is none
	if err := t.requests.SetDeadline(deadline); err != nil {
		return nil, err //nolint:wrapcheck // Now does, as below
	}

	services, err := t.index(ServiceDevice)
	if err != nil {
		return nil, err
	}

	routes, err := t.localRoutes()
	if err != nil {
		return nil, err
	}

	a := newAddresses()
	t.devices = map[uint32]bool{}

	for _, r := range routes {
		t.devices[r.device] = true
		a.add(r.to, services != 0 && r.device == services)
	}

	a.settle()

	return a, nil
}

// localRoutes lists the local routes of the family, and none if the kernel does not
// have that.
func (t *Table) localRoutes() ([]route, error) {
	msgs, err := t.requests.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.RTM_GETROUTE, Flags: netlink.Request | netlink.Dump},
		Data:   []byte{t.family, 0, 0, 0, unix.RT_TABLE_LOCAL, 0, 0, unix.RTN_LOCAL, 0, 0, 0, 0}, // struct rtmsg, linux/rtnetlink.h
	})
	if err != nil && !errors.Is(err, unix.ENOENT) { // no such table yet
		return nil, err //nolint:wrapcheck // likewise
	}

	var list []route

	for _, m := range msgs {
		r, err := parseRoute(m.Data)
		if err != nil {
			return nil, err
		}

		if r.family == t.family && r.local() {
			list = append(list, r)
		}
	}

	return list, nil
}

// route is what there is to know of a route here.
type route struct {
	family, table, kind uint8
	to                  netip.Prefix
	device              uint32
}

// local reports whether the route makes addresses local that may be the node's.
func (r route) local() bool {
	linkLocal := r.family == unix.AF_INET6 && r.to.Addr().IsLinkLocalUnicast()

	return r.table == unix.RT_TABLE_LOCAL && r.kind == unix.RTN_LOCAL && !linkLocal
}

func parseRoute(data []byte) (route, error) {
	if len(data) < unix.SizeofRtMsg {
		return route{}, fmt.Errorf("a route of %d bytes", len(data))
	}

	r := route{family: data[0], table: data[4], kind: data[7]}

	ad, err := netlink.NewAttributeDecoder(data[unix.SizeofRtMsg:])
	if err != nil {
		return route{}, err //nolint:wrapcheck // likewise
	}

	ip := netip.IPv4Unspecified()
	if r.family == unix.AF_INET6 {
		ip = netip.IPv6Unspecified()
	}

	for ad.Next() {
		switch ad.Type() {
		case unix.RTA_DST:
			ip, _ = netip.AddrFromSlice(ad.Bytes())
		case unix.RTA_OIF:
			r.device = ad.Uint32()
		}
	}

	r.to = netip.PrefixFrom(ip, int(data[1]))

	return r, ad.Err() //nolint:wrapcheck // likewise
}

// index is the index of an interface, or 0 if there is none of the name.
func (t *Table) index(name string) (uint32, error) {
	request, err := unix.NewIfreq(name)
	if err != nil {
		return 0, err //nolint:wrapcheck // likewise
	}

	raw, err := t.requests.SyscallConn()
	if err != nil {
		return 0, err //nolint:wrapcheck // likewise
	}

	ctlErr := raw.Control(func(fd uintptr) { err = unix.IoctlIfreq(int(fd), unix.SIOCGIFINDEX, request) })

	switch {
	case errors.Is(err, unix.ENODEV):
		return 0, nil
	case errors.Join(ctlErr, err) != nil:
		return 0, errors.Join(ctlErr, err)
	default:
		return request.Uint32(), nil
	}
}
