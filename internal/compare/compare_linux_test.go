package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// The tests are the program that workers are started from.
func TestMain(m *testing.M) {
	if name := os.Getenv(workerVariable); name != "" {
		if err := worker(name, os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}

		return
	}

	m.Run()
}

// Everything is measured, if briefly: each mapper works with real rules and real packets, and is
// in the tables and the plots.
func TestQuick(t *testing.T) {
	portmap, err := exec.CommandContext(t.Context(), "go", "tool", "-n", "portmap").Output()
	require.NoError(t, err)

	var progress strings.Builder

	dir := t.TempDir()
	require.NoError(t, compare(quickPlan(), strings.TrimSpace(string(portmap)), dir, &progress), progress.String())

	page, err := os.ReadFile(filepath.Join(dir, "README.md"))
	require.NoError(t, err)

	chapters := strings.Split(string(page), "\n## ")[1:]
	require.NotEmpty(t, chapters)

	for _, title := range []string{add + ", wall", remove + ", wall", crowdAdd, "New connections", "Throughput", "From the return"} {
		for _, chapter := range chapters {
			if strings.HasPrefix(chapter, title) {
				for _, k := range kinds() {
					assert.Contains(t, chapter, "\n| "+k.name+" | ", "%s", chapter)
				}
			}
		}
	}

	for _, plot := range []string{add, remove, rate} {
		text, err := os.ReadFile(filepath.Join(dir, strings.ToLower(plot)+".svg"))
		require.NoError(t, err)

		for _, k := range kinds() {
			assert.Contains(t, string(text), k.name)
		}
	}
}

// A figure reads the same whatever its size.
func TestDuration(t *testing.T) {
	for want, seconds := range map[string]float64{
		"1.50 µs": 1.5e-6, "158 µs": 158e-6, "6.60 ms": 6.6e-3, "27.1 ms": 27.1e-3, "2.00 s": 2, "-3.00 ms": -3e-3, "0.00 µs": 0,
	} {
		assert.Equal(t, want, duration(seconds))
	}
}
