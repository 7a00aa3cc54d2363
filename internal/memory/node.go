package memory

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"

	"github.com/cri-o/hostport/internal/outcome"
	"github.com/cri-o/hostport/internal/row"
	"github.com/cri-o/hostport/internal/sockets"
)

// Node is what outlives a manager: rows, and the sockets of others. The zero Node has none.
// Its methods may be called from several goroutines.
type Node struct {
	mu      sync.Mutex // guards what follows
	rows    map[key]row.Row
	fails   error // what each change fails with; nil: none does
	wipes   int
	sockets map[int]socket
	lastFD  int
	owners  map[string]*Lock // by what they keep others from
	closed  chan struct{}    // closed when a lock is, and then made anew
}

// other stands for what errors say of a process.
const other = "another process of the node"

// key names a row in the kernel.
type key struct {
	row.Endpoint

	family row.Family
}

// socket is bound to a port.
type socket struct {
	key

	ours bool // a manager's
}

// Wipe takes out the rows of both families, behind the back of the manager.
func (n *Node) Wipe() {
	n.mu.Lock()
	defer n.mu.Unlock()

	clear(n.rows)
	n.wipes++
}

// Fail has each change of rows fail with err, until it is called with nil.
func (n *Node) Fail(err error) {
	n.mu.Lock()
	defer n.mu.Unlock()

	n.fails = err
}

// Occupy has another process bind a port, in some families or in none. Free ends that.
func (n *Node) Occupy(e row.Endpoint, families ...row.Family) (free func(), err error) {
	var fds []int

	free = func() {
		for _, fd := range fds {
			n.release(fd)
		}
	}

	for _, f := range families {
		fd, err := n.bind(socket{key: key{e, f}})
		if err != nil {
			free()

			return nil, err
		}

		fds = append(fds, fd)
	}

	return free, nil
}

func (n *Node) bind(s socket) (fd int, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()

	for _, o := range n.sockets {
		if o.family == s.family && o.PortKey == s.PortKey && o.Overlaps(s.Endpoint) && !(o.ours && s.ours) {
			return -1, fmt.Errorf("bind: %w", syscall.EADDRINUSE)
		}
	}

	if n.sockets == nil {
		n.sockets = map[int]socket{}
	}

	n.lastFD++
	n.sockets[n.lastFD] = s

	return n.lastFD, nil
}

func (n *Node) release(fd int) {
	n.mu.Lock()
	defer n.mu.Unlock()

	delete(n.sockets, fd)
}

// Binder returns what binds a manager's sockets.
func (n *Node) Binder(f row.Family) sockets.Binder { return binder{n, f} }

type binder struct {
	node   *Node
	family row.Family
}

// Bind fails if another process has the port.
func (b binder) Bind(e row.Endpoint, _ []*sockets.Holder) (int, error) {
	return b.node.bind(socket{key: key{e, b.family}, ours: true})
}

// InUse does not say more than there is to say.
func (binder) InUse(row.Endpoint, []*sockets.Holder) error {
	return fmt.Errorf("%w by %s", syscall.EADDRINUSE, other)
}

// Close gives the port up.
func (b binder) Close(fd int) { b.node.release(fd) }

// Lock is what one manager at a time has.
type Lock struct {
	node   *Node
	name   string
	closed bool // guarded by the node's mutex
}

// Lock returns a lock of some families that is not taken yet.
func (n *Node) Lock(families ...row.Family) *Lock { return &Lock{node: n, name: fmt.Sprint(families)} }

// Take takes the lock, for which it waits until ctx ends if told to. Nothing happens if it is
// taken. After Close it fails with os.ErrClosed.
func (l *Lock) Take(ctx context.Context, wait bool) error {
	for {
		closed, err := l.tryTake()
		if !errors.Is(err, outcome.ErrOtherManager) || !wait {
			return err
		}

		select {
		case <-closed:
		case <-ctx.Done():
			return fmt.Errorf("%w: %s: %w", outcome.ErrOtherManager, other, ctx.Err())
		}
	}
}

// tryTake returns what is closed before it can succeed, where it fails with outcome.ErrOtherManager.
func (l *Lock) tryTake() (closed <-chan struct{}, err error) {
	n := l.node

	n.mu.Lock()
	defer n.mu.Unlock()

	if l.closed {
		return nil, fmt.Errorf("host port manager is closed: %w", os.ErrClosed)
	}

	if n.owners == nil {
		n.owners, n.closed = map[string]*Lock{}, make(chan struct{})
	}

	if owner := n.owners[l.name]; owner != nil && owner != l {
		return n.closed, outcome.ErrOtherManager
	}

	n.owners[l.name] = l

	return n.closed, nil
}

// Close gives the lock up, and ends Take. Closing again does nothing.
func (l *Lock) Close() error {
	n := l.node

	n.mu.Lock()
	defer n.mu.Unlock()

	l.closed = true

	if n.owners == nil {
		return nil
	}

	if n.owners[l.name] == l {
		delete(n.owners, l.name)
	}

	close(n.closed)
	n.closed = make(chan struct{})

	return nil
}
