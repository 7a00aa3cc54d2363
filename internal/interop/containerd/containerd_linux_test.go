//go:build containerd

package containerd

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	reference "github.com/google/go-containerregistry/pkg/name"
	image "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-o/hostport"
	"github.com/cri-o/hostport/internal/testbed"
)

// sandboxImage is what each pod runs: a program that waits. What answers is the test's own, in the pod's namespace.
const sandboxImage = "localhost/hostport/pause:test"

// Eight pods come at once, answer whoever asks, outlive containerd, and go at once with all that was theirs.
func TestPods(t *testing.T) {
	for _, variant := range []string{"nftables", "nft", "legacy"} {
		t.Run(variant, func(t *testing.T) {
			n := newNode(t, variant)
			n.start()

			const pods = 8

			ups := make([]*pod, pods)
			n.atOnce(pods, func(i int) (err error) {
				ups[i], err = n.runPod("web"+strconv.Itoa(i), ports(i, n.OtherNodeIP(false)))

				return err
			})
			n.answer(ups)

			_, err := n.runPod("late", []*cri.PortMapping{{HostPort: 9000, ContainerPort: 80}, {HostPort: 8003, ContainerPort: 80}})
			require.ErrorContains(t, err, "8003 is taken")
			assert.Len(t, n.rows(), rowsOf(pods), "what the late pod had got is gone")

			n.kill()
			n.start()
			n.answer(ups)

			n.atOnce(pods, func(i int) error { return n.removePod(ups[i].id) })
			assert.Empty(t, n.rows())

			_, err = n.Client.Ask(t.Context(), "tcp", netip.AddrPortFrom(n.NodeIP(false), 8000))
			require.ErrorIs(t, err, syscall.ECONNREFUSED)
		})
	}
}

// ports of the pod i: TCP and UDP on all of the node's addresses; the first pod has one on a single address, the second
// one on 127.0.0.1.
func ports(i int, one netip.Addr) []*cri.PortMapping {
	hostPort := int32(8000 + i)
	list := []*cri.PortMapping{
		{Protocol: cri.Protocol_TCP, HostPort: hostPort, ContainerPort: 80}, {Protocol: cri.Protocol_UDP, HostPort: hostPort, ContainerPort: 80},
	}

	switch i {
	case 0:
		list = append(list, &cri.PortMapping{HostPort: 8100, ContainerPort: 80, HostIp: one.String()})
	case 1:
		list = append(list, &cri.PortMapping{HostPort: 8101, ContainerPort: 80, HostIp: "127.0.0.1"})
	}

	return list
}

// rowsOf so many pods: two for each family, and those of ports with a host IP.
func rowsOf(pods int) int { return 4*pods + 2 }

// node is a host with a containerd, and a pod beside it that is not containerd's.
type node struct {
	*testbed.Bed

	t          *testing.T
	dir        string
	containerd *exec.Cmd // while it runs
	conn       *grpc.ClientConn
	pods       cri.RuntimeServiceClient
	images     cri.ImageServiceClient
}

func newNode(t *testing.T, variant string) *node {
	t.Helper()

	bed, err := testbed.New("neighbour")
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, bed.Close()) })

	n := &node{Bed: bed, t: t, dir: t.TempDir()}
	backend := hostport.BackendNFTables

	if variant != "nftables" {
		backend = hostport.BackendIPTables

		for _, program := range []string{"iptables-", "ip6tables-"} {
			n.run(program+variant, "-t", "mangle", "-N", "KUBE-IPTABLES-HINT") // as the kubelet has it
		}
	}

	n.plugins()
	n.config(backend)
	t.Cleanup(n.end)

	return n
}

// plugins is a folder with those of the distribution, and ours.
func (n *node) plugins() {
	n.t.Helper()

	theirs := "/usr/lib/cni"
	if _, err := os.Stat(theirs); err != nil {
		theirs = "/usr/libexec/cni"
	}

	require.NoError(n.t, os.MkdirAll(n.path("plugins"), 0o755))

	for _, plugin := range []string{"bridge", "host-local", "loopback"} {
		require.NoError(n.t, os.Symlink(filepath.Join(theirs, plugin), n.path("plugins", plugin)))
	}

	n.build("../../../examples/cni-portmap", "plugins/cni-portmap")
}

// build builds a program that needs no library.
func (n *node) build(folder, file string) {
	n.t.Helper()

	cmd := exec.CommandContext(n.t.Context(), "go", "build", "-buildvcs=false", "-o", n.path(file), ".")
	cmd.Dir, cmd.Env = folder, append(os.Environ(), "CGO_ENABLED=0")
	out, err := cmd.CombinedOutput()
	require.NoError(n.t, err, "%s", out)
}

func (n *node) config(backend hostport.Backend) {
	n.t.Helper()

	n.write("config.toml", fmt.Sprintf(`
version = 2
root = %q
state = %q
[grpc]
  address = %q
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = %q
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "native" # works on whatever the folder is on
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = %q
    conf_dir = %q
`, n.path("root"), n.path("state"), n.socket(), sandboxImage, n.path("plugins"), n.path("net.d")))

	require.NoError(n.t, os.MkdirAll(n.path("net.d"), 0o755))
	n.write("net.d/10-pods.conflist", fmt.Sprintf(`{
  "cniVersion": "1.0.0", "name": "pods",
  "plugins": [
    {"type": "bridge", "bridge": "cni-pods", "isGateway": true, "hairpinMode": true, "ipam": {
      "type": "host-local", "dataDir": %q,
      "ranges": [[{"subnet": "10.90.0.0/24"}], [{"subnet": "fd00:10:90::/64"}]],
      "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]}},
    {"type": "cni-portmap", "backend": %q, "capabilities": {"portMappings": true}}
  ]
}`, n.path("addresses"), backend))
}

// start starts containerd and waits until it can run pods.
func (n *node) start() {
	n.t.Helper()

	log, err := os.OpenFile(n.path("log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	require.NoError(n.t, err)

	defer log.Close()

	cmd := exec.Command("containerd", "-c", n.path("config.toml"))
	cmd.Stdout, cmd.Stderr = log, log
	require.NoError(n.t, n.Host.Do(cmd.Start))

	conn, err := grpc.NewClient("unix://"+n.socket(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	require.NoError(n.t, err)

	n.containerd, n.conn = cmd, conn
	n.pods, n.images = cri.NewRuntimeServiceClient(conn), cri.NewImageServiceClient(conn)

	require.EventuallyWithT(n.t, func(c *assert.CollectT) {
		status, err := n.pods.Status(n.t.Context(), &cri.StatusRequest{})
		require.NoError(c, err)

		for _, condition := range status.GetStatus().GetConditions() {
			assert.True(c, condition.GetStatus(), condition)
		}
	}, testbed.Stretch(30*time.Second), 50*time.Millisecond)

	n.importImage()
}

// kill ends containerd as a crash does: what it started stays.
func (n *node) kill() {
	n.t.Helper()
	require.NoError(n.t, n.conn.Close())
	require.NoError(n.t, n.containerd.Process.Kill())
	_ = n.containerd.Wait() // says that it was killed
	n.containerd = nil
}

// end takes out what a test that failed has left.
func (n *node) end() {
	if n.t.Failed() {
		log, _ := os.ReadFile(n.path("log"))
		n.t.Logf("containerd: %s", log)
	}

	if n.containerd == nil {
		return
	}

	list, err := n.pods.ListPodSandbox(context.Background(), &cri.ListPodSandboxRequest{})
	assert.NoError(n.t, err)

	for _, p := range list.GetItems() {
		assert.NoError(n.t, n.removePod(p.GetId()))
	}

	assert.NoError(n.t, n.conn.Close())
	assert.NoError(n.t, n.containerd.Process.Signal(syscall.SIGTERM))
	assert.NoError(n.t, n.containerd.Wait())
	assert.NoError(n.t, n.removeCgroups())
}

// cgroup is where the pods' are, below each hierarchy.
func (n *node) cgroup() string { return "hostport-" + filepath.Base(filepath.Dir(n.dir)) }

// removeCgroups fails while a pod has processes.
func (n *node) removeCgroups() (err error) {
	for _, pattern := range []string{"/sys/fs/cgroup/", "/sys/fs/cgroup/*/"} {
		dirs, _ := filepath.Glob(pattern + n.cgroup()) // the pattern is right
		for _, dir := range dirs {
			err = errors.Join(err, os.Remove(dir))
		}
	}

	return err
}

// importImage makes an image of one file that needs no other, and waits until pods can be of it.
func (n *node) importImage() {
	n.t.Helper()

	var layer bytes.Buffer

	n.build("./pause", "pause")
	program, err := os.ReadFile(n.path("pause"))
	require.NoError(n.t, err)

	files := tar.NewWriter(&layer)
	require.NoError(n.t, files.WriteHeader(&tar.Header{Name: "pause", Mode: 0o755, Size: int64(len(program))}))
	_, err = files.Write(program)
	require.NoError(n.t, err)
	require.NoError(n.t, files.Close())

	open := func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(layer.Bytes())), nil }
	only, err := tarball.LayerFromOpener(open)
	require.NoError(n.t, err)
	img, err := mutate.ConfigFile(empty.Image, &image.ConfigFile{
		OS: "linux", Architecture: runtime.GOARCH, Config: image.Config{Entrypoint: []string{"/pause"}},
	})
	require.NoError(n.t, err)
	img, err = mutate.AppendLayers(img, only)
	require.NoError(n.t, err)

	tag, err := reference.NewTag(sandboxImage)
	require.NoError(n.t, err)
	require.NoError(n.t, tarball.WriteToFile(n.path("image.tar"), tag, img))
	n.run("ctr", "--address", n.socket(), "--namespace", "k8s.io", "images", "import", n.path("image.tar"))

	require.EventuallyWithT(n.t, func(c *assert.CollectT) {
		status, err := n.images.ImageStatus(n.t.Context(), &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: sandboxImage}})
		require.NoError(c, err)
		assert.NotNil(c, status.GetImage())
	}, testbed.Stretch(30*time.Second), 50*time.Millisecond)
}

// pod is one of containerd's.
type pod struct {
	*testbed.Namespace

	id  string
	ips []netip.Addr
}

// runPod starts a pod that answers at port 80 of all its addresses.
func (n *node) runPod(name string, ports []*cri.PortMapping) (*pod, error) {
	ctx, cancel := context.WithTimeout(context.Background(), testbed.Stretch(time.Minute))
	defer cancel()

	up, err := n.pods.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: &cri.PodSandboxConfig{
		Metadata: &cri.PodSandboxMetadata{Name: name, Namespace: "default", Uid: name},
		Hostname: name, LogDirectory: n.path("logs"), PortMappings: ports,
		Linux: &cri.LinuxPodSandboxConfig{CgroupParent: "/" + n.cgroup()},
	}})
	if err != nil {
		return nil, fmt.Errorf("run %s: %w", name, err)
	}

	status, err := n.pods.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: up.GetPodSandboxId(), Verbose: true})
	if err != nil {
		return nil, fmt.Errorf("status of %s: %w", name, err)
	}

	p := &pod{id: up.GetPodSandboxId()}

	if p.Namespace, err = open(name, status); err != nil {
		return nil, err
	}

	n.t.Cleanup(func() { assert.NoError(n.t, p.Close()) })

	ips := []string{status.GetStatus().GetNetwork().GetIp()}
	for _, other := range status.GetStatus().GetNetwork().GetAdditionalIps() {
		ips = append(ips, other.GetIp())
	}

	for _, ip := range ips {
		addr, err := netip.ParseAddr(ip)
		if err != nil {
			return nil, fmt.Errorf("address of %s: %w", name, err)
		}

		p.ips = append(p.ips, addr)

		for _, network := range []string{"tcp", "udp"} {
			if _, err := p.Serve(network, netip.AddrPortFrom(addr, 80)); err != nil {
				return nil, err
			}
		}
	}

	return p, nil
}

// open opens a pod's network namespace, whose path containerd tells to whom asks for all it has.
func open(name string, status *cri.PodSandboxStatusResponse) (*testbed.Namespace, error) {
	var info struct {
		RuntimeSpec struct {
			Linux struct {
				Namespaces []struct {
					Type string `json:"type"`
					Path string `json:"path"`
				} `json:"namespaces"`
			} `json:"linux"`
		} `json:"runtimeSpec"`
	}

	if err := json.Unmarshal([]byte(status.GetInfo()["info"]), &info); err != nil {
		return nil, fmt.Errorf("status of %s: %w", name, err)
	}

	for _, ns := range info.RuntimeSpec.Linux.Namespaces {
		if ns.Type == "network" {
			return testbed.Open(name, ns.Path)
		}
	}

	return nil, fmt.Errorf("%s has no network namespace", name)
}

func (n *node) removePod(id string) error {
	ctx, cancel := context.WithTimeout(context.Background(), testbed.Stretch(time.Minute))
	defer cancel()

	if _, err := n.pods.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: id}); err != nil {
		return fmt.Errorf("stop %s: %w", id, err)
	}

	if _, err := n.pods.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: id}); err != nil {
		return fmt.Errorf("remove %s: %w", id, err)
	}

	return nil
}

// answer has everybody ask the pods: the node, a client on the LAN, a pod of another bridge, a pod beside, and the pod itself.
func (n *node) answer(pods []*pod) {
	n.t.Helper()

	for i, p := range pods {
		hostPort := uint16(8000 + i)

		for _, network := range []string{"tcp", "udp"} {
			for _, v6 := range []bool{false, true} {
				node := n.NodeIP(v6)
				for _, from := range []*testbed.Namespace{n.Host, n.Client, n.Pods[0].Namespace, pods[(i+1)%len(pods)].Namespace} {
					n.answers(from, network, node, hostPort, p)
				}

				source := n.answers(p.Namespace, network, node, hostPort, p).Source.Addr()
				assert.NotContains(n.t, p.ips, source, "hairpin is masqueraded")
			}

			n.answers(n.Host, network, netip.MustParseAddr("127.0.0.1"), hostPort, p)
		}
	}

	n.answers(n.Client, "tcp", n.OtherNodeIP(false), 8100, pods[0])
	n.answers(n.Host, "tcp", netip.MustParseAddr("127.0.0.1"), 8101, pods[1])
}

func (n *node) answers(from *testbed.Namespace, network string, ip netip.Addr, port uint16, p *pod) testbed.Answer {
	n.t.Helper()

	answer, err := from.Ask(n.t.Context(), network, netip.AddrPortFrom(ip, port))
	require.NoError(n.t, err, "%s from %s to %s:%d", network, from.Name, ip, port)
	assert.Equal(n.t, p.Name, answer.From)

	return answer
}

// rows are those that the kernel holds.
func (n *node) rows() (list []hostport.Mapping) {
	n.t.Helper()
	require.NoError(n.t, n.Host.Do(func() (err error) {
		list, err = hostport.List(n.t.Context())

		return err
	}))

	return list
}

// atOnce calls do so many times, all at the same time.
func (n *node) atOnce(times int, do func(i int) error) {
	n.t.Helper()

	var wg sync.WaitGroup

	errs := make([]error, times)
	for i := range errs {
		wg.Go(func() { errs[i] = do(i) })
	}

	wg.Wait()
	require.NoError(n.t, errors.Join(errs...))
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

// path is below the test's folder.
func (n *node) path(parts ...string) string { return filepath.Join(n.dir, filepath.Join(parts...)) }

// socket's path is short: 107 bytes are the most for one (unix(7)).
func (n *node) socket() string { return n.path("containerd.sock") }

func (n *node) write(name, text string) {
	n.t.Helper()
	require.NoError(n.t, os.WriteFile(n.path(name), []byte(text), 0o600))
}
