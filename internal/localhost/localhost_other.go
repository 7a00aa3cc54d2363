//go:build !linux

package localhost

import (
	"github.com/cri-o/hostport/internal/row"
)

func Routed() bool                 { return false }
func Forwarding(row.Family) string { return "" }
