package hostport

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	v1 "k8s.io/api/core/v1"

	"github.com/cri-o/hostport/internal/row"
)

// List lists the rows that the kernel holds now, in both families and every backend, sorted as
// those of Mappings. It makes no manager, holds no port and changes nothing, and a manager may be
// at work meanwhile, in any process. It looks at the network namespace of the calling thread. It
// knows owners by a hash alone, and not who holds a port: PodID, Namespace, Name and Held are
// never set. WithTimeout bounds it, and with the option of hostporttest it looks at a node in
// memory. Other options have no effect.
//
// It needs CAP_NET_ADMIN, and with iptables its programs. What could not be looked at is
// in the error, beside the rows that could. On systems other than Linux it fails with
// errors.ErrUnsupported.
func List(ctx context.Context, opts ...Option) ([]Mapping, error) {
	cfg := newConfig(opts)
	o := newOpener(cfg)

	ctx, cancel := cfg.withTimeout(ctx)
	defer cancel()

	var (
		list []Mapping
		errs []error
	)

	for _, f := range []IPFamily{IPv4, IPv6} {
		some, err := o.list(ctx, f)
		if err != nil {
			errs = append(errs, fmt.Errorf("IPv%s: %w", f, err))
		}

		list = append(list, some...)
	}

	return inOrder(list), errors.Join(append(errs, o.close())...)
}

// inOrder sorts mappings by host port, protocol and host IP.
func inOrder(list []Mapping) []Mapping {
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

// mappingsIn lists the rows that a backend carries.
func mappingsIn(ctx context.Context, b backend) (list []Mapping, err error) {
	rows, _, err := b.List(ctx)
	for _, r := range rows {
		list = append(list, mappingOf(r, b, false))
	}

	return list, err
}

// mappingOf is a row that a backend carries.
func mappingOf(r *row.Row, in backend, held bool) Mapping {
	return Mapping{
		PodID: r.Owner.ID, Namespace: r.Owner.Namespace, Name: r.Owner.Name,
		PodIDHash: r.OwnerMark(),
		Protocol:  v1.Protocol(r.Proto.API()),
		HostIP:    r.HostIP(r.Family()).String(), HostPort: int32(r.Port),
		PodIP: r.Pod.Addr().AsSlice(), ContainerPort: int32(r.Pod.Port()),
		Backend: Backend(in.Kind(r)),
		Held:    held,
	}
}
