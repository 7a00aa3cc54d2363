package tool

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"github.com/cri-o/hostport/internal/row"
)

// hostPort is a row as the output has it.
type hostPort struct {
	Protocol string `json:"protocol"`
	Host     string `json:"host"`
	Pod      string `json:"pod"`
	// Owner is what iptables' comment says of the pod, "" with nftables.
	Owner string `json:"owner"`
	// Hash is with nftables that of the pod's sandbox id, in the log podIDHash, with iptables the row's.
	Hash    string   `json:"hash"`
	Backend string   `json:"backend"`
	HeldBy  []string `json:"heldBy"`
}

func describe(n *node, r found) hostPort {
	return hostPort{
		Protocol: r.Proto.API(), Host: netip.AddrPortFrom(r.HostIP(r.Family()), r.Port).String(), Pod: r.Pod.String(),
		Owner: r.Label, Hash: r.OwnerMark(), Backend: r.in.name, HeldBy: append([]string{}, n.holders(r.Endpoint, r.Family())...),
	}
}

// holder says who holds a port, as far as the kernel shows it.
func holder(p row.Protocol, by []string) string {
	switch {
	case len(by) > 0:
		return strings.Join(by, ", ")
	case p == row.SCTP:
		return "- (SCTP never is)"
	case !shows(p):
		return "? (shown since Linux 6.8)"
	default:
		return "nobody"
	}
}

func list(ctx context.Context, out output) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()

	n, err := look(ctx)
	if err != nil {
		return err
	}

	ports, lines := []hostPort{}, []string{"PROTOCOL\tHOST\tPOD\tOWNER\tHASH\tBACKEND\tHELD BY"}

	for _, r := range n.rows() {
		p := describe(n, r)
		ports = append(ports, p)
		lines = append(lines, strings.Join([]string{
			p.Protocol, p.Host, p.Pod, cmp.Or(p.Owner, "-"), p.Hash, p.Backend, holder(r.Proto, p.HeldBy),
		}, "\t"))
	}

	return errors.Join(out.print(ports, lines), n.unseenError(row.IPv4, row.IPv6))
}

// unseenError says what could not be looked at, of some families.
func (n *node) unseenError(families ...row.Family) error {
	var errs []error

	for _, f := range families {
		if err := n.unseen[f]; err != nil {
			errs = append(errs, fmt.Errorf("IPv%s: %w", f, err))
		}
	}

	return errors.Join(errs...)
}
