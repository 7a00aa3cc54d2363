package testbed

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The bridges of the pods' networks: all pods are on the first.
const (
	bridge       = "cni0"
	secondBridge = "cni1"
)

// A Bed is a node, its pods, and a machine on either side of it. See the
// package documentation for a picture.
type Bed struct {
	Client, Host, Peer *Namespace
	Pods               []*Pod
}

// A Pod is a namespace on the host's bridge.
type Pod struct {
	*Namespace

	IPv4, IPv6 netip.Addr
}

// IP returns the pod's address of one family.
func (p *Pod) IP(v6 bool) netip.Addr {
	if v6 {
		return p.IPv6
	}
	return p.IPv4
}

// NodeIP returns the host's address on the client's side.
func (b *Bed) NodeIP(v6 bool) netip.Addr { return family(v6, "192.0.2.1", "2001:db8:1::1") }

// OtherNodeIP returns the host's second address on the client's side.
func (b *Bed) OtherNodeIP(v6 bool) netip.Addr { return family(v6, "192.0.2.11", "2001:db8:1::11") }

// ClientIP returns the client's address.
func (b *Bed) ClientIP(v6 bool) netip.Addr { return family(v6, "192.0.2.2", "2001:db8:1::2") }

// PeerIP returns the peer's address.
func (b *Bed) PeerIP(v6 bool) netip.Addr { return family(v6, "198.51.100.2", "2001:db8:2::2") }

func peerGateway(v6 bool) netip.Addr { return family(v6, "198.51.100.1", "2001:db8:2::1") }
func podGateway(v6 bool) netip.Addr  { return family(v6, "10.88.0.1", "fd00:10:88::1") }

func secondGateway(v6 bool) netip.Addr { return family(v6, "10.89.0.1", "fd00:10:89::1") }

func family(v6 bool, ipv4, ipv6 string) netip.Addr {
	if v6 {
		return netip.MustParseAddr(ipv6)
	}
	return netip.MustParseAddr(ipv4)
}

// New builds a bed with the pods named. When it returns, every address answers.
// A name is one word and should be unique, for it tells who answered.
func New(pods ...string) (_ *Bed, err error) {
	b := &Bed{}
	defer func() {
		if err != nil {
			err = fmt.Errorf("testbed: %w", errors.Join(err, b.Close()))
		}
	}()
	for name, n := range map[string]**Namespace{"client": &b.Client, "host": &b.Host, "peer": &b.Peer} {
		if *n, err = newMachine(name); err != nil {
			return nil, err
		}
	}
	for _, key := range []string{"net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"} {
		if err := b.Host.Sysctl(key, "1"); err != nil {
			return nil, err
		}
	}
	// A node has these set, and hairpin traffic depends on them. They are
	// absent while the module br_netfilter is not loaded.
	for _, key := range []string{"net/bridge/bridge-nf-call-iptables", "net/bridge/bridge-nf-call-ip6tables"} {
		if err := b.Host.Sysctl(key, "1"); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}
	if err := b.connect("eth0", b.Client, 24, b.ClientIP, b.NodeIP, b.OtherNodeIP); err != nil {
		return nil, err
	}
	if err := b.connect("eth1", b.Peer, 24, b.PeerIP, peerGateway); err != nil {
		return nil, err
	}
	if err := b.addBridge(bridge, podGateway); err != nil {
		return nil, err
	}
	for _, name := range pods {
		if _, err := b.AddPod(name); err != nil {
			return nil, err
		}
	}
	return b, nil
}

// AddPod adds a pod with the next free addresses. It must not be called from
// several goroutines at once, as its like must not.
func (b *Bed) AddPod(name string) (*Pod, error) {
	ipv4, ipv6 := podGateway(false).Next(), podGateway(true).Next()
	if len(b.Pods) > 0 {
		last := b.Pods[len(b.Pods)-1]
		ipv4, ipv6 = last.IPv4.Next(), last.IPv6.Next()
	}
	pod, err := b.newPod(name, len(b.Pods), ipv4, ipv6)
	if err != nil {
		return nil, err
	}
	b.Pods = append(b.Pods, pod)
	return pod, nil
}

// ReplacePod ends the i-th pod and puts another in its place, with the same
// addresses.
func (b *Bed) ReplacePod(i int, name string) error {
	old := b.Pods[i]
	err := b.Host.configure(func(h *netlink.Handle) error {
		link, err := h.LinkByName(portName(i))
		if err != nil {
			return err
		}
		return h.LinkDel(link)
	})
	if err = errors.Join(err, old.Close()); err != nil {
		return fmt.Errorf("end pod %s: %w", old.Name, err)
	}
	pod, err := b.newPod(name, i, old.IPv4, old.IPv6)
	if err != nil {
		return err
	}
	b.Pods[i] = pod
	return nil
}

func (b *Bed) newPod(name string, i int, ipv4, ipv6 netip.Addr) (_ *Pod, err error) {
	pod := &Pod{IPv4: ipv4, IPv6: ipv6}
	if pod.Namespace, err = newMachine(name); err != nil {
		return nil, err
	}
	err = b.plugIn(bridge, newVeth(portName(i), pod.Namespace, "eth0", ipv4))
	if err == nil {
		err = pod.attach("eth0", 16, pod.IP, podGateway)
	}
	if err == nil {
		err = errors.Join(b.Host.settle(portName(i)), b.Host.settle(bridge))
	}
	if err != nil {
		return nil, fmt.Errorf("add pod %s: %w", name, errors.Join(err, pod.Close()))
	}
	return pod, nil
}

// SecondNetwork puts a pod on a second bridge as well, by eth1, and returns its
// address there. Its default route stays. It can be called once for a bed.
func (b *Bed) SecondNetwork(pod *Pod) (ip func(v6 bool) netip.Addr, err error) {
	const port = "vethsecond"
	ip = func(v6 bool) netip.Addr { return secondGateway(v6).Next() }
	if err := b.addBridge(secondBridge, secondGateway); err != nil {
		return nil, err
	}
	if err := b.plugIn(secondBridge, newVeth(port, pod.Namespace, "eth1", ip(false))); err != nil {
		return nil, err
	}
	err = pod.configure(func(h *netlink.Handle) error { return raise(h, "eth1", 16, ip) })
	return ip, errors.Join(err, pod.settle("eth1"), b.Host.settle(port), b.Host.settle(secondBridge))
}

// Close ends all services and lets go of all namespaces. Further calls do
// nothing.
func (b *Bed) Close() error {
	var errs []error
	for _, pod := range b.Pods {
		errs = append(errs, pod.Close())
	}
	for _, n := range []*Namespace{b.Client, b.Peer, b.Host} {
		if n != nil { // New failed half-way
			errs = append(errs, n.Close())
		}
	}
	return errors.Join(errs...)
}

// newMachine creates a namespace with lo up.
func newMachine(name string) (*Namespace, error) {
	if len(strings.Fields(name)) != 1 {
		return nil, fmt.Errorf("name %q is not one word", name)
	}
	n, err := newNamespace(name)
	if err != nil {
		return nil, err
	}
	// An address is of no use for seconds while duplicate address detection
	// runs. To exempt our own addresses would not do: forwarding needs the
	// link-local ones.
	err = errors.Join(
		n.Sysctl("net/ipv6/conf/default/accept_dad", "0"),
		n.configure(func(h *netlink.Handle) error { return raise(h, "lo", 0) }),
	)
	if err != nil {
		return nil, fmt.Errorf("set up %s: %w", name, errors.Join(err, n.Close()))
	}
	return n, nil
}

// connect links the host's device to n. The first of the host's addresses is
// n's gateway.
func (b *Bed) connect(device string, n *Namespace, bits int, addr func(bool) netip.Addr, hostAddrs ...func(bool) netip.Addr) error {
	err := b.Host.configure(func(h *netlink.Handle) error {
		return add(h, newVeth(device, n, "eth0", addr(false)), bits, hostAddrs...)
	})
	if err != nil {
		return err
	}
	if err := n.attach("eth0", bits, addr, hostAddrs[0]); err != nil {
		return err
	}
	return b.Host.settle(device)
}

// addBridge makes a bridge of the host with an address, the gateway of its pods.
func (b *Bed) addBridge(name string, gateway func(bool) netip.Addr) error {
	return b.Host.configure(func(h *netlink.Handle) error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = name
		// Without an address of its own, the bridge takes the lowest of its
		// ports' and changes it when a pod comes or goes.
		attrs.HardwareAddr = hardwareAddr(gateway(false))
		return add(h, &netlink.Bridge{LinkAttrs: attrs}, 16, gateway)
	})
}

// plugIn makes a link from a bridge to a pod.
func (b *Bed) plugIn(bridge string, veth *netlink.Veth) error {
	return b.Host.configure(func(h *netlink.Handle) error {
		master, err := h.LinkByName(bridge)
		if err != nil {
			return err
		}
		veth.MasterIndex = master.Attrs().Index
		if err := add(h, veth, 0); err != nil {
			return err
		}
		if err := h.LinkSetHairpin(veth, true); err != nil {
			return fmt.Errorf("set hairpin mode of %s: %w", veth.Name, err)
		}
		return nil
	})
}

// portName is the host's end of the link to the i-th pod.
func portName(i int) string { return fmt.Sprintf("veth%d", i+1) }

// attach configures the inner end of a link to the host.
func (n *Namespace) attach(device string, bits int, addr, gateway func(bool) netip.Addr) error {
	err := n.configure(func(h *netlink.Handle) error {
		if err := raise(h, device, bits, addr); err != nil {
			return err
		}
		for _, v6 := range []bool{false, true} {
			if err := h.RouteAdd(&netlink.Route{Gw: gateway(v6).AsSlice()}); err != nil {
				return fmt.Errorf("add default route via %s: %w", gateway(v6), err)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return n.settle(device)
}

// AddAddress gives a device another address, as an address that moves between
// nodes comes.
func (n *Namespace) AddAddress(device string, addr netip.Prefix) error {
	if err := n.address(device, addr, (*netlink.Handle).AddrAdd); err != nil {
		return err
	}
	return n.settle(device)
}

// RemoveAddress takes an address from a device.
func (n *Namespace) RemoveAddress(device string, addr netip.Prefix) error {
	return n.address(device, addr, (*netlink.Handle).AddrDel)
}

func (n *Namespace) address(device string, addr netip.Prefix, change func(*netlink.Handle, netlink.Link, *netlink.Addr) error) error {
	return n.configure(func(h *netlink.Handle) error {
		link, err := h.LinkByName(device)
		if err != nil {
			return err
		}
		ip := &net.IPNet{IP: addr.Addr().AsSlice(), Mask: net.CIDRMask(addr.Bits(), addr.Addr().BitLen())}
		return change(h, link, &netlink.Addr{IPNet: ip})
	})
}

// SendLoopback makes a machine send what is for 127.0.0.0/8 to its gateway, the
// host, instead of to itself, and gives it the address 127.0.0.2. No honest one
// does.
func (n *Namespace) SendLoopback() error {
	err := errors.Join(
		n.Sysctl("net/ipv4/conf/all/route_localnet", "1"),
		n.RemoveAddress("lo", netip.MustParsePrefix("127.0.0.1/8")),
		n.AddAddress("eth0", netip.MustParsePrefix("127.0.0.2/32")),
	)
	if err != nil {
		return err
	}
	return n.configure(func(h *netlink.Handle) error {
		routes, err := undisturbed(func() ([]netlink.Route, error) { return h.RouteList(nil, unix.AF_INET) })
		if err != nil {
			return err
		}
		for _, r := range routes {
			if r.Gw != nil {
				return h.RouteAdd(&netlink.Route{Dst: &net.IPNet{IP: net.IPv4(127, 0, 0, 0), Mask: net.CIDRMask(8, 32)}, Gw: r.Gw})
			}
		}
		return errors.New("no default route")
	})
}

// configure runs f with a netlink handle of the namespace.
func (n *Namespace) configure(f func(*netlink.Handle) error) error {
	// Not NewHandleAt: it gives back its thread even where that could not
	// return to its own namespace.
	var h *netlink.Handle
	err := n.Do(func() (err error) {
		h, err = netlink.NewHandle(unix.NETLINK_ROUTE)
		return err
	})
	if err != nil {
		return fmt.Errorf("open netlink in %s: %w", n.Name, err)
	}
	defer h.Close()
	if err := h.SetSocketTimeout(patience); err != nil {
		return fmt.Errorf("set netlink time-out: %w", err)
	}
	if err := f(h); err != nil {
		return fmt.Errorf("configure %s: %w", n.Name, err)
	}
	return nil
}

// undisturbed repeats a dump until nobody changes anything meanwhile. What the kernel
// lists in several messages may be incomplete else; it says so (NLM_F_DUMP_INTR).
func undisturbed[T any](dump func() (T, error)) (T, error) {
	const attempts = 100
	for range attempts - 1 {
		if list, err := dump(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return list, err
		}
	}
	return dump()
}

// settle waits until the device carries traffic. The kernel reports a link as
// up from a work queue, and only then does a bridge use its port and IPv6 have
// a link-local address, without which it neither resolves nor forwards.
func (n *Namespace) settle(device string) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	return n.configure(func(h *netlink.Handle) error {
		for {
			ready, err := settled(h, device)
			if err != nil || ready {
				return err
			}
			select {
			case <-ctx.Done():
				return fmt.Errorf("wait for %s: %w", device, ctx.Err())
			case <-time.After(time.Millisecond):
			}
		}
	})
}

func settled(h *netlink.Handle, device string) (bool, error) {
	link, err := h.LinkByName(device)
	if err != nil || link.Attrs().OperState != netlink.OperUp {
		return false, err
	}
	addrs, err := undisturbed(func() ([]netlink.Addr, error) { return h.AddrList(link, netlink.FAMILY_V6) })
	linkLocal := slices.ContainsFunc(addrs, func(a netlink.Addr) bool { return a.IP.IsLinkLocalUnicast() })
	tentative := slices.ContainsFunc(addrs, func(a netlink.Addr) bool { return a.Flags&unix.IFA_F_TENTATIVE != 0 })
	return err == nil && linkLocal && !tentative, err
}

// newVeth describes a link between the device and another in n. That one's
// hardware address follows from its IP address: whoever has it next is reached at
// once.
func newVeth(device string, n *Namespace, inner string, ip netip.Addr) *netlink.Veth {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = device
	return &netlink.Veth{
		LinkAttrs: attrs, PeerName: inner, PeerNamespace: netlink.NsFd(n.FD()), PeerHardwareAddr: hardwareAddr(ip),
	}
}

func hardwareAddr(ip netip.Addr) net.HardwareAddr {
	return append(net.HardwareAddr{0x0a, 0x58}, ip.AsSlice()...)
}

// add creates a device and raises it.
func add(h *netlink.Handle, link netlink.Link, bits int, addrs ...func(v6 bool) netip.Addr) error {
	if err := h.LinkAdd(link); err != nil {
		return fmt.Errorf("add %s %s: %w", link.Type(), link.Attrs().Name, err)
	}
	return raise(h, link.Attrs().Name, bits, addrs...)
}

// raise gives a device its addresses, each in both families, and sets it up.
// The bits are those of the IPv4 prefix; IPv6 prefixes are /64.
func raise(h *netlink.Handle, device string, bits int, addrs ...func(v6 bool) netip.Addr) error {
	link, err := h.LinkByName(device)
	if err != nil {
		return err
	}
	if err := h.LinkSetUp(link); err != nil {
		return fmt.Errorf("set %s up: %w", device, err)
	}
	for _, addr := range addrs {
		for _, ipNet := range []*net.IPNet{
			{IP: addr(false).AsSlice(), Mask: net.CIDRMask(bits, 32)},
			{IP: addr(true).AsSlice(), Mask: net.CIDRMask(64, 128)},
		} {
			if err := h.AddrAdd(link, &netlink.Addr{IPNet: ipNet}); err != nil {
				return fmt.Errorf("add %s to %s: %w", ipNet, device, err)
			}
		}
	}
	return nil
}
