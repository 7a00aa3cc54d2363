package flows

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/cri-o/hostport/internal/nfnetlink"
	"github.com/cri-o/hostport/internal/nodeaddr"
	"github.com/cri-o/hostport/internal/outcome"
	"github.com/cri-o/hostport/internal/row"
)

// Ender ends the flows that a change of rows, or of the node's addresses, has made
// stale. The kernel translates the packets of a flow as it did the first, for as
// long as the flow lives: without this a flow would go on to a pod that has gone or
// to whoever gets its address next, and one that began without a row would never
// reach the pod.
//
// UDP and SCTP flows end before the operation does: a sender that never pauses keeps
// them alive. TCP connections end a moment later, because to list them takes
// milliseconds even where there are none. Their next packet meets no row then, and is
// answered with a reset.
type Ender struct {
	// cannotEnd is told why flows go on.
	cannotEnd func(error)

	view Viewer // with the commit lock held

	datagrams flowTable

	connections flowTable       // with a socket of its own: a long list holds nobody up
	background  context.Context //nolint:containedctx // ends with the manager
	stopped     context.CancelFunc
	running     sync.WaitGroup

	mu    sync.Mutex // guards what follows
	todo  turnover
	early []nfnetlink.Flow // that have been ended: see endAnswers
	due   *time.Timer      // nil: not set
}

const (
	// lateDelay is how long a Remove waits for others, for one list to do for all.
	lateDelay = 200 * time.Millisecond
	// lateRetry is how long they are not tried again if they could not be ended.
	lateRetry = time.Second
	// lateTries is how often it is tried to end connections.
	lateTries = 3
)

// New returns what ends flows of a family, as view has it, by what dial returns.
func New(f row.Family, cannotEnd func(error), view Viewer, dial func() (Conn, error)) *Ender {
	ctx, cancel := context.WithCancel(context.Background())

	return &Ender{
		cannotEnd: cannotEnd, view: view, background: ctx, stopped: cancel,
		datagrams: flowTable{family: f, dial: dial}, connections: flowTable{family: f, dial: dial},
	}
}

// Flush ends the UDP and SCTP flows that do not go where they would if they began
// now, of the ports that deltas are about. If the node's addresses were others before,
// it looks at all flows. It comes after the rules: a packet in between would bring a
// flow back. One list of each protocol is made, for as many deltas and ports as there
// are, and none where there is no such row. TCP connections follow later. The time is Flush's
// own: that of the operation may be up.
func (f *Ender) Flush(ctx context.Context, deltas []row.Delta, before *nodeaddr.Addresses, v View) (err error) {
	datagrams, connections := turnovers(deltas, before, v.HasRows)

	var ended []nfnetlink.Flow

	if !datagrams.empty() {
		ctx, cancel := outcome.WithGrace(ctx)
		defer cancel()

		ended, err = f.datagrams.end(ctx, datagrams, atHand(v))
	}

	early := slices.DeleteFunc(ended, func(flow nfnetlink.Flow) bool {
		return flow.Translated || flow.Source.Addr().Is4() // see endAnswers
	})

	if !connections.empty() || len(early) > 0 {
		f.schedule(connections, early, lateDelay, lateTries)
	}

	return err
}

// atHand is a view for whoever has the commit lock already.
func atHand(v View) Viewer {
	return func(_ context.Context, look func(View)) error {
		look(v)

		return nil
	}
}

// schedule has the connections that t has made stale ended after a delay, and what
// answers to early flows have begun.
func (f *Ender) schedule(t turnover, early []nfnetlink.Flow, delay time.Duration, tries int) {
	f.mu.Lock()
	defer f.mu.Unlock()

	f.todo.add(t)
	f.early = append(f.early, early...)

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
		t.ports = map[row.PortKey]bool{}
	}

	maps.Copy(t.ports, o.ports)
	t.gone = append(t.gone, o.gone...)

	for _, p := range o.protocols {
		if !slices.Contains(t.protocols, p) {
			t.protocols = append(t.protocols, p)
		}
	}

	if t.before != nil && o.before != nil {
		t.before = t.before.Until(o.before)
	} else {
		t.before = cmp.Or(t.before, o.before)
	}
}

// take returns what there is to do, and forgets it.
func (f *Ender) take() (turnover, []nfnetlink.Flow) {
	f.mu.Lock()
	defer f.mu.Unlock()

	t, early := f.todo, f.early
	f.todo, f.early, f.due = turnover{}, nil, nil

	return t, early
}

func (f *Ender) endConnections(tries int) {
	t, early := f.take()

	switch err := f.endLate(f.background, t, early, f.view); { // the lock may be held for long
	case err == nil:
	case tries > 1 || f.background.Err() != nil: // then Close does it
		f.schedule(t, early, lateRetry, tries-1)
	default:
		f.cannotEnd(err)
	}
}

func (f *Ender) endLate(ctx context.Context, t turnover, early []nfnetlink.Flow, view Viewer) error {
	_, err := f.connections.end(ctx, t, view)

	return errors.Join(err, f.connections.endAnswers(ctx, early))
}

// Open opens the socket for connections, in the namespace of the calling thread. If it
// cannot, schedule tries again.
func (f *Ender) Open() { _ = f.connections.open() }

// Resume schedules what could not be for want of a socket.
func (f *Ender) Resume() {
	f.mu.Lock()
	waiting := f.due == nil && (!f.todo.empty() || len(f.early) > 0)
	f.mu.Unlock()

	if waiting {
		f.schedule(turnover{}, nil, 0, lateTries)
	}
}

// Stop ends what runs behind operations. It is called without the commit lock, and before
// Close.
func (f *Ender) Stop() {
	f.stopped()

	f.mu.Lock()
	if f.due != nil && f.due.Stop() {
		f.running.Done()
	}
	f.mu.Unlock()

	f.running.Wait()
}

// Close ends the connections that were to be ended later, and then itself.
func (f *Ender) Close(v View) error {
	t, early := f.take()
	if err := f.endLate(context.Background(), t, early, atHand(v)); err != nil {
		f.cannotEnd(err)
	}

	return errors.Join(f.datagrams.close(), f.connections.close())
}
