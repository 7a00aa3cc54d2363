//go:build !linux

package hostport

import (
	"errors"
	"net/netip"
)

// links knows no interface.
type links struct{}

func newLinks(ipFamily) links { return links{} }

func (*links) to(string, netip.Addr) (string, error) { return "", errors.ErrUnsupported }
func (*links) bypassed(string) (bool, error)         { return false, nil }
func (*links) isBridge(string) bool                  { return false }
func (*links) forget()                               {}
func (*links) close()                                {}
