package hostport

// NewNoopHostportManager returns a manager, a *Manager, for a runtime that is configured to map
// no host ports, so that it need not ask at each pod. Add, Remove, Sync, Check and Close do nothing and
// return nil. Arguments are not validated: the ports of a pod are not refused, they lead nowhere.
// Run waits until its context ends. Mappings and Status are empty.
//
// The node is not touched. Rows from a time when the runtime did map host ports stay; Sync
// without pods, of a Manager that New returns, takes them out.
func NewNoopHostportManager() HostPortManager { return &Manager{noop: true} }
