package tool

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"github.com/cri-o/hostport/internal/discover"
	"github.com/cri-o/hostport/internal/iptables"
	"github.com/cri-o/hostport/internal/localhost"
	"github.com/cri-o/hostport/internal/nfnetlink"
	"github.com/cri-o/hostport/internal/nftables"
	"github.com/cri-o/hostport/internal/nodeaddr"
	"github.com/cri-o/hostport/internal/nodelock"
	"github.com/cri-o/hostport/internal/outcome"
	"github.com/cri-o/hostport/internal/row"
	"github.com/cri-o/hostport/internal/sockets"
	"github.com/cri-o/hostport/internal/sysctl"
)

// node is what the kernel holds of host ports, as it was at one moment.
type node struct {
	carriers []carrier
	// unseen is what could not be looked at, by family.
	unseen map[row.Family]error
	// manager is the process that has the host ports of a family, "" if none has.
	manager map[row.Family]string
	sockets map[row.Family]map[row.PortKey][]sockets.Socket
	// processes are those that have the sockets, by inode.
	processes map[uint32]string
}

// carrier is a backend that has something of ours, in one family.
type carrier struct {
	family  row.Family
	name    string
	rows    []*row.Row
	missing []string // what the kernel lacks of what the rows take
	// loopback is set if the rows are to be reached through 127.0.0.0/8.
	loopback bool
}

// backend is what is asked of one here.
type backend interface {
	List(ctx context.Context) (rows []*row.Row, intact bool, err error)
	Missing(ctx context.Context, rows []*row.Row) ([]string, error)
}

// look asks the kernel. It changes nothing.
func look(ctx context.Context) (*node, error) {
	if err := discover.HaveNetAdmin(); err != nil {
		return nil, err
	}

	n := &node{
		unseen: map[row.Family]error{}, manager: map[row.Family]string{},
		sockets: map[row.Family]map[row.PortKey][]sockets.Socket{}, processes: sockets.Processes(),
	}

	for _, f := range []row.Family{row.IPv4, row.IPv6} {
		if err := discover.HaveFamily(f); errors.Is(err, outcome.ErrUnavailable) {
			continue
		}

		n.unseen[f] = errors.Join(n.lookAt(ctx, f)...)
	}

	return n, nil
}

// lookAt asks about one family.
func (n *node) lookAt(ctx context.Context, f row.Family) (errs []error) {
	// Whether the manager means 127.0.0.1 to work cannot be asked. What stands shows it.
	carriers, err := carriersIn(ctx, f, true)

	if f == row.IPv4 && slices.ContainsFunc(carriers, func(c carrier) bool { return len(c.missing) > 0 }) {
		without, _ := carriersIn(ctx, f, false)
		for i := range min(len(carriers), len(without)) {
			if len(without[i].missing) < len(carriers[i].missing) {
				carriers[i] = without[i]
			}
		}
	}

	n.carriers, errs = append(n.carriers, carriers...), append(errs, err)

	n.sockets[f] = map[row.PortKey][]sockets.Socket{}

	for _, p := range []row.Protocol{row.TCP, row.UDP} {
		bound, err := sockets.List(f, p)
		errs = append(errs, err)

		for _, s := range bound {
			n.sockets[f][s.PortKey] = append(n.sockets[f][s.PortKey], s)
		}
	}

	n.manager[f], err = n.managerOf(f)

	return append(errs, err)
}

// carriersIn are those of a family. What rows take depends on whether they are to be reached through
// 127.0.0.0/8.
func carriersIn(ctx context.Context, f row.Family, loopback bool) (carriers []carrier, err error) {
	wanted := func(f row.Family) bool { return f == row.IPv4 && loopback }
	guarded := func(f row.Family) bool { return f == row.IPv4 && (loopback || localhost.Routed()) }

	finder := discover.New(wanted, guarded)
	defer func() { _ = finder.Close() }()

	var errs []error

	add := func(name string, b backend, err error) {
		c := carrier{family: f, name: name, loopback: wanted(f)}

		if err == nil {
			if c.rows, _, err = b.List(ctx); err == nil {
				c.missing, err = b.Missing(ctx, c.rows)
				carriers = append(carriers, c)
			}
		}

		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", name, err))
		}
	}

	if nft, err := finder.NFTablesInUse(ctx, f); nft != nil || err != nil {
		if err == nil {
			err = exempt(ctx, nft, f)
		}

		add("nftables", nft, err)
	}

	for _, v := range []iptables.Variant{iptables.NFT, iptables.Legacy} {
		if ipt, err := finder.IPTablesInUse(ctx, f, v, true); ipt != nil || err != nil {
			add("iptables-"+string(v), ipt, err)
		}
	}

	return carriers, errors.Join(errs...)
}

// exempt tells a backend which addresses are those of Services, as the manager does.
func exempt(ctx context.Context, b *nftables.Backend, f row.Family) error {
	table := nodeaddr.New(f == row.IPv6)
	defer func() { _ = table.Close() }()

	addresses, err := table.Now(ctx)
	if err != nil {
		return fmt.Errorf("look up the node's addresses: %w", err)
	}

	b.Exempt(addresses.Services())

	return nil
}

// managerOf names the process that has the host ports of a family, "" if none has.
func (n *node) managerOf(f row.Family) (string, error) {
	group := map[row.Family]nodelock.Group{row.IPv4: nodelock.IPv4, row.IPv6: nodelock.IPv6}[f]

	inode, err := nodelock.Holder(group)

	switch {
	case err != nil:
		return unseen, fmt.Errorf("look whether a manager runs: %w", err)
	case inode == 0:
		return "", nil
	default:
		return n.process(inode), nil
	}
}

// unseen stands for processes of which /proc does not show the files: to others than root, or from another PID namespace.
const unseen = "a process that /proc does not show"

func (n *node) process(inode uint32) string {
	if p := n.processes[inode]; p != "" {
		return p
	}

	return unseen
}

// found is a host port and what carries it.
type found struct {
	*row.Row

	in *carrier
}

// rows are all host ports, sorted by port.
func (n *node) rows() (all []found) {
	for i := range n.carriers {
		for _, r := range n.carriers[i].rows {
			all = append(all, found{r, &n.carriers[i]})
		}
	}

	slices.SortStableFunc(all, func(a, b found) int {
		if a.Port != b.Port {
			return int(a.Port) - int(b.Port)
		}

		return strings.Compare(string(a.Proto), string(b.Proto))
	})

	return all
}

// holders name the processes that have the port of an endpoint, in a family.
func (n *node) holders(e row.Endpoint, f row.Family) (all []string) {
	for _, s := range n.sockets[f][e.PortKey] {
		if s.Overlaps(e) {
			all = append(all, n.process(s.Inode))
		}
	}

	slices.Sort(all)

	return slices.Compact(all)
}

// holds reports whether a process holds the port of an endpoint: it is bound to that, and does not
// serve it. A manager's process may serve ports as well.
func (n *node) holds(process string, e row.Endpoint, f row.Family) bool {
	return slices.ContainsFunc(n.sockets[f][e.PortKey], func(s sockets.Socket) bool {
		return !s.Listening && s.Overlaps(e) && n.process(s.Inode) == process
	})
}

// lacks reports whether the port of a row is not the manager's, as far as that is seen: a manager
// runs and does not hold it, or none runs and a process has it.
func (n *node) lacks(r found) bool {
	manager := n.manager[r.Family()]
	if manager == "" {
		return len(n.holders(r.Endpoint, r.Family())) > 0
	}

	return manager != unseen && shows(r.Proto) &&
		!n.holds(manager, r.Endpoint, r.Family()) && !n.holds(unseen, r.Endpoint, r.Family())
}

// wiped are the endpoints that the manager of a family holds and that have no row.
func (n *node) wiped(f row.Family) (all []row.Endpoint) {
	if n.manager[f] == unseen {
		return nil
	}

	rows := map[row.PortKey][]*row.Row{}

	for _, r := range n.rows() {
		if r.Family() == f {
			rows[r.PortKey] = append(rows[r.PortKey], r.Row)
		}
	}

	for key, bound := range n.sockets[f] {
		for _, s := range bound {
			mapped := slices.ContainsFunc(rows[key], func(r *row.Row) bool { return r.Overlaps(s.Endpoint) })

			if !mapped && !s.Listening && n.process(s.Inode) == n.manager[f] {
				all = append(all, s.Endpoint)
			}
		}
	}

	slices.SortFunc(all, func(a, b row.Endpoint) int {
		return cmp.Or(cmp.Compare(a.Port, b.Port), cmp.Compare(a.Proto, b.Proto), a.IP.Compare(b.IP))
	})

	return slices.Compact(all)
}

// isSet reports whether a sysctl of a family is not 0. What is not there is as fallback says; what
// cannot be read is so, too, and unseen.
func (n *node) isSet(f row.Family, path string, fallback bool) bool {
	set, err := sysctl.IsSet(path)
	if errors.Is(err, fs.ErrNotExist) {
		return fallback
	}

	if err != nil {
		n.unseen[f] = errors.Join(n.unseen[f], err)

		return fallback
	}

	return set
}

// shows reports whether the kernel shows the sockets that hold ports of a protocol.
func shows(p row.Protocol) bool {
	return p == row.UDP || p == row.TCP && nfnetlink.KernelAtLeast(6, 8) //nolint:mnd // a version
}

// pod is what is known of whose a row is.
func pod(r *row.Row) string {
	if r.Label != "" {
		return r.Label
	}

	return r.OwnerMark()
}
