// Command hostports shows the host ports of a node, and says why one does not answer.
//
//	hostports list                 each host port: where it leads, whose it is, who holds it
//	hostports check                what is not as it should be
//	hostports explain PORT[/PROTO] why a host port does not answer; with -wait 10s it follows the
//	                               next packet that comes from outside, in place of one of its own
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
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)

	stop()
	os.Exit(code)
}

// Exit codes.
const (
	good = iota
	bad
	cannotLook
)

const usage = `usage: hostports list | check | explain PORT[/PROTOCOL] [-wait 10s] | clean   [-o json]
`

// errFound says that something is not as it should be, which the output has told.
var errFound = errors.New("not as it should be")

// errUsage says that nobody can tell what is asked for.
var errUsage = errors.New("no such command")

// run carries out a command line, and returns the exit code.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	switch err := command(ctx, args, stdout, stderr); {
	case err == nil:
		return good
	case errors.Is(err, errFound):
		return bad
	case errors.Is(err, errUsage):
		_, _ = io.WriteString(stderr, usage)

		return cannotLook
	default:
		_, _ = fmt.Fprintln(stderr, "hostports:", strings.ReplaceAll(err.Error(), "\n", "; "))

		return cannotLook
	}
}

func command(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	if len(args) == 0 {
		return errUsage
	}

	flags := flag.NewFlagSet(args[0], flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.Usage = func() {}

	format := flags.String("o", "text", "text or json")
	wait := flags.Duration("wait", 0, "explain: how long to wait for the next packet from outside")

	// Flags may stand before and behind the port.
	err := flags.Parse(args[1:])

	port := flags.Arg(0)
	if port != "" && err == nil {
		err = flags.Parse(flags.Args()[1:])
	}

	if err != nil {
		return errUsage // which flags have told
	}

	if flags.NArg() > 0 || (port != "") != (args[0] == "explain") || *format != "text" && *format != "json" {
		return errUsage
	}

	out := output{stdout, *format == "json"}

	switch args[0] {
	case "list":
		return list(ctx, out)
	case "check":
		return check(ctx, out)
	case "explain":
		return explain(ctx, out, port, *wait)
	case "clean":
		return clean(ctx, out)
	default:
		return errUsage
	}
}

// output is where answers go, and in which form.
type output struct {
	io.Writer

	json bool
}

// print writes an answer as JSON, or as lines whose columns end with tabs.
func (o output) print(answer any, lines []string) error {
	if !o.json {
		w := tabwriter.NewWriter(o, 0, 0, 2, ' ', 0)
		_, err := io.WriteString(w, strings.Join(append(lines, ""), "\n"))

		return errors.Join(err, w.Flush())
	}

	e := json.NewEncoder(o)
	e.SetIndent("", "  ")

	return e.Encode(answer) //nolint:wrapcheck // says what it is about
}

// parsePort reads PORT[/PROTOCOL], TCP being the default.
func parsePort(text string) (port uint16, protocol string, err error) {
	number, protocol, found := strings.Cut(text, "/")
	if !found {
		protocol = "tcp"
	}

	n, err := strconv.ParseUint(number, 10, 16)
	if err != nil || n == 0 {
		return 0, "", fmt.Errorf("port %q: want 1 to 65535", number)
	}

	switch protocol = strings.ToLower(protocol); protocol {
	case "tcp", "udp", "sctp":
		return uint16(n), protocol, nil
	default:
		return 0, "", fmt.Errorf("protocol %q: want tcp, udp or sctp", protocol)
	}
}

// patience bounds a look at the node.
const patience = 30 * time.Second
