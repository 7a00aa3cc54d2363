// Package hostport maps ports of a node to ports of its pods, for container
// runtimes.
//
// A runtime calls [Manager.Add] when it sets up a pod sandbox and
// [Manager.Remove] when it tears it down. In between, connections to
// hostIP:hostPort on the node reach podIP:containerPort, for TCP, UDP and
// SCTP, over IPv4 and IPv6, and the host port is held by a socket, so that no
// other process can take it.
//
// # A packet's way
//
// A packet for an address of the node is looked up by protocol and port, in
// prerouting if it comes from outside or from a pod, in output if it comes from
// the node itself. What is for a Service of Kubernetes is that Service's. If there
// is a row, its destination becomes the pod's address and port. Its source stays
// what it was, with three exceptions: a pod that reaches itself through its own host
// port would get answers from an address it never asked, and so would its neighbour
// on a link where the answer does not come by the node; and a pod has no way to answer
// 127.0.0.1. Such packets are masqueraded in postrouting. Packets that the node only
// forwards are never translated, nor are those with an IPv6 link-local
// address, which the kernel does not forward. Rules of others stay, but for what
// [Manager.Sync] finds in the chains and tables of this package, or leading into
// them.
//
// # Localhost
//
// 127.0.0.1, and for rows on any address all of 127.0.0.0/8, reaches the pod
// from the node. This takes the sysctl route_localnet on the interface to the pod,
// which Add sets. Because that also lets others send to 127.0.0.1
// (CVE-2020-8558), every transaction first sees to a guard: packets with a
// loopback address that do not come from lo are dropped. The guard stays when the
// last row goes, until a Sync without rows finds no interface with the sysctl.
// Connections from ::1 cannot work; they are refused by the held
// port, as those from 127.0.0.0/8 are under [WithoutLocalhost].
//
// # Rows and owners
//
// The whole state is one table. A row is a host endpoint (IP family, protocol,
// host IP or any, host port), the pod endpoint it leads to, and the pod's
// sandbox id, its owner. Add puts rows in, Remove takes rows out, and neither
// takes one from another pod that is known. Two live pods cannot have overlapping
// rows: the second one's Add fails with a [ConflictError] and changes nothing.
//
// The kernel goes on with a flow as it began, for as long as its sender does not
// pause. UDP and SCTP flows to the ports of an operation that would go elsewhere if
// they began after it are ended before it returns. TCP connections to a pod whose row
// was removed are reset at their next packet, within a second; those of a row that
// stays or moves live on. The same holds where an address comes to the node or leaves
// it: Run follows that, and so does the family's next operation.
//
// Operations of several goroutines that meet are committed together, each with
// its own result. With nftables an operation costs what its own pod costs.
//
// # Restarts
//
// Rules outlive the process, sockets do not. A new manager lists the rows that
// the kernel holds, in nftables and in iptables, CRI-O's included, holds their
// ports again before the constructor returns, and puts back what is missing of
// them. Whose they are it knows only by a hash, until an Add, Remove or Sync names
// the owner; Add of a pod that wants such a port before that wins over it, with a
// line in the log.
//
// A network namespace has one manager at a time in each IP family, until its Close or
// the end of its process: two would not see each other's rows. The next one waits, and
// says whose turn it is when its time is up. See [New].
//
// [Manager.Sync] makes the node exactly what the runtime says is running: it is
// restart recovery and garbage collection. [Manager.Run] watches, until its context
// ends, and repairs what others break. [Manager.Check] says what is missing of a
// pod.
//
// # Errors
//
// Arguments that cannot be accepted give [ErrInvalidMapping], a port of
// another pod a *[ConflictError], a port of another process
// syscall.EADDRINUSE, an operation that ran out of time
// context.DeadlineExceeded, and one after Close os.ErrClosed. Where Add fails,
// everything is as it was before; but if nobody knows what came of a transaction,
// because it ran out of time, what it may have left goes with whatever comes next:
// an operation of the family that changes something, the pod's Remove, Run or Sync.
//
// # What is in the kernel
//
// With nftables, the table crio-hostports in the families ip and ip6: an element
// of the map hostports or hostipports for each row, and one of the set hairpins
// for each pod. Their comment is a hash of the pod's sandbox id. The chain guard
// is the guard.
//
// With iptables, in the nat table, KUBE-HOSTPORTS and CRIO-HOSTPORTS-MASQ lead
// by ranges of ports to a chain KUBE-HP-<hash> and a chain CRIO-MASQ-<hash> for
// each row. The rule in the latter has the pod's name and the host port as a
// comment. The guard is in the table raw.
//
// The names are those that CRI-O uses, and either can remove what the other
// made.
//
// The package works on Linux. Elsewhere it builds, and New and Add return
// errors.ErrUnsupported.
package hostport
