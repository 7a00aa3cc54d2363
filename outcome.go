package hostport

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os/exec"
	"slices"
	"syscall"
	"time"
)

// errUnavailable is in the chain of errors that say that a node does not have
// what a backend or a family is made of, so that it holds no rows there either.
var errUnavailable = errors.New("not available")

// rowError says which row of a pod an error is about.
type rowError struct {
	row *row
	err error
}

func (e *rowError) Error() string { return fmt.Sprintf("row %s: %v", e.row, e.err) }
func (e *rowError) Unwrap() error { return e.err }

// refusedError says that the kernel refused one delta of several, so that the
// others may go without it. Nothing has been changed then, but for a *partlyError.
type refusedError struct {
	delta int // index among those handed to reconcile
	err   error
}

func (e *refusedError) Error() string { return e.err.Error() }
func (e *refusedError) Unwrap() error { return e.err }

// isRefused reports whether err is a *refusedError.
func isRefused(err error) bool {
	refused := (*refusedError)(nil)

	return errors.As(err, &refused)
}

// partlyError says that some of several transactions may have been committed.
type partlyError struct{ err error }

func (e *partlyError) Error() string { return e.err.Error() }
func (e *partlyError) Unwrap() error { return e.err }

// isPartly reports whether err is a *partlyError.
func isPartly(err error) bool {
	partly := (*partlyError)(nil)

	return errors.As(err, &partly)
}

// isAbsence reports whether err says that something is not there. Any other error says that
// nobody could look, as if no file can be opened.
func isAbsence(err error) bool {
	return slices.ContainsFunc([]error{syscall.EAFNOSUPPORT, syscall.EPROTONOSUPPORT, syscall.EOPNOTSUPP, fs.ErrNotExist, exec.ErrNotFound},
		func(target error) bool { return errors.Is(err, target) })
}

// unavailable has errUnavailable in err if that says that something is not there.
func unavailable(err error) error {
	if isAbsence(err) {
		return fmt.Errorf("%w: %w", errUnavailable, err)
	}

	return err
}

// maxOvertaken is how often somebody else may come between a backend's look and the
// transaction that follows.
const maxOvertaken = 3

// grace is the time for what has to follow a transaction, when the operation's own
// may be up.
const grace = 5 * time.Second

// withGrace is ctx's values with time of their own.
func withGrace(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), grace)
}
