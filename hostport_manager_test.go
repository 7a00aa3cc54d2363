//go:build linux

package hostport

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cri-o/hostport/internal/iptables"
	"github.com/cri-o/hostport/internal/outcome"
	"github.com/cri-o/hostport/internal/row"
	"github.com/cri-o/hostport/internal/testbed"
)

func TestConflicts(t *testing.T) {
	eachNode(t, func(t *testing.T, n *node) {
		for _, f := range []IPFamily{IPv4, IPv6} {
			ip := n.nodeIP(f).String()

			for _, tc := range []struct {
				name          string
				first, second *PortMapping
				conflict      bool
			}{
				{"same", &PortMapping{}, &PortMapping{}, true},
				{"any and one", &PortMapping{}, &PortMapping{HostIP: ip}, true},
				{"one and any", &PortMapping{HostIP: ip}, &PortMapping{HostIP: f.AnyAddr().String()}, true},
				{"one address", &PortMapping{HostIP: ip}, &PortMapping{HostIP: ip}, true},
				{"two addresses", &PortMapping{HostIP: ip}, &PortMapping{HostIP: n.otherNodeIP(f).String()}, false},
				{"two protocols", &PortMapping{}, &PortMapping{Protocol: "UDP"}, false},
				{"SCTP", &PortMapping{Protocol: "SCTP"}, &PortMapping{Protocol: "sctp"}, true},
			} {
				t.Run("IPv"+string(f)+"/"+tc.name, func(t *testing.T) {
					n := n.within(t)
					m := n.manager()

					for _, pm := range []*PortMapping{tc.first, tc.second} {
						pm.HostPort, pm.ContainerPort = 8080, 80
					}

					extra := &PortMapping{HostPort: 8081, ContainerPort: 80}
					require.NoError(t, n.add(m, "first", n.pod(0, f, tc.first)))
					before := n.dump(m)

					err := n.add(m, "second", n.pod(1, f, extra, tc.second))
					if !tc.conflict {
						require.NoError(t, err)
						require.NoError(t, n.remove(m, "second", nil))
					} else {
						conflict := (*ConflictError)(nil)
						require.ErrorAs(t, err, &conflict)
						assert.Equal(t, "ns/web", conflict.OtherPod)
						assert.Equal(t, "second", conflict.ID)
						assert.Equal(t, "first", conflict.OtherID)
						assert.ErrorContains(t, err, "ns/other")
						assert.ErrorContains(t, err, "ns/web")
						assert.ErrorContains(t, err, ":8080")

						again := n.add(m, "again", n.pod(0, f, tc.second))
						assert.ErrorContains(t, again, "pod ns/web, sandbox again")
						assert.ErrorContains(t, again, "by pod ns/web, sandbox first")
					}

					assert.Equal(t, before, n.dump(m))

					// The pod that was refused is cleaned up: nothing is its own.
					require.NoError(t, n.remove(m, "second", n.pod(1, f, extra, tc.second)))
					assert.Equal(t, before, n.dump(m))

					// The first one gone, the port is free.
					require.NoError(t, n.remove(m, "first", n.pod(0, f, tc.first)))
					require.NoError(t, n.add(m, "second", n.pod(1, f, tc.second)))
					require.NoError(t, n.remove(m, "second", nil))
					assert.Empty(t, m.Mappings())
				})
			}
		}
	})
}

func TestAddAgain(t *testing.T) {
	eachNode(t, func(t *testing.T, n *node) {
		m := n.manager()
		first := &PortMapping{HostPort: 8080, ContainerPort: 80}
		more := &PortMapping{HostPort: 8081, ContainerPort: 81, Protocol: "UDP"}

		require.NoError(t, n.add(m, "id", n.pod(0, IPv4, first)))
		before := n.dump(m)

		require.NoError(t, n.add(m, "id", n.pod(0, IPv4, first)))
		assert.Equal(t, before, n.dump(m), "same arguments")

		require.NoError(t, n.add(m, "id", n.pod(0, IPv4, &PortMapping{
			HostPort: 8080, ContainerPort: 80, Protocol: "tcp", HostIP: "0.0.0.0",
		})))
		assert.Equal(t, before, n.dump(m), "other words for the same")

		require.NoError(t, n.add(m, "id", n.pod(0, IPv4, more)))
		require.Len(t, m.Mappings(), 2, "rows that are not named stay")

		require.NoError(t, n.add(m, "id", n.pod(1, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 82})))

		moved := m.Mappings()[0]
		assert.Equal(t, n.Pods[1].IPv4.String(), moved.PodIP.String())
		assert.Equal(t, int32(82), moved.ContainerPort)
		assert.True(t, moved.Held)

		// The words of Remove need not be those of Add.
		require.NoError(t, n.remove(m, "id", &PodPortMapping{PortMappings: []*PortMapping{
			{HostPort: 8080, Protocol: "tcp", HostIP: "0.0.0.0"},
			{HostPort: 70000},
			{HostPort: 8081, Protocol: "bogus"},
			{HostPort: 8081, Protocol: "udp", HostIP: "::ffff:0.0.0.0"},
		}}))
		assert.Empty(t, m.Mappings())
	})
}

// What costs nothing starts no process, whatever state iptables is in.
func TestNothingToDo(t *testing.T) {
	eachBackend(t, func(t *testing.T, n *node) {
		m := n.manager()
		require.NoError(t, n.add(m, "id", n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})))

		before := n.dump(m)
		started := n.countWork()
		port := &PortMapping{HostPort: 8080, ContainerPort: 80}

		for name, do := range map[string]func() error{
			"add nil": func() error { return n.add(m, "id", nil) },
			"add on host network": func() error {
				return n.add(m, "id", &PodPortMapping{HostNetwork: true, PortMappings: []*PortMapping{port}})
			},
			"add without mapping": func() error { return n.add(m, "id", n.pod(0, IPv4)) },
			"add without port":    func() error { return n.add(m, "id", n.pod(0, IPv4, &PortMapping{ContainerPort: 80})) },
			"add other family": func() error {
				return n.add(m, "id", n.pod(0, IPv4, &PortMapping{HostPort: 1, ContainerPort: 1, HostIP: "::"}))
			},
			"remove on host network": func() error {
				return n.remove(m, "id", &PodPortMapping{HostNetwork: true, PortMappings: []*PortMapping{port}})
			},
			"remove without mapping":   func() error { return n.remove(m, "id", &PodPortMapping{}) },
			"remove without port":      func() error { return n.remove(m, "id", n.pod(0, IPv4, &PortMapping{ContainerPort: 80})) },
			"remove what is not there": func() error { return n.remove(m, "id", n.pod(0, IPv4, &PortMapping{HostPort: 9})) },
			"remove another's":         func() error { return n.remove(m, "other", n.pod(0, IPv4, port)) },
			"remove all of nobody":     func() error { return n.remove(m, "nobody", nil) },
		} {
			require.NoError(t, do(), name)
			assert.Zero(t, started(), name)
		}

		assert.Equal(t, before, n.dump(m))
	})
}

func TestInvalidChangesNothing(t *testing.T) {
	eachNode(t, func(t *testing.T, n *node) {
		m := n.manager()
		require.NoError(t, n.add(m, "id", n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})))

		before := n.dump(m)
		good := &PortMapping{HostPort: 8081, ContainerPort: 80}

		for _, bad := range []*PortMapping{
			{HostPort: -1, ContainerPort: 1},
			{HostPort: 8082, ContainerPort: 0},
			{HostPort: 8082, ContainerPort: 1, Protocol: "-j"},
			{HostPort: 8082, ContainerPort: 1, HostIP: "10.0.0.1\n-A"},
			{HostPort: 8081, ContainerPort: 81},
		} {
			require.ErrorIs(t, n.add(m, "id", n.pod(0, IPv4, good, bad)), ErrInvalidMapping)
			assert.Equal(t, before, n.dump(m))
		}
	})
}

// Names reach the kernel as rule comments: what is in them must stay there.
func TestNamesCannotInject(t *testing.T) {
	eachVariant(t, func(t *testing.T, n *node) {
		for _, f := range []IPFamily{IPv4, IPv6} {
			before := n.command(iptables.Command(f)+"-"+string(n.variant), "-t", "filter", "-S")
			m := n.manager()

			for i, name := range []string{
				"x\" -j ACCEPT\nCOMMIT\n*filter\n-A INPUT -j ACCEPT\nCOMMIT\n*nat\n#",
				"\x00", "\\\"", "`id`$(id)", "-A INPUT -j ACCEPT", strings.Repeat("long", 80), "\xff\xfe", "ünï",
			} {
				pod := n.pod(0, f, &PortMapping{HostPort: int32(8080 + i), ContainerPort: 80})
				pod.Name, pod.Namespace = name, name
				require.NoError(t, n.add(m, "id", pod), "%q", name)
			}

			assert.Len(t, m.Mappings(), 8)
			assert.Equal(t, before, n.command(iptables.Command(f)+"-"+string(n.variant), "-t", "filter", "-S"))

			require.NoError(t, m.Close())
			m = n.manager()
			assert.Len(t, m.Mappings(), 8)

			require.NoError(t, n.remove(m, "id", nil))
			assert.Empty(t, m.Mappings())
			require.NoError(t, m.Close())
			n.onlyBase(f)
		}
	})
}

var errInjected = errors.New("injected")

// Whatever step fails, all is as before, and the second try works.
func TestFailedStepIsUndone(t *testing.T) {
	eachVariant(t, func(t *testing.T, n *node) {
		pod := n.pod(0, IPv4,
			&PortMapping{HostPort: 8080, ContainerPort: 81},
			&PortMapping{HostPort: 8090, ContainerPort: 80, Protocol: "UDP"},
			&PortMapping{HostPort: 8091, ContainerPort: 80})

		for _, op := range []struct {
			name string
			do   func(m HostPortManager) error
		}{
			{"add", func(m HostPortManager) error { return n.add(m, "id", pod) }},
			{"move", func(m HostPortManager) error {
				return n.add(m, "id", n.pod(1, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80}))
			}},
			{"remove", func(m HostPortManager) error { return n.remove(m, "id", nil) }},
		} {
			const all = 1 + 1 + outcome.MaxOvertaken

			// The restores that fail, and whether the listing does that a
			// repair begins with.
			for _, fail := range []struct {
				name     string
				restores int32
				line     func(input string) error
				save     bool
			}{
				{"commit and repairs", all, func(string) error { return errInjected }, false},
				{"commit and listing", 1, func(string) error { return errInjected }, true},
				{"refused", all, func(input string) error { return &lineError{lineOf(input, "-A "+iptables.DNATPrefix)} }, false},
				{"base", all, func(string) error { return &lineError{2} }, false},
			} {
				t.Run(op.name+"/"+fail.name, func(t *testing.T) {
					n := n.within(t)
					fake := &fakeIPTables{IPTables: n.realIPTables()}
					m := n.oneFamily(fake)

					require.NoError(t, n.add(m, "id", n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})))

					before := n.dump(managerOf(m))
					held := heldPorts(m)
					left := fail.restores

					fake.restore = func(input []byte) ([]byte, error) {
						left--
						if left >= 0 {
							return nil, fail.line(string(input))
						}

						return input, nil
					}
					fake.save = func() error {
						if fail.save {
							return errInjected
						}

						return nil
					}

					err := op.do(m)
					require.Error(t, err)
					assert.ErrorContains(t, err, "host ports of pod ")

					if op.name == "remove" {
						before = disowned(before)
					}

					assert.Equal(t, before, n.dump(managerOf(m)))
					assert.Equal(t, held, heldPorts(m))

					fake.restore, fake.save = nil, nil
					require.NoError(t, op.do(m))
					require.NoError(t, n.remove(m, "id", nil))
					assert.Empty(t, m.mappings())
					assert.Empty(t, heldPorts(m))
					n.onlyBase(IPv4)
				})
			}
		}
	})
}

// lineOf is the number of the last line with a prefix, or 1.
func lineOf(input, prefix string) int {
	found := 1

	for i, line := range strings.Split(input, "\n") {
		if strings.HasPrefix(line, prefix) {
			found = i + 1
		}
	}

	return found
}

func managerOf(m *hostportManager) *Manager { return &Manager{families: []*hostportManager{m}} }

func heldPorts(m *hostportManager) []string {
	var held []string

	for _, mapping := range m.mappings() {
		if mapping.Held {
			held = append(held, mapping.PodIDHash)
		}
	}

	for range m.sockets.Held {
		held = append(held, "socket")
	}

	return sorted(held)
}

// The socket step fails where another process has a port.
func TestPortInUseIsUndone(t *testing.T) {
	eachNode(t, func(t *testing.T, n *node) {
		m := n.manager()
		require.NoError(t, n.add(m, "old", n.pod(1, IPv4, &PortMapping{HostPort: 8079, ContainerPort: 80})))

		server := n.takePort("tcp", "0.0.0.0:8081")
		before := n.dump(m)
		pod := n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80}, &PortMapping{HostPort: 8081, ContainerPort: 80})

		err := n.add(m, "id", pod)
		require.ErrorIs(t, err, syscall.EADDRINUSE)
		assert.ErrorContains(t, err, "ns/web")
		assert.ErrorContains(t, err, "TCP 0.0.0.0:8081")
		assert.ErrorContains(t, err, "address already in use by "+n.process())
		assert.Equal(t, before, n.dump(m))

		require.NoError(t, server.Close())
		require.NoError(t, n.add(m, "id", pod))
		assert.Len(t, m.Mappings(), 3)
	})
}

// process is how errors name the process of the test.
func (n *node) process() string {
	if n.variant == viaMemory {
		return "another process of the node"
	}

	return "process " + strconv.Itoa(os.Getpid())
}

// Operations that meet go together, and one that the kernel refuses fails
// alone.
func TestGroupCommit(t *testing.T) {
	eachVariant(t, func(t *testing.T, n *node) {
		const pods, bad = 50, 17

		// What is wrong with one pod is in its rule, and the real
		// iptables-restore finds it.
		badIP := "10.88.9." + strconv.Itoa(bad)
		fake := &fakeIPTables{IPTables: n.realIPTables(), restore: func(input []byte) ([]byte, error) {
			return []byte(strings.ReplaceAll(string(input), badIP+":80", badIP+".1:80")), nil
		}}
		m := n.oneFamily(fake)
		fake.saves.Store(0)

		started := countProcesses(t)
		fake.IPTables = n.realIPTables() // through the counters

		errs := n.atOnce(pods, func(i int) error { return m.Add("id"+strconv.Itoa(i), podNumber(i), "") })
		processes := started()
		t.Logf("%d processes for %d Adds", processes, pods)
		assert.LessOrEqual(t, processes, 4)

		for i, err := range errs {
			if i != bad {
				assert.NoError(t, err, i)

				continue
			}

			if assert.Error(t, err) {
				assert.ErrorContains(t, err, "ns/pod17")
				assert.ErrorContains(t, err, badIP)
			}
		}

		mappings := m.mappings()
		assert.Len(t, mappings, pods-1)
		assert.Len(t, parsedRows(t, n), pods-1)
		assert.Len(t, m.sockets.Held, pods-1)
	})
}

func parsedRows(t *testing.T, n *node) []*row.Row {
	t.Helper()

	table, err := iptables.ParseSave([]byte(n.iptablesSave(IPv4)), iptables.NATTable)
	require.NoError(t, err)

	return table.Rows(IPv4)
}

func (n *node) iptablesSave(f IPFamily) string {
	n.t.Helper()

	return n.command(iptables.Command(f)+"-"+string(n.variant)+"-save", "-t", iptables.NATTable)
}

// together runs operations so that all but the first are committed together:
// they queue up while the first one's restore is held back. restore decides
// about the others' input.
func together(n *node, fake *fakeIPTables, m *hostportManager, restore func(input string) error, ops ...func() error) []error {
	n.t.Helper()

	hold, held := make(chan struct{}), make(chan struct{})
	first := true
	fake.restore = func(input []byte) ([]byte, error) {
		if first {
			first = false

			close(held)
			<-hold

			return input, nil
		}

		return input, restore(string(input))
	}

	var wg sync.WaitGroup

	errs := make([]error, len(ops))

	for i, op := range ops {
		wg.Go(func() { errs[i] = n.Host.Do(op) })

		if i == 0 {
			<-held

			continue
		}

		require.Eventually(n.t, func() bool {
			m.queueMu.Lock()
			defer m.queueMu.Unlock()

			return len(m.queue) == i
		}, patience, time.Millisecond)
	}

	close(hold)
	wg.Wait()

	fake.restore = nil

	return errs
}

// A failure that cannot be laid at anybody's door is tried alone by each.
func TestGroupCommitWithoutBlame(t *testing.T) {
	n := newNode(t, iptables.NFT)
	fake := &fakeIPTables{IPTables: n.realIPTables()}
	m := n.oneFamily(fake)

	var ops []func() error

	for i := range 5 {
		pod := podAt("10.88.9."+strconv.Itoa(i), &PortMapping{HostPort: int32(8000 + i), ContainerPort: 80})
		ops = append(ops, func() error { return m.Add("id"+strconv.Itoa(i), pod, "") })
	}

	errs := together(n, fake, m, func(input string) error {
		if strings.Contains(input, "10.88.9.2:80") {
			return errInjected
		}

		return nil
	}, ops...)

	for i, err := range errs {
		if i == 2 {
			assert.ErrorIs(t, err, errInjected)
		} else {
			assert.NoError(t, err)
		}
	}

	assert.Len(t, m.mappings(), 4)
	assert.Len(t, parsedRows(t, n), 4)
}

// What one operation found because of another that was then undone is no
// outcome.
func TestGroupCommitForgetsUndone(t *testing.T) {
	n := newNode(t, iptables.NFT)
	fake := &fakeIPTables{IPTables: n.realIPTables()}
	m := n.oneFamily(fake)

	pod := func(i int, port int32) *PodPortMapping {
		return n.pod(i, IPv4, &PortMapping{HostPort: port, ContainerPort: 80})
	}
	first := func() error { return m.Add("first", pod(0, 9000), "") }

	errs := together(n, fake, m,
		func(input string) error {
			if strings.Contains(input, n.Pods[0].IPv4.String()+":80") {
				return errInjected
			}

			return nil
		},
		first,
		func() error { return m.Add("a", pod(0, 8080), "") },
		func() error { return m.Add("b", pod(1, 8080), "") })
	require.ErrorIs(t, errs[1], errInjected)
	require.NoError(t, errs[2], "the port is free: a's Add failed")
	require.Len(t, m.mappings(), 2)

	errs = together(n, fake, m,
		func(string) error { return errInjected },
		func() error { return m.Add("first", pod(0, 9001), "") },
		func() error { return m.Remove("b", nil) },
		func() error { return m.Remove("b", nil) })
	require.ErrorIs(t, errs[1], errInjected)
	require.ErrorIs(t, errs[2], errInjected, "b is still there")
	require.NoError(t, n.remove(m, "b", nil))
	assert.Len(t, m.mappings(), 2)
}

// Where it is another pod's row, which is to be put back, that iptables refuses, the
// operation fails, and nothing else.
func TestRefusedWhenPutBack(t *testing.T) {
	eachVariant(t, func(t *testing.T, n *node) {
		n.serve(0, "tcp", IPv4, 80)

		fake := &fakeIPTables{IPTables: n.realIPTables()}
		m := n.oneFamily(fake)
		stays := n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})
		comes := n.pod(1, IPv4, &PortMapping{HostPort: 9090, ContainerPort: 80})
		require.NoError(t, n.add(m, "stays", stays))
		n.wipeAll()

		to := n.Pods[0].IPv4.String() + ":80"
		fake.restore = func(input []byte) ([]byte, error) {
			return []byte(strings.ReplaceAll(string(input), to, "1."+to)), nil
		}

		require.ErrorContains(t, n.add(m, "comes", comes), "Bad IP address")
		assert.Len(t, m.mappings(), 1)
		assert.Empty(t, parsedRows(t, n))

		fake.restore = nil

		require.NoError(t, n.add(m, "comes", comes))
		assert.Len(t, parsedRows(t, n), 2)
		n.answers(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(IPv4), 8080), "web")
	})
}

// Of several that build on each other and fail together nothing stays.
func TestGroupCommitUndoesAll(t *testing.T) {
	n := newNode(t, iptables.NFT)
	fake := &fakeIPTables{IPTables: n.realIPTables()}
	m := n.oneFamily(fake)

	one := n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80, HostIP: n.nodeIP(IPv4).String()})
	other := n.pod(1, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80, HostIP: n.otherNodeIP(IPv4).String()})
	stays := n.pod(0, IPv4, &PortMapping{HostPort: 9090, ContainerPort: 80})
	moves := n.pod(1, IPv4, &PortMapping{HostPort: 9090, ContainerPort: 80})
	require.NoError(t, n.add(m, "stays", stays))

	errs := together(n, fake, m, func(string) error { return errInjected },
		func() error {
			return m.Add("first", n.pod(0, IPv4, &PortMapping{HostPort: 9000, ContainerPort: 80}), "")
		},
		func() error { return m.Add("one", one, "") },
		func() error { return m.Add("other", other, "") },
		func() error { return m.Add("stays", moves, "") },
		func() error { return m.Remove("stays", nil) })
	for _, err := range errs[1:] {
		require.ErrorIs(t, err, errInjected)
	}

	require.Len(t, m.mappings(), 2)
	assert.Len(t, parsedRows(t, n), 2)

	for _, mapping := range m.mappings() {
		assert.True(t, mapping.Held, mapping)
	}

	require.NoError(t, n.add(m, "another", n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})), "nobody has the port")
	require.NoError(t, n.add(m, "stays", stays))

	for _, id := range []string{"first", "stays", "another"} {
		require.NoError(t, n.remove(m, id, nil))
	}

	assert.Empty(t, m.mappings())
	assert.Empty(t, heldPorts(m))
	n.onlyBase(IPv4)
}

// Several that fail together may have taken effect, also where in the end none of them
// comes to the kernel again: Remove of one takes that back.
func TestGroupCommitTakesEffect(t *testing.T) {
	n := newNode(t, iptables.NFT)
	n.serve(0, "tcp", IPv4, 80)

	ipt := n.realIPTables()
	fake := &fakeIPTables{IPTables: ipt}
	m := n.oneFamily(fake)

	// Connections that have the ports keep us from holding them.
	var conns []net.Conn

	ports := []uint16{8080, 8081}

	n.do(func() {
		for _, port := range ports {
			d := net.Dialer{LocalAddr: addrOf("tcp", netip.AddrPortFrom(podGatewayOf(n, IPv4), port))}
			conn, err := d.DialContext(t.Context(), "tcp", netip.AddrPortFrom(n.Pods[0].IPv4, 80).String())
			require.NoError(t, err)

			tcp, ok := conn.(*net.TCPConn)
			require.True(t, ok)
			require.NoError(t, tcp.SetLinger(0)) // no TIME_WAIT

			conns = append(conns, conn)
		}
	})

	add := func(port uint16) func() error {
		return func() error {
			return m.Add(strconv.Itoa(int(port)), n.pod(0, IPv4, &PortMapping{HostPort: int32(port), ContainerPort: 80}), "")
		}
	}
	errs := together(n, fake, m,
		func(input string) error {
			for i, port := range ports { // and then a server has them
				assert.NoError(t, conns[i].Close())
				n.hostService("tcp", netip.AddrPortFrom(n.nodeIP(IPv4), port).String())
			}

			fake.save = func() error { return errInjected } // else all is found in place

			return errors.Join(ipt.Restore(t.Context(), []byte(input)), errInjected)
		},
		add(9000), add(ports[0]), add(ports[1]))
	require.NoError(t, errs[0])
	require.ErrorIs(t, errs[1], syscall.EADDRINUSE)
	require.ErrorIs(t, errs[2], syscall.EADDRINUSE)
	require.Len(t, m.mappings(), 1)
	require.Len(t, parsedRows(t, n), 3, "it did commit")

	fake.save = nil

	require.NoError(t, n.remove(m, strconv.Itoa(int(ports[0])), nil))
	assert.Len(t, parsedRows(t, n), 1)
}

// Ids of unequal length can give rows one name in the kernel, as CRI-O makes
// names. The second is refused, or it would take the first one's traffic.
func TestNamesCollide(t *testing.T) {
	n := newNode(t, iptables.NFT)
	m := n.manager()
	require.NoError(t, n.add(m, "pod1", n.pod(0, IPv4, &PortMapping{HostPort: 1080, ContainerPort: 80})))
	before := n.dump(m)

	err := n.add(m, "pod110", n.pod(1, IPv4, &PortMapping{HostPort: 80, ContainerPort: 80}))
	require.ErrorIs(t, err, ErrInvalidMapping)
	assert.ErrorContains(t, err, "ns/web")
	assert.ErrorContains(t, err, "want another sandbox id, hostPort or hostIP")
	assert.Equal(t, before, n.dump(m))

	// A row that has gone, or has never come to be, has no name.
	require.NoError(t, n.remove(m, "pod1", nil))
	require.NoError(t, n.add(m, "pod110", n.pod(1, IPv4, &PortMapping{HostPort: 80, ContainerPort: 80})))
	require.NoError(t, n.remove(m, "pod110", nil))

	s := n.hostService("tcp", "192.0.2.1:8080")
	require.ErrorIs(t, n.add(m, "pod1", n.pod(0, IPv4,
		&PortMapping{HostPort: 1080, ContainerPort: 80}, &PortMapping{HostPort: 8080, ContainerPort: 80})), syscall.EADDRINUSE)
	require.NoError(t, s.Close())
	require.NoError(t, n.add(m, "pod110", n.pod(1, IPv4, &PortMapping{HostPort: 80, ContainerPort: 80})))
}

// An operation ends in time when its turn does not come, or when its process
// hangs; what a killed process may have left is gone with the next one.
func TestTimeout(t *testing.T) {
	n := newNode(t, iptables.NFT)
	hold := make(chan struct{})
	held := make(chan struct{})
	fake := &fakeIPTables{IPTables: n.realIPTables(), restore: func(input []byte) ([]byte, error) {
		close(held)
		<-hold

		return input, nil
	}}
	m := n.oneFamily(fake)
	m.cfg.timeout = testbed.Stretch(200 * time.Millisecond)
	port := &PortMapping{HostPort: 8080, ContainerPort: 80}

	var wg sync.WaitGroup

	var first error

	wg.Go(func() { first = n.add(m, "first", n.pod(0, IPv4, port)) })
	<-held

	for range 2 { // each waits for half of the time that the first one has in all
		err := n.add(m, "second", n.pod(1, IPv4, &PortMapping{HostPort: 8081, ContainerPort: 80}))
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.ErrorContains(t, err, "waiting for operations before it")
	}

	close(hold)
	wg.Wait()

	require.ErrorIs(t, first, context.DeadlineExceeded, "its process was given no time")

	fake.restore = nil
	m.cfg.timeout = defaultTimeout

	require.NoError(t, n.add(m, "third", n.pod(1, IPv4, port)), "the first has nothing left")
	assert.Len(t, parsedRows(t, n), 1)
	assert.Len(t, m.mappings(), 1)
}

// The caller's context ends the waiting, and not what has begun; a Remove that it ends is
// carried out later.
func TestContext(t *testing.T) {
	eachFamilyOf(t, everywhere(), func(t *testing.T, n *node, f IPFamily) {
		m := n.manager()
		pod := n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80})

		n.do(func() {
			ended, end := context.WithCancel(t.Context())
			end()

			require.ErrorIs(t, m.AddContext(ended, "id", pod, ""), context.Canceled)
			assert.Empty(t, n.leftOver(f))
			require.NoError(t, m.AddContext(ended, "id", n.pod(0, f), ""), "nothing to wait for")

			for range 20 { // the lock is free as well
				require.ErrorIs(t, m.Sync(ended, map[string][]*PodPortMapping{"id": {pod}}), context.Canceled)
				require.ErrorIs(t, m.Check(ended, "id", pod), context.Canceled)
			}

			assert.Empty(t, n.leftOver(f))

			for _, s := range m.Status() {
				assert.Equal(t, HealthInSync, s.Health, "nothing was begun")
			}

			require.NoError(t, m.AddContext(t.Context(), "id", pod, ""))
			require.ErrorIs(t, m.RemoveContext(ended, "id", nil), context.Canceled)

			for _, row := range m.Mappings() {
				assert.Empty(t, row.PodID, "nobody's")
			}

			require.NoError(t, m.RemoveContext(t.Context(), "other", nil))
			require.NoError(t, m.AddContext(t.Context(), "other", pod, ""))
			require.NoError(t, m.RemoveContext(t.Context(), "other", nil))
			assert.Empty(t, n.leftOver(f))

			// While somebody else's operation takes its time:
			fm := m.families[map[IPFamily]int{IPv4: 0, IPv6: 1}[f]]
			fm.commitLock <- struct{}{}

			waits, stop := context.WithTimeout(t.Context(), testbed.Stretch(50*time.Millisecond))
			defer stop()

			require.ErrorIs(t, m.AddContext(waits, "id", pod, ""), context.DeadlineExceeded)
			assert.Empty(t, fm.queue, "withdrawn")
			<-fm.commitLock
		})
	})
}

// One transaction of several operations has the time of the first of them that began, and
// none of them is cut short by one in a hurry.
func TestTimeOfTransaction(t *testing.T) {
	t.Parallel()

	m := newHostportManager(IPv4, newConfig([]Option{WithTimeout(time.Minute)}), nil)
	from := time.Now()
	at := func(seconds ...int) time.Duration {
		var ops []*operation
		for _, s := range seconds {
			ops = append(ops, &operation{deadline: from.Add(time.Duration(s) * time.Second)})
		}

		return m.until(ops).Sub(from).Round(time.Second)
	}

	assert.Equal(t, 60*time.Second, at(60))
	assert.Equal(t, 5*time.Second, at(5))
	assert.Equal(t, 35*time.Second, at(60, 35))
	assert.Equal(t, 30*time.Second, at(5, 60, 60))
	assert.Equal(t, 20*time.Second, at(5, 20))
}

// lateIPTables commits and then goes on until it is killed.
type lateIPTables struct{ IPTables }

func (l lateIPTables) Restore(ctx context.Context, input []byte) error {
	if err := l.IPTables.Restore(context.WithoutCancel(ctx), input); err != nil {
		return err
	}

	<-ctx.Done()

	return ctx.Err()
}

// A process that is killed may have committed before: the row it left is not
// the table's, and goes with whatever comes next.
func TestKilledAfterCommit(t *testing.T) {
	eachVariant(t, func(t *testing.T, n *node) {
		ipt := n.realIPTables()
		fake := &fakeIPTables{IPTables: ipt}
		m := n.oneFamily(fake)
		late := func(is bool) {
			fake.IPTables, m.cfg.timeout = ipt, defaultTimeout
			if is {
				fake.IPTables, m.cfg.timeout = lateIPTables{ipt}, testbed.Stretch(100*time.Millisecond)
			}
		}
		pod := n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})

		for _, next := range []func() error{
			func() error { return m.Remove("id", nil) },
			func() error { return m.runOnce(t.Context(), func(backend) bool { return false }) },
			func() error {
				return m.Add("other", n.pod(1, IPv4, &PortMapping{HostPort: 8079, ContainerPort: 80}), "")
			},
			func() error { return m.Remove("id", pod) },
		} {
			late(true)

			require.ErrorIs(t, n.add(m, "id", pod), context.DeadlineExceeded)
			require.Len(t, parsedRows(t, n), len(m.mappings())+1, "it did commit")

			late(false)

			n.do(func() { require.NoError(t, next()) })
			require.Len(t, parsedRows(t, n), len(m.mappings()))
		}

		late(true)

		require.ErrorIs(t, n.add(m, "id", pod), context.DeadlineExceeded)
		require.ErrorIs(t, n.remove(m, "id", nil), context.DeadlineExceeded, "nobody knows what is left")
	})
}

// Many at once, over ports that they fight for, leave the kernel with what the
// table says.
func TestConcurrentUse(t *testing.T) {
	eachNode(t, func(t *testing.T, n *node) {
		m := n.manager()

		var wg sync.WaitGroup

		for i := range 8 {
			wg.Go(func() {
				id := "id" + strconv.Itoa(i)

				for round := range 12 {
					f := []IPFamily{IPv4, IPv6}[round%2]
					pod := n.pod(i%2, f,
						&PortMapping{HostPort: int32(8000 + (i+round)%5), ContainerPort: 80},
						&PortMapping{HostPort: int32(8000 + i), ContainerPort: 80, Protocol: "UDP"})

					conflict := (*ConflictError)(nil)
					if err := n.add(m, id, pod); err != nil && !errors.As(err, &conflict) {
						assert.NoError(t, err)
					}

					_ = m.Mappings()

					if round%3 != 0 {
						assert.NoError(t, n.remove(m, id, pod))
					}
				}
			})
		}

		wg.Wait()

		mappings := m.Mappings()
		require.NoError(t, m.Close())
		m = n.manager()
		adopted := m.Mappings()
		require.Len(t, adopted, len(mappings))

		for i, mapping := range mappings {
			assert.Equal(t, adopted[i].HostPort, mapping.HostPort)
			assert.Equal(t, adopted[i].Protocol, mapping.Protocol)
			assert.Equal(t, adopted[i].PodIP.String(), mapping.PodIP.String())
			assert.True(t, mapping.Held)
		}

		for i := range 8 {
			require.NoError(t, n.remove(m, "id"+strconv.Itoa(i), nil))
		}

		assert.Empty(t, m.Mappings())

		for _, f := range []IPFamily{IPv4, IPv6} {
			assert.Empty(t, n.leftOver(f))
		}
	})
}

// What lets the pod of two sandboxes reach itself goes with the last of them, whoever it
// was called after meanwhile.
func TestLastOfSharedAddress(t *testing.T) {
	eachFamilyOf(t, everywhere(), func(t *testing.T, n *node, f IPFamily) {
		m := n.manager()
		require.NoError(t, n.add(m, "a", n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80})))
		require.NoError(t, n.add(m, "b", n.pod(0, f, &PortMapping{HostPort: 8081, ContainerPort: 80})))
		require.NoError(t, n.remove(m, "b", nil))
		require.NoError(t, m.Close())
		require.NoError(t, n.remove(n.manager(), "a", nil))
		assert.Empty(t, n.leftOver(f))
	})
}

func TestClose(t *testing.T) {
	eachNode(t, func(t *testing.T, n *node) {
		n.serve(0, "tcp", IPv4, 80)

		m := n.manager()
		pod := n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})
		require.NoError(t, n.add(m, "id", pod))
		require.NoError(t, m.Close())
		require.NoError(t, m.Close(), "again")

		require.ErrorIs(t, n.add(m, "id", pod), os.ErrClosed)
		require.ErrorIs(t, n.remove(m, "id", pod), os.ErrClosed)
		n.answers(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(IPv4), 8080), "web")

		again := n.manager()
		require.Len(t, again.Mappings(), 1)
		assert.True(t, again.Mappings()[0].Held, "the port was free to be held again")
		require.NoError(t, n.remove(again, "id", pod))
	})
}
