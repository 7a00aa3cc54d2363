package nfnetlink

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"syscall"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Datagrams of a Conn. netlink.Conn has SendMessages and Receive for them, which start a
// goroutine each to watch a context (mdlayher/socket 0.6.0). Without these an Add of one row
// takes a fifth less.

// send sends messages in one datagram, and completes their headers.
func (c *Conn) send(msgs []netlink.Message) error {
	size := 0
	for _, m := range msgs {
		size += unix.NLMSG_HDRLEN + len(m.Data) // which is aligned, as attributes are
	}

	datagram := make([]byte, 0, size)

	for i := range msgs {
		c.sequence++

		h := &msgs[i].Header
		h.Length = uint32(unix.NLMSG_HDRLEN + len(msgs[i].Data)) //nolint:gosec // far from 4 GiB
		h.Sequence, h.PID = c.sequence, c.nl.PID()

		datagram = binary.NativeEndian.AppendUint32(datagram, h.Length)
		datagram = binary.NativeEndian.AppendUint16(datagram, uint16(h.Type))
		datagram = binary.NativeEndian.AppendUint16(datagram, uint16(h.Flags))
		datagram = binary.NativeEndian.AppendUint32(datagram, h.Sequence)
		datagram = binary.NativeEndian.AppendUint32(datagram, h.PID)
		datagram = append(datagram, msgs[i].Data...)
	}

	// The kernel counts twice what is asked for. Without privileges in the initial user namespace
	// there is a limit (net.core.wmem_max), and more is EMSGSIZE.
	if size >= c.room/2 {
		if err := c.nl.SetWriteBuffer(size); err != nil {
			return err //nolint:wrapcheck // do says what it is about
		}
	}

	var err error

	rawErr := c.raw.Write(func(fd uintptr) bool {
		err = unix.Sendto(int(fd), datagram, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})

		return isReady(err)
	})

	return errors.Join(rawErr, os.NewSyscallError("sendto", err))
}

// isReady reports whether a system call has an outcome, rather than being due again.
func isReady(err error) bool { return !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) }

// read returns the messages of the next datagram, or all of a list that comes in several. An
// error from the kernel is a *netlink.OpError with the number of its request.
func (c *Conn) read() (list []netlink.Message, err error) {
	for more := true; more; {
		more = false

		datagram, err := c.readDatagram()
		if err != nil {
			return nil, err
		}

		msgs, err := syscall.ParseNetlinkMessage(datagram)
		if err != nil {
			return nil, fmt.Errorf("an answer that is no message: %w", err)
		}

		for _, m := range msgs {
			if err := errorIn(m); err != nil {
				return nil, err
			}

			if m.Header.Type == unix.NLMSG_DONE {
				return list, nil
			}

			more = m.Header.Flags&unix.NLM_F_MULTI != 0

			list = append(list, netlink.Message{Header: netlink.Header{
				Length: m.Header.Len, Type: netlink.HeaderType(m.Header.Type), Flags: netlink.HeaderFlags(m.Header.Flags),
				Sequence: m.Header.Seq, PID: m.Header.Pid,
			}, Data: m.Data})
		}
	}

	return list, nil
}

// readDatagram returns the next datagram.
func (c *Conn) readDatagram() ([]byte, error) {
	var (
		n   int
		err error
	)

	rawErr := c.raw.Read(func(fd uintptr) bool {
		n, _, err = unix.Recvfrom(int(fd), c.buf, unix.MSG_TRUNC)

		return isReady(err)
	})

	switch err := errors.Join(rawErr, os.NewSyscallError("recvfrom", err)); {
	case err != nil:
		return nil, err
	case n > len(c.buf):
		return nil, fmt.Errorf("an answer of %d bytes, want at most %d", n, len(c.buf))
	default:
		return append([]byte(nil), c.buf[:n]...), nil
	}
}

// errorIn is the error that a message tells of, if it does: struct nlmsgerr, or what ends a
// list, with the kernel's words behind it (linux/netlink.h).
func errorIn(m syscall.NetlinkMessage) error {
	const number = 4 // bytes

	ends := m.Header.Type == unix.NLMSG_DONE
	if m.Header.Type != unix.NLMSG_ERROR && !ends || len(m.Data) < number {
		return nil
	}

	errno := int32(binary.NativeEndian.Uint32(m.Data)) //nolint:gosec // is signed
	if errno == 0 {
		return nil
	}

	err := &netlink.OpError{Op: "receive", Err: unix.Errno(-errno), Sequence: m.Header.Seq} //nolint:gosec // is negative
	words := m.Data[number:]

	if m.Header.Flags&unix.NLM_F_ACK_TLVS == 0 || !ends && len(words) < unix.NLMSG_HDRLEN {
		return err
	}

	if !ends { // the request comes first
		words = words[min(align(int(binary.NativeEndian.Uint32(words))), len(words)):]
	}

	if ad, adErr := netlink.NewAttributeDecoder(words); adErr == nil {
		for ad.Next() {
			if ad.Type() == unix.NLMSGERR_ATTR_MSG {
				err.Message = ad.String()
			}
		}
	}

	return err
}
