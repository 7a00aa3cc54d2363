package hostport

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cri-o/hostport/internal/iptables"
	"github.com/cri-o/hostport/internal/row"
	"github.com/cri-o/hostport/internal/testbed"
)

// In the steady state an operation is one process.
func TestOneProcessPerOperation(t *testing.T) {
	eachVariantAndFamily(t, func(t *testing.T, n *node, f IPFamily) {
		started := countProcesses(t)
		m := n.manager()
		t.Logf("%d processes for New", started())

		for i, do := range []func() error{
			func() error { return n.add(m, "a", n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80})) },
			func() error { return n.add(m, "b", n.pod(1, f, &PortMapping{HostPort: 8081, ContainerPort: 80})) },
			func() error { return n.add(m, "a", n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80})) },
			func() error { return n.add(m, "a", n.pod(1, f, &PortMapping{HostPort: 8080, ContainerPort: 81})) },
			func() error { return n.remove(m, "b", n.pod(1, f, &PortMapping{HostPort: 8081, ContainerPort: 80})) },
			func() error { return n.remove(m, "a", nil) },
			func() error { return n.add(m, "a", n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80})) },
		} {
			require.NoError(t, do())
			assert.Equal(t, 1, started(), "step %d", i)
		}
	})
}

// Rows close together stand on several levels. A new manager knows their places
// without a repair, and the last of them leaves no range chain behind.
func TestRowsOnAllLevels(t *testing.T) {
	eachVariantAndFamily(t, func(t *testing.T, n *node, f IPFamily) {
		n.serve(0, "tcp", f, 80)

		const first, last = 8000, 8100 // more than two levels take; in one range of 256

		var even, odd []*PortMapping

		for port := int32(first); port <= last; port += 2 {
			even = append(even, &PortMapping{HostPort: port, ContainerPort: 80})
			odd = append(odd, &PortMapping{HostPort: port + 1, ContainerPort: 80})
		}

		m := n.manager()
		require.NoError(t, n.add(m, "id", n.pod(0, f, &PortMapping{
			HostPort: last, ContainerPort: 81, HostIP: n.otherNodeIP(f).String(),
		})))
		require.NoError(t, n.add(m, "id", n.pod(0, f, even...)))
		require.NoError(t, n.add(m, "id", n.pod(0, f, odd...)))

		levels := map[int]int{}
		for r := range m.families[slices.Index([]IPFamily{IPv4, IPv6}, f)].table() {
			levels[r.Depth]++
		}

		assert.Equal(t, map[int]int{
			iptables.OwnRows: iptables.FewRows - 1, iptables.OwnRows + 1: 2*iptables.FewRows - 1, iptables.OwnRows + 2: 1 + len(even) + len(odd) - 3*iptables.FewRows + 2,
		}, levels)
		require.NoError(t, m.Close())

		for port := uint16(first); port <= last; port += 10 {
			n.answers(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(f), port), "web")
			n.answers(n.Pods[0].Namespace, "tcp", netip.AddrPortFrom(n.nodeIP(f), port), "web")
		}

		// Of the pod: nothing serves port 81 there.
		n.refused(n.Client, "tcp", netip.AddrPortFrom(n.otherNodeIP(f), last))

		started := countProcesses(t)
		m = n.manager()

		_ = started()

		require.NoError(t, n.remove(m, "id", n.pod(0, f, odd...)))
		n.answers(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(f), last), "web")
		require.NoError(t, n.remove(m, "id", nil))
		assert.Equal(t, 2, started(), "nothing to repair")
		n.onlyBase(f)
	})
}

// loadCRIO puts what CRI-O has made into the kernel.
func loadCRIO(n *node) {
	n.t.Helper()
	n.commandWith(crioSave, iptables.Command(IPv4)+"-"+string(n.variant)+"-restore", "--noflush")
}

// CRI-O's rows are listed, held, and removed for their owners alone.
func TestAdoptsFromCRIO(t *testing.T) {
	eachVariant(t, func(t *testing.T, n *node) {
		n.serve(0, "tcp", IPv4, 80)

		before := n.theirs(IPv4)

		loadCRIO(n)

		m := n.manager()
		mappings := m.Mappings()
		require.Len(t, mappings, 2)

		for i, want := range []string{"TCP 0.0.0.0:8080 10.88.0.2:80", "UDP 192.0.2.1:8081 10.88.0.3:53"} {
			got := mappings[i]
			assert.Equal(t, want, fmt.Sprintf("%s %s:%d %s:%d", got.Protocol, got.HostIP, got.HostPort, got.PodIP, got.ContainerPort))
			assert.Empty(t, got.PodID)
			assert.True(t, got.Held)
		}

		n.answers(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(IPv4), 8080), "web")
		saved := n.dump(m)

		require.NoError(t, n.remove(m, "crio-b", n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})))
		require.NoError(t, n.remove(m, "crio-c", nil))
		assert.Equal(t, saved, n.dump(m), "not theirs")

		require.NoError(t, n.add(m, "crio-a", n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80, Protocol: "TCP"})))
		assert.Equal(t, "crio-a", m.Mappings()[0].PodID, "named by Add")
		assert.Contains(t, strings.Join(n.ours(IPv4), "\n"), "-A KUBE-HP-TCP-7936-8191 ", "and put where ours stand")
		n.answers(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(IPv4), 8080), "web")

		require.NoError(t, n.remove(m, "crio-b", &PodPortMapping{PortMappings: []*PortMapping{
			{HostPort: 8081, Protocol: "UDP", HostIP: "192.0.2.1"},
		}}))
		require.Len(t, m.Mappings(), 1)
		require.NoError(t, n.remove(m, "crio-a", nil))
		assert.Empty(t, m.Mappings())
		assert.Equal(t, before, n.theirs(IPv4))
		n.onlyBase(IPv4)
	})
}

// A row whose owner nobody has named gives way to the newest pod.
func TestNewestWinsOverUnknown(t *testing.T) {
	eachVariant(t, func(t *testing.T, n *node) {
		n.serve(1, "tcp", IPv4, 81)
		loadCRIO(n)

		m := n.manager()
		pod := n.pod(1, IPv4,
			&PortMapping{HostPort: 8080, ContainerPort: 81, HostIP: n.nodeIP(IPv4).String()},
			&PortMapping{HostPort: 8081, ContainerPort: 81, Protocol: "UDP"})
		require.NoError(t, n.add(m, "new", pod))

		mappings := m.Mappings()
		require.Len(t, mappings, 2)

		for _, mapping := range mappings {
			assert.Equal(t, "new", mapping.PodID)
			assert.True(t, mapping.Held)
		}

		n.answers(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(IPv4), 8080), "other")
		require.NoError(t, n.remove(m, "crio-a", nil))
		assert.Len(t, m.Mappings(), 2)
		require.NoError(t, n.remove(m, "new", pod))
		n.onlyBase(IPv4)
	})
}

// crioRemoves does to the nat table what CRI-O does to remove a row: it writes
// anew whatever bears its prefixes, but for the row.
func crioRemoves(n *node, hash string) {
	n.t.Helper()

	var chains, rules, removed []string

	for _, line := range n.rules(IPv4) {
		name := strings.TrimLeft(line, ":")
		bears := strings.HasPrefix(name, iptables.DNATPrefix) || strings.HasPrefix(name, iptables.MasqPrefix) ||
			name == iptables.DNATDispatch || name == iptables.MasqDispatch
		word := strings.Fields(line)

		switch {
		case strings.HasPrefix(line, ":") && bears:
			chains = append(chains, line+" - [0:0]")

			if strings.HasSuffix(line, hash) {
				removed = append(removed, iptables.CmdDelChain+name)
			}
		case strings.HasPrefix(line, ":") || strings.Contains(line, hash):
		case strings.HasPrefix(word[1], iptables.DNATPrefix), strings.HasPrefix(word[1], iptables.MasqPrefix),
			word[1] == iptables.DNATDispatch, word[1] == iptables.MasqDispatch:
			rules = append(rules, line)
		}
	}

	input := append(append(append([]string{"*nat"}, chains...), append(rules, removed...)...), "COMMIT", "")
	n.commandWith(strings.Join(input, "\n"), iptables.Command(IPv4)+"-"+string(n.variant)+"-restore", "--noflush", "--counters")
}

// CRI-O can remove what was made here, and leaves the rest working.
func TestCRIORemovesOurs(t *testing.T) {
	eachVariant(t, func(t *testing.T, n *node) {
		n.serve(0, "tcp", IPv4, 80)

		m := n.manager()
		require.NoError(t, n.add(m, "a", n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80, Protocol: "TCP"})))
		require.NoError(t, n.add(m, "b", n.pod(0, IPv4, &PortMapping{HostPort: 9000, ContainerPort: 80, Protocol: "TCP"})))
		require.NoError(t, m.Close())

		crioRemoves(n, row.HashOf("b", 9000, "TCP", ""))
		n.answers(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(IPv4), 8080), "web")
		n.refused(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(IPv4), 9000))

		again := n.manager()
		require.Len(t, again.Mappings(), 1)
		require.NoError(t, n.add(again, "c", n.pod(0, IPv4, &PortMapping{HostPort: 9001, ContainerPort: 80})))
		n.answers(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(IPv4), 9001), "web")

		for _, id := range []string{"a", "c"} {
			require.NoError(t, n.remove(again, id, nil))
		}

		n.onlyBase(IPv4)
	})
}

// ofPort60000 matches rules of that port and of the ranges around it.
var ofPort60000 = regexp.MustCompile(`49152|57344|59392|59904|60000`)

// Whatever single rule of a pod somebody deletes, Add again puts it back.
func TestAddAgainRepairs(t *testing.T) {
	eachVariantAndFamily(t, func(t *testing.T, n *node, f IPFamily) {
		m := n.manager()
		pod := n.pod(0, f,
			&PortMapping{HostPort: 8080, ContainerPort: 80},
			&PortMapping{HostPort: 8080, ContainerPort: 81, HostIP: n.nodeIP(f).String()})
		require.NoError(t, n.add(m, "id", pod))
		require.NoError(t, n.add(m, "far", n.pod(1, f, &PortMapping{HostPort: 60000, ContainerPort: 80})))

		before := n.ours(f)
		far := row.HashOf("far", 60000, "", "")

		for _, line := range before {
			if strings.HasPrefix(line, ":") || ofPort60000.MatchString(line) || strings.Contains(line, far) {
				continue
			}

			n.commandWith("*nat\n"+strings.Replace(line, iptables.CmdAppend, iptables.CmdDelete, 1)+"\nCOMMIT\n",
				iptables.Command(f)+"-"+string(n.variant)+"-restore", "--noflush")
			require.NoError(t, n.add(m, "id", pod), line)
			require.Equal(t, sorted(before), sorted(n.ours(f)), line)
		}

		n.iptables(f, "-F")
		require.NoError(t, n.add(m, "id", pod))
		require.Equal(t, sorted(before), sorted(n.ours(f)), "flushed")

		n.iptables(f, "-F")
		n.iptables(f, "-X")
		require.NoError(t, n.add(m, "id", pod))
		require.Equal(t, sorted(before), sorted(n.ours(f)), "deleted")

		n.iptables(f, "-F")
		n.iptables(f, "-X")
		require.NoError(t, n.remove(m, "far", nil), "Remove repairs as well")
		require.Len(t, m.Mappings(), 2)
		require.NoError(t, n.add(m, "far", n.pod(1, f, &PortMapping{HostPort: 60000, ContainerPort: 80})))
		require.Equal(t, sorted(before), sorted(n.ours(f)))
	})
}

// A masquerade jump from before that stands too late in POSTROUTING, where a
// CNI plugin's rules have accepted hairpin connections already, is moved up.
func TestLateMasqueradeJump(t *testing.T) {
	eachVariantAndFamily(t, func(t *testing.T, n *node, f IPFamily) {
		n.serve(0, "tcp", f, 80)
		n.addForeign(f)

		theirs := n.theirs(f)
		n.commandWith(fmt.Sprintf("*nat\n-N %s\n-A %s\nCOMMIT\n", iptables.MasqDispatch, iptables.NATRules(f, true)[2]),
			iptables.Command(f)+"-"+string(n.variant)+"-restore", "--noflush")

		m := n.manager()
		require.NoError(t, n.add(m, "id", n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80})))
		n.answers(n.Pods[0].Namespace, "tcp", netip.AddrPortFrom(n.nodeIP(f), 8080), "web")
		assert.Equal(t, theirs, n.theirs(f))
		assert.Equal(t, 1, strings.Count(strings.Join(n.ours(f), "\n"), "-j "+iptables.MasqDispatch+"\n"))
	})
}

// Calico puts its jump first whenever it is not: there is no arguing with it.
func TestBehindCalico(t *testing.T) {
	eachVariantAndFamily(t, func(t *testing.T, n *node, f IPFamily) {
		m := n.manager()
		pods := map[string][]*PodPortMapping{"id": {n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80})}}
		require.NoError(t, n.sync(m, pods))
		n.iptables(f, "-N", "cali-POSTROUTING")
		n.iptables(f, "-I", iptables.PostRouting, "-j", "cali-POSTROUTING")

		before := n.rules(f)
		require.NoError(t, n.sync(m, pods))
		assert.Equal(t, before, n.rules(f))
	})
}

// The kubelet's hint decides, and rows in the variant used before are listed,
// moved over by Add and removed by Remove.
func TestVariantChanges(t *testing.T) {
	for _, tc := range []struct{ from, to iptables.Variant }{{iptables.NFT, iptables.Legacy}, {iptables.Legacy, iptables.NFT}} {
		t.Run(string(tc.from)+" to "+string(tc.to), func(t *testing.T) {
			n := newNode(t, tc.from)
			n.serve(0, "tcp", IPv4, 80)

			old := n.manager()
			stays := n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})
			goes := n.pod(0, IPv4, &PortMapping{HostPort: 8081, ContainerPort: 80})
			require.NoError(t, n.add(old, "stays", stays))
			require.NoError(t, n.add(old, "goes", goes))
			require.NoError(t, old.Close())

			for _, f := range []IPFamily{IPv4, IPv6} {
				n.command(iptables.Command(f)+"-"+string(tc.from), "-t", "mangle", "-X", "KUBE-IPTABLES-HINT")
			}

			n.hint(tc.to)

			m := n.manager()
			require.Len(t, m.Mappings(), 2)
			assert.True(t, m.Mappings()[0].Held)
			n.answers(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(IPv4), 8080), "web")

			require.NoError(t, n.remove(m, "goes", goes))
			require.NoError(t, n.add(m, "stays", stays))
			n.answers(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(IPv4), 8080), "web")
			n.refused(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(IPv4), 8081))

			n.onlyBase(IPv4)

			n.variant = tc.to
			assert.Contains(t, strings.Join(n.ours(IPv4), "\n"), "--dport 8080 ")
			require.NoError(t, n.remove(m, "stays", nil))
			n.onlyBase(IPv4)
		})
	}
}

// Where the old variant's row cannot be removed, the move is taken back.
func TestVariantChangeFails(t *testing.T) {
	n := newNode(t, iptables.NFT)
	m := n.oneFamily(n.realIPTables())
	pod := n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})
	require.NoError(t, n.add(m, "id", pod))
	require.NoError(t, m.Close())

	fail := true
	wipes := func() {}
	old := &fakeIPTables{IPTables: n.realIPTables(), restore: func(input []byte) ([]byte, error) {
		if fail {
			wipes()

			return nil, errInjected
		}

		return input, nil
	}}

	n.variant = iptables.Legacy
	inUse := n.realIPTables()
	m = newHostportManager(IPv4, newConfig([]Option{WithLogger(testLogger(t))}), func(context.Context) (backend, error) {
		return ofTwo(t, inUse, old), nil
	})

	n.do(func() { require.NoError(t, m.start(context.Background(), false)) })
	t.Cleanup(func() { assert.NoError(t, m.Close()) })

	require.ErrorIs(t, n.add(m, "id", pod), errInjected)
	n.onlyBase(IPv4)

	// Whatever others do to what has been put there.
	wipes = func() { n.iptables(IPv4, "-F", iptables.DNATDispatch) }

	require.ErrorIs(t, n.add(m, "id", pod), errInjected)
	n.onlyBase(IPv4)
	require.ErrorIs(t, n.remove(m, "id", nil), errInjected)
	require.Len(t, m.mappings(), 1)

	fail = false

	require.NoError(t, n.add(m, "id", pod))
	assert.Len(t, parsedRows(t, n), 1)
	require.NoError(t, n.remove(m, "id", nil))
	assert.Empty(t, parsedRows(t, n))

	n.variant = iptables.NFT
	assert.Empty(t, parsedRows(t, n))
}

// Rows that stand in the variant that was used before are put right by New, also where
// nothing is amiss in the one in use.
func TestVariantDamagedBefore(t *testing.T) {
	for _, tc := range []struct{ from, to iptables.Variant }{{iptables.NFT, iptables.Legacy}, {iptables.Legacy, iptables.NFT}} {
		for _, f := range []IPFamily{IPv4, IPv6} {
			t.Run(fmt.Sprintf("%s to %s/IPv%s", tc.from, tc.to, f), func(t *testing.T) {
				n := newNode(t, tc.from)
				n.serve(0, "tcp", f, 80)
				n.leftBehind("id", n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80}))

				old := *n
				n.change(tc.to)
				n.leftBehind("other", n.pod(1, f, &PortMapping{HostPort: 9090, ContainerPort: 80}))
				old.iptables(f, "-F", iptables.DNATDispatch)
				n.manager()
				n.answers(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(f), 8080), "web")
			})
		}
	}
}

// ofTwo is one backend in use, and another with rows from before.
func ofTwo(t *testing.T, inUse, before IPTables) *migration {
	t.Helper()

	return newMigration(iptables.New(inUse, true, true), func(context.Context, bool) (backend, error) {
		return iptables.New(before, true, true), nil
	})
}

// pathWith makes a PATH with nothing but the programs named.
func pathWith(t *testing.T, programs ...string) string {
	t.Helper()

	dir := t.TempDir()

	for _, name := range programs {
		path, err := exec.LookPath(name)
		require.NoError(t, err)
		require.NoError(t, os.Symlink(path, filepath.Join(dir, name)))
	}

	return dir
}

// A row that stands twice, as CRI-O makes it of one address in two spellings, stands once when
// its pod has been added again.
func TestRowTwice(t *testing.T) {
	eachVariant(t, func(t *testing.T, n *node) {
		pod := n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})
		n.leftBehind("id", pod)

		var twice []string

		for _, line := range n.rules(IPv4) {
			again := strings.ReplaceAll(line, row.HashOf("id", 8080, "", ""), row.HashOf("id", 8080, "", "0.0.0.0"))
			if chain, isChain := strings.CutPrefix(again, ":"); isChain {
				again = "-N " + chain
			}

			if strings.Contains(again, row.HashOf("id", 8080, "", "0.0.0.0")) {
				twice = append(twice, again)
			}
		}

		n.feed(twice...)

		m := n.manager()
		require.Len(t, m.Mappings(), 2)
		require.NoError(t, n.add(m, "id", pod))
		assert.Len(t, m.Mappings(), 1)
		assert.Len(t, parsedRows(t, n), 1)
		require.NoError(t, n.remove(m, "id", nil))
		n.onlyBase(IPv4)
	})
}

// Without ip6tables IPv4 works, and IPv6 says what is missing.
func TestNoIP6Tables(t *testing.T) {
	n := newNode(t, iptables.NFT)
	path := os.Getenv("PATH")
	t.Setenv("PATH", pathWith(t, "iptables-nft", "iptables-nft-save", "iptables-nft-restore"))

	m := n.manager()
	pod := func(f IPFamily) *PodPortMapping { return n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80}) }

	require.NoError(t, n.add(m, "id", pod(IPv4)))
	err := n.add(m, "id", pod(IPv6))
	require.ErrorIs(t, err, exec.ErrNotFound)
	require.ErrorContains(t, err, "ip6tables")
	require.ErrorContains(t, err, "ns/web")

	require.NoError(t, n.remove(m, "id", pod(IPv6)), "of both families")
	assert.Empty(t, m.Mappings())

	t.Setenv("PATH", path)
	require.NoError(t, n.add(m, "id", pod(IPv6)), "ip6tables has come")
	require.NoError(t, n.remove(m, "id", nil))
}

func TestNoIPTables(t *testing.T) {
	t.Setenv("PATH", t.TempDir())

	opts := []Option{WithLogger(testLogger(t)), WithBackend(BackendIPTables)}

	n, err := New(opts...)
	require.ErrorIs(t, err, exec.ErrNotFound)
	require.ErrorContains(t, err, "IPv4")
	require.ErrorContains(t, err, "IPv6")
	assert.Nil(t, n)

	m := metaManager(t, opts...)
	pod := podAt("10.88.0.2", &PortMapping{HostPort: 8080, ContainerPort: 80})
	require.ErrorIs(t, m.Add("id", pod, ""), exec.ErrNotFound)
	require.NoError(t, m.Remove("id", pod))
	require.ErrorIs(t, m.Sync(t.Context(), map[string][]*PodPortMapping{"id": {pod}}), exec.ErrNotFound)
	require.NoError(t, m.Sync(t.Context(), nil), "there is nothing")
}

// A process that hangs is killed, with its children, when time is up.
func TestHangingProcess(t *testing.T) {
	n := newNode(t, iptables.NFT)
	m := n.manager(WithTimeout(testbed.Stretch(500 * time.Millisecond)))

	dir := t.TempDir()
	pids := filepath.Join(dir, "pids")
	hang := filepath.Join(dir, "restore")
	require.NoError(t, os.WriteFile(hang, []byte(
		"#!/bin/sh\nsleep 1000 & echo $$ $! >>"+pids+"; wait\n"), 0o700))

	backend, ok := m.families[0].backend.(*migration)
	require.True(t, ok)

	inUse, ok := backend.backend.(*iptables.Backend)
	require.True(t, ok)

	ipt, ok := inUse.Ipt.(*iptables.Installed)
	require.True(t, ok)

	restore := ipt.RestorePath
	ipt.RestorePath = hang
	pod := n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})

	start := time.Now()

	require.ErrorIs(t, n.add(m, "id", pod), context.DeadlineExceeded)
	assert.Less(t, time.Since(start), patience)
	assert.Empty(t, m.Mappings())

	out, err := os.ReadFile(pids)
	require.NoError(t, err)

	for pid := range strings.FieldsSeq(string(out)) {
		require.Eventually(t, func() bool { return !running(pid) }, patience, time.Millisecond, "process %s", pid)
	}

	ipt.RestorePath = restore
	m.families[0].cfg.timeout = defaultTimeout

	require.NoError(t, n.add(m, "id", pod))
	assert.Len(t, m.Mappings(), 1)
}

// running reports whether a process exists and is no zombie.
func running(pid string) bool {
	stat, err := os.ReadFile("/proc/" + pid + "/stat")

	return err == nil && !strings.Contains(string(stat), ") Z ")
}

// The xtables lock of iptables-legacy can be held by others for long. Nothing has
// changed then, and no process waits for it any more.
func TestXtablesLock(t *testing.T) {
	n := newNode(t, iptables.Legacy)
	stays, comes := n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80}), n.pod(1, IPv4, &PortMapping{HostPort: 8081, ContainerPort: 80})
	m := n.manager(WithTimeout(testbed.Stretch(500 * time.Millisecond)))
	require.NoError(t, n.add(m, "stays", stays))

	before := n.dump(m)

	unlock := lockXtables(t)

	ops := []func() error{
		func() error { return n.add(m, "comes", comes) },
		func() error { return n.remove(m, "stays", nil) },
		func() error { return n.sync(m, map[string][]*PodPortMapping{"comes": {comes}}) },
	}
	for i, op := range ops {
		require.ErrorIs(t, op(), context.DeadlineExceeded, i)
		assert.Empty(t, children(t), i)
	}

	unlock()
	assert.Equal(t, disowned(before), n.dump(m))

	m.families[0].cfg.timeout = defaultTimeout

	for i, op := range ops {
		require.NoError(t, op(), i)
	}

	n.exactly(m, map[string][]*PodPortMapping{"comes": {comes}})
}

// lockXtables has somebody hold the xtables lock, until what it returns is called.
func lockXtables(t *testing.T) (unlock func()) {
	t.Helper()

	lock, err := os.OpenFile(cmp.Or(os.Getenv("XTABLES_LOCKFILE"), "/run/xtables.lock"), os.O_CREATE|os.O_RDONLY, 0o600)
	require.NoError(t, err)
	require.NoError(t, syscall.Flock(int(lock.Fd()), syscall.LOCK_EX))

	return func() { assert.NoError(t, lock.Close()) }
}

// children are the processes that this one has started and that have not ended.
func children(t *testing.T) []string {
	t.Helper()

	paths, err := filepath.Glob("/proc/[0-9]*/stat")
	require.NoError(t, err)

	return slices.DeleteFunc(paths, func(path string) bool {
		stat, err := os.ReadFile(path)

		return err != nil || !regexp.MustCompile(fmt.Sprintf(`\) [^Z] %d `, os.Getpid())).Match(stat)
	})
}

// Two time-outs with one row, before the commit and after, leave a row in
// doubt twice; the next operation clears it once.
func TestDoubtTwice(t *testing.T) {
	eachVariant(t, func(t *testing.T, n *node) {
		ipt := n.realIPTables()
		fake := &fakeIPTables{IPTables: ipt}
		m := n.oneFamily(fake)
		a := n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})

		for _, commits := range []bool{false, true} {
			fake.restore = func(input []byte) ([]byte, error) {
				if commits {
					assert.NoError(t, ipt.Restore(t.Context(), input))

					fake.save = func() error { return context.DeadlineExceeded } // else all is found in place
				}

				return nil, context.DeadlineExceeded
			}
			require.ErrorIs(t, n.add(m, "a", a), context.DeadlineExceeded)
		}

		fake.restore, fake.save = nil, nil

		require.NoError(t, n.add(m, "b", n.pod(1, IPv4, &PortMapping{HostPort: 8081, ContainerPort: 80})))
		assert.Len(t, parsedRows(t, n), 1)
		require.NoError(t, n.add(m, "a", a))
		require.NoError(t, n.remove(m, "a", nil))
		require.NoError(t, n.remove(m, "b", nil))
		n.onlyBase(IPv4)
	})
}

// Where the other variant does not answer in time, what was put into the one
// in use does not stay.
func TestVariantChangeTimesOut(t *testing.T) {
	n := newNode(t, iptables.NFT)
	first := n.oneFamily(n.realIPTables())
	require.NoError(t, n.add(first, "a", n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})))
	require.NoError(t, first.Close())

	hang := true
	old := &slowIPTables{IPTables: n.realIPTables(), hang: &hang}

	n.variant = iptables.Legacy
	inUse := n.realIPTables()
	m := newHostportManager(IPv4, newConfig([]Option{WithLogger(testLogger(t)), WithTimeout(testbed.Stretch(300 * time.Millisecond))}),
		func(context.Context) (backend, error) {
			return ofTwo(t, inUse, old), nil
		})

	n.do(func() { require.NoError(t, m.start(context.Background(), false)) })
	t.Cleanup(func() { assert.NoError(t, m.Close()) })

	require.ErrorIs(t, n.add(m, "b", n.pod(1, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 81})), context.DeadlineExceeded)
	assert.Empty(t, parsedRows(t, n), "taken back")

	hang = false
	m.cfg.timeout = defaultTimeout

	require.NoError(t, n.add(m, "c", n.pod(1, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 82})))
	require.Len(t, parsedRows(t, n), 1)
	assert.Equal(t, uint16(82), parsedRows(t, n)[0].Pod.Port())
}

// slowIPTables restores nothing until its time is up, while it hangs.
type slowIPTables struct {
	IPTables

	hang *bool
}

func (s *slowIPTables) Restore(ctx context.Context, input []byte) error {
	if *s.hang {
		<-ctx.Done()

		return ctx.Err()
	}

	return s.IPTables.Restore(ctx, input)
}

// What CRI-O took over from a sandbox name into a comment is put back without
// what could end a quoted string.
func TestAdoptedCommentIsHarmless(t *testing.T) {
	eachVariant(t, func(t *testing.T, n *node) {
		n.commandWith(strings.ReplaceAll(crioSave, "k8s_a_default_uid_0_", `k8s_\" -j ACCEPT \\_`),
			iptables.Command(IPv4)+"-"+string(n.variant)+"-restore", "--noflush")

		m := n.manager()
		n.iptables(IPv4, "-F")
		n.iptables(IPv4, "-X")
		require.NoError(t, n.add(m, "new", n.pod(1, IPv4, &PortMapping{HostPort: 9000, ContainerPort: 80})))
		assert.Len(t, parsedRows(t, n), 3)
		assert.NotContains(t, n.iptablesSave(IPv4), "ACCEPT \\")
	})
}

// What iptables-nft cannot show has not gone: where somebody has put such a thing into
// the table, that is an error, until it is taken out.
func TestTableThatCannotBeShown(t *testing.T) {
	for _, f := range []IPFamily{IPv4, IPv6} {
		t.Run("IPv"+string(f), func(t *testing.T) {
			n := newNode(t, iptables.NFT)
			n.serve(0, "tcp", f, 80)

			m := n.manager()
			pod := n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80})
			require.NoError(t, n.add(m, "id", pod))

			before := n.rules(f)
			table := nftFamily(f) + " nat "
			n.command("nft", "add chain "+table+"others; add rule "+table+"others ct status dnat counter")
			n.answers(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(f), 8080), "web")

			var again HostPortManager

			for _, tc := range []struct {
				name string
				do   func() error
			}{
				{"Add", func() error { return n.add(m, "id", pod) }},
				{"Sync", func() error { return n.sync(m, map[string][]*PodPortMapping{"id": {pod}}) }},
				{"Sync of nothing", func() error { return n.sync(m, nil) }},
				{"Check", func() (err error) {
					n.do(func() { err = m.Check(t.Context(), "id", pod) })

					return err
				}},
				{"Remove after a restart", func() error {
					require.NoError(t, m.Close())
					n.do(func() { again = NewMetaHostportManager(WithBackend(BackendIPTables), WithLogger(testLogger(t))) })

					return n.remove(again, "id", pod)
				}},
				{"Remove of all", func() error { return n.remove(again, "id", nil) }},
				{"Add after a restart", func() error { return n.add(again, "id", pod) }},
			} {
				require.ErrorContains(t, tc.do(), "somebody has put into table nat what iptables cannot show", tc.name)
			}

			n.answers(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(f), 8080), "web")
			n.command("nft", "flush chain "+table+"others; delete chain "+table+"others")
			assert.Equal(t, before, n.rules(f))
			require.NoError(t, n.remove(again, "id", nil))
			assert.Empty(t, n.leftOver(f))

			closer, ok := again.(*Manager)
			require.True(t, ok)
			require.NoError(t, closer.Close())
		})
	}
}

// Half of a row found at start is not taken for a row of CRI-O's: the first
// operation makes it whole.
func TestHalfARowAtStart(t *testing.T) {
	eachVariant(t, func(t *testing.T, n *node) {
		pod := n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})
		n.leftBehind("id", pod)

		before := sorted(n.ours(IPv4))
		mapping := parsedRows(t, n)[0]

		n.iptables(IPv4, append([]string{"-D"}, strings.Fields(iptables.MasqSide(mapping).Jump.String())...)...)
		n.iptables(IPv4, "-F", iptables.MasqChain(mapping))
		n.iptables(IPv4, "-X", iptables.MasqChain(mapping))

		m := n.manager()
		require.NoError(t, n.add(m, "id", pod))

		assert.Equal(t, before, sorted(n.ours(IPv4)))
	})
}

// CRI-O's row for any address stands before ours: beside a row for one
// address, it is put where ours stand.
func TestSpecificAddressBesideCRIO(t *testing.T) {
	eachVariant(t, func(t *testing.T, n *node) {
		n.serve(0, "tcp", IPv4, 80)
		loadCRIO(n)

		m := n.manager()
		require.NoError(t, n.add(m, "crio-a", n.pod(0, IPv4,
			&PortMapping{HostPort: 8080, ContainerPort: 81, HostIP: n.otherNodeIP(IPv4).String()})))
		n.answers(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(IPv4), 8080), "web")
		n.refused(n.Client, "tcp", netip.AddrPortFrom(n.otherNodeIP(IPv4), 8080)) // port 81
		require.NoError(t, n.remove(m, "crio-a", nil))
		assert.Len(t, m.Mappings(), 1)
	})
}

// The hint is seen also while somebody holds the xtables lock.
func TestHintUnderLock(t *testing.T) {
	n := newNode(t, iptables.Legacy)

	defer lockXtables(t)()

	n.do(func() {
		ipt, err := iptables.Find(t.Context(), IPv4)
		require.NoError(t, err)
		assert.Equal(t, iptables.Legacy, ipt.Variant)
	})
}
