package memory

import (
	"cmp"
	"context"
	"net/netip"
	"slices"

	"github.com/cri-o/hostport/internal/nfnetlink"
	"github.com/cri-o/hostport/internal/row"
)

// Kind is the name of the backend.
const Kind = "memory"

// Backend keeps the rows of one family in a Node. A row there has what nftables has of one:
// its endpoints, and the hash of its owner.
type Backend struct {
	node   *Node
	family row.Family
	wipes  int // of the node, when the rows were last looked at
}

// Backend returns a backend that has yet to look at the rows.
func (n *Node) Backend(f row.Family) *Backend { return &Backend{node: n, family: f} }

// Kind is the same for all rows.
func (*Backend) Kind(*row.Row) string { return Kind }

// Variant is none.
func (*Backend) Variant() string { return "" }

// Name is empty: a row is named by its endpoint.
func (*Backend) Name(*row.Row) string { return "" }

// OwnedBy reports whether the hash of a row is that of id.
func (*Backend) OwnedBy(id string, r *row.Row) bool { return row.ShortHash(id) == r.OwnerHash }

// Exempt has nothing to exempt: a Node has no Services.
func (*Backend) Exempt([]netip.Addr) (due bool) { return false }

// List returns the rows of the family.
func (b *Backend) List(ctx context.Context) (rows []*row.Row, intact bool, err error) {
	b.node.mu.Lock()
	defer b.node.mu.Unlock()

	for k, r := range b.node.rows {
		if k.family == b.family {
			rows = append(rows, &r)
		}
	}

	b.wipes = b.node.wipes

	return rows, true, ctx.Err()
}

// Disturbed reports whether somebody has wiped the rows.
func (b *Backend) Disturbed([]nfnetlink.Transaction) bool {
	b.node.mu.Lock()
	defer b.node.mu.Unlock()

	return b.wipes != b.node.wipes
}

// Missing returns the rows that are not there.
func (b *Backend) Missing(_ context.Context, rows []*row.Row) (missing []string, err error) {
	b.node.mu.Lock()
	defer b.node.mu.Unlock()

	for _, r := range rows {
		if !b.has(r) {
			missing = append(missing, "host port "+r.String()+" is missing")
		}
	}

	return missing, nil
}

// Reconcile looks at all rows only if told to, or if somebody has wiped them.
func (b *Backend) Reconcile(ctx context.Context, t row.Target) (repairs []row.Repair, err error) {
	b.node.mu.Lock()
	defer b.node.mu.Unlock()

	if err := cmp.Or(ctx.Err(), b.node.fails); err != nil {
		return nil, err //nolint:wrapcheck // a caller's, of which nothing is to be said
	}

	for _, d := range t.Deltas {
		for _, r := range d.Del {
			delete(b.node.rows, b.key(r))
		}

		for _, r := range slices.Concat(d.Add, d.Keep) {
			b.put(r)
		}
	}

	if t.Whole || b.wipes != b.node.wipes {
		repairs = b.reconcileAll(t)
	}

	b.wipes = b.node.wipes

	return repairs, nil
}

func (b *Backend) reconcileAll(t row.Target) (repairs []row.Repair) {
	wanted := map[key]bool{}

	for r := range t.Rows {
		wanted[b.key(r)] = true

		if !b.has(r) {
			repairs = append(repairs, row.Repair{What: "missing host port " + r.String(), Row: r})
			b.put(r)
		}
	}

	for k, r := range b.node.rows {
		if t.Exactly && k.family == b.family && !wanted[k] {
			repairs = append(repairs, row.Repair{What: "unknown host port " + r.String()})
			delete(b.node.rows, k)
		}
	}

	return repairs
}

func (b *Backend) key(r *row.Row) key { return key{r.Endpoint, b.family} }

func (b *Backend) has(r *row.Row) bool {
	there, found := b.node.rows[b.key(r)]

	return found && there.Pod == r.Pod && there.OwnerHash == r.OwnerHash
}

func (b *Backend) put(r *row.Row) {
	if b.node.rows == nil {
		b.node.rows = map[key]row.Row{}
	}

	b.node.rows[b.key(r)] = row.Row{Endpoint: r.Endpoint, Pod: r.Pod, OwnerHash: r.OwnerHash}
}
