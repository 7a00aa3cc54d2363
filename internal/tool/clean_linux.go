package tool

import (
	"context"
	"errors"
	"fmt"
	"time"

	"k8s.io/klog/v2"

	"github.com/cri-o/hostport"
	"github.com/cri-o/hostport/internal/localhost"
	"github.com/cri-o/hostport/internal/row"
	"github.com/cri-o/hostport/internal/sockets"
)

// clean takes everything out, as a manager does whose runtime has no pods.
func clean(ctx context.Context, out output) (err error) {
	const wait = time.Second // for a manager that is just closing

	n := &node{processes: sockets.Processes()}
	for _, f := range []row.Family{row.IPv4, row.IPv6} {
		if manager, _ := n.managerOf(f); manager != "" && manager != unseen { // New finds out about the others
			return fmt.Errorf("another manager has the host ports: %s", manager)
		}
	}

	m, err := hostport.New(hostport.WithLogger(klog.Logger{}), hostport.WithTimeout(wait)) //nolint:contextcheck // has none
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.Close()) }()

	for _, s := range m.Status() {
		if errors.Is(s.Err, hostport.ErrOtherManager) {
			return fmt.Errorf("IPv%s: %w", s.Family, s.Err)
		}
	}

	rows := m.Mappings()

	if err := m.Sync(ctx, nil); err != nil {
		return err
	}

	answer := struct {
		Removed int  `json:"removed"`
		Guard   bool `json:"guard"`
	}{len(rows), localhost.Routed()}

	lines := []string{fmt.Sprintf("%d host ports taken out", answer.Removed)}
	if answer.Guard {
		lines = append(lines, "the guard of 127.0.0.0/8 stays while an interface has route_localnet: "+
			"see sysctl -a, set it to 0, and clean again")
	}

	return out.print(answer, lines)
}
