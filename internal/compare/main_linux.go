package main

import (
	"flag"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	if name := os.Getenv(workerVariable); name != "" {
		if err := worker(name, os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, "compare:", err)
			os.Exit(1)
		}

		return
	}

	portmap := flag.String("portmap", "/usr/lib/cni/portmap", "the CNI plugin")
	dir := flag.String("dir", ".", "where the page and the plots go")
	quick := flag.Bool("quick", false, "see that it works; the figures are worth nothing")
	flag.Parse()

	p := fullPlan()
	if *quick {
		p = quickPlan()
	}

	if err := compare(p, *portmap, *dir, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "compare:", err)
		os.Exit(1)
	}
}

// largestSize is as many rows as are to be there at the most; others is for what else has
// descriptors than held ports.
const (
	largestSize = 20_000
	others      = 1000
)

// compare measures, and writes what it has seen into a folder.
func compare(p plan, portmap, dir string, progress io.Writer) error {
	limit := unix.Rlimit{Cur: largestSize + others, Max: largestSize + others}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil { // root may, unless somebody forbids it
		if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
			return fmt.Errorf("ask how many files may be open: %w", err)
		}

		p.cap(int(limit.Max) - others)
	}

	begun := time.Now()
	r := &runner{
		plan: p, portmap: portmap, progress: progress,
		results: results{figures: map[cell][]float64{}, missing: map[cell]string{}},
	}

	if err := r.run(); err != nil {
		return err
	}

	return r.write(dir, time.Since(begun))
}
