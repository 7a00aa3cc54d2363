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

const bridge = "cni0"

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
		if err := b.Host.sysctl(key, "1"); err != nil {
			return nil, err
		}
	}
	// A node has these set, and hairpin traffic depends on them. They are
	// absent while the module br_netfilter is not loaded.
	for _, key := range []string{"net/bridge/bridge-nf-call-iptables", "net/bridge/bridge-nf-call-ip6tables"} {
		if err := b.Host.sysctl(key, "1"); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}
	if err := b.connect("eth0", b.Client, 24, b.ClientIP, b.NodeIP, b.OtherNodeIP); err != nil {
		return nil, err
	}
	if err := b.connect("eth1", b.Peer, 24, b.PeerIP, peerGateway); err != nil {
		return nil, err
	}
	if err := b.addBridge(); err != nil {
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
// several goroutines at once.
func (b *Bed) AddPod(name string) (_ *Pod, err error) {
	pod := &Pod{IPv4: podGateway(false).Next(), IPv6: podGateway(true).Next()}
	if len(b.Pods) > 0 {
		last := b.Pods[len(b.Pods)-1]
		pod.IPv4, pod.IPv6 = last.IPv4.Next(), last.IPv6.Next()
	}
	if pod.Namespace, err = newMachine(name); err != nil {
		return nil, err
	}
	if err := b.plugIn(pod); err != nil {
		return nil, fmt.Errorf("add pod %s: %w", name, errors.Join(err, pod.Close()))
	}
	b.Pods = append(b.Pods, pod)
	return pod, nil
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
		n.sysctl("net/ipv6/conf/default/accept_dad", "0"),
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
		return add(h, newVeth(device, n), bits, hostAddrs...)
	})
	if err != nil {
		return err
	}
	if err := n.attach(bits, addr, hostAddrs[0]); err != nil {
		return err
	}
	return b.Host.settle(device)
}

func (b *Bed) addBridge() error {
	return b.Host.configure(func(h *netlink.Handle) error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = bridge
		// Without an address of its own, the bridge takes the lowest of its
		// ports' and changes it when a pod comes or goes.
		attrs.HardwareAddr = net.HardwareAddr{0x0a, 0x58, 10, 88, 0, 1}
		return add(h, &netlink.Bridge{LinkAttrs: attrs}, 16, podGateway)
	})
}

func (b *Bed) plugIn(pod *Pod) error {
	port := fmt.Sprintf("veth%d", len(b.Pods)+1)
	err := b.Host.configure(func(h *netlink.Handle) error {
		master, err := h.LinkByName(bridge)
		if err != nil {
			return err
		}
		veth := newVeth(port, pod.Namespace)
		veth.MasterIndex = master.Attrs().Index
		if err := add(h, veth, 0); err != nil {
			return err
		}
		if err := h.LinkSetHairpin(veth, true); err != nil {
			return fmt.Errorf("set hairpin mode of %s: %w", port, err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if err := pod.attach(16, pod.IP, podGateway); err != nil {
		return err
	}
	return errors.Join(b.Host.settle(port), b.Host.settle(bridge))
}

// attach configures eth0, the inner end of a link to the host.
func (n *Namespace) attach(bits int, addr, gateway func(bool) netip.Addr) error {
	err := n.configure(func(h *netlink.Handle) error {
		if err := raise(h, "eth0", bits, addr); err != nil {
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
	return n.settle("eth0")
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
	addrs, err := h.AddrList(link, netlink.FAMILY_V6)
	linkLocal := slices.ContainsFunc(addrs, func(a netlink.Addr) bool { return a.IP.IsLinkLocalUnicast() })
	tentative := slices.ContainsFunc(addrs, func(a netlink.Addr) bool { return a.Flags&unix.IFA_F_TENTATIVE != 0 })
	return err == nil && linkLocal && !tentative, err
}

// newVeth describes a link between the device and eth0 in n.
func newVeth(device string, n *Namespace) *netlink.Veth {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = device
	return &netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(n.FD())}
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
