package nfnetlink

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Conn is a netlink socket that stays open: to open and close one for each
// transaction takes a thousand times as long, as the close waits for the kernel
// to end what the transaction removed (RCU). It belongs to the network
// namespace of the thread that opened it. Its methods may be called from
// several goroutines.
type Conn struct {
	mu       sync.Mutex
	nl       *netlink.Conn
	raw      syscall.RawConn
	sequence uint32 // of the last message sent
	buf      []byte // for what comes
	room     int    // of the send buffer, at first
	closed   bool
}

// ErrStale says that somebody has changed the ruleset since the generation
// that a transaction was for. Nothing of it has taken effect.
var ErrStale = errors.New("the ruleset has changed meanwhile")

// BatchError is the kernel's refusal of a transaction. Nothing of it has taken
// effect.
type BatchError struct {
	// Message is the index of the first message refused, or -1 where it is the
	// transaction as a whole.
	Message int
	// What is what that message was to do.
	What string
	// Err is the error number, and the kernel's own words where it has any.
	Err error
}

func (e *BatchError) Error() string { return fmt.Sprintf("nf_tables: %s: %v", e.What, e.Err) }
func (e *BatchError) Unwrap() error { return e.Err }

const (
	// receiveBuffer takes the largest answer: a kernel fills 32 KiB of a dump
	// at once if there is room (net/netlink/af_netlink.c).
	receiveBuffer = 64 << 10
	// window is how many requests wait for their answers at a time; so many
	// fit into any socket's receive buffer.
	window = 64
	// patience is for answers that should be there already.
	patience = 30 * time.Second
)

// Dial opens a connection. It fails where the kernel has no nfnetlink.
func Dial() (*Conn, error) {
	nl, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, fmt.Errorf("open nfnetlink: %w", err)
	}

	// Errors come with words then. (Not with CapAcknowledge as well, of which
	// mdlayher/netlink 1.11 makes another error.)
	_ = nl.SetOption(netlink.ExtendedAcknowledge, true) // does without

	c := &Conn{nl: nl, buf: make([]byte, receiveBuffer)}

	c.raw, err = nl.SyscallConn()
	if err == nil {
		c.room, err = nl.WriteBuffer()
	}

	if err != nil {
		return nil, fmt.Errorf("open nfnetlink: %w", errors.Join(err, nl.Close()))
	}

	return c, nil
}

// Port is the number of the socket. No other of the network namespace has it meanwhile.
func (c *Conn) Port() uint32 { return c.nl.PID() }

// Close closes the socket. The other methods return net.ErrClosed then, and
// further calls do nothing.
func (c *Conn) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()

	if c.closed {
		return nil
	}

	c.closed = true

	return c.nl.Close() //nolint:wrapcheck // says itself what it is about
}

// do runs f, which has the socket to itself and sets its deadline, unless ctx has ended.
func (c *Conn) do(ctx context.Context, f func() error) error {
	c.mu.Lock()
	defer c.mu.Unlock()

	if err := ctx.Err(); err != nil {
		return err
	}

	if c.closed {
		return net.ErrClosed
	}

	err := f()
	if errors.Is(err, os.ErrDeadlineExceeded) {
		// A socket's deadline may pass an instant before the context's does.
		err = fmt.Errorf("%w: %w", cmp.Or(ctx.Err(), context.DeadlineExceeded), err)
	}

	if batch := (*BatchError)(nil); err == nil || errors.Is(err, ErrStale) || errors.As(err, &batch) {
		return err
	}

	c.drain()

	return fmt.Errorf("nfnetlink: %w", err)
}

// drain takes out of the socket what has come and nobody has waited for, after
// a failure: full of that, it would have no room for other answers.
func (c *Conn) drain() {
	_ = c.raw.Control(func(fd uintptr) {
		for err := error(nil); err == nil || errors.Is(err, unix.ENOBUFS); {
			_, _, err = unix.Recvfrom(int(fd), c.buf, unix.MSG_DONTWAIT)
		}
	})
}

// Generation returns the ruleset's generation. Each transaction that changes
// something in the network namespace, whoever makes it, counts it on by one.
// It is never 0.
func (c *Conn) Generation(ctx context.Context) (uint32, error) {
	answers, err := c.Get(ctx, message(unix.NFT_MSG_GETGEN, 0, unix.AF_UNSPEC, nil))
	if err != nil {
		return 0, err
	}

	var gen uint32
	if answers[0] != nil {
		err = decode(answers[0].Data, func(ad *netlink.AttributeDecoder) {
			if ad.Type() == unix.NFTA_GEN_ID {
				gen = ad.Uint32()
			}
		})
	}

	if err == nil && gen == 0 {
		err = errors.New("nf_tables: no generation in the kernel's answer")
	}

	return gen, err
}

// Commit has msgs carried out in one transaction, provided that the ruleset is
// of generation gen, or of any if that is 0; else it returns ErrStale. The
// generation is the next one then, or the same where msgs change nothing. A
// *BatchError tells which message the kernel refuses.
func (c *Conn) Commit(ctx context.Context, gen uint32, msgs []netlink.Message) error {
	if len(msgs) == 0 && gen == 0 {
		return nil
	}

	if len(msgs) == 0 {
		g, err := c.Generation(ctx)
		if err == nil && g != gen {
			err = ErrStale
		}

		return err
	}

	return c.batch(ctx, gen, msgs, true)
}

// Check tells what Commit would, in any generation, and changes nothing. It
// loads kernel modules as Commit does.
func (c *Conn) Check(ctx context.Context, msgs []netlink.Message) error {
	return c.batch(ctx, 0, msgs, false)
}

// batch sends a batch, which without its end takes no effect.
func (c *Conn) batch(ctx context.Context, gen uint32, msgs []netlink.Message, commit bool) error {
	begin := marker(unix.NFNL_MSG_BATCH_BEGIN)
	if gen != 0 {
		begin.Data = append(begin.Data, encode(func(ae *netlink.AttributeEncoder) {
			ae.Uint32(unix.NFNL_BATCH_GENID, gen)
		})...)
	}

	all := append([]netlink.Message{begin}, msgs...)
	last := len(all) - 1
	all[last].Header.Flags |= netlink.Acknowledge

	if commit {
		all = append(all, marker(unix.NFNL_MSG_BATCH_END))
	}

	return c.do(ctx, func() error {
		// Once it is sent it is decided, and has been answered, when sending
		// returns: to run out of ctx's time then would leave the outcome unknown.
		if err := errors.Join(c.nl.SetDeadline(time.Now().Add(patience)), c.send(all)); err != nil {
			return err
		}

		// The kernel has gone through the batch by now. It answers for the
		// batch as a whole if that is refused, and otherwise for each message
		// that is, in order, and for the last one in any case.
		var refused error

		for i := -1; i != 0 && i != last; {
			var err error

			_, i, err = c.receive(all)

			opErr := (*netlink.OpError)(nil)

			switch {
			case i < 0:
				return err
			case i == 0 && errors.Is(err, unix.ERESTART):
				return ErrStale
			case errors.As(err, &opErr) && refused == nil:
				refused = &BatchError{Message: i - 1, What: describe(all[i]), Err: words(opErr)}
			}
		}

		return refused
	})
}

// Get sends requests that have one answer each, and returns the answers in
// their order: nil stands for what does not exist.
func (c *Conn) Get(ctx context.Context, requests ...netlink.Message) ([]*netlink.Message, error) {
	answers := make([]*netlink.Message, len(requests))
	deadline, _ := ctx.Deadline() // the zero time is none

	err := c.do(ctx, func() error {
		if err := c.nl.SetDeadline(deadline); err != nil {
			return err //nolint:wrapcheck // do says what it is about
		}

		for first := 0; first < len(requests); first += window {
			some := requests[first:min(first+window, len(requests))]
			if err := c.send(some); err != nil {
				return err
			}

			for last := -1; last < len(some)-1; {
				msgs, i, err := c.receive(some)
				if err != nil && !errors.Is(err, unix.ENOENT) {
					return err
				}

				last = i

				if err == nil && msgs[0].Header.Type != netlink.Error {
					answers[first+i] = &msgs[0]
				}
			}
		}

		return nil
	})

	return answers, err
}

// Dump returns all answers to a request for a list. Where others change the
// ruleset meanwhile, some may be missing, of objects that nobody touches
// included, and nothing in them tells: compare the generation before and after.
func (c *Conn) Dump(ctx context.Context, request netlink.Message) ([]netlink.Message, error) {
	request.Header.Flags |= netlink.Dump

	var list []netlink.Message

	deadline, _ := ctx.Deadline() // the zero time is none

	err := c.do(ctx, func() (err error) {
		requests := []netlink.Message{request}
		if err := errors.Join(c.nl.SetDeadline(deadline), c.send(requests)); err != nil {
			return err
		}

		if list, _, err = c.receive(requests); errors.Is(err, unix.ENOENT) {
			return nil // nothing there, nothing to list
		}

		return err
	})

	return list, err
}

// receive returns the next answer to one of the messages sent, and to which.
// Answers to what was sent before that nobody waited for are passed over. The
// index is -1 with an error that is no answer.
func (c *Conn) receive(sent []netlink.Message) ([]netlink.Message, int, error) {
	first := sent[0].Header.Sequence

	for {
		msgs, err := c.read()

		opErr := (*netlink.OpError)(nil)

		var i int

		switch {
		case errors.As(err, &opErr) && opErr.Sequence != 0:
			i = int(int32(opErr.Sequence - first)) //nolint:gosec // sequence numbers wrap around
		case err != nil:
			return nil, -1, err
		case len(msgs) == 0: // the end of an empty list, of whichever request: there is one at a time
			i = 0
		default:
			i = int(int32(msgs[0].Header.Sequence - first)) //nolint:gosec // likewise
		}

		if i >= 0 && i < len(sent) {
			return msgs, i, err
		}
	}
}

func align(n int) int { return (n + unix.NLMSG_ALIGNTO - 1) &^ (unix.NLMSG_ALIGNTO - 1) }

// words is the error number, with what the kernel says beside it.
func words(err *netlink.OpError) error {
	if err.Message == "" {
		return err.Err
	}

	return fmt.Errorf("%w (%s)", err.Err, err.Message)
}

// marker is what begins or ends a batch.
func marker(kind netlink.HeaderType) netlink.Message {
	data := make([]byte, genmsgLen)
	binary.BigEndian.PutUint16(data[2:], unix.NFNL_SUBSYS_NFTABLES)

	return netlink.Message{Header: netlink.Header{Type: kind, Flags: netlink.Request}, Data: data}
}
