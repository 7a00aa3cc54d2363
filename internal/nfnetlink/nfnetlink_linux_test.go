package nfnetlink

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mdlayher/netlink"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// dial opens a connection in a network namespace that ends with the test.
func dial(t *testing.T) *Conn {
	t.Helper()

	c, l := dialAndListen(t)
	require.NoError(t, l.Close())

	return c
}

// dialTwice opens two connections in one namespace.
func dialTwice(t *testing.T) (c, other *Conn) {
	t.Helper()

	inNamespace(t, func() (err error) {
		if c, err = Dial(); err == nil {
			other, err = Dial()
		}

		return err
	})
	t.Cleanup(func() { assert.NoError(t, errors.Join(c.Close(), other.Close())) })

	return c, other
}

func dialAndListen(t *testing.T) (*Conn, *Listener) {
	t.Helper()

	var (
		c *Conn
		l *Listener
	)

	inNamespace(t, func() (err error) {
		if c, err = Dial(); err == nil {
			l, err = Listen()
		}

		return err
	})
	t.Cleanup(func() { assert.NoError(t, c.Close()) })

	return c, l
}

// inNamespace calls open in a network namespace that ends with what it opens.
func inNamespace(t *testing.T, open func() error) {
	t.Helper()

	done := make(chan error)

	go func() {
		runtime.LockOSThread() // for good: the thread ends with this goroutine

		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			err = open()
		}
		done <- err
	}()
	require.NoError(t, <-done, "be root, or run under unshare -Urn")
}

//nolint:gochecknoglobals // constants in all but name
var (
	table = Table{Family: unix.NFPROTO_IPV6, Name: "test", Comment: "of a test"}
	set   = Set{Name: "pairs", Key: []DataType{InetProto, InetService}, Comment: "a set"}
	ports = Set{Name: "ports", Key: []DataType{InetService}, Data: []DataType{IPv6Addr, InetService}, Comment: "a map"}
)

func element(n int) Element {
	return Element{Key: []byte{6, 0, 0, 0, byte(n >> 8), byte(n), 0, 0}, Comment: fmt.Sprint("element ", n)}
}

func commit(t *testing.T, c *Conn, msgs ...netlink.Message) {
	t.Helper()

	gen, err := c.Generation(t.Context())
	require.NoError(t, err)
	require.NoError(t, c.Commit(t.Context(), gen, msgs))

	after, err := c.Generation(t.Context())
	require.NoError(t, err)
	assert.Equal(t, NextGeneration(gen), after)
}

func elements(t *testing.T, c *Conn, set string) []Element {
	t.Helper()

	msgs, err := c.Dump(t.Context(), table.Elements(set))
	require.NoError(t, err)

	var list []Element

	for _, m := range msgs {
		some, err := ParseElements(m)
		require.NoError(t, err)

		list = append(list, some...)
	}

	return list
}

func TestObjects(t *testing.T) {
	t.Parallel()

	c := dial(t)
	entry := Element{Key: []byte{0, 80, 0, 0}, Data: append(net.ParseIP("2001:db8::1"), 31, 144, 0, 0), Comment: "to 8080"}
	objects := []netlink.Message{
		table.Create(), table.CreateSet(set), table.CreateSet(ports),
		table.CreateChain(Chain{Name: "base", Type: "nat", Hook: unix.NF_INET_PRE_ROUTING, Priority: -100}),
		table.CreateChain(Chain{Name: "other"}),
		table.AppendRule("base", LoadProtocol(1), LoadTransportHeader(2, 2, 9), InSet(set.Name, 1), Goto("other")),
		table.AppendRule("other", LoadDestinationType(1), EqualTo(1, unix.RTN_LOCAL),
			LoadTransportHeader(2, 2, 1), LookUp(ports.Name, 1, 1), DNAT(table.Family, 1, 2)),
	}
	commit(t, c, append(objects, table.AddElement(set.Name, element(1)), table.AddElement(ports.Name, entry))...)

	assert.Equal(t, []Element{element(1)}, elements(t, c, set.Name))
	assert.Equal(t, []Element{entry}, elements(t, c, ports.Name))
	assert.Empty(t, elements(t, c, "none"))

	answers, err := c.Get(t.Context(),
		table.GetElement(set.Name, element(1).Key), table.GetElement(set.Name, element(2).Key), table.GetElement("none", element(1).Key),
		table.Get(), Table{Family: table.Family, Name: "none"}.Get(), table.GetChain("base"), table.GetChain("none"))
	require.NoError(t, err)

	there := make([]bool, len(answers))
	for i, a := range answers {
		there[i] = a != nil
	}

	assert.Equal(t, []bool{true, false, false, true, false, true, false}, there)

	found, err := ParseElements(*answers[0])
	require.NoError(t, err)
	assert.Equal(t, []Element{element(1)}, found)

	info, err := ParseTable(*answers[3])
	require.NoError(t, err)
	assert.NotZero(t, info.Handle)

	rules := func() []RuleInfo {
		msgs, err := c.Dump(t.Context(), table.Rules())
		require.NoError(t, err)

		list := make([]RuleInfo, len(msgs))
		for i, m := range msgs {
			list[i], err = ParseRule(m)
			require.NoError(t, err)
		}

		return list
	}
	before := rules()
	require.Len(t, before, 2)
	assert.Equal(t, "base", before[0].Chain)

	commit(t, c, table.FlushChain("base"), objects[5])
	assert.NotEqual(t, before[0].Handle, rules()[0].Handle, "another rule")
	assert.Equal(t, before[1], rules()[1], "the same")

	commit(t, c, table.DeleteElement(set.Name, element(1)), table.FlushChain("other"), table.FlushChain("base"), table.DeleteChain("other"))
	assert.Empty(t, elements(t, c, set.Name))
	assert.Empty(t, rules())

	commit(t, c, table.Delete(), table.Create())

	answers, err = c.Get(t.Context(), table.Get())
	require.NoError(t, err)

	again, err := ParseTable(*answers[0])
	require.NoError(t, err)
	assert.NotEqual(t, info.Handle, again.Handle)
}

// A transaction takes effect as a whole or not at all, and tells why not.
func TestCommitFails(t *testing.T) {
	t.Parallel()

	c := dial(t)
	commit(t, c, table.Create(), table.CreateSet(set), table.AddElement(set.Name, element(1)))

	gen, err := c.Generation(t.Context())
	require.NoError(t, err)

	for _, tc := range []struct {
		name  string
		gen   uint32
		msgs  []netlink.Message
		at    int
		want  error
		words string
	}{
		{"stale", gen - 1, []netlink.Message{table.AddElement(set.Name, element(2))}, 0, ErrStale, "changed"},
		{"stale and empty", gen - 1, nil, 0, ErrStale, "changed"},
		{"there already", gen, []netlink.Message{table.AddElement(set.Name, element(2)), table.AddElement(set.Name, element(1))}, 1, unix.EEXIST, "add element to set pairs"},
		{"not there", gen, []netlink.Message{table.AddElement(set.Name, element(2)), table.DeleteElement(set.Name, element(3))}, 1, unix.ENOENT, "delete element of set pairs"},
		{"two, of which the first is told", gen, []netlink.Message{table.AddElement("a", element(2)), table.AddElement("b", element(1))}, 0, unix.ENOENT, "set a"},
		{"no table", gen, []netlink.Message{Table{Family: table.Family, Name: "none"}.CreateChain(Chain{Name: "new"})}, 0, unix.ENOENT, "add chain new"},
		{"no set", gen, []netlink.Message{table.DeleteSet("none")}, 0, unix.ENOENT, "delete set none"}, // one of other types Linux 5.10 ignores
	} {
		err := c.Commit(t.Context(), tc.gen, tc.msgs)
		require.ErrorIs(t, err, tc.want, tc.name)
		require.ErrorContains(t, err, tc.words, tc.name)

		if batch := (*BatchError)(nil); !errors.Is(tc.want, ErrStale) && assert.ErrorAs(t, err, &batch, tc.name) {
			assert.Equal(t, tc.at, batch.Message, tc.name)
		}

		assert.Equal(t, []Element{element(1)}, elements(t, c, set.Name), tc.name)
	}

	require.NoError(t, c.Commit(t.Context(), gen, nil))
	require.NoError(t, c.Commit(t.Context(), gen, []netlink.Message{table.AddElement(set.Name, element(2))}), "the socket goes on")
}

// Hundreds of messages refused at once are more than the socket has room to
// tell of.
func TestCommitFailsAltogether(t *testing.T) {
	t.Parallel()

	c := dial(t)
	commit(t, c, table.Create(), table.CreateSet(set))

	gen, err := c.Generation(t.Context())
	require.NoError(t, err)

	var msgs []netlink.Message
	for i := range 5000 {
		msgs = append(msgs, table.DeleteElement(set.Name, element(i)))
	}

	require.Error(t, c.Commit(t.Context(), gen, msgs))

	after, err := c.Generation(t.Context())
	require.NoError(t, err, "answers from before do not confuse it")
	assert.Equal(t, gen, after)
}

// Check goes through everything and changes nothing.
func TestCheck(t *testing.T) {
	t.Parallel()

	c := dial(t)
	gen, err := c.Generation(t.Context())
	require.NoError(t, err)

	good := []netlink.Message{table.Create(), table.CreateSet(set), table.AddElement(set.Name, element(1))}
	require.NoError(t, c.Check(t.Context(), good))
	require.ErrorIs(t, c.Check(t.Context(), append(good, table.AddElement("none", element(1)))), unix.ENOENT)

	after, err := c.Generation(t.Context())
	require.NoError(t, err)
	assert.Equal(t, gen, after)

	answers, err := c.Get(t.Context(), table.Get())
	require.NoError(t, err)
	assert.Nil(t, answers[0])
}

// Tens of thousands of elements, 2 MB and more, go in one transaction and come
// back.
func TestLargeCommit(t *testing.T) {
	t.Parallel()

	many := 30_000

	// With the kernel's default limit, which other user namespaces cannot pass.
	if uids, err := os.ReadFile("/proc/self/uid_map"); err != nil || !strings.Contains(string(uids), "4294967295") {
		many = 2000
	}

	c := dial(t)
	msgs := []netlink.Message{table.Create(), table.CreateSet(set)}
	requests := make([]netlink.Message, many)

	for i := range many {
		msgs = append(msgs, table.AddElement(set.Name, element(i)))
		requests[i] = table.GetElement(set.Name, element(i).Key)
	}

	commit(t, c, msgs...)
	assert.Len(t, elements(t, c, set.Name), many)

	answers, err := c.Get(t.Context(), requests...)
	require.NoError(t, err)

	for i, a := range answers {
		require.NotNil(t, a)

		found, err := ParseElements(*a)
		require.NoError(t, err)
		require.Equal(t, []Element{element(i)}, found)
	}
}

// What the kernel says of an error is told, and an answer that is cut short does no harm.
func TestErrors(t *testing.T) {
	t.Parallel()

	errno := native(0xffffffff)                                              // -EPERM
	request := append(native(1<<16+4), bytes.Repeat([]byte{0x7f}, 1<<16)...) // does not pass for an attribute
	words := binary.NativeEndian.AppendUint16(binary.NativeEndian.AppendUint16(nil, 10), unix.NLMSGERR_ATTR_MSG)
	words = append(words, "wrong\x00\x00\x00"...)

	for name, m := range map[string]syscall.NetlinkMessage{
		"of a request": {Header: syscall.NlMsghdr{Type: unix.NLMSG_ERROR, Flags: unix.NLM_F_ACK_TLVS, Seq: 7}, Data: slices.Concat(errno, request, words)},
		"of a list":    {Header: syscall.NlMsghdr{Type: unix.NLMSG_DONE, Flags: unix.NLM_F_ACK_TLVS, Seq: 7}, Data: slices.Concat(errno, words)},
	} {
		assert.Equal(t, &netlink.OpError{Op: "receive", Err: unix.EPERM, Message: "wrong", Sequence: 7}, errorIn(m), name)

		for short := range m.Data {
			_ = errorIn(syscall.NetlinkMessage{Header: m.Header, Data: m.Data[:short]})
		}

		m.Header.Flags = 0
		assert.Equal(t, &netlink.OpError{Op: "receive", Err: unix.EPERM, Sequence: 7}, errorIn(m), name)

		m.Data = native(0)
		require.NoError(t, errorIn(m), name)
	}

	c := dial(t)
	c.buf = c.buf[:30] // an answer has more

	_, err := c.Generation(t.Context())
	require.ErrorContains(t, err, "want at most 30")
}

func TestClosedOrTooLate(t *testing.T) {
	t.Parallel()

	c := dial(t)

	late, cancel := context.WithDeadline(t.Context(), time.Now())
	defer cancel()

	_, err := c.Generation(late)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.ErrorIs(t, c.Commit(late, 1, []netlink.Message{table.Create()}), context.DeadlineExceeded)

	_, err = c.Generation(t.Context())
	require.NoError(t, err)

	require.NoError(t, c.Close())
	require.NoError(t, c.Close(), "again")

	_, err = c.Generation(t.Context())
	require.ErrorIs(t, err, net.ErrClosed)
}

// Numbers are in network byte order but for those in user data and registers,
// whatever the machine.
func TestByteOrder(t *testing.T) {
	t.Parallel()

	m := table.CreateChain(Chain{Name: "c", Type: "nat", Hook: 3, Priority: -100})
	assert.Contains(t, string(m.Data), "\x08\x00\x01\x00\x00\x00\x00\x03"[4:], "hook number")
	assert.Contains(t, string(m.Data), "\xff\xff\xff\x9c", "priority")

	m = table.AppendRule("c", EqualTo(1, 2))
	assert.Contains(t, string(m.Data), string(native(2)))

	m = table.CreateSet(ports)
	assert.Contains(t, string(m.Data), "\x00\x00\x02\x0d", "8 << 6 | 13: ipv6_addr . inet_service")
	assert.Contains(t, string(m.Data), "\x07\x06a map\x00", "comment")
}

func TestComments(t *testing.T) {
	t.Parallel()

	long := strings.Repeat("x", 300)
	assert.Equal(t, long[:maxComment], parseComment(comment(udataElemComment, long)))
	assert.Empty(t, parseComment(comment(udataSetComment, "of another kind")))
	assert.Equal(t, "c", parseComment(append(udata(5, []byte("abc")), comment(udataElemComment, "c")...)))
	assert.Empty(t, parseComment([]byte{0, 200, 'c'}), "cut off")
}

func FuzzParse(f *testing.F) {
	f.Add(table.AddElement(set.Name, element(1)).Data)
	f.Add(table.Create().Data)
	f.Add(table.AppendRule("c", Goto("other")).Data)
	f.Add([]byte{0, 0, 0})

	f.Fuzz(func(t *testing.T, data []byte) {
		m := netlink.Message{Data: data}
		_, _ = ParseTable(m)
		_, _ = ParseRule(m)
		_, _ = ParseTrace(m)
		_ = describe(m)
		_, _, _ = parseFlow(m)

		list, err := ParseElements(m)
		if err != nil {
			return
		}

		for _, e := range list {
			again, err := ParseElements(table.AddElement("set", e))
			require.NoError(t, err)
			require.Len(t, again, 1)
			assert.True(t, bytes.Equal(e.Key, again[0].Key))
			assert.True(t, bytes.Equal(e.Data, again[0].Data))
		}
	})
}

// Whoever comes too late to hear it all is told so, and hears what comes then.
func TestListener(t *testing.T) {
	t.Parallel()

	c, l := dialAndListen(t)
	watchdog := time.AfterFunc(10*time.Second, func() { _ = l.Close() })

	defer watchdog.Stop()

	next := func() Transaction {
		t.Helper()

		heard, err := l.Next()
		require.NoError(t, err)

		return heard
	}

	commit(t, c, table.Create(), table.CreateChain(Chain{Name: "other"}))

	heard := next()
	assert.NotZero(t, heard.Generation)
	assert.Equal(t, map[Change]bool{
		{Family: table.Family, Table: table.Name}:                 true,
		{Family: table.Family, Table: table.Name, Chain: "other"}: true,
	}, heard.Changes)

	commit(t, c, table.AppendRule("other", Drop()))
	assert.Contains(t, next().Changes, Change{
		Family: table.Family, Table: table.Name, Chain: "other", Last: KernelAtLeast(5, 15),
	})

	first := table.AppendRule("other", Drop())
	first.Header.Flags &^= netlink.Append
	commit(t, c, first)
	assert.Contains(t, next().Changes, Change{Family: table.Family, Table: table.Name, Chain: "other"})

	require.NoError(t, l.nl.SetReadBuffer(1<<14))

	for range 100 {
		commit(t, c, table.CreateChain(Chain{Name: "another"}))
		commit(t, c, table.DeleteChain("another"))
	}

	assert.Zero(t, next().Generation)
	commit(t, c, table.Delete())

	heard = next()
	assert.NotZero(t, heard.Generation)
	assert.Contains(t, heard.Changes, Change{Family: table.Family, Table: table.Name, Deleted: true})
}

// An owned table is for the connection that made it alone, and goes with it.
func TestOwnedTable(t *testing.T) {
	t.Parallel()

	c, other := dialTwice(t)
	owned := table
	owned.Owned = true
	err := c.Commit(t.Context(), 0, []netlink.Message{owned.Create(), owned.CreateChain(Chain{Name: "c"})})

	if !KernelAtLeast(5, 12) {
		require.ErrorIs(t, err, unix.EINVAL)

		return
	}

	require.NoError(t, err)
	require.NoError(t, c.Commit(t.Context(), 0, []netlink.Message{owned.DeleteChain("c")}))
	require.ErrorIs(t, other.Commit(t.Context(), 0, []netlink.Message{table.Delete()}), unix.EPERM)

	there := func() bool {
		answers, err := other.Get(t.Context(), table.Get())
		require.NoError(t, err)

		return answers[0] != nil
	}
	assert.True(t, there())
	require.NoError(t, c.Close())
	assert.False(t, there())
}
