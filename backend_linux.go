package hostport

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cri-o/hostport/internal/iptables"
	"github.com/cri-o/hostport/internal/nfnetlink"
	"github.com/cri-o/hostport/internal/nftables"
	"github.com/cri-o/hostport/internal/outcome"
)

// systemOpener finds the backends of both families, which share a netlink socket.
type systemOpener struct {
	cfg     config
	ruleset *nftables.Ruleset
}

func newSystemOpener(cfg config) *systemOpener {
	return &systemOpener{cfg: cfg, ruleset: nftables.NewRuleset(func() (nftables.Conn, error) {
		conn, err := nfnetlink.Dial()
		if err != nil {
			return nil, outcome.Unavailable(err) // and no interface around a nil pointer
		}

		return conn, nil
	})}
}

// close closes the socket.
func (o *systemOpener) close() error { return o.ruleset.Close() }

// open returns what finds the backend for a family.
func (o *systemOpener) open(f IPFamily) func(context.Context) (backend, error) {
	return func(ctx context.Context) (backend, error) {
		if err := errors.Join(haveNetAdmin(), haveFamily(f)); err != nil {
			return nil, err
		}

		kinds, err := o.cfg.kinds()
		if err != nil {
			return nil, err
		}

		var errs noBackendError

		for _, kind := range kinds {
			b, v, err := o.find(ctx, kind, f)
			if err != nil {
				errs = append(errs, fmt.Errorf("backend %s: %w", kind, err))

				if !isUnusable(err) {
					break
				}

				continue
			}

			if kind == BackendIPTables {
				var reason any = "WithBackend"
				if len(errs) > 0 {
					reason = oneLineError{errs}
				}

				o.cfg.log.Info("Host ports go through iptables", "family", string(f), "variant", string(v), "reason", reason)
			}

			return newMigration(b, o.others(f, v)...), nil
		}

		return nil, errs
	}
}

// isUnusable reports whether err says that nftables cannot be used here. Any other error says
// that nobody knows: iptables does not take its place then, or both might have rows.
func isUnusable(err error) bool {
	refused := (*nfnetlink.BatchError)(nil)

	return errors.Is(err, outcome.ErrUnavailable) || errors.As(err, &refused)
}

// find returns a backend, and which iptables it drives, if any.
func (o *systemOpener) find(ctx context.Context, kind Backend, f IPFamily) (backend, iptables.Variant, error) {
	if kind == BackendIPTables {
		t, err := iptables.Find(ctx, f)
		if err != nil {
			return nil, "", err
		}

		if t.InsteadOf != nil {
			o.cfg.log.Info("Took the variant of iptables that works here",
				"family", string(f), "variant", string(t.Variant), "reason", t.InsteadOf)
		}

		return o.iptables(t), t.Variant, nil
	}

	b, err := o.nftables(f)
	if err != nil {
		return nil, "", err
	}

	err = b.Usable(ctx)

	return b, "", err
}

func (o *systemOpener) nftables(f IPFamily) (*nftables.Backend, error) {
	if err := o.ruleset.Open(); err != nil {
		return nil, err
	}

	return nftables.New(o.ruleset, f, o.cfg.localhostIn(f), o.cfg.guardIn(f)), nil
}

// list lists the rows of a family in all backends.
func (o *systemOpener) list(ctx context.Context, f IPFamily) ([]Mapping, error) {
	if err := haveNetAdmin(); err != nil {
		return nil, err
	}

	if err := haveFamily(f); err != nil {
		if errors.Is(err, outcome.ErrUnavailable) {
			return nil, nil
		}

		return nil, err
	}

	var (
		list []Mapping
		errs []error
	)

	for _, find := range append(o.variants(f, ""), o.nftablesWithRows(f)) {
		b, err := find(ctx, false)
		if err != nil || b == nil {
			errs = append(errs, err)

			continue
		}

		some, err := mappingsIn(ctx, b)
		list, errs = append(list, some...), append(errs, err)
	}

	return list, errors.Join(errs...)
}

// others find the backends besides the one in use that may carry rows. They start no process
// for one that does not.
func (o *systemOpener) others(f IPFamily, inUse iptables.Variant) []finder {
	if inUse == "" {
		return o.variants(f, "")
	}

	return append([]finder{o.nftablesWithRows(f)}, o.variants(f, inUse)...)
}

// nftablesWithRows finds nftables.
func (o *systemOpener) nftablesWithRows(f IPFamily) finder {
	return func(ctx context.Context, _ bool) (backend, error) {
		nft, chains, err := o.chains(ctx, f)
		if err != nil || nft == nil || !nft.IsThere(chains) {
			return nil, err
		}

		return nft, nil
	}
}

// variants find the variants of iptables that are not in use.
func (o *systemOpener) variants(f IPFamily, inUse iptables.Variant) (finders []finder) {
	for _, v := range []iptables.Variant{iptables.NFT, iptables.Legacy} {
		if v != inUse {
			finders = append(finders, func(ctx context.Context, all bool) (backend, error) { return o.previous(ctx, f, v, all) })
		}
	}

	return finders
}

// chains lists the chains of a family in nf_tables, where the kernel has that.
func (o *systemOpener) chains(ctx context.Context, f IPFamily) (*nftables.Backend, []nfnetlink.ChainInfo, error) {
	nft, err := o.nftables(f)
	if errors.Is(err, outcome.ErrUnavailable) {
		return nil, nil, nil
	}

	if err != nil {
		return nil, nil, err
	}

	chains, err := nft.AllChains(ctx)
	if err != nil && errors.Is(nft.Usable(ctx), outcome.ErrUnavailable) {
		return nil, nil, nil
	}

	return nft, chains, err
}

// previous returns an iptables that carries rows from before. No program is started for one
// that does not: the kernel itself says whether there are chains of ours.
func (o *systemOpener) previous(ctx context.Context, f IPFamily, v iptables.Variant, all bool) (backend, error) {
	var there bool

	if v == iptables.NFT { // which keeps its tables among those of nf_tables
		_, chains, err := o.chains(ctx, f)
		if err != nil {
			return nil, err
		}

		there = iptables.HaveOurs(chains, all)
	} else {
		var err error
		if there, err = iptables.LegacyHasOurs(f, all); err != nil {
			return nil, err
		}
	}

	if !there {
		return nil, nil //nolint:nilnil // as finder says
	}

	t, err := iptables.FindVariant(ctx, f, v)
	if err != nil {
		return nil, err
	}

	b := o.iptables(t)
	b.OnlyPrevious()

	return b, nil
}

// iptables returns a backend that can be told of what others do to its tables.
func (o *systemOpener) iptables(t *iptables.Installed) *iptables.Backend {
	var generation func(context.Context) (uint32, error)

	if t.Variant == iptables.NFT && o.ruleset.Open() == nil {
		generation = o.ruleset.Generation
	}

	return t.NewBackend(o.cfg.localhostIn(t.Family), o.cfg.guardIn(t.Family), generation, o.ruleset.Ours())
}

// watch returns the transactions of nf_tables, until ctx ends. If they cannot be
// heard, what comes, at an interval, is that something may have happened.
func (o *systemOpener) watch(ctx context.Context) (<-chan nfnetlink.Transaction, error) {
	transactions := make(chan nfnetlink.Transaction)

	l, err := nfnetlink.Listen()
	next := func() (nfnetlink.Transaction, error) { return nfnetlink.Transaction{}, err }

	if err == nil {
		next = l.Next

		context.AfterFunc(ctx, func() { _ = l.Close() })
	}

	go o.pump(ctx, next, transactions)

	return transactions, nil
}

func (o *systemOpener) pump(ctx context.Context, next func() (nfnetlink.Transaction, error), transactions chan<- nfnetlink.Transaction) {
	for failing := false; ; {
		t, err := next()
		if err != nil {
			if !failing && ctx.Err() == nil {
				o.cfg.log.Error(err, "No news of nf_tables: host ports are looked at every second")
			}

			select {
			case <-time.After(repairPause):
			case <-ctx.Done():
				return
			}
		}

		failing = err != nil

		select {
		case transactions <- t:
		case <-ctx.Done():
			return
		}
	}
}

// NewIPTables finds the iptables(8) of a family that the node uses.
//
// Where there are two variants, nf_tables and legacy, it is the one in whose
// mangle table the kubelet or the node's set-up has left a chain
// KUBE-IPTABLES-HINT or KUBE-KUBELET-CANARY. Without such a hint it is the
// "iptables" of PATH, or where the kernel lacks what that drives the other one.
// iptables 1.6.2 or later is needed, for --wait.
//
// It fails without CAP_NET_ADMIN, without IPv6 in the kernel for IPv6, and
// where iptables is not installed.
func NewIPTables(family IPFamily) (IPTables, error) {
	if family != IPv4 && family != IPv6 {
		return nil, fmt.Errorf("IP family %q: want IPv4 or IPv6", family)
	}

	ctx, cancel := context.WithTimeout(context.Background(), iptables.CommandTimeout)
	defer cancel()

	if err := errors.Join(haveNetAdmin(), haveFamily(family)); err != nil {
		return nil, err
	}

	t, err := iptables.Find(ctx, family)
	if err != nil {
		return nil, err // and no interface around a nil pointer
	}

	return t, nil
}

// haveNetAdmin looks at the effective capabilities: iptables-save would not
// tell, where it has nothing to save.
func haveNetAdmin() error {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}

	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return fmt.Errorf("capget: %w", err)
	}

	if data[0].Effective&(1<<unix.CAP_NET_ADMIN) == 0 {
		return fmt.Errorf("CAP_NET_ADMIN is missing: %w", unix.EPERM)
	}

	return nil
}

// haveFamily fails where the kernel does not have an IP family.
func haveFamily(f IPFamily) error {
	if f == IPv4 {
		return nil
	}

	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return outcome.Unavailable(fmt.Errorf("look for IPv6 in the kernel: %w", err))
	}

	return unix.Close(fd) //nolint:wrapcheck // cannot fail
}
