package hostport

import (
	"context"
	"fmt"
	"time"

	"k8s.io/klog/v2"

	"github.com/cri-o/hostport/internal/localhost"
	"github.com/cri-o/hostport/internal/memory"
)

// Backend is a way to program the kernel.
type Backend string

// The backends.
const (
	// BackendAuto takes nftables where the kernel has it, and else iptables; the
	// log says why then.
	BackendAuto Backend = "auto"
	// BackendNFTables programs nf_tables over netlink and runs no program. It
	// needs Linux 5.10 or later.
	BackendNFTables Backend = "nftables"
	// BackendIPTables runs iptables-restore(8), in the nf_tables or the legacy
	// variant, whichever the node uses.
	BackendIPTables Backend = "iptables"
)

// defaultTimeout is long enough for a node whose xtables lock is fought over
// and shorter than the two minutes that a kubelet waits for a sandbox.
const defaultTimeout = 30 * time.Second

// Option changes how a manager works. A nil Option changes nothing.
type Option func(*config)

type config struct {
	backend   Backend
	sockets   bool
	localhost bool
	timeout   time.Duration
	scope     string // of the ids that Sync and Keep are about; "": all
	// keepUnknown has a row whose owner nobody has named keep its port.
	keepUnknown bool
	log         klog.Logger
	observer    Observer
	memory      *memory.Node // in place of the kernel; nil: the kernel
}

// kinds are the backends to try, in order.
func (c config) kinds() ([]Backend, error) {
	switch c.backend {
	case BackendAuto:
		return []Backend{BackendNFTables, BackendIPTables}, nil
	case BackendNFTables, BackendIPTables:
		return []Backend{c.backend}, nil
	default:
		return nil, fmt.Errorf("backend %q: want auto, nftables or iptables", c.backend)
	}
}

// localhostIn reports whether host ports of a family are to be reached from
// loopback addresses. IPv6 has no route_localnet.
func (c config) localhostIn(f IPFamily) bool { return c.localhost && f == IPv4 }

// guardIn reports whether a family needs the guard: the sysctl will be set, or is.
func (c config) guardIn(f IPFamily) bool { return f == IPv4 && (c.localhost || localhost.Routed()) }

func newConfig(opts []Option) config {
	cfg := config{
		backend:   BackendAuto,
		sockets:   true,
		localhost: true,
		timeout:   defaultTimeout,
		log:       klog.Background(),
	}
	for _, opt := range opts {
		if opt != nil {
			opt(&cfg)
		}
	}

	return cfg
}

// withTimeout is ctx with the time that a call may take.
func (c config) withTimeout(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, c.timeout)
}

// partOf is ctx for the next of so many steps that share what is left of its time.
func partOf(ctx context.Context, steps int) (context.Context, context.CancelFunc) {
	if steps == 1 {
		return ctx, func() {}
	}

	deadline, _ := ctx.Deadline()

	return context.WithTimeout(ctx, time.Until(deadline)/time.Duration(steps))
}

// WithBackend forces a backend for new rows. Those that another one carries
// from before are kept, held and removed there all the same, and moved over by
// their pod's next Add, or Sync. The default is BackendAuto. With any other than
// those of this package, New and Add fail.
func WithBackend(b Backend) Option {
	return func(c *config) { c.backend = b }
}

// WithoutSockets leaves the host ports unheld: another process can then bind
// a mapped port and will see no traffic. For callers that hold ports
// themselves.
func WithoutSockets() Option {
	return func(c *config) { c.sockets = false }
}

// WithoutLocalhost leaves the sysctl route_localnet alone, without which host
// ports cannot be reached through 127.0.0.0/8. Connections from such an address
// are refused then, as those from ::1 always are: they meet the socket that
// holds the port. (One to 127.0.0.1 from another of the node's addresses does
// reach the pod.) What comes from outside for 127.0.0.0/8 is not translated all
// the same, and dropped if some interface has the sysctl from before.
func WithoutLocalhost() Option {
	return func(c *config) { c.localhost = false }
}

// WithoutTakeover has Add, and Sync, fail with a *ConflictError where they want a port of a row
// from before whose pod nobody has named, as if it had been: by default such a row makes way. It is
// for a process that lives for one call, and never knows the others: a CNI plugin, say. What then
// goes for good without a Remove goes by Keep or Sync alone. The row of the same sandbox id is none
// of another pod, and what a Remove could not take out still makes way.
func WithoutTakeover() Option {
	return func(c *config) { c.keepUnknown = true }
}

// WithScope confines what Sync and Keep take out to rows of pods whose ids begin with scope and a
// slash, such as "net1/5f2c…" for the scope "net1". It is for callers that share a node in turn
// and of which each knows its own pods alone, as the networks of a CNI plugin do. Rows of another
// scope stay, and their ports are taken as those of any pod. So that an id's scope can be told from
// what the kernel carries of it, that begins with six characters of the scope's own hash; see
// Mapping. Scope itself has no slash. The default is "", which is all rows.
func WithScope(scope string) Option {
	return func(c *config) { c.scope = scope }
}

// WithTimeout bounds how long a call of Add, Remove, Sync, Keep or Check takes as a whole, both
// families together; the default is 30 seconds. Half of it may go into waiting for
// operations of others, and all of it into waiting for another manager to close. Of Remove,
// Sync and Keep each family has half.
//
// Up to five seconds more for each family go into ending UDP and SCTP flows, or into taking
// back what was half done. Where the caller's context has less time than the manager, and the
// call shares a transaction with others, that may take half of the manager's time all the same.
//
// New waits for another manager as long, and then lists rows from before for as long in each
// family. A call that runs out of time returns an error with context.DeadlineExceeded in its
// chain. Durations that are not positive stand for the default.
func WithTimeout(d time.Duration) Option {
	return func(c *config) {
		if d <= 0 {
			d = defaultTimeout
		}

		c.timeout = d
	}
}

// WithLogger sets the logger. The default is klog.Background().
func WithLogger(log klog.Logger) Option {
	return func(c *config) { c.log = log }
}

// WithObserver has an Observer told what the manager does. The default is none.
func WithObserver(o Observer) Option {
	return func(c *config) { c.observer = o }
}
