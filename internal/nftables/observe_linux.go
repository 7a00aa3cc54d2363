package nftables

import (
	"context"
	"slices"

	"github.com/mdlayher/netlink"

	"github.com/cri-o/hostport/internal/nfnetlink"
)

// Observed is what the kernel holds of the layout, except elements. Its zero value is
// that there is no table.
//
// It changes if anybody makes, deletes or replaces a rule of our table, one of our chains
// or its policy, or the table itself, or if that comes to have more or fewer chains and
// sets. A set of ours cannot be replaced without that: as long as a rule refers to it, the
// kernel keeps it.
type Observed struct {
	Table  nfnetlink.TableInfo
	chains []nfnetlink.ChainInfo // as Layout.chains has them; zero where there is none
	sets   []nfnetlink.SetInfo   // all that the table has, as are
	rules  []nfnetlink.RuleInfo
}

func (o Observed) exists() bool { return o.chains != nil }

func (o Observed) equal(other Observed) bool {
	return o.Table == other.Table && slices.Equal(o.chains, other.chains) &&
		slices.Equal(o.sets, other.sets) && slices.Equal(o.rules, other.rules)
}

// Observe reads our table.
func (b *Backend) Observe(ctx context.Context) (found Observed, err error) {
	ours := b.Chains()
	requests := append(make([]netlink.Message, 0, 1+len(ours)), b.Table.Get())

	for _, c := range ours {
		requests = append(requests, b.Table.GetChain(c.Name))
	}

	answers, err := b.ruleset.conn.Get(ctx, requests...)
	if err != nil || answers[0] == nil {
		return Observed{}, err
	}

	if found.Table, err = nfnetlink.ParseTable(*answers[0]); err != nil {
		return Observed{}, err
	}

	found.chains = make([]nfnetlink.ChainInfo, len(ours))

	for i, answer := range answers[1:] {
		if answer == nil {
			continue
		}

		if found.chains[i], err = nfnetlink.ParseChain(*answer); err != nil {
			return Observed{}, err
		}
	}

	if found.sets, err = dumpAll(ctx, b.ruleset.conn, b.Table.Sets(), nfnetlink.ParseSet); err != nil {
		return Observed{}, err
	}

	found.rules, err = dumpAll(ctx, b.ruleset.conn, b.Table.Rules(), nfnetlink.ParseRule)

	return found, err
}

// dumpAll lists what a request is for.
func dumpAll[T any](ctx context.Context, conn Conn, request netlink.Message, parse func(netlink.Message) (T, error)) ([]T, error) {
	msgs, err := conn.Dump(ctx, request)
	if err != nil {
		return nil, err
	}

	return parseAll(msgs, parse)
}

func parseAll[T any](msgs []netlink.Message, parse func(netlink.Message) (T, error)) (list []T, err error) {
	list = make([]T, len(msgs))
	for i, m := range msgs {
		if list[i], err = parse(m); err != nil {
			return nil, err
		}
	}

	return list, nil
}
