package outcome

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os/exec"
	"slices"
	"syscall"
	"time"

	"github.com/cri-o/hostport/internal/row"
)

// ErrUnavailable is in the chain of errors that say that a node does not have
// what a backend or a family is made of, so that it holds no rows there either.
var ErrUnavailable = errors.New("not available")

// RowError says which row of a pod an error is about.
type RowError struct {
	Row *row.Row
	Err error
}

func (e *RowError) Error() string { return fmt.Sprintf("row %s: %v", e.Row, e.Err) }
func (e *RowError) Unwrap() error { return e.Err }

// RefusedError says that the kernel refused one delta of several, so that the
// others may go without it. Nothing has been changed then, unless it is in a *PartlyError.
type RefusedError struct {
	Delta int // index among those handed to Reconcile
	Err   error
}

func (e *RefusedError) Error() string { return e.Err.Error() }
func (e *RefusedError) Unwrap() error { return e.Err }

// IsRefused reports whether err is a *RefusedError.
func IsRefused(err error) bool {
	refused := (*RefusedError)(nil)

	return errors.As(err, &refused)
}

// PartlyError says that some of several transactions may have been committed.
type PartlyError struct{ Err error }

func (e *PartlyError) Error() string { return e.Err.Error() }
func (e *PartlyError) Unwrap() error { return e.Err }

// IsPartly reports whether err is a *PartlyError.
func IsPartly(err error) bool {
	partly := (*PartlyError)(nil)

	return errors.As(err, &partly)
}

// ErrOtherManager says that another manager has the host ports.
var ErrOtherManager = errors.New("another manager has the host ports")

// IsAbsence reports whether err says that something is not there. Any other error says that
// nobody could look, as if no file can be opened.
func IsAbsence(err error) bool {
	return slices.ContainsFunc([]error{syscall.EAFNOSUPPORT, syscall.EPROTONOSUPPORT, syscall.EOPNOTSUPP, fs.ErrNotExist, exec.ErrNotFound},
		func(target error) bool { return errors.Is(err, target) })
}

// Unavailable has ErrUnavailable in err if that says that something is not there.
func Unavailable(err error) error {
	if IsAbsence(err) {
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}

	return err
}

// MaxOvertaken is how often somebody else may come between a backend's look and the
// transaction that follows.
const MaxOvertaken = 3

// grace is the time for what has to follow a transaction, when the operation's own
// may be up.
const grace = 5 * time.Second

// WithGrace is ctx's values with time of their own.
func WithGrace(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), grace)
}
