package hostport

import (
	"context"

	"github.com/cri-o/hostport/internal/iptables"
)

// IPTables is the part of iptables(8) that this package drives for one family. A
// manager makes one call at a time.
type IPTables interface {
	// IsIPv6 is false for iptables and true for ip6tables.
	IsIPv6() bool

	// Save returns what iptables-save(8) prints for a table. The kernel need
	// not have the table, and does not get it by that.
	Save(ctx context.Context, table string) ([]byte, error)

	// Restore feeds input to iptables-restore(8) with --noflush and --wait.
	// Either all of a COMMIT block takes effect or none of it, and none that
	// comes after one that fails. The error tells the line at fault, the first
	// being 1, by a method `Line() int`, where that is known.
	Restore(ctx context.Context, input []byte) error
}

// through returns the family of a caller's iptables, and what opens the backend over it.
func through(ipt IPTables, cfg config) (IPFamily, func(context.Context) (backend, error)) {
	f := iptables.FamilyOf(ipt)

	if cfg.memory != nil {
		return f, memoryOpener{cfg}.open(f)
	}

	return f, func(context.Context) (backend, error) {
		return iptables.New(ipt, cfg.localhostIn(f), cfg.guardIn(f)), nil
	}
}
