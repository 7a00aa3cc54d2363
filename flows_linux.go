package hostport

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"sync"
	"time"

	"k8s.io/klog/v2"

	"github.com/cri-o/hostport/internal/nodeaddr"
)

// flows ends the flows that a change of rows, or of the node's addresses, has made
// stale. The kernel translates the packets of a flow as it did the first, for as
// long as the flow lives: without this a flow would go on to a pod that has gone or
// to whoever gets its address next, and one that began without a row would never
// reach the pod.
//
// UDP and SCTP flows end before the operation does: a sender that never pauses keeps
// them alive. TCP connections end a moment later, because to list them takes
// milliseconds even where there are none. Their next packet meets no row then, and is
// answered with a reset.
type flows struct {
	log  klog.Logger
	view func(ctx context.Context, look func(nodeView)) error // with the turn held

	datagrams flowTable

	connections flowTable       // with a socket of its own: a long list holds nobody up
	background  context.Context //nolint:containedctx // ends with the manager
	stopped     context.CancelFunc
	running     sync.WaitGroup

	mu   sync.Mutex // guards what follows
	todo turnover
	due  *time.Timer // nil: not set
}

const (
	// lateDelay is how long a Remove waits for others, for one list to do for all.
	lateDelay = 200 * time.Millisecond
	// lateTries is how often it is tried to end connections.
	lateTries = 3
)

func newFlows(f ipFamily, log klog.Logger, view func(context.Context, func(nodeView)) error) *flows {
	ctx, cancel := context.WithCancel(context.Background())

	return &flows{
		log: log, view: view, background: ctx, stopped: cancel,
		datagrams: flowTable{family: f}, connections: flowTable{family: f},
	}
}

// flush ends the UDP and SCTP flows that do not go where they would if they began
// now, of the ports that deltas are about. If the node's addresses were others before,
// it looks at all flows. It comes after the rules: a packet in between would bring a
// flow back. One list is made, for as many deltas and ports as there are, and none
// where there is no such row. TCP connections follow later.
func (f *flows) flush(ctx context.Context, deltas []delta, before *nodeaddr.Addresses, v nodeView) error {
	datagrams, connections := turnovers(deltas, before)

	if !connections.empty() {
		f.schedule(connections, lateDelay, lateTries) //nolint:contextcheck // outlives the operation
	}

	return f.datagrams.end(ctx, datagrams, atHand(v))
}

// atHand is a view for whoever has the turn already.
func atHand(v nodeView) func(context.Context, func(nodeView)) error {
	return func(_ context.Context, look func(nodeView)) error {
		look(v)

		return nil
	}
}

// schedule has the connections that t has made stale ended after a delay.
func (f *flows) schedule(t turnover, delay time.Duration, tries int) {
	f.mu.Lock()
	defer f.mu.Unlock()

	f.todo.add(t)

	if f.due != nil || f.background.Err() != nil {
		return
	}

	if err := f.connections.open(); err != nil { // here: the timer's thread may be in another namespace
		f.cannotEnd(err)

		return
	}

	f.running.Add(1)
	f.due = time.AfterFunc(delay, func() {
		defer f.running.Done()

		f.endConnections(tries)
	})
}

// add makes t both changes, of which it was the first.
func (t *turnover) add(o turnover) {
	if t.ports == nil {
		t.ports = map[portKey]bool{}
	}

	maps.Copy(t.ports, o.ports)
	t.gone = append(t.gone, o.gone...)
	t.before = cmp.Or(t.before, o.before)
	t.tcp = o.tcp
}

// take returns what there is to do, and forgets it.
func (f *flows) take() turnover {
	f.mu.Lock()
	defer f.mu.Unlock()

	t := f.todo
	f.todo, f.due = turnover{}, nil

	return t
}

func (f *flows) endConnections(tries int) {
	t := f.take()

	ctx, cancel := context.WithTimeout(f.background, grace)
	defer cancel()

	switch err := f.connections.end(ctx, t, f.view); {
	case err == nil:
	case tries > 1 || f.background.Err() != nil: // then close does it
		f.schedule(t, repairPause, tries-1)
	default:
		f.cannotEnd(err)
	}
}

func (f *flows) cannotEnd(err error) {
	f.log.Error(err, "Cannot end stale flows")
}

// stop ends what runs behind operations. It is called without the turn, and before
// close.
func (f *flows) stop() {
	f.stopped()

	f.mu.Lock()
	if f.due != nil && f.due.Stop() {
		f.running.Done()
	}
	f.mu.Unlock()

	f.running.Wait()
}

// close ends the connections that were to be ended later, and then itself.
func (f *flows) close(v nodeView) error {
	ctx, cancel := context.WithTimeout(context.Background(), grace)
	defer cancel()

	if err := f.connections.end(ctx, f.take(), atHand(v)); err != nil {
		f.cannotEnd(err)
	}

	return errors.Join(f.datagrams.close(), f.connections.close())
}
