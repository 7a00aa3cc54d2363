// Package hostporttest is for the unit tests of what embeds hostport: managers without
// privileges, on every system. They are real ones, whose node is in memory: validation,
// conflicts, owners, Sync, Check, Run and errors are those of the library itself. There is no
// kernel: no packet goes anywhere, no socket is opened and no program is run.
//
//	var node hostporttest.Node
//
//	manager, err := hostport.New(node.Option())
//
// What a kernel decides is not here to be tested: whether a connection reaches a pod, which
// flows end, what the host's firewall does to it.
package hostporttest

import (
	"cmp"
	"fmt"
	"net/netip"
	"strings"

	v1 "k8s.io/api/core/v1"

	"github.com/cri-o/hostport"
	"github.com/cri-o/hostport/internal/memory"
	"github.com/cri-o/hostport/internal/row"
)

// Node is a node in memory. The zero Node is one without rows. It must not be copied once it
// is used, and may be used by several goroutines.
//
// It outlives its managers, as a node does the processes of a runtime: a manager that is made
// after another one's Close finds the rows of that one, each with the hash of its owner. A
// process that crashes leaves the same behind, so Close is the way to play that too. Two
// managers at a time are one too many: the second one waits, and fails, as the second one on
// a real node does.
type Node struct{ memory memory.Node }

// Option has a constructor make a manager that works on the node, and hostport.List look at
// it. All other options have their meaning, except those of the kernel alone: WithBackend and
// WithoutLocalhost change nothing. The Backend of a Mapping is "memory".
func (n *Node) Option() hostport.Option { return hostport.WithMemory(&n.memory) }

// Fail has each change of rows fail with err, as where the kernel refuses it, until it is called
// with nil. Nothing has changed then, and what a failed operation is to its caller is as on a real
// node: Remove leaves its rows to the next Add that wants them, and to Run.
func (n *Node) Fail(err error) { n.memory.Fail(err) }

// Occupy has another process of the node bind a port, for TCP or UDP, until free is called:
// Add of the port fails with syscall.EADDRINUSE then. So does Occupy where a manager or another
// process has it. The address 0.0.0.0 is all of IPv4, and [::] all of both families, which is
// what a server gets for it on Linux.
func (n *Node) Occupy(protocol v1.Protocol, addr netip.AddrPort) (free func(), err error) {
	proto := row.Protocol(strings.ToLower(string(cmp.Or(protocol, v1.ProtocolTCP)))) // as Add reads it
	if !addr.IsValid() || addr.Port() == 0 || proto != row.TCP && proto != row.UDP {
		return nil, fmt.Errorf("occupy %s %s: want TCP or UDP, an address, and a port", protocol, addr)
	}

	ip := addr.Addr().Unmap()
	e := row.Endpoint{PortKey: row.PortKey{Proto: proto, Port: addr.Port()}}
	families := []row.Family{row.FamilyOf(ip)}

	switch {
	case !ip.IsUnspecified():
		e.IP = ip
	case ip.Is6():
		families = []row.Family{row.IPv4, row.IPv6}
	}

	if free, err = n.memory.Occupy(e, families...); err != nil {
		return nil, fmt.Errorf("occupy %s %s: %w", protocol, addr, err)
	}

	return free, nil
}

// Wipe takes all rows out of the node, as nft flush ruleset does. The manager is not told:
// Check then names what is missing, and Run, Sync, or the next Add puts it back.
func (n *Node) Wipe() { n.memory.Wipe() }
