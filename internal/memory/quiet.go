package memory

import (
	"context"
	"net/netip"

	"github.com/cri-o/hostport/internal/flows"
	"github.com/cri-o/hostport/internal/nodeaddr"
	"github.com/cri-o/hostport/internal/row"
)

// Addresses are those of a node that has none, and gets none.
type Addresses struct{ none nodeaddr.Addresses }

// Now returns the same addresses each time.
func (a *Addresses) Now(context.Context) (*nodeaddr.Addresses, error) { return &a.none, nil }

// Watch has nothing to tell.
func (*Addresses) Watch(context.Context, chan<- struct{}) error { return nil }

// Close has nothing to close.
func (*Addresses) Close() error { return nil }

// Flows are those of a node where no packet goes anywhere.
type Flows struct{}

// Flush has nothing to end, and neither has anything else.
func (Flows) Flush(context.Context, []row.Delta, *nodeaddr.Addresses, flows.View) error { return nil }

// Open opens nothing.
func (Flows) Open() {}

// Resume has nothing to resume.
func (Flows) Resume() {}

// Stop has nothing to stop.
func (Flows) Stop() {}

// Close has nothing to close.
func (Flows) Close(flows.View) error { return nil }

// Links are the interfaces of a node that has none.
type Links struct{}

// To returns that there is no interface to a pod.
func (Links) To(string, netip.Addr) (device string, err error) { return "", nil }

// Bypassed is never called for an interface.
func (Links) Bypassed(string) (bool, error) { return false, nil }

// IsBridge is never called for an interface.
func (Links) IsBridge(string) bool { return false }

// Forget knows nothing to forget.
func (Links) Forget() {}

// Close has nothing to close.
func (Links) Close() {}

// Sysctls are those of a node that forwards.
type Sysctls struct{}

// Open has no interface to open.
func (Sysctls) Open(string) error { return nil }

// Routed reports that no interface has route_localnet.
func (Sysctls) Routed() bool { return false }

// IsSet is asked about forwarding alone.
func (Sysctls) IsSet(string) (bool, error) { return true, nil }

// Close has nothing to close.
func (Sysctls) Close() {}
