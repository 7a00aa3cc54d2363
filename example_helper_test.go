package hostport_test

import (
	"github.com/cri-o/hostport"
	"github.com/cri-o/hostport/hostporttest"
)

// newManager returns a manager whose node is in memory, so that the example runs
// anywhere, as any user.
func newManager() hostport.HostPortManager {
	return hostport.NewMetaHostportManager((&hostporttest.Node{}).Option())
}
