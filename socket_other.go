//go:build !linux

package hostport

// sockets holds nothing.
type sockets struct{}

func newSockets(ipFamily, bool) sockets { return sockets{} }

func (*sockets) acquire(endpoint) error { return nil }
func (*sockets) ensure(endpoint) error  { return nil }
func (*sockets) adopt(endpoint) error   { return nil }
func (*sockets) release(endpoint)       {}
func (*sockets) retry()                 {}
func (*sockets) holds(endpoint) bool    { return false }
func (*sockets) lacks(endpoint) bool    { return false }
func (*sockets) close()                 {}
