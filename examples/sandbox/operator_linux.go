package main

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"

	"github.com/cri-o/hostport"
	"github.com/cri-o/hostport/internal/tool"
)

// operator shows what is left in the kernel, which is all of dns, as the tools
// of the node's operator print it.
func (d *demo) operator(ctx context.Context) error {
	rows, err := d.kernelRows(ctx)
	if err != nil {
		return err
	}
	rows = d.dns.among(rows)
	inIPTables := func(m hostport.Mapping) bool { return m.Backend == hostport.BackendIPTables }
	if slices.ContainsFunc(rows, inIPTables) {
		return d.iptablesSave(ctx, rows)
	}
	return d.nftList(ctx, rows)
}

// nftList does without nft where that is missing: only the operator needs it.
func (d *demo) nftList(ctx context.Context, rows []hostport.Mapping) error {
	d.title("What the operator sees of dns in nft list table ip crio-hostports, and likewise of ip6.")
	var listed []byte
	_, err := d.onHost(func() (err error) {
		listed, err = exec.CommandContext(ctx, "nft", "list", "table", "ip", "crio-hostports").Output()
		return err //nolint:wrapcheck // below
	})
	if errors.Is(err, exec.ErrNotFound) {
		d.linef("nft is not installed here. This is what it would show in map hostports:")
		for _, m := range rows {
			if m.PodIP.To4() != nil {
				d.linef("    %s comment %q : %s . %d", portKey(m), m.PodIDHash, m.PodIP, m.ContainerPort)
			}
		}
		return nil
	}
	if err != nil {
		return fmt.Errorf("nft list table: %w", err)
	}
	d.linef("%s", strings.TrimSpace(string(listed)))
	return nil
}

// iptablesSave picks the rules that are in the rows' chains, or jump to them.
// The hash tells: it is in the names of these chains.
func (d *demo) iptablesSave(ctx context.Context, rows []hostport.Mapping) error {
	d.title("What the operator sees of dns in iptables-save -t nat, and likewise in ip6tables-save.")
	var saved []byte
	_, err := d.onHost(func() error {
		iptables, err := hostport.NewIPTables(hostport.IPv4)
		if err != nil {
			return fmt.Errorf("find iptables: %w", err)
		}
		if saved, err = iptables.Save(ctx, "nat"); err != nil {
			return fmt.Errorf("read rules: %w", err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	breaks := strings.NewReplacer(" -m comment", "\n    -m comment", " -m conntrack", "\n    -m conntrack")
	for line := range strings.Lines(string(saved)) {
		mentioned := func(m hostport.Mapping) bool { return strings.Contains(line, m.PodIDHash) }
		if strings.HasPrefix(line, "-A ") && slices.ContainsFunc(rows, mentioned) {
			d.linef("%s", breaks.Replace(strings.TrimSpace(line)))
		}
	}
	return nil
}

// tool shows what cmd/hostports says of the node: as it is, and after somebody has broken it.
func (d *demo) tool(ctx context.Context) error {
	if err := d.hostports(ctx, "What is there.", tool.Good, "list"); err != nil {
		return err
	}
	if err := d.hostports(ctx, "Why does the port of dns not answer? It does.", tool.Good, "explain", "5353/udp"); err != nil {
		return err
	}
	if err := d.bed.Host.Sysctl("net/ipv4/ip_forward", "0"); err != nil {
		return fmt.Errorf("end forwarding: %w", err)
	}
	return d.hostports(ctx, "And when somebody has ended forwarding?", tool.Bad, "explain", "5353/udp")
}

// hostports runs the tool on the node. Where nobody may send a probe, it says so.
func (d *demo) hostports(ctx context.Context, why string, want int, args ...string) error {
	d.title(why + " hostports " + strings.Join(args, " "))
	var out strings.Builder
	code := 0
	_, err := d.onHost(func() error {
		code = tool.Run(ctx, args, &out, &out)
		return nil
	})
	d.linef("%s", strings.TrimSpace(out.String()))
	if err == nil && code != want && code != tool.CannotLook {
		err = fmt.Errorf("hostports %v: exit code %d: %w", args, code, errUnexpected)
	}
	return err
}
