package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"time"

	"k8s.io/klog/v2"

	"github.com/cri-o/hostport"
	"github.com/cri-o/hostport/internal/testbed"
)

const (
	// patience bounds the whole demo, which takes about a second.
	patience = time.Minute
	// operationTimeout bounds one Add or Remove, and keeps it within patience.
	operationTimeout = 10 * time.Second
)

func main() {
	if probed() {
		return
	}

	backend := flag.String("backend", string(hostport.BackendAuto), "how to program the kernel: auto, nftables or iptables")
	verbose := flag.Bool("v", false, "show the log of package hostport on standard error")
	flag.Parse()

	logger := klog.Logger{} // goes nowhere
	if *verbose {
		logger = klog.Background()
	}

	ctx, cancel := context.WithTimeout(context.Background(), patience)
	err := run(ctx, os.Stdout, hostport.WithBackend(hostport.Backend(*backend)), hostport.WithLogger(logger))
	cancel()
	if err != nil {
		if !errors.Is(err, errUnexpected) { // of that the report's last line tells
			fmt.Fprintln(os.Stderr, "sandbox:", err)
		}
		os.Exit(1)
	}
}

// run tells the whole story. It returns errUnexpected if something in it is
// not as it should be, and another error if it cannot be told to the end.
func run(ctx context.Context, w io.Writer, opts ...hostport.Option) (err error) {
	bed, err := testbed.New("web", "dns")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, bed.Close()) }()

	d := newDemo(bed, newReport(w), opts)
	if err := d.open(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.manager.Close()) }()

	for _, chapter := range []func(context.Context) error{d.start, d.traffic, d.conflict, d.probes, d.removal, d.operator, d.tool} {
		if err := chapter(ctx); err != nil {
			return err
		}
	}
	return d.verdict()
}
