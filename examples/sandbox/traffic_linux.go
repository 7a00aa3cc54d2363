package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"syscall"
	"time"

	"github.com/cri-o/hostport/internal/testbed"
)

const (
	// refused is who answers where nobody does.
	refused = "refused"
	// atOnce is after how long a lost SYN is sent again: what takes longer was
	// not answered, or refused, at the first attempt.
	atOnce = time.Second
)

// question is one request to a host port, and what is to come of it.
type question struct {
	from    *testbed.Namespace
	network string
	to      netip.AddrPort
	rule    string     // how the text of the rule that carries it ends
	want    string     // who is to answer
	source  netip.Addr // whom that one is to see
}

func (d *demo) fromClient(network string, to netip.AddrPort, pod *testbed.Pod, port uint16) []question {
	v6 := to.Addr().Is6()
	return []question{{
		from: d.bed.Client, network: network, to: to,
		rule: "→ " + netip.AddrPortFrom(pod.IP(v6), port).String(), want: pod.Name, source: d.bed.ClientIP(v6),
	}}
}

func (d *demo) toNobody(network string, to netip.AddrPort) []question {
	return []question{{from: d.bed.Client, network: network, to: to, rule: noRule, want: refused}}
}

// fromHost asks from the node itself at a loopback address. ::1 has no way to a
// pod, and is refused.
func (d *demo) fromHost(network string, to netip.AddrPort, pod *testbed.Pod, port uint16) []question {
	q := d.fromClient(network, to, pod, port)[0]
	q.from, q.source = d.bed.Host, bridgeIP(false)
	if to.Addr().Is6() {
		q.want, q.source = refused, netip.Addr{}
	}
	return []question{q}
}

// fromEverywhere asks from the client, the node, the other pod and the pod
// itself. That is hairpin: it would drop an answer to itself from itself, so
// it has to see another source.
func (d *demo) fromEverywhere(network string, to netip.AddrPort, pod *testbed.Pod, port uint16) []question {
	v6 := to.Addr().Is6()
	questions := d.fromClient(network, to, pod, port)
	also := func(from *testbed.Namespace, source netip.Addr) {
		q := questions[0]
		q.from, q.source = from, source
		questions = append(questions, q)
	}
	also(d.bed.Host, to.Addr())
	for _, other := range d.bed.Pods {
		if other != pod {
			also(other.Namespace, other.IP(v6))
		}
	}
	also(pod.Namespace, bridgeIP(v6))
	return questions
}

// bridgeIP is the node's address among the pods.
func bridgeIP(v6 bool) netip.Addr {
	if v6 {
		return netip.MustParseAddr("fd00:10:88::1")
	}
	return netip.MustParseAddr("10.88.0.1")
}

// ask asks the questions, one after the other, and prints a row for each. A
// row leaves out what it has in common with the one above.
func (d *demo) ask(ctx context.Context, questions []question) error {
	rows, err := d.kernelRows(ctx)
	if err != nil {
		return err
	}
	d.table(column{"ASKED", 25}, column{"RULE", 46}, column{"FROM", 6}, column{"ANSWER", 7}, column{"SOURCE", 13})
	above := ""
	for _, q := range questions {
		asked := strings.ToUpper(q.network) + " " + q.to.String()
		rule := carrier(rows, q.network, q.to)
		answer := q.ask(ctx)
		problem := q.judge(rule, answer)
		if asked == above {
			asked, rule = "", ""
		} else {
			above = asked
		}
		d.row(problem, answer.Took, asked, rule, q.from.Name, answer.From, answer.Source.Addr())
	}
	return nil
}

// ask returns an answer in any case: refused, or the error, stands for a name.
func (q question) ask(ctx context.Context) testbed.Answer {
	start := time.Now()
	answer, err := q.from.Ask(ctx, q.network, q.to)
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		return testbed.Answer{From: refused, Took: time.Since(start)}
	case err != nil:
		return testbed.Answer{From: err.Error(), Took: time.Since(start)}
	default:
		return answer
	}
}

// judge tells what is not as it should be.
func (q question) judge(rule string, answer testbed.Answer) error {
	switch {
	case answer.From != q.want:
		return fmt.Errorf("expected %s", q.want)
	case !strings.HasSuffix(rule, q.rule):
		return fmt.Errorf("expected rule %s", q.rule)
	case answer.Source.Addr() != q.source:
		return fmt.Errorf("expected source %s", q.source)
	case answer.Took >= atOnce:
		return fmt.Errorf("expected less than %s", atOnce)
	default:
		return nil
	}
}
