package hostport

import (
	"context"
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/cri-o/hostport/internal/nfnetlink"
)

// opener finds the backends of both families, which share a netlink socket.
type opener struct {
	cfg     config
	ruleset *nftRuleset
}

func newOpener(cfg config) *opener { return &opener{cfg: cfg, ruleset: &nftRuleset{}} }

// close closes the socket.
func (o *opener) close() error {
	o.ruleset.mu.Lock()
	defer o.ruleset.mu.Unlock()

	if o.ruleset.conn == nil {
		return nil
	}

	return o.ruleset.conn.Close()
}

// open returns what finds the backend for a family.
func (o *opener) open(f ipFamily) func(context.Context) (backend, error) {
	return func(ctx context.Context) (backend, error) {
		if err := errors.Join(haveNetAdmin(), haveFamily(f)); err != nil {
			return nil, err
		}

		var kinds []Backend

		switch o.cfg.backend {
		case BackendAuto:
			kinds = []Backend{BackendNFTables, BackendIPTables}
		case BackendNFTables, BackendIPTables:
			kinds = []Backend{o.cfg.backend}
		default:
			return nil, fmt.Errorf("backend %q: %w", o.cfg.backend, errors.ErrUnsupported)
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
					reason = errs
				}

				o.cfg.log.Info("Host ports go through iptables", "family", f, "variant", v, "reason", reason)
			}

			return newLayers(b, o.cfg.log, func(ctx context.Context) ([]backend, error) { return o.before(ctx, f, v) }), nil
		}

		return nil, errs
	}
}

// isUnusable reports whether err says that nftables cannot be used here. Any other error says
// that nobody knows: iptables does not take its place then, or both might have rows.
func isUnusable(err error) bool {
	refused := (*nfnetlink.BatchError)(nil)

	return errors.Is(err, errUnavailable) || errors.As(err, &refused)
}

// find returns a backend, and which iptables it drives, if any.
func (o *opener) find(ctx context.Context, kind Backend, f ipFamily) (backend, variant, error) {
	if kind == BackendIPTables {
		t, err := findIPTables(ctx, f)
		if err != nil {
			return nil, "", err
		}

		if t.insteadOf != nil {
			o.cfg.log.Info("Took the variant of iptables that works here", "family", f, "variant", t.variant, "reason", t.insteadOf)
		}

		return o.iptables(t), t.variant, nil
	}

	b, err := o.nftables(f)
	if err != nil {
		return nil, "", err
	}

	err = b.usable(ctx)

	return b, "", err
}

func (o *opener) nftables(f ipFamily) (*nftBackend, error) {
	o.ruleset.mu.Lock()
	defer o.ruleset.mu.Unlock()

	if o.ruleset.conn == nil {
		conn, err := nfnetlink.Dial()
		if err != nil {
			return nil, unavailable(err)
		}

		o.ruleset.conn = conn
	}

	return newNFTBackend(o.ruleset, f, o.cfg), nil
}

// before returns the backends besides the one in use that may carry rows. It
// starts no process for one that does not. It fails where one does that there is no
// program for.
func (o *opener) before(ctx context.Context, f ipFamily, inUse variant) ([]backend, error) {
	var (
		before  []backend
		failure error
	)

	legacy, err := tableThere(f, variantLegacy, natTable)
	if err != nil {
		return nil, err
	}

	carries := map[variant]bool{variantLegacy: legacy}

	// iptables-nft keeps its tables among those of nf_tables.
	if nft, err := o.nftables(f); err == nil {
		chains, _ := nft.ruleset.conn.Dump(ctx, nft.table.Chains()) // there may be no nf_tables
		ours := false

		for _, m := range chains {
			c, _ := nfnetlink.ParseChain(m)
			ours = ours || c.Table == nftTable
			carries[variantNFT] = carries[variantNFT] || c.Table == natTable && ourChain(c.Name)
		}

		if inUse != "" && ours {
			before = append(before, nft)
		}
	}

	for _, v := range []variant{variantNFT, variantLegacy} {
		if !carries[v] || v == inUse {
			continue
		}

		t, err := iptablesOf(ctx, f, v)
		if err != nil {
			o.cfg.log.Error(err, "Cannot look for host ports from before", "family", f, "variant", v)

			if v == variantNFT { // a legacy table need not have anything of ours
				failure = err
			}

			continue
		}

		b := o.iptables(t)
		b.before, b.guard = true, nil // the guard stands with what is in use
		before = append(before, b)
	}

	return before, failure
}

// iptables returns a backend that can be told of what others do to its tables.
func (o *opener) iptables(t *ipTables) *iptablesBackend {
	b := newIPTablesBackend(t, o.cfg)

	if t.variant == variantLegacy {
		b.watch.state = t.legacyState
		b.most = math.MaxInt // it copies the whole table for each transaction
	} else if nft, err := o.nftables(t.family); err == nil {
		b.watch.family, b.watch.own = nft.table.Family, &o.ruleset.own
		b.watch.generation = nft.ruleset.conn.Generation
	}

	return b
}

// watch returns the transactions of nf_tables, until ctx ends. If they cannot be
// heard, what comes, at an interval, is that something may have happened.
func (o *opener) watch(ctx context.Context) <-chan nfnetlink.Transaction {
	transactions := make(chan nfnetlink.Transaction)

	l, err := nfnetlink.Listen()
	if err != nil {
		go o.follow(ctx, func() (nfnetlink.Transaction, error) { return nfnetlink.Transaction{}, err }, transactions)

		return transactions
	}

	context.AfterFunc(ctx, func() { _ = l.Close() })

	go o.follow(ctx, l.Next, transactions)

	return transactions
}

func (o *opener) follow(ctx context.Context, next func() (nfnetlink.Transaction, error), transactions chan<- nfnetlink.Transaction) {
	for deaf := false; ; {
		t, err := next()
		if err != nil {
			if !deaf && ctx.Err() == nil {
				o.cfg.log.Error(err, "No news of nf_tables: host ports are looked at every second")
			}

			select {
			case <-time.After(repairPause):
			case <-ctx.Done():
				return
			}
		}

		deaf = err != nil

		select {
		case transactions <- t:
		case <-ctx.Done():
			return
		}
	}
}
