package hostport

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cri-o/hostport/internal/iptables"
	"github.com/cri-o/hostport/internal/nfnetlink"
	"github.com/cri-o/hostport/internal/nftables"
	"github.com/cri-o/hostport/internal/sockets"
)

// restart has the runtime begin again, with so many files that it may open.
func (p *runtimeProcess) restart(files int) {
	p.n.t.Helper()

	backend := p.n.backend()
	if backend == BackendNFTables {
		backend = BackendAuto
	}

	p.obey(order{Op: "restart", Files: files, Backend: backend})
}

// However few files can be opened, nothing is said to be gone that could not be looked at.
// It is looked at again by the next operation, and no other backend takes its place.
func TestFewFiles(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node, f IPFamily) {
		const enough = 40

		add := order{Op: "add", ID: "id", Pod: n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80})}
		remove := order{Op: "remove", ID: "id"}
		p := n.start(false, patience)
		failed, inTurn := 0, 0

		for files := 0; files < enough && inTurn < 3; files++ {
			p.restart(manyFiles)
			require.Empty(t, p.obey(add)[0].Err)
			p.restart(files)

			if err := p.obey(remove)[0].Err; err != "" {
				failed++

				inTurn = 0
			} else {
				require.Empty(t, n.leftOver(f), "with %d files", files)

				inTurn++
			}

			p.obey(order{Op: "files", Files: manyFiles})
			require.Empty(t, p.obey(remove)[0].Err)
			require.Empty(t, n.leftOver(f), "with %d files at first", files)
			require.Empty(t, p.obey(add)[0].Err)
			require.NotEmpty(t, n.leftOver(f), "with %d files at first", files)
			require.Empty(t, p.obey(remove)[0].Err)
		}

		t.Logf("Remove failed with fewer than %d files", failed)
		assert.Positive(t, failed)
		assert.Equal(t, 3, inTurn, "Remove never succeeded")
	})
}

// The same is true of what another backend carries from before.
func TestFewFilesForWhatIsFromBefore(t *testing.T) {
	eachVariantAndFamily(t, func(t *testing.T, n *node, f IPFamily) {
		const enough = 40

		n.leftBehind("id", n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80}))

		old := *n
		save := n.iptablesSave(f)
		n.change(viaNFTables)

		remove := order{Op: "remove", ID: "id"}
		p := n.start(false, patience)

		for files := range enough {
			p.obey(order{Op: "files", Files: manyFiles})
			n.commandWith(save, iptables.Command(f)+"-"+string(old.variant)+"-restore")
			p.restart(files)

			if err := p.obey(remove)[0].Err; err == "" {
				require.Empty(t, old.leftOver(f), "with %d files", files)
			}

			p.obey(order{Op: "files", Files: manyFiles})
			require.Empty(t, p.obey(remove)[0].Err)
			require.Empty(t, old.leftOver(f), "with %d files at first", files)
		}
	})
}

// What could not be looked at for want of a file is looked at again by Run.
func TestRunAfterFewFiles(t *testing.T) {
	eachBackend(t, func(t *testing.T, n *node) {
		p := n.start(true, patience)

		for _, f := range []IPFamily{IPv4, IPv6} {
			require.Empty(t, p.obey(order{Op: "add", ID: "id", Pod: n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80})})[0].Err)
		}

		mappings := func() []Mapping { return p.obey(order{Op: "mappings"})[0].Mappings }

		p.restart(0)
		require.Empty(t, mappings())
		p.obey(order{Op: "files", Files: manyFiles})
		eventually(t, func() bool { return len(mappings()) == 2 })
	})
}

// filesLeft is how many files the runtime may still open.
func (p *runtimeProcess) filesLeft() int {
	p.n.t.Helper()

	var limit unix.Rlimit
	require.NoError(p.n.t, unix.Prlimit(p.cmd.Process.Pid, unix.RLIMIT_NOFILE, nil, &limit))

	files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.cmd.Process.Pid))
	require.NoError(p.n.t, err)

	return int(limit.Cur) - len(files)
}

// More rows from before than files can be opened: the sockets leave enough for operations, the
// log says so in one line a family, and what could not be held is when there is room.
func TestMoreRowsThanFiles(t *testing.T) {
	eachBackend(t, func(t *testing.T, n *node) {
		const rows, files = 500, 400

		many := n.pod(0, IPv4)
		for i := range rows {
			many.PortMappings = append(many.PortMappings, &PortMapping{HostPort: int32(8000 + i), ContainerPort: 80})
		}

		six := n.pod(0, IPv6, &PortMapping{HostPort: 8080, ContainerPort: 80})
		few := n.pod(1, IPv4, &PortMapping{HostPort: 7000, ContainerPort: 80})
		p := n.start(false, time.Minute)

		for id, pod := range map[string]*PodPortMapping{"many": many, "six": six, "few": few} {
			require.Empty(t, p.obey(order{Op: "add", ID: id, Pod: pod})[0].Err)
		}

		p.restart(files)

		held := func() (held, all int) {
			list := p.obey(order{Op: "mappings"})[0].Mappings
			for _, m := range list {
				if m.Held {
					held++
				}
			}

			return held, len(list)
		}

		some, all := held()
		assert.Equal(t, rows+2, all)
		assert.Greater(t, some, files/2)
		assert.Less(t, some, files)
		assert.GreaterOrEqual(t, p.filesLeft(), sockets.Reserve/2) // the manager has some as well

		// Both families remove at once what there is to be removed.
		for _, r := range p.obey(order{Op: "remove", ID: "six"}, order{Op: "remove", ID: "few"}) {
			require.Empty(t, r.Err)
		}

		assert.Empty(t, n.leftOver(IPv6))

		refused := p.obey(order{Op: "add", ID: "new", Pod: n.pod(1, IPv4, &PortMapping{HostPort: 7001, ContainerPort: 80})})[0].Err
		assert.Contains(t, refused, unix.EMFILE.Error())

		gone := n.pod(0, IPv4)
		gone.PortMappings = many.PortMappings[:rows/2]
		require.Empty(t, p.obey(order{Op: "remove", ID: "many", Pod: gone})[0].Err)

		eventually(t, func() bool {
			require.Empty(t, p.obey(order{Op: "add", ID: "few", Pod: few})[0].Err)

			some, all := held()

			return some == all
		})

		p.kill()
		assert.Equal(t, 2, strings.Count(p.stderr.String(), unix.EMFILE.Error()), "a line for each family: %s", &p.stderr)
	})
}

// However few files can be opened, Sync leaves the guard as long as the sysctl may be on.
func TestGuardStaysWithFewFiles(t *testing.T) {
	eachBackend(t, func(t *testing.T, n *node) {
		p := n.start(false, patience)
		add := order{Op: "add", ID: "id", Pod: n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})}
		none := order{Op: "sync"}

		for files := range 16 {
			require.Empty(t, p.obey(add)[0].Err)
			n.guarded()
			p.obey(order{Op: "files", Files: files})

			p.obey(none) // may fail
			n.guarded()
			p.obey(order{Op: "files", Files: manyFiles})
			require.Empty(t, p.obey(none)[0].Err)
			n.guarded()

			if t.Failed() {
				break
			}
		}

		n.sysctl("net/ipv4/conf/cni0/route_localnet", "0")
		require.Empty(t, p.obey(none)[0].Err)
		assert.Empty(t, n.ours(IPv4))
	})
}

// That a sysctl cannot be read does not mean that the node does not forward: it is read again.
func TestForwardingUnknown(t *testing.T) {
	n := newNode(t, viaNFTables)
	n.sysctl("net/ipv6/conf/all/forwarding", "0")

	p := n.start(false, patience)

	for _, files := range []int{0, manyFiles} {
		p.obey(order{Op: "files", Files: files})

		for _, f := range []IPFamily{IPv4, IPv6} { // SCTP takes no socket
			pod := n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80, Protocol: "SCTP"})
			require.Empty(t, p.obey(order{Op: "add", ID: "id", Pod: pod})[0].Err)
		}
	}

	p.kill()
	assert.NotContains(t, p.stderr.String(), `does not forward" family="4"`)
	assert.Contains(t, p.stderr.String(), `does not forward" family="6"`)
}

// An nftables that cannot be asked is not taken for one that cannot be used.
func TestBackendAutoAsksAgain(t *testing.T) {
	n := newNode(t, iptables.NFT)
	conn := n.nfnetlink()
	o := newSystemOpener(newConfig([]Option{WithLogger(testLogger(t))}))
	closed, err := nfnetlink.Dial()
	require.NoError(t, err)
	require.NoError(t, closed.Close())

	o.finder.Ruleset = nftables.NewRuleset(func() (nftables.Conn, error) { return closed, nil })

	n.do(func() {
		_, err := o.open(IPv4)(t.Context())
		require.ErrorIs(t, err, net.ErrClosed)
		assert.False(t, holdsNothing(err))

		o.finder.Ruleset = nftables.NewRuleset(func() (nftables.Conn, error) { return conn, nil })
		b, err := o.open(IPv4)(t.Context())
		require.NoError(t, err)
		assert.Equal(t, string(BackendNFTables), b.Kind(nil))
	})
}

// Programs that are there and do not work may have made rows: they are not said to be gone.
func TestProgramsThatDoNotWork(t *testing.T) {
	n := newNode(t, iptables.NFT)
	n.leftBehind("id", n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80}))
	n.change(viaNFTables) // without hints

	dir := t.TempDir()
	for _, name := range []string{"iptables-nft", "iptables-legacy", "ip6tables-nft", "ip6tables-legacy"} {
		for _, suffix := range []string{"", "-save", "-restore"} {
			require.NoError(t, os.WriteFile(filepath.Join(dir, name+suffix), []byte("#!/bin/sh\nexit 1\n"), 0o700))
		}
	}

	for _, plain := range []bool{false, true} {
		if plain { // and does not say which it is
			for _, name := range []string{"iptables", "ip6tables"} {
				require.NoError(t, os.Rename(filepath.Join(dir, name+"-nft"), filepath.Join(dir, name)))
				require.NoError(t, os.Remove(filepath.Join(dir, name+"-nft-save")))
				require.NoError(t, os.Remove(filepath.Join(dir, name+"-legacy-save")))
			}
		}

		t.Setenv("PATH", dir)
		n.do(func() {
			m := metaManager(t, WithBackend(BackendIPTables))
			require.Error(t, m.Remove("id", nil), "plain: %v", plain)
			require.NoError(t, m.Close())
		})
	}
}

// unreadable is a node with rows from before in iptables-nft, which cannot list them because of
// a rule of somebody's until release is called. Something else is in use.
func unreadable(t *testing.T, inUse iptables.Variant, f IPFamily, pods map[string]*PodPortMapping) (n, old *node, release func()) {
	t.Helper()

	n = newNode(t, iptables.NFT)
	for id, pod := range pods {
		n.leftBehind(id, pod)
	}

	before := *n
	n.change(inUse)
	n.command("nft", "add", "rule", nftFamily(f), "nat", "PREROUTING", "numgen", "random", "mod", "2", "0", "return")

	return n, &before, func() {
		list := n.command("nft", "-a", "list", "chain", nftFamily(f), "nat", "PREROUTING")
		_, rule, _ := strings.Cut(list, "numgen")
		_, handle, found := strings.Cut(rule, "# handle ")
		require.True(t, found)
		n.command("nft", "delete", "rule", nftFamily(f), "nat", "PREROUTING", "handle", strings.Fields(handle)[0])
	}
}

func eachUnreadable(t *testing.T, f func(t *testing.T, inUse iptables.Variant, family IPFamily)) {
	t.Helper()

	for _, inUse := range []iptables.Variant{viaNFTables, iptables.Legacy} {
		for _, family := range []IPFamily{IPv4, IPv6} {
			t.Run(string(inUse)+"/IPv"+string(family), func(t *testing.T) { f(t, inUse, family) })
		}
	}
}

// podOn is what is left behind before there is a node.
func podOn(i int, f IPFamily, port int32) *PodPortMapping {
	ip := net.IPv4(10, 88, 0, byte(2+i))
	if f == IPv6 {
		ip = net.ParseIP(fmt.Sprintf("fd00:10:88::%d", 2+i))
	}

	return &PodPortMapping{Namespace: "ns", Name: "pod", IP: ip, PortMappings: []*PortMapping{{HostPort: port, ContainerPort: 80}}}
}

// Remove does not say that rows are gone that could not be looked at, and looks again.
func TestRemoveLooksAgain(t *testing.T) {
	eachUnreadable(t, func(t *testing.T, inUse iptables.Variant, f IPFamily) {
		n, old, release := unreadable(t, inUse, f, map[string]*PodPortMapping{
			"id": podOn(0, f, 8080), "taken": podOn(0, f, 7000), "stays": podOn(0, f, 9090),
		})
		n.serve(1, "tcp", f, 80)

		log, logged := logs(t)
		m := n.manager(log)
		check := func() (err error) {
			n.do(func() { err = m.Check(t.Context(), "stays", podOn(0, f, 9090)) })

			return err
		}

		require.Empty(t, m.Mappings())
		require.ErrorContains(t, n.remove(m, "id", nil), "cannot show")
		require.ErrorContains(t, n.remove(m, "id", podOn(0, f, 8080)), "cannot show")
		require.ErrorContains(t, check(), "cannot show")
		assert.Equal(t, 1, strings.Count(logged(), "cannot show"), logged())

		// What has nothing to do with it works.
		require.NoError(t, n.add(m, "new", podOn(1, f, 7001)))
		require.NoError(t, n.add(m, "takes", podOn(1, f, 7000)))

		release()
		require.NoError(t, n.remove(m, "id", nil))
		require.NoError(t, check())

		var ports []int32
		for _, mapping := range m.Mappings() {
			ports = append(ports, mapping.HostPort)

			assert.True(t, mapping.Held)
		}

		assert.Equal(t, []int32{7000, 7001, 9090}, ports)

		rules := strings.Join(old.rules(f), "\n")
		assert.NotContains(t, rules, "8080 ")
		assert.NotContains(t, rules, "7000 ", "what another pod has taken")
		n.answers(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(f), 7000), "other")

		require.NoError(t, n.remove(m, "stays", podOn(0, f, 9090)))
		assert.Empty(t, old.leftOver(f))
	})
}

// So does Run.
func TestRunLooksAgain(t *testing.T) {
	eachUnreadable(t, func(t *testing.T, inUse iptables.Variant, f IPFamily) {
		n, _, release := unreadable(t, inUse, f, map[string]*PodPortMapping{"id": podOn(0, f, 8080)})
		m := n.manager()
		n.run(m)
		require.Empty(t, m.Mappings())
		release()
		n.soon(func() bool { return len(m.Mappings()) == 1 && m.Mappings()[0].Held })
		require.NoError(t, n.remove(m, "id", nil))
	})
}

// Run looks again after a while, not each time; what Sync was to take out after a longer one.
func TestRunLooksInTime(t *testing.T) {
	n, _, _ := unreadable(t, viaNFTables, IPv4, map[string]*PodPortMapping{"id": podOn(0, IPv4, 8080)})
	m := n.manager().families[0]
	started := countProcesses(t)
	looked := func() bool {
		n.runOnce(m, false)

		return started() > 0
	}

	assert.True(t, looked())
	assert.False(t, looked(), "at once")

	m.health.lookAt = time.Time{}

	assert.True(t, looked())

	require.Error(t, n.syncFamily(m, nil))

	started()

	m.health.lookAt, m.health.repairAt = time.Time{}, time.Now().Add(-repairPause)

	assert.False(t, looked(), "operations would wait behind it")

	m.health.repairAt = time.Now().Add(-leftoverPause - time.Nanosecond)

	assert.True(t, looked())
}

// Operations that wait for each other look again once.
func TestLooksAgainOnce(t *testing.T) {
	n, _, _ := unreadable(t, viaNFTables, IPv4, map[string]*PodPortMapping{"id": podOn(0, IPv4, 8080)})
	m := n.manager()
	started := countProcesses(t)

	require.NoError(t, n.add(m, "first", podNumber(99)))

	once := started()
	require.Positive(t, once)

	const pods = 5

	m.families[0].commitLock <- struct{}{}

	done := make(chan []error)

	go func() {
		done <- n.atOnce(pods, func(i int) error { return m.Add(strconv.Itoa(i), podNumber(i), "") })
	}()

	eventually(t, func() bool {
		m.families[0].queueMu.Lock()
		defer m.families[0].queueMu.Unlock()

		return len(m.families[0].queue) == pods
	})

	<-m.families[0].commitLock

	for _, err := range <-done {
		require.NoError(t, err)
	}

	assert.Equal(t, once, started())
}

// What is found later is looked over as at the start.
func TestFoundLaterIsRepaired(t *testing.T) {
	eachUnreadable(t, func(t *testing.T, inUse iptables.Variant, f IPFamily) {
		n, old, release := unreadable(t, inUse, f, map[string]*PodPortMapping{"id": podOn(0, f, 8080)})
		old.iptables(f, "-F", iptables.PostRouting)

		m := n.manager()
		release()
		require.NoError(t, n.remove(m, "another", nil))
		assert.Contains(t, strings.Join(old.ours(f), "\n"), iptables.CmdAppend+iptables.PostRouting)
	})
}

// A Remove that failed because nobody could look is carried out by Run, once somebody can. A
// pod that has the port meanwhile keeps it.
func TestRunRemovesWhatItFinds(t *testing.T) {
	eachUnreadable(t, func(t *testing.T, inUse iptables.Variant, f IPFamily) {
		n, old, release := unreadable(t, inUse, f, map[string]*PodPortMapping{
			"all": podOn(0, f, 8080), "named": podOn(0, f, 8081), "again": podOn(0, f, 8082), "stays": podOn(0, f, 9090),
		})
		n.serve(1, "tcp", f, 80)

		m := n.manager()
		require.Error(t, n.remove(m, "all", nil))
		require.Error(t, n.remove(m, "named", podOn(0, f, 8081)))
		require.Error(t, n.remove(m, "named", podOn(0, f, 8081)))
		require.Error(t, n.remove(m, "again", nil))
		require.NoError(t, n.add(m, "again", podOn(1, f, 8082)))
		release()
		n.run(m)
		n.soon(func() bool { return len(old.rules(f)) > 0 && len(m.Mappings()) == 2 })

		rules := strings.Join(old.rules(f), "\n")
		assert.NotContains(t, rules, "808")
		assert.Contains(t, rules, "9090")
		n.answers(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(f), 8082), "other")
		assert.Equal(t, []string{"again", ""}, []string{m.Mappings()[0].PodID, m.Mappings()[1].PodID})
	})
}

// Of a pod that is invalid, Sync leaves what stands, and looks for it again.
func TestInvalidIsFoundLater(t *testing.T) {
	eachUnreadable(t, func(t *testing.T, inUse iptables.Variant, f IPFamily) {
		n, _, release := unreadable(t, inUse, f, map[string]*PodPortMapping{"odd": podOn(1, f, 9090)})
		m := n.manager()
		release()

		odd := podOn(1, f, 9090)
		odd.PortMappings[0].ContainerPort = 0
		require.ErrorIs(t, n.sync(m, map[string][]*PodPortMapping{"odd": {odd}}), ErrInvalidMapping)
		assert.Len(t, m.Mappings(), 1)
	})
}

// A pod's row for one address stands beside the one for any that has come meanwhile.
func TestFoundLaterStandsBeside(t *testing.T) {
	eachUnreadable(t, func(t *testing.T, inUse iptables.Variant, f IPFamily) {
		both := podOn(0, f, 8080)
		both.PortMappings = append(both.PortMappings, &PortMapping{
			HostPort: 8080, ContainerPort: 81, HostIP: map[IPFamily]string{IPv4: "192.0.2.77", IPv6: "2001:db8::77"}[f],
		})

		n, old, release := unreadable(t, inUse, f, map[string]*PodPortMapping{"id": both})
		m := n.manager()
		require.NoError(t, n.add(m, "id", podOn(0, f, 8080)))
		release()
		require.NoError(t, n.remove(m, "another", nil))
		assert.Len(t, m.Mappings(), 2)
		require.NoError(t, n.remove(m, "id", nil))
		assert.Empty(t, old.leftOver(f))
	})
}

// What Sync was to take out and could not look at is not taken over, but taken out.
func TestSyncLooksAgain(t *testing.T) {
	eachUnreadable(t, func(t *testing.T, inUse iptables.Variant, f IPFamily) {
		for name, again := range map[string]func(n *node, m *Manager) error{
			"Sync": func(n *node, m *Manager) error {
				return n.sync(m, map[string][]*PodPortMapping{"id": {podOn(1, f, 8080)}})
			},
			"Remove": func(n *node, m *Manager) error { return n.remove(m, "another", nil) },
			"Run":    func(n *node, m *Manager) error { n.run(m); return nil },
		} {
			t.Run(name, func(t *testing.T) {
				n, old, release := unreadable(t, inUse, f, map[string]*PodPortMapping{"id": podOn(0, f, 8080), "goes": podOn(0, f, 9090)})
				n.serve(1, "tcp", f, 80)

				m := n.manager()
				require.ErrorContains(t, n.sync(m, map[string][]*PodPortMapping{"id": {podOn(1, f, 8080)}}), "cannot show")
				require.Error(t, n.remove(m, "goes", nil))
				release()
				require.NoError(t, again(n, m))
				n.soon(func() bool { return len(old.ours(f)) == 0 })
				assert.Len(t, m.Mappings(), 1)
				n.answers(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(f), 8080), "other")
				require.NoError(t, n.remove(m, "goes", nil))
			})
		}
	})
}

// Rows that there is no program for are not said to be gone; chains without rows are none, nor
// are those of others.
func TestRemoveWithoutProgram(t *testing.T) {
	eachVariantAndFamily(t, func(t *testing.T, n *node, f IPFamily) {
		n.leftBehind("id", n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80}))
		n.iptables(f, "-N", "OTHERS")
		n.iptables(f, "-A", "OTHERS", "-m", "comment", "--comment", "hostport", "-j", "RETURN")

		old := *n
		n.change(viaNFTables)

		path := os.Getenv("PATH")
		t.Setenv("PATH", t.TempDir())

		m := n.manager()
		require.ErrorContains(t, n.remove(m, "id", nil), iptables.Command(f)+"-"+string(old.variant))
		t.Setenv("PATH", path)
		require.NoError(t, n.remove(m, "id", nil))
		assert.Empty(t, old.leftOver(f))
		assert.NotEmpty(t, old.ours(f), "what stays without rows")
		require.NoError(t, m.Close())

		t.Setenv("PATH", t.TempDir())

		m = n.manager()
		require.NoError(t, n.remove(m, "id", nil))
		require.ErrorContains(t, n.syncFamily(m.families[slices.Index([]IPFamily{IPv4, IPv6}, f)], nil), "-"+string(old.variant))
	})
}
