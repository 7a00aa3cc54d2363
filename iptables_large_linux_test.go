package hostport

import (
	"errors"
	"fmt"
	"iter"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	v1 "k8s.io/api/core/v1"

	"github.com/cri-o/hostport/internal/iptables"
	"github.com/cri-o/hostport/internal/row"
)

// media is a pod with many ports, as of a server of RTP.
func (n *node) media(i int, f IPFamily, count int, protocol v1.Protocol) *PodPortMapping {
	pod := n.pod(i, f)

	for port := int32(20_000); len(pod.PortMappings) < count; port++ {
		pod.PortMappings = append(pod.PortMappings, &PortMapping{HostPort: port, ContainerPort: port, Protocol: protocol})
	}

	return pod
}

// transactions yields the lines of each COMMIT block for the nat table.
func transactions(input []byte) iter.Seq[[]string] {
	return func(yield func([]string) bool) {
		for block := range strings.SplitSeq(string(input), "COMMIT\n") {
			if lines := strings.Split(block, "\n"); lines[0] == "*nat" && !yield(lines) {
				return
			}
		}
	}
}

// rowsIn is how many rows a transaction changes.
func rowsIn(lines []string) int {
	rows := map[string]bool{}

	for _, line := range lines {
		for word := range strings.FieldsSeq(strings.TrimLeft(line, ":")) {
			hash := strings.TrimPrefix(strings.TrimPrefix(word, iptables.DNATPrefix), iptables.MasqPrefix)
			if hash != word && !strings.Contains(hash, "-") { // else it is a range chain
				rows[hash] = true
			}
		}
	}

	return len(rows)
}

// What is too large for one transaction goes in several, by one process.
func TestLargePod(t *testing.T) {
	eachVariantAndFamily(t, func(t *testing.T, n *node, f IPFamily) {
		const count, last = 2500, 20_000 + 2500 - 1

		n.serve(0, "udp", f, 20_000)
		n.serve(0, "udp", f, last)

		var sizes []int

		m, _, fake := n.inParts(f, iptables.RowsAtOnce, WithoutSockets())
		fake.restore = func(input []byte) ([]byte, error) {
			for lines := range transactions(input) {
				sizes = append(sizes, rowsIn(lines))
			}

			return input, nil
		}
		pod := n.media(0, f, count, v1.ProtocolUDP)

		sync := func(ids ...string) error {
			return n.syncFamily(m, slices.Repeat([]*PodPortMapping{pod}, len(ids)), ids...)
		}

		for _, step := range []struct {
			name      string
			do        func() error
			rows      int
			processes int32
		}{
			{"Add", func() error { return n.add(m, "id", pod) }, count, 5}, // in a user namespace it has to find out what can be sent
			{"Add again", func() error { return n.add(m, "id", pod) }, count, 1},
			{"Remove", func() error { return n.remove(m, "id", pod) }, 0, 1},
			{"Sync", func() error { return sync("id") }, count, 1},
			{"Sync without pods", func() error { return sync() }, 0, 1},
		} {
			sizes = nil
			processes := fake.restores.Load()

			require.NoError(t, step.do(), step.name)
			assert.LessOrEqual(t, fake.restores.Load()-processes, step.processes, step.name)
			assert.Greater(t, len(sizes), 2, step.name)
			assert.LessOrEqual(t, slices.Max(sizes), iptables.RowsAtOnce, step.name)
			assert.Len(t, m.mappings(), step.rows, step.name)

			if step.rows == 0 {
				assert.Empty(t, n.leftOver(f), step.name)

				continue
			}

			for _, port := range []uint16{20_000, last} {
				n.answers(n.Client, "udp", netip.AddrPortFrom(n.nodeIP(f), port), "web")
			}
		}
	})
}

// syncFamily is Sync of one family, each id with its pod.
func (n *node) syncFamily(m *hostportManager, pods []*PodPortMapping, ids ...string) error {
	n.t.Helper()

	wanted := make([]podRows, len(ids))

	for i, id := range ids {
		rows, err := rowsOf(id, pods[i])
		require.NoError(n.t, err)

		wanted[i] = podRows{owner: rows[0].Owner, rows: rows}
	}

	var err error

	n.do(func() { err = errors.Join(m.sync(n.t.Context(), EventSync, wanted)...) })

	return err
}

// inParts is a manager of one family whose transactions change so many rows each.
func (n *node) inParts(f IPFamily, most int, opts ...Option) (*hostportManager, *iptables.Backend, *fakeIPTables) {
	n.t.Helper()

	m := n.manager(opts...).families[slices.Index([]IPFamily{IPv4, IPv6}, f)]

	l, ok := m.backend.(*migration)
	require.True(n.t, ok)

	b, ok := l.backend.(*iptables.Backend)
	require.True(n.t, ok)

	fake := &fakeIPTables{IPTables: b.Ipt}
	b.Ipt, b.Most = fake, most

	return m, b, fake
}

// One that fails takes back those before it: nothing has changed.
func TestSeveralTransactionsFail(t *testing.T) {
	eachVariantAndFamily(t, func(t *testing.T, n *node, f IPFamily) {
		n.serve(0, "tcp", f, 20_000)
		n.serve(1, "tcp", f, 20_000)

		m, _, fake := n.inParts(f, 2)
		stays := n.pod(1, f, &PortMapping{HostPort: 8080, ContainerPort: 20_000})
		pod := n.media(0, f, 7, v1.ProtocolTCP)
		moved := n.media(1, f, 7, v1.ProtocolTCP)
		chain := iptables.DNATPrefix + row.HashOf("id", 20_006, "TCP", "")
		syncTo := func(pod *PodPortMapping) error {
			return n.syncFamily(m, []*PodPortMapping{pod, stays}, "id", "stays")
		}

		dump := func() string {
			all := n.rules(f)
			for _, mapping := range m.mappings() {
				all = append(all, fmt.Sprintf("%+v", mapping))
			}

			return strings.Join(sorted(all), "\n")
		}
		podAddr := func(i int) string { return netip.AddrPortFrom(n.Pods[i].IP(f == IPv6), 20_006).String() }

		require.NoError(t, n.add(m, "stays", stays))

		for _, tc := range []struct {
			name, fails string // what a line contains that is made to fail, but for what takes back
			do          func() error
			answers     string
		}{
			{"Add, of the chain", ":" + chain, func() error { return n.add(m, "id", pod) }, "web"},
			{"Remove", "-X " + chain, func() error { return n.remove(m, "id", nil) }, ""},
			{"Add, of the rule", "-A " + chain, func() error { return n.add(m, "id", pod) }, "web"},
			{"Add that moves", podAddr(1), func() error { return n.add(m, "id", moved) }, "other"},
			{"Sync that moves", podAddr(0), func() error { return syncTo(pod) }, "web"},
			{"Sync that removes", "-X " + chain, func() error { return n.syncFamily(m, []*PodPortMapping{stays}, "stays") }, ""},
			{"Sync that adds", ":" + chain, func() error { return syncTo(pod) }, "web"},
		} {
			before := dump()
			broke := 0
			fake.restore = func(input []byte) ([]byte, error) {
				lines := strings.SplitAfter(string(input), "\n")

				i := slices.IndexFunc(lines, func(line string) bool { return strings.Contains(line, tc.fails) })
				if i < 0 || strings.Contains(tc.fails, iptables.CmdDelChain) && strings.Contains(string(input), ":"+chain) {
					return input, nil
				}

				lines[i] = "-A " + iptables.PreRouting + " -j NOWHERE\n" + iptables.CmdCommit + "\n"
				broke++

				return []byte(strings.Join(lines, "")), nil
			}

			require.Error(t, tc.do(), tc.name)
			assert.Positive(t, broke, tc.name)
			assert.Equal(t, strings.HasPrefix(tc.name, "Sync"), m.health.leftovers, "%s: Run may take out what is nobody's", tc.name)

			after := dump()
			if tc.name == "Remove" {
				assert.Contains(t, after, "{PodID: ")
				before, after = disowned(before), disowned(after)
			}

			assert.Equal(t, before, after, tc.name)
			n.answers(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(f), 8080), "other")

			fake.restore = nil

			require.NoError(t, tc.do(), tc.name)

			if tc.answers != "" {
				n.answers(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(f), 20_000), tc.answers)
			} else {
				n.refused(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(f), 20_000))
			}
		}
	})
}

// What cannot be taken back either is for the next operation.
func TestSeveralTransactionsFailForGood(t *testing.T) {
	eachVariant(t, func(t *testing.T, n *node) {
		m, _, fake := n.inParts(IPv4, 2)

		chain := iptables.DNATPrefix + row.HashOf("id", 20_006, "TCP", "")

		for _, line := range []string{"-A " + chain, ":" + chain} { // of which the first is for what the rule says
			fails := false
			fake.restore = func(input []byte) ([]byte, error) {
				if fails {
					return nil, errInjected
				}

				fails = true

				return []byte(strings.Replace(string(input), line, "-A NOWHERE", 1)), nil
			}
			require.ErrorContains(t, n.add(m, "id", n.media(0, IPv4, 7, v1.ProtocolTCP)), "could not be taken back: "+errInjected.Error())
			assert.Equal(t, inDoubt, m.health.condition, line)
			assert.NotEmpty(t, parsedRows(t, n))

			fake.restore = nil

			require.NoError(t, n.add(m, "another", n.pod(1, IPv4, &PortMapping{HostPort: 9090, ContainerPort: 80})))
			assert.Len(t, parsedRows(t, n), 1)
		}
	})
}

// What is too large for the socket of iptables-nft goes in smaller transactions from
// then on, and what others have wiped comes back in such.
func TestTooLargeToBeSent(t *testing.T) {
	eachVariantAndFamily(t, func(t *testing.T, n *node, f IPFamily) {
		n.serve(0, "tcp", f, 20_000)

		m, b, fake := n.inParts(f, iptables.RowsAtOnce)
		limit := func(lines int) {
			fake.restore = func(input []byte) ([]byte, error) {
				for block := range transactions(input) {
					if len(block) > lines {
						return nil, fmt.Errorf("iptables-restore: %w", syscall.EMSGSIZE)
					}
				}

				return input, nil
			}
		}
		pod := n.media(0, f, 100, v1.ProtocolTCP)

		limit(300)
		require.NoError(t, n.add(m, "id", pod))
		assert.Less(t, b.Most, 50)
		assert.Greater(t, b.Most, 10)

		limit(100)
		n.wipe(f)
		n.iptables(f, "-X")
		require.NoError(t, n.add(m, "another", n.pod(1, f, &PortMapping{HostPort: 9090, ContainerPort: 80})))
		n.answers(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(f), 20_000), "web")
		assert.Len(t, m.mappings(), 101)

		b.Most = iptables.RowsAtOnce

		require.NoError(t, n.remove(m, "id", nil))
		require.NoError(t, n.add(m, "id", pod))

		b.Most = iptables.RowsAtOnce

		require.NoError(t, n.syncFamily(m, nil))
		assert.Empty(t, n.leftOver(f))

		limit(0)
		require.ErrorIs(t, n.add(m, "id", n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80})), syscall.EMSGSIZE)
		assert.Equal(t, 1, b.Most)
	})
}

// Rows of one port are in one transaction: a row that moves is never gone, and that
// for one address is never behind that for any.
func TestSeveralTransactionsAreNotNoticed(t *testing.T) {
	eachVariantAndFamily(t, func(t *testing.T, n *node, f IPFamily) {
		n.serve(0, "tcp", f, 80)
		n.serve(1, "tcp", f, 80)

		m, _, _ := n.inParts(f, 1)
		pod := func(i int) *PodPortMapping {
			return n.pod(i, f,
				&PortMapping{HostPort: 8079, ContainerPort: 80},
				&PortMapping{HostPort: 8080, ContainerPort: 81}, // where nobody listens
				&PortMapping{HostPort: 8081, ContainerPort: 80},
				&PortMapping{HostPort: 8080, ContainerPort: 80, HostIP: n.nodeIP(f).String()})
		}
		require.NoError(t, n.add(m, "id", pod(0)))

		var connects, failures atomic.Int32

		stop, done := make(chan struct{}), make(chan error, 1)

		go func() {
			done <- n.Client.Do(func() error { return keepAsking(t.Context(), n, f, stop, &connects, &failures) })
		}()

		moves := 0
		for ; moves < 20 || connects.Load() < 100; moves++ {
			require.NoError(t, n.add(m, "id", pod(moves%2)))
			require.Less(t, moves, 100_000, "no connections")
		}

		close(stop)
		require.NoError(t, <-done)
		assert.Zero(t, failures.Load(), "of %d", connects.Load())
	})
}

// Our own transactions are known by their generations, however many an operation has.
func TestSeveralTransactionsAreOurs(t *testing.T) {
	n := newNode(t, iptables.NFT)
	worked := n.countWork()
	log, logged := logs(t)
	m := n.manager(log)

	b, ok := m.families[0].backend.(*migration).backend.(*iptables.Backend)
	require.True(t, ok)

	require.NoError(t, n.add(m, "id", n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})))
	n.runs(m, logged)

	m.families[0].commitLock <- struct{}{}

	b.Most = 2
	<-m.families[0].commitLock
	untilIdle(t, m, worked)
	require.NoError(t, n.add(m, "media", n.media(0, IPv4, 7, v1.ProtocolUDP)))
	require.NoError(t, n.remove(m, "media", nil))
	untilLooked(t, m)
	assert.Equal(t, 2, worked())
}
