package nfnetlink

import (
	"context"
	"fmt"
	"net/netip"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// What linux/netfilter/nfnetlink_conntrack.h defines and x/sys/unix does not.
const (
	ctGet    = 1 // IPCTNL_MSG_CT_GET
	ctDelete = 2

	ctaTupleOrig  = 1
	ctaTupleReply = 2
	ctaStatus     = 3
	ctaID         = 12
	ctaZone       = 18
	ctaFilter     = 25 // Linux 5.8

	ctaTupleIP    = 1
	ctaTupleProto = 2

	ctaIPv4Src, ctaIPv4Dst = 1, 2
	ctaIPv6Src, ctaIPv6Dst = 3, 4

	ctaProtoNum     = 1
	ctaProtoSrcPort = 2
	ctaProtoDstPort = 3

	ctaFilterOrigFlags        = 1
	filterProtoNum            = 1 << 3 // CTA_FILTER_FLAG(CTA_PROTO_NUM)
	filterProtoDstPort        = 1 << 5
	statusDstNAT              = 1 << 5 // IPS_DST_NAT, linux/netfilter/nf_conntrack_common.h
	ctZoneDefault      uint16 = 0
)

// Flow is a connection, or what stands for one with UDP, that the kernel tracks.
type Flow struct {
	// Source and Destination are as the first packet had them when it came.
	Source, Destination netip.AddrPort
	// Responder is who answers: Destination, unless that was translated.
	Responder netip.AddrPort
	// Translated reports whether the destination was translated.
	Translated bool
	// Protocol is unix.IPPROTO_*.
	Protocol uint8

	id []byte
}

// Flows lists the flows of a family and protocol whose first packets had the
// destination port given. 0 stands for any protocol, and for any port.
//
// The kernel leaves out the others from Linux 5.8 on; before, it passes over the
// attribute that asks for that, and the list that is gone through here is longer. It
// knows no port without a protocol, nor those of SCTP (6.18).
// Addresses are for the caller to compare: Linux 6.18 inverts a filter for those
// of IPv6.
func (c *Conn) Flows(ctx context.Context, family, protocol uint8, port uint16) ([]Flow, error) {
	flags := uint32(0)
	if protocol != 0 {
		flags |= filterProtoNum
		if port != 0 {
			flags |= filterProtoDstPort
		}
	}

	msgs, err := c.Dump(ctx, ctMessage(ctGet, 0, family, func(ae *netlink.AttributeEncoder) {
		nested(ae, ctaTupleOrig, func(ae *netlink.AttributeEncoder) {
			nested(ae, ctaTupleProto, func(ae *netlink.AttributeEncoder) {
				ae.Uint8(ctaProtoNum, protocol)
				ae.Uint16(ctaProtoDstPort, port)
			})
		})
		nested(ae, ctaFilter, func(ae *netlink.AttributeEncoder) {
			ae.Bytes(ctaFilterOrigFlags, native(flags))
		})
	}))
	if err != nil {
		return nil, fmt.Errorf("list flows: %w", err)
	}

	var flows []Flow

	for _, m := range msgs {
		f, ok, err := parseFlow(m)
		if err != nil {
			return nil, err
		}

		if ok && (protocol == 0 || f.Protocol == protocol) && (port == 0 || f.Destination.Port() == port) {
			flows = append(flows, f)
		}
	}

	return flows, nil
}

// DeleteFlows deletes flows. Those that have ended meanwhile are no error.
func (c *Conn) DeleteFlows(ctx context.Context, family uint8, flows []Flow) error {
	requests := make([]netlink.Message, len(flows))
	for i, f := range flows {
		requests[i] = ctMessage(ctDelete, netlink.Acknowledge, family, func(ae *netlink.AttributeEncoder) {
			nested(ae, ctaTupleOrig, f.encode)
			ae.Bytes(ctaID, f.id)
		})
	}

	_, err := c.Get(ctx, requests...)

	return err
}

// encode is the tuple that the flow is known by.
func (f Flow) encode(ae *netlink.AttributeEncoder) {
	src, dst := uint16(ctaIPv4Src), uint16(ctaIPv4Dst)
	if f.Source.Addr().Is6() {
		src, dst = ctaIPv6Src, ctaIPv6Dst
	}

	nested(ae, ctaTupleIP, func(ae *netlink.AttributeEncoder) {
		ae.Bytes(src, f.Source.Addr().AsSlice())
		ae.Bytes(dst, f.Destination.Addr().AsSlice())
	})
	nested(ae, ctaTupleProto, func(ae *netlink.AttributeEncoder) {
		ae.Uint8(ctaProtoNum, f.Protocol)
		ae.Uint16(ctaProtoSrcPort, f.Source.Port())
		ae.Uint16(ctaProtoDstPort, f.Destination.Port())
	})
}

// parseFlow reads one answer to a request for flows. It is not ok for a flow in
// a zone, such as a virtual network has: its addresses are none of the host's.
func parseFlow(m netlink.Message) (f Flow, ok bool, err error) {
	ok = true
	err = decode(m.Data, func(ad *netlink.AttributeDecoder) {
		switch ad.Type() {
		case ctaTupleOrig:
			f.Source, f.Destination, f.Protocol = parseTuple(ad)
		case ctaTupleReply:
			f.Responder, _, _ = parseTuple(ad)
		case ctaStatus:
			f.Translated = ad.Uint32()&statusDstNAT != 0
		case ctaID:
			f.id = append([]byte(nil), ad.Bytes()...)
		case ctaZone:
			ok = false // the default one is left out
		}
	})

	return f, ok, err
}

func parseTuple(ad *netlink.AttributeDecoder) (src, dst netip.AddrPort, protocol uint8) {
	var (
		srcIP, dstIP     netip.Addr
		srcPort, dstPort uint16
	)

	ad.Nested(func(ad *netlink.AttributeDecoder) error {
		for ad.Next() {
			kind := ad.Type()

			ad.Nested(func(ad *netlink.AttributeDecoder) error {
				for ad.Next() {
					switch {
					case kind == ctaTupleIP && (ad.Type() == ctaIPv4Src || ad.Type() == ctaIPv6Src):
						srcIP, _ = netip.AddrFromSlice(ad.Bytes())
					case kind == ctaTupleIP && (ad.Type() == ctaIPv4Dst || ad.Type() == ctaIPv6Dst):
						dstIP, _ = netip.AddrFromSlice(ad.Bytes())
					case kind == ctaTupleProto && ad.Type() == ctaProtoNum:
						protocol = ad.Uint8()
					case kind == ctaTupleProto && ad.Type() == ctaProtoSrcPort:
						srcPort = ad.Uint16()
					case kind == ctaTupleProto && ad.Type() == ctaProtoDstPort:
						dstPort = ad.Uint16()
					}
				}

				return nil
			})
		}

		return nil
	})

	return netip.AddrPortFrom(srcIP, srcPort), netip.AddrPortFrom(dstIP, dstPort), protocol
}

func ctMessage(kind uint16, flags netlink.HeaderFlags, family uint8, attrs func(*netlink.AttributeEncoder)) netlink.Message {
	return nfMessage(unix.NFNL_SUBSYS_CTNETLINK, kind, flags, family, attrs)
}
