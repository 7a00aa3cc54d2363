package testbed

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
)

// ownNamespace is the network namespace of the calling thread.
const ownNamespace = "/proc/thread-self/ns/net"

// A Namespace is an anonymous network namespace, kept alive by an open file.
// Its methods may be called from several goroutines.
type Namespace struct {
	// Name is what the namespace's services call themselves.
	Name string

	file *os.File

	mu       sync.Mutex // guards what follows
	closed   bool
	services []*Service
}

func newNamespace(name string) (*Namespace, error) {
	n := &Namespace{Name: name}
	err := onThread(func() (err error) {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("unshare (be root, or run under unshare -Urnm): %w", err)
		}
		n.file, err = os.Open(ownNamespace)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("create network namespace %s: %w", name, err)
	}
	return n, nil
}

// Open returns the namespace of a file, such as /run/netns/web, which somebody
// else has made.
func Open(name, path string) (*Namespace, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open network namespace %s: %w", name, err)
	}
	return &Namespace{Name: name, file: file}, nil
}

// Do runs f inside the namespace and returns its error. f runs in a goroutine
// of its own, locked to a thread, so it may end that goroutine, as
// testing.T.FailNow does; Do then returns an error. Goroutines that f starts
// are not in the namespace; sockets that f opens stay in it.
func (n *Namespace) Do(f func() error) error {
	return onThread(func() error {
		if err := n.enter(); err != nil {
			return fmt.Errorf("enter network namespace %s: %w", n.Name, err)
		}
		return f()
	})
}

// FD returns the file descriptor of the namespace, for libraries that open
// their sockets in a namespace so given. It is valid until Close.
func (n *Namespace) FD() int { return int(n.file.Fd()) }

// Close ends the namespace's services and lets go of the namespace, which the
// kernel removes once no socket uses it any more. After that the methods fail
// with os.ErrClosed; further calls of Close do nothing.
func (n *Namespace) Close() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return nil
	}
	n.closed = true
	errs := []error{n.file.Close()}
	for _, s := range n.services {
		errs = append(errs, s.Close())
	}
	return errors.Join(errs...)
}

// register makes Close end s.
func (n *Namespace) register(s *Service) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return os.ErrClosed
	}
	n.services = append(n.services, s)
	return nil
}

// enter moves the calling thread into the namespace. The lock keeps a
// concurrent Close from freeing the descriptor for another file in between.
func (n *Namespace) enter() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return os.ErrClosed
	}
	return unix.Setns(n.FD(), unix.CLONE_NEWNET)
}

// Sysctl writes a value below /proc/sys, which shows the namespace of the
// thread that opens it.
func (n *Namespace) Sysctl(key, value string) error {
	return n.Do(func() error {
		f, err := os.OpenFile("/proc/sys/"+key, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		_, err = f.WriteString(value)
		return errors.Join(err, f.Close())
	})
}

// onThread runs f in a goroutine with a thread to itself and afterwards puts
// the thread back into the namespace it came from. Leaving the thread to die
// instead would be shorter, but the Go runtime cannot end the main thread, and
// it is the main thread that /proc/<pid>/ns/net shows.
func onThread(f func() error) error {
	err := errors.New("the function ended its goroutine") // until f returns
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		home, openErr := os.Open(ownNamespace)
		if openErr != nil {
			runtime.UnlockOSThread()
			err = openErr
			return
		}
		defer home.Close()
		defer func() {
			// A thread that cannot go home stays locked and dies with the goroutine.
			if unix.Setns(int(home.Fd()), unix.CLONE_NEWNET) == nil {
				runtime.UnlockOSThread()
			}
		}()
		err = f()
	}()
	<-done
	return err
}
