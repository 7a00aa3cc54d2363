//go:build !linux

package nodeaddr

import (
	"context"
	"errors"
)

// Table follows nothing.
type Table struct{}

// New returns a table.
func New(bool) *Table { return nil }

// Now returns errors.ErrUnsupported.
func (*Table) Now(context.Context) (*Addresses, error) { return nil, errors.ErrUnsupported }

// Watch returns errors.ErrUnsupported.
func (*Table) Watch(context.Context, chan<- struct{}) error { return errors.ErrUnsupported }

// Close does nothing.
func (*Table) Close() error { return nil }
