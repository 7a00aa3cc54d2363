package hostport

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cri-o/hostport/internal/iptables"
)

// broken is what the programs of a variant do.
type broken struct {
	variant iptables.Variant
	script  string
}

// withoutKernel is what they do where the kernel does not have what they drive (1.8.9,
// its system calls made to fail by strace).
func withoutKernel() map[string]broken {
	const version = `case "$*" in --version) exec "$real" "$@";; esac; `

	return map[string]broken{
		"no nf_tables": {iptables.NFT, version + `echo "v1.8.9 (nf_tables): Could not fetch rule set generation id: Invalid argument" >&2; exit 4`},
		"no nfnetlink": {iptables.NFT, `echo "1.8.9 (nf_tables) Failed to initialize nft: Protocol not supported" >&2; exit 1`},
		"no ip_tables": {iptables.Legacy, version + `echo "v1.8.9 (legacy): unable to initialize table 'nat'" >&2; exit 2`},
		"killed":       {iptables.NFT, version + `kill -9 $$`},
	}
}

// installed makes a PATH where iptables is of one variant, and all programs of a
// variant run a script.
func installed(t *testing.T, plain iptables.Variant, broken broken) {
	t.Helper()

	dir := t.TempDir()

	for _, command := range []string{"iptables", "ip6tables"} {
		for name, v := range map[string]iptables.Variant{"": plain, "-nft": iptables.NFT, "-legacy": iptables.Legacy} {
			for _, suffix := range []string{"", "-save", "-restore"} {
				path, err := exec.LookPath(command + "-" + string(v) + suffix)
				require.NoError(t, err)

				what := `exec "$real" "$@"`
				if v == broken.variant {
					what = broken.script
				}

				require.NoError(t, os.WriteFile(filepath.Join(dir, command+name+suffix), []byte("#!/bin/sh\nreal="+path+"\n"+what+"\n"), 0o700))
			}
		}
	}

	t.Setenv("PATH", dir)
}

// Where the iptables of PATH cannot work, the variant that can is taken, and said.
func TestVariantThatWorks(t *testing.T) {
	for name, tc := range withoutKernel() {
		if name == "killed" { // which says nothing about the kernel
			continue
		}

		t.Run(name, func(t *testing.T) {
			n := newNode(t, viaNFTables) // without hints
			n.serve(0, "tcp", IPv4, 80)
			n.serve(0, "tcp", IPv6, 80)

			works := map[iptables.Variant]iptables.Variant{iptables.NFT: iptables.Legacy, iptables.Legacy: iptables.NFT}[tc.variant]
			path := os.Getenv("PATH")

			for _, plain := range []iptables.Variant{tc.variant, works} {
				installed(t, plain, tc)

				log, logged := logs(t)
				m := n.manager(log, WithBackend(BackendIPTables))

				for _, f := range []IPFamily{IPv4, IPv6} {
					require.NoError(t, n.add(m, "id", n.pod(0, f, &PortMapping{HostPort: 8080, ContainerPort: 80})))
					n.answers(n.Client, "tcp", netip.AddrPortFrom(n.nodeIP(f), 8080), "web")
				}

				require.NoError(t, n.remove(m, "id", nil))
				require.NoError(t, m.Close())
				assert.Equal(t, 2, strings.Count(logged(), fmt.Sprintf("variant=%q reason=\"WithBackend\"", works)), logged())
				assert.Equal(t, plain == tc.variant, strings.Contains(logged(), "1.8.9"), "why: %s", logged())
				t.Setenv("PATH", path)
			}
		})
	}
}

// Where neither can work, the error says why for both; where one could not be asked, the
// other is not taken for that.
func TestNoVariantWorks(t *testing.T) {
	n := newNode(t, viaNFTables)
	path := os.Getenv("PATH")

	installed(t, iptables.NFT, withoutKernel()["no nf_tables"])
	shim(t, "iptables-legacy-restore", withoutKernel()["no ip_tables"].script)
	n.do(func() {
		_, err := NewIPTables(IPv4)
		require.ErrorContains(t, err, "generation id")
		require.ErrorContains(t, err, "unable to initialize")
	})

	t.Setenv("PATH", path)
	for _, script := range []string{withoutKernel()["killed"].script, "kill -9 $$"} {
		installed(t, iptables.NFT, broken{iptables.NFT, script})
		n.do(func() {
			_, err := NewIPTables(IPv4)
			require.ErrorContains(t, err, "killed", script)
		})
		t.Setenv("PATH", path)
	}
}

// What is older than 1.6.2 has no --wait, which New says, and not the first Add.
func TestOldIPTables(t *testing.T) {
	n := newNode(t, viaNFTables)
	path := os.Getenv("PATH")

	for _, version := range []string{"1.4.21", "1.6.1", "1.6.2"} {
		t.Setenv("PATH", path)

		dir := t.TempDir()

		for _, name := range []string{"iptables", "ip6tables"} {
			for _, suffix := range []string{"", "-save", "-restore"} {
				program, err := exec.LookPath(name + "-legacy" + suffix)
				require.NoError(t, err)

				script := fmt.Sprintf("#!/bin/sh\ncase $1 in --version) echo %s v%s;; *) exec %s \"$@\";; esac\n", name, version, program)
				require.NoError(t, os.WriteFile(filepath.Join(dir, name+suffix), []byte(script), 0o700))
			}
		}

		t.Setenv("PATH", dir)
		n.do(func() {
			pod := n.pod(0, IPv4, &PortMapping{HostPort: 8080, ContainerPort: 80})

			m, err := New(WithBackend(BackendIPTables), WithLogger(testLogger(t)))
			if version == "1.6.2" {
				require.NoError(t, err)
				require.NoError(t, m.Add("id", pod, ""))
				require.NoError(t, m.Close())

				return
			}

			require.ErrorContains(t, err, "iptables "+version+" is too old")
			require.ErrorContains(t, err, "1.6.2")
			require.ErrorContains(t, err, "ip6tables "+version+" is too old")

			m = metaManager(t, WithBackend(BackendIPTables))
			require.NoError(t, m.Remove("id", pod), "there is nothing")
			require.NoError(t, m.Close())
		})
	}
}

// The xtables lock says nothing about the kernel.
func TestVariantUnderLock(t *testing.T) {
	n := newNode(t, viaNFTables)
	installed(t, iptables.Legacy, broken{})

	defer lockXtables(t)()

	n.do(func() {
		ipt, err := iptables.Find(t.Context(), IPv4)
		require.NoError(t, err)
		assert.Equal(t, iptables.Legacy, ipt.Variant)
	})
}
