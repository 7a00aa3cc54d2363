package nfnetlink

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// genmsgLen is the size of struct nfgenmsg, which begins every message: the
// family, a version and a resource id.
const genmsgLen = 4

func (t Table) message(kind uint16, flags netlink.HeaderFlags, attrs func(*netlink.AttributeEncoder)) netlink.Message {
	return message(kind, flags, t.Family, attrs)
}

func message(kind uint16, flags netlink.HeaderFlags, family uint8, attrs func(*netlink.AttributeEncoder)) netlink.Message {
	return nfMessage(unix.NFNL_SUBSYS_NFTABLES, kind, flags, family, attrs)
}

// nfMessage makes a message to a subsystem of nfnetlink.
func nfMessage(subsystem, kind uint16, flags netlink.HeaderFlags, family uint8, attrs func(*netlink.AttributeEncoder)) netlink.Message {
	return netlink.Message{
		Header: netlink.Header{
			Type:  netlink.HeaderType(subsystem<<8 | kind),
			Flags: netlink.Request | flags,
		},
		Data: append([]byte{family, unix.NFNETLINK_V0, 0, 0}, encode(attrs)...),
	}
}

// describe says what a message of a transaction is to do, and to what.
func describe(m netlink.Message) string {
	kinds := map[netlink.HeaderType]string{
		unix.NFT_MSG_NEWTABLE: "add table", unix.NFT_MSG_DELTABLE: "delete table",
		unix.NFT_MSG_NEWCHAIN: "add chain", unix.NFT_MSG_DELCHAIN: "delete chain",
		unix.NFT_MSG_NEWRULE: "add rule to chain", unix.NFT_MSG_DELRULE: "delete rules of chain",
		unix.NFT_MSG_NEWSET: "add set", unix.NFT_MSG_DELSET: "delete set",
		unix.NFT_MSG_NEWSETELEM: "add element to set", unix.NFT_MSG_DELSETELEM: "delete element of set",
	}

	subsystem, kind := m.Header.Type>>8, m.Header.Type&^(unix.NFNL_SUBSYS_NFTABLES<<8)
	if subsystem != unix.NFNL_SUBSYS_NFTABLES {
		return "transaction"
	}

	what := kinds[kind]
	nameAttr := uint16(unix.NFTA_RULE_CHAIN) // as in sets and elements

	if kind == unix.NFT_MSG_NEWCHAIN || kind == unix.NFT_MSG_DELCHAIN {
		nameAttr = unix.NFTA_CHAIN_NAME
	}

	_ = decode(m.Data, func(ad *netlink.AttributeDecoder) { // it is our own
		if kind != unix.NFT_MSG_NEWTABLE && kind != unix.NFT_MSG_DELTABLE && ad.Type() == nameAttr {
			what += " " + ad.String()
		}
	})

	return what
}

// encode returns attributes in network byte order, as nf_tables has them.
func encode(attrs func(*netlink.AttributeEncoder)) []byte {
	if attrs == nil {
		return nil
	}

	ae := netlink.NewAttributeEncoder()
	ae.ByteOrder = binary.BigEndian

	attrs(ae)

	data, err := ae.Encode()
	if err != nil {
		return nil // an attribute of more than 64 KiB; the kernel misses it and says so
	}

	return data
}

func nested(ae *netlink.AttributeEncoder, kind uint16, attrs func(*netlink.AttributeEncoder)) {
	ae.Nested(kind, func(ae *netlink.AttributeEncoder) error {
		attrs(ae)

		return nil
	})
}

// plain is nested without NLA_F_NESTED.
func plain(ae *netlink.AttributeEncoder, kind uint16, attrs func(*netlink.AttributeEncoder)) {
	ae.Bytes(kind, encode(attrs))
}

func value(ae *netlink.AttributeEncoder, kind uint16, data []byte) {
	plain(ae, kind, func(ae *netlink.AttributeEncoder) { ae.Bytes(unix.NFTA_DATA_VALUE, data) })
}

// decode reads the attributes of a message's data.
func decode(data []byte, attr func(*netlink.AttributeDecoder)) error {
	if len(data) < genmsgLen {
		return fmt.Errorf("nf_tables: an answer of %d bytes", len(data))
	}

	ad, err := netlink.NewAttributeDecoder(data[genmsgLen:])
	if err != nil {
		return fmt.Errorf("nf_tables: %w", err)
	}

	ad.ByteOrder = binary.BigEndian
	for ad.Next() {
		attr(ad)
	}

	if err := ad.Err(); err != nil {
		return fmt.Errorf("nf_tables: %w", err)
	}

	return nil
}

func native(n uint32) []byte { return binary.NativeEndian.AppendUint32(nil, n) }

func udata(kind byte, value []byte) []byte {
	return append([]byte{kind, byte(len(value))}, value...) //nolint:gosec // comments are cut to less
}

// maxComment is what nft takes for a comment (NFTNL_UDATA_COMMENT_MAXLEN).
const maxComment = 128

func comment(kind byte, text string) []byte {
	return udata(kind, append([]byte(text[:min(len(text), maxComment)]), 0))
}

// parseComment finds an element's comment in user data that anybody may have
// written.
func parseComment(data []byte) string {
	for len(data) >= 2 && len(data) >= 2+int(data[1]) {
		value := data[2 : 2+int(data[1])]
		if data[0] == udataElemComment {
			return string(bytes.TrimRight(value, "\x00"))
		}

		data = data[2+int(data[1]):]
	}

	return ""
}
