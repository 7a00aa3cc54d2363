package discover

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/cri-o/hostport/internal/iptables"
	"github.com/cri-o/hostport/internal/nfnetlink"
	"github.com/cri-o/hostport/internal/nftables"
	"github.com/cri-o/hostport/internal/outcome"
	"github.com/cri-o/hostport/internal/row"
)

// Finder finds the backends of both families, which share a netlink socket.
type Finder struct {
	Ruleset *nftables.Ruleset
	// Localhost and Guard report whether host ports of a family are to be reached through loopback
	// addresses, and whether the guard of these is to stand.
	Localhost, Guard func(row.Family) bool
}

// New returns what finds backends. It opens nothing yet.
func New(localhost, guard func(row.Family) bool) *Finder {
	return &Finder{Localhost: localhost, Guard: guard, Ruleset: nftables.NewRuleset(func() (nftables.Conn, error) {
		conn, err := nfnetlink.Dial()
		if err != nil {
			return nil, outcome.Unavailable(err) // and no interface around a nil pointer
		}

		return conn, nil
	})}
}

// Close closes the socket.
func (f *Finder) Close() error { return f.Ruleset.Close() }

// NFTables returns the backend of a family, whatever the kernel has of it.
func (f *Finder) NFTables(family row.Family) (*nftables.Backend, error) {
	if err := f.Ruleset.Open(); err != nil {
		return nil, err
	}

	return nftables.New(f.Ruleset, family, f.Localhost(family), f.Guard(family)), nil
}

// NFTablesInUse returns the backend of a family if the kernel has its table, and else nil.
func (f *Finder) NFTablesInUse(ctx context.Context, family row.Family) (*nftables.Backend, error) {
	b, chains, err := f.chains(ctx, family)
	if err != nil || b == nil || !b.IsThere(chains) {
		return nil, err
	}

	return b, nil
}

// chains lists the chains of a family in nf_tables, where the kernel has that.
func (f *Finder) chains(ctx context.Context, family row.Family) (*nftables.Backend, []nfnetlink.ChainInfo, error) {
	b, err := f.NFTables(family)
	if errors.Is(err, outcome.ErrUnavailable) {
		return nil, nil, nil
	}

	if err != nil {
		return nil, nil, err
	}

	chains, err := b.AllChains(ctx)
	if err != nil && errors.Is(b.Usable(ctx), outcome.ErrUnavailable) {
		return nil, nil, nil
	}

	return b, chains, err
}

// IPTables returns a backend that can be told of what others do to its tables.
func (f *Finder) IPTables(t *iptables.Installed) *iptables.Backend {
	var generation func(context.Context) (uint32, error)

	if t.Variant == iptables.NFT && f.Ruleset.Open() == nil {
		generation = f.Ruleset.Generation
	}

	return t.NewBackend(f.Localhost(t.Family), f.Guard(t.Family), generation, f.Ruleset.Ours())
}

// IPTablesInUse returns a variant of iptables that has rows of a family, or with all anything of
// ours, and else nil. No program is started for one that does not: the kernel itself says whether
// there are chains of ours.
func (f *Finder) IPTablesInUse(ctx context.Context, family row.Family, v iptables.Variant, all bool) (*iptables.Backend, error) {
	var there bool

	if v == iptables.NFT { // which keeps its tables among those of nf_tables
		_, chains, err := f.chains(ctx, family)
		if err != nil {
			return nil, err
		}

		there = iptables.HaveOurs(chains, all)
	} else {
		var err error
		if there, err = iptables.LegacyHasOurs(family, all); err != nil {
			return nil, err
		}
	}

	if !there {
		return nil, nil //nolint:nilnil // as it says
	}

	t, err := iptables.FindVariant(ctx, family, v)
	if err != nil {
		return nil, err
	}

	return f.IPTables(t), nil
}

// HaveNetAdmin looks at the effective capabilities: iptables-save would not
// tell, where it has nothing to save.
func HaveNetAdmin() error {
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

// HaveFamily fails where the kernel does not have an IP family.
func HaveFamily(f row.Family) error {
	if f == row.IPv4 {
		return nil
	}

	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return outcome.Unavailable(fmt.Errorf("look for IPv6 in the kernel: %w", err))
	}

	return unix.Close(fd) //nolint:wrapcheck // cannot fail
}
