package interop

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"

	v1 "k8s.io/api/core/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-o/hostport"
)

// The runtimes that embed hostport, or could: each with the port mapper's API that its other
// code calls, what stands in for the port mapper, and the calls. docs/porting.md tells what that
// changes in each.

// sandbox is what a runtime knows of one. IPs are known from when its network is set up until
// the runtime ends.
type sandbox struct {
	id     string
	config *runtimeapi.PodSandboxConfig
	ips    []string
}

// caller is a runtime that has been started.
type caller interface {
	// setUp and tearDown are what it does for a sandbox.
	setUp(ctx context.Context, sb sandbox) error
	tearDown(ctx context.Context, sb sandbox) error
	// stop is the end of its process.
	stop() error
}

// callers are started with the sandboxes that they have from before. Those without Sync have no
// use for them.
var callers = []struct { //nolint:gochecknoglobals // a table
	name  string
	syncs bool
	start func(ctx context.Context, before []sandbox, opts ...hostport.Option) (caller, error)
}{
	{"dockershim", false, startDockershim},
	{"CRI-O 1.24", false, startCRIO124},
	{"CRI-O 1.32", false, startCRIO132},
	{"CRI-O 1.33", true, startCRIO133},
	{"from scratch", true, startRuntime},
}

// mappingsOf is what each of them makes of what the kubelet asks for.
func mappingsOf(sb sandbox) []*hostport.PortMapping {
	var mappings []*hostport.PortMapping

	for _, pm := range sb.config.GetPortMappings() {
		mappings = append(mappings, &hostport.PortMapping{
			HostPort:      pm.GetHostPort(), // 0 is skipped
			ContainerPort: pm.GetContainerPort(),
			Protocol:      v1.Protocol(pm.GetProtocol().String()),
			HostIP:        pm.GetHostIp(),
		})
	}

	return mappings
}

// dockershim, now cri-dockerd, has a manager for each IP family, and calls the one of the IP's.
type dockershim struct {
	manager, managerV6 hostport.HostPortManager
}

// startDockershim makes one manager of both families, where there were two.
func startDockershim(_ context.Context, _ []sandbox, opts ...hostport.Option) (caller, error) {
	both := hostport.NewMetaHostportManager(opts...)

	return &dockershim{manager: both, managerV6: both}, nil
}

func (d *dockershim) setUp(_ context.Context, sb sandbox) error {
	for _, ip := range sb.ips {
		pod := dockershimPod(sb)
		pod.IP = net.ParseIP(ip)

		if err := d.of(ip).Add(sb.id, pod, "cni0"); err != nil { // the bridge that the pods are on
			return err
		}
	}

	return nil
}

func (d *dockershim) tearDown(_ context.Context, sb sandbox) error {
	var errs []error
	for _, ip := range sb.ips {
		errs = append(errs, d.of(ip).Remove(sb.id, dockershimPod(sb)))
	}

	return errors.Join(errs...)
}

func (d *dockershim) stop() error { return closeManager(d.manager) }

func (d *dockershim) of(ip string) hostport.HostPortManager {
	if net.ParseIP(ip).To4() == nil {
		return d.managerV6
	}

	return d.manager
}

// dockershimPod has protocols as dockershim's checkpoints have them.
func dockershimPod(sb sandbox) *hostport.PodPortMapping {
	pod := podOf(sb)
	for _, pm := range pod.PortMappings {
		pm.Protocol = v1.Protocol(strings.ToLower(string(pm.Protocol)))
	}

	return pod
}

// podOf is a sandbox without its IP.
func podOf(sb sandbox) *hostport.PodPortMapping {
	return &hostport.PodPortMapping{
		Namespace:    sb.config.GetMetadata().GetNamespace(),
		Name:         sb.config.GetMetadata().GetName(),
		PortMappings: mappingsOf(sb),
		HostNetwork:  sb.config.GetLinux().GetSecurityContext().GetNamespaceOptions().GetNetwork() == runtimeapi.NamespaceMode_NODE,
	}
}

// closeManager closes what NewMetaHostportManager returns.
func closeManager(m hostport.HostPortManager) error {
	closer, ok := m.(io.Closer)
	if !ok {
		return errors.ErrUnsupported
	}

	return closer.Close()
}

// crio124 is CRI-O until 1.32. API and types of 1.24 to 1.31 are hostport's.
type crio124 struct {
	manager hostport.HostPortManager
	add     func(id string, pod *hostport.PodPortMapping) error
}

func startCRIO124(_ context.Context, _ []sandbox, opts ...hostport.Option) (caller, error) {
	m := hostport.NewMetaHostportManager(opts...)

	return crio124{m, func(id string, pod *hostport.PodPortMapping) error { return m.Add(id, pod, "") }}, nil
}

func (c crio124) setUp(_ context.Context, sb sandbox) error {
	return eachFirstIP(sb, func(ip string) error {
		pod := podOf(sb)
		pod.IP = net.ParseIP(ip)

		return c.add(sb.id, pod)
	})
}

func (c crio124) tearDown(_ context.Context, sb sandbox) error {
	return c.manager.Remove(sb.id, podOf(sb))
}

func (c crio124) stop() error { return closeManager(c.manager) }

// eachFirstIP calls f with the first IP of each family, as CRI-O does.
func eachFirstIP(sb sandbox, f func(ip string) error) error {
	done := map[bool]bool{}

	for _, ip := range sb.ips {
		if v4 := net.ParseIP(ip).To4() != nil; !done[v4] {
			done[v4] = true

			if err := f(ip); err != nil {
				return err
			}
		}
	}

	return nil
}

// crio132API is that of CRI-O 1.32: Add has no interface's name.
type crio132API interface {
	Add(id string, podPortMapping *hostport.PodPortMapping) error
	Remove(id string, podPortMapping *hostport.PodPortMapping) error
}

type crio132Manager struct{ hostport.HostPortManager }

// The other one is for a node where host ports are disabled.
var _, _ crio132API = crio132Manager{}, crio132Manager{hostport.NewNoopHostportManager()}

func (m crio132Manager) Add(id string, podPortMapping *hostport.PodPortMapping) error {
	return m.HostPortManager.Add(id, podPortMapping, "")
}

func startCRIO132(_ context.Context, _ []sandbox, opts ...hostport.Option) (caller, error) {
	m := crio132Manager{hostport.NewMetaHostportManager(opts...)}

	return crio124{m.HostPortManager, m.Add}, nil
}

// crio133API is that of CRI-O since 1.33, with what is new: Sync and Close.
type crio133API interface {
	Add(id, name, podIP string, hostportMappings []*hostport.PortMapping) error
	Remove(id string, hostportMappings []*hostport.PortMapping) error
	Sync(ctx context.Context, pods map[string][]*hostport.PodPortMapping) error
	Close() error
}

type crio133Manager struct{ *hostport.Manager }

// newCRIO133NoopManager is for a node where host ports are disabled.
func newCRIO133NoopManager() crio133API {
	m, _ := hostport.NewNoopHostportManager().(*hostport.Manager)

	return crio133Manager{m}
}

// newCRIO133Manager leaves out "go m.Run(ctx)": a test's goroutines are in no node's namespace.
func newCRIO133Manager(_ context.Context, opts ...hostport.Option) (crio133API, error) {
	m, err := hostport.New(opts...)
	if err != nil {
		return nil, err
	}

	return crio133Manager{m}, nil
}

func (m crio133Manager) Add(id, name, podIP string, hostportMappings []*hostport.PortMapping) error {
	return m.Manager.Add(id, &hostport.PodPortMapping{Name: name, IP: net.ParseIP(podIP), PortMappings: hostportMappings}, "")
}

func (m crio133Manager) Remove(id string, hostportMappings []*hostport.PortMapping) error {
	return m.Manager.Remove(id, &hostport.PodPortMapping{PortMappings: hostportMappings})
}

type crio133 struct{ manager crio133API }

func startCRIO133(ctx context.Context, before []sandbox, opts ...hostport.Option) (caller, error) {
	m, err := newCRIO133Manager(ctx, opts...)
	if err != nil {
		return nil, err
	}

	return crio133{m}, m.Sync(ctx, podsOf(before))
}

// podsOf is what Sync wants to know of sandboxes.
func podsOf(sandboxes []sandbox) map[string][]*hostport.PodPortMapping {
	pods := map[string][]*hostport.PodPortMapping{}

	for _, sb := range sandboxes {
		if len(sb.ips) == 0 { // not known: the sandbox keeps what it has
			pods[sb.id] = append(pods[sb.id], podOf(sb))
		}

		for _, ip := range sb.ips {
			pod := podOf(sb)
			pod.IP = net.ParseIP(ip)
			pods[sb.id] = append(pods[sb.id], pod)
		}
	}

	return pods
}

func (c crio133) setUp(_ context.Context, sb sandbox) error {
	return eachFirstIP(sb, func(ip string) error {
		return c.manager.Add(sb.id, "k8s_"+sb.config.GetMetadata().GetName(), ip, mappingsOf(sb))
	})
}

func (c crio133) tearDown(_ context.Context, sb sandbox) error {
	return c.manager.Remove(sb.id, mappingsOf(sb))
}

func (c crio133) stop() error { return c.manager.Close() }

// newRuntime is a runtime that is made with hostport.
type newRuntime struct{ manager *hostport.Manager }

func startRuntime(ctx context.Context, before []sandbox, opts ...hostport.Option) (caller, error) {
	m, err := hostport.New(opts...)
	if err != nil {
		return nil, err
	}

	return newRuntime{m}, m.Sync(ctx, podsOf(before))
}

func (r newRuntime) setUp(ctx context.Context, sb sandbox) error {
	for _, pod := range podsOf([]sandbox{sb})[sb.id] {
		if err := r.manager.AddContext(ctx, sb.id, pod, ""); err != nil {
			return errors.Join(err, r.tearDown(ctx, sb)) // what another IP has got
		}
	}

	return nil
}

func (r newRuntime) tearDown(ctx context.Context, sb sandbox) error {
	return r.manager.RemoveContext(ctx, sb.id, nil)
}

func (r newRuntime) stop() error { return r.manager.Close() }
