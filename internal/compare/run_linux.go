package main

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	v1 "k8s.io/api/core/v1"
)

// plan is how much is measured.
type plan struct {
	sizes  []int // rows that are there
	deep   []int // those of them where New and Sync are measured
	busy   []int // those of them where packets are sent
	crowds []int // pods at once
	flows  int   // that the kernel tracks, beside none
	rounds int   // at the most
	// share is the time that a mapper has for its turns at each size; the first turn it has in any case.
	share time.Duration
	// longest is for what is done once: what would take longer is left out, and the page says so.
	longest  time.Duration
	connects int           // in a turn
	stream   time.Duration // in a turn
}

func fullPlan() plan {
	return plan{
		sizes: []int{0, 1000, 5000, largestSize}, deep: []int{1000, largestSize}, busy: []int{0, 5000, largestSize}, crowds: []int{50, 500},
		flows: 100_000, rounds: 40, share: 5 * time.Second, longest: 30 * time.Second,
		connects: 500, stream: 200 * time.Millisecond,
	}
}

// cap leaves out what takes more rows than rows.
func (p *plan) cap(rows int) {
	for _, sizes := range [][]int{p.sizes, p.deep, p.busy} {
		for i := range sizes {
			sizes[i] = min(sizes[i], rows)
		}
	}
}

func quickPlan() plan {
	return plan{
		sizes: []int{0, 100}, deep: []int{100}, busy: []int{0, 100}, crowds: []int{3}, flows: 100, rounds: 2,
		share: time.Second, longest: 10 * time.Second, connects: 20, stream: 20 * time.Millisecond,
	}
}

// cell is one figure of one mapper.
type cell struct {
	what   string
	mapper string
	size   int // rows that are there, pods at once, or flows
}

// What is measured.
const (
	add, remove         = "Add", "Remove"
	addCPU, removeCPU   = "Add, CPU", "Remove, CPU"
	crowdAdd, crowdGone = "Add at once", "Remove at once"
	crowdAddCPU         = "Add at once, CPU"
	fillTime            = "fill"
	newTime, syncTime   = "New", "Sync"
	memory, descriptors = "memory", "descriptors"
	logBytes            = "log"
	rate, throughput    = "connections", "throughput"
	answer              = "first answer"
	flowsTCP            = "Remove of TCP"
	flowsUDPAdd         = "Add of UDP"
	flowsUDP            = "Remove of UDP"
)

// results are all figures, and the reasons why there are none.
type results struct {
	figures map[cell][]float64
	missing map[cell]string
}

func (r *results) put(what, mapper string, size int, values ...float64) {
	c := cell{what, mapper, size}
	r.figures[c] = append(r.figures[c], values...)
}

// operations puts what Adds and Removes have taken.
func (r *results) operations(mapper string, size int, res response) {
	for _, s := range res.Add {
		r.put(add, mapper, size, s.Wall.Seconds())
		r.put(addCPU, mapper, size, s.CPU.Seconds())
	}

	for _, s := range res.Remove {
		r.put(remove, mapper, size, s.Wall.Seconds())
		r.put(removeCPU, mapper, size, s.CPU.Seconds())
	}
}

// runner measures.
type runner struct {
	plan
	results

	portmap  string
	progress io.Writer
}

// run measures everything.
func (r *runner) run() error {
	for _, size := range r.sizes {
		if err := r.atSize(size); err != nil {
			return err
		}
	}

	return r.besideFlows()
}

func (r *runner) atSize(size int) (err error) {
	var stations []*station

	defer func() {
		for _, s := range stations {
			err = errors.Join(err, s.stop())
		}
	}()

	for _, k := range kinds() {
		s, err := start(k, r.portmap)
		if err != nil {
			return err
		}

		if err := r.fill(s, size); err != nil {
			r.tellf("%d rows: %s is left out: %v", size, s.name, err)

			for _, what := range []string{add, remove, addCPU, removeCPU, fillTime} {
				r.missing[cell{what, s.name, size}] = "cannot be filled"
			}

			if err := s.stop(); err != nil {
				return err
			}

			continue
		}

		stations = append(stations, s)
	}

	r.tellf("%d rows: Add and Remove", size)

	if err := r.inTurns(stations, func(s *station) error { return r.turn(s, size) }); err != nil {
		return err
	}

	if slices.Contains(r.deep, size) {
		r.tellf("%d rows: New and Sync", size)

		if err := r.inTurns(managers(stations), func(s *station) error { return r.restart(s, size) }); err != nil {
			return err
		}
	}

	if slices.Contains(r.busy, size) {
		if err := r.packets(stations, size); err != nil {
			return err
		}
	}

	if size == 0 {
		return r.crowd(stations)
	}

	return nil
}

// managers are the stations of hostport.
func managers(stations []*station) []*station {
	return slices.DeleteFunc(slices.Clone(stations), func(s *station) bool { return !s.holds || s.name == floorName })
}

// inTurns has the stations take turns, until each has used up its share of the time.
func (r *runner) inTurns(stations []*station, turn func(*station) error) error {
	spent, last := map[*station]time.Duration{}, map[*station]time.Duration{}

	for round, active := 0, true; active && round < r.rounds; round++ {
		active = false

		for _, s := range stations {
			if round > 0 && spent[s]+last[s] > r.share {
				continue
			}

			begun := time.Now()

			if err := turn(s); err != nil {
				return err
			}

			active, last[s] = true, time.Since(begun)
			spent[s] += last[s]
		}
	}

	return nil
}

func (r *runner) fill(s *station, size int) error {
	before, err := s.do(request{Op: "state"})
	if err != nil {
		return err
	}

	res, err := s.do(request{Op: "fill", Rows: size})
	if err != nil {
		return err
	}

	r.tellf("%d rows: %s is filled in %s", size, s.name, res.Add[0].Wall.Round(time.Millisecond))
	r.put(fillTime, s.name, size, res.Add[0].Wall.Seconds())

	after, err := s.do(request{Op: "state"})
	if err != nil || size == 0 {
		return err
	}

	r.put(memory, s.name, size, float64(after.State.Memory-before.State.Memory)/float64(size))
	r.put(descriptors, s.name, size, float64(after.State.Descriptors-before.State.Descriptors)/float64(size))

	return nil
}

// A turn takes this many pods, or this long.
const (
	turnPods = 10
	turnTime = 5 * time.Millisecond
)

func (r *runner) turn(s *station, size int) error {
	res, err := s.do(request{Op: "turn", Count: turnPods, Limit: turnTime, Proto: v1.ProtocolTCP})
	r.operations(s.name, size, res)

	return err
}

func (r *runner) restart(s *station, size int) error {
	for op, what := range map[string]string{"sync": syncTime, "renew": newTime} {
		res, err := s.do(request{Op: op})
		if err != nil {
			return err
		}

		r.put(what, s.name, size, res.Add[0].Wall.Seconds())
	}

	_, err := s.do(request{Op: "sync"}) // from now on it is known whose the rows are

	return err
}

// packets measures what packets meet.
func (r *runner) packets(stations []*station, size int) error {
	r.tellf("%d rows: packets", size)

	for _, s := range stations {
		if _, err := s.do(request{Op: "add", Pod: s.web(refuses)}); err != nil {
			return err
		}
	}

	err := r.inTurns(stations, func(s *station) error {
		direct, err := s.connects(s.direct(refuses), r.connects)
		if err != nil {
			return err
		}

		mapped, err := s.connects(s.mapped(refuses), r.connects)
		if err != nil {
			return err
		}

		r.put(rate, s.name, size, direct.Seconds()/mapped.Seconds())
		r.put(rate, directly, size, float64(r.connects)/direct.Seconds())

		if size > 0 {
			return nil
		}

		alone, err := s.stream(s.direct(refuses), r.stream)
		if err != nil {
			return err
		}

		through, err := s.stream(s.mapped(refuses), r.stream)
		r.put(throughput, s.name, size, through/alone)
		r.put(throughput, directly, size, alone)

		return err
	})
	if err != nil {
		return err
	}

	for _, s := range stations {
		if _, err := s.do(request{Op: "remove", Pod: s.web(refuses)}); err != nil {
			return err
		}
	}

	if size > 0 {
		return nil
	}

	return r.inTurns(stations, func(s *station) error {
		after, err := s.firstAnswer()
		r.put(answer, s.name, size, after.Seconds())

		return err
	})
}

// directly stands for no mapper at all.
const directly = "no mapper"

// crowd measures pods that come and go at once, and what an Add logs.
func (r *runner) crowd(stations []*station) error {
	for _, s := range stations {
		before, err := s.do(request{Op: "state"})
		if err != nil {
			return err
		}

		if _, err := s.do(request{Op: "add", Pod: measured(0, v1.ProtocolTCP)}); err != nil {
			return err
		}

		after, err := s.do(request{Op: "state"})
		if err != nil {
			return err
		}

		r.put(logBytes, s.name, 0, float64(after.State.Logged-before.State.Logged))

		if _, err := s.do(request{Op: "remove", Pod: measured(0, v1.ProtocolTCP)}); err != nil {
			return err
		}
	}

	for _, pods := range r.crowds {
		r.tellf("%d pods at once", pods)

		err := r.inTurns(stations, func(s *station) error {
			if last := r.expected(s.name, pods); last > r.longest {
				r.missing[cell{crowdAdd, s.name, pods}] = fmt.Sprintf("not measured: would take over %s", last.Round(time.Second))

				return nil
			}

			res, err := s.do(request{Op: "many", Count: pods, Proto: v1.ProtocolTCP})
			if err != nil {
				return err
			}

			r.put(crowdAdd, s.name, pods, res.Add[0].Wall.Seconds())
			r.put(crowdAddCPU, s.name, pods, res.Add[0].CPU.Seconds())
			r.put(crowdGone, s.name, pods, res.Remove[0].Wall.Seconds())

			return nil
		})
		if err != nil {
			return err
		}
	}

	return nil
}

// expected is how long so many pods would take at least, by what fewer have taken.
func (r *runner) expected(mapper string, pods int) time.Duration {
	for _, fewer := range r.crowds {
		added, removed := r.figures[cell{crowdAdd, mapper, fewer}], r.figures[cell{crowdGone, mapper, fewer}]
		if fewer < pods && len(added) > 0 {
			return time.Duration((median(added) + median(removed)) * float64(pods) / float64(fewer) * float64(time.Second))
		}
	}

	return 0
}

// besideFlows measures mappers that look at flows where the kernel tracks none, and
// many. All network namespaces share the kernel's table of flows, so here one mapper comes after the other.
func (r *runner) besideFlows() error {
	for _, k := range kinds() {
		if !k.tracks {
			continue
		}

		if err := r.besideFlowsOf(k); err != nil {
			return err
		}
	}

	return nil
}

func (r *runner) besideFlowsOf(k kind) (err error) {
	s, err := start(k, r.portmap)
	if err != nil {
		return err
	}

	defer func() { err = errors.Join(err, s.stop()) }()

	if _, err := s.do(request{Op: "fill"}); err != nil {
		return err
	}

	for _, flows := range []int{0, r.flows} {
		r.tellf("%d flows: %s", flows, k.name)

		if err := s.track(flows); err != nil {
			return err
		}

		err := r.inTurns([]*station{s}, func(s *station) error {
			for _, proto := range []v1.Protocol{v1.ProtocolTCP, v1.ProtocolUDP} {
				res, err := s.do(request{Op: "turn", Count: 1, Proto: proto})
				if err != nil {
					return err
				}

				if proto == v1.ProtocolTCP {
					r.put(flowsTCP, k.name, flows, res.Remove[0].Wall.Seconds())
				} else {
					r.put(flowsUDPAdd, k.name, flows, res.Add[0].Wall.Seconds())
					r.put(flowsUDP, k.name, flows, res.Remove[0].Wall.Seconds())
				}
			}

			return nil
		})
		if err != nil {
			return err
		}
	}

	return nil
}

func (r *runner) tellf(format string, args ...any) {
	_, _ = fmt.Fprintf(r.progress, format+"\n", args...)
}
