// Package tool is the command hostports, without a process around it: the demo shows what it says.
package tool

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/cri-o/hostport/internal/row"
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
                                 with -wait 10s the next one that comes from outside. ADDRESS:PORT is
                                 for one of the node's addresses
  clean                          take all host ports out, where no manager runs

It exits with 0 where all is well, with 1 where something is not, with 2 where it cannot look.
`

// errFound says that something is not as it should be, which the output has told.
var errFound = errors.New("not as it should be")

// errUnknown says that it is not known whether something is as it should be, which the output has told.
var errUnknown = errors.New("not known")

// usageError says why nobody can tell what is asked for.
type usageError string

func (e usageError) Error() string { return string(e) }

// Run carries out a command line, and returns the exit code.
func Run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	switch err := command(ctx, args, stdout); {
	case err == nil:
		return Good
	case errors.Is(err, errFound):
		return Bad
	case errors.Is(err, errUnknown):
		return CannotLook
	case errors.Is(err, flag.ErrHelp):
		_, _ = io.WriteString(stdout, usage)

		return Good
	case errors.As(err, new(usageError)):
		_, _ = fmt.Fprintf(stderr, "hostports: %v\n%s", err, usage)

		return CannotLook
	default:
		_, _ = fmt.Fprintln(stderr, "hostports:", strings.ReplaceAll(err.Error(), "\n", "; "))

		return CannotLook
	}
}

func command(ctx context.Context, args []string, stdout io.Writer) error {
	r, err := parse(args)
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
	default: // parse lets no others in
		return clean(ctx, out)
	}
}

// request is what a command line asks for.
type request struct {
	command, port string
	wait          time.Duration
	json          bool
}

func parse(args []string) (r request, err error) {
	if len(args) == 0 {
		return r, usageError("which command?")
	}

	if slices.Contains([]string{"-h", "-help", "--help", "help"}, args[0]) {
		return r, flag.ErrHelp
	}

	r.command = args[0]

	flags := flag.NewFlagSet(args[0], flag.ContinueOnError)
	flags.SetOutput(io.Discard) // the error says it as well

	format := flags.String("o", "text", "text or json")
	flags.DurationVar(&r.wait, "wait", 0, "explain: how long to wait for the next packet from outside")

	// Flags may stand before and behind the port.
	err = flags.Parse(args[1:])

	r.port = flags.Arg(0)
	if r.port != "" && err == nil {
		err = flags.Parse(flags.Args()[1:])
	}

	r.json = *format == "json"

	switch {
	case errors.Is(err, flag.ErrHelp):
		return r, err //nolint:wrapcheck // an answer
	case err != nil:
		return r, usageError(err.Error())
	case !r.json && *format != "text":
		return r, usageError(fmt.Sprintf("-o %q: want text or json", *format))
	case flags.NArg() > 0:
		return r, usageError(fmt.Sprintf("what is %q?", flags.Arg(0)))
	default:
		return r, r.fits()
	}
}

// fits says why what is given does not fit the command.
func (r request) fits() error {
	switch explains := r.command == "explain"; {
	case !slices.Contains([]string{"list", "check", "explain", "clean"}, r.command):
		return usageError(fmt.Sprintf("no such command: %q", r.command))
	case explains && r.port == "":
		return usageError("explain which port?")
	case !explains && r.port != "":
		return usageError(fmt.Sprintf("%s takes no %q", r.command, r.port))
	case r.wait < 0, r.wait > 0 && !explains:
		return usageError("-wait is for explain, and not negative")
	default:
		return nil
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

// parseEndpoint reads [ADDRESS:]PORT[/PROTOCOL]. The default is TCP, and any address.
func parseEndpoint(text string) (e row.Endpoint, err error) {
	number, protocol, found := strings.Cut(text, "/")
	if !found {
		protocol = string(row.TCP)
	}

	if i := strings.LastIndexByte(number, ':'); i >= 0 {
		if e.IP, err = netip.ParseAddr(strings.Trim(number[:i], "[]")); err != nil {
			return e, fmt.Errorf("address %q: want one of the node's", number[:i])
		}

		e.IP, number = e.IP.Unmap(), number[i+1:]
		if e.IP.IsUnspecified() { // as list has it
			e.IP = netip.Addr{}
		}
	}

	n, err := strconv.ParseUint(number, 10, 16)
	if err != nil || n == 0 {
		return e, fmt.Errorf("port %q: want 1 to 65535", number)
	}

	e.Port, e.Proto = uint16(n), row.Protocol(strings.ToLower(protocol))
	if !slices.Contains([]row.Protocol{row.TCP, row.UDP, row.SCTP}, e.Proto) {
		return e, fmt.Errorf("protocol %q: want tcp, udp or sctp", protocol)
	}

	return e, nil
}

// shortly is an endpoint in the form in which it is asked for.
func shortly(e row.Endpoint) string {
	port := fmt.Sprintf("%d/%s", e.Port, e.Proto)

	switch {
	case !e.IP.IsValid():
		return port
	case e.IP.Is6():
		return fmt.Sprintf("[%s]:%s", e.IP, port)
	default:
		return fmt.Sprintf("%s:%s", e.IP, port)
	}
}

// patience bounds a look at the node.
const patience = 30 * time.Second
