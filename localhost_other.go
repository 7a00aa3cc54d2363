//go:build !linux

package hostport

import "k8s.io/klog/v2"

// localhost opens nothing.
type localhost struct{}

func newLocalhost(klog.Logger) localhost { return localhost{} }

func (*localhost) open(string) error { return nil }

func localnetRouted() bool       { return false }
func forwarding(ipFamily) string { return "" }
func isSet(string) (bool, error) { return true, nil }
