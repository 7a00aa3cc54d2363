package sockets

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"iter"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"
	"unicode"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/cri-o/hostport/internal/row"
)

// What linux/sock_diag.h, linux/inet_diag.h and net/tcp_states.h define and
// x/sys/unix does not.
const (
	sockDiagByFamily = 20
	inetDiagSKV6Only = 11

	tcpClose         = 7
	tcpListen        = 10
	tcpBoundInactive = 13 // shown since Linux 6.8; a socket that is bound and does not listen
)

// inetDiagSockID is struct inet_diag_sockid. Ports and addresses are in
// network byte order.
type inetDiagSockID struct {
	SPort, DPort [2]byte
	Src, Dst     [16]byte
	If           uint32
	Cookie       [2]uint32
}

// inetDiagReq is struct inet_diag_req_v2.
type inetDiagReq struct {
	Family, Protocol, Ext, Pad uint8
	States                     uint32
	ID                         inetDiagSockID
}

// inetDiagMsg is struct inet_diag_msg.
type inetDiagMsg struct {
	Family, State, Timer, Retrans       uint8
	ID                                  inetDiagSockID
	Expires, RQueue, WQueue, UID, INode uint32
}

// InUse finds out why the kernel says that e is in use: the error names
// the process that serves the port, where /proc shows it. It returns nil if
// no process does, but an outgoing connection has the port as its source.
func (b binder) InUse(e row.Endpoint, ours []*Holder) error {
	inode, err := b.findServer(e, ours)

	switch {
	case err != nil:
		return fmt.Errorf("%w (who has it is not known: %w)", unix.EADDRINUSE, err)
	case inode == 0:
		return nil
	default:
		return fmt.Errorf("%w by %s", unix.EADDRINUSE, ProcessWith(inode))
	}
}

// findServer returns the inode of a socket that serves e: it listens, or is
// bound and may yet. The inode is 0 if there is none. Sockets of ours do not
// count, those that are not held yet included if they are named.
func (b binder) findServer(e row.Endpoint, holders []*Holder, ownFDs ...int) (uint32, error) {
	for _, h := range holders {
		ownFDs = append(ownFDs, h.fd)
	}

	ours := inodesOf(ownFDs)

	bound, err := dump(b.family, e.PortKey)
	for _, s := range bound {
		if s.Overlaps(e) && !ours[s.Inode] {
			return s.Inode, err
		}
	}

	return 0, err
}

// Socket is one that serves a port, or is bound and may yet.
type Socket struct {
	row.Endpoint

	// Inode is what /proc has for it, see Processes.
	Inode uint32
	// Listening tells a TCP socket that serves the port from one that is only bound.
	Listening bool
}

// List returns the sockets of a family and protocol that are bound to ports. A TCP socket that does
// not listen is shown since Linux 6.8.
func List(f row.Family, p row.Protocol) ([]Socket, error) { return dump(f, row.PortKey{Proto: p}) }

// dump returns the sockets that have a port, 0 being any.
func dump(f row.Family, k row.PortKey) (bound []Socket, err error) {
	conn, err := netlink.Dial(unix.NETLINK_SOCK_DIAG, nil)
	if err != nil {
		return nil, fmt.Errorf("open sock_diag: %w", err)
	}
	defer func() { _ = conn.Close() }()

	if err := conn.SetDeadline(time.Now().Add(time.Second)); err != nil {
		return nil, fmt.Errorf("sock_diag: %w", err)
	}

	// An IPv6 socket that is not IPV6_V6ONLY has the port in IPv4 as well.
	families := []uint8{unix.AF_INET6}
	if f == row.IPv4 {
		families = append(families, unix.AF_INET)
	}

	for _, family := range families {
		req := inetDiagReq{Family: family, Protocol: unix.IPPROTO_TCP, States: 1<<tcpListen | 1<<tcpBoundInactive}
		if k.Proto == row.UDP {
			req.Protocol, req.States = unix.IPPROTO_UDP, 1<<tcpClose
		}

		binary.BigEndian.PutUint16(req.ID.SPort[:], k.Port)

		var data bytes.Buffer
		if err := binary.Write(&data, binary.NativeEndian, req); err != nil {
			return nil, fmt.Errorf("sock_diag: %w", err)
		}

		msgs, err := conn.Execute(netlink.Message{
			Header: netlink.Header{Type: sockDiagByFamily, Flags: netlink.Request | netlink.Dump},
			Data:   data.Bytes(),
		})
		if err != nil {
			return nil, fmt.Errorf("sock_diag: %w", err)
		}

		for _, m := range msgs {
			if s, ok := parse(m.Data, k, f); ok {
				bound = append(bound, s)
			}
		}
	}

	return bound, nil
}

func inodesOf(fds []int) map[uint32]bool {
	inodes := map[uint32]bool{}

	for _, fd := range fds {
		var st unix.Stat_t
		if fd >= 0 && unix.Fstat(fd, &st) == nil {
			inodes[uint32(st.Ino)] = true //nolint:gosec // sock_diag has no more of it
		}
	}

	return inodes
}

// parse reads a sock_diag answer, if that is about a socket that has a port in a family.
func parse(data []byte, k row.PortKey, f row.Family) (Socket, bool) {
	var m inetDiagMsg

	n, err := binary.Decode(data, binary.NativeEndian, &m)

	port := binary.BigEndian.Uint16(m.ID.SPort[:])
	if err != nil || k.Port != 0 && k.Port != port {
		return Socket{}, false
	}

	src := netip.AddrFrom16(m.ID.Src).Unmap()
	if m.Family == unix.AF_INET {
		src = netip.AddrFrom4([4]byte(m.ID.Src[:4]))
	}

	// The kernel makes one that is bound to an address of IPv6 v6-only itself (__inet6_bind, net/ipv6/af_inet6.c).
	if m.Family == unix.AF_INET6 && f == row.IPv4 && v6Only(data[n:]) {
		return Socket{}, false
	}

	s := Socket{Endpoint: row.Endpoint{PortKey: row.PortKey{Proto: k.Proto, Port: port}}, Inode: m.INode, Listening: m.State == tcpListen}
	if !src.IsUnspecified() {
		s.IP = src
	}

	return s, true
}

func v6Only(attrs []byte) bool {
	ad, err := netlink.NewAttributeDecoder(attrs)
	if err != nil {
		return false
	}

	for ad.Next() {
		if ad.Type() == inetDiagSKV6Only {
			return ad.Uint8() == 1
		}
	}

	return false
}

// ProcessWith names the process that has a socket open, as far as /proc shows
// the files of others.
func ProcessWith(inode uint32) string {
	for has, process := range processes() {
		if has == inode {
			return process()
		}
	}

	return "a process that /proc does not show"
}

// Processes names the processes by the inodes of their sockets, as far as /proc shows the files of
// others.
func Processes() map[uint32]string {
	names := map[uint32]string{}

	for inode, process := range processes() {
		if names[inode] == "" {
			names[inode] = process()
		}
	}

	return names
}

// processes yields the inodes of sockets, and what names the process that has each.
func processes() iter.Seq2[uint32, func() string] {
	return func(yield func(uint32, func() string) bool) {
		fds, _ := filepath.Glob("/proc/[0-9]*/fd/*")
		for _, fd := range fds {
			link, _ := os.Readlink(fd)

			var inode uint32
			if _, err := fmt.Sscanf(link, "socket:[%d]", &inode); err != nil {
				continue
			}

			name := func() string {
				proc := filepath.Dir(filepath.Dir(fd))
				name, _ := os.ReadFile(filepath.Join(proc, "comm"))

				return fmt.Sprintf("process %s (%s)", filepath.Base(proc), printable(strings.TrimSpace(string(name))))
			}

			if !yield(inode, name) {
				return
			}
		}
	}
}

// printable replaces what would be more than text in a log or on a terminal: anybody may name a
// process as he likes.
func printable(name string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}

		return r
	}, name)
}
