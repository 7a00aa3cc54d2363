package iptables

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/coreos/go-iptables/iptables"
	"golang.org/x/sys/unix"

	"github.com/cri-o/hostport/internal/nfnetlink"
	"github.com/cri-o/hostport/internal/outcome"
	"github.com/cri-o/hostport/internal/row"
)

// Variant is which interface of the kernel an iptables binary drives.
type Variant string

// The variants.
const (
	NFT    Variant = "nft"
	Legacy Variant = "legacy"
)

// CommandTimeout bounds what finds out which iptables to use.
const CommandTimeout = 10 * time.Second

// Installed runs the programs of one variant.
type Installed struct {
	Family      row.Family
	Variant     Variant
	savePath    string // paths
	RestorePath string
	// InsteadOf says why it is not what NewIPTables would prefer, if it is not.
	InsteadOf error
}

// Find returns the iptables that the node uses, as NewIPTables says.
func Find(ctx context.Context, family row.Family) (*Installed, error) {
	var found []*Installed

	for _, v := range []Variant{NFT, Legacy} {
		t, err := newInstalled(family, Command(family)+"-"+string(v), v)
		if err != nil {
			continue // the node does not have both
		}

		hinted, err := t.hinted(ctx)
		if hinted || ctx.Err() != nil {
			return t, err
		}

		if unasked(err) {
			return nil, err
		}

		found = append(found, t)
	}

	plain, err := plain(ctx, family)
	if unasked(err) {
		return nil, err
	}

	if err != nil && len(found) == 0 {
		return nil, err
	}

	if err == nil {
		found = slices.DeleteFunc(found, func(t *Installed) bool { return t.Variant == plain.Variant })
		found = slices.Insert(found, 0, plain)
	}

	errs := []error{err}

	for _, t := range found {
		if len(found) > 1 { // else it tells when it is used
			err = t.works(ctx)
		}

		if err == nil || len(found) == 1 {
			t.InsteadOf = errors.Join(errs...)

			return t, nil
		}

		if unasked(err) {
			return nil, err
		}

		errs = append(errs, err)
	}

	return nil, errors.Join(errs[1:]...) // what is there, even if the iptables of PATH is not
}

// works asks the kernel whether it has what the variant drives.
func (t *Installed) works(ctx context.Context) error {
	if t.Variant == NFT {
		_, err := run(ctx, nil, t.savePath, "-t", "mangle")

		return err
	}

	tables, err := legacyTables(t.Family)
	if err != nil || len(tables) > 0 {
		return err
	}

	// To ask makes the table, as the first row does.
	_, err = run(ctx, []byte("*"+NATTable+"\n"+CmdCommit+"\n"), t.RestorePath, "--noflush", "--test", "--wait=1")
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && exit.ExitCode() == xtablesLocked {
		return nil
	}

	return err
}

// xtablesLocked is what iptables-legacy exits with if others have the xtables lock.
const xtablesLocked = 4

// unasked reports whether err is of a look that nothing came of: a file could not be
// opened, a program has not started, or somebody has killed it.
func unasked(err error) bool {
	exit, errno := (*exec.ExitError)(nil), syscall.Errno(0)
	if errors.As(err, &exit) {
		return !exit.Exited()
	}

	return errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) || errors.As(err, &errno) && !outcome.IsAbsence(err)
}

// plain returns the iptables of PATH.
func plain(ctx context.Context, family row.Family) (*Installed, error) {
	v, err := variantOf(ctx, Command(family))
	if err != nil {
		return nil, err
	}

	return newInstalled(family, Command(family), v)
}

// FindVariant returns the iptables of a variant, by whatever name the node has it.
func FindVariant(ctx context.Context, family row.Family, v Variant) (*Installed, error) {
	t, err := newInstalled(family, Command(family)+"-"+string(v), v)
	if err == nil {
		return t, nil
	}

	if plain, plainErr := plain(ctx, family); plainErr == nil && plain.Variant == v {
		return plain, nil
	}

	return nil, err
}

// NewBackend returns a backend over t that can be told of what others do to its tables.
// With iptables-nft that is by generation and ours of the ruleset; nil: it is not told.
func (t *Installed) NewBackend(
	localhost, guard bool, generation func(context.Context) (uint32, error), ours *nfnetlink.Generations,
) *Backend {
	b := New(t, localhost, guard)
	b.variant = string(t.Variant)

	switch {
	case t.Variant == Legacy:
		b.watch.state = t.legacyState
		b.Most = math.MaxInt // it copies the whole table for each transaction
	case generation != nil:
		b.watch.family, b.watch.generation, b.watch.own = unix.NFPROTO_IPV4, generation, ours
		if t.Family == row.IPv6 {
			b.watch.family = unix.NFPROTO_IPV6
		}
	}

	return b
}

// HaveOurs reports whether chains of nf_tables are ours of iptables-nft: with all any,
// else those that rows have.
func HaveOurs(chains []nfnetlink.ChainInfo, all bool) bool {
	return slices.ContainsFunc(chains, func(c nfnetlink.ChainInfo) bool {
		return c.Table == NATTable && isOurs(c.Name, all)
	})
}

// Command is the name of the program for a family.
func Command(family row.Family) string {
	if family == row.IPv6 {
		return "ip6tables"
	}

	return "iptables"
}

// newInstalled returns the iptables whose programs begin with name.
func newInstalled(family row.Family, name string, v Variant) (*Installed, error) {
	t := &Installed{Family: family, Variant: v}

	for suffix, path := range map[string]*string{"-save": &t.savePath, "-restore": &t.RestorePath} {
		var err error
		if *path, err = exec.LookPath(name + suffix); err != nil {
			return nil, fmt.Errorf("%w: %w", outcome.ErrUnavailable, err)
		}
	}

	return t, nil
}

// hinted reports whether the variant has chains that say the node uses it.
func (t *Installed) hinted(ctx context.Context) (bool, error) {
	save, err := t.Save(ctx, "mangle") // takes no lock, so nobody can make it miss the hint

	return bytes.Contains(save, []byte("\n:KUBE-IPTABLES-HINT ")) ||
		bytes.Contains(save, []byte("\n:KUBE-KUBELET-CANARY ")), err
}

// tableThere reports whether a legacy table exists; to ask iptables would make
// it. With nf_tables asking makes nothing.
func tableThere(family row.Family, v Variant, table string) (bool, error) {
	if v == NFT {
		return true, nil
	}

	tables, err := legacyTables(family)

	return slices.Contains(tables, table), err
}

func legacyTables(family row.Family) ([]string, error) {
	names := "ip_tables_names"
	if family == row.IPv6 {
		names = "ip6_tables_names"
	}

	tables, err := os.ReadFile("/proc/thread-self/net/" + names)
	if err != nil && !outcome.IsAbsence(err) {
		return nil, fmt.Errorf("look for tables: %w", err)
	}

	return strings.Fields(string(tables)), nil
}

// variantOf asks the iptables of PATH which variant it is. go-iptables, which
// asks too, keeps that to itself, but it knows versions.
func variantOf(ctx context.Context, name string) (Variant, error) {
	version, err := run(ctx, nil, name, "--version") // in bounded time, which go-iptables does not ask in
	if err != nil {
		return "", outcome.Unavailable(err)
	}

	ipt, err := iptables.New(iptables.Path(name))
	if err != nil {
		return "", outcome.Unavailable(err)
	}

	if major, minor, patch := ipt.GetIptablesVersion(); slices.Compare([]int{major, minor, patch}, []int{1, 6, 2}) < 0 {
		return "", fmt.Errorf("%w: %s %d.%d.%d is too old, --wait of %s-restore came with 1.6.2",
			outcome.ErrUnavailable, name, major, minor, patch, name)
	}

	if bytes.Contains(version, []byte("nf_tables")) {
		return NFT, nil
	}

	return Legacy, nil
}

// IsIPv6 implements IPTables.
func (t *Installed) IsIPv6() bool { return t.Family == row.IPv6 }

// Save implements IPTables.
func (t *Installed) Save(ctx context.Context, table string) ([]byte, error) {
	if there, err := tableThere(t.Family, t.Variant, table); !there {
		return nil, err
	}

	out, err := run(ctx, nil, t.savePath, "-t", table)
	if err != nil {
		return nil, err
	}

	if bytes.Contains(out, []byte("is incompatible, use 'nft' tool")) {
		return nil, fmt.Errorf("%s: somebody has put into table %s what iptables cannot show", filepath.Base(t.savePath), table)
	}

	return out, nil
}

// Restore implements IPTables.
func (t *Installed) Restore(ctx context.Context, input []byte) error {
	_, err := run(ctx, input, t.RestorePath, "--noflush", "--wait")

	return err
}

// commandError is what a command had to say when it failed.
type commandError struct {
	name   string
	err    error
	stderr string
	line   int
}

func (e *commandError) Error() string {
	if e.stderr == "" {
		return fmt.Sprintf("%s: %v", e.name, e.err)
	}

	return fmt.Sprintf("%s: %v: %s", e.name, e.err, e.stderr)
}

func (e *commandError) Unwrap() error { return e.err }

// Is finds EMSGSIZE in the words that glibc and musl have for it: iptables-nft hands
// no errno on.
func (e *commandError) Is(target error) bool {
	return target == unix.EMSGSIZE && strings.Contains(e.stderr, "Message too l")
}

// Line is the line of input at fault, the first being 1, or 0 if not known.
func (e *commandError) Line() int { return e.line }

// run runs a command to its end, or kills it with its children when ctx ends. It
// does not outlive this process either: it would commit when the next manager has
// looked already.
func run(ctx context.Context, stdin []byte, path string, args ...string) ([]byte, error) {
	runtime.LockOSThread() // whose end is what Pdeathsig takes for ours
	defer runtime.UnlockOSThread()

	var stdout, stderr bytes.Buffer

	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(stdin), &stdout, &stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second

	err := cmd.Run()
	if err == nil {
		return stdout.Bytes(), nil
	}

	if cause := context.Cause(ctx); cause != nil {
		err = errors.Join(cause, err)
	}

	said := stderr.String()

	return nil, &commandError{
		name:   filepath.Base(path),
		err:    err,
		stderr: strings.Join(strings.Fields(said), " "),
		line:   lineIn(said),
	}
}

// lineIn finds the first line number in what iptables-restore says, in the
// forms "line 3 failed", "line 3: RULE_APPEND failed" and "Error occurred at
// line: 3" (1.8.9).
func lineIn(stderr string) int {
	m := regexp.MustCompile(`\bline:? (\d+)`).FindStringSubmatch(stderr)
	if m == nil {
		return 0
	}

	n, err := strconv.Atoi(m[1])
	if err != nil {
		return 0
	}

	return n
}
