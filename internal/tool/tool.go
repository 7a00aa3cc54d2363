// Package tool is the command hostports, without a process around it: the demo shows what it says.
package tool

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
)

// Exit codes.
const (
	Good = iota
	Bad
	CannotLook
)

const usage = `usage: hostports COMMAND [-o json]

  list                           each host port: where it leads, whose it is, who holds it
  check                          what is not as it should be
  explain PORT[/tcp|/udp|/sctp]  why a host port does not answer; a packet is sent to it and followed,
                                 with -wait 10s the next one that comes from outside
  clean                          take all host ports out, where no manager runs

It exits with 0 where all is well, with 1 where something is not, with 2 where it cannot look.
`

// errFound says that something is not as it should be, which the output has told.
var errFound = errors.New("not as it should be")

// errUnknown says that it is not known whether something is as it should be, which the output has told.
var errUnknown = errors.New("not known")

// errUsage says that nobody can tell what is asked for.
var errUsage = errors.New("no such command")

// Run carries out a command line, and returns the exit code.
func Run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	switch err := command(ctx, args, stdout, stderr); {
	case err == nil:
		return Good
	case errors.Is(err, errFound):
		return Bad
	case errors.Is(err, errUnknown):
		return CannotLook
	case errors.Is(err, flag.ErrHelp):
		_, _ = io.WriteString(stdout, usage)

		return Good
	case errors.Is(err, errUsage):
		_, _ = io.WriteString(stderr, usage)

		return CannotLook
	default:
		_, _ = fmt.Fprintln(stderr, "hostports:", strings.ReplaceAll(err.Error(), "\n", "; "))

		return CannotLook
	}
}

func command(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	r, err := parse(args, stderr)
	if err != nil {
		return err
	}

	out := output{stdout, r.json}

	switch r.command {
	case "list":
		return list(ctx, out)
	case "check":
		return check(ctx, out)
	case "explain":
		return explain(ctx, out, r.port, r.wait)
	case "clean":
		return clean(ctx, out)
	default:
		return errUsage
	}
}

// request is what a command line asks for.
type request struct {
	command, port string
	wait          time.Duration
	json          bool
}

func parse(args []string, stderr io.Writer) (r request, err error) {
	if len(args) == 0 {
		return r, errUsage
	}

	if slices.Contains([]string{"-h", "-help", "--help", "help"}, args[0]) {
		return r, flag.ErrHelp
	}

	r.command = args[0]

	flags := flag.NewFlagSet(args[0], flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.Usage = func() {}

	format := flags.String("o", "text", "text or json")
	flags.DurationVar(&r.wait, "wait", 0, "explain: how long to wait for the next packet from outside")

	// Flags may stand before and behind the port.
	err = flags.Parse(args[1:])

	r.port = flags.Arg(0)
	if r.port != "" && err == nil {
		err = flags.Parse(flags.Args()[1:])
	}

	r.json = *format == "json"
	explains := r.command == "explain"

	switch {
	case errors.Is(err, flag.ErrHelp):
		return r, err //nolint:wrapcheck // an answer
	case err != nil: // flags have said what is wrong
	case flags.NArg() > 0, !r.json && *format != "text", (r.port != "") != explains:
	case r.wait < 0, r.wait > 0 && !explains:
	default:
		return r, nil
	}

	return r, errUsage
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
