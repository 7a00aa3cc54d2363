package hostport

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

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
type localhost struct{ log klog.Logger }

// newLocalhost returns what opens interfaces, and says so in a log.
func newLocalhost(log klog.Logger) localhost { return localhost{log: log} }

// open sets route_localnet on the interface to a pod. It looks each time: an interface
// may have been made anew, or somebody may have taken it back.
func (l *localhost) open(device string) error {
	if device == loopbackDevice {
		return nil
	}

	if set, err := isSet(routeLocalnet(device)); set && err == nil {
		return nil
	}

	if err := os.WriteFile(routeLocalnet(device), []byte("1"), 0); err != nil {
		return fmt.Errorf("set route_localnet: %w", err)
	}

	l.log.Info("Set route_localnet, for host ports at 127.0.0.0/8", "interface", device)

	return nil
}

// localnetRouted reports whether some interface has route_localnet, or may have: what
// cannot be read is on, or the guard would go for want of a file.
func localnetRouted() bool {
	interfaces, err := os.ReadDir(filepath.Dir(filepath.Dir(routeLocalnet("any"))))
	if err != nil {
		return !errors.Is(err, fs.ErrNotExist)
	}

	return slices.ContainsFunc(interfaces, func(e os.DirEntry) bool {
		set, err := isSet(routeLocalnet(e.Name()))

		return set || err != nil && !errors.Is(err, fs.ErrNotExist) // it may have gone meanwhile
	})
}

// routeLocalnet is the sysctl of an interface.
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

// isSet reports whether a sysctl has another value than 0.
func isSet(path string) (bool, error) {
	value, err := os.ReadFile(path)

	return err == nil && !bytes.Equal(value, []byte("0\n")), err //nolint:wrapcheck // names the file
}
