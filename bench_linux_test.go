package hostport

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	"k8s.io/klog/v2"

	"github.com/cri-o/hostport/internal/iptables"
	"github.com/cri-o/hostport/internal/testbed"
)

// crowd is the number of rows that an operation or a connection is to pass
// unharmed.
const crowd = 5000

// The ports below lastPort are the crowd's, where that is consecutive. In a
// range whose rows came one after the other, deepest is the last row of the
// last chain, and lastBeside the last one of those that stand higher up.
const (
	lastPort   = 65535
	deepest    = lastPort - 1
	lastBeside = lastPort&^255 + iptables.FewRows - 1
)

// consecutive puts the crowd right before lastPort, but for one row in each
// range that would else be missing beside it, so that the chains on the way are
// as full as can be.
func consecutive(i int) int32 {
	beside := []int32{1, 16385, 32769, 49153, 53249, 57345}
	if i < len(beside) {
		return beside[i]
	}

	return int32(lastPort - crowd + i)
}

// spread puts the crowd all over, so that there are as many chains as can be.
func spread(i int) int32 { return int32(1000 + 12*i) }

// dense puts many times the crowd below lastPort.
func dense(i int) int32 { return int32(lastPort - 1 - i) }

// benchNode is a node with a number of rows.
type benchNode struct {
	*node

	m HostPortManager
}

func newBenchNode(b *testing.B, v iptables.Variant, rows int, port func(i int) int32) *benchNode {
	b.Helper()

	n := &benchNode{node: newNode(b, v)}
	n.do(func() {
		n.m = NewMetaHostportManager(WithLogger(klog.Logger{}), WithoutSockets(), WithBackend(n.backend()))

		for first := 0; first < rows; first += 500 {
			pod := &PodPortMapping{IP: net.IPv4(10, 88, 1, byte(first/500))} // 10 pods, or 40
			if first+500 == rows {
				pod.IP = n.Pods[0].IPv4.AsSlice() // this one answers
			}

			for i := range 500 {
				pod.PortMappings = append(pod.PortMappings, &PortMapping{HostPort: port(first + i), ContainerPort: 80})
			}

			require.NoError(b, n.m.Add("crowd"+strconv.Itoa(first), pod, ""))
		}

		// What is made once is made by now, and in this namespace.
		n.addAndRemove(b, n.pod(1, IPv4, &PortMapping{HostPort: lastPort, ContainerPort: 80}))
	})

	return n
}

// unbind has operations called from outside the node's namespace, where only the socket of
// nf_tables needs to be: a runtime's goroutines are not bound to threads either, and those
// that are take longer.
func (n *benchNode) unbind(b *testing.B) {
	b.Helper()

	m, ok := n.m.(*Manager)
	require.True(b, ok)

	for _, f := range m.families {
		f.namespace = &namespace{}
	}
}

// samples are durations of one thing.
type samples []time.Duration

func (s samples) median() time.Duration {
	slices.Sort(s)

	return s[len(s)/2]
}

// cost is what Add and Remove have taken.
type cost struct{ adds, removes samples }

func (c *cost) add(added, removed time.Duration) {
	c.adds, c.removes = append(c.adds, added), append(c.removes, removed)
}

// onePort measures Add and Remove of a host port of a pod that has none, and then of one that
// has another, which saves the kernel what is made for each pod. None of the crowd has its address.
func (n *benchNode) onePort(b *testing.B, first, second *cost) {
	b.Helper()

	pod := n.pod(1, IPv4, &PortMapping{HostPort: lastPort, ContainerPort: 80})
	other := n.pod(1, IPv4, &PortMapping{HostPort: 2, ContainerPort: 80}) // far from the crowd

	first.add(n.addAndRemove(b, pod))
	require.NoError(b, n.m.Add("measured", other, ""))
	second.add(n.addAndRemove(b, pod))
	require.NoError(b, n.m.Remove("measured", other))
}

// BenchmarkAdd compares, in turns, Add and Remove of a host port on a node without
// rows of other pods and on one with many. The median of each is reported, and how
// much longer the second takes.
func BenchmarkAdd(b *testing.B) {
	for _, bc := range []struct {
		name  string
		v     iptables.Variant
		ports func(i int) int32
	}{
		{"nft/consecutive", iptables.NFT, consecutive},
		{"nft/spread", iptables.NFT, spread},
		{"legacy/consecutive", iptables.Legacy, consecutive},
	} {
		b.Run(bc.name, func(b *testing.B) {
			nodes := []*benchNode{newBenchNode(b, bc.v, 0, nil), newBenchNode(b, bc.v, crowd, bc.ports)}

			var first, second [2]cost

			for b.Loop() {
				for i, n := range nodes {
					n.do(func() { n.onePort(b, &first[i], &second[i]) })
				}
			}

			report(b, "first", first)
			report(b, "second", second)
		})
	}
}

// BenchmarkAddNFTables compares, in turns, Add and Remove of a host port on nodes with
// more and more rows, and with nft(8) doing the same to the last of them. The medians
// are reported, how much longer they take than without other rows, and how much longer
// nft takes than that.
func BenchmarkAddNFTables(b *testing.B) {
	sizes := []int{0, crowd, 4 * crowd}

	var nodes []*benchNode
	for _, rows := range sizes {
		n := newBenchNode(b, viaNFTables, rows, dense)
		n.unbind(b)
		nodes = append(nodes, n)
	}

	var (
		first, second         = make([]cost, len(nodes)), make([]cost, len(nodes))
		nft                   cost
		row                   = fmt.Sprintf(`{ tcp . %d comment "AAAAAAAAAAAAAAAA" : 10.88.77.77 . 80 }`, lastPort)
		hairpin               = fmt.Sprintf(`{ %[1]s . %[1]s comment "AAAAAAAAAAAAAAAA" }`, "10.88.77.77")
		hostports, hairpinSet = "element ip crio-hostports hostports " + row, "element ip crio-hostports hairpins " + hairpin
	)

	for round := 0; b.Loop(); round++ {
		for turn := range nodes {
			i := (round + turn) % len(nodes) // whoever comes first finds cold caches

			for range 10 {
				nodes[i].onePort(b, &first[i], &second[i])
			}
		}

		n := nodes[len(nodes)-1]
		start := time.Now()
		n.commandWith("add "+hostports+"\nadd "+hairpinSet, "nft", "-f", "-")
		added := time.Now()
		n.commandWith("delete "+hostports+"\ndelete "+hairpinSet, "nft", "-f", "-")

		nft.add(added.Sub(start), time.Since(added))
	}

	for name, costs := range map[string][]cost{"first": first, "second": second} {
		for i, rows := range sizes {
			added, removed := costs[i].adds.median(), costs[i].removes.median()
			b.ReportMetric(float64(added.Nanoseconds())/1000, fmt.Sprintf("%s-add-us/%d-rows", name, rows))
			b.ReportMetric(float64(added)/float64(costs[0].adds.median()), fmt.Sprintf("%s-add-ratio/%d-rows", name, rows))
			b.ReportMetric(float64(removed.Nanoseconds())/1000, fmt.Sprintf("%s-remove-us/%d-rows", name, rows))
			b.ReportMetric(float64(removed)/float64(costs[0].removes.median()), fmt.Sprintf("%s-remove-ratio/%d-rows", name, rows))
		}
	}

	b.ReportMetric(float64(nft.adds.median().Microseconds())/1000, "add-ms/nft")
	b.ReportMetric(float64(nft.removes.median().Microseconds())/1000, "remove-ms/nft")
}

// addAndRemove tells how long it takes to add and to remove a pod.
func (n *benchNode) addAndRemove(b *testing.B, pod *PodPortMapping) (add, remove time.Duration) {
	b.Helper()

	start := time.Now()
	err := n.m.Add("measured", pod, "")
	added := time.Now()

	require.NoError(b, err)
	require.NoError(b, n.m.Remove("measured", pod))

	return added.Sub(start), time.Since(added)
}

// BenchmarkAddMany measures an Add of 20,000 rows, and their Remove.
func BenchmarkAddMany(b *testing.B) {
	n := newBenchNode(b, viaNFTables, 0, nil)
	n.unbind(b)

	pod := n.pod(0, IPv4)

	for i := range 4 * crowd {
		pod.PortMappings = append(pod.PortMappings, &PortMapping{HostPort: dense(i), ContainerPort: 80})
	}

	var adds, removes samples

	for b.Loop() {
		added, removed := n.addAndRemove(b, pod)
		adds, removes = append(adds, added), append(removes, removed)
	}

	b.ReportMetric(float64(adds.median().Microseconds())/1000, "add-ms")
	b.ReportMetric(float64(removes.median().Microseconds())/1000, "remove-ms")
}

// BenchmarkLargePod measures, once, Add and Remove of pods with many UDP ports, and
// the CPU that it takes, that of programs included.
func BenchmarkLargePod(b *testing.B) {
	for _, v := range []iptables.Variant{viaNFTables, iptables.NFT, iptables.Legacy} {
		for _, ports := range []int{1000, 4000, 10_000} {
			b.Run(fmt.Sprintf("%s/%d", v, ports), func(b *testing.B) {
				n := newBenchNode(b, v, 0, nil)
				pod := n.media(0, IPv4, ports, v1.ProtocolUDP)

				var adds, removes, addCPU, removeCPU samples

				for range 3 {
					n.do(func() {
						start, used := time.Now(), cpuTime(b)
						require.NoError(b, n.m.Add("media", pod, ""))

						adds, addCPU = append(adds, time.Since(start)), append(addCPU, cpuTime(b)-used)
						start, used = time.Now(), cpuTime(b)

						require.NoError(b, n.m.Remove("media", pod))

						removes, removeCPU = append(removes, time.Since(start)), append(removeCPU, cpuTime(b)-used)
					})
				}

				for b.Loop() {
					_ = pod // has been measured
				}

				for what, s := range map[string]samples{"add": adds, "add-cpu": addCPU, "remove": removes, "remove-cpu": removeCPU} {
					b.ReportMetric(float64(s.median().Microseconds())/1000, what+"-ms")
				}
			})
		}
	}
}

// cpuTime is what this process and its children have used.
func cpuTime(b *testing.B) (used time.Duration) {
	b.Helper()

	for _, who := range []int{unix.RUSAGE_SELF, unix.RUSAGE_CHILDREN} {
		usage := unix.Rusage{}
		require.NoError(b, unix.Getrusage(who, &usage))

		used += time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
	}

	return used
}

// BenchmarkAddUDP measures Add and Remove of a pod with a UDP port, and what is done
// behind the Remove of a TCP port, first on a machine that tracks nothing and then on
// one that tracks 100,000 flows of others, which all have to be there in the end. (One
// after the other: all network namespaces share the kernel's table of flows.)
func BenchmarkAddUDP(b *testing.B) {
	const others = 100_000

	n := newBenchNode(b, viaNFTables, 0, nil)
	pod := n.pod(0, IPv4, &PortMapping{HostPort: 5353, ContainerPort: 53, Protocol: "UDP"})

	n.do(func() { n.addAndRemove(b, pod) }) // tracking begins with the first rule

	conn := n.nfnetlink()

	for _, flows := range []int{0, others} {
		b.Run(fmt.Sprintf("%d-flows", flows), func(b *testing.B) {
			n.track(b, flows-n.tracked(b))

			var adds, removes, behind samples

			for b.Loop() {
				n.do(func() {
					added, removed := n.addAndRemove(b, pod)
					adds, removes = append(adds, added), append(removes, removed)

					start := time.Now()

					_, err := conn.Flows(b.Context(), unix.AF_INET, unix.IPPROTO_TCP, 8080)
					require.NoError(b, err)

					behind = append(behind, time.Since(start))
				})
			}

			require.Equal(b, flows, n.tracked(b))
			b.ReportMetric(float64(behind.median().Microseconds())/1000, "behind-tcp-remove-ms")
			b.ReportMetric(float64(adds.median().Microseconds())/1000, "add-ms")
			b.ReportMetric(float64(removes.median().Microseconds())/1000, "remove-ms")
		})
	}
}

// track makes the node forward packets of as many flows, and remember them.
func (n *benchNode) track(b *testing.B, flows int) {
	b.Helper()
	n.do(func() {
		require.NoError(b, os.WriteFile("/proc/sys/net/netfilter/nf_conntrack_udp_timeout", []byte("3600"), 0))
	})
	require.NoError(b, n.Client.Do(func() error {
		for sent := 0; sent < flows; {
			conn, err := net.ListenPacket("udp4", ":0")
			require.NoError(b, err)

			for port := 1000; port < 61_000 && sent < flows; port++ {
				_, err := conn.WriteTo([]byte{0}, net.UDPAddrFromAddrPort(netip.AddrPortFrom(n.PeerIP(false), uint16(port))))
				require.NoError(b, err)

				sent++
			}

			require.NoError(b, conn.Close())
		}

		return nil
	}))
}

func (n *benchNode) tracked(b *testing.B) int {
	b.Helper()

	list, err := n.nfnetlink().Flows(b.Context(), unix.NFPROTO_IPV4, unix.IPPROTO_UDP, 0)
	require.NoError(b, err)

	return len(list)
}

// report reports the cost on a node without rows of others, on one with many, and the ratio.
func report(b *testing.B, name string, c [2]cost) {
	b.Helper()

	for what, s := range map[string][2]samples{"add": {c[0].adds, c[1].adds}, "remove": {c[0].removes, c[1].removes}} {
		none, many := s[0].median(), s[1].median()
		b.ReportMetric(float64(none.Microseconds())/1000, fmt.Sprintf("%s-%s-ms/0-rows", name, what))
		b.ReportMetric(float64(many.Microseconds())/1000, fmt.Sprintf("%s-%s-ms/%d-rows", name, what, crowd))
		b.ReportMetric(float64(many)/float64(none), fmt.Sprintf("%s-%s-ratio", name, what))
	}
}

// BenchmarkConnect compares, in turns, new TCP connections through a row that
// is alone with those through the worst-placed rows among many. The rate of the
// second over that of the first is reported, as the median over the rounds.
func BenchmarkConnect(b *testing.B) {
	for _, v := range []iptables.Variant{viaNFTables, iptables.NFT, iptables.Legacy} {
		nodes := []*benchNode{newBenchNode(b, v, 0, nil), newBenchNode(b, v, crowd, consecutive)}
		ports := map[string]int32{"deepest": deepest, "beside": lastBeside}

		for _, port := range ports {
			nodes[0].do(func() {
				require.NoError(b, nodes[0].m.Add("alone", nodes[0].pod(0, IPv4, &PortMapping{HostPort: port, ContainerPort: 80}), ""))
			})
		}

		for name, port := range ports {
			b.Run(string(v)+"/client/"+name, func(b *testing.B) {
				compareConnects(b, nodes, func(n *benchNode) *testbed.Namespace { return n.Client }, port)
			})
			b.Run(string(v)+"/neighbour/"+name, func(b *testing.B) {
				compareConnects(b, nodes, func(n *benchNode) *testbed.Namespace { return n.Pods[1].Namespace }, port)
			})
		}
	}
}

func compareConnects(b *testing.B, nodes []*benchNode, from func(*benchNode) *testbed.Namespace, port int32) {
	b.Helper()

	const connections = 500

	var (
		times  [2]samples
		ratios []float64
	)

	for b.Loop() {
		var took [2]time.Duration

		for i, n := range nodes {
			took[i] = n.connects(b, from(n), port, connections)
			times[i] = append(times[i], took[i]/connections)
		}

		ratios = append(ratios, float64(took[0])/float64(took[1]))
	}

	slices.Sort(ratios)
	b.ReportMetric(float64(times[0].median().Nanoseconds())/1000, "us/connection-0-rows")
	b.ReportMetric(float64(times[1].median().Nanoseconds())/1000, fmt.Sprintf("us/connection-%d-rows", crowd))
	b.ReportMetric(ratios[len(ratios)/2], "rate-ratio")
}

// connects makes connections, one after the other, to a port of the pod that
// nobody serves: each is a new flow that is translated and refused.
func (n *benchNode) connects(b *testing.B, from *testbed.Namespace, port int32, count int) time.Duration {
	b.Helper()

	to := sockaddrOf(n.nodeIP(IPv4), portOf(port))

	var took time.Duration

	require.NoError(b, from.Do(func() error {
		start := time.Now()

		for range count {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			require.NoError(b, err)
			require.ErrorIs(b, unix.Connect(fd, to), syscall.ECONNREFUSED)
			require.NoError(b, unix.Close(fd))
		}

		took = time.Since(start)

		return nil
	}))

	return took
}

// BenchmarkList measures how long a new manager takes to find many rows.
func BenchmarkList(b *testing.B) {
	for _, v := range []iptables.Variant{viaNFTables, iptables.NFT, iptables.Legacy} {
		b.Run(string(v), func(b *testing.B) {
			n := newBenchNode(b, v, crowd, consecutive)
			require.NoError(b, n.m.(*Manager).Close())

			for b.Loop() {
				n.do(func() {
					m, err := New(WithLogger(klog.Logger{}), WithoutSockets(), WithBackend(n.backend()))
					require.NoError(b, err)
					require.Len(b, m.Mappings(), crowd)
					require.NoError(b, m.Close())
				})
			}
		})
	}
}

// BenchmarkNewNFTables measures New where nftables holds 1000 rows as they should be, so
// that nothing is to be changed.
func BenchmarkNewNFTables(b *testing.B) {
	const rows = 1000

	n := newBenchNode(b, viaNFTables, rows, dense)
	quiet := WithLogger(klog.Logger{})
	require.NoError(b, n.m.(*Manager).Close())
	require.NoError(b, n.manager(quiet, WithoutSockets()).Close()) // a pod's address is in the name of one that is gone

	worked := n.countWork()

	n.do(func() {
		for b.Loop() {
			m, err := New(quiet, WithoutSockets(), WithBackend(n.backend()))
			require.NoError(b, err)
			require.Len(b, m.Mappings(), rows)
			b.StopTimer()
			require.NoError(b, m.Close()) // which waits for the kernel
			b.StartTimer()
		}
	})
	require.Zero(b, worked(), "transactions")
}

// BenchmarkSync measures, with 1000 rows, a Sync that changes nothing, one after somebody has
// flushed the chains, and a new manager.
func BenchmarkSync(b *testing.B) {
	const rows, each = 1000, 500

	for _, v := range backends() {
		b.Run(string(v), func(b *testing.B) {
			n := newBenchNode(b, v, rows, dense)
			m, ok := n.m.(*Manager)
			require.True(b, ok)

			pods := map[string][]*PodPortMapping{}

			for _, mapping := range m.Mappings() {
				if pods[mapping.PodID] == nil {
					pods[mapping.PodID] = []*PodPortMapping{{IP: mapping.PodIP}}
				}

				pod := pods[mapping.PodID][0]
				pod.PortMappings = append(pod.PortMappings, &PortMapping{HostPort: mapping.HostPort, ContainerPort: mapping.ContainerPort})
			}

			require.Len(b, pods, rows/each)

			var same, repair, adopt samples

			measure := func(to *samples, f func() error) {
				n.do(func() {
					begun := time.Now()
					err := f()
					*to = append(*to, time.Since(begun))

					require.NoError(b, err)
				})
			}

			for b.Loop() {
				sync := func() error { return m.Sync(b.Context(), pods) }

				measure(&same, sync)
				n.wipe(IPv4)
				measure(&repair, sync)
				require.NoError(b, m.Close())
				measure(&adopt, func() (err error) {
					m, err = New(WithLogger(klog.Logger{}), WithoutSockets(), WithBackend(n.backend()))

					return err
				})
			}

			require.NoError(b, m.Close())

			for what, s := range map[string]samples{"same": same, "repair": repair, "new": adopt} {
				b.ReportMetric(float64(s.median().Microseconds())/1000, what+"-ms")
			}
		})
	}
}
