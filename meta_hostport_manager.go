package hostport

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
)

// Manager maps host ports for both IP families. It implements HostPortManager.
type Manager struct {
	families []*hostportManager
	opener   *opener
}

var _ HostPortManager = (*Manager)(nil)

// NewMetaHostportManager returns a manager for both IP families. Rows that
// the kernel holds already are adopted, and their ports are held again.
//
// It never fails. Where a family cannot work, because neither nftables nor
// iptables is there, IPv6 is off or CAP_NET_ADMIN is missing, the other one
// does, and Add says what is missing until it is there.
func NewMetaHostportManager(opts ...Option) HostPortManager {
	m, _ := newManager(opts)

	return m
}

// New is NewMetaHostportManager for callers that want to know at once: it
// fails where neither family can work, and says why for each.
func New(opts ...Option) (*Manager, error) {
	m, err := newManager(opts)
	if err != nil {
		return nil, errors.Join(err, m.Close())
	}

	return m, nil
}

// newManager returns a manager in any case, and an error if no family works.
func newManager(opts []Option) (*Manager, error) {
	cfg := newConfig(opts)
	m := &Manager{opener: newOpener(cfg)}

	var errs []error

	for _, f := range []ipFamily{IPv4, IPv6} {
		fm := newHostportManager(f, cfg, m.opener.open(f))
		m.families = append(m.families, fm)

		if err := fm.start(); err != nil {
			errs = append(errs, fmt.Errorf("IPv%s: %w", f, err))
		}
	}

	err := errors.Join(errs...)
	if len(errs) == len(m.families) {
		return m, fmt.Errorf("host ports cannot be mapped: %w", err)
	}

	if err != nil {
		cfg.log.Error(err, "Host ports cannot be mapped in every family")
	}

	return m, nil
}

// Add implements HostPortManager.
func (m *Manager) Add(id string, podPortMapping *PodPortMapping, natInterfaceName string) error {
	rows, err := rowsOf(id, podPortMapping)
	if err != nil || len(rows) == 0 {
		return err
	}

	i := slices.IndexFunc(m.families, func(fm *hostportManager) bool { return fm.family == rows[0].family() })

	return m.families[i].add(rows, natInterfaceName)
}

// Remove implements HostPortManager. It goes on past an error and returns all.
func (m *Manager) Remove(id string, podPortMapping *PodPortMapping) error {
	var errs []error
	for _, fm := range m.families {
		errs = append(errs, fm.Remove(id, podPortMapping))
	}

	return errors.Join(errs...)
}

// Mappings lists the rows of both families, sorted by host port, protocol and
// host IP. It waits for operations that are being committed.
func (m *Manager) Mappings() []Mapping {
	var list []Mapping
	for _, fm := range m.families {
		list = append(list, fm.mappings()...)
	}

	slices.SortFunc(list, func(a, b Mapping) int {
		return cmp.Or(
			cmp.Compare(a.HostPort, b.HostPort),
			cmp.Compare(a.Protocol, b.Protocol),
			parsed(a.HostIP).Compare(parsed(b.HostIP)),
			cmp.Compare(a.PodIDHash, b.PodIDHash),
		)
	})

	return list
}

func parsed(ip string) netip.Addr {
	addr, _ := netip.ParseAddr(ip)

	return addr
}

// Close releases the sockets and leaves the rules, so that traffic goes on
// while a runtime restarts. Add and Remove fail with os.ErrClosed then.
// Closing again does nothing.
func (m *Manager) Close() error {
	var errs []error
	for _, fm := range m.families {
		errs = append(errs, fm.Close())
	}

	return errors.Join(append(errs, m.opener.close())...)
}
