package nfnetlink

import (
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Expr is an expression of a rule. Registers 1 to 4 have 16 bytes each; 8 to
// 23 are the same memory in pieces of 4 bytes, so that 8 is where 1 begins.
type Expr struct {
	name   string
	encode func(*netlink.AttributeEncoder)
}

// LoadNetworkHeader loads bytes of the packet's IP header.
func LoadNetworkHeader(offset, size, dreg uint32) Expr {
	return payload(unix.NFT_PAYLOAD_NETWORK_HEADER, offset, size, dreg)
}

// LoadTransportHeader loads bytes of the packet's TCP, UDP or SCTP header.
func LoadTransportHeader(offset, size, dreg uint32) Expr {
	return payload(unix.NFT_PAYLOAD_TRANSPORT_HEADER, offset, size, dreg)
}

func payload(base, offset, size, dreg uint32) Expr {
	return Expr{"payload", func(ae *netlink.AttributeEncoder) {
		ae.Uint32(unix.NFTA_PAYLOAD_DREG, dreg)
		ae.Uint32(unix.NFTA_PAYLOAD_BASE, base)
		ae.Uint32(unix.NFTA_PAYLOAD_OFFSET, offset)
		ae.Uint32(unix.NFTA_PAYLOAD_LEN, size)
	}}
}

// LoadProtocol loads the number of the transport protocol.
func LoadProtocol(dreg uint32) Expr { return meta(unix.NFT_META_L4PROTO, dreg) }

// LoadInputInterface loads the index of the interface that the packet came in
// by, a number in the machine's byte order.
func LoadInputInterface(dreg uint32) Expr { return meta(unix.NFT_META_IIF, dreg) }

func meta(key, dreg uint32) Expr {
	return Expr{"meta", func(ae *netlink.AttributeEncoder) {
		ae.Uint32(unix.NFTA_META_KEY, key)
		ae.Uint32(unix.NFTA_META_DREG, dreg)
	}}
}

// LoadInputName loads the name of the interface that the packet came in by, padded with
// zeros to 16 bytes. In postrouting there is one from Linux 5.7 on, and none for what the
// machine itself sends.
func LoadInputName(dreg uint32) Expr { return meta(unix.NFT_META_IIFNAME, dreg) }

// LoadConntrackStatus loads the IPS_* bits of the packet's connection, a number
// in the machine's byte order.
func LoadConntrackStatus(dreg uint32) Expr {
	return Expr{"ct", func(ae *netlink.AttributeEncoder) {
		ae.Uint32(unix.NFTA_CT_DREG, dreg)
		ae.Uint32(unix.NFTA_CT_KEY, unix.NFT_CT_STATUS)
	}}
}

// LoadDestinationType loads the type of the destination address, RTN_* of
// linux/rtnetlink.h, a number in the machine's byte order.
func LoadDestinationType(dreg uint32) Expr {
	return Expr{"fib", func(ae *netlink.AttributeEncoder) {
		ae.Uint32(unix.NFTA_FIB_DREG, dreg)
		ae.Uint32(unix.NFTA_FIB_RESULT, unix.NFT_FIB_RESULT_ADDRTYPE)
		ae.Uint32(unix.NFTA_FIB_FLAGS, unix.NFTA_FIB_F_DADDR)
	}}
}

// Mask leaves in a register the bits of mask.
func Mask(reg uint32, mask []byte) Expr {
	return Expr{"bitwise", func(ae *netlink.AttributeEncoder) {
		ae.Uint32(unix.NFTA_BITWISE_SREG, reg)
		ae.Uint32(unix.NFTA_BITWISE_DREG, reg)
		ae.Uint32(unix.NFTA_BITWISE_LEN, uint32(len(mask))) //nolint:gosec // 16 at the most
		ae.Uint32(nftaBitwiseOp, 0)                         // NFT_BITWISE_MASK_XOR
		value(ae, unix.NFTA_BITWISE_MASK, mask)
		value(ae, unix.NFTA_BITWISE_XOR, make([]byte, len(mask)))
	}}
}

// MaskNumber leaves those of a number, in the machine's byte order.
func MaskNumber(reg, mask uint32) Expr { return Mask(reg, native(mask)) }

// Equal goes on if a register begins with the bytes given.
func Equal(sreg uint32, data []byte) Expr { return compare(unix.NFT_CMP_EQ, sreg, data) }

// NotEqual goes on if it does not.
func NotEqual(sreg uint32, data []byte) Expr { return compare(unix.NFT_CMP_NEQ, sreg, data) }

// EqualTo goes on if a register has a number, in the machine's byte order.
func EqualTo(sreg, number uint32) Expr { return Equal(sreg, native(number)) }

// NotEqualTo goes on if it has not.
func NotEqualTo(sreg, number uint32) Expr { return NotEqual(sreg, native(number)) }

func compare(op, sreg uint32, data []byte) Expr {
	return Expr{"cmp", func(ae *netlink.AttributeEncoder) {
		ae.Uint32(unix.NFTA_CMP_SREG, sreg)
		ae.Uint32(unix.NFTA_CMP_OP, op)
		value(ae, unix.NFTA_CMP_DATA, data)
	}}
}

// InSet goes on if a set has the key in the registers from sreg.
func InSet(set string, sreg uint32) Expr { return lookup(set, sreg, 0, 0) }

// NotInSet goes on if it has not.
func NotInSet(set string, sreg uint32) Expr { return lookup(set, sreg, 0, unix.NFT_LOOKUP_F_INV) }

// LookUp goes on if a map has the key in the registers from sreg, and loads
// what belongs to it.
func LookUp(set string, sreg, dreg uint32) Expr { return lookup(set, sreg, dreg, 0) }

func lookup(set string, sreg, dreg, flags uint32) Expr {
	return Expr{"lookup", func(ae *netlink.AttributeEncoder) {
		ae.String(unix.NFTA_LOOKUP_SET, set)
		ae.Uint32(unix.NFTA_LOOKUP_SREG, sreg)

		if dreg != 0 {
			ae.Uint32(unix.NFTA_LOOKUP_DREG, dreg)
		}

		ae.Uint32(unix.NFTA_LOOKUP_FLAGS, flags)
	}}
}

// DNAT translates the destination to the address and port in two registers.
func DNAT(family uint8, addrReg, portReg uint32) Expr {
	return Expr{"nat", func(ae *netlink.AttributeEncoder) {
		ae.Uint32(unix.NFTA_NAT_TYPE, unix.NFT_NAT_DNAT)
		ae.Uint32(unix.NFTA_NAT_FAMILY, uint32(family))
		ae.Uint32(unix.NFTA_NAT_REG_ADDR_MIN, addrReg)
		ae.Uint32(unix.NFTA_NAT_REG_ADDR_MAX, addrReg)
		ae.Uint32(unix.NFTA_NAT_REG_PROTO_MIN, portReg)
		ae.Uint32(unix.NFTA_NAT_REG_PROTO_MAX, portReg)
		ae.Uint32(unix.NFTA_NAT_FLAGS, unix.NF_NAT_RANGE_MAP_IPS|unix.NF_NAT_RANGE_PROTO_SPECIFIED)
	}}
}

// Masquerade translates the source to the outgoing interface's address.
func Masquerade() Expr {
	return Expr{"masq", func(*netlink.AttributeEncoder) {}}
}

// SetTrace has it told what becomes of the packet from here on; see Traces.
func SetTrace(reg uint32) []Expr {
	return []Expr{{"immediate", func(ae *netlink.AttributeEncoder) {
		ae.Uint32(unix.NFTA_IMMEDIATE_DREG, reg)
		value(ae, unix.NFTA_IMMEDIATE_DATA, []byte{1})
	}}, {"meta", func(ae *netlink.AttributeEncoder) {
		ae.Uint32(unix.NFTA_META_KEY, unix.NFT_META_NFTRACE)
		ae.Uint32(unix.NFTA_META_SREG, reg)
	}}}
}

// OncePer goes on for one packet in so many seconds.
func OncePer(seconds uint64) Expr {
	return Expr{"limit", func(ae *netlink.AttributeEncoder) {
		ae.Uint64(unix.NFTA_LIMIT_RATE, 1)
		ae.Uint64(unix.NFTA_LIMIT_UNIT, seconds)
		ae.Uint32(unix.NFTA_LIMIT_BURST, 1)
	}}
}

// Goto continues in another chain, and does not come back.
func Goto(chain string) Expr {
	return verdict(unix.NFT_GOTO, func(ae *netlink.AttributeEncoder) { ae.String(unix.NFTA_VERDICT_CHAIN, chain) })
}

// Drop drops the packet.
func Drop() Expr { return verdict(nfDrop, func(*netlink.AttributeEncoder) {}) }

func verdict(code int32, more func(*netlink.AttributeEncoder)) Expr {
	return Expr{"immediate", func(ae *netlink.AttributeEncoder) {
		ae.Uint32(unix.NFTA_IMMEDIATE_DREG, unix.NFT_REG_VERDICT)
		plain(ae, unix.NFTA_IMMEDIATE_DATA, func(ae *netlink.AttributeEncoder) {
			plain(ae, unix.NFTA_DATA_VERDICT, func(ae *netlink.AttributeEncoder) {
				ae.Int32(unix.NFTA_VERDICT_CODE, code)
				more(ae)
			})
		})
	}}
}
