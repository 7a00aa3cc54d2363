package main

import (
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"

	"github.com/cri-o/hostport/internal/testbed"
)

// For workers: the path of the CNI plugin, and that of the network namespace of a pod.
const (
	portmapVariable = "COMPARE_PORTMAP"
	netnsVariable   = "COMPARE_NETNS"
)

// station is a mapper at work: its node, and the worker in that.
type station struct {
	kind

	bed       *testbed.Bed
	cmd       *exec.Cmd
	stdin     io.Closer
	requests  *gob.Encoder
	responses *gob.Decoder
}

// Ports of the pod that packets go to. At any time one of them has a host port.
const (
	answers = 80
	refuses = 81 // nobody listens, except for a stream
)

// start builds a node and starts the worker of a mapper in it.
func start(k kind, portmap string) (_ *station, err error) {
	s := &station{kind: k}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.stop())
		}
	}()

	if s.bed, err = testbed.New("web"); err != nil {
		return nil, err
	}

	if _, err = s.bed.Pods[0].Serve("tcp", netip.AddrPortFrom(s.bed.Pods[0].IPv4, answers)); err != nil {
		return nil, err
	}

	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("start worker: %w", err)
	}

	s.cmd = exec.Command(self)
	s.cmd.Env = append(os.Environ(), workerVariable+"="+k.name, portmapVariable+"="+portmap,
		fmt.Sprintf("%s=/proc/%d/fd/%d", netnsVariable, os.Getpid(), s.bed.Pods[0].FD()))
	s.cmd.Stderr = os.Stderr

	stdin, err := s.cmd.StdinPipe()
	if err != nil {
		return nil, fmt.Errorf("start worker: %w", err)
	}

	stdout, err := s.cmd.StdoutPipe()
	if err != nil {
		return nil, fmt.Errorf("start worker: %w", err)
	}

	s.stdin, s.requests, s.responses = stdin, gob.NewEncoder(stdin), gob.NewDecoder(stdout)

	return s, s.bed.Host.Do(s.cmd.Start)
}

// do has the worker do something.
func (s *station) do(req request) (res response, err error) {
	err = s.requests.Encode(req)
	if err == nil {
		err = s.responses.Decode(&res)
	}

	if err == nil && res.Err != "" {
		err = errors.New(res.Err)
	}

	if err != nil {
		err = fmt.Errorf("%s: %s: %w", s.name, req.Op, err)
	}

	return res, err
}

func (s *station) stop() error {
	var errs []error
	if s.stdin != nil && s.cmd.Process != nil {
		errs = append(errs, s.stdin.Close(), s.cmd.Wait())
	}

	if s.bed != nil {
		errs = append(errs, s.bed.Close())
	}

	return errors.Join(errs...)
}

// web is the pod that packets go to, with a host port for one of its ports.
func (s *station) web(containerPort uint16) pod {
	p := measured(int(containerPort), v1.ProtocolTCP)
	p.IP, p.ContainerPort = s.bed.Pods[0].IPv4, containerPort

	return p
}

// direct and mapped are where a port of the pod is reached without and with a mapper.
func (s *station) direct(port uint16) netip.AddrPort {
	return netip.AddrPortFrom(s.bed.Pods[0].IPv4, port)
}

func (s *station) mapped(port uint16) netip.AddrPort {
	return netip.AddrPortFrom(s.bed.NodeIP(false), s.web(port).HostPort)
}

// connects is how long so many connections of the client take, one after the other, that the
// pod refuses: each is a new flow.
func (s *station) connects(to netip.AddrPort, count int) (took time.Duration, err error) {
	addr := &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}

	err = s.bed.Client.Do(func() error {
		begun := time.Now()

		for range count {
			if err := connect(addr); !errors.Is(err, unix.ECONNREFUSED) {
				return fmt.Errorf("connect to %s: %w", to, errors.Join(err, errors.New("not refused by the pod")))
			}
		}

		took = time.Since(begun)

		return nil
	})

	return took, err
}

func connect(to unix.Sockaddr) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}

	// No TIME_WAIT, of which there would be thousands.
	_ = unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})

	return errors.Join(unix.Connect(fd, to), unix.Close(fd))
}

// stream is how many bytes a second one stream carries to the pod, which reads them.
func (s *station) stream(to netip.AddrPort, length time.Duration) (rate float64, err error) {
	var listener net.Listener

	err = s.bed.Pods[0].Do(func() (err error) {
		listener, err = net.Listen("tcp4", s.direct(refuses).String())

		return err
	})
	if err != nil {
		return 0, fmt.Errorf("stream: %w", err)
	}
	defer listener.Close()

	var conn net.Conn

	err = s.bed.Client.Do(func() (err error) {
		conn, err = net.DialTimeout("tcp4", to.String(), 5*time.Second)

		return err
	})
	if err != nil {
		return 0, fmt.Errorf("stream: %w", err)
	}
	defer conn.Close()

	served, err := listener.Accept()
	if err != nil {
		return 0, fmt.Errorf("stream: %w", err)
	}
	defer served.Close()

	begun, end := time.Now(), time.Now().Add(length)

	go func() {
		for block := make([]byte, 128<<10); time.Now().Before(end); {
			if _, err := conn.Write(block); err != nil {
				break
			}
		}

		_ = conn.Close()
	}()

	received := 0

	for block := make([]byte, 256<<10); ; {
		n, err := served.Read(block)
		received += n

		if err != nil {
			break
		}
	}

	return float64(received) / time.Since(begun).Seconds(), nil
}

// firstAnswer is how long after the return of Add the first connection was answered. A
// client connects all the time, so that it may be before that.
func (s *station) firstAnswer() (after time.Duration, err error) {
	to := s.mapped(answers)
	addr := &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}
	answered := make(chan int64, 1)
	done := make(chan error, 1)
	running := make(chan struct{})

	go func() {
		done <- s.bed.Client.Do(func() error {
			close(running)

			for end := time.Now().Add(patience); time.Now().Before(end); {
				switch err := connect(addr); {
				case err == nil:
					answered <- clock()

					return nil
				case !errors.Is(err, syscall.ECONNREFUSED):
					return err
				}
			}

			return errors.New("no answer")
		})
	}()
	<-running

	res, err := s.do(request{Op: "add", Pod: s.web(answers)})
	if err != nil {
		return 0, err
	}

	if err := <-done; err != nil {
		return 0, fmt.Errorf("%s: first answer: %w", s.name, err)
	}

	_, err = s.do(request{Op: "remove", Pod: s.web(answers)})

	return time.Duration(<-answered - res.Returned), err
}

// track has the node forward packets of so many flows, and remember them.
func (s *station) track(flows int) error {
	if err := s.bed.Host.Sysctl("net/netfilter/nf_conntrack_udp_timeout", "3600"); err != nil {
		return err
	}

	const first, behind = 1000, 51_000

	return s.bed.Client.Do(func() error {
		for sent := 0; sent < flows; {
			conn, err := net.ListenPacket("udp4", ":0")
			if err != nil {
				return fmt.Errorf("track flows: %w", err)
			}

			for port := first; port < behind && sent < flows; port++ {
				to := net.UDPAddrFromAddrPort(netip.AddrPortFrom(s.bed.PeerIP(false), uint16(port)))
				if _, err := conn.WriteTo([]byte{0}, to); err != nil {
					return fmt.Errorf("track flows: %w", err)
				}

				sent++
			}

			_ = conn.Close()
		}

		return nil
	})
}
