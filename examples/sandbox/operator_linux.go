package main

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"

	"github.com/cri-o/hostport"
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
