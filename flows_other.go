//go:build !linux

package hostport

import (
	"context"
	"errors"

	"k8s.io/klog/v2"

	"github.com/cri-o/hostport/internal/nodeaddr"
)

// flows ends nothing.
type flows struct{}

// flowConn is nothing.
type flowConn any

func dialFlows() (flowConn, error) { return nil, errors.ErrUnsupported }

func newFlows(ipFamily, klog.Logger, viewer, func() (flowConn, error)) *flows { return nil }

func (*flows) flush(context.Context, []delta, *nodeaddr.Addresses, nodeView) error { return nil }
func (*flows) cannotEnd(error)                                                     {}
func (*flows) stop()                                                               {}
func (*flows) open()                                                               {}
func (*flows) resume()                                                             {}
func (*flows) close(nodeView) error                                                { return nil }
