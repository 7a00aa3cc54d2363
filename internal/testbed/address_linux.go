package testbed

import (
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// AddDevice makes a device that leads nowhere, which is up or not. It is a bridge
// without ports: not every kernel has dummy devices.
func (n *Namespace) AddDevice(name string, up bool) error {
	return n.configure(func(h *netlink.Handle) error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = name
		link := &netlink.Bridge{LinkAttrs: attrs}
		if err := h.LinkAdd(link); err != nil || !up {
			return err
		}
		return h.LinkSetUp(link)
	})
}

// RemoveDevice deletes a device.
func (n *Namespace) RemoveDevice(name string) error {
	return n.configure(func(h *netlink.Handle) error {
		link, err := h.LinkByName(name)
		if err != nil {
			return err
		}
		return h.LinkDel(link)
	})
}

// BridgeCalls makes a bridge call the rules of a family, whatever the namespace's sysctl
// says.
func (n *Namespace) BridgeCalls(bridge string, v6 bool) error {
	return n.Do(func() error {
		flag := uint16(nl.IFLA_BR_NF_CALL_IPTABLES)
		if v6 {
			flag = nl.IFLA_BR_NF_CALL_IP6TABLES
		}
		request := nl.NewNetlinkRequest(unix.RTM_NEWLINK, unix.NLM_F_ACK)
		request.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
		request.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(bridge)))
		info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
		info.AddRtAttr(nl.IFLA_INFO_KIND, nl.NonZeroTerminated("bridge"))
		info.AddRtAttr(nl.IFLA_INFO_DATA, nil).AddRtAttr(int(flag), nl.Uint8Attr(1))
		request.AddData(info)
		_, err := request.Execute(unix.NETLINK_ROUTE, 0)
		return err
	})
}

// AssignAddress gives a device an address, and does not wait until the device
// carries traffic.
func (n *Namespace) AssignAddress(device string, addr netip.Prefix) error {
	return n.address(device, addr, (*netlink.Handle).AddrAdd)
}

// AddRoute makes a machine send what is for a network to a gateway.
func (n *Namespace) AddRoute(to netip.Prefix, gateway netip.Addr) error {
	return n.configure(func(h *netlink.Handle) error {
		return h.RouteAdd(&netlink.Route{Dst: ipNet(to), Gw: gateway.AsSlice()})
	})
}

// AddLocalRoute makes addresses local that no device has, as "ip route add local" does.
func (n *Namespace) AddLocalRoute(device string, to netip.Prefix) error {
	return n.localRoute(device, to, (*netlink.Handle).RouteAdd)
}

// RemoveLocalRoute takes that back.
func (n *Namespace) RemoveLocalRoute(device string, to netip.Prefix) error {
	return n.localRoute(device, to, (*netlink.Handle).RouteDel)
}

func (n *Namespace) localRoute(device string, to netip.Prefix, change func(*netlink.Handle, *netlink.Route) error) error {
	return n.configure(func(h *netlink.Handle) error {
		link, err := h.LinkByName(device)
		if err != nil {
			return err
		}
		return change(h, &netlink.Route{
			LinkIndex: link.Attrs().Index, Table: unix.RT_TABLE_LOCAL, Type: unix.RTN_LOCAL, Scope: netlink.SCOPE_HOST,
			Dst: ipNet(to),
		})
	})
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
