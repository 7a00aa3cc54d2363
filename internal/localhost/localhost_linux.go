package localhost

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"k8s.io/klog/v2"

	"github.com/cri-o/hostport/internal/row"
	"github.com/cri-o/hostport/internal/sysctl"
)

// Opener lets the node itself reach its host ports through 127.0.0.0/8.
//
// The kernel routes packets from loopback addresses only over interfaces that
// have the sysctl route_localnet (net/ipv4/route.c). It also lets in what comes
// for such addresses by that interface, and so opened services that rely on
// 127.0.0.1 (CVE-2020-8558). Against that stands the guard, a drop rule that is
// part of what every transaction asserts: the sysctl is set after one, and is
// never taken back.
type Opener struct {
	log    klog.Logger
	sysctl sysctl.File
}

// New returns what opens interfaces, and says so in a log.
func New(log klog.Logger) *Opener { return &Opener{log: log} }

// Close closes what is open. It may be used again.
func (l *Opener) Close() { l.sysctl.Close() }

// Open sets route_localnet on the interface to a pod. It looks each time: an interface
// may have been made anew, or somebody may have taken it back.
func (l *Opener) Open(device string) error {
	if device == row.LoopbackDevice {
		return nil
	}

	if set, err := l.sysctl.IsSet(routeLocalnet(device)); set && err == nil {
		return nil
	}

	if err := os.WriteFile(routeLocalnet(device), []byte("1"), 0); err != nil {
		return fmt.Errorf("set route_localnet: %w", err)
	}

	l.log.Info("Set route_localnet, for host ports at 127.0.0.0/8", "interface", device)

	return nil
}

// Routed reports whether some interface has route_localnet, or may have: what
// cannot be read is on, or the guard would go for want of a file.
func Routed() bool {
	interfaces, err := os.ReadDir(filepath.Dir(filepath.Dir(routeLocalnet("any"))))
	if err != nil {
		return !errors.Is(err, fs.ErrNotExist)
	}

	return slices.ContainsFunc(interfaces, func(e os.DirEntry) bool {
		set, err := sysctl.IsSet(routeLocalnet(e.Name()))

		return set || err != nil && !errors.Is(err, fs.ErrNotExist) // it may have gone meanwhile
	})
}

// routeLocalnet is the sysctl of an interface.
func routeLocalnet(device string) string {
	return "/proc/sys/net/ipv4/conf/" + device + "/route_localnet"
}

// Forwarding is the sysctl without which no other machine reaches a pod.
func Forwarding(f row.Family) string {
	if f == row.IPv6 {
		return "/proc/sys/net/ipv6/conf/all/forwarding"
	}

	return "/proc/sys/net/ipv4/ip_forward"
}
