package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
)

// bound is what a probe says of a port that was free.
const bound = "bound"

// probe binds a port from another process: this program, started again with
// the arguments "probe tcp4 0.0.0.0:8080".
func (d *demo) probe(ctx context.Context, network, address, want string) error {
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find this program: %w", err)
	}
	cmd := exec.CommandContext(ctx, self, "probe", network, address)
	var said []byte
	took, err := d.onHost(func() (err error) {
		if said, err = cmd.Output(); err != nil {
			return fmt.Errorf("probe %s %s: %w", network, address, err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	var problem error
	if !strings.HasSuffix(string(said), want) {
		problem = errors.New("expected " + want)
	}
	d.table(column{"PROCESS", 8}, column{"SAYS", 68})
	d.row(problem, took, cmd.Process.Pid, string(said))
	return nil
}

// probed reports whether this process was started as a probe, and has been one.
func probed() bool {
	if len(os.Args) != 4 || os.Args[1] != "probe" {
		return false
	}
	var (
		err    error
		listen net.ListenConfig
	)
	if network, address := os.Args[2], os.Args[3]; strings.HasPrefix(network, "udp") {
		_, err = listen.ListenPacket(context.Background(), network, address)
	} else {
		_, err = listen.Listen(context.Background(), network, address)
	}
	if err != nil {
		fmt.Print(err)
	} else {
		fmt.Print(bound)
	}
	return true
}
