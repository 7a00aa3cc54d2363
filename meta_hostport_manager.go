package hostport

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/cri-o/hostport/internal/nfnetlink"
	"github.com/cri-o/hostport/internal/row"
)

// Manager maps host ports for both IP families. It implements HostPortManager. New,
// NewMetaHostportManager and NewNoopHostportManager make one; the zero Manager is none. Its
// methods are to be called in the network namespace that it was made in, the node's:
// Add, Remove, Sync, Keep, Check and Run fail on a thread in another one, and change nothing.
type Manager struct {
	noop     bool // it is for no family
	families []*hostportManager
	opener   opener
	lock     locker // of both families, taken before that of either
}

var _ HostPortManager = (*Manager)(nil)

// NewMetaHostportManager returns a manager for both IP families, a *Manager. Rows that
// the kernel holds already are adopted, what is missing of them is put back, and
// their ports are held again.
//
// It never fails. Where a family cannot work, because neither nftables nor
// iptables is there, IPv6 is off or CAP_NET_ADMIN is missing, the other one
// does, and Add says what is missing until it is there.
//
// A network namespace has one manager at a time in each family, and the kernel sees to
// that: see Close. NewMetaHostportManager does not wait for another one. Where there is
// one, rows are adopted by the first operation, or by Run, when that one has gone. Until
// then Add, Remove, Sync, Keep and Check wait for it, for as long as WithTimeout says. Then they
// fail with context.DeadlineExceeded, and name the process that has the host ports.
func NewMetaHostportManager(opts ...Option) HostPortManager {
	m, _ := newManager(opts, false)

	return m
}

// New is NewMetaHostportManager for callers that want to know at once: it
// fails where neither family can work, and says why for each. For another manager it
// waits as long as WithTimeout says, for both families together. A family that the other
// one still has then cannot work.
//
// Sync comes next, before the first Add: until then the rows from before are nobody's.
func New(opts ...Option) (*Manager, error) {
	m, err := newManager(opts, true)
	if err != nil {
		return nil, errors.Join(err, m.Close())
	}

	return m, nil
}

// newManager returns a manager in any case, and an error if no family works. It may wait
// for another manager.
func newManager(opts []Option, wait bool) (*Manager, error) {
	cfg := newConfig(opts)
	m := &Manager{opener: newOpener(cfg), lock: newLock(cfg, IPv4, IPv6)}

	ctx, cancel := cfg.withTimeout(context.Background())
	defer cancel()

	var errs []error

	for _, f := range []IPFamily{IPv4, IPv6} {
		fm := newHostportManager(f, cfg, m.opener.open(f))
		fm.locks = append([]locker{m.lock}, fm.locks...)
		m.families = append(m.families, fm)

		if err := fm.start(ctx, wait); err != nil {
			errs = append(errs, fm.inFamily(err))
		}
	}

	err := errors.Join(errs...)
	if len(errs) == len(m.families) {
		return m, fmt.Errorf("host ports cannot be mapped: %w", err)
	}

	if err != nil {
		cfg.log.Error(oneLineError{err}, "Host ports cannot be mapped in one of the families")
	}

	return m, nil
}

// Add implements HostPortManager. It is AddContext without a context.
func (m *Manager) Add(id string, podPortMapping *PodPortMapping, natInterfaceName string) error {
	return m.AddContext(context.Background(), id, podPortMapping, natInterfaceName)
}

// AddContext is Add for a caller that may have less time than WithTimeout gives. It waits for
// operations of others until ctx ends, and no longer than half of the time to ctx's deadline: the other half
// is for its own. A transaction that has begun then is finished all the same, unless ctx's deadline
// passes. One that Add shares with other operations has the time that those have; see WithTimeout.
// Errors are Add's, and ctx's.
func (m *Manager) AddContext(ctx context.Context, id string, podPortMapping *PodPortMapping, natInterfaceName string) error {
	if m.noop {
		return nil
	}

	rows, err := rowsOf(id, podPortMapping)
	if err != nil {
		m.families[0].cfg.observe(Event{
			Kind: EventAdd, PodID: id, Namespace: podPortMapping.Namespace, Name: podPortMapping.Name, Err: err,
		})
	}

	if err != nil || len(rows) == 0 {
		return err
	}

	ctx, cancel := m.withTimeout(ctx)
	defer cancel()

	return m.familyOf(rows).add(ctx, rows, natInterfaceName)
}

// Remove implements HostPortManager. It goes on past an error and returns all. Without a mapping
// (nil) it takes out all rows of id, which is right when a sandbox is torn down. A mapping without
// host ports takes out none, and is no error. It is RemoveContext without a context.
func (m *Manager) Remove(id string, podPortMapping *PodPortMapping) error {
	return m.RemoveContext(context.Background(), id, podPortMapping)
}

// RemoveContext is Remove, and ctx is to it what it is to AddContext, except that each family has
// half of the time. Where it fails because ctx has ended, Run, or the next operation that wants
// the ports, does it.
func (m *Manager) RemoveContext(ctx context.Context, id string, podPortMapping *PodPortMapping) error {
	if m.noop {
		return nil
	}

	allowed := sync.OnceValue(m.families[0].namespace.isCurrent) // both were made in one namespace

	families := slices.DeleteFunc(slices.Clone(m.families), (*hostportManager).isEmpty)
	if len(families) == 0 { // the checks of one are those of both
		families = m.families[:1]
	}

	return m.eachOf(ctx, families, func(ctx context.Context, fm *hostportManager) error {
		return fm.remove(ctx, id, podPortMapping, allowed)
	})
}

// withTimeout is ctx with the time that a call may take.
func (m *Manager) withTimeout(ctx context.Context) (context.Context, context.CancelFunc) {
	return m.families[0].cfg.withTimeout(ctx)
}

// eachOf does the same for some families, each with its share of the time.
func (m *Manager) eachOf(ctx context.Context, families []*hostportManager, do func(context.Context, *hostportManager) error) error {
	ctx, cancel := m.withTimeout(ctx)
	defer cancel()

	var errs []error

	for i, fm := range families {
		part, cancel := partOf(ctx, len(families)-i)
		errs = append(errs, do(part, fm))

		cancel()
	}

	return errors.Join(errs...)
}

// Sync makes the rows of both families exactly those of pods, which has for each
// sandbox id what Add would be given, once for each of the pod's IPs. What is
// missing comes, in the backend in use and with its sockets; whatever else bears
// the names of this package goes: rows of other pods, rows from before, what has
// leaked, and what others have put into our chains and tables or made lead there.
// Rows that stay are not touched, and no packet of theirs is lost. It is restart
// recovery, garbage collection and repair in one call, with one transaction for
// each family, or with iptables for each table, and with iptables-nft for a
// thousand rows that change. To call it again changes nothing.
// Without pods it takes everything out.
//
// A runtime calls it when it starts, before its first Add. Until then nobody knows whose
// the rows from before are, and the Add of another pod takes their ports.
//
// What stands of a pod stays as it is where it cannot be told what it is to have: if an entry's
// IP is nil, because it is not known, which is no error, and if it is invalid. An id without
// entries, or with nil ones alone, loses its rows. A pod has
// one IP in each family: of several the first one counts. Where two pods
// want one port, the one that has it keeps it, else the one with the smaller id
// gets it.
//
// The error has a method Unwrap() []error, as those of errors.Join have. A *PodError there is a
// pod that does not have what it wants in a family: the others have theirs. Any other error
// is about a family as a whole, of which nothing has changed then. If only what
// another backend carries from before could not be taken out, the new rows stand, and Run or the
// next Sync tries again. It ends with ctx. What it has changed is in the log.
func (m *Manager) Sync(ctx context.Context, pods map[string][]*PodPortMapping) error {
	if m.noop {
		return nil
	}

	var errs []error

	wanted := make([][]podRows, len(m.families))

	for _, id := range slices.Sorted(maps.Keys(pods)) {
		pod, err := rowsOfPod(id, pods[id])
		if err != nil {
			errs = append(errs, &PodError{ID: id, Err: err})
		}

		for i, fm := range m.families {
			wanted[i] = append(wanted[i], pod[fm.family])
		}
	}

	if len(errs) > 0 {
		m.families[0].cfg.observe(Event{Kind: EventSync, Err: errors.Join(errs...)})
	}

	_ = m.eachOf(ctx, m.families, func(ctx context.Context, fm *hostportManager) error {
		errs = append(errs, fm.sync(ctx, EventSync, wanted[slices.Index(m.families, fm)])...)

		return nil
	})

	return errors.Join(errs...)
}

// Keep is garbage collection for a caller that knows which pods there are, and not what each is to
// have: it takes out the rows of every pod whose sandbox id is not among ids, in both families, and
// their flows end as with Remove. What stands of the others stays as it is, and its pods are
// known by name from then on. The rest is as with Sync, of a manager that has WithScope as well:
// one transaction, what has leaked goes, to call it again changes nothing, and the other family
// goes on past an error. Without ids it takes everything out. An id may come twice and need not
// have rows.
//
// In iptables, rows from before a restart are found to be a pod's only if protocol and host IP
// were given to Add as Kubernetes spells them. Others go.
//
// Errors: ErrInvalidMapping if an id is empty, which changes nothing; else Sync's, of a family as
// a whole.
func (m *Manager) Keep(ctx context.Context, ids []string) error {
	if m.noop {
		return nil
	}

	pods := make([]podRows, 0, len(ids))
	for _, id := range ids {
		pods = append(pods, podRows{owner: row.Owner{ID: id}, stays: true})
	}

	if slices.Contains(ids, "") {
		err := fmt.Errorf("keep: %w: %w", ErrInvalidMapping, errNoID)
		m.families[0].cfg.observe(Event{Kind: EventKeep, Err: err})

		return err
	}

	return m.eachOf(ctx, m.families, func(ctx context.Context, fm *hostportManager) error {
		return errors.Join(fm.sync(ctx, EventKeep, pods)...)
	})
}

// Check returns nil if all rows that Add would make of podPortMapping stand in the
// kernel, their ports are held, and what they share with others is there too.
// Else the error is a *MissingError; a port that an outgoing connection keeps from being
// held is among what is missing. It changes nothing, but that a family that
// could not work when the manager was made may be taken over, for which it waits as
// Add does. The sysctl route_localnet is the interface's, not the pod's: it is not
// looked at.
// ErrInvalidMapping, os.ErrClosed and ctx's error are among the others.
func (m *Manager) Check(ctx context.Context, id string, podPortMapping *PodPortMapping) error {
	if m.noop {
		return nil
	}

	rows, err := rowsOf(id, podPortMapping)
	if err != nil || len(rows) == 0 {
		return err
	}

	ctx, cancel := m.withTimeout(ctx)
	defer cancel()

	err = m.familyOf(rows).check(ctx, rows)
	if missing := (*MissingError)(nil); err == nil || errors.As(err, &missing) {
		return err
	}

	return fmt.Errorf("check host ports of pod %s: %w", rows[0].Owner, err)
}

// How Run looks after the host ports.
const (
	// lookInterval is how often it looks at what the kernel does not tell of.
	lookInterval = 400 * time.Millisecond
	// debounce is how long it waits after the kernel has told of something:
	// firewalls come in several transactions.
	debounce = 50 * time.Millisecond
)

// Run repairs what others break, such as nft flush ruleset, iptables -F or a
// reload of firewalld, within a second or two, and holds ports that could not be
// held because an outgoing connection had them. It takes from no one: what it does
// not know it leaves, for Sync, and takes out only where a Sync has failed. Each
// repair is logged. One that fails is tried again a second later, or some ten where
// only what is from before is left to be taken out.
//
// While another manager has the host ports it waits, without limit.
//
// It returns ctx's error when that ends, os.ErrClosed after Close, and
// errors.ErrUnsupported on systems other than Linux. It is to run once at a time,
// in the network namespace of the manager.
func (m *Manager) Run(ctx context.Context) error {
	if m.noop {
		<-ctx.Done()

		return ctx.Err()
	}

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()

	transactions, err := m.opener.watch(ctx)
	if err != nil {
		return err
	}

	var pending []nfnetlink.Transaction

	addresses := make(chan struct{}, 1)
	for _, fm := range m.families {
		fm.watchNode(ctx, addresses)
	}

	look := time.NewTicker(lookInterval)
	settled := time.NewTimer(0)

	defer look.Stop()
	defer settled.Stop()

	for begun := false; ; {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case t := <-transactions:
			if len(pending) == 0 {
				settled.Reset(debounce)
			}

			pending = append(pending, t)

			continue
		case <-addresses:
			settled.Reset(debounce)

			continue
		case <-look.C:
		case <-settled.C:
		}

		for _, fm := range m.families {
			err := fm.runOnce(ctx, func(b backend) bool { return b.Disturbed(pending) || !begun })
			if ctx.Err() != nil {
				return ctx.Err()
			}

			if err != nil {
				return err
			}
		}

		pending, begun = nil, true
	}
}

// familyOf is the manager of rows, of which there is at least one.
func (m *Manager) familyOf(rows []*row.Row) *hostportManager {
	i := slices.IndexFunc(m.families, func(fm *hostportManager) bool { return fm.family == rows[0].Family() })

	return m.families[i]
}

// Mappings lists the rows of both families, sorted by host port, protocol and
// host IP. It waits for operations that are being committed.
func (m *Manager) Mappings() []Mapping {
	var list []Mapping
	for _, fm := range m.families {
		list = append(list, fm.mappings()...)
	}

	return inOrder(list)
}

// Close releases the sockets and leaves the rules, so that traffic goes on
// while a runtime restarts. It waits for the operation that is being committed, and
// ends the TCP connections that were to end behind a Remove. Then another manager can
// have the host ports; without Close it can when the process ends, also by SIGKILL.
// Operations that come later and have something to do fail with os.ErrClosed.
// Closing again does nothing.
func (m *Manager) Close() error {
	if m.noop {
		return nil
	}

	var errs []error
	for _, fm := range m.families {
		errs = append(errs, fm.Close())
	}

	return errors.Join(append(errs, m.opener.close(), m.lock.Close())...)
}
