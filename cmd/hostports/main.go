// Command hostports shows the host ports of a node, and says why one does not answer.
//
//	hostports list                 each host port: where it leads, whose it is, who holds it
//	hostports check                what is not as it should be
//	hostports explain PORT[/PROTO] why a host port does not answer; with -wait 10s it follows the
//	                               next packet that comes from outside, in place of one of its own.
//	                               ADDRESS:PORT is for one of the node's addresses
//	hostports clean                take all host ports out, where no manager runs
//
// With -o json the answer is JSON. All but clean change nothing. explain makes a device and a table
// of nf_tables, which go when it ends, however it ends. It needs CAP_NET_ADMIN, and to see the
// processes of others CAP_SYS_PTRACE.
//
// It exits with 0 where everything is as it should be, with 1 where something is not, and with 2
// where it cannot look.
package main

import (
	"context"
	"os"
	"os/signal"

	"github.com/cri-o/hostport/internal/tool"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	code := tool.Run(ctx, os.Args[1:], os.Stdout, os.Stderr)

	stop()
	os.Exit(code)
}
