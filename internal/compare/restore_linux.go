package main

import (
	"fmt"
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

func (r restore) fill(pods []pod) error {
	var (
		chains, rules strings.Builder
		known         = map[string]bool{iptables.DNATDispatch: true, iptables.MasqDispatch: true}
	)

	fmt.Fprintf(&chains, "*nat\n:%s - [0:0]\n:%s - [0:0]\n", iptables.DNATDispatch, iptables.MasqDispatch)

	for _, rule := range iptables.NATRules(row.IPv4, true) {
		fmt.Fprintln(&rules, iptables.CmdAppend+rule.String())
	}

	lead := func(p pod) {
		for _, side := range iptables.SidesOf(p.row()) {
			for _, jump := range side.Path {
				if !known[jump.Target] {
					known[jump.Target] = true
					fmt.Fprintf(&chains, ":%s - [0:0]\n", jump.Target)
					fmt.Fprintln(&rules, iptables.CmdAppend+jump.String())
				}
			}
		}
	}

	for _, p := range pods {
		lead(p)

		for _, side := range iptables.SidesOf(p.row()) {
			fmt.Fprintf(&chains, ":%s - [0:0]\n", side.Jump.Target)
			fmt.Fprintln(&rules, iptables.CmdAppend+side.Jump.String()+"\n"+iptables.CmdAppend+side.Rule.String())
		}
	}

	for i := range mostMeasured {
		lead(measured(i, "TCP"))
		lead(measured(i, "UDP"))
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
