package main

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// errUnexpected says that some row of the report is not as it should be.
var errUnexpected = errors.New("not everything is as it should be")

// report prints tables of checks, row by row as they are made.
type report struct {
	w              io.Writer
	err            error // of w
	colour         bool
	columns        []column // of the chapter's latest table
	checks, failed int
}

// column is a column of a table. Wider values shift what follows them.
type column struct {
	title string
	width int
}

// Colours, as terminals number them.
const (
	bold  = 1
	red   = 31
	green = 32
)

func newReport(w io.Writer) *report {
	terminal := false
	if f, ok := w.(*os.File); ok {
		_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
		terminal = err == nil
	}
	return &report{w: w, colour: terminal && os.Getenv("NO_COLOR") == ""}
}

func (r *report) linef(format string, args ...any) {
	if _, err := fmt.Fprintf(r.w, format+"\n", args...); err != nil {
		r.err = fmt.Errorf("write the report: %w", err)
	}
}

// title begins a chapter.
func (r *report) title(text string) {
	r.columns = nil
	r.linef("\n%s", r.paint(bold, text))
}

// table begins a table, unless it would be the one above once more. Its last
// column is the time that something took.
func (r *report) table(columns ...column) {
	columns = append(columns, column{"TIME", 6})
	if slices.Equal(columns, r.columns) {
		return
	}
	if r.columns != nil {
		r.linef("")
	}
	r.columns = columns
	titles := make([]any, len(columns))
	for i, c := range columns {
		titles[i] = c.title
	}
	r.linef("%s", strings.TrimRight(r.format(titles), " "))
}

// row is one check: what was seen, how long it took, and what is wrong with it.
func (r *report) row(problem error, took time.Duration, values ...any) {
	r.checks++
	mark := r.paint(green, "✓")
	if problem != nil {
		r.failed++
		mark = r.paint(red, "✗ "+problem.Error())
	}
	r.linef("%s%s", r.format(append(values, short(took))), mark)
}

func (r *report) format(values []any) string {
	var b strings.Builder
	for i, value := range values {
		if ip, ok := value.(netip.Addr); ok && !ip.IsValid() {
			value = ""
		}
		fmt.Fprintf(&b, "%-*v ", r.columns[i].width, value)
	}
	return b.String()
}

// verdict is the last line.
func (r *report) verdict() error {
	colour := green
	if r.failed > 0 {
		colour = red
	}
	r.linef("\n%s", r.paint(colour, fmt.Sprintf("%d of %d checks as they should be", r.checks-r.failed, r.checks)))
	if r.failed > 0 {
		return errUnexpected
	}
	return r.err
}

func (r *report) paint(colour int, text string) string {
	if !r.colour {
		return text
	}
	return fmt.Sprintf("\x1b[%dm%s\x1b[0m", colour, text)
}

// short leaves the digits that tell something.
func short(d time.Duration) time.Duration {
	if d < time.Millisecond {
		return d.Round(time.Microsecond)
	}
	return d.Round(100 * time.Microsecond)
}
