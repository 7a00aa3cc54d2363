package hostport

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cri-o/hostport/internal/iptables"
	"github.com/cri-o/hostport/internal/nfnetlink"
	"github.com/cri-o/hostport/internal/outcome"
	"github.com/cri-o/hostport/internal/row"
	"github.com/cri-o/hostport/internal/testbed"
)

// Where what is from before cannot be taken out, the new rows stand all the same,
// and Run takes out the rest when that can be.
func TestSyncLeavesBehind(t *testing.T) {
	n := newNode(t, iptables.Legacy)
	n.serve(1, "tcp", IPv4, 80)
	n.leftBehind("old", n.pod(0, IPv4, &PortMapping{HostPort: 7000, ContainerPort: 80}))

	old := *n
	n.change(viaNFTables)

	m := n.manager(WithTimeout(testbed.Stretch(time.Second)))
	require.NoError(t, n.add(m, "goes", n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})))

	unlock := lockXtables(t)

	pods := map[string][]*PodPortMapping{"comes": {n.pod(1, IPv4, &PortMapping{HostPort: 9090, ContainerPort: 80})}}
	err := n.sync(m, pods)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.ErrorContains(t, err, "from before")

	// Until it can be, that does not hold up others all the time.
	fm := m.families[0]
	mended := func(disturbed bool) bool {
		second := time.Now().Add(-time.Nanosecond)
		fm.health.repairAt = second

		n.do(func() { require.NoError(t, fm.runOnce(t.Context(), func(backend) bool { return disturbed })) })

		return !fm.health.repairAt.Equal(second)
	}
	assert.True(t, mended(true))
	assert.False(t, mended(false))
	assert.True(t, fm.health.leftovers)
	assert.Equal(t, inSync, fm.health.condition)

	fm.health.repairAt = time.Time{}

	unlock()
	n.exactly(m, pods)
	n.answers(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(IPv4), 9090), "other")
	assert.NotEmpty(t, old.ours(IPv4))

	n.run(m)
	n.soon(func() bool { return len(old.ours(IPv4)) == 0 })
}

// What is left of a failed Add in the backend in use is taken out by Remove, and that is
// success though another backend cannot be put right just now.
func TestRemoveLeavesBehind(t *testing.T) {
	n := newNode(t, iptables.Legacy)
	n.leftBehind("old", n.pod(0, IPv4, &PortMapping{HostPort: 7000, ContainerPort: 80}))

	old := *n
	n.change(iptables.NFT)

	flag := filepath.Join(t.TempDir(), "now")
	shim(t, "iptables-nft-restore", fmt.Sprintf(`"$real" "$@" && if [ -e %[1]s ]; then rm %[1]s; exec sleep 1000; fi`, flag))

	m := n.manager(WithTimeout(testbed.Stretch(time.Second)))
	require.NoError(t, os.WriteFile(flag, nil, 0o600))
	require.ErrorIs(t, n.add(m, "id", n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})), context.DeadlineExceeded)
	require.Len(t, parsedRows(t, n), 1, "it did commit")

	old.iptables(IPv4, "-F", iptables.DNATDispatch)

	defer lockXtables(t)()

	require.NoError(t, n.remove(m, "id", nil))
	assert.Empty(t, parsedRows(t, n))
	assert.NotContains(t, old.iptablesSave(IPv4), "-A "+iptables.DNATDispatch, "it could not be put right")
}

// A repair that fails is told once and not tried again at once, and neither is one that ends
// with Run told.
func TestRepairFails(t *testing.T) {
	n := newNode(t, iptables.NFT)
	fake := &fakeIPTables{IPTables: n.realIPTables()}
	log, logged := logs(t)
	m := n.oneFamily(fake, log)
	require.NoError(t, n.add(m, "id", n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})))

	told := func() int { return strings.Count(logged(), "Cannot repair host ports") }
	tried := func() bool {
		before := fake.saves.Load()
		n.runOnce(m, true)

		return fake.saves.Load() > before
	}

	for i := range 2 { // with a success in between
		fake.save = func() error { return errInjected }

		assert.True(t, tried())
		assert.Equal(t, i+1, told())
		assert.False(t, tried(), "at once")

		m.health.repairAt = time.Time{}

		assert.True(t, tried(), "later")
		assert.Equal(t, i+1, told(), "the same error")

		m.health.repairAt = time.Time{}
		fake.save = nil

		assert.True(t, tried())
	}

	ctx, cancel := context.WithCancel(t.Context())
	fake.save = func() error {
		cancel()

		return ctx.Err()
	}

	n.do(func() { require.NoError(t, m.runOnce(ctx, func(backend) bool { return true })) })
	require.Error(t, ctx.Err())
	assert.Equal(t, 2, told())
}

// countingBackend counts transactions for operations, and refuses them if told so.
type countingBackend struct {
	backend

	refuses bool
	count   int
}

func (b *countingBackend) Reconcile(ctx context.Context, t row.Target) ([]row.Repair, error) {
	if len(t.Deltas) > 0 {
		b.count++
		if b.refuses {
			return nil, &outcome.RefusedError{Err: syscall.EPERM}
		}
	}

	return b.backend.Reconcile(ctx, t)
}

// What a Remove could not take out Run tries to, each time after a while, also if more comes
// to that meanwhile.
func TestPruneFails(t *testing.T) {
	n := anyNode(t)
	m := n.manager().families[0]

	for i, id := range []string{"a", "b"} {
		require.NoError(t, n.add(m, id, n.pod(i, IPv4, &PortMapping{HostPort: 8080 + int32(i), ContainerPort: 80})))
	}

	counting := &countingBackend{backend: m.backend, refuses: true}
	m.backend = counting
	tried := func() bool {
		before := counting.count
		n.runOnce(m, false)

		return counting.count > before
	}

	require.ErrorIs(t, n.remove(m, "a", nil), syscall.EPERM)
	assert.True(t, tried())
	assert.False(t, tried(), "at once")
	require.ErrorIs(t, n.remove(m, "b", nil), syscall.EPERM)
	assert.False(t, tried(), "at once, for what another Remove has left")

	counting.refuses = false
	require.False(t, m.health.pruneAt.IsZero())

	m.health.pruneAt = time.Now().Add(-time.Nanosecond)

	assert.True(t, tried())
	assert.Empty(t, m.mappings())
	assert.Empty(t, n.leftOver(IPv4))
}

// Nothing of ours gets into tables that are not in use.
func TestOthersLegacyTables(t *testing.T) {
	n := newNode(t, viaNFTables)
	theirs := []string{"-t", iptables.NATTable, "-A", "POSTROUTING", "-s", "172.17.0.0/16", "-j", "MASQUERADE"}
	n.command("iptables-legacy", theirs...)
	n.leftBehind("id", n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80}))

	log, logged := logs(n.t)
	m := n.manager(log)
	n.runs(m, logged)

	save := n.command("iptables-legacy-save")
	assert.Contains(t, save, strings.Join(theirs[2:], " "))
	assert.False(t, isOurs(save), save)
}

// shim puts a script in front of a program, which is $real there.
func shim(t *testing.T, name, script string) {
	t.Helper()

	path, err := exec.LookPath(name)
	require.NoError(t, err)

	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\nreal="+path+"\n"+script), 0o700))
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

// What others do beside an operation of ours is not taken for ours, be it one that
// changes something or not.
func TestWipedBesideOperation(t *testing.T) {
	eachVariant(t, func(t *testing.T, n *node) {
		flag := filepath.Join(t.TempDir(), "now")
		shim(t, "iptables-"+string(n.variant)+"-restore",
			fmt.Sprintf(`"$real" "$@" && if [ -e %[1]s ]; then rm %[1]s; iptables-%[2]s -w -t nat -F; fi`, flag, n.variant))

		log, logged := logs(n.t)
		m := n.manager(log)
		pods := map[string][]*PodPortMapping{"id": {n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})}}
		require.NoError(t, n.add(m, "id", pods["id"][0]))
		n.runs(m, logged)

		for _, id := range []string{"id", "another"} {
			pods[id] = pods["id"]
			if id != "id" {
				pods[id] = []*PodPortMapping{n.pod(1, IPv4, &PortMapping{HostPort: 9090, ContainerPort: 80})}
			}

			untilLooked(t, m) // what is still under way
			require.NoError(t, os.WriteFile(flag, nil, 0o600))
			require.NoError(t, n.add(m, id, pods[id][0]))
			n.soon(func() bool { return len(n.deviations(IPv4, rowsOfAll(t, IPv4, pods))) == 0 })
		}
	})
}

// A process that commits and then hangs leaves nothing that Run does not take out.
func TestHangsAfterCommit(t *testing.T) {
	eachVariant(t, func(t *testing.T, n *node) {
		flag := filepath.Join(t.TempDir(), "now")
		shim(t, "iptables-"+string(n.variant)+"-restore",
			fmt.Sprintf(`"$real" "$@" && if [ -e %[1]s ]; then rm %[1]s; exec sleep 1000; fi`, flag))

		m := n.manager(WithTimeout(testbed.Stretch(time.Second)))
		pods := map[string][]*PodPortMapping{"stays": {n.pod(0, IPv4, &PortMapping{HostPort: 9090, ContainerPort: 80})}}
		require.NoError(t, n.add(m, "stays", pods["stays"][0]))
		n.run(m)
		require.NoError(t, os.WriteFile(flag, nil, 0o600))
		require.ErrorIs(t, n.add(m, "id", n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})), context.DeadlineExceeded)
		n.soon(func() bool { return len(n.deviations(IPv4, rowsOfAll(t, IPv4, pods))) == 0 })
		n.exactly(m, pods)
	})
}

// A flow that has begun while rows were missing goes to the pod when they are back,
// though its sender does not pause.
func TestFlowsAfterRepair(t *testing.T) {
	eachBackend(t, func(t *testing.T, n *node) {
		for name, repair := range map[string]func(n *node, m *Manager){
			"Run": (*node).run,
			"another pod's Add": func(n *node, m *Manager) {
				require.NoError(t, n.add(m, "b", n.pod(1, IPv4, &PortMapping{HostPort: 9090, ContainerPort: 80})))
			},
			"a Sync that cannot have all of the pod": func(n *node, m *Manager) {
				s := n.hostService("tcp", "192.0.2.1:8005")
				n.t.Cleanup(func() { assert.NoError(n.t, s.Close()) })

				pod := n.pod(0, IPv4, &PortMapping{HostPort: 5353, ContainerPort: 53, Protocol: "UDP"}, &PortMapping{HostPort: 8005, ContainerPort: 80})
				require.ErrorIs(t, n.sync(m, map[string][]*PodPortMapping{"id": {pod}}), syscall.EADDRINUSE)
			},
			"a Sync that finds the pod invalid": func(n *node, m *Manager) {
				require.ErrorIs(t, n.sync(m, map[string][]*PodPortMapping{"id": {n.pod(0, IPv4, &PortMapping{HostPort: -1})}}), ErrInvalidMapping)
			},
		} {
			t.Run(name, func(t *testing.T) {
				n := newNode(t, n.variant)
				n.serve(0, "udp", IPv4, 53)

				m := n.manager()
				require.NoError(t, n.add(m, "id", n.pod(0, IPv4, &PortMapping{HostPort: 5353, ContainerPort: 53, Protocol: "UDP"})))
				s := n.mislead(t, 5353)
				repair(n, m)
				s.reaches(t, "web")
			})
		}
	})
}

// mislead begins a flow while there are no rows for IPv4.
func (n *node) mislead(t *testing.T, port uint16) *sender {
	t.Helper()
	n.wipeAll()

	return n.sendUntranslated(t, port)
}

// sendUntranslated begins a flow that no rule leads anywhere.
func (n *node) sendUntranslated(t *testing.T, port uint16) *sender {
	t.Helper()
	n.command("nft", `add table ip others; add chain ip others tracks { type nat hook prerouting priority 0; }; add rule ip others tracks ct state new counter`)

	s := n.send(netip.AddrPortFrom(n.nodeIP(IPv4), port))
	n.soon(func() bool {
		flows, err := n.nfnetlink().Flows(t.Context(), unix.NFPROTO_IPV4, unix.IPPROTO_UDP, port)
		require.NoError(t, err)

		return slices.ContainsFunc(flows, func(flow nfnetlink.Flow) bool { return !flow.Translated })
	})

	return s
}

// They are also when a new process has made anew rules that somebody had flushed.
func TestFlowsAfterRestart(t *testing.T) {
	n := newNode(t, viaNFTables)
	n.serve(0, "udp", IPv4, 53)
	n.leftBehind("id", n.pod(0, IPv4, &PortMapping{HostPort: 5353, ContainerPort: 53, Protocol: "UDP"}))
	n.wipe(IPv4)

	s := n.sendUntranslated(t, 5353)
	n.manager()
	s.reaches(t, "web")
}

// So are those of a time in between, of which nothing else is left: somebody has put the rules
// back.
func TestFlowsAfterRestore(t *testing.T) {
	n := newNode(t, viaNFTables)
	n.serve(0, "udp", IPv4, 53)
	n.leftBehind("id", n.pod(0, IPv4, &PortMapping{HostPort: 5353, ContainerPort: 53, Protocol: "UDP"}))
	n.wipe(IPv4)

	s := n.sendUntranslated(t, 5353)
	n.commit(nftOver(t, n.nfnetlink(), IPv4).Objects()...)
	n.manager()
	s.reaches(t, "web")
}

// Somebody who comes between the look and the transaction is looked at again, also
// where everything is to go.
func TestDemolishOvertaken(t *testing.T) {
	eachVariant(t, func(t *testing.T, n *node) {
		fake := &fakeIPTables{IPTables: n.realIPTables()}
		m := n.oneFamily(fake)
		require.NoError(t, n.add(m, "id", n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})))

		fake.restore = func(input []byte) ([]byte, error) {
			fake.restore = nil

			n.feed(iptables.CmdDelete + iptables.NATRules(IPv4, true)[0].String())

			return input, nil
		}
		n.do(func() {
			_, err := m.backend.Reconcile(t.Context(), row.Nothing())
			require.NoError(t, err)
		})
		assert.Empty(t, n.ours(IPv4))
	})
}

// Flows go where they should also after an operation, or a repair, whose time was
// up when it came to what is from before.
func TestFlowsThoughLeftBehind(t *testing.T) {
	n := newNode(t, iptables.Legacy)
	n.serve(0, "udp", IPv4, 53)
	n.serve(1, "udp", IPv4, 53)

	old := n.pod(0, IPv4, &PortMapping{HostPort: 7000, ContainerPort: 80})
	n.leftBehind("old", old)

	before := *n
	n.change(viaNFTables)

	m := n.manager(WithTimeout(testbed.Stretch(time.Second)))
	mapping := &PortMapping{HostPort: 5353, ContainerPort: 53, Protocol: "UDP"}
	require.NoError(t, n.add(m, "id", n.pod(0, IPv4, mapping)))

	s := n.send(netip.AddrPortFrom(n.nodeIP(IPv4), 5353))
	s.reaches(t, "web")

	unlock := lockXtables(t)

	require.ErrorIs(t, n.sync(m, map[string][]*PodPortMapping{"id": {n.pod(1, IPv4, mapping)}}), context.DeadlineExceeded)
	s.reaches(t, "other")

	s = n.mislead(t, 5353)
	n.run(m)
	s.reaches(t, "other")
	assert.NotEmpty(t, before.ours(IPv4))
	unlock()
}

// An operation puts back what others have deleted, and then fails.
func TestFlowsThoughFailed(t *testing.T) {
	n := newNode(t, iptables.Legacy)
	n.serve(0, "udp", IPv4, 53)

	old := n.pod(0, IPv4, &PortMapping{HostPort: 7000, ContainerPort: 80})
	n.leftBehind("old", old)
	n.change(viaNFTables)

	m := n.manager(WithTimeout(testbed.Stretch(time.Second)))
	require.NoError(t, n.add(m, "id", n.pod(0, IPv4, &PortMapping{HostPort: 5353, ContainerPort: 53, Protocol: "UDP"})))

	defer lockXtables(t)()

	s := n.mislead(t, 5353)
	require.ErrorIs(t, n.add(m, "old", old), context.DeadlineExceeded)
	s.reaches(t, "web")
}

// Run gets to know what happens while somebody else has the turn for long.
func TestRunWaitsForItsTurn(t *testing.T) {
	n := newNode(t, viaNFTables)
	log, logged := logs(n.t)
	m := n.manager(WithTimeout(testbed.Stretch(100*time.Millisecond)), log)
	pods := map[string][]*PodPortMapping{"id": {n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})}}
	require.NoError(t, n.add(m, "id", pods["id"][0]))
	n.runs(m, logged)

	m.families[0].commitLock <- struct{}{}

	n.wipe(IPv4)
	<-time.After(2 * lookInterval)
	<-m.families[0].commitLock
	n.soon(func() bool { return len(n.deviations(IPv4, rowsOfAll(t, IPv4, pods))) == 0 })
}
