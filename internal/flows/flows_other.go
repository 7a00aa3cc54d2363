//go:build !linux

package flows

import (
	"context"
	"errors"

	"github.com/cri-o/hostport/internal/nodeaddr"
	"github.com/cri-o/hostport/internal/row"
)

// Ender ends nothing.
type Ender struct{}

// Conn is nothing.
type Conn any

func Dial() (Conn, error) { return nil, errors.ErrUnsupported }

func New(row.Family, func(error), Viewer, func() (Conn, error)) *Ender { return nil }

func (*Ender) Flush(context.Context, []row.Delta, *nodeaddr.Addresses, View) error { return nil }
func (*Ender) Stop()                                                               {}
func (*Ender) Open()                                                               {}
func (*Ender) Resume()                                                             {}
func (*Ender) Close(View) error                                                    { return nil }
