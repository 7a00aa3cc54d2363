package hostport

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/cri-o/hostport/internal/discover"
	"github.com/cri-o/hostport/internal/iptables"
	"github.com/cri-o/hostport/internal/nfnetlink"
	"github.com/cri-o/hostport/internal/outcome"
)

// systemOpener finds the backends of both families.
type systemOpener struct {
	cfg    config
	finder *discover.Finder
}

func newSystemOpener(cfg config) *systemOpener {
	return &systemOpener{cfg: cfg, finder: discover.New(cfg.localhostIn, cfg.guardIn)}
}

func (o *systemOpener) close() error { return o.finder.Close() }

// open returns what finds the backend for a family.
func (o *systemOpener) open(f IPFamily) func(context.Context) (backend, error) {
	return func(ctx context.Context) (backend, error) {
		if err := errors.Join(discover.HaveNetAdmin(), discover.HaveFamily(f)); err != nil {
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

		return o.finder.IPTables(t), t.Variant, nil
	}

	b, err := o.finder.NFTables(f)
	if err != nil {
		return nil, "", err
	}

	err = b.Usable(ctx)

	return b, "", err
}

// list lists the rows of a family in all backends.
func (o *systemOpener) list(ctx context.Context, f IPFamily) ([]Mapping, error) {
	if err := discover.HaveNetAdmin(); err != nil {
		return nil, err
	}

	if err := discover.HaveFamily(f); err != nil {
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
		b, err := o.finder.NFTablesInUse(ctx, f)
		if err != nil || b == nil {
			return nil, err // and no interface around a nil pointer
		}

		return b, nil
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

// previous returns an iptables that carries rows from before.
func (o *systemOpener) previous(ctx context.Context, f IPFamily, v iptables.Variant, all bool) (backend, error) {
	b, err := o.finder.IPTablesInUse(ctx, f, v, all)
	if err != nil || b == nil {
		return nil, err // likewise
	}

	b.OnlyPrevious()

	return b, nil
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

	if err := errors.Join(discover.HaveNetAdmin(), discover.HaveFamily(family)); err != nil {
		return nil, err
	}

	t, err := iptables.Find(ctx, family)
	if err != nil {
		return nil, err // and no interface around a nil pointer
	}

	return t, nil
}
