package nfnetlink

import (
	"bytes"
	"errors"
	"fmt"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Trace is what the kernel says of a packet that is traced: that a rule has matched it, or that
// it has come to the end of a chain.
type Trace struct {
	// ID is made of the packet's place in memory: a later one may have the same.
	ID uint32
	// Family is the table's.
	Family       uint8
	Table, Chain string
	// Rule is the handle of the rule that matched, 0 at the end of a chain.
	Rule uint64
	// Policy is set at the end of a base chain.
	Policy bool
	// Verdict is NF_* or NFT_* of the rule, or the policy; Target is where it jumps.
	Verdict int32
	Target  string
	// Network and Transport are the beginnings of the packet's headers. They and the indexes of
	// the interfaces are in the first message of each base chain alone.
	Network, Transport []byte
	In, Out            uint32
}

// Traces hears of the packets that are traced, whoever has them traced.
type Traces struct{ nl *netlink.Conn }

// ListenTraces begins to listen in the network namespace of the calling thread.
func ListenTraces() (*Traces, error) {
	nl, err := listen(unix.NFNLGRP_NFTRACE)
	if err != nil {
		return nil, err
	}

	return &Traces{nl}, nil
}

// Close ends Next.
func (t *Traces) Close() error {
	return t.nl.Close() //nolint:wrapcheck // says itself what it is about
}

// Next waits for what comes next, and returns none if that takes too long. The error is
// unix.ENOBUFS where some have been lost.
func (t *Traces) Next(patience time.Duration) ([]Trace, error) {
	raw, err := t.nl.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("listen to traces: %w", err)
	}

	ready := 0

	// With a deadline, a thread that gets no time would miss what is there when that has passed.
	controlErr := raw.Control(func(fd uintptr) {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}} //nolint:gosec // a descriptor
		for err = unix.EINTR; errors.Is(err, unix.EINTR); {
			ready, err = unix.Poll(fds, int(patience.Milliseconds()))
		}
	})
	if err = errors.Join(controlErr, err); err != nil || ready == 0 {
		return nil, err
	}

	msgs, err := t.nl.Receive()
	traces := make([]Trace, len(msgs))
	for i, m := range msgs {
		if err == nil {
			traces[i], err = ParseTrace(m)
		}
	}

	if err != nil {
		return nil, fmt.Errorf("listen to traces: %w", err)
	}

	return traces, nil
}

// ParseTrace reads a message of the kernel's about a packet.
func ParseTrace(m netlink.Message) (Trace, error) {
	var t Trace

	err := decode(m.Data, func(ad *netlink.AttributeDecoder) {
		switch ad.Type() {
		case unix.NFTA_TRACE_ID:
			t.ID = ad.Uint32()
		case unix.NFTA_TRACE_TABLE:
			t.Table = ad.String()
		case unix.NFTA_TRACE_CHAIN:
			t.Chain = ad.String()
		case unix.NFTA_TRACE_RULE_HANDLE:
			t.Rule = ad.Uint64()
		case unix.NFTA_TRACE_POLICY:
			t.Policy, t.Verdict = true, ad.Int32()
		case unix.NFTA_TRACE_VERDICT:
			ad.Nested(func(ad *netlink.AttributeDecoder) error {
				for ad.Next() {
					switch ad.Type() {
					case unix.NFTA_VERDICT_CODE:
						t.Verdict = ad.Int32()
					case unix.NFTA_VERDICT_CHAIN:
						t.Target = ad.String()
					}
				}

				return nil
			})
		case unix.NFTA_TRACE_NETWORK_HEADER:
			t.Network = bytes.Clone(ad.Bytes())
		case unix.NFTA_TRACE_TRANSPORT_HEADER:
			t.Transport = bytes.Clone(ad.Bytes())
		case unix.NFTA_TRACE_IIF:
			t.In = ad.Uint32()
		case unix.NFTA_TRACE_OIF:
			t.Out = ad.Uint32()
		}
	})
	if err == nil {
		t.Family = m.Data[0]
	}

	return t, err
}
