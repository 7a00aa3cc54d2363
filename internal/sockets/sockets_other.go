//go:build !linux

package sockets

import (
	"github.com/cri-o/hostport/internal/row"
)

// Set holds nothing.
type Set struct{}

func New(row.Family, bool) Set { return Set{} }

func (*Set) Acquire(row.Endpoint) error   { return nil }
func (*Set) Ensure(row.Endpoint) error    { return nil }
func (*Set) Adopt(row.Endpoint) error     { return nil }
func (*Set) Release(row.Endpoint)         {}
func (*Set) Retry()                       {}
func (*Set) Holds(row.Endpoint) bool      { return false }
func (*Set) Lacks(row.Endpoint) bool      { return false }
func (*Set) Close()                       {}
func (*Set) Gained() []row.Endpoint       { return nil }
func (*Set) Obstacle(row.Endpoint) string { return "" }
