package hostport

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"k8s.io/klog/v2"
	"k8s.io/klog/v2/ktesting"

	"github.com/cri-o/hostport/internal/iptables"
	"github.com/cri-o/hostport/internal/memory"
	"github.com/cri-o/hostport/internal/nfnetlink"
	"github.com/cri-o/hostport/internal/nftables"
	"github.com/cri-o/hostport/internal/row"
	"github.com/cri-o/hostport/internal/testbed"
)

// node is a host under test, with pods behind it and a client before it. What
// touches its network runs in its namespace by way of do.
type node struct {
	*testbed.Bed

	t       testing.TB
	variant iptables.Variant
	reads   *nfnetlink.Conn // see reader
	memory  *memory.Node    // of viaMemory
}

// viaNFTables stands for no iptables at all, but nftables.
const viaNFTables iptables.Variant = "nftables"

// viaMemory stands for a node in memory, which has no namespaces and where no packet goes
// anywhere.
const viaMemory iptables.Variant = "memory"

// backends are those that every behaviour is tested on.
func backends() []iptables.Variant {
	return []iptables.Variant{viaNFTables, iptables.NFT, iptables.Legacy}
}

// eachBackend runs f on a fresh node for each backend.
func eachBackend(t *testing.T, f func(t *testing.T, n *node)) {
	t.Helper()

	for _, v := range backends() {
		t.Run(string(v), func(t *testing.T) { f(t, newBehaviourNode(t, v)) })
	}
}

// everywhere is backends, and memory: what takes no packets but those of answers and
// refused is tested on it as well, so that callers' tests have what is true of the kernel.
func everywhere() []iptables.Variant { return append(backends(), viaMemory) }

// eachNode runs f on a fresh node for each backend, and in memory.
func eachNode(t *testing.T, f func(t *testing.T, n *node)) {
	t.Helper()

	for _, v := range everywhere() {
		t.Run(string(v), func(t *testing.T) { f(t, newBehaviourNode(t, v)) })
	}
}

// eachFamily runs f on a fresh node for each backend and IP family.
func eachFamily(t *testing.T, f func(t *testing.T, n *node, family IPFamily)) {
	t.Helper()
	eachFamilyOf(t, backends(), f)
}

// eachFamilyOf runs f on a fresh node for each of some backends and IP family.
func eachFamilyOf(t *testing.T, some []iptables.Variant, f func(t *testing.T, n *node, family IPFamily)) {
	t.Helper()

	for _, v := range some {
		for _, family := range []IPFamily{IPv4, IPv6} {
			t.Run(string(v)+"/IPv"+string(family), func(t *testing.T) { f(t, newBehaviourNode(t, v), family) })
		}
	}
}

// eachVariant runs f on a fresh node for each variant of iptables.
func eachVariant(t *testing.T, f func(t *testing.T, n *node)) {
	t.Helper()

	for _, v := range []iptables.Variant{iptables.NFT, iptables.Legacy} {
		t.Run(string(v), func(t *testing.T) { f(t, newNode(t, v)) })
	}
}

// eachVariantAndFamily runs f on a fresh node for each variant of iptables and
// IP family.
func eachVariantAndFamily(t *testing.T, f func(t *testing.T, n *node, family IPFamily)) {
	t.Helper()
	eachFamilyOf(t, []iptables.Variant{iptables.NFT, iptables.Legacy}, f)
}

// programsVariable is an environment variable with the PATH that tests have while the library
// has an empty one.
const programsVariable = "HOSTPORT_TEST_PATH"

// newBehaviourNode is newNode, with no program for the library to start where it uses nftables.
func newBehaviourNode(t *testing.T, v iptables.Variant) *node {
	t.Helper()

	if v == viaMemory {
		return newMemoryNode(t)
	}

	if v == viaNFTables {
		t.Setenv(programsVariable, os.Getenv("PATH"))
		t.Setenv("PATH", t.TempDir())
	}

	return newNode(t, v)
}

// anyNode makes a node with the backend that is taken by default.
func anyNode(tb testing.TB) *node {
	tb.Helper()

	return newNode(tb, backends()[0])
}

// newNode makes a node with two pods, web and other. Its managers use nftables,
// or the variant of iptables that the kubelet says the node uses.
func newNode(tb testing.TB, v iptables.Variant) *node {
	tb.Helper()

	bed, err := testbed.New("web", "other")
	require.NoError(tb, err)
	tb.Cleanup(func() { assert.NoError(tb, bed.Close()) })

	n := &node{Bed: bed, t: tb, variant: v}
	if v != viaNFTables {
		n.hint(v)
	}

	return n
}

// newMemoryNode makes a node in memory with the pods that newNode makes.
func newMemoryNode(tb testing.TB) *node {
	tb.Helper()

	bed := &testbed.Bed{}
	for i, name := range []string{"web", "other"} {
		bed.Pods = append(bed.Pods, &testbed.Pod{
			Namespace: &testbed.Namespace{Name: name},
			IPv4:      netip.AddrFrom4([4]byte{10, 88, 0, byte(2 + i)}),
			IPv6:      netip.MustParseAddr("fd00:10:88::" + strconv.Itoa(2+i)),
		})
	}

	return &node{Bed: bed, t: tb, variant: viaMemory, memory: &memory.Node{}}
}

func (n *node) hint(v iptables.Variant) {
	for _, family := range []IPFamily{IPv4, IPv6} {
		n.command(iptables.Command(family)+"-"+string(v), "-t", "mangle", "-N", "KUBE-IPTABLES-HINT")
	}
}

// on has managers use the node's backend.
func (n *node) on() Option {
	if n.variant == viaMemory {
		return WithMemory(n.memory)
	}

	return WithBackend(n.backend())
}

// backend is the one that the node's managers use.
func (n *node) backend() Backend {
	switch n.variant {
	case viaNFTables:
		return BackendNFTables
	case viaMemory:
		return memory.Kind
	default:
		return BackendIPTables
	}
}

// within is the node for a subtest.
func (n *node) within(t *testing.T) *node {
	t.Helper()

	return &node{Bed: n.Bed, t: t, variant: n.variant, memory: n.memory}
}

// do runs f in the host's namespace.
func (n *node) do(f func()) {
	n.t.Helper()
	require.NoError(n.t, n.onHost(func() error {
		f()

		return nil
	}))
}

// onHost runs f in the host's namespace, if the node has one, and returns its error.
func (n *node) onHost(f func() error) error {
	if n.variant == viaMemory {
		return f()
	}

	return n.Host.Do(f)
}

// command runs a program on the host and returns what it prints.
func (n *node) command(name string, args ...string) string {
	n.t.Helper()

	return n.commandWith("", name, args...)
}

func (n *node) commandWith(stdin, name string, args ...string) string {
	n.t.Helper()

	var out string

	n.do(func() {
		var err error
		out, err = execute(n.t, stdin, name, args...)
		require.NoError(n.t, err)
	})

	return out
}

// execute runs a program in the thread's namespace and returns what it prints.
func execute(tb testing.TB, stdin, name string, args ...string) (string, error) {
	tb.Helper()

	if path := os.Getenv(programsVariable); path != "" {
		name, args = "/usr/bin/env", append([]string{"PATH=" + path, name}, args...)
	}

	cmd := exec.CommandContext(tb.Context(), name, args...) //nolint:gosec // as the tests say
	cmd.Stdin = strings.NewReader(stdin)

	out, err := cmd.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%s %v: %w: %s", name, args, err, out)
	}

	return string(out), err
}

// iptables runs the node's iptables for the nat table.
func (n *node) iptables(f IPFamily, args ...string) {
	n.t.Helper()
	n.command(iptables.Command(f)+"-"+string(n.variant), append([]string{"-t", iptables.NATTable}, args...)...)
}

// rules returns what there is of a family in nf_tables, or in the nat table, as
// it can be compared: without counters, and without order where that means
// nothing.
func (n *node) rules(f IPFamily) []string {
	n.t.Helper()

	if n.variant == viaMemory {
		return n.memoryRules(f)
	}

	if n.variant == viaNFTables {
		return n.nftRules(f)
	}

	var rules []string

	for line := range strings.Lines(n.command(iptables.Command(f)+"-"+string(n.variant)+"-save", "-t", iptables.NATTable)) {
		if line = strings.TrimSpace(line); strings.HasPrefix(line, ":") {
			rules = append(rules, strings.Fields(line)[0])
		} else if strings.HasPrefix(line, iptables.CmdAppend) {
			rules = append(rules, line)
		}
	}

	return rules
}

// memoryRows are the rows of a family on a node in memory.
func (n *node) memoryRows(f IPFamily) []*row.Row {
	n.t.Helper()

	rows, _, err := n.memory.Backend(f).List(n.t.Context())
	require.NoError(n.t, err)

	return rows
}

// memoryRules have the form of nftables' elements.
func (n *node) memoryRules(f IPFamily) (rules []string) {
	n.t.Helper()

	for _, r := range n.memoryRows(f) {
		rules = append(rules, nftables.TableName+" element "+r.String()+" "+r.OwnerHash)
	}

	return rules
}

// ours are the rules and chains that bear our names, and the jumps there.
func (n *node) ours(f IPFamily) []string {
	n.t.Helper()

	return slices.DeleteFunc(n.rules(f), func(l string) bool { return !isOurs(l) })
}

// sorted compares rules where only the ranges that come and go differ in order.
func sorted(rules []string) []string { return slices.Sorted(slices.Values(rules)) }

func isOurs(line string) bool {
	return slices.ContainsFunc([]string{nftables.TableName, iptables.DNATDispatch, iptables.DNATPrefix, iptables.MasqDispatch, iptables.MasqPrefix}, func(name string) bool {
		return strings.Contains(line, name)
	})
}

// leftOver is what is ours beyond what stays without any row.
func (n *node) leftOver(f IPFamily) []string {
	n.t.Helper()

	return slices.DeleteFunc(n.ours(f), func(line string) bool {
		return !strings.Contains(line, iptables.DNATPrefix) && !strings.Contains(line, iptables.MasqPrefix) && !strings.Contains(line, " element ")
	})
}

// onlyBase asserts that what is ours is what stays without any row, all of it.
func (n *node) onlyBase(f IPFamily) {
	n.t.Helper()
	assert.Empty(n.t, n.leftOver(f))

	chains := 2
	assert.Len(n.t, n.ours(f), chains+len(iptables.NATRules(f, f == IPv4)))
}

// manager returns a new Manager on the node.
func (n *node) manager(opts ...Option) *Manager {
	n.t.Helper()

	opts = append([]Option{WithLogger(testLogger(n.t)), n.on()}, opts...)

	var m *Manager

	n.do(func() {
		var err error
		m, err = New(opts...)
		require.NoError(n.t, err)
	})
	n.t.Cleanup(func() { assert.NoError(n.t, m.Close()) })

	return m
}

// metaManager returns a manager in the thread's namespace, whether or not it works there.
func metaManager(tb testing.TB, opts ...Option) *Manager {
	tb.Helper()

	m, ok := NewMetaHostportManager(append([]Option{WithLogger(testLogger(tb))}, opts...)...).(*Manager)
	require.True(tb, ok)
	tb.Cleanup(func() { assert.NoError(tb, m.Close()) })

	return m
}

// oneFamily returns the manager of one family over an IPTables of the test's.
func (n *node) oneFamily(ipt IPTables, opts ...Option) *hostportManager {
	n.t.Helper()

	opts = append([]Option{WithLogger(testLogger(n.t))}, opts...)

	var m *hostportManager

	n.do(func() {
		var ok bool
		m, ok = NewHostportManager(ipt, opts...).(*hostportManager)
		require.True(n.t, ok)
	})
	n.t.Cleanup(func() { assert.NoError(n.t, m.Close()) })

	return m
}

func (n *node) realIPTables() IPTables {
	n.t.Helper()

	ipt, err := iptables.FindVariant(n.t.Context(), IPv4, n.variant)
	require.NoError(n.t, err)

	return ipt
}

func testLogger(tb testing.TB) klog.Logger {
	tb.Helper()

	return ktesting.NewLogger(tb, ktesting.NewConfig(ktesting.Verbosity(2)))
}

func (n *node) add(m HostPortManager, id string, pod *PodPortMapping) error {
	n.t.Helper()

	var err error

	n.do(func() { err = m.Add(id, pod, "") })

	return err
}

func (n *node) remove(m HostPortManager, id string, pod *PodPortMapping) error {
	n.t.Helper()

	var err error

	n.do(func() { err = m.Remove(id, pod) })

	return err
}

// atOnce calls do as often as told, all at the same time, each on a thread in the
// node's namespace, and returns what each returned.
func (n *node) atOnce(count int, do func(i int) error) []error {
	n.t.Helper()

	errs := make([]error, count)

	var ready, wg sync.WaitGroup

	ready.Add(count)

	for i := range count {
		wg.Go(func() {
			errs[i] = n.onHost(func() error {
				ready.Done()
				ready.Wait()

				return do(i)
			})
		})
	}

	wg.Wait()

	return errs
}

// podNumber is one of many pods, with a port of its own.
func podNumber(i int) *PodPortMapping {
	return &PodPortMapping{
		Namespace: "ns", Name: "pod" + strconv.Itoa(i), IP: net.IPv4(10, 88, 9, byte(i)),
		PortMappings: []*PortMapping{{HostPort: int32(8000 + i), ContainerPort: 80}},
	}
}

// leftBehind has a manager that is gone leave a pod's rows in the kernel.
func (n *node) leftBehind(id string, pod *PodPortMapping) {
	n.t.Helper()

	gone := n.manager()
	require.NoError(n.t, n.add(gone, id, pod))
	require.NoError(n.t, gone.Close())
}

// pod is the mapping of the node's i-th pod in one family.
func (n *node) pod(i int, f IPFamily, mappings ...*PortMapping) *PodPortMapping {
	p := n.Pods[i]

	return &PodPortMapping{
		Namespace: "ns", Name: p.Name, IP: net.IP(p.IP(f == IPv6).AsSlice()), PortMappings: mappings,
	}
}

func (n *node) nodeIP(f IPFamily) netip.Addr      { return n.NodeIP(f == IPv6) }
func (n *node) otherNodeIP(f IPFamily) netip.Addr { return n.OtherNodeIP(f == IPv6) }

// serve answers on a pod's port until the test ends.
func (n *node) serve(i int, network string, f IPFamily, port uint16) {
	n.t.Helper()

	if n.variant == viaMemory {
		return
	}

	_, err := n.Pods[i].Serve(network, netip.AddrPortFrom(n.Pods[i].IP(f == IPv6), port))
	require.NoError(n.t, err)
}

// patience bounds what a test waits for that must come.
var patience = testbed.Stretch(3 * time.Second) //nolint:gochecknoglobals // would be a constant if nothing were measured

// eventually asserts that a condition comes to hold. It is asked in the calling
// goroutine, so that it may run programs, and not past the test's end.
func eventually(tb testing.TB, condition func() bool, what ...any) bool {
	tb.Helper()

	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()

	for deadline := time.Now().Add(patience); !condition(); <-tick.C {
		if time.Now().After(deadline) {
			return assert.Fail(tb, "it did not come to hold", what...)
		}
	}

	return true
}

// leadsTo is the name of the pod that a row leads to on a node in memory.
func (n *node) leadsTo(network string, to netip.AddrPort) (pod string) {
	n.t.Helper()

	e := row.Endpoint{PortKey: row.PortKey{Proto: row.Protocol(network), Port: to.Port()}, IP: to.Addr()}

	for _, r := range n.memoryRows(row.FamilyOf(e.IP)) {
		i := slices.IndexFunc(n.Pods, func(p *testbed.Pod) bool { return p.IP(e.IP.Is6()) == r.Pod.Addr() })
		if i >= 0 && r.PortKey == e.PortKey && (r.IP == e.IP || !r.IP.IsValid() && pod == "") {
			pod = n.Pods[i].Name
		}
	}

	return pod
}

// takePort has another process serve a port of the host, until it is closed.
func (n *node) takePort(network, addr string) io.Closer {
	n.t.Helper()

	if n.variant != viaMemory {
		return n.hostService(network, addr)
	}

	to := netip.MustParseAddrPort(addr)
	e := row.Endpoint{PortKey: row.PortKey{Proto: row.Protocol(network), Port: to.Port()}}

	if !to.Addr().IsUnspecified() {
		e.IP = to.Addr()
	}

	free, err := n.memory.Occupy(e, row.FamilyOf(to.Addr()))
	require.NoError(n.t, err)

	return freed(free)
}

// freed is a port of a node in memory.
type freed func()

func (free freed) Close() error {
	free()

	return nil
}

// answers asserts that a request is answered, and returns how.
func (n *node) answers(from *testbed.Namespace, network string, to netip.AddrPort, by string) testbed.Answer {
	n.t.Helper()

	if n.variant == viaMemory {
		assert.Equal(n.t, by, n.leadsTo(network, to), "%s %s", network, to)

		return testbed.Answer{}
	}

	ctx, cancel := context.WithTimeout(n.t.Context(), patience)
	defer cancel()

	a, err := from.Ask(ctx, network, to)
	if assert.NoError(n.t, err, "%s %s from %s", network, to, from.Name) {
		assert.Equal(n.t, by, a.From, "%s %s from %s", network, to, from.Name)
	}

	return a
}

// refused asserts that a request is refused, and at once.
func (n *node) refused(from *testbed.Namespace, network string, to netip.AddrPort) {
	n.t.Helper()

	if n.variant == viaMemory {
		assert.Empty(n.t, n.leadsTo(network, to), "%s %s", network, to)

		return
	}

	ctx, cancel := context.WithTimeout(n.t.Context(), patience)
	defer cancel()

	_, err := from.Ask(ctx, network, to)
	assert.ErrorContains(n.t, err, "connection refused", "%s %s from %s", network, to, from.Name)
}

// dump is everything that an operation may change: rules of both families and
// variants, and the table.
func (n *node) dump(m interface{ Mappings() []Mapping }) string {
	n.t.Helper()

	var b strings.Builder

	for _, f := range []IPFamily{IPv4, IPv6} {
		fmt.Fprintln(&b, strings.Join(sorted(n.rules(f)), "\n"))
	}

	for _, mapping := range m.Mappings() {
		fmt.Fprintf(&b, "%+v\n", mapping)
	}

	return b.String()
}

// disowned is a dump in which no pod has the rows, as after a Remove that has failed.
func disowned(dump string) string {
	return regexp.MustCompile(`PodID:\S* Namespace:\S* Name:\S* `).ReplaceAllString(dump, "PodID: Namespace: Name: ")
}

// countWork returns a function that tells how much has been done in the kernel
// since it was last called: processes started, or changes of nf_tables.
func (n *node) countWork() func() int {
	n.t.Helper()

	if n.variant != viaNFTables {
		return countProcesses(n.t)
	}

	conn := n.nfnetlink()
	generation := func() int {
		gen, err := conn.Generation(context.Background())
		require.NoError(n.t, err)

		return int(gen)
	}
	seen := generation()

	return func() int {
		before := seen
		seen = generation()

		return seen - before
	}
}

// untilIdle waits until nothing that worked counts has been done while Run looked.
func untilIdle(t *testing.T, m *Manager, worked func() int) {
	t.Helper()
	worked()
	eventually(t, func() bool {
		untilLooked(t, m)

		return worked() == 0
	})
}

// countingLooks counts how often Run looks.
type countingLooks struct {
	backend

	looks *atomic.Int64
}

func (c countingLooks) Disturbed(transactions []nfnetlink.Transaction) bool {
	c.looks.Add(1)

	return c.backend.Disturbed(transactions)
}

// untilLooked waits until Run has looked three times, of which one has begun before it could
// hear of what has happened until now, and the last need not have ended.
func untilLooked(t *testing.T, m *Manager) {
	t.Helper()

	for _, fm := range m.families {
		use := func(change func(backend) backend) {
			fm.commitLock <- struct{}{}
			defer func() { <-fm.commitLock }()

			fm.backend = change(fm.backend)
		}
		looks := &atomic.Int64{}

		use(func(b backend) backend { return countingLooks{b, looks} })
		eventually(t, func() bool { return looks.Load() > 2 })
		use(func(b backend) backend {
			counting, ok := b.(countingLooks)
			require.True(t, ok)

			return counting.backend
		})
	}
}

// countProcesses puts a counter in front of every iptables program, and
// returns a function that tells how many have been started since it was last
// called.
func countProcesses(t testing.TB) func() int {
	t.Helper()

	dir := t.TempDir()
	log := filepath.Join(dir, "log")

	for _, base := range []string{"iptables", "ip6tables"} {
		for _, v := range []string{"", "-nft", "-legacy"} {
			for _, suffix := range []string{"", "-save", "-restore"} {
				name := base + v + suffix

				path, err := exec.LookPath(name)
				require.NoError(t, err)

				shim := fmt.Sprintf("#!/bin/sh\necho %s \"$@\" >>%s\nexec %s \"$@\"\n", name, log, path)
				require.NoError(t, os.WriteFile(filepath.Join(dir, name), []byte(shim), 0o700))
			}
		}
	}

	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))

	seen := 0

	return func() int {
		data, err := os.ReadFile(log)
		if !os.IsNotExist(err) {
			require.NoError(t, err)
		}

		all := bytes.Count(data, []byte("\n"))
		since := all - seen
		seen = all

		return since
	}
}
