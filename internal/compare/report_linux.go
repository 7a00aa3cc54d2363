package main

import (
	"cmp"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// page is what write puts together.
type page struct {
	*runner
	strings.Builder
}

// write writes the page and the plots.
func (r *runner) write(dir string, took time.Duration) error {
	p := &page{runner: r}

	p.head(took)
	p.mappers()

	for _, what := range []string{add, remove} {
		p.table(what+", wall time", "rows there", r.sizes, what, interval)
		p.printf("![%s](%s.svg)\n\n", what, strings.ToLower(what))
	}

	for _, what := range []string{addCPU, removeCPU} {
		p.table(what+" time, that of programs included", "rows there", r.sizes, what, interval)
	}

	for _, what := range []string{crowdAdd, crowdAddCPU, crowdGone} {
		p.table(what, "pods", r.crowds, what, interval)
	}

	p.table("New connections a second, of those without a mapper", "rows there", r.busy, rate, share)
	p.printf("Without a mapper there are %.0f a second. ![connections](connections.svg)\n\n", median(r.all(rate, directly)))
	p.table("Throughput of one stream, of that without a mapper", "rows there", r.sizes[:1], throughput, share)
	p.printf("Without a mapper it is %.1f Gbit/s.\n\n", median(r.all(throughput, directly))*8/1e9)
	p.table("From the return of Add to the end of the first connection", "rows there", r.sizes[:1], answer, interval)
	p.printf("A client connects all the time. A negative time is before the return.\n\n")

	for _, what := range []string{newTime, syncTime} {
		p.table(what+", where nothing is to be changed", "rows there", r.deep, what, interval)
	}

	p.table("To make so many rows, once (hostport: by Sync)", "rows", r.sizes[1:], fillTime, interval)
	last := r.sizes[len(r.sizes)-1:]
	p.table("Memory of the process, bytes a row", "rows there", last, memory, plain)
	p.table("Descriptors a row", "rows there", last, descriptors, plain)
	p.table("Bytes of log an Add", "rows there", r.sizes[:1], logBytes, plain)

	for _, what := range []string{flowsTCP, flowsUDPAdd, flowsUDP} {
		p.table(what+" beside flows of others", "flows", []int{0, r.flows}, what, interval)
	}

	p.printf("Here one mapper comes after the other, as all network namespaces share the kernel's table of flows. " +
		"Between runs these figures have differed up to threefold.\n\n")

	p.noise()
	p.behind()

	err := os.WriteFile(filepath.Join(dir, "README.md"), []byte(strings.TrimSpace(p.String())+"\n"), 0o644)
	if err != nil {
		return fmt.Errorf("write the page: %w", err)
	}

	return r.plots(dir)
}

func (p *page) printf(format string, args ...any) { _, _ = fmt.Fprintf(p, format, args...) }

func (p *page) head(took time.Duration) {
	var uname unix.Utsname

	_ = unix.Uname(&uname) // cannot fail

	model := ""

	cpus, _ := os.ReadFile("/proc/cpuinfo") // the page says less then
	for line := range strings.Lines(string(cpus)) {
		if name, value, _ := strings.Cut(line, ":"); strings.TrimSpace(name) == "model name" {
			model = strings.TrimSpace(value)
		}
	}

	p.printf("# hostport beside others\n\n<!-- made by: make compare -->\n\n")
	p.printf("Measured in one run of %s, in turns, each mapper in a process and a node of its own. A pod has one TCP port and an IP that no "+
		"other pod has, and so has each row that is there. A figure is the median, with the quartiles in brackets and the number of samples. "+
		"CPU time is that of the mapper's process and of the programs that it runs; what the kernel does for them later is not in it.\n\n",
		took.Round(time.Second))
	p.printf("To run it again: `make compare`.\n\n- %s, %d cores, Linux %s\n", cmp.Or(model, "unknown CPU"), cores(), unix.ByteSliceToString(uname.Release[:]))

	for _, program := range [][]string{{"nft", "--version"}, {"iptables-nft", "--version"}, {"iptables-legacy", "--version"}} {
		out, _, err := execute(nil, "", program[0], program[1:]...)
		p.printf("- %s\n", cmp.Or(strings.TrimSpace(out), fmt.Sprint(err)))
	}

	p.printf("- portmap of github.com/containernetworking/plugins, built at the version in `internal/compare/go.mod`\n\n")

	if largest := p.sizes[len(p.sizes)-1]; largest < largestSize && largest > 1000 {
		p.printf("A process may have no more open files here than for %d held ports, so there are no more rows.\n\n", largest)
	}
}

func cores() int {
	var set unix.CPUSet

	_ = unix.SchedGetaffinity(0, &set) // none are counted then

	return set.Count()
}

func (p *page) mappers() {
	p.printf("| mapper | what is run | holds the port |\n| --- | --- | --- |\n")

	for _, k := range kinds() {
		holds := "no"
		if k.holds {
			holds = "yes"
		}

		p.printf("| %s | %s | %s |\n", k.name, k.how, holds)
	}

	p.printf("\n")
}

// table has a line for each mapper that has figures.
func (p *page) table(title, of string, sizes []int, what string, text func([]float64) string) {
	p.printf("## %s\n\n| %s |", title, of)

	for _, size := range sizes {
		p.printf(" %d |", size)
	}

	p.printf("\n| --- |%s\n", strings.Repeat(" --- |", len(sizes)))

	for _, k := range kinds() {
		cells, there := make([]string, 0, len(sizes)), false

		for _, size := range sizes {
			values := p.figures[cell{what, k.name, size}]
			there = there || len(values) > 0
			missing := p.missing[cell{what, k.name, size}]

			if len(values) > 0 {
				missing = text(values)
			}

			cells = append(cells, missing)
		}

		if there && !((what == memory || what == descriptors) && !k.holds) {
			p.printf("| %s | %s |\n", k.name, strings.Join(cells, " | "))
		}
	}

	p.printf("\n")
}

// interval is a time with its spread.
func interval(values []float64) string {
	low, middle, high := quartiles(values)
	if len(values) == 1 {
		return duration(middle) + " (once)"
	}

	return fmt.Sprintf("%s (%s–%s, %d)", duration(middle), duration(low), duration(high), len(values))
}

// share is a ratio with its spread.
func share(values []float64) string {
	low, middle, high := quartiles(values)

	return fmt.Sprintf("%.2f (%.2f–%.2f, %d)", middle, low, high, len(values))
}

func plain(values []float64) string {
	return strconv.FormatFloat(math.Round(median(values)), 'f', -1, 64)
}

// duration has three digits.
func duration(seconds float64) string {
	digits := func(v float64) string {
		return strconv.FormatFloat(v, 'f', max(0, 2-int(math.Floor(math.Log10(max(1, math.Abs(v)))))), 64)
	}

	switch size := math.Abs(seconds); {
	case size >= 1:
		return digits(seconds) + " s"
	case size >= 1e-3:
		return digits(seconds*1e3) + " ms"
	default:
		return digits(seconds*1e6) + " µs"
	}
}

func quartiles(values []float64) (low, middle, high float64) {
	v := slices.Sorted(slices.Values(values))

	return v[len(v)/4], v[len(v)/2], v[len(v)*3/4]
}

func median(values []float64) float64 {
	if len(values) == 0 {
		return 0
	}

	_, middle, _ := quartiles(values)

	return middle
}

// all are a mapper's figures at all sizes.
func (r *results) all(what, mapper string) (values []float64) {
	for c, v := range r.figures {
		if c.what == what && c.mapper == mapper {
			values = append(values, v...)
		}
	}

	return values
}

// noise compares the first half of the samples with the second: as two runs would be compared.
func (p *page) noise() {
	const enough = 8

	var differences []float64

	for c, v := range p.figures {
		if (c.what == add || c.what == remove) && len(v) >= enough {
			first, second := median(v[:len(v)/2]), median(v[len(v)/2:])
			differences = append(differences, math.Abs(first/second-1))
		}
	}

	if len(differences) == 0 {
		return
	}

	_, middle, high := quartiles(differences)
	p.printf("## Noise\n\nThe first half of the samples and the second are as two runs. In the %d cells of Add and Remove with %d samples or more "+
		"their medians differ by %.0f %% in the middle, %.0f %% in the upper quartile, %.0f %% at the most.\n\n",
		len(differences), enough, middle*100, high*100, slices.Max(differences)*100)
}

// behind names what is faster than hostport with the same kernel interface.
func (p *page) behind() {
	p.printf("## Where hostport is not the fastest\n\n")

	for _, k := range kinds() {
		if !strings.HasPrefix(k.name, "hostport, ") {
			continue
		}

		for _, what := range []string{add, remove} {
			p.behindIn(k.name, what, "rows", p.sizes)
		}

		for _, what := range []string{flowsTCP, flowsUDPAdd, flowsUDP} {
			p.behindIn(k.name, what, "flows of others", []int{0, p.flows})
		}
	}

	p.printf("\n" + `Why:

- The floor looks at nothing, remembers nothing and tells nobody. By a profile of November 2026 hostport's line of log takes the
  largest part of the rest, 17 µs; then come the route to the pod, 15 µs, the look at the network namespace, 6 µs, and what comes of a row, 4 µs.
  A Remove is one for each IP family.
- One ` + "`iptables-restore`" + ` without checks asserts nothing. hostport's has lines ` + "`-C`" + ` for what it stands on, each of which iptables
  reads a chain for, and it binds the port.
- portmap's DEL ends no flows: those of a UDP client go on to the pod that is gone. hostport's Remove ends them, for which the
  kernel goes through all flows.
- A process that holds thousands of ports has their descriptors; to start a program from it takes longer.
- iptables-legacy copies the whole table for each change, whoever makes it.
`)
}

// behindIn names what is faster than one of hostport's mappers at something.
func (p *page) behindIn(mapper, what, of string, sizes []int) {
	for _, size := range sizes {
		mine := median(p.figures[cell{what, mapper, size}])

		for _, other := range rivals(mapper) {
			if theirs := median(p.figures[cell{what, other, size}]); theirs > 0 && theirs < mine {
				p.printf("- %s with %d %s: %s takes %s, %s %s.\n", what, size, of, mapper, duration(mine), other, duration(theirs))
			}
		}
	}
}

// rivals are what uses the same interface of the kernel.
func rivals(name string) []string {
	switch name {
	case "hostport, nftables":
		return []string{floorName, "nft -f -", "portmap, nftables"}
	case "hostport, iptables-nft":
		return []string{"iptables-nft-restore", "portmap, iptables-nft"}
	default:
		return []string{"iptables-legacy-restore", "portmap, iptables-legacy"}
	}
}
