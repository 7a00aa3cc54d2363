package main

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	v1 "k8s.io/api/core/v1"

	"github.com/cri-o/hostport/internal/row"
)

// A mapper is one way to map host ports. Its methods but close may be called from several
// goroutines, once it is filled.
type mapper interface {
	// fill makes the rows that are to be there before anything is measured.
	fill(pods []pod) error
	add(p pod) error
	remove(p pod) error
	// logged is how many bytes of log there were so far.
	logged() int64
	close() error
}

// A pod has one host port.
type pod struct {
	ID                      string
	IP                      netip.Addr
	Proto                   v1.Protocol
	HostPort, ContainerPort uint16
}

// row is the pod's line of the table, as the backends have it.
func (p pod) row() *row.Row {
	return &row.Row{
		Endpoint:  row.Endpoint{PortKey: row.PortKey{Proto: row.Protocol(strings.ToLower(string(p.Proto))), Port: p.HostPort}},
		Pod:       netip.AddrPortFrom(p.IP, p.ContainerPort),
		OwnerHash: row.ShortHash(p.ID), Hash: row.ShortHash(p.ID), Label: p.ID,
		Depth: rangeLevel,
	}
}

// kind is a mapper to measure.
type kind struct {
	name string
	// how is what is run, for the page.
	how string
	// holds is set if the mapper binds the port besides, so that no other process can.
	holds bool
	// tracks is set if it looks at the flows that the kernel tracks.
	tracks bool
	new    func(tools) (mapper, error)
}

// tools are what mappers need besides themselves.
type tools struct {
	// portmap is the path of the CNI plugin.
	portmap string
	// netns is the network namespace of a pod.
	netns string
	// tmp is a folder for files.
	tmp string
}

const (
	viaNFT    = "nft"
	viaLegacy = "legacy"
)

// kinds are the mappers, in the order of their turns.
func kinds() []kind {
	const nft, iptablesNFT, legacy = "nftables", "iptables-nft", "iptables-legacy"

	return []kind{
		{name: floorName, how: "the elements that hostport adds, in a netlink batch on an open socket, and bind(2) of the port", holds: true, new: newFloor},
		{name: "hostport, " + nft, how: "a manager that stays", holds: true, tracks: true, new: newOurs(nft)},
		{name: "nft -f -", how: "nft(8) with the same elements", new: newNFT},
		{name: "portmap, " + nft, how: "the CNI plugin, with its nftables backend", tracks: true, new: newPortmap(nft, "")},
		{name: "hostport, " + iptablesNFT, how: "a manager that stays", holds: true, tracks: true, new: newOurs(viaNFT)},
		{name: "iptables-nft-restore", how: "with --noflush and the rules that hostport makes for a row", new: newRestore(viaNFT)},
		{name: "portmap, " + iptablesNFT, how: "the CNI plugin, with its iptables backend", tracks: true, new: newPortmap("iptables", viaNFT)},
		{name: "hostport, " + legacy, how: "a manager that stays", holds: true, tracks: true, new: newOurs(viaLegacy)},
		{name: "iptables-legacy-restore", how: "with --noflush and the rules that hostport makes for a row", new: newRestore(viaLegacy)},
		{name: "portmap, " + legacy, how: "the CNI plugin, with its iptables backend", tracks: true, new: newPortmap("iptables", viaLegacy)},
	}
}

// Host ports: those of the rows that are there come before those that are measured.
const (
	firstFilled   = 10_000
	firstMeasured = 40_000
	mostMeasured  = 512
	perBlock      = 250 // pods
)

// filled are the pods of the rows that are there.
func filled(rows int) []pod {
	pods := make([]pod, rows)
	for i := range pods {
		pods[i] = pod{
			ID: fmt.Sprintf("filled%058d", i), IP: podIP(8, i), Proto: v1.ProtocolTCP,
			HostPort: uint16(firstFilled + i), ContainerPort: 80,
		}
	}

	return pods
}

// measured is the i-th pod to be measured. None of those that are there has its IP.
func measured(i int, proto v1.Protocol) pod {
	return pod{
		ID: fmt.Sprintf("measured%056d", i), IP: podIP(200, i), Proto: proto,
		HostPort: uint16(firstMeasured + i), ContainerPort: 80,
	}
}

func podIP(block, i int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, 88, byte(block + i/perBlock), byte(1 + i%perBlock)})
}

// patience bounds each program.
const patience = 2 * time.Minute

// execute runs a program and returns what it prints. The environment is added to ours.
func execute(env []string, stdin, program string, args ...string) (stdout, stderr string, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()

	var out, errs strings.Builder

	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Env = append(os.Environ(), env...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &errs

	if err := cmd.Run(); err != nil {
		return "", "", fmt.Errorf("%s %s: %w: %s%s", filepath.Base(program), strings.Join(args, " "), err, out.String(), errs.String())
	}

	return out.String(), errs.String(), nil
}
