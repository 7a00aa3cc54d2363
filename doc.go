// Package hostport maps ports of a node to ports of its pods, for container
// runtimes.
//
// A runtime calls [Manager.Add] when it sets up a pod sandbox and
// [Manager.Remove] when it tears it down. In between, connections to
// hostIP:hostPort on the node reach podIP:containerPort, for TCP, UDP and
// SCTP, over IPv4 and IPv6, and the host port is held by a socket, so that no
// other process can take it.
//
// # Rows and owners
//
// The whole state is one table. A row is a host endpoint (IP family, protocol,
// host IP or any, host port), the pod endpoint it leads to, and the pod's
// sandbox id, its owner. Add puts rows in, Remove takes rows out, and neither
// takes one from another pod that is known. Two live pods cannot have overlapping
// rows: the second one's Add fails with a [ConflictError] and changes nothing.
//
// Operations of several goroutines that meet are committed together, each with
// its own result. With nftables an operation costs what its own pod costs.
//
// # Packets
//
// A packet for an address of the node is looked up by protocol and port, whether
// it comes from outside, from a pod or from the node itself. What is for a Service
// of Kubernetes is that Service's. If there is a row, its destination becomes the
// pod's address and port. Its source stays what it was, with three exceptions: a pod
// that reaches itself, its neighbour on a link where the answer does not come by the
// node, and 127.0.0.0/8. Packets that the node only forwards are never translated.
//
// The kernel goes on with a flow as it began. So flows that would go elsewhere if they
// began now are ended: UDP and SCTP before the operation returns, TCP connections to a
// pod whose row was removed within a second. Those of a row that stays or moves live on.
//
// 127.0.0.1 takes the sysctl route_localnet on the interface to the pod, which Add sets.
// It also lets others send to 127.0.0.1 (CVE-2020-8558), so every transaction first sees
// to a guard that drops packets with a loopback address that do not come from lo.
// Connections from ::1 cannot work; the held port refuses them.
//
// # Restarts
//
// Rules outlive the process, sockets do not. A new manager lists the rows that
// the kernel holds, in nftables and in iptables, CRI-O's included, holds their
// ports again before the constructor returns, and puts back what is missing of
// them. Whose they are it knows only by a hash, until an Add, Remove, Sync or Keep names
// the owner; Add of a pod that wants such a port before that wins over it, with a
// line in the log, except [WithoutTakeover].
//
// A network namespace has one manager at a time in each IP family, until its Close or
// the end of its process: two would not see each other's rows. The next one waits, and
// says whose turn it is when its time is up. See [New].
//
// [Manager.Sync] makes the node exactly what the runtime says is running: it is
// restart recovery and garbage collection. A runtime calls it when it starts, before its
// first Add. [Manager.Keep] is garbage collection by sandbox ids alone. [Manager.Run] watches, until its context
// ends, and repairs what others break. [Manager.Check] says what is missing of a
// pod.
//
// # What programs are told
//
// [Manager.Mappings] lists the rows and [Manager.Status] says how each family stands. An
// [Observer] is told each operation, repair, takeover and change of health. [List] lists what
// the kernel holds, without a manager and beside one. The log names ports and pods, and what
// an operator has to act on is an error there.
//
// # Errors
//
// Arguments that cannot be accepted give [ErrInvalidMapping], a port of
// another pod a *[ConflictError], a port of another process
// syscall.EADDRINUSE, an operation that ran out of time
// context.DeadlineExceeded, and one after Close os.ErrClosed. Where Add fails,
// everything is as it was before. If nobody knows what came of a transaction,
// because it ran out of time, what it may have left goes with whatever comes next:
// an operation of the family that changes something, the pod's Remove, Run or Sync.
//
// # In the kernel
//
// The names are those that CRI-O's port mapper uses, and either can remove what the
// other made: with nftables the table crio-hostports in the families ip and ip6, with
// iptables the chains KUBE-HOSTPORTS and CRIO-HOSTPORTS-MASQ of the table nat and what they
// lead to. The folder docs of the module describes each object, and how the code works.
//
// The package works on Linux. Elsewhere it builds, and New and Add return
// errors.ErrUnsupported. The package hostporttest has managers for the unit tests of
// callers, which work on every system.
package hostport
