package sockets

import (
	"errors"
	"slices"
	"syscall"

	"github.com/cri-o/hostport/internal/row"
)

// Set holds host ports of one family, so that no other process can bind
// them. A held TCP port does not listen: a client that gets there because its
// rule is missing is refused at once. A held UDP socket queues nothing.
type Set struct {
	off    bool
	binder Binder
	Held   map[row.PortKey][]*Holder
	// waiting are the holders without a socket.
	waiting map[*Holder]bool
	gained  []row.Endpoint // of those that were waiting, since Gained has last told
}

// Holder is the socket of one endpoint, shared by the rows that stand for it
// while one takes over from another.
type Holder struct {
	row.Endpoint

	fd   int // -1 where the port could not be bound (yet)
	rows int
}

// Binder binds sockets to endpoints of one family. Ours are the holders of the port.
type Binder interface {
	// Bind returns a socket. It fails with syscall.EADDRINUSE where another process has the
	// endpoint, be it for an outgoing connection.
	Bind(e row.Endpoint, ours []*Holder) (fd int, err error)
	// InUse is the error that names the process that serves an endpoint. It is nil if none
	// does.
	InUse(e row.Endpoint, ours []*Holder) error
	// Close closes a socket.
	Close(fd int)
}

// NewSet returns what holds ports by a binder, or nothing if it is not on.
func NewSet(on bool, b Binder) Set {
	return Set{off: !on, binder: b, Held: map[row.PortKey][]*Holder{}, waiting: map[*Holder]bool{}}
}

// Acquire holds an endpoint for one more row. It fails with
// syscall.EADDRINUSE where another process serves the port. Where the port is
// merely the source port of an outgoing connection, it succeeds, and Retry
// will bind it later.
func (s *Set) Acquire(e row.Endpoint) error {
	if !s.wants(e) {
		return nil
	}

	if h := s.find(e); h != nil {
		if err := s.Ensure(e); err != nil {
			return err
		}

		h.rows++

		return nil
	}

	fd, err := s.bindOrName(e)
	if err != nil {
		return err
	}

	s.put(e, fd)

	return nil
}

// bindOrName is Bind, but that its error names who serves the port, and that
// it returns -1 without one where nobody does.
func (s *Set) bindOrName(e row.Endpoint) (int, error) {
	fd, err := s.binder.Bind(e, s.Held[e.PortKey])
	if errors.Is(err, syscall.EADDRINUSE) {
		err = s.binder.InUse(e, s.Held[e.PortKey])
	}

	return fd, err
}

// Ensure tries again to bind an endpoint that is not held yet, and fails as
// Acquire does.
func (s *Set) Ensure(e row.Endpoint) error {
	h := s.find(e)
	if h == nil || h.fd >= 0 {
		return nil
	}

	fd, err := s.bindOrName(e)
	s.fill(h, fd)

	return err
}

// Adopt is Acquire for a row that stands in any case.
func (s *Set) Adopt(e row.Endpoint) error {
	if !s.wants(e) {
		return nil
	}

	if h := s.find(e); h != nil {
		h.rows++

		return nil
	}

	fd, err := s.bindOrName(e)
	s.put(e, fd)

	return err
}

func (s *Set) find(e row.Endpoint) *Holder {
	for _, h := range s.Held[e.PortKey] {
		if h.Endpoint == e {
			return h
		}
	}

	return nil
}

func (s *Set) put(e row.Endpoint, fd int) {
	h := &Holder{Endpoint: e, fd: fd, rows: 1}

	s.Held[e.PortKey] = append(s.Held[e.PortKey], h)
	if fd < 0 {
		s.waiting[h] = true
	}
}

// Release gives back one row's share of an endpoint.
func (s *Set) Release(e row.Endpoint) {
	h := s.find(e)
	if h == nil {
		return
	}

	h.rows--
	if h.rows > 0 {
		return
	}

	if h.fd >= 0 {
		s.binder.Close(h.fd)
	}

	delete(s.waiting, h)

	s.Held[e.PortKey] = slices.DeleteFunc(s.Held[e.PortKey], func(o *Holder) bool { return o == h })
	if len(s.Held[e.PortKey]) == 0 {
		delete(s.Held, e.PortKey)
	}
}

// Holds reports whether a socket is bound to an endpoint.
func (s *Set) Holds(e row.Endpoint) bool {
	h := s.find(e)

	return h != nil && h.fd >= 0
}

// wants reports whether an endpoint is to be held. SCTP never is: to open a socket
// would load the kernel module. Nor is a link-local address: bind(2) wants its
// scope, which a HostIP does not have.
func (s *Set) wants(e row.Endpoint) bool {
	return !s.off && e.Proto != row.SCTP && !(e.IP.Is6() && e.IP.IsLinkLocalUnicast())
}

// Lacks reports whether an endpoint is to be held and is not.
func (s *Set) Lacks(e row.Endpoint) bool { return s.wants(e) && !s.Holds(e) }

// Obstacle says what keeps an endpoint from being held now, "" if nothing does.
func (s *Set) Obstacle(e row.Endpoint) string {
	fd, err := s.bindOrName(e)

	switch {
	case err != nil:
		return err.Error()
	case fd >= 0:
		s.binder.Close(fd)

		return ""
	default:
		return "an outgoing connection has it"
	}
}

// Retry tries again to bind some of what is waiting.
func (s *Set) Retry() {
	const some = 16 // so that an operation's cost stays its own

	left := some

	for h := range s.waiting {
		if left == 0 {
			return
		}

		left--

		fd, _ := s.binder.Bind(h.Endpoint, s.Held[h.PortKey]) // there will be another time
		s.fill(h, fd)
	}
}

// fill gives a holder its socket, if there is one now.
func (s *Set) fill(h *Holder, fd int) {
	if fd >= 0 {
		h.fd = fd
		delete(s.waiting, h)
		s.gained = append(s.gained, h.Endpoint)
	}
}

// Gained returns the endpoints that could not be held and have been since it was last called.
func (s *Set) Gained() []row.Endpoint {
	gained := s.gained
	s.gained = nil

	return gained
}

// Waiting is how many endpoints are to be held and are not.
func (s *Set) Waiting() int { return len(s.waiting) }

// Close releases everything.
func (s *Set) Close() {
	for _, holders := range s.Held {
		for _, h := range holders {
			if h.fd >= 0 {
				s.binder.Close(h.fd)
			}
		}
	}

	clear(s.Held)
	clear(s.waiting)

	s.gained = nil
}
