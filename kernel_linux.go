package hostport

import (
	"github.com/cri-o/hostport/internal/flows"
	"github.com/cri-o/hostport/internal/links"
	"github.com/cri-o/hostport/internal/localhost"
	"github.com/cri-o/hostport/internal/nodeaddr"
	"github.com/cri-o/hostport/internal/sockets"
	"github.com/cri-o/hostport/internal/sysctl"
)

// newSystemKernel asks Linux.
func newSystemKernel(m *hostportManager) kernel {
	finder := links.New(m.family)

	return kernel{
		namespace: &namespace{},
		locks:     []locker{newNodeLock(m.cfg, m.family)},
		addrs:     nodeaddr.New(m.family == IPv6),
		sockets:   sockets.New(m.family, m.cfg.sockets),
		flows:     flows.New(m.family, m.cannotEnd, m.withView, flows.Dial),
		localhost: kernelSysctls{localhost.New(m.cfg.log)},
		links:     &finder,
	}
}

// kernelSysctls are in /proc/sys.
type kernelSysctls struct{ *localhost.Opener }

func (kernelSysctls) Routed() bool { return localhost.Routed() }

func (kernelSysctls) IsSet(path string) (bool, error) { return sysctl.IsSet(path) }
