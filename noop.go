package hostport

// noop is the manager of a runtime that maps no host ports.
type noop struct{}

// NewNoopHostportManager returns a manager for a runtime that is configured to map no host
// ports, so that it need not ask at each pod. Add and Remove do nothing and return nil.
// Arguments are not validated: the ports of a pod are not refused, they lead nowhere.
//
// The node is not touched. Rows from a time when the runtime did map host ports stay; Sync
// without pods, of a Manager that New returns, takes them out.
func NewNoopHostportManager() HostPortManager { return noop{} }

// Add implements HostPortManager.
func (noop) Add(string, *PodPortMapping, string) error { return nil }

// Remove implements HostPortManager.
func (noop) Remove(string, *PodPortMapping) error { return nil }
