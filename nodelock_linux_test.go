package hostport

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cri-o/hostport/internal/iptables"
	"github.com/cri-o/hostport/internal/testbed"
)

// short is how long a manager of these tests waits for another one that stays.
var short = testbed.Stretch(300 * time.Millisecond) //nolint:gochecknoglobals // would be a constant if nothing were measured

// namesHolder asserts that an operation has waited for another manager until its time was
// up, and says whose it is.
func namesHolder(t *testing.T, err error, pid int) {
	t.Helper()

	name, readErr := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	require.NoError(t, readErr)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.ErrorContains(t, err, fmt.Sprintf("another manager has the host ports: process %d (%s)", pid, strings.TrimSpace(string(name))))
}

// While a process has the node's host ports, no other one reads or writes rows: one that has
// begun earlier knows of no row that the first one has removed since.
func TestSecondManager(t *testing.T) {
	eachFamily(t, func(t *testing.T, n *node, f IPFamily) {
		n.serve(0, "tcp", f, 80)

		x := n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80})
		y := n.pod(0, f, &PortMapping{HostPort: 8081, ContainerPort: 80})
		p := n.start(false, defaultTimeout)
		require.Empty(t, p.obey(order{Op: "add", ID: "x", Pod: x})[0].Err)

		// With New it is said at once, which is after the time limit.
		n.do(func() {
			begun := time.Now()
			_, err := New(WithTimeout(short), WithLogger(testLogger(t)))
			namesHolder(t, err, p.cmd.Process.Pid)
			assert.GreaterOrEqual(t, time.Since(begun), short)
		})

		var patient, impatient *Manager

		n.do(func() {
			begun := time.Now()
			patient = metaManager(t, WithBackend(n.backend()))
			impatient = metaManager(t, WithBackend(n.backend()), WithTimeout(short))

			assert.Less(t, time.Since(begun), patience, "the constructor does not wait")
			assert.Empty(t, patient.Mappings())
		})

		before := n.rules(f)

		for name, op := range map[string]func() error{
			"Add":    func() error { return impatient.Add("y", y, "") },
			"Remove": func() error { return impatient.Remove("x", x) },
			"Sync":   func() error { return impatient.Sync(t.Context(), nil) },
			"Check":  func() error { return impatient.Check(t.Context(), "x", x) },
		} {
			n.do(func() {
				begun := time.Now()
				namesHolder(t, op(), p.cmd.Process.Pid)
				assert.GreaterOrEqual(t, time.Since(begun), short, name)
			})
		}

		assert.Equal(t, before, n.rules(f))

		added := make(chan error)

		go func() { added <- n.Host.Do(func() error { return patient.Add("y", y, "") }) }()

		require.Empty(t, p.obey(order{Op: "remove", ID: "x"})[0].Err)
		require.Empty(t, p.obey(order{Op: "close"})[0].Err)
		require.NoError(t, <-added)
		require.Len(t, patient.Mappings(), 1)
		assert.EqualValues(t, 8081, patient.Mappings()[0].HostPort)
		n.answers(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(f), 8081), "web")
		n.refused(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(f), 8080))
		require.NoError(t, n.remove(patient, "y", nil))
		assert.Empty(t, n.leftOver(f))
	})
}

// The Remove of a manager that had to wait for too long is carried out when it gets its turn.
func TestRemoveBesideAnother(t *testing.T) {
	eachNode(t, func(t *testing.T, n *node) {
		first := n.manager()
		require.NoError(t, n.add(first, "id", n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})))

		var second *Manager

		n.do(func() { second = metaManager(t, n.on(), WithTimeout(short)) })
		err := n.remove(second, "id", nil)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.ErrorContains(t, err, "another manager has the host ports: "+n.process())
		n.run(second)
		assert.Len(t, first.Mappings(), 1)
		require.NoError(t, first.Close())
		n.soon(func() bool { return len(n.leftOver(IPv4)) == 0 })
	})
}

// Run takes over when the other manager has gone, and waits no longer than Close.
func TestRunBesideAnother(t *testing.T) {
	eachNode(t, func(t *testing.T, n *node) {
		first := n.manager()
		require.NoError(t, n.add(first, "id", n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})))

		var second *Manager

		n.do(func() { second = metaManager(t, n.on()) })
		n.run(second)

		waits := make(chan error)

		go func() {
			waits <- n.onHost(func() error {
				third := NewMetaHostportManager(n.on(), WithLogger(testLogger(t))).(*Manager)
				time.AfterFunc(short, func() { assert.NoError(t, third.Close()) })

				return third.Sync(t.Context(), nil)
			})
		}()

		begun := time.Now()

		require.ErrorIs(t, <-waits, os.ErrClosed)
		assert.Less(t, time.Since(begun), defaultTimeout)
		assert.Empty(t, second.Mappings())
		require.NoError(t, first.Close())
		n.soon(func() bool { return len(second.Mappings()) == 1 && second.Mappings()[0].Held })
	})
}

// However the process ends that has them, the host ports are free then.
func TestKilledManager(t *testing.T) {
	eachBackend(t, func(t *testing.T, n *node) {
		p := n.start(true, defaultTimeout)
		require.Empty(t, p.obey(order{Op: "add", ID: "id", Pod: n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})})[0].Err)
		p.kill()
		assert.Len(t, n.manager(WithTimeout(patience)).Mappings(), 1)
	})
}

// Managers of one family each do not hinder each other, nor do those of two nodes. One of
// both families works in the other one.
func TestManagersOfOneFamily(t *testing.T) {
	eachVariantAndFamily(t, func(t *testing.T, n *node, f IPFamily) {
		other := map[IPFamily]IPFamily{IPv4: IPv6, IPv6: IPv4}[f]
		of := func(f IPFamily) *hostportManager {
			ipt, err := iptables.FindVariant(t.Context(), f, n.variant)
			require.NoError(t, err)

			return n.oneFamily(ipt, WithTimeout(short))
		}
		first, second := of(f), of(other)
		pod := func(n *node, f IPFamily) *PodPortMapping {
			return n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80})
		}

		require.NoError(t, n.add(first, "id", pod(n, f)))
		require.NoError(t, n.add(second, "id", pod(n, other)))
		namesHolder(t, n.add(of(f), "id", pod(n, f)), os.Getpid())
		require.NoError(t, second.Close())

		both := n.manager(WithTimeout(short))
		require.NoError(t, n.add(both, "id", pod(n, other)))
		namesHolder(t, n.add(both, "id", pod(n, f)), os.Getpid())
		namesHolder(t, n.add(of(other), "id", pod(n, other)), os.Getpid())
		require.NoError(t, first.Close())
		require.NoError(t, n.add(both, "id", pod(n, f)))

		elsewhere := newNode(t, n.variant)
		require.NoError(t, elsewhere.add(elsewhere.manager(WithTimeout(short)), "id", pod(elsewhere, f)))
	})
}

// Of two managers that wait, one gets both families, whichever each has asked for.
func TestManagersShareNothing(t *testing.T) {
	eachNode(t, func(t *testing.T, n *node) {
		before := n.manager()
		families := []IPFamily{IPv4, IPv6}
		managers := make([]*Manager, len(families))
		added := make(chan int, len(families))

		for i, f := range families {
			n.do(func() { managers[i] = metaManager(t, n.on(), WithTimeout(patience)) })

			go func() {
				assert.NoError(t, n.onHost(func() error {
					return managers[i].Add("id", n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80}), "")
				}))
				added <- i
			}()
		}

		require.NoError(t, before.Close())

		first := <-added
		require.NoError(t, n.add(managers[first], "id", n.pod(0, families[1-first], &PortMapping{HostPort: 8080, ContainerPort: 80})))
		require.NoError(t, n.remove(managers[first], "id", nil))
		require.NoError(t, managers[first].Close())
		assert.Equal(t, 1-first, <-added)
	})
}

// Without CAP_NET_ADMIN a process has nothing that others would wait for. What it does through
// an IPTables of its own, it can do.
func TestUnprivilegedManager(t *testing.T) {
	n := anyNode(t)
	pod := n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})

	var unprivileged HostPortManager

	done := make(chan error)

	go func() {
		runtime.LockOSThread() // for good: the thread ends with this goroutine

		hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}

		var data [2]unix.CapUserData

		err := errors.Join(unix.Setns(n.Host.FD(), unix.CLONE_NEWNET), unix.Capset(&hdr, &data[0]))
		if err == nil {
			unprivileged = NewHostportManager(emptyIPTables{}, WithLogger(testLogger(t)), WithoutLocalhost())
			err = unprivileged.Add("id", pod, "")
		}
		done <- err
	}()
	require.NoError(t, <-done)

	m := n.manager(WithTimeout(short), WithoutSockets())
	require.NoError(t, n.add(m, "id", pod))
	require.NoError(t, unprivileged.(*hostportManager).Close())
}

// emptyIPTables takes everything and keeps nothing.
type emptyIPTables struct{}

func (emptyIPTables) IsIPv6() bool                                 { return false }
func (emptyIPTables) Save(context.Context, string) ([]byte, error) { return nil, nil }
func (emptyIPTables) Restore(context.Context, []byte) error        { return nil }

// Of short-lived processes that all come at once, each does what it is there for.
func TestStormOfProcesses(t *testing.T) {
	count := max(20/int(testbed.Stretch(1)), 4)

	eachBackend(t, func(t *testing.T, n *node) {
		pod := func(i int) *PodPortMapping {
			f := []IPFamily{IPv4, IPv6}[i/2%2]

			return n.pod(i%2, f, &PortMapping{HostPort: int32(8000 + i), ContainerPort: 80})
		}
		id := func(i int) string { return "pod" + strconv.Itoa(i) }

		m := n.manager()
		for i := range count / 2 {
			require.NoError(t, n.add(m, id(i), pod(i)))
		}

		require.NoError(t, m.Close())

		failed := make(chan error)

		for i := range count {
			do := order{Op: "remove", ID: id(i)}
			if i >= count/2 {
				do = order{Op: "add", ID: id(i), Pod: pod(i)}
			}

			p := n.launch(false, testbed.Stretch(time.Minute)) // the last one waits for all others

			go func() { failed <- p.live(do) }()
		}

		for range count {
			assert.NoError(t, <-failed)
		}

		m = n.manager()
		assert.Len(t, m.Mappings(), count/2)

		for i := count / 2; i < count; i++ {
			n.do(func() { require.NoError(t, m.Check(t.Context(), id(i), pod(i))) })
			require.NoError(t, n.remove(m, id(i), pod(i)))
		}

		for _, f := range []IPFamily{IPv4, IPv6} {
			assert.Empty(t, n.leftOver(f))
		}
	})
}

// live has a runtime that is being started do one thing and close its manager.
func (p *runtimeProcess) live(do order) error {
	_, err := p.replies(1)

	for _, o := range []order{do, {Op: "close"}} {
		if err == nil {
			err = p.in.Encode([]order{o})
		}

		if err == nil {
			var replies []reply
			if replies, err = p.replies(1); err == nil && replies[0].Err != "" {
				err = errors.New(replies[0].Err)
			}
		}
	}

	if err != nil {
		err = fmt.Errorf("%s %s: %w: %s", do.Op, do.ID, err, &p.stderr)
	}

	return err
}
