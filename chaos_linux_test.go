package hostport

import (
	"cmp"
	"context"
	"encoding/gob"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/mdlayher/netlink"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"

	"github.com/cri-o/hostport/internal/iptables"
	"github.com/cri-o/hostport/internal/nfnetlink"
	"github.com/cri-o/hostport/internal/nftables"
	"github.com/cri-o/hostport/internal/row"
	"github.com/cri-o/hostport/internal/testbed"
)

// The suite of faults. A runtime in a process of its own is told what to do, while
// others break what it has made, or kill it. A model tells what ought to be, and
// after each step the kernel, the sockets and a sample of connections are compared
// with it.

const (
	// runtimeVariable makes the test binary such a runtime, with that backend.
	runtimeVariable = "HOSTPORT_TEST_RUNTIME"
	// chaosVariable is how long TestChaos goes on; by default it is short.
	chaosVariable = "HOSTPORT_CHAOS"
	// killsVariable is how often TestKills kills.
	killsVariable = "HOSTPORT_KILLS"
	// seedVariable repeats a run.
	seedVariable = "HOSTPORT_CHAOS_SEED"
)

// order is what a runtime is told to do.
type order struct {
	Op   string // add, remove, sync, mappings, close; files, restart: alone
	ID   string
	Pod  *PodPortMapping
	Pods map[string][]*PodPortMapping
	// Files is how many files the runtime may open from now on.
	Files int
	// Backend is what one that is restarted uses.
	Backend Backend
}

type reply struct {
	Err      string
	Mappings []Mapping
}

// runRuntime obeys the orders that come on standard input. Those that come
// together are carried out at the same time.
func runRuntime(backend Backend) int {
	timeout, err := time.ParseDuration(os.Getenv(runtimeVariable + "_TIMEOUT"))
	if err != nil {
		return complain("runtime: ", err)
	}

	m, err := New(WithBackend(backend), WithTimeout(timeout))
	if err != nil {
		return complain("runtime: ", err)
	}

	run := func() {
		if os.Getenv(runtimeVariable+"_RUN") != "" {
			go func(m *Manager) { _ = m.Run(context.Background()) }(m)
		}
	}
	run()

	in, out := gob.NewDecoder(os.Stdin), gob.NewEncoder(os.Stdout)
	replies := []reply{{Mappings: m.Mappings()}}

	for {
		if err := out.Encode(replies); err != nil {
			return complain("runtime: ", err)
		}

		var orders []order
		if err := in.Decode(&orders); err != nil {
			return complain("runtime: ", err)
		}

		switch orders[0].Op {
		case "restart":
			err = errors.Join(m.Close(), limitFiles(orders[0].Files))
			m = NewMetaHostportManager(WithBackend(orders[0].Backend), WithTimeout(timeout)).(*Manager)
			run()
		case "files":
			err = limitFiles(orders[0].Files)
		}

		if err != nil {
			return complain("runtime: ", err)
		}

		replies = obeyAll(m, orders)
	}
}

// manyFiles are enough for whatever a test does.
const manyFiles = 4096

// limitFiles has the process open at most so many files besides those that are open.
func limitFiles(more int) error {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return err
	}

	// A new file gets the lowest number that is free, below the limit.
	for limit.Cur = 0; limit.Cur < limit.Max; limit.Cur++ {
		if _, err := unix.FcntlInt(uintptr(limit.Cur), unix.F_GETFD, 0); err == nil {
			continue
		}

		if more == 0 {
			break
		}

		more--
	}

	return unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
}

func obeyAll(m *Manager, orders []order) []reply {
	var wg sync.WaitGroup

	replies := make([]reply, len(orders))

	for i, o := range orders {
		wg.Go(func() {
			var err error

			switch o.Op {
			case "add":
				err = m.Add(o.ID, o.Pod, "")
			case "remove":
				err = m.Remove(o.ID, o.Pod)
			case "sync":
				err = m.Sync(context.Background(), o.Pods)
			case "close":
				err = m.Close()
			case "mappings":
				replies[i].Mappings = m.Mappings()
			}

			if err != nil {
				replies[i].Err = err.Error()
			}
		})
	}

	wg.Wait()

	return replies
}

// runtimeProcess is a runtime as its test sees it.
type runtimeProcess struct {
	n      *node
	cmd    *exec.Cmd
	in     *gob.Encoder
	out    *gob.Decoder
	begun  []Mapping // what it has adopted
	stderr strings.Builder
}

// start starts a runtime on the node, which looks after its rows if run is set, and
// waits for it to be ready.
func (n *node) start(run bool, timeout time.Duration) *runtimeProcess {
	n.t.Helper()

	p := n.launch(run, timeout)

	replies, err := p.replies(1)
	require.NoError(n.t, err, "%s", &p.stderr)

	p.begun = replies[0].Mappings

	return p
}

func (n *node) launch(run bool, timeout time.Duration) *runtimeProcess {
	n.t.Helper()

	self, err := os.Executable()
	require.NoError(n.t, err)

	p := &runtimeProcess{n: n, cmd: exec.Command(self)}
	p.cmd.Env = append(os.Environ(), runtimeVariable+"="+string(n.backend()), runtimeVariable+"_TIMEOUT="+timeout.String())
	p.cmd.Stderr = &p.stderr

	if run {
		p.cmd.Env = append(p.cmd.Env, runtimeVariable+"_RUN=yes")
	}

	in, err := p.cmd.StdinPipe()
	require.NoError(n.t, err)
	out, err := p.cmd.StdoutPipe()
	require.NoError(n.t, err)
	n.do(func() { require.NoError(n.t, p.cmd.Start()) })
	n.t.Cleanup(p.kill)

	p.in, p.out = gob.NewEncoder(in), gob.NewDecoder(out)

	return p
}

// kill ends the runtime at once, whatever it is doing.
func (p *runtimeProcess) kill() {
	if p.cmd.ProcessState == nil {
		_ = p.cmd.Process.Kill()
		_ = p.cmd.Wait()
		assert.NotContains(p.n.t, p.stderr.String(), "DATA RACE")

		if p.n.t.Failed() {
			p.n.t.Log(p.stderr.String())
		}
	}
}

func (p *runtimeProcess) replies(count int) ([]reply, error) {
	var replies []reply

	watchdog := time.AfterFunc(testbed.Stretch(2*time.Minute), func() { _ = p.cmd.Process.Signal(syscall.SIGQUIT) }) // which shows where it hangs
	defer watchdog.Stop()

	err := p.out.Decode(&replies)
	if err == nil && len(replies) != count {
		err = fmt.Errorf("%d replies", len(replies)) //nolint:err113 // of a test
	}

	return replies, err
}

// obey has the runtime carry out orders at the same time.
func (p *runtimeProcess) obey(orders ...order) []reply {
	p.n.t.Helper()

	return p.obeyDuring(func() {}, orders...)
}

// obeyDuring does something while the runtime carries out orders.
func (p *runtimeProcess) obeyDuring(something func(), orders ...order) []reply {
	p.n.t.Helper()
	require.NoError(p.n.t, p.in.Encode(orders))
	something()

	replies, err := p.replies(len(orders))
	if err != nil {
		_ = p.cmd.Wait()
	}

	require.NoError(p.n.t, err, "%s", &p.stderr)

	return replies
}

// chaos is one run of the suite.
type chaos struct {
	*node
	traffic

	t       *testing.T
	random  *rand.Rand
	runtime *runtimeProcess
	model   map[string][]*row.Row        // by pod
	taken   map[row.PortKey]net.Listener // by a process of others
	layout  map[IPFamily]string          // of our nftables, except the elements
	faults  map[string]int
	ops     map[string]int
	// compareFlows is set if flows are compared with the model as well: in the long form alone,
	// as the model is not yet exact about them.
	compareFlows bool
}

// impatient is a timeout that somebody who holds a lock can exceed.
var impatient = testbed.Stretch(2 * time.Second) //nolint:gochecknoglobals // measured

const takesPort = "foreign process takes a port"

// Ports that pods compete for.
const (
	firstPort = 8000
	somePorts = 16
	somePods  = 8
)

func TestChaos(t *testing.T) {
	steps, duration := 40, time.Duration(0)

	if v := os.Getenv(chaosVariable); v != "" {
		var err error
		duration, err = time.ParseDuration(v)
		require.NoError(t, err)

		steps = 1 << 30
	}

	eachBackend(t, func(t *testing.T, n *node) {
		c := newChaos(t, n)
		c.compareFlows = duration > 0
		c.serveAll(0)
		c.serveAll(1)
		c.runtime = n.start(true, impatient)

		for _, f := range []IPFamily{IPv4, IPv6} {
			c.runtime.obey(order{Op: "add", ID: "first", Pod: n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80})})
			c.layout[f] = c.rulesNow(f)
		}

		c.setUpTraffic()
		c.runtime.obey(order{Op: "remove", ID: "first"})

		defer func() {
			if t.Failed() {
				t.Logf("addresses that came and went last: %s", strings.Join(c.toggled, "; "))
			}
		}()

		begun := time.Now()

		for i := range steps {
			if duration > 0 && time.Since(begun) > duration {
				break
			}

			c.step(i)

			if t.Failed() {
				break
			}
		}

		t.Logf("%s: operations %v, faults %v, in %v", n.variant, c.ops, c.faults, time.Since(begun))
	})
}

func newChaos(t *testing.T, n *node) *chaos {
	t.Helper()

	seed := uint64(time.Now().UnixNano())
	if v := os.Getenv(seedVariable); v != "" {
		var err error
		seed, err = strconv.ParseUint(v, 10, 64)
		require.NoError(t, err)
	}

	t.Logf("%s=%d repeats it", seedVariable, seed)

	return &chaos{
		node: n, t: t, random: rand.New(rand.NewPCG(seed, 0)),
		model: map[string][]*row.Row{}, taken: map[row.PortKey]net.Listener{}, faults: map[string]int{}, ops: map[string]int{},
		layout: map[IPFamily]string{},
	}
}

func (c *chaos) serveAll(i int) {
	for _, f := range []IPFamily{IPv4, IPv6} {
		c.serve(i, "tcp", f, 80)
		c.serve(i, "udp", f, 80)
	}
}

// step does something, perhaps breaks or moves something, and looks.
func (c *chaos) step(i int) {
	var before, during []func()

	what := []string{fmt.Sprintf("step %d", i)}

	c.goOn()

	for _, all := range []map[string]func(){c.allFaults(), c.allMoves()} {
		if c.random.IntN(2) == 0 {
			continue
		}

		name := pick(c, slices.Sorted(maps.Keys(all)))
		fault := all[name]

		if c.random.IntN(2) == 0 || name == takesPort { // which the model has to know before
			before = append(before, fault)
		} else {
			during = append(during, fault)
			name += " meanwhile"
		}

		c.faults[name]++
		what = append(what, name)
	}

	doAll(before)

	meanwhile := func() { doAll(during) }

	switch c.random.IntN(8) {
	case 0:
		what = append(what, "kill")
		c.killed(meanwhile)
	case 1:
		c.choosePods()
		c.sync(meanwhile)
	default:
		c.operations(meanwhile)
	}

	c.check(strings.Join(what, ", "))
}

func doAll(list []func()) {
	for _, do := range list {
		do()
	}
}

// randomPod is a pod with random rows, in one family. Some are to ports that it has.
func (c *chaos) randomPod(id string) *PodPortMapping {
	f := c.family()

	taken := slices.SortedFunc(maps.Keys(c.taken), func(a, b row.PortKey) int { return cmp.Compare(a.Port, b.Port) })

	var mappings []*PortMapping

	for range 1 + c.random.IntN(3) {
		pm := &PortMapping{
			HostPort:      int32(firstPort + c.random.IntN(somePorts)),
			ContainerPort: 80,
			Protocol:      []v1.Protocol{"TCP", "UDP", "SCTP"}[min(c.random.IntN(5)/2, 2)],
		}
		if c.random.IntN(3) == 0 {
			pm.HostIP = pick(c, c.hostIPs(f)).String()
		}

		own := slices.DeleteFunc(slices.Clone(c.model[id]), func(r *row.Row) bool { return r.Family() != f })
		if len(own) > 0 && c.random.IntN(3) == 0 { // which moves, or stands beside
			r := pick(c, own)
			pm.HostPort, pm.Protocol, pm.HostIP = int32(r.Port), v1.Protocol(r.Proto.API()), ""

			if ip := pick(c, []netip.Addr{{}, r.IP, pick(c, c.hostIPs(f))}); ip.IsValid() {
				pm.HostIP = ip.String()
			}
		}

		if len(taken) > 0 && c.random.IntN(4) == 0 {
			pm.HostPort, pm.Protocol = int32(taken[c.random.IntN(len(taken))].Port), v1.ProtocolTCP
		}

		mappings = append(mappings, pm)
	}

	return c.pod(c.random.IntN(2), f, mappings...)
}

func podID(i int) string { return "pod" + strconv.Itoa(i) }

// operations has the runtime do one or several things at once, to different pods,
// and tells the model, which knows what comes of it only where they do not
// compete.
func (c *chaos) operations(during func()) {
	var (
		orders   []order
		expected []string
	)

	for range 1 + c.random.IntN(3) {
		id := podID(c.random.IntN(somePods))
		if slices.ContainsFunc(orders, func(o order) bool { return o.ID == id }) {
			continue
		}

		o, rows, outcome := order{Op: "remove", ID: id}, c.model[id], ""

		if c.random.IntN(3) > 0 {
			o = order{Op: "add", ID: id, Pod: c.randomPod(id)}

			var err error
			if rows, err = rowsOf(id, o.Pod); err != nil {
				continue
			}

			outcome = c.outcome(id, rows)
		}

		if !c.competes(rows, orders) {
			orders, expected = append(orders, o), append(expected, outcome)
		}
	}

	for i, r := range c.runtime.obeyDuring(during, orders...) {
		c.ops[orders[i].Op]++

		if late(r) && orders[i].Op == "remove" { // in one of the families
			r = c.obeyInTime(orders[i])
		} else if late(r) { // nothing has changed
			c.ops["timed out"]++

			continue
		}

		if expected[i] != "" {
			c.ops["refused"]++

			assert.Contains(c.t, r.Err, expected[i], "%s %s", orders[i].Op, orders[i].ID)

			continue
		}

		assert.Empty(c.t, r.Err, "%s %s %v", orders[i].Op, orders[i].ID, orders[i].Pod)
		c.apply(orders[i])
	}
}

func late(r reply) bool { return strings.Contains(r.Err, context.DeadlineExceeded.Error()) }

// obeyInTime has the runtime carry out an order again that was too late: the lock
// is not held for long.
func (c *chaos) obeyInTime(o order) (r reply) {
	for range 10 {
		c.ops["timed out"]++

		if r = c.runtime.obey(o)[0]; !late(r) {
			break
		}
	}

	return r
}

// competes reports whether rows are about what some other command of the same time
// is about.
func (c *chaos) competes(rows []*row.Row, orders []order) bool {
	for _, o := range orders {
		others := c.model[o.ID]

		if o.Pod != nil {
			more, _ := rowsOf(o.ID, o.Pod)
			others = slices.Concat(others, more)
		}

		for _, r := range rows {
			if slices.ContainsFunc(others, func(o *row.Row) bool { return o.PortKey == r.PortKey && o.Family() == r.Family() }) {
				return true
			}
		}
	}

	return false
}

// outcome is what the error of an Add has to say, in the order in which Add looks.
func (c *chaos) outcome(id string, rows []*row.Row) string {
	for _, r := range rows {
		for other, theirs := range c.model {
			if other != id && slices.ContainsFunc(theirs, competesWith(r)) {
				return "is taken by"
			}
		}
	}

	for _, r := range rows {
		stands := slices.ContainsFunc(c.model[id], func(o *row.Row) bool { return o.Endpoint == r.Endpoint && o.Family() == r.Family() })
		if c.taken[r.PortKey] != nil && r.Family() == IPv4 && !stands {
			return "address already in use"
		}
	}

	return ""
}

// competesWith reports whether a row is for packets that r is for.
func competesWith(r *row.Row) func(o *row.Row) bool {
	return func(o *row.Row) bool {
		return r.PortKey == o.PortKey && r.Family() == o.Family() && r.Overlaps(o.Endpoint)
	}
}

// apply tells the model.
func (c *chaos) apply(cmd order) {
	if cmd.Op == "remove" {
		delete(c.model, cmd.ID)

		return
	}

	rows, err := rowsOf(cmd.ID, cmd.Pod)
	require.NoError(c.t, err)

	moveTo(rows, c.model[cmd.ID])

	rest := slices.DeleteFunc(slices.Clone(c.model[cmd.ID]), func(o *row.Row) bool {
		return slices.ContainsFunc(rows, sameAs(o))
	})

	c.model[cmd.ID] = append(rest, rows...)
}

// sameAs reports whether a row has the endpoint of r.
func sameAs(r *row.Row) func(o *row.Row) bool {
	return func(o *row.Row) bool { return r.Endpoint == o.Endpoint && r.Family() == o.Family() }
}

// moveTo notes where rows led before.
func moveTo(rows, before []*row.Row) {
	for _, r := range rows {
		if i := slices.IndexFunc(before, sameAs(r)); i >= 0 {
			r.Former = append(slices.Clone(before[i].Former), before[i].Pod)
			r.Former = slices.DeleteFunc(r.Former, func(pod netip.AddrPort) bool { return pod == r.Pod })
		}
	}
}

// desired is the model as Sync takes it. A pod has one IP in each family then, the first.
func (c *chaos) desired() map[string][]*PodPortMapping {
	pods := map[string][]*PodPortMapping{}

	for id, rows := range c.model {
		ips := map[IPFamily]netip.Addr{}

		c.model[id] = slices.DeleteFunc(rows, func(r *row.Row) bool {
			if !ips[r.Family()].IsValid() {
				ips[r.Family()] = r.Pod.Addr()
			}

			return r.Pod.Addr() != ips[r.Family()]
		})

		for _, r := range c.model[id] {
			pm := &PortMapping{HostPort: int32(r.Port), ContainerPort: int32(r.Pod.Port()), Protocol: v1.Protocol(r.Proto.API())}
			if r.IP.IsValid() {
				pm.HostIP = r.IP.String()
			}

			pods[id] = append(pods[id], &PodPortMapping{
				Namespace: r.Owner.Namespace, Name: r.Owner.Name, IP: r.Pod.Addr().AsSlice(), PortMappings: []*PortMapping{pm},
			})
		}
	}

	return pods
}

// choosePods has a few pods go and come.
func (c *chaos) choosePods() {
	for i := range somePods {
		if id := podID(i); c.random.IntN(3) == 0 {
			before, pod := c.model[id], c.randomPod(id)
			delete(c.model, id)

			rows, err := rowsOf(id, pod)
			if err == nil && c.outcome(id, rows) == "" {
				c.apply(order{Op: "add", ID: id, Pod: pod})
				moveTo(c.model[id], before)
			}
		}
	}
}

func (c *chaos) sync(during func()) {
	c.ops["sync"]++

	// And there is one that cannot be had, perhaps.
	pods, pod := c.desired(), c.randomPod("z")
	want := ""

	if rows, err := rowsOf("z", pod); err == nil {
		if want = c.outcome("z", rows); want != "" {
			pods["z"] = []*PodPortMapping{pod}
		}
	}

	r := c.runtime.obeyDuring(during, order{Op: "sync", Pods: pods})[0]
	if late(r) {
		r = c.obeyInTime(order{Op: "sync", Pods: pods})
	}

	assert.Contains(c.t, r.Err, want)
	assert.Equal(c.t, want == "", r.Err == "", r.Err)
}

// killed kills the runtime in the middle of something. Another takes its place. What was
// to be removed is, perhaps.
func (c *chaos) killed(during func()) {
	c.ops["kill"]++

	id := podID(c.random.IntN(somePods))
	add := order{Op: "add", ID: id, Pod: c.randomPod(id)}
	remove := order{Op: "remove", ID: podID(c.random.IntN(somePods))}
	require.NoError(c.t, c.runtime.in.Encode([]order{add, remove}))
	during()
	time.Sleep(time.Duration(c.random.IntN(100)) * time.Millisecond) //nolint:forbidigo // at any moment
	c.runtime.kill()
	c.hintAgain()

	flows := slices.Concat(c.flows(IPv4), c.flows(IPv6))
	c.runtime = c.start(true, impatient)

	before := slices.Concat(c.allRows(IPv4), c.allRows(IPv6))
	added, _ := rowsOf(add.ID, add.Pod)
	unknown := slices.DeleteFunc(slices.Concat(before, added), func(r *row.Row) bool {
		return slices.ContainsFunc(c.runtime.begun, func(m Mapping) bool { return strings.HasSuffix(m.text(), " "+r.String()) })
	})

	if c.random.IntN(2) == 0 {
		delete(c.model, remove.ID)
	}

	pods := c.desired() // which leaves out rows of a pod that has moved

	c.forget(func(k *client) bool { return k.owner == add.ID || k.owner == remove.ID })
	c.excuse(flows, before, unknown)

	// What it was about to start has its ports until that begins, or ends with it.
	eventually(c.t, func() bool {
		r := c.runtime.obey(order{Op: "sync", Pods: pods})[0]

		return !strings.Contains(r.Err, syscall.EADDRINUSE.Error())
	})
	c.sync(func() {})
}

// hintAgain says which iptables the node uses, if that has been wiped.
func (c *chaos) hintAgain() {
	if c.variant == viaNFTables {
		return
	}

	for _, f := range []IPFamily{IPv4, IPv6} {
		tool := iptables.Command(f) + "-" + string(c.variant)
		if !strings.Contains(c.command(tool+"-save", "-t", "mangle"), "KUBE-IPTABLES-HINT") {
			c.command(tool, "-t", "mangle", "-N", "KUBE-IPTABLES-HINT")
		}
	}
}

// allFaults are the ways to break something.
func (c *chaos) allFaults() map[string]func() {
	f := []IPFamily{IPv4, IPv6}[c.random.IntN(2)]
	faults := map[string]func(){
		takesPort:                  c.take,
		"IPv6 goes and comes back": func() { c.withoutIPv6() },
		"pod's interface is removed": func() {
			require.NoError(c.t, c.ReplacePod(1, "other"))
			c.serveAll(1)
			c.silent[1] = false
			c.forget(func(k *client) bool { return c.podOf(k.pod.Addr()) == 1 })
		},
		"signals": func() {
			for range 20 {
				_ = c.runtime.cmd.Process.Signal(syscall.SIGWINCH)
			}
		},
	}

	if c.variant == viaNFTables || c.variant == iptables.NFT {
		faults["nft flush ruleset"] = c.flushRuleset
		faults["full netlink buffer"] = func() { c.storms(c.flushRuleset) }
	}

	if c.variant == viaNFTables {
		table := nftables.NewLayout(f).Table
		faults["table deleted"] = func() { c.tryCommit(table.Delete()) }
		faults["chain flushed"] = func() {
			c.tryCommit(table.FlushChain([]string{nftables.HostPorts, nftables.NATPrerouting, nftables.Masquerading}[c.random.IntN(3)]))
		}
		faults["CRI-O's rule"] = func() {
			c.tryCommit(table.AppendRule([]string{nftables.Prerouting, nftables.Output}[c.random.IntN(2)],
				nfnetlink.LoadDestinationType(register), nfnetlink.EqualTo(register, unix.RTN_LOCAL), nfnetlink.Goto(nftables.HostPorts)))
		}
		faults["element deleted"] = func() {
			if r := c.anyRow(f); r != nil {
				e := nftables.RowElement(r)
				c.tryCommit(table.DeleteElement(e.Set, e.Element()))
			}
		}
		faults["element replaced"] = func() {
			if r := c.anyRow(f); r != nil {
				e := nftables.RowElement(r)
				other := e.Element()
				other.Data = slices.Clone(other.Data)
				other.Data[len(other.Data)-3] = foreignPodPort
				c.tryCommit(table.DeleteElement(e.Set, e.Element()), table.AddElement(e.Set, other))
			}
		}

		return faults
	}

	tool := iptables.Command(f) + "-" + string(c.variant)
	try := func(args ...string) { c.do(func() { _, _ = execute(c.t, "", tool, args...) }) } // it may not be there

	faults["iptables -F"] = func() { try("-w", "-t", iptables.NATTable, "-F") }
	faults["iptables -F -X"] = func() {
		try("-w", "-t", iptables.NATTable, "-F")
		try("-w", "-t", iptables.NATTable, "-X")
	}
	faults["raw flushed"] = func() { try("-w", "-t", iptables.RawTable, "-F") }
	faults["chain flushed"] = func() {
		if r := c.anyRow(f); r != nil {
			try("-w", "-t", iptables.NATTable, "-F", iptables.DNATChain(r))
		}
	}

	if c.variant == iptables.Legacy {
		faults["lock held"] = func() { c.holdLock() }
	}

	return faults
}

func (c *chaos) tryCommit(msgs ...netlink.Message) {
	_ = c.reader().Commit(c.t.Context(), 0, msgs) // it may not be there
}

func (c *chaos) anyRow(f IPFamily) *row.Row {
	rows := c.allRows(f)
	if len(rows) == 0 {
		return nil
	}

	return pick(c, rows)
}

// A runtime that is killed at any moment leaves what New and Sync make exactly what
// it is to be.
func TestKills(t *testing.T) {
	kills := 8

	if v := os.Getenv(killsVariable); v != "" {
		var err error
		kills, err = strconv.Atoi(v)
		require.NoError(t, err)
	}

	eachBackend(t, func(t *testing.T, n *node) {
		c := newChaos(t, n)
		begun := time.Now()
		p := n.start(false, defaultTimeout)
		p.obey(c.manyOrders()...)
		p.kill()

		whole := time.Since(begun)

		for i := range kills {
			p := n.launch(false, defaultTimeout)
			require.NoError(t, p.in.Encode(c.manyOrders()))
			time.Sleep(time.Duration(c.random.Int64N(int64(whole)))) //nolint:forbidigo // at any moment
			p.kill()
			c.choosePods()

			m := n.manager()
			require.NoError(t, n.sync(m, c.desired()))
			n.exactly(m, c.desired())
			require.NoError(t, m.Close())

			if t.Failed() {
				t.Fatalf("kill %d", i)
			}
		}

		t.Logf("%s: %d kills within %v of the start of a process", n.variant, kills, whole)
	})
}

// What a runtime has started ends with it.
func TestKilledWithChild(t *testing.T) {
	n := newNode(t, iptables.Legacy)
	started := filepath.Join(t.TempDir(), "pid")
	shim(t, "iptables-legacy-restore", "echo $$ >"+started+"; exec sleep 1000")

	p := n.start(false, defaultTimeout)
	require.NoError(t, p.in.Encode([]order{{Op: "add", ID: "id", Pod: podNumber(1)}}))

	var pid int

	n.soon(func() bool {
		text, _ := os.ReadFile(started)
		pid, _ = strconv.Atoi(strings.TrimSpace(string(text)))

		return pid > 0
	})
	p.kill()
	n.soon(func() bool { return !running(strconv.Itoa(pid)) })
}

// manyOrders take a runtime some time.
func (c *chaos) manyOrders() []order {
	orders := []order{{Op: "sync", Pods: c.desired()}}

	for i := range somePods {
		orders = append(orders, order{Op: "add", ID: podID(i), Pod: c.randomPod(podID(i))}, order{Op: "remove", ID: podID(c.random.IntN(somePods))})
	}

	return orders
}

// What a restart is like for a node with a thousand rows, and a firewall's reload
// under Run.
func TestThousandRows(t *testing.T) {
	rows := fitting(1000, 40)

	eachBackend(t, func(t *testing.T, n *node) {
		n.serve(0, "tcp", IPv4, 80)

		first := n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})
		pods := map[string][]*PodPortMapping{"first": {first}}

		for i := 1; i < rows; i++ {
			id := podID(i / 25)
			if pods[id] == nil {
				pods[id] = []*PodPortMapping{{Name: id, IP: net.IPv4(10, 88, 9, byte(i/25))}}
			}

			pods[id][0].PortMappings = append(pods[id][0].PortMappings, &PortMapping{HostPort: int32(10_000 + 7*i), ContainerPort: 80})
		}

		p := n.start(true, defaultTimeout)
		require.Empty(t, p.obey(order{Op: "sync", Pods: pods})[0].Err)

		var connects, failures atomic.Int32

		stop, done := make(chan struct{}), make(chan error, 1)

		go func() {
			done <- n.Client.Do(func() error { return keepAsking(t.Context(), n, IPv4, stop, &connects, &failures) })
		}()

		p.kill()

		begun := time.Now()
		p = n.start(true, defaultTimeout)
		took := time.Since(begun)

		held := slices.DeleteFunc(p.begun, func(m Mapping) bool { return !m.Held })
		assert.Len(t, held, rows)
		require.Empty(t, p.obey(order{Op: "sync", Pods: pods})[0].Err)
		close(stop)
		require.NoError(t, <-done)
		assert.NotZero(t, connects.Load())
		assert.Zero(t, failures.Load())
		t.Logf("%s: %d ports held again %v after the start of a process; %d connections meanwhile, %d failed",
			n.variant, len(held), took, connects.Load(), failures.Load())

		// Whatever it takes for all to carry connections again.
		all := rowsOfAll(t, IPv4, pods)
		reload := map[string]func(){"all flushed": n.wipeAll}

		if n.variant != iptables.Legacy {
			reload["nft flush ruleset"] = func() { n.command("nft", "flush", "ruleset") }
		}

		for name, wipe := range reload {
			wipe()

			begun := time.Now()
			n.answered(netip.AddrPortFrom(n.nodeIP(IPv4), 8080))
			took := time.Since(begun) // in one transaction: with one row, all are there
			assert.Empty(t, n.deviations(IPv4, all), name)
			t.Logf("%s: %s: repaired after %v", n.variant, name, took)
		}
	})
}

// answered waits until a request is answered.
func (n *node) answered(to netip.AddrPort) {
	n.t.Helper()
	require.Eventually(n.t, func() bool {
		ctx, cancel := context.WithTimeout(n.t.Context(), testbed.Stretch(100*time.Millisecond))
		defer cancel()

		_, err := n.Client.Ask(ctx, "tcp", to)

		return err == nil
	}, patience, time.Millisecond)
}

// take has a process of others give back the ports that it has, and perhaps take
// some that no pod has.
func (c *chaos) take() {
	for k, l := range c.taken {
		assert.NoError(c.t, l.Close())
		delete(c.taken, k)
	}

	for range 4 * c.random.IntN(3) {
		k := row.PortKey{Proto: row.TCP, Port: uint16(firstPort + c.random.IntN(somePorts))}
		if c.taken[k] != nil || c.mapped(k) {
			continue
		}

		c.do(func() {
			l, err := net.Listen("tcp4", fmt.Sprintf("0.0.0.0:%d", k.Port))
			require.NoError(c.t, err)

			c.taken[k] = l
			c.t.Cleanup(func() { _ = l.Close() })
		})
	}
}

func (c *chaos) mapped(k row.PortKey) bool {
	for _, rows := range c.model {
		if slices.ContainsFunc(rows, func(r *row.Row) bool { return r.PortKey == k }) {
			return true
		}
	}

	return false
}

// withoutIPv6 has the node lose all its IPv6 addresses, and get them again.
func (c *chaos) withoutIPv6() {
	c.sysctl("net/ipv6/conf/all/disable_ipv6", "1")
	c.sysctl("net/ipv6/conf/all/disable_ipv6", "0")

	for device, addrs := range map[string][]netip.Addr{
		"eth0": {c.NodeIP(true), c.OtherNodeIP(true)}, "eth1": {netip.MustParseAddr("2001:db8:2::1")},
		"cni0": {netip.MustParseAddr("fd00:10:88::1")},
	} {
		for _, ip := range addrs {
			require.NoError(c.t, c.Host.AddAddress(device, netip.PrefixFrom(ip, 64)))
		}
	}

	c.lostAddresses()
	c.forget(func(k *client) bool { return k.family == IPv6 })
}

// storms has more news of nf_tables than the runtime has room for while it cannot
// listen. What breaks then is not among what it hears.
func (c *chaos) storms(breakIt func()) {
	conn := c.nfnetlink()
	table := nfnetlink.Table{Family: unix.NFPROTO_IPV4, Name: "storm"}
	set := nfnetlink.Set{Name: "many", Key: []nfnetlink.DataType{nfnetlink.InetService}}

	msgs := []netlink.Message{table.Create(), table.CreateSet(set)}
	for port := range 2000 {
		msgs = append(msgs, table.AddElement(set.Name, nfnetlink.Element{Key: nftables.AppendPort(nil, uint16(port)), Comment: strings.Repeat("x", 100)}))
	}

	require.NoError(c.t, c.runtime.cmd.Process.Signal(syscall.SIGSTOP))
	defer func() { require.NoError(c.t, c.runtime.cmd.Process.Signal(syscall.SIGCONT)) }()

	before := c.lost()

	for range 100 {
		if c.lost() > before {
			breakIt()

			return
		}

		require.NoError(c.t, conn.Commit(c.t.Context(), 0, msgs))
		require.NoError(c.t, conn.Commit(c.t.Context(), 0, []netlink.Message{table.Delete()}))
	}

	assert.Fail(c.t, "nothing is ever lost")
}

// lost is how many messages did not find room, in all sockets that listen.
func (c *chaos) lost() int {
	lost := 0

	for line := range strings.Lines(c.command("cat", "/proc/self/net/netlink")) {
		if words := strings.Fields(line); words[1] == strconv.Itoa(unix.NETLINK_NETFILTER) {
			n, err := strconv.Atoi(words[8])
			require.NoError(c.t, err)

			lost += n
		}
	}

	return lost
}

// holdLock has somebody hold the xtables lock for a while.
func (c *chaos) holdLock() {
	time.AfterFunc(time.Duration(100+c.random.IntN(3000))*time.Millisecond, lockXtables(c.t))
}

// check compares everything with the model. What others have broken is repaired
// within a while.
func (c *chaos) check(what string) {
	rows := map[IPFamily][]*row.Row{IPv4: c.allRows(IPv4), IPv6: c.allRows(IPv6)}

	deadline := time.After(testbed.Stretch(15 * time.Second)) // with a lock that is held, and a repair that has failed once

	for list := []string{""}; len(list) > 0; {
		list = nil
		for _, f := range []IPFamily{IPv4, IPv6} {
			list = append(list, c.deviations(f, rows[f])...)
			list = append(list, c.changedLayout(f, rows[f])...)
			list = append(list, c.changedServices(f)...)
		}

		if len(list) == 0 && c.compareFlows {
			list = append(c.staleFlows(IPv4), c.staleFlows(IPv6)...)
		}

		select {
		case <-deadline:
			require.Empty(c.t, list, what)
		case <-time.After(10 * time.Millisecond):
		}
	}

	c.checkTable(what, rows)
	c.checkSockets(what, rows)
	c.checkTraffic(what)
	c.checkClients()
	c.checkOthers()

	if c.t.Failed() {
		c.t.Log(what)
	}
}

// rulesNow are the rules of our table of nftables, if it is there.
func (c *chaos) rulesNow(f IPFamily) string {
	var out string

	c.do(func() {
		out, _ = execute(c.t, "", "nft", "--stateless", "--terse", "list", "table", nftFamily(f), nftables.TableName)
	})

	return out
}

// changedLayout tells if our table of nftables has other rules than at first.
func (c *chaos) changedLayout(f IPFamily, rows []*row.Row) []string {
	if c.variant != viaNFTables || len(rows) == 0 || c.layout[f] == c.rulesNow(f) {
		return nil
	}

	return []string{"rules: " + c.rulesNow(f)}
}

func nftFamily(f IPFamily) string {
	if f == IPv6 {
		return "ip6"
	}

	return "ip"
}

func (c *chaos) checkTable(what string, rows map[IPFamily][]*row.Row) {
	want, have := map[string]bool{}, map[string]bool{}

	for _, r := range slices.Concat(rows[IPv4], rows[IPv6]) {
		want[r.Owner.ID+" "+r.String()] = true
	}

	for _, mapping := range c.runtime.obey(order{Op: "mappings"})[0].Mappings {
		have[mapping.text()] = true

		assert.Equal(c.t, mapping.Protocol != v1.ProtocolSCTP, mapping.Held, mapping)
	}

	assert.Equal(c.t, want, have, what)
}

// text is as the row's, with its owner.
func (m Mapping) text() string {
	return fmt.Sprintf("%s %s %s -> %s", m.PodID, m.Protocol,
		net.JoinHostPort(m.HostIP, strconv.Itoa(int(m.HostPort))),
		net.JoinHostPort(m.PodIP.String(), strconv.Itoa(int(m.ContainerPort))))
}

// checkSockets tries to bind every port, as any other process would.
func (c *chaos) checkSockets(what string, rows map[IPFamily][]*row.Row) {
	c.do(func() {
		for _, f := range []IPFamily{IPv4, IPv6} {
			for port := firstPort; port < firstPort+somePorts; port++ {
				addr := net.JoinHostPort(f.AnyAddr().String(), strconv.Itoa(port))
				is := func(p row.Protocol) bool {
					k := row.PortKey{Proto: p, Port: uint16(port)}
					mine := func(r *row.Row) bool { return r.PortKey == k }

					return slices.ContainsFunc(rows[f], mine) || f == IPv4 && c.taken[k] != nil
				}

				l, err := net.Listen("tcp"+string(f), addr)
				assert.Equal(c.t, is(row.TCP), errors.Is(err, syscall.EADDRINUSE), "%s: tcp %s: %v", what, addr, err)

				if err == nil {
					_ = l.Close()
				}

				p, err := net.ListenPacket("udp"+string(f), addr)
				assert.Equal(c.t, is(row.UDP), errors.Is(err, syscall.EADDRINUSE), "%s: udp %s: %v", what, addr, err)

				if err == nil {
					_ = p.Close()
				}
			}
		}
	})
}

// checkTraffic asks at a sample of ports, with rows and without.
func (c *chaos) checkTraffic(what string) {
	for _, f := range []IPFamily{IPv4, IPv6} {
		for range 2 {
			to := row.Endpoint{PortKey: row.PortKey{Proto: row.TCP, Port: uint16(firstPort + c.random.IntN(somePorts))}, IP: pick(c, c.hostIPs(f))}

			if r := c.anyRow(f); r != nil && r.Proto != row.SCTP && c.random.IntN(2) == 0 {
				to.PortKey = r.PortKey
			}

			c.askAt(to)

			if c.t.Failed() {
				c.t.Log(what)
			}
		}
	}
}

func (c *chaos) askAt(to row.Endpoint) {
	at := netip.AddrPortFrom(to.IP, to.Port)

	by, _ := c.rowsAt(to)
	if !c.leads(to.IP) {
		by = nil
	}

	switch {
	case by != nil:
		if pod := c.podOf(by.Pod.Addr()); !c.silent[pod] {
			c.answers(c.Client, string(to.Proto), at, c.Pods[pod].Name)
		}
	case c.taken[to.PortKey] == nil && to.Proto == row.TCP:
		c.refused(c.Client, "tcp", at)
	}
}
