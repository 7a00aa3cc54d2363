package hostport

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"
)

// localhost lets the node itself reach its host ports through 127.0.0.0/8.
//
// The kernel routes packets from loopback addresses only over interfaces that
// have the sysctl route_localnet (net/ipv4/route.c). It also lets in what comes
// for such addresses by that interface, and so opened services that rely on
// 127.0.0.1 (CVE-2020-8558). Against that stands the guard, a drop rule that is
// part of what every transaction asserts: the sysctl is set after one, and is
// never taken back.
type localhost struct {
	log     klog.Logger
	routing *netlink.Handle // nil until it is needed
	opened  map[int]bool    // interfaces that have the sysctl, by index, which is never used again
}

// maxOpened bounds what is remembered of interfaces. Most nodes have one for all
// pods, some have one for each.
const maxOpened = 1000

func newLocalhost(log klog.Logger) localhost { return localhost{log: log, opened: map[int]bool{}} }

func (l *localhost) close() {
	if l.routing != nil {
		l.routing.Close()
	}
}

// open sets route_localnet on the interface to a pod: the one named, or where
// that is none, the one that the route to the pod leads to.
func (l *localhost) open(device string, pod netip.Addr) error {
	index, err := l.deviceTo(device, pod)
	if err != nil || l.opened[index] || index == loopbackIndex {
		return err
	}

	link, err := l.routing.LinkByIndex(index)
	if err != nil {
		return fmt.Errorf("look up the interface to %s: %w", pod, err)
	}

	device = link.Attrs().Name

	if !isSet(routeLocalnet(device)) {
		if err := os.WriteFile(routeLocalnet(device), []byte("1"), 0); err != nil {
			return fmt.Errorf("set route_localnet: %w", err)
		}

		l.log.Info("Set route_localnet, for host ports at 127.0.0.0/8", "interface", device)
	}

	if len(l.opened) >= maxOpened {
		clear(l.opened)
	}

	l.opened[index] = true

	return nil
}

// routingTimeout is for answers that the kernel gives at once.
const routingTimeout = 5 * time.Second

// deviceTo returns the index of the interface to a pod.
func (l *localhost) deviceTo(device string, pod netip.Addr) (int, error) {
	if l.routing == nil {
		routing, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err == nil {
			err = routing.SetSocketTimeout(routingTimeout)
		}

		if err != nil {
			return 0, fmt.Errorf("open rtnetlink: %w", err)
		}

		l.routing = routing
	}

	// Runtimes that know no interface give that of loopback.
	if device != "" && device != loopbackDevice {
		if link, err := l.routing.LinkByName(device); err == nil {
			return link.Attrs().Index, nil
		}
	}

	routes, err := l.routing.RouteGet(pod.AsSlice())
	if err != nil || len(routes) == 0 {
		return 0, fmt.Errorf("look up the route to %s: %w", pod, err)
	}

	return routes[0].LinkIndex, nil
}

// localnetRouted tells whether some interface has route_localnet.
func localnetRouted() bool {
	paths, _ := filepath.Glob(routeLocalnet("*"))

	return slices.ContainsFunc(paths, isSet)
}

func routeLocalnet(device string) string {
	return "/proc/sys/net/ipv4/conf/" + device + "/route_localnet"
}

// forwarding is the sysctl without which no other machine reaches a pod.
func forwarding(f ipFamily) string {
	if f == IPv6 {
		return "/proc/sys/net/ipv6/conf/all/forwarding"
	}

	return "/proc/sys/net/ipv4/ip_forward"
}

// isSet tells whether a sysctl has another value than 0.
func isSet(path string) bool {
	value, err := os.ReadFile(path)

	return err == nil && !bytes.Equal(value, []byte("0\n"))
}
