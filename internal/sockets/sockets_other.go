//go:build !linux

package sockets

import (
	"github.com/cri-o/hostport/internal/row"
)

// New returns what holds nothing.
func New(row.Family, bool) Set { return NewSet(false, nil) }
