package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	v1 "k8s.io/api/core/v1"

	"github.com/cri-o/hostport"
	"github.com/cri-o/hostport/internal/testbed"
)

// demo is the runtime, and the network it runs in.
type demo struct {
	*report

	bed      *testbed.Bed
	opts     []hostport.Option
	manager  *hostport.Manager
	running  map[string][]*hostport.PodPortMapping // by sandbox id
	web, dns sandbox
}

// sandbox is a pod as a runtime knows it.
type sandbox struct {
	*testbed.Pod

	ports []*hostport.PortMapping
}

func newDemo(bed *testbed.Bed, r *report, opts []hostport.Option) *demo {
	port := func(proto v1.Protocol, host, container int32, hostIP string) *hostport.PortMapping {
		return &hostport.PortMapping{Protocol: proto, HostPort: host, ContainerPort: container, HostIP: hostIP}
	}
	return &demo{
		report:  r,
		bed:     bed,
		running: map[string][]*hostport.PodPortMapping{},
		opts:    append([]hostport.Option{hostport.WithTimeout(operationTimeout)}, opts...),
		web: sandbox{bed.Pods[0], []*hostport.PortMapping{
			port(v1.ProtocolTCP, 8080, 80, ""),
			port(v1.ProtocolTCP, 8443, 443, bed.OtherNodeIP(false).String()),
			port(v1.ProtocolTCP, 8443, 443, bed.OtherNodeIP(true).String()),
		}},
		dns: sandbox{bed.Pods[1], []*hostport.PortMapping{
			port(v1.ProtocolUDP, 5353, 53, ""),
			port(v1.ProtocolTCP, 5353, 53, ""),
		}},
	}
}

// id stands for the 64 digits that a runtime calls a sandbox by.
func (s sandbox) id() string { return "sandbox-of-" + s.Name }

// mapping is what Add wants to know for one of the pod's addresses.
func (s sandbox) mapping(v6 bool, ports ...*hostport.PortMapping) *hostport.PodPortMapping {
	return &hostport.PodPortMapping{Namespace: "demo", Name: s.Name, IP: s.IP(v6).AsSlice(), PortMappings: ports}
}

// among returns those of the rows that lead to the pod.
func (s sandbox) among(rows []hostport.Mapping) []hostport.Mapping {
	return slices.DeleteFunc(slices.Clone(rows), func(m hostport.Mapping) bool {
		return !m.PodIP.Equal(s.IPv4.AsSlice()) && !m.PodIP.Equal(s.IPv6.AsSlice())
	})
}

// onHost does what a runtime does. That is in the host's namespace to begin
// with; here each call has to enter it, for its sockets and child processes.
func (d *demo) onHost(operation func() error) (took time.Duration, err error) {
	err = d.bed.Host.Do(func() error {
		start := time.Now()
		err := operation()
		took = time.Since(start)
		return err
	})
	return took, err
}

// open makes the manager.
func (d *demo) open() error {
	_, err := d.onHost(func() error {
		m, err := hostport.New(d.opts...)
		if err != nil {
			return fmt.Errorf("new manager: %w", err)
		}
		d.manager = m
		return nil
	})
	return err
}

// start sets the sandboxes up.
func (d *demo) start(context.Context) error {
	d.linef("client %s ── node %s, %s ── bridge %s ── web %s, dns %s, + IPv6", d.bed.ClientIP(false),
		d.bed.NodeIP(false), d.bed.OtherNodeIP(false), bridgeIP(false), d.web.IPv4, d.dns.IPv4)
	d.title("Two sandboxes start. Each has two addresses: two Adds with one id.")
	d.table(column{"POD", 4}, column{"POD IP", 14}, column{"HOST PORTS", 58}, column{"BACKEND", 8})
	for _, s := range []sandbox{d.web, d.dns} {
		for _, v6 := range []bool{false, true} {
			pod := s.mapping(v6, s.ports...)
			d.running[s.id()] = append(d.running[s.id()], pod)
			took, err := d.onHost(func() error { return d.manager.Add(s.id(), pod, "") })
			ports, backend, serveErr := d.serve(s, s.IP(v6))
			d.row(errors.Join(err, serveErr), took, s.Name, s.IP(v6), ports, backend)
		}
	}
	return nil
}

// serve lets the pod answer on the container ports that are mapped.
func (d *demo) serve(s sandbox, ip netip.Addr) (text string, backend hostport.Backend, err error) {
	var texts []string
	for _, m := range d.manager.Mappings() {
		if !m.PodIP.Equal(ip.AsSlice()) {
			continue
		}
		host := net.JoinHostPort(m.HostIP, strconv.Itoa(int(m.HostPort)))
		texts = append(texts, fmt.Sprintf("%s %s → %d", m.Protocol, host, m.ContainerPort))
		backend = m.Backend
		port := uint16(m.ContainerPort) //nolint:gosec // it is 1 to 65535
		_, serveErr := s.Serve(strings.ToLower(string(m.Protocol)), netip.AddrPortFrom(ip, port))
		err = errors.Join(err, serveErr)
	}
	return strings.Join(texts, ", "), backend, err
}

// traffic sends requests to every host port, and to one that is not there.
func (d *demo) traffic(ctx context.Context) error {
	d.title("Real traffic. A pod sees who asks; itself and 127.0.0.1 as the bridge. 8443 is on the second address alone.")
	var questions []question
	for _, v6 := range []bool{false, true} {
		node, second, loopback := d.bed.NodeIP(v6), d.bed.OtherNodeIP(v6), netip.MustParseAddr("127.0.0.1")
		if v6 {
			loopback = netip.IPv6Loopback()
		}
		questions = slices.Concat(questions,
			d.fromEverywhere("tcp", netip.AddrPortFrom(node, 8080), d.web.Pod, 80),
			d.fromHost("tcp", netip.AddrPortFrom(loopback, 8080), d.web.Pod, 80),
			d.fromClient("tcp", netip.AddrPortFrom(second, 8443), d.web.Pod, 443),
			d.toNobody("tcp", netip.AddrPortFrom(node, 8443)),
			d.fromEverywhere("udp", netip.AddrPortFrom(node, 5353), d.dns.Pod, 53),
			d.fromClient("tcp", netip.AddrPortFrom(second, 5353), d.dns.Pod, 53))
	}
	return d.ask(ctx, questions)
}

// conflict lets a pod ask for a port that another one has.
func (d *demo) conflict(context.Context) error {
	d.title("dns asks for TCP 8080 as well, which web has.")
	d.table(column{"WHAT ADD SAYS", 84})
	more := d.dns.mapping(false, &hostport.PortMapping{HostPort: 8080, ContainerPort: 80})
	took, err := d.onHost(func() error { return d.manager.Add(d.dns.id(), more, "") })
	var problem error
	if conflict := (*hostport.ConflictError)(nil); !errors.As(err, &conflict) || conflict.OtherPod != "demo/web" {
		problem = errors.New("expected a conflict with demo/web")
	}
	d.row(problem, took, err)
	return nil
}

// probes lets another process on the node try ports that are mapped.
func (d *demo) probes(ctx context.Context) error {
	d.title("Another process on the node tries the ports. They are held.")
	inUse := syscall.EADDRINUSE.Error()
	return errors.Join(
		d.probe(ctx, "tcp4", "0.0.0.0:8080", inUse),
		d.probe(ctx, "tcp6", "[::]:8080", inUse),
		d.probe(ctx, "udp4", "0.0.0.0:5353", inUse),
		d.probe(ctx, "udp6", "[::]:5353", inUse),
	)
}

// removal ends a sandbox, with what a runtime still knows of it then.
func (d *demo) removal(ctx context.Context) error {
	d.title("web ends: one Remove for both families. Clients are refused at once, dns goes on, the port is free.")
	before := d.web.among(d.manager.Mappings())
	took, err := d.onHost(func() error {
		return d.manager.Remove(d.web.id(), &hostport.PodPortMapping{PortMappings: d.web.ports})
	})
	delete(d.running, d.web.id())
	after := d.web.among(d.manager.Mappings())
	rows, rowsErr := d.kernelRows(ctx)
	if rowsErr != nil {
		return rowsErr
	}
	left := len(d.web.among(rows))
	if err == nil && left > 0 {
		err = errors.New("expected no rules left")
	}
	d.table(column{"POD", 4}, column{"MAPPINGS", 8}, column{"RULES LEFT", 10})
	d.row(err, took, d.web.Name, fmt.Sprintf("%d → %d", len(before), len(after)), left)

	var questions []question
	for _, v6 := range []bool{false, true} {
		questions = slices.Concat(questions,
			d.toNobody("tcp", netip.AddrPortFrom(d.bed.NodeIP(v6), 8080)),
			d.toNobody("tcp", netip.AddrPortFrom(d.bed.OtherNodeIP(v6), 8443)),
			d.fromClient("udp", netip.AddrPortFrom(d.bed.NodeIP(v6), 5353), d.dns.Pod, 53))
	}
	if err := d.ask(ctx, questions); err != nil {
		return err
	}
	return d.probe(ctx, "tcp4", "0.0.0.0:8080", bound)
}
