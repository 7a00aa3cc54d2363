package hostport

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"

	v1 "k8s.io/api/core/v1"

	"github.com/cri-o/hostport/internal/outcome"
)

// ErrUnavailable is in the chain of the errors of New, Add, Sync, Keep, Check and List, and in
// Status.Err, where the node lacks what a backend or an IP family is made of: nf_tables, the
// programs of iptables, IPv6. To try again helps once the node has changed. Where New fails it may be
// about one of the two families.
var ErrUnavailable = outcome.ErrUnavailable

// ErrOtherManager is in the chain of the errors of an operation that another manager of the
// network namespace keeps from the host ports, and in Status.Err. The text names its process.
var ErrOtherManager = outcome.ErrOtherManager

// ErrInvalidMapping is in the chain of every error that Add, Sync, Keep or Check returns for
// arguments it cannot accept. The error's text names the pod, the row and the
// field, and says what would be accepted. Nothing of the pod has been changed then, its
// good rows included.
var ErrInvalidMapping = errors.New("invalid port mapping")

// errNoID is why a pod cannot have rows, or keep them.
var errNoID = errors.New(`sandbox id "": want one for each pod`)

// errClosed is what operations return after Close.
var errClosed = fmt.Errorf("host port manager is closed: %w", os.ErrClosed)

// noBackendError says why there is no backend, for each that there might be.
type noBackendError []error

func (e noBackendError) Error() string   { return errors.Join(e...).Error() }
func (e noBackendError) Unwrap() []error { return e }

// holdsNothing reports whether err, from opening a backend, means that there is
// nothing to remove. A backend that is there and cannot be used may hold rows.
func holdsNothing(err error) bool {
	causes := noBackendError{err}
	_ = errors.As(err, &causes)

	return !slices.ContainsFunc(causes, func(cause error) bool { return !errors.Is(cause, outcome.ErrUnavailable) })
}

// ConflictError says that Add, or Sync, has refused a pod because another live pod has the
// port, or with WithoutTakeover may be alive: the same family, protocol and port, and the same host IP or any
// address on either side. Nothing of the pod has been changed then.
type ConflictError struct {
	// Pod and OtherPod are the pods, "namespace/name" where these are known
	// and the sandbox id otherwise. OtherPod has the port.
	Pod, OtherPod string
	// ID and OtherID are their sandbox ids. A pod has two while an old sandbox of it
	// has yet to be removed. With WithoutTakeover OtherID may not be known: it is "" then,
	// and OtherPod is what the kernel has of the other one, its name or PodIDHash.
	ID, OtherID string
	// Protocol and HostPort are what both pods want.
	Protocol v1.Protocol
	HostPort int32
	// HostIP and OtherHostIP are the two host IPs, "0.0.0.0" or "::" for any.
	HostIP, OtherHostIP string
}

// Error names both pods and the row, and the sandboxes if it is the same pod twice.
func (e *ConflictError) Error() string {
	pod, otherPod := e.Pod, e.OtherPod
	if pod == otherPod {
		pod, otherPod = pod+", sandbox "+e.ID, otherPod+", sandbox "+e.OtherID
	}

	return fmt.Sprintf("pod %s: host port %s is taken by pod %s (%s)",
		pod, hostPortText(e.Protocol, e.HostIP, e.HostPort),
		otherPod, hostPortText(e.Protocol, e.OtherHostIP, e.HostPort))
}

// MissingError says what Check has found to be missing of a pod.
type MissingError struct {
	// Pod is "namespace/name" where these are known, and else the sandbox id, which ID is.
	Pod, ID string
	// Rows are those that the manager does not have for the pod, such as
	// "TCP 0.0.0.0:8080 -> 10.88.0.2:80", each with the pod that has the port, if one does. Add
	// puts them in, or says why not.
	Rows []string
	// Sockets are the rows whose ports are not held, each with the reason: who has the port.
	Sockets []string
	// Rules says what is wrong in the kernel, of the rows that the manager has: "table ip
	// crio-hostports is missing", "chain KUBE-HOSTPORTS is empty". Run, the next Add of the pod
	// and Sync put it right.
	Rules []string
}

// Error names everything that is missing.
func (e *MissingError) Error() string {
	var what []string
	for _, r := range e.Rows {
		what = append(what, "row "+r+" is missing")
	}

	for _, s := range e.Sockets {
		what = append(what, "not held: "+s)
	}

	return fmt.Sprintf("host ports of pod %s: %s", e.Pod, strings.Join(append(what, e.Rules...), "; "))
}

// PodError is what Sync has to say of one pod.
type PodError struct {
	// ID is its sandbox id.
	ID string
	// Err is an error of Add's, and names the pod.
	Err error
}

// Error is the text of Err.
func (e *PodError) Error() string { return e.Err.Error() }

// Unwrap returns Err.
func (e *PodError) Unwrap() error { return e.Err }

func hostPortText(protocol v1.Protocol, hostIP string, port int32) string {
	ip, err := netip.ParseAddr(hostIP)
	if err != nil {
		return fmt.Sprintf("%s %s:%d", protocol, hostIP, port)
	}

	return fmt.Sprintf("%s %s", protocol, netip.AddrPortFrom(ip, portOf(port)))
}
