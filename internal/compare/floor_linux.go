package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/cri-o/hostport/internal/nfnetlink"
	"github.com/cri-o/hostport/internal/nftables"
	"github.com/cri-o/hostport/internal/row"
)

const floorName = "the floor"

// floor is the least that a row of hostport takes: a netlink batch with its elements, and
// a bound socket. It looks at nothing, remembers nothing and tells nobody.
type floor struct {
	nftables.Layout

	conn *nfnetlink.Conn
	mu   sync.Mutex
	fds  map[string]int // by pod
}

func newFloor(tools) (mapper, error) {
	conn, err := nfnetlink.Dial()

	return &floor{Layout: nftables.NewLayout(row.IPv4), conn: conn, fds: map[string]int{}}, err
}

// chunk is how many pods go into one batch, so that it fits into the send buffer.
const chunk = 500

func (f *floor) fill(pods []pod) error { return errors.Join(f.fillKernel(pods), f.hold(pods...)) }

// fillKernel makes the table that hostport makes, and the rows.
func (f *floor) fillKernel(pods []pod) error {
	ctx := context.Background()
	if err := f.conn.Commit(ctx, 0, f.Objects()); err != nil {
		return err
	}

	for some := range slices.Chunk(pods, chunk) {
		if err := f.conn.Commit(ctx, 0, f.elements(f.Table.AddElement, some...)); err != nil {
			return err
		}
	}

	return nil
}

func (f *floor) elements(message func(string, nfnetlink.Element) netlink.Message, pods ...pod) []netlink.Message {
	var msgs []netlink.Message

	for _, p := range pods {
		r := p.row()
		for _, e := range []nftables.Element{nftables.RowElement(r), nftables.HairpinElement(p.IP, r.OwnerHash)} {
			msgs = append(msgs, message(e.Set, e.Element()))
		}
	}

	return msgs
}

func (f *floor) add(p pod) error {
	if err := f.hold(p); err != nil {
		return err
	}

	return f.conn.Commit(context.Background(), 0, f.elements(f.Table.AddElement, p))
}

func (f *floor) remove(p pod) error {
	err := f.conn.Commit(context.Background(), 0, f.elements(f.Table.DeleteElement, p))

	f.mu.Lock()
	defer f.mu.Unlock()

	err = errors.Join(err, unix.Close(f.fds[p.ID]))
	delete(f.fds, p.ID)

	return err
}

// hold binds the pods' ports.
func (f *floor) hold(pods ...pod) error {
	f.mu.Lock()
	defer f.mu.Unlock()

	for _, p := range pods {
		sort := unix.SOCK_STREAM
		if p.row().Proto == row.UDP {
			sort = unix.SOCK_DGRAM
		}

		fd, err := unix.Socket(unix.AF_INET, sort|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("hold port %d: %w", p.HostPort, err)
		}

		f.fds[p.ID] = fd

		if err := unix.Bind(fd, &unix.SockaddrInet4{Port: int(p.HostPort)}); err != nil {
			return fmt.Errorf("hold port %d: %w", p.HostPort, err)
		}
	}

	return nil
}

func (f *floor) logged() int64 { return 0 }
func (f *floor) close() error  { return f.conn.Close() }

// nft gives the same elements to nft(8).
type nft struct{ *floor }

func newNFT(t tools) (mapper, error) {
	m, err := newFloor(t)
	if err != nil {
		return nil, err
	}

	f, _ := m.(*floor)

	return nft{f}, nil
}

func (n nft) fill(pods []pod) error { return n.fillKernel(pods) }

func (n nft) add(p pod) error    { return n.change("add", p) }
func (n nft) remove(p pod) error { return n.change("delete", p) }

func (n nft) change(verb string, p pod) error {
	hash := p.row().OwnerHash
	text := fmt.Sprintf(`%[1]s element ip %[2]s %[3]s { %[4]s . %[5]d comment "%[6]s" : %[7]s . %[8]d }
%[1]s element ip %[2]s %[9]s { %[7]s . %[7]s comment "%[6]s" }
`, verb, nftables.TableName, nftables.HostPorts, strings.ToLower(string(p.Proto)), p.HostPort, hash, p.IP, p.ContainerPort, nftables.Hairpins)

	_, _, err := execute(nil, text, "nft", "-f", "-")

	return err
}
