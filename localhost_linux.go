package hostport

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
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
}

func newLocalhost(log klog.Logger) localhost { return localhost{log: log} }

func (l *localhost) close() {
	if l.routing != nil {
		l.routing.Close()
	}
}

// open sets route_localnet on the interface to a pod: the one named, or where
// that is none, the one that the route to the pod leads to. It looks each time:
// an interface may have been made anew, or somebody may have taken it back.
func (l *localhost) open(device string, pod netip.Addr) error {
	// Runtimes that know no interface give that of loopback.
	if device == loopbackDevice || !isInterface(device) {
		var err error
		if device, err = l.deviceTo(pod); err != nil {
			return fmt.Errorf("look up the interface to %s: %w", pod, err)
		}
	}

	if device == loopbackDevice || isSet(routeLocalnet(device)) {
		return nil
	}

	if err := os.WriteFile(routeLocalnet(device), []byte("1"), 0); err != nil {
		return fmt.Errorf("set route_localnet: %w", err)
	}

	l.log.Info("Set route_localnet, for host ports at 127.0.0.0/8", "interface", device)

	return nil
}

// routingTimeout is for answers that the kernel gives at once.
const routingTimeout = 5 * time.Second

// deviceTo returns the interface that the route to a pod leads to.
func (l *localhost) deviceTo(pod netip.Addr) (string, error) {
	if l.routing == nil {
		routing, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return "", err //nolint:wrapcheck // open does
		}

		_ = routing.SetSocketTimeout(routingTimeout) // cannot fail

		l.routing = routing
	}

	routes, err := l.routing.RouteGet(pod.AsSlice())
	if err != nil {
		return "", err //nolint:wrapcheck // open does
	}

	link, err := l.routing.LinkByIndex(routes[0].LinkIndex)
	if err != nil {
		return "", err //nolint:wrapcheck // open does
	}

	return link.Attrs().Name, nil
}

// isInterface reports whether there is an interface of that name. Each has a
// directory with its sysctls, and to look for that takes a tenth of the time that
// rtnetlink takes to answer. The two others there, which stand for all interfaces
// and for those to come, can be no interface's: the kernel refuses to make one of
// that name (sysctl_dev_name_is_allowed in net/ipv4/devinet.c).
func isInterface(name string) bool {
	if !validInterfaceName(name) || name == "all" || name == "default" {
		return false
	}

	_, err := os.Stat(routeLocalnet(name))

	return err == nil
}

// validInterfaceName is dev_valid_name of the kernel (net/core/dev.c). Its isspace
// goes by bytes and knows the no-break space of Latin-1 besides those of ASCII.
func validInterfaceName(name string) bool {
	return name != "" && len(name) < unix.IFNAMSIZ && name != "." && name != ".." &&
		!slices.ContainsFunc([]byte(name), func(c byte) bool { return strings.IndexByte("/: \t\n\v\f\r\xa0\x00", c) >= 0 })
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
