package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/cri-o/hostport/internal/iptables"
	"github.com/cri-o/hostport/internal/row"
)

// rangeLevel is the level of the range chains that the rows stand in: one for 64 ports, of
// which hostport makes some more where there are many rows.
const rangeLevel = 4

// restore gives the rules that hostport makes for a row to iptables-restore.
type restore struct{ program string }

func newRestore(variant string) func(tools) (mapper, error) {
	return func(tools) (mapper, error) { return restore{"iptables-" + variant + "-restore"}, nil }
}

// inOneFile is how many pods go into one file: what a new chain costs iptables-nft-restore grows with
// their number in it.
const inOneFile = 1000

func (r restore) fill(pods []pod) error {
	known := map[string]bool{iptables.DNATDispatch: true, iptables.MasqDispatch: true}

	if err := r.prepare(known); err != nil {
		return err
	}

	for some := range slices.Chunk(pods, inOneFile) {
		var chains, rules strings.Builder

		for _, p := range some {
			lead(p, known, &chains, &rules)

			for _, side := range iptables.SidesOf(p.row()) {
				fmt.Fprintf(&chains, ":%s - [0:0]\n", side.Jump.Target)
				fmt.Fprintln(&rules, iptables.CmdAppend+side.Jump.String()+"\n"+iptables.CmdAppend+side.Rule.String())
			}
		}

		if err := r.run("*nat\n" + chains.String() + rules.String() + "COMMIT\n"); err != nil {
			return err
		}
	}

	return nil
}

// lead makes the chains that lead to a pod's, if they are not known yet.
func lead(p pod, known map[string]bool, chains, rules *strings.Builder) {
	for _, side := range iptables.SidesOf(p.row()) {
		for _, jump := range side.Path {
			if !known[jump.Target] {
				known[jump.Target] = true
				fmt.Fprintf(chains, ":%s - [0:0]\n", jump.Target)
				fmt.Fprintln(rules, iptables.CmdAppend+jump.String())
			}
		}
	}
}

// prepare makes what all pods need, and the chains that lead to those that are measured.
func (r restore) prepare(known map[string]bool) error {
	var chains, rules strings.Builder

	fmt.Fprintf(&chains, "*nat\n:%s - [0:0]\n:%s - [0:0]\n", iptables.DNATDispatch, iptables.MasqDispatch)

	for _, rule := range iptables.NATRules(row.IPv4, true) {
		fmt.Fprintln(&rules, iptables.CmdAppend+rule.String())
	}

	for i := range mostMeasured {
		lead(measured(i, "TCP"), known, &chains, &rules)
		lead(measured(i, "UDP"), known, &chains, &rules)
	}

	return r.run(chains.String() + rules.String() + "COMMIT\n")
}

func (r restore) run(text string) error {
	_, _, err := execute(nil, text, r.program, "--noflush", "--wait")

	return err
}

func (r restore) add(p pod) error {
	var text strings.Builder

	text.WriteString("*nat\n")

	for _, side := range iptables.SidesOf(p.row()) {
		fmt.Fprintf(&text, ":%s - [0:0]\n-A %s\n-A %s\n", side.Jump.Target, side.Jump, side.Rule)
	}

	return r.run(text.String() + "COMMIT\n")
}

func (r restore) remove(p pod) error {
	var text strings.Builder

	text.WriteString("*nat\n")

	for _, side := range iptables.SidesOf(p.row()) {
		fmt.Fprintf(&text, "-D %[1]s\n-F %[2]s\n-X %[2]s\n", side.Jump, side.Jump.Target)
	}

	return r.run(text.String() + "COMMIT\n")
}

func (r restore) logged() int64 { return 0 }
func (r restore) close() error  { return nil }
