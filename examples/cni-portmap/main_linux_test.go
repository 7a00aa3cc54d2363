package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cri-o/hostport"
	"github.com/cri-o/hostport/internal/testbed"
)

// plugin is the program that is tested, as a runtime would start it.
var plugin string //nolint:gochecknoglobals // built once

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "cni-portmap")
	if err == nil {
		plugin = filepath.Join(dir, "cni-portmap")

		var out []byte

		if out, err = exec.Command("go", "build", "-buildvcs=false", "-o", plugin, ".").CombinedOutput(); err != nil {
			err = fmt.Errorf("%w: %s", err, out)
		}
	}

	code := 1
	if err == nil {
		code = m.Run()
	} else {
		fmt.Fprintln(os.Stderr, err)
	}

	_ = os.RemoveAll(dir)

	os.Exit(code)
}

// node is a host with two containers and a plugin.
type node struct {
	*testbed.Bed

	t       *testing.T
	backend hostport.Backend
	path    string // PATH of the plugin
}

// eachNode runs f on a node for each backend. With nftables the plugin has no program to start.
func eachNode(t *testing.T, f func(t *testing.T, n *node)) {
	t.Helper()

	for _, variant := range []string{"nftables", "nft", "legacy"} {
		t.Run(variant, func(t *testing.T) {
			bed, err := testbed.New("web", "other")
			require.NoError(t, err)
			t.Cleanup(func() { assert.NoError(t, bed.Close()) })

			n := &node{Bed: bed, t: t, backend: hostport.BackendNFTables}
			if variant != "nftables" {
				n.backend, n.path = hostport.BackendIPTables, os.Getenv("PATH")

				for _, program := range []string{"iptables-", "ip6tables-"} {
					n.run(program+variant, "-t", "mangle", "-N", "KUBE-IPTABLES-HINT") // as the kubelet has it
				}
			}

			f(t, n)
		})
	}
}

// run starts a program on the host.
func (n *node) run(name string, args ...string) {
	n.t.Helper()
	require.NoError(n.t, n.Host.Do(func() error {
		out, err := exec.CommandContext(n.t.Context(), name, args...).CombinedOutput()
		if err != nil {
			err = fmt.Errorf("%s %v: %w: %s", name, args, err, out)
		}

		return err
	}))
}

// attachment is one of a container to a network.
type attachment struct {
	network, id string
	pod         *testbed.Pod
	ports       []map[string]any
}

// port is a mapping to port 80; more is one more field, or another value.
func port(hostPort int, more ...any) map[string]any {
	pm := map[string]any{"hostPort": hostPort, "containerPort": 80, "protocol": "tcp"}
	if len(more) > 0 {
		pm[more[0].(string)] = more[1]
	}

	return pm
}

// result is what the plugins before have printed.
func result(pod *testbed.Pod) map[string]any {
	return map[string]any{
		"cniVersion": "1.1.0",
		"interfaces": []any{map[string]any{"name": "cni0"}, map[string]any{"name": "eth0", "sandbox": netns(pod)}},
		"ips": []any{
			map[string]any{"address": "10.88.0.1/16", "interface": 0},
			map[string]any{"address": pod.IPv4.String() + "/16", "interface": 1},
			map[string]any{"address": pod.IPv6.String() + "/64", "interface": 1},
		},
	}
}

func netns(pod *testbed.Pod) string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), pod.FD()) }

// call starts the plugin for an attachment, and returns what it prints, and its error.
func (n *node) call(command string, a attachment, more ...any) (string, error) {
	conf := map[string]any{
		"cniVersion": "1.1.0", "name": a.network, "type": "cni-portmap", "backend": n.backend,
		"runtimeConfig": map[string]any{"portMappings": a.ports},
	}
	env := []string{"CNI_COMMAND=" + command, "CNI_PATH=/", "PATH=" + n.path, "CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=" + a.id}

	if a.pod != nil {
		conf["prevResult"] = result(a.pod)
		env = append(env, "CNI_CONTAINERID="+a.id, "CNI_IFNAME=eth0", "CNI_NETNS="+netns(a.pod))
	}

	for i := 0; i < len(more); i += 2 {
		conf[more[i].(string)] = more[i+1]
	}

	stdin, err := json.Marshal(conf)
	if err != nil {
		return "", err
	}

	var stdout, stderr bytes.Buffer

	err = n.Host.Do(func() error {
		cmd := exec.CommandContext(n.t.Context(), plugin)
		cmd.Env, cmd.Stdin, cmd.Stdout, cmd.Stderr = env, bytes.NewReader(stdin), &stdout, &stderr

		return cmd.Run()
	})
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		cniErr := &types.Error{}
		if bad := json.Unmarshal(stdout.Bytes(), cniErr); bad != nil {
			return "", fmt.Errorf("%w: %s %s", err, stdout.String(), stderr.String())
		}

		err = cniErr
	}

	return stdout.String(), err
}

func (n *node) must(command string, a attachment, more ...any) {
	n.t.Helper()

	_, err := n.call(command, a, more...)
	require.NoError(n.t, err, "%s %s", command, a.id)
}

// fails asserts that a call fails with a code, and says why.
func (n *node) fails(code uint, why, command string, a attachment, more ...any) {
	n.t.Helper()

	_, err := n.call(command, a, more...)
	cniErr := &types.Error{}
	require.ErrorAs(n.t, err, &cniErr)
	assert.Equal(n.t, code, cniErr.Code, cniErr)
	assert.Contains(n.t, cniErr.Error(), why)
}

// rows are those that the kernel holds, as text.
func (n *node) rows() []string {
	n.t.Helper()

	var rows []string

	require.NoError(n.t, n.Host.Do(func() error {
		list, err := hostport.List(n.t.Context())
		for _, m := range list {
			rows = append(rows, fmt.Sprintf("%s %s %d %s", m.Protocol, m.HostIP, m.HostPort, m.PodIP))
		}

		return err
	}))

	return rows
}

func (n *node) answers(from *testbed.Namespace, network, ip string, port uint16, pod string) testbed.Answer {
	n.t.Helper()

	answer, err := from.Ask(n.t.Context(), network, netip.AddrPortFrom(netip.MustParseAddr(ip), port))
	if assert.NoError(n.t, err, "%s from %s to %s:%d", network, from.Name, ip, port) {
		assert.Equal(n.t, pod, answer.From)
	}

	return answer
}

func (n *node) refused(from *testbed.Namespace, network, ip string, port uint16) {
	n.t.Helper()

	_, err := from.Ask(n.t.Context(), network, netip.AddrPortFrom(netip.MustParseAddr(ip), port))
	assert.ErrorIs(n.t, err, syscall.ECONNREFUSED, "%s from %s to %s:%d", network, from.Name, ip, port)
}

func (n *node) serve() {
	n.t.Helper()

	for _, pod := range n.Pods {
		for _, network := range []string{"tcp", "udp"} {
			for _, v6 := range []bool{false, true} {
				_, err := pod.Serve(network, netip.AddrPortFrom(pod.IP(v6), 80))
				require.NoError(n.t, err)
			}
		}
	}
}

// What portmap does, from each side, and what DEL leaves.
func TestTraffic(t *testing.T) {
	eachNode(t, func(t *testing.T, n *node) {
		n.serve()

		v4, v6, other4 := n.NodeIP(false).String(), n.NodeIP(true).String(), n.OtherNodeIP(false).String()
		web := attachment{"net1", "web", n.Pods[0], []map[string]any{
			port(8080), port(8080, "protocol", "udp"), port(8081, "hostIP", other4), port(8082, "hostIP", "127.0.0.1"), port(0),
		}}

		out, err := n.call("ADD", web)
		require.NoError(t, err)

		want, err := json.Marshal(result(n.Pods[0]))
		require.NoError(t, err)
		assert.JSONEq(t, string(want), out, "the result goes on as it came")
		n.must("CHECK", web)

		for _, network := range []string{"tcp", "udp"} {
			for i, ip := range []string{v4, v6} {
				answer := n.answers(n.Client, network, ip, 8080, "web")
				assert.Equal(t, n.ClientIP(i == 1), answer.Source.Addr(), "the client's address is kept")
				n.answers(n.Host, network, ip, 8080, "web")
				n.answers(n.Pods[1].Namespace, network, ip, 8080, "web")

				answer = n.answers(n.Pods[0].Namespace, network, ip, 8080, "web")
				assert.NotEqual(t, n.Pods[0].IP(i == 1), answer.Source.Addr(), "hairpin is masqueraded")
			}

			n.answers(n.Host, network, "127.0.0.1", 8080, "web")
		}

		n.answers(n.Client, "tcp", other4, 8081, "web")
		n.refused(n.Client, "tcp", v4, 8081)
		n.answers(n.Host, "tcp", "127.0.0.1", 8082, "web")
		n.refused(n.Client, "tcp", v4, 8082)

		// The port goes to another container, and a client that stays goes with it.
		from := netip.AddrPortFrom(n.ClientIP(false), 40000)
		to := netip.AddrPortFrom(n.NodeIP(false), 8080)
		answer, err := n.Client.AskFrom(t.Context(), "udp", from, to)
		require.NoError(t, err)
		assert.Equal(t, "web", answer.From)

		other := attachment{"net1", "other", n.Pods[1], []map[string]any{port(8080, "protocol", "UDP")}}

		n.must("DEL", web)
		n.must("DEL", web)
		assert.Empty(t, n.rows())
		n.refused(n.Client, "tcp", v6, 8080)
		n.must("ADD", other)

		answer, err = n.Client.AskFrom(t.Context(), "udp", from, to)
		require.NoError(t, err)
		assert.Equal(t, "other", answer.From)

		// As a runtime does that has lost the result, and the ports.
		other.ports = nil
		n.must("DEL", other, "prevResult", nil)
		assert.Empty(t, n.rows())
	})
}

func TestNothingToMap(t *testing.T) {
	eachNode(t, func(t *testing.T, n *node) {
		none := attachment{"net1", "web", n.Pods[0], nil}
		for _, command := range []string{"ADD", "CHECK", "DEL"} {
			n.must(command, none)
		}

		assert.Empty(t, n.rows())
		n.must("STATUS", attachment{network: "net1"})

		out, err := n.call("VERSION", attachment{})
		require.NoError(t, err)
		assert.Contains(t, out, `"1.0.0","1.1.0"`)
	})
}

// A configuration that says what cannot be done is refused, and nothing is there.
func TestRefused(t *testing.T) {
	eachNode(t, func(t *testing.T, n *node) {
		some := attachment{"net1", "web", n.Pods[0], []map[string]any{port(8080)}}
		n.fails(types.ErrInvalidNetworkConfig, "prevResult is missing", "ADD", some, "prevResult", nil)
		n.fails(types.ErrInvalidNetworkConfig, "not supported", "ADD", some, "conditionsV4", []string{"-s", "192.0.2.0/24"})
		n.fails(types.ErrPluginNotAvailable, "ipvs", "STATUS", attachment{network: "net1"}, "backend", "ipvs")

		some.ports = []map[string]any{port(8080), port(70000)}
		n.fails(types.ErrInvalidNetworkConfig, "want 1 to 65535", "ADD", some)
		assert.Empty(t, n.rows())
	})
}

// Who has a port keeps it, though the process knows nobody; what the other has got by then goes.
func TestConflict(t *testing.T) {
	eachNode(t, func(t *testing.T, n *node) {
		n.serve()

		first := attachment{"net1", "first", n.Pods[0], []map[string]any{port(8080, "hostIP", "::")}} // IPv6 alone
		n.must("ADD", first)

		rows := n.rows()

		for _, network := range []string{"net1", "net2"} {
			second := attachment{network, "second", n.Pods[1], []map[string]any{port(8081), port(8080)}}
			n.fails(errPortTaken, "8080 is taken", "ADD", second)
			assert.Equal(t, rows, n.rows())
			n.must("DEL", second)
			assert.Equal(t, rows, n.rows())
		}

		n.answers(n.Client, "tcp", n.NodeIP(true).String(), 8080, "web")
		n.must("ADD", first) // its own
		assert.Equal(t, rows, n.rows())
	})
}

func TestCheckAfterFlush(t *testing.T) {
	eachNode(t, func(_ *testing.T, n *node) {
		n.serve()

		web := attachment{"net1", "web", n.Pods[0], []map[string]any{port(8080)}}
		n.must("ADD", web)
		n.must("CHECK", web)

		if n.backend == hostport.BackendNFTables {
			n.run("nft", "flush", "ruleset")
		} else {
			for _, program := range []string{"iptables-nft", "iptables-legacy"} {
				n.run(program, "-t", "nat", "-F")
			}
		}

		n.fails(types.ErrInternal, "8080", "CHECK", web)
		n.must("ADD", web)
		n.must("CHECK", web)
		n.answers(n.Client, "tcp", n.NodeIP(false).String(), 8080, "web")
	})
}

// GC of a network takes out what is not valid there, and nothing of another, be it the same container.
func TestGC(t *testing.T) {
	eachNode(t, func(t *testing.T, n *node) {
		n.serve()

		gc := func(network string, ids ...string) {
			valid := []types.GCAttachment(nil)
			for _, id := range ids {
				valid = append(valid, types.GCAttachment{ContainerID: id, IfName: "eth0"})
			}

			n.must("GC", attachment{network: network}, "cni.dev/valid-attachments", valid)
		}

		a := attachment{"net1", "a", n.Pods[0], []map[string]any{port(8080), port(8080, "protocol", "Udp"), port(8083, "hostIP", strings.ToUpper(n.OtherNodeIP(true).String()))}}
		n.must("ADD", a)

		onlyA := n.rows()

		b := attachment{"net1", "b", n.Pods[1], []map[string]any{port(8081)}}
		n.must("ADD", b)

		onNet1 := n.rows()

		a2 := attachment{"net2", "a", n.Pods[1], []map[string]any{port(8082)}}
		n.must("ADD", a2)

		all := n.rows()

		n.fails(types.ErrInvalidNetworkConfig, "valid-attachments is missing", "GC", attachment{network: "net1"}) // nobody knows what is valid
		gc("net1", "a", "b")
		gc("net2", "a")
		gc("net", "b")
		assert.Equal(t, all, n.rows())

		gc("net2", "b")
		assert.Equal(t, onNet1, n.rows())
		n.must("ADD", a2)

		gc("net1", "a")
		n.must("CHECK", a)
		n.must("CHECK", a2)
		n.refused(n.Client, "tcp", n.NodeIP(false).String(), 8081)
		n.answers(n.Client, "tcp", n.NodeIP(false).String(), 8080, "web")
		n.answers(n.Client, "tcp", n.NodeIP(true).String(), 8082, "other")

		n.must("DEL", a2)
		assert.Equal(t, onlyA, n.rows())
		gc("net1")
		assert.Empty(t, n.rows())
	})
}

// Twenty processes at once: each has done what it was to do, and nothing else.
func TestManyAtOnce(t *testing.T) {
	eachNode(t, func(t *testing.T, n *node) {
		n.serve()

		const half = 10

		old, fresh := make([]attachment, half), make([]attachment, half)
		want := []string{}

		for i := range half {
			old[i] = attachment{"net1", "old" + strconv.Itoa(i), n.Pods[0], []map[string]any{port(8000 + i)}}
			fresh[i] = attachment{"net" + strconv.Itoa(i%2), "new" + strconv.Itoa(i), n.Pods[1], []map[string]any{port(9000 + i)}}
			want = append(want,
				fmt.Sprintf("TCP 0.0.0.0 %d %s", 9000+i, n.Pods[1].IPv4), fmt.Sprintf("TCP :: %d %s", 9000+i, n.Pods[1].IPv6))
		}

		n.atOnce("ADD", old, "", nil)
		require.Len(t, n.rows(), 2*half)
		n.atOnce("DEL", old, "ADD", fresh)
		assert.ElementsMatch(t, want, n.rows())
		n.answers(n.Client, "tcp", n.NodeIP(true).String(), 9009, "other")
		n.refused(n.Client, "tcp", n.NodeIP(false).String(), 8000)
		n.atOnce("DEL", slices.Concat(old, fresh), "", nil)
		assert.Empty(t, n.rows())
	})
}

// atOnce calls the plugin for all attachments at the same time.
func (n *node) atOnce(command string, some []attachment, other string, others []attachment) {
	n.t.Helper()

	var (
		wg   sync.WaitGroup
		errs = make([]error, len(some)+len(others))
	)

	for i, a := range slices.Concat(some, others) {
		do := command
		if i >= len(some) {
			do = other
		}

		wg.Go(func() { _, errs[i] = n.call(do, a) })
	}

	wg.Wait()
	require.NoError(n.t, errors.Join(errs...))
}
