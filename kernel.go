package hostport

import (
	"context"
	"net/netip"

	"github.com/cri-o/hostport/internal/flows"
	"github.com/cri-o/hostport/internal/memory"
	"github.com/cri-o/hostport/internal/nfnetlink"
	"github.com/cri-o/hostport/internal/nodeaddr"
	"github.com/cri-o/hostport/internal/row"
	"github.com/cri-o/hostport/internal/sockets"
)

// WithMemory has a manager work on a node in memory, in place of the kernel. It is for the
// package hostporttest, which hands out managers for tests: nobody else can make a node.
func WithMemory(n *memory.Node) Option {
	return func(c *config) { c.memory = n }
}

// opener finds the backends of both families.
type opener interface {
	// open returns what finds the backend of a family.
	open(f IPFamily) func(context.Context) (backend, error)
	// list lists the rows of a family in every backend.
	list(ctx context.Context, f IPFamily) ([]Mapping, error)
	// watch returns the transactions of nf_tables, until ctx ends.
	watch(ctx context.Context) (<-chan nfnetlink.Transaction, error)
	close() error
}

// locker keeps other managers from the host ports of a family, or of both. Take waits until
// ctx ends if told to, and costs nothing once it has succeeded.
type locker interface {
	Take(ctx context.Context, wait bool) error
	Close() error
}

// kernel is what the manager of a family asks of the node besides a backend.
type kernel struct {
	namespace interface{ isCurrent() error } // in which operations are to be called
	// locks keep other managers from the family's host ports, in the order in which they
	// are taken. The last one is this manager's own.
	locks []locker
	addrs nodeAddresses
	// What follows is for whoever has the commit lock, except that flows are stopped without.
	sockets   sockets.Set
	flows     flowEnder
	localhost sysctls
	links     linkFinder
}

// nodeAddresses are the node's, see nodeaddr.
type nodeAddresses interface {
	Now(ctx context.Context) (*nodeaddr.Addresses, error)
	Watch(ctx context.Context, news chan<- struct{}) error
	Close() error
}

// flowEnder ends flows that are stale, see flows.
type flowEnder interface {
	Flush(ctx context.Context, deltas []row.Delta, before *nodeaddr.Addresses, v flows.View) error
	Open()
	Resume()
	Stop()
	Close(v flows.View) error
}

// sysctls are those that host ports depend on, see localhost.
type sysctls interface {
	Open(device string) error
	Routed() bool
	IsSet(path string) (bool, error)
	Close()
}

// linkFinder knows the interfaces to pods, see links.
type linkFinder interface {
	To(named string, pod netip.Addr) (device string, err error)
	Bypassed(device string) (bool, error)
	IsBridge(device string) bool
	Forget()
	Close()
}

// newOpener returns what finds backends in the kernel, or in the node in memory.
func newOpener(cfg config) opener {
	if cfg.memory != nil {
		return memoryOpener{cfg}
	}

	return newSystemOpener(cfg)
}

// newLock returns a lock of some families that is not taken yet.
func newLock(cfg config, families ...IPFamily) locker {
	if cfg.memory != nil {
		return cfg.memory.Lock(families...)
	}

	return newNodeLock(cfg, families...)
}

// newKernel returns what m asks of its node. Nothing is asked yet.
func newKernel(m *hostportManager) kernel {
	if m.cfg.memory != nil {
		return newMemoryKernel(m.cfg.memory, m)
	}

	return newSystemKernel(m)
}

// newMemoryKernel returns what a node in memory has besides rows: ports, and nothing else.
func newMemoryKernel(n *memory.Node, m *hostportManager) kernel {
	return kernel{
		namespace: anywhere{},
		locks:     []locker{n.Lock(m.family)},
		addrs:     &memory.Addresses{},
		sockets:   sockets.NewSet(m.cfg.sockets, n.Binder(m.family)),
		flows:     memory.Flows{},
		localhost: memory.Sysctls{},
		links:     memory.Links{},
	}
}

// anywhere is a network namespace that all threads are in.
type anywhere struct{}

func (anywhere) isCurrent() error { return nil }

// memoryOpener knows the backend of a node in memory.
type memoryOpener struct{ cfg config }

func (o memoryOpener) open(f IPFamily) func(context.Context) (backend, error) {
	return func(context.Context) (backend, error) {
		if _, err := o.cfg.kinds(); err != nil {
			return nil, err
		}

		return o.cfg.memory.Backend(f), nil
	}
}

func (o memoryOpener) list(ctx context.Context, f IPFamily) ([]Mapping, error) {
	return mappingsIn(ctx, o.cfg.memory.Backend(f))
}

// watch tells of nothing: the backend is asked often enough.
func (memoryOpener) watch(context.Context) (<-chan nfnetlink.Transaction, error) {
	return make(chan nfnetlink.Transaction), nil
}

func (memoryOpener) close() error { return nil }
