package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
)

// portmap runs the CNI plugin, as a runtime does by libcni.
type portmap struct {
	path, netns, backend, variant string
	env                           []string
	log                           atomic.Int64
}

func newPortmap(backend, variant string) func(tools) (mapper, error) {
	return func(t tools) (mapper, error) {
		p := &portmap{path: t.portmap, netns: t.netns, backend: backend, variant: variant}
		if variant == "" {
			return p, nil
		}

		// It runs what is called iptables.
		for _, suffix := range []string{"", "-save", "-restore"} {
			program, err := exec.LookPath("iptables-" + variant + suffix)
			if err != nil {
				return nil, fmt.Errorf("portmap: %w", err)
			}

			if err := os.Symlink(program, filepath.Join(t.tmp, "iptables"+suffix)); err != nil {
				return nil, fmt.Errorf("portmap: %w", err)
			}
		}

		p.env = []string{"PATH=" + t.tmp + ":" + os.Getenv("PATH")}

		return p, nil
	}
}

func (m *portmap) add(p pod) error    { return m.run("ADD", p) }
func (m *portmap) remove(p pod) error { return m.run("DEL", p) }
func (m *portmap) logged() int64      { return m.log.Load() }
func (m *portmap) close() error       { return nil }

func (m *portmap) run(command string, p pod) error {
	type object = map[string]any

	const version = "1.0.0"

	config, err := json.Marshal(object{
		"cniVersion": version, "name": "pods", "type": "portmap", "backend": m.backend, "snat": true,
		"capabilities": object{"portMappings": true},
		"runtimeConfig": object{"portMappings": []object{{
			"hostPort": p.HostPort, "containerPort": p.ContainerPort, "protocol": strings.ToLower(string(p.Proto)),
		}}},
		"prevResult": object{
			"cniVersion": version,
			"interfaces": []object{{"name": "eth0", "sandbox": m.netns}},
			"ips":        []object{{"address": p.IP.String() + "/16", "gateway": "10.88.0.1", "interface": 0}},
		},
	})
	if err != nil {
		return fmt.Errorf("portmap: %w", err)
	}

	env := append([]string{
		"CNI_COMMAND=" + command, "CNI_CONTAINERID=" + p.ID, "CNI_NETNS=" + m.netns, "CNI_IFNAME=eth0",
		"CNI_PATH=" + filepath.Dir(m.path),
	}, m.env...)

	_, stderr, err := execute(env, string(config), m.path)
	m.log.Add(int64(len(stderr)))

	return err
}

// fill has portmap map one pod, and writes the rules of that once more for each of pods.
func (m *portmap) fill(pods []pod) error {
	example := measured(mostMeasured-1, "TCP")
	if err := m.add(example); err != nil {
		return err
	}

	lines, err := m.rules(example)
	if err == nil && len(pods) > 0 {
		err = m.repeat(lines, example, pods)
	}

	if err != nil {
		return err
	}

	return m.remove(example)
}

// rules are those that a pod has, as the programs print and take them.
func (m *portmap) rules(p pod) (lines []string, err error) {
	if m.backend != "iptables" {
		text, _, err := execute(nil, "", "nft", "list", "table", "ip", "cni_hostport")
		if err != nil {
			return nil, err
		}

		chain := ""

		for line := range strings.Lines(text) {
			if words := strings.Fields(line); len(words) > 1 && words[0] == "chain" {
				chain = words[1]
			} else if strings.Contains(line, p.ID) {
				lines = append(lines, "add rule ip cni_hostport "+chain+" "+strings.TrimSpace(line)+"\n")
			}
		}

		return lines, nil
	}

	text, _, err := execute(nil, "", "iptables-"+m.variant+"-save", "-t", "nat")

	for line := range strings.Lines(text) {
		if strings.Contains(line, p.ID) || strings.Contains(line, "CNI-DN-") {
			lines = append(lines, line)
		}
	}

	return lines, err
}

func (m *portmap) repeat(lines []string, example pod, pods []pod) error {
	chain := ""

	for _, line := range lines {
		if strings.HasPrefix(line, ":CNI-DN-") {
			chain, _, _ = strings.Cut(line[1:], " ")
		}
	}

	for some := range slices.Chunk(pods, inOneFile) {
		if err := m.put(again(lines, example, chain, some)); err != nil {
			return err
		}
	}

	return nil
}

// again are the lines of an example for others.
func again(lines []string, example pod, chain string, pods []pod) string {
	var text strings.Builder

	for _, p := range pods {
		pairs := []string{
			example.ID, p.ID, example.IP.String(), p.IP.String(), strconv.Itoa(int(example.HostPort)), strconv.Itoa(int(p.HostPort)),
		}
		if chain != "" {
			pairs = append(pairs, chain, fmt.Sprintf("CNI-DN-%021x", p.HostPort))
		}

		other := strings.NewReplacer(pairs...)
		for _, line := range lines {
			text.WriteString(other.Replace(line))
		}
	}

	return text.String()
}

// put carries out lines of nft, or of iptables-restore.
func (m *portmap) put(lines string) error {
	if m.backend != "iptables" {
		_, _, err := execute(nil, lines, "nft", "-f", "-")

		return err
	}

	return restore{"iptables-" + m.variant + "-restore"}.run("*nat\n" + lines + "COMMIT\n")
}
