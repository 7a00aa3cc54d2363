//go:build !linux

package links

import (
	"errors"
	"net/netip"

	"github.com/cri-o/hostport/internal/row"
)

// Finder knows no interface.
type Finder struct{}

func New(row.Family) Finder { return Finder{} }

func (*Finder) To(string, netip.Addr) (string, error) { return "", errors.ErrUnsupported }
func (*Finder) Bypassed(string) (bool, error)         { return false, nil }
func (*Finder) IsBridge(string) bool                  { return false }
func (*Finder) Forget()                               {}
func (*Finder) Close()                                {}
