package trace

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cri-o/hostport/internal/nfnetlink"
	"github.com/cri-o/hostport/internal/row"
	"github.com/cri-o/hostport/internal/testbed"
)

// childVariable has the test binary follow packets until it is killed.
const childVariable = "HOSTPORT_TEST_TRACE"

func TestMain(m *testing.M) {
	if os.Getenv(childVariable) != "" {
		_, err := Start(context.Background(), netip.MustParseAddr("192.0.2.2"))
		_, _ = fmt.Fprintln(os.Stdout, err)

		select {}
	}

	m.Run()
}

// bed is a node with a pod, in the eyes of one IP family.
type bed struct {
	*testbed.Bed

	t  *testing.T
	v6 bool
}

// eachFamily runs a test for IPv4 and IPv6. Before Linux 5.12 there is no Tracer, and what is
// tested is that it says so.
func eachFamily(t *testing.T, f func(b *bed)) {
	t.Helper()

	for _, v6 := range []bool{false, true} {
		t.Run(map[bool]string{false: "IPv4", true: "IPv6"}[v6], func(t *testing.T) {
			t.Parallel()

			inner, err := testbed.New("pod")
			require.NoError(t, err)
			t.Cleanup(func() { assert.NoError(t, inner.Close()) })

			b := &bed{inner, t, v6}
			if nfnetlink.KernelAtLeast(5, 12) {
				f(b)

				return
			}

			b.do(func() {
				tracer, err := Start(t.Context(), b.ClientIP(v6))
				require.ErrorIs(t, err, errors.ErrUnsupported)
				assert.Nil(t, tracer)
			})
		})
	}
}

// do runs f in the node.
func (b *bed) do(f func()) {
	b.t.Helper()
	require.NoError(b.t, b.Host.Do(func() error {
		f()

		return nil
	}))
}

// ip is nft's and the programs' word for the family.
func (b *bed) ip() string { return map[bool]string{false: "ip", true: "ip6"}[b.v6] }

func (b *bed) run(stdin, name string, args ...string) string {
	b.t.Helper()

	var out []byte

	b.do(func() {
		cmd := exec.CommandContext(b.t.Context(), name, args...)
		cmd.Stdin = strings.NewReader(stdin)

		var err error
		out, err = cmd.CombinedOutput()
		require.NoError(b.t, err, "%s", out)
	})

	return string(out)
}

// nft loads rules, in which IP stands for ip or ip6, and POD, NODE and CLIENT for addresses.
func (b *bed) nft(rules string) {
	b.t.Helper()
	b.run(strings.NewReplacer("IP", b.ip(), "POD", b.Pods[0].IP(b.v6).String(),
		"NODE", b.NodeIP(b.v6).String(), "CLIENT", b.ClientIP(b.v6).String()).Replace(rules), "nft", "-f", "-")
}

// follow follows the packets from and to the client.
func (b *bed) follow() *Tracer { return b.start(b.ClientIP(b.v6)) }

func (b *bed) start(peer netip.Addr) (t *Tracer) {
	b.t.Helper()
	b.do(func() {
		var err error
		t, err = Start(b.t.Context(), peer)
		require.NoError(b.t, err)
	})
	b.t.Cleanup(func() { _ = t.Close() })

	return t
}

func (b *bed) steps(ctx context.Context, t *Tracer) (steps []Step) {
	b.t.Helper()
	b.do(func() {
		var err error
		steps, err = t.Steps(ctx)
		require.NoError(b.t, err)
	})

	return steps
}

// until are the steps as soon as they are as they should be, or after a long time.
func (b *bed) until(t *Tracer, good func(steps []Step) bool) (steps []Step) {
	b.t.Helper()

	for end := time.Now().Add(testbed.Stretch(5 * time.Second)); time.Now().Before(end); {
		if steps = b.steps(b.t.Context(), t); good(steps) {
			break
		}
	}

	return steps
}

// send sends a datagram, and does not wait for an answer.
func (b *bed) send(from *testbed.Namespace, to netip.AddrPort) (source netip.AddrPort) {
	b.t.Helper()
	require.NoError(b.t, from.Do(func() error {
		conn, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(to))
		if err != nil {
			return err
		}
		defer conn.Close()

		source = conn.LocalAddr().(*net.UDPAddr).AddrPort()
		_, err = conn.Write([]byte("x"))

		return err
	}))

	return source
}

func (b *bed) pod() netip.AddrPort { return netip.AddrPortFrom(b.Pods[0].IP(b.v6), 80) }
func (b *bed) gateway() netip.Addr {
	return b.Pods[0].IP(b.v6).Prev() // the first pod's
}
func (b *bed) node() netip.AddrPort { return netip.AddrPortFrom(b.NodeIP(b.v6), 8080) }

// text is the way of one packet: the hook of each milestone, and what others' chains did.
func text(steps []Step, packet int) []string {
	var lines []string

	for _, s := range steps {
		switch {
		case s.Packet != packet:
		case s.Milestone:
			lines = append(lines, s.Chain)
		case s.Policy:
			lines = append(lines, fmt.Sprintf("%s: %s %s %s policy %s", s.Hook, s.Family, s.Table, s.Chain, s.Verdict))
		default:
			lines = append(lines, fmt.Sprintf("%s: %s %s %s %d %s", s.Hook, s.Family, s.Table, s.Chain, s.Rule, s.Verdict))
		}
	}

	return lines
}

// packet is the first packet from an address to another, or 0.
func packet(steps []Step, from, to netip.AddrPort) int {
	for _, s := range steps {
		if s.From == from && s.To == to {
			return s.Packet
		}
	}

	return 0
}

// at is the step of a packet at a chain.
func (b *bed) at(steps []Step, packet int, chain string) Step {
	b.t.Helper()

	for _, s := range steps {
		if s.Packet == packet && s.Chain == chain {
			return s
		}
	}

	require.Fail(b.t, "it did not come to "+chain, "%v", text(steps, packet))

	return Step{}
}

// A packet to a pod passes all hooks of what is forwarded; addresses are the new ones in the first
// chain after their translation, and the answer, which gets the client's address in prerouting, is
// another packet.
func TestForwarded(t *testing.T) {
	t.Parallel()
	eachFamily(t, func(b *bed) {
		for _, network := range []string{"tcp", "udp"} {
			service, err := b.Pods[0].Serve(network, b.pod())
			require.NoError(b.t, err)
			b.nft(`add table IP nat; delete table IP nat; table IP nat {
				chain prerouting { type nat hook prerouting priority -100; IP daddr NODE meta l4proto { tcp, udp } dnat IP to POD; }
				chain postrouting { type nat hook postrouting priority 100; oifname cni0 masquerade; }
			}`)

			from := netip.AddrPortFrom(b.ClientIP(b.v6), 40000)
			to := netip.AddrPortFrom(b.NodeIP(b.v6), 80)
			tracer := b.follow()
			_, err = b.Client.AskFrom(b.t.Context(), network, from, to)
			require.NoError(b.t, err)

			steps := b.steps(b.t.Context(), tracer)
			require.NoError(b.t, tracer.Close())
			require.NoError(b.t, service.Close())

			request := packet(steps, from, to)
			assert.Regexp(b.t, `^prerouting-first prerouting: ip6? nat prerouting \d+ accept prerouting-last `+
				`forward-first forward-last `+
				`postrouting-first postrouting: ip6? nat postrouting \d+ accept postrouting-last$`, strings.Join(text(steps, request), " "))

			for chain, want := range map[string]Step{
				"prerouting-first":  {From: from, To: to, In: "eth0"},
				"prerouting":        {From: from, To: to, In: "eth0"},
				"prerouting-last":   {From: from, To: b.pod(), In: "eth0"},
				"forward-first":     {From: from, To: b.pod(), In: "eth0", Out: "cni0"},
				"postrouting-first": {From: from, To: b.pod(), In: "eth0", Out: "cni0"},
				"postrouting-last":  {From: netip.AddrPortFrom(b.gateway(), from.Port()), To: b.pod(), In: "eth0", Out: "cni0"},
			} {
				got := b.at(steps, request, chain)
				assert.Equal(b.t, want, Step{From: got.From, To: got.To, In: got.In, Out: got.Out}, chain)
			}

			answer := packet(steps, b.pod(), from)
			assert.NotEqual(b.t, request, answer)
			assert.Equal(b.t, []string{"prerouting-last", "forward-first", "forward-last", "postrouting-first", "postrouting-last"}, text(steps, answer))

			got := b.at(steps, answer, "postrouting-last")
			assert.Equal(b.t, Step{From: to, To: from, In: "cni0", Out: "eth0"}, Step{From: got.From, To: got.To, In: got.In, Out: got.Out})
		}
	})
}

func TestToNode(t *testing.T) {
	t.Parallel()
	eachFamily(t, func(b *bed) {
		_, err := b.Host.Serve("udp", b.node())
		require.NoError(b.t, err)

		tracer := b.follow()
		answer, err := b.Client.Ask(b.t.Context(), "udp", b.node())
		require.NoError(b.t, err)

		steps := b.steps(b.t.Context(), tracer)
		there, back := packet(steps, answer.Source, b.node()), packet(steps, b.node(), answer.Source)
		assert.Equal(b.t, []string{"prerouting-first", "prerouting-last", "input-first", "input-last"}, text(steps, there))
		assert.Equal(b.t, []string{"output-first", "output-last", "postrouting-first", "postrouting-last"}, text(steps, back))
		assert.Equal(b.t, "eth0", b.at(steps, there, "input-last").In)
		assert.Equal(b.t, "eth0", b.at(steps, back, "output-last").Out)
	})
}

// What stops a packet is the last that is seen of it. Its reason, where nf_tables has none, is
// behind the last milestone.
func TestStopped(t *testing.T) {
	t.Parallel()

	for name, c := range map[string]struct {
		nft     string
		program string
		want    string // the last step
	}{
		"rule": {nft: `table inet fw { chain f { type filter hook forward priority 0; udp dport 80 drop; }; }`, want: `(^|\n)forward: inet fw f [1-9]\d* drop$`},
		"a chain of a chain": {
			nft:  `table inet fw { chain g { udp dport 80 counter drop; }; chain f { type filter hook forward priority 0; jump g; }; }`,
			want: `(^|\n)forward: inet fw g [1-9]\d* drop$`,
		},
		"policy":          {nft: `table IP fw { chain f { type filter hook forward priority 0; policy drop; }; }`, want: `(^|\n)forward: ip6? fw f policy drop$`},
		"rejected":        {nft: `table inet fw { chain f { type filter hook forward priority 0; udp dport 80 reject; }; }`, want: `(^|\n)forward: inet fw f [1-9]\d* drop$`},
		"raw":             {nft: `table IP fw { chain f { type filter hook prerouting priority -300; udp dport 80 drop; }; }`, want: `(^|\n)prerouting: ip6? fw f [1-9]\d* drop$`},
		"iptables-nft":    {program: "nft", want: `(^|\n)forward: ip6? filter FORWARD [1-9]\d* drop$`},
		"iptables-legacy": {program: "legacy", want: `(^|\n)forward-first$`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			eachFamily(t, func(b *bed) {
				if c.program != "" {
					b.run("", map[bool]string{false: "iptables-", true: "ip6tables-"}[b.v6]+c.program, "-A", "FORWARD", "-p", "udp", "--dport", "80", "-j", "DROP")
				} else {
					b.nft(c.nft)
				}

				tracer := b.follow()
				source := b.send(b.Client, b.pod())
				way := ""

				b.until(tracer, func(steps []Step) bool {
					way = strings.Join(text(steps, packet(steps, source, b.pod())), "\n")

					return way != ""
				})
				assert.Regexp(b.t, c.want, way)
			})
		})
	}
}

// What others have traced passes our milestones, too, and is not ours.
func TestOnlyOurs(t *testing.T) {
	t.Parallel()
	eachFamily(t, func(b *bed) {
		b.nft(`table inet others { chain p { type filter hook prerouting priority -500; meta nftrace set 1; }; }`)

		fromClient, fromPeer := b.follow(), b.start(b.PeerIP(b.v6))
		client, peer := b.send(b.Client, b.pod()), b.send(b.Peer, b.pod())

		for tracer, source := range map[*Tracer]netip.AddrPort{fromClient: client, fromPeer: peer} {
			steps := b.until(tracer, func(steps []Step) bool { return packet(steps, source, b.pod()) != 0 })
			b.at(steps, packet(steps, source, b.pod()), "postrouting-last")

			for _, s := range steps {
				assert.Contains(b.t, []netip.Addr{s.From.Addr(), s.To.Addr()}, source.Addr())
			}
		}
	})
}

// The next packet that begins a connection from outside is followed, and nothing else.
func TestStartNext(t *testing.T) {
	t.Parallel()
	eachFamily(t, func(b *bed) {
		for p, network := range map[row.Protocol]string{row.TCP: "tcp", row.UDP: "udp"} {
			service, err := b.Host.Serve(network, b.node())
			require.NoError(b.t, err)

			var tracer *Tracer

			b.do(func() {
				var err error
				tracer, err = StartNext(b.t.Context(), p, 8080, netip.Addr{})
				require.NoError(b.t, err)
			})

			b.send(b.Client, netip.AddrPortFrom(b.NodeIP(b.v6), 8081)) // another port
			b.send(b.Client, netip.AddrPortFrom(b.pod().Addr(), 8080)) // another machine
			_, err = b.Host.Ask(b.t.Context(), network, b.node())      // from inside
			require.NoError(b.t, err)

			soon, cancel := context.WithTimeout(b.t.Context(), 3*quiet)
			assert.Empty(b.t, b.steps(soon, tracer))
			cancel()

			go func() {
				for range 3 {
					_, _ = b.Client.Ask(b.t.Context(), network, b.node())
				}
			}()

			steps := b.steps(b.t.Context(), tracer)
			assert.Equal(b.t, []string{"prerouting-first", "prerouting-last", "input-first", "input-last"}, text(steps, 1))
			assert.Equal(b.t, b.ClientIP(b.v6), steps[0].From.Addr())
			assert.Len(b.t, steps, 4, "one packet")
			assert.Equal(b.t, steps, b.steps(b.t.Context(), tracer))

			require.NoError(b.t, tracer.Close())
			require.NoError(b.t, service.Close())
		}
	})
}

// Of a connection that is there already nothing is followed.
func TestStartNextBegins(t *testing.T) {
	t.Parallel()

	// Beginnings of packets behind the ports.
	tcp := func(flags byte) []byte { return []byte{0, 0, 0, 1, 0, 0, 0, 0, 0x50, flags, 0, 0, 0, 0, 0, 0} }
	sctp := func(chunk byte) []byte { return []byte{0, 0, 0, 0, 0, 0, 0, 0, chunk, 0, 0, 4} }

	for p, packets := range map[row.Protocol][][]byte{
		row.TCP:  {tcp(0x10), tcp(0x12), tcp(0x04), tcp(0xc2)}, // ACK, SYN-ACK, RST; SYN with ECN
		row.SCTP: {sctp(0), sctp(10), sctp(1)},                 // DATA, COOKIE ECHO; INIT
	} {
		t.Run(string(p), func(t *testing.T) {
			t.Parallel()
			eachFamily(t, func(b *bed) {
				var tracer *Tracer

				b.do(func() {
					var err error
					tracer, err = StartNext(b.t.Context(), p, 8080, netip.Addr{})
					require.NoError(b.t, err)
				})
				b.t.Cleanup(func() { _ = tracer.Close() })

				require.NoError(b.t, b.Client.Do(func() error {
					network := fmt.Sprintf("%s:%d", map[bool]string{false: "ip4", true: "ip6"}[b.v6], p.Number())

					conn, err := net.Dial(network, b.NodeIP(b.v6).String())
					if err != nil {
						return err
					}
					defer conn.Close()

					for i, packet := range packets {
						ports := []byte{0, byte(i), 8080 >> 8, 8080 & 0xff}
						if _, err := conn.Write(append(ports, packet...)); err != nil {
							return err
						}
					}

					return nil
				}))

				steps := b.steps(b.t.Context(), tracer)
				assert.Equal(b.t, netip.AddrPortFrom(b.ClientIP(b.v6), uint16(len(packets)-1)), steps[0].From, "the last")
				assert.Equal(b.t, 1, steps[len(steps)-1].Packet)
			})
		})
	}
}

// Steps that came before the context ended are returned after it.
func TestContextEnded(t *testing.T) {
	t.Parallel()
	eachFamily(t, func(b *bed) {
		tracer := b.follow()
		b.send(b.Client, b.pod())

		ctx, cancel := context.WithCancel(b.t.Context())
		cancel()

		for end := time.Now().Add(testbed.Stretch(5 * time.Second)); len(b.steps(ctx, tracer)) == 0; {
			require.True(b.t, time.Now().Before(end))
		}
	})
}

// Who cannot start gets no Tracer to use.
func TestContextEndedBefore(t *testing.T) {
	t.Parallel()
	eachFamily(t, func(b *bed) {
		ctx, cancel := context.WithCancel(b.t.Context())
		cancel()

		b.do(func() {
			tracer, err := Start(ctx, b.ClientIP(b.v6))
			require.ErrorIs(b.t, err, context.Canceled)
			assert.Nil(b.t, tracer)
		})
	})
}

// Where traces are lost, Steps fails with ENOBUFS.
func TestLost(t *testing.T) {
	t.Parallel()
	eachFamily(t, func(b *bed) {
		tracer := b.follow()

		require.NoError(b.t, b.Client.Do(func() error {
			conn, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(b.node()))
			if err != nil {
				return err
			}
			defer conn.Close()

			for range 10_000 {
				_, _ = conn.Write([]byte("x")) // refused now and then
			}

			return nil
		}))
		b.do(func() {
			_, err := tracer.Steps(b.t.Context())
			require.ErrorIs(b.t, err, unix.ENOBUFS)
		})
		assert.NotEmpty(b.t, b.steps(b.t.Context(), tracer), "it goes on")
	})
}

// Nothing is left, however it ends.
func TestNothingLeft(t *testing.T) {
	t.Parallel()
	eachFamily(t, func(b *bed) {
		b.nft(`table IP fw { chain f { type filter hook forward priority 0; meta mark 1 counter; }; }`)

		before := b.run("", "nft", "list", "ruleset")

		require.NoError(b.t, b.follow().Close())
		assert.Equal(b.t, before, b.run("", "nft", "list", "ruleset"))

		self, err := os.Executable()
		require.NoError(b.t, err)

		cmd := exec.CommandContext(b.t.Context(), self)
		cmd.Env = append(os.Environ(), childVariable+"=yes")
		out, err := cmd.StdoutPipe()
		require.NoError(b.t, err)
		b.do(func() { require.NoError(b.t, cmd.Start()) })

		line, _ := bufio.NewReader(out).ReadString('\n')
		assert.Equal(b.t, "<nil>\n", line)

		during := b.run("", "nft", "list", "ruleset")
		assert.Contains(b.t, during, "hostports-explain-")
		assert.Contains(b.t, during, strings.TrimSpace(before), "what others have is as it was")
		assert.NotContains(b.t, b.run("flush ruleset\nlist ruleset", "nft", "-f", "-"), "fw", "others go on")
		b.nft(`table IP fw { chain f { type filter hook forward priority 0; meta mark 1 counter; }; }`)

		require.NoError(b.t, cmd.Process.Kill())
		_ = cmd.Wait()

		assert.Equal(b.t, before, b.run("", "nft", "list", "ruleset"))
	})
}

func TestNotPermitted(t *testing.T) {
	t.Parallel()
	eachFamily(t, func(b *bed) {
		b.do(func() {
			hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}

			var data [2]unix.CapUserData
			require.NoError(b.t, unix.Capget(&hdr, &data[0]))

			data[0].Effective &^= 1 << unix.CAP_NET_ADMIN
			require.NoError(b.t, unix.Capset(&hdr, &data[0]))

			defer func() { // the thread is somebody else's next
				data[0].Effective |= 1 << unix.CAP_NET_ADMIN
				assert.NoError(b.t, unix.Capset(&hdr, &data[0]))
			}()

			_, err := Start(b.t.Context(), b.ClientIP(b.v6))
			require.ErrorIs(b.t, err, unix.EPERM)
		})
	})
}

// A kernel that refuses the table does not know of owners; one that refuses what is in it lacks
// something else.
func TestSupported(t *testing.T) {
	t.Parallel()

	for _, errno := range []unix.Errno{unix.EINVAL, unix.EOPNOTSUPP} {
		err := supported(&nfnetlink.BatchError{Err: errno})
		require.ErrorIs(t, err, errors.ErrUnsupported)
		require.ErrorIs(t, err, errno)
		require.ErrorContains(t, err, "Linux 5.12")
	}

	assert.NotErrorIs(t, supported(&nfnetlink.BatchError{Message: 1, Err: unix.EINVAL}), errors.ErrUnsupported)
	assert.NotErrorIs(t, supported(unix.EPERM), errors.ErrUnsupported)
	assert.NoError(t, supported(nil))
}

// The kernel's ids are used again, and one packet may have two.
func TestIDs(t *testing.T) {
	t.Parallel()

	tracer := &Tracer{table: nfnetlink.Table{Family: unix.NFPROTO_IPV4, Name: "ours"}, packets: map[uint32]*Step{}}
	n := &names{hooks: map[chainKey]string{}}

	for _, hook := range []string{"prerouting", "forward", "postrouting"} {
		for _, suffix := range []string{first, last} {
			n.hooks[chainKey{unix.NFPROTO_IPV4, "ours", hook + suffix}] = hook
		}
	}

	// pass has a packet pass one of our chains, in which a rule matches it, or none.
	pass := func(id uint32, from, to byte, chain string, rule uint64) {
		header := make([]byte, 20)
		header[0], header[12], header[16] = 0x45, from, to

		for _, h := range []nfnetlink.Trace{
			{Rule: rule, Verdict: unix.NFT_CONTINUE, Network: header},
			{Policy: true, Verdict: 1},
		} {
			h.ID, h.Family, h.Table, h.Chain = id, unix.NFPROTO_IPV4, "ours", chain
			if s := tracer.packet(h); s != nil {
				tracer.add(s, h, n)
			}
		}
	}

	for range 2 { // one lies where the other has lain
		pass(1, 1, 2, "prerouting-first", 5)
		pass(1, 1, 3, "prerouting-last", 6)
		pass(1, 1, 3, "forward-first", 0)
		pass(1, 1, 3, "postrouting-last", 0)
	}

	for range 2 { // answers that get the address in prerouting, by a bridge
		pass(1, 3, 1, "prerouting-last", 6)
		pass(2, 3, 1, "forward-first", 0)
		pass(2, 2, 1, "postrouting-last", 0)
	}

	pass(2, 8, 9, "postrouting-first", 0) // somebody else's

	there := []string{"prerouting-first", "prerouting-last", "forward-first", "postrouting-last"}
	back := []string{"prerouting-last", "forward-first", "postrouting-last"}

	for i, want := range [][]string{there, there, back, back, nil} {
		assert.Equal(t, want, text(tracer.steps, i+1), i)
	}
}
