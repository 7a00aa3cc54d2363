package links

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/cri-o/hostport/internal/nfnetlink"
	"github.com/cri-o/hostport/internal/row"
	"github.com/cri-o/hostport/internal/sysctl"
)

// Finder knows the interfaces that lead to the pods of a family.
//
// Pods that share one are neighbours. The answer of a pod to its neighbour need not
// come by the node, which has to translate it back: a bridge hands it straight on,
// unless it calls iptables (br_netfilter), and so do macvlan and its like. Then the
// neighbour has to see the node as its peer, by masquerade.
type Finder struct {
	family row.Family
	open   bool
	socket int         // of rtnetlink, while open
	asked  uint32      // how often, which numbers the requests
	calls  sysctl.File // of bridges, which comes and goes with br_netfilter
	// kinds are the kernel's names for what interfaces are, by the interfaces' names: to
	// ask takes six times as long as a route.
	kinds map[string]string
	// input is set if the kernel tells rules in postrouting by which interface a packet came.
	input bool
}

// New returns what knows the interfaces of a family. It opens nothing yet.
func New(f row.Family) Finder {
	return Finder{family: f, kinds: map[string]string{}, input: hasInputInPostrouting()}
}

// Close closes what is open. It may be used again.
func (l *Finder) Close() {
	if l.open {
		_ = unix.Close(l.socket)
		l.open = false
	}

	l.calls.Close()
}

// Forget makes links look at interfaces again.
func (l *Finder) Forget() { clear(l.kinds) }

// socketTimeout is for answers that the kernel gives at once.
const socketTimeout = 5 * time.Second

func (l *Finder) openSocket() (err error) {
	if l.open {
		return nil
	}

	if l.socket, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE); err != nil {
		return fmt.Errorf("open rtnetlink: %w", err)
	}

	timeout := unix.NsecToTimeval(socketTimeout.Nanoseconds())
	_ = unix.SetsockoptTimeval(l.socket, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout) // cannot fail
	l.open = true

	return nil
}

// To returns the interface to a pod: the one named, or where that is none, the one that
// the route to the pod leads to.
func (l *Finder) To(named string, pod netip.Addr) (string, error) {
	// Runtimes that know no interface give that of loopback.
	if named != row.LoopbackDevice && isInterface(named) {
		return named, nil
	}

	index, err := l.linkTo(pod)
	if err != nil {
		return "", fmt.Errorf("look up the interface to %s: %w", pod, err)
	}

	request, _ := unix.NewIfreq("") // fails on longer names alone
	request.SetUint32(index)

	// Rtnetlink would tell far more, and take a hundred times as long.
	if err := unix.IoctlIfreq(l.socket, unix.SIOCGIFNAME, request); err != nil {
		return "", fmt.Errorf("look up the interface to %s: %w", pod, err)
	}

	return request.Name(), nil
}

// Bypassed reports whether pods on an interface answer their neighbours past the node.
func (l *Finder) Bypassed(device string) (bool, error) {
	if device == row.LoopbackDevice || !l.input {
		return false, nil
	}

	kind, err := l.kind(device)

	switch {
	case err != nil || kind == "veth": // which leads to one pod
		return false, err
	case kind == "bridge":
		calls, err := l.callsIPTables(device)

		return !calls, err
	default:
		return true, nil
	}
}

// IsBridge reports whether an interface is a bridge, once Bypassed has looked at it:
// what is true of others does not change.
func (l *Finder) IsBridge(device string) bool { return l.kinds[device] == "bridge" }

// maxKinds bounds what is remembered where nobody forgets: each pod may have an
// interface of its own.
const maxKinds = 1000

func (l *Finder) kind(device string) (string, error) {
	if kind := l.kinds[device]; kind != "" {
		return kind, nil
	}

	routing, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return "", fmt.Errorf("open rtnetlink: %w", err)
	}
	defer routing.Close()

	_ = routing.SetSocketTimeout(socketTimeout) // cannot fail

	link, err := routing.LinkByName(device)
	if err != nil {
		return "", fmt.Errorf("look up interface %s: %w", device, err)
	}

	if len(l.kinds) >= maxKinds {
		l.Forget()
	}

	l.kinds[device] = link.Type()

	return link.Type(), nil
}

// callsIPTables reports whether what a bridge hands on passes the rules of the node:
// by the sysctl of the network namespace, or by one of the bridge's own.
func (l *Finder) callsIPTables(bridge string) (bool, error) {
	path, attr := "/proc/sys/net/bridge/bridge-nf-call-iptables", uint16(unix.IFLA_BR_NF_CALL_IPTABLES)
	if l.family == row.IPv6 {
		path, attr = "/proc/sys/net/bridge/bridge-nf-call-ip6tables", unix.IFLA_BR_NF_CALL_IP6TABLES
	}

	calls, err := l.calls.IsSet(path)

	switch {
	case errors.Is(err, fs.ErrNotExist): // br_netfilter is not loaded
		return false, nil
	case err != nil:
		return false, fmt.Errorf("look at bridge %s: %w", bridge, err)
	case calls:
		return true, nil
	default:
		return bridgeFlag(bridge, attr)
	}
}

// bridgeFlag reports whether a bridge has a flag set.
func bridgeFlag(bridge string, attr uint16) (bool, error) {
	request := nl.NewNetlinkRequest(unix.RTM_GETLINK, unix.NLM_F_ACK)
	request.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	request.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(bridge)))

	msgs, err := request.Execute(unix.NETLINK_ROUTE, 0)
	if err != nil || len(msgs) == 0 {
		return false, fmt.Errorf("look at bridge %s: %w", bridge, err)
	}

	data := msgs[0][unix.SizeofIfInfomsg:]

	for _, kind := range []uint16{unix.IFLA_LINKINFO, nl.IFLA_INFO_DATA, attr} {
		attrs, err := nl.ParseRouteAttr(data)
		if err != nil {
			return false, fmt.Errorf("look at bridge %s: %w", bridge, err)
		}

		i := slices.IndexFunc(attrs, func(a syscall.NetlinkRouteAttr) bool { return a.Attr.Type == kind })
		if i < 0 {
			return false, nil // the kernel has no br_netfilter
		}

		data = attrs[i].Value
	}

	return data[0] != 0, nil
}

// hasInputInPostrouting reports whether the kernel tells rules in postrouting by which
// interface a packet came: from Linux 5.7 on (commit 28f8bfd1ac94).
func hasInputInPostrouting() bool { return nfnetlink.KernelAtLeast(5, 7) } //nolint:mnd // Linux 5.7

// isInterface reports whether there is an interface of that name. Each has a
// directory with its sysctls, and to look for that takes a tenth of the time that
// rtnetlink takes to answer. The two others there, which stand for all interfaces
// and for those to come, can be no interface's: the kernel refuses to make one of
// that name (sysctl_dev_name_is_allowed in net/ipv4/devinet.c).
func isInterface(name string) bool {
	if !validInterfaceName(name) || name == "all" || name == "default" {
		return false
	}

	_, err := os.Stat("/proc/sys/net/ipv4/conf/" + name)

	return err == nil
}

// validInterfaceName is dev_valid_name of the kernel (net/core/dev.c). Its isspace
// goes by bytes and knows the no-break space of Latin-1 besides those of ASCII.
func validInterfaceName(name string) bool {
	return name != "" && len(name) < unix.IFNAMSIZ && name != "." && name != ".." &&
		!slices.ContainsFunc([]byte(name), func(c byte) bool { return strings.IndexByte("/: \t\n\v\f\r\xa0\x00", c) >= 0 })
}
