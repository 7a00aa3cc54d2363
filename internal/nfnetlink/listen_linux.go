package nfnetlink

import (
	"errors"
	"fmt"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Listener hears of the transactions of a network namespace, whoever makes them.
type Listener struct {
	nl   *netlink.Conn
	come []netlink.Message // and not looked at yet
}

// listenBuffer takes what a large transaction of others says before anybody
// reads it.
const listenBuffer = 4 << 20

// Listen begins to listen in the network namespace of the calling thread.
func Listen() (*Listener, error) {
	nl, err := listen(unix.NFNLGRP_NFTABLES)
	if err != nil {
		return nil, err
	}

	return &Listener{nl: nl}, nil
}

// listen joins a multicast group of the kernel's.
func listen(group int) (*netlink.Conn, error) {
	nl, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{
		Groups: 1 << (group - 1), MessageBufferSize: receiveBuffer,
	})
	if err != nil {
		return nil, fmt.Errorf("listen to nf_tables: %w", err)
	}

	_ = nl.SetReadBuffer(listenBuffer) // with less, more is lost, and told so

	return nl, nil
}

// Close ends Next.
func (l *Listener) Close() error {
	return l.nl.Close() //nolint:wrapcheck // says itself what it is about
}

// Next waits for the next transaction.
func (l *Listener) Next() (Transaction, error) {
	t := Transaction{Changes: map[Change]bool{}}

	for {
		for i, m := range l.come {
			if gen, ok := parseChange(m, t.Changes); ok {
				l.come = l.come[i+1:]
				t.Generation = gen

				return t, nil
			}
		}

		var err error

		l.come, err = l.nl.Receive()
		if errors.Is(err, unix.ENOBUFS) {
			l.come = nil

			return Transaction{}, l.drain()
		}

		if err != nil {
			return Transaction{}, fmt.Errorf("listen to nf_tables: %w", err)
		}
	}
}

// drain reads what there is. From when it tells that something has been lost until
// all is read, the kernel drops whatever comes, and does not tell again
// (NETLINK_S_CONGESTED, net/netlink/af_netlink.c).
func (l *Listener) drain() error {
	raw, err := l.nl.SyscallConn()
	if err != nil {
		return fmt.Errorf("listen to nf_tables: %w", err)
	}

	buf := make([]byte, receiveBuffer)

	err = raw.Read(func(fd uintptr) bool {
		for err := error(unix.ENOBUFS); err == nil || errors.Is(err, unix.ENOBUFS) || errors.Is(err, unix.EINTR); {
			_, _, err = unix.Recvfrom(int(fd), buf, unix.MSG_DONTWAIT)
		}

		return true
	})
	if err != nil {
		return fmt.Errorf("listen to nf_tables: %w", err)
	}

	return nil
}

// parseChange adds to changes what a message says, or returns the generation if
// it says that the transaction is through.
func parseChange(m netlink.Message, changes map[Change]bool) (gen uint32, done bool) {
	kind := int(m.Header.Type) &^ (unix.NFNL_SUBSYS_NFTABLES << 8)
	chainAttr := uint16(0)
	c := Change{}

	switch kind {
	case unix.NFT_MSG_NEWCHAIN, unix.NFT_MSG_DELCHAIN:
		chainAttr = unix.NFTA_CHAIN_NAME
	case unix.NFT_MSG_NEWRULE, unix.NFT_MSG_DELRULE:
		chainAttr = unix.NFTA_RULE_CHAIN
	}

	switch kind {
	case unix.NFT_MSG_DELTABLE, unix.NFT_MSG_DELCHAIN, unix.NFT_MSG_DELRULE, unix.NFT_MSG_DELSET, unix.NFT_MSG_DELSETELEM:
		c.Deleted = true
	}

	// Of a rule between two others it tells where that stands as well.
	c.Last = kind == unix.NFT_MSG_NEWRULE && m.Header.Flags&netlink.Append != 0

	err := decode(m.Data, func(ad *netlink.AttributeDecoder) {
		switch {
		case kind == unix.NFT_MSG_NEWRULE && ad.Type() == unix.NFTA_RULE_POSITION:
			c.Last = false
		case kind == unix.NFT_MSG_NEWGEN:
			if ad.Type() == unix.NFTA_GEN_ID {
				gen, done = ad.Uint32(), true
			}
		case ad.Type() == unix.NFTA_TABLE_NAME: // the same number in each kind of message
			c.Table = ad.String()
		case ad.Type() == chainAttr:
			c.Chain = ad.String()
		}
	})
	if err == nil && !done {
		c.Family = m.Data[0]
		changes[c] = true
	}

	return gen, done
}
