package hostport_test

import (
	"context"

	"github.com/cri-o/hostport"
)

// newManager returns a manager that keeps its rules to itself, so that the
// example runs anywhere, as any user.
func newManager() hostport.HostPortManager {
	return hostport.NewHostportManager(noIPTables{}, hostport.WithoutSockets())
}

// noIPTables is an iptables that takes everything and keeps nothing.
type noIPTables struct{}

func (noIPTables) IsIPv6() bool                                 { return false }
func (noIPTables) Save(context.Context, string) ([]byte, error) { return nil, nil }
func (noIPTables) Restore(context.Context, []byte) error        { return nil }
