package main

import (
	"bufio"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
)

// workerVariable says to the program that it is a worker, and for which mapper.
const workerVariable = "COMPARE_WORKER"

// request is what a worker is to do.
type request struct {
	Op    string
	Rows  int           // of fill
	Count int           // of turn and many: pods
	Limit time.Duration // of turn: no further pod then
	Proto v1.Protocol   // of turn and many
	Pod   pod           // of add and remove
}

// response is what came of it.
type response struct {
	Err         string
	Add, Remove []sample
	Returned    int64 // when add returned, by the clock that all processes share
	State       state
}

// sample is what something has taken.
type sample struct{ Wall, CPU time.Duration }

// state is what a worker has of its own.
type state struct{ Memory, Descriptors, Logged int64 }

// worker does what requests say until there are no more.
func worker(name string, in io.Reader, out io.Writer) error {
	tmp, err := os.MkdirTemp("", "compare")
	if err != nil {
		return fmt.Errorf("worker: %w", err)
	}
	defer func() { _ = os.RemoveAll(tmp) }()

	w := &work{}

	for _, k := range kinds() {
		if k.name == name {
			w.mapper, err = k.new(tools{portmap: os.Getenv(portmapVariable), netns: os.Getenv(netnsVariable), tmp: tmp})
		}
	}

	if err == nil && w.mapper == nil {
		err = errors.New("no such mapper")
	}

	requests, responses := gob.NewDecoder(bufio.NewReader(in)), gob.NewEncoder(out)

	for {
		var (
			req request
			res response
		)

		if err := requests.Decode(&req); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return fmt.Errorf("worker: %w", err)
		}

		if err == nil { // of the mapper's beginning
			res, err = w.do(req)
		}

		if err != nil {
			res.Err = err.Error()
		}

		if err := responses.Encode(res); err != nil {
			return fmt.Errorf("worker: %w", err)
		}

		err = nil
	}

	if w.mapper == nil {
		return nil
	}

	return w.mapper.close()
}

type work struct{ mapper mapper }

func (w *work) do(req request) (res response, err error) {
	measure := func(to *[]sample, f func() error) {
		if err == nil {
			var s sample

			s, err = cost(f)
			*to = append(*to, s)
		}
	}

	switch req.Op {
	case "fill":
		measure(&res.Add, func() error { return w.mapper.fill(filled(req.Rows)) })
	case "turn":
		p, begun := measured(0, req.Proto), time.Now()
		for i := 0; err == nil && i < req.Count && (i == 0 || time.Since(begun) < req.Limit); i++ {
			measure(&res.Add, func() error { return w.mapper.add(p) })
			measure(&res.Remove, func() error { return w.mapper.remove(p) })
		}
	case "many":
		measure(&res.Add, func() error { return atOnce(req.Count, req.Proto, w.mapper.add) })
		measure(&res.Remove, func() error { return atOnce(req.Count, req.Proto, w.mapper.remove) })
	case "add":
		measure(&res.Add, func() error { return w.mapper.add(req.Pod) })

		res.Returned = clock()
	case "remove":
		measure(&res.Remove, func() error { return w.mapper.remove(req.Pod) })
	case "renew", "sync":
		o, ok := w.mapper.(*ours)
		if !ok {
			return res, errors.New("not a manager")
		}

		if req.Op == "sync" {
			measure(&res.Add, o.sync)
		} else if err = o.close(); err == nil {
			measure(&res.Add, o.renew)
		}
	case "state":
		res.State, err = w.state()
	default:
		err = errors.New("no such operation")
	}

	return res, err
}

// atOnce does the same for so many pods, all at once.
func atOnce(count int, proto v1.Protocol, f func(pod) error) error {
	var wg sync.WaitGroup

	errs := make([]error, count)
	for i := range errs {
		wg.Go(func() { errs[i] = f(measured(i, proto)) })
	}

	wg.Wait()

	return errors.Join(errs...)
}

// cost is what f takes, with the CPU time of the programs that it has run.
func cost(f func() error) (sample, error) {
	used, start := cpu(), time.Now()
	err := f()
	wall := time.Since(start)

	return sample{Wall: wall, CPU: cpu() - used}, err
}

func cpu() (used time.Duration) {
	for _, who := range []int{unix.RUSAGE_SELF, unix.RUSAGE_CHILDREN} {
		var usage unix.Rusage

		_ = unix.Getrusage(who, &usage) // cannot fail
		used += time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
	}

	return used
}

// clock is the time since the machine has started.
func clock() int64 {
	var now unix.Timespec

	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &now) // cannot fail

	return now.Nano()
}

func (w *work) state() (s state, err error) {
	debug.FreeOSMemory()

	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return s, fmt.Errorf("state: %w", err)
	}

	for line := range strings.Lines(string(status)) {
		if fields := strings.Fields(line); len(fields) > 1 && fields[0] == "RssAnon:" {
			s.Memory, err = strconv.ParseInt(fields[1], 10, 64)
			s.Memory *= 1024
		}
	}

	descriptors, readErr := os.ReadDir("/proc/self/fd")
	s.Descriptors, s.Logged = int64(len(descriptors)), w.mapper.logged()

	return s, errors.Join(err, readErr)
}
