package tool

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cri-o/hostport/internal/iptables"
	"github.com/cri-o/hostport/internal/localhost"
	"github.com/cri-o/hostport/internal/nfnetlink"
	"github.com/cri-o/hostport/internal/probe"
	"github.com/cri-o/hostport/internal/row"
	"github.com/cri-o/hostport/internal/trace"
)

// report is what explain has to say.
type report struct {
	Asked string `json:"port"`
	// Steps are what was looked at, and what was seen.
	Steps []string `json:"steps"`
	// Cause is why the port does not answer, "" if it does.
	Cause string `json:"cause"`
	// Unknown is why it is not known whether it does, "" if it is.
	Unknown string `json:"unknown,omitempty"`
}

func (r *report) stepf(format string, args ...any) {
	r.Steps = append(r.Steps, fmt.Sprintf(format, args...))
}

// question is a port that is asked about.
type question struct {
	*node
	*report

	row.PortKey

	wait time.Duration // for a packet from outside; 0: send one
}

const (
	// shortTime is how long a probe may take that reaches the pod, or is dropped.
	shortTime = 700 * time.Millisecond
	// longTime is for one that has left for the pod: the kernel asks three times for the hardware
	// address, a second each, before it says that there is none (mcast_solicit; arp(7)).
	longTime = 4 * time.Second
)

func explain(ctx context.Context, out output, text string, wait time.Duration) error {
	port, proto, err := parsePort(text)
	if err != nil {
		return err
	}

	ctx, cancel := context.WithTimeout(ctx, patience+wait)
	defer cancel()

	n, err := look(ctx)
	if err != nil {
		return err
	}

	q := &question{n, &report{Asked: fmt.Sprintf("%d/%s", port, proto)}, row.PortKey{Proto: row.Protocol(proto), Port: port}, wait}
	q.answer(ctx)

	if err := out.print(q.report, q.lines()); err != nil {
		return err
	}

	if err := n.unseenError(); err != nil {
		return err
	}

	switch {
	case q.Cause != "":
		return errFound
	case q.Unknown != "":
		return errUnknown
	default:
		return nil
	}
}

func (q *question) lines() []string {
	switch {
	case q.Cause != "":
		return append(q.Steps, "cause: "+q.Cause)
	case q.Unknown != "":
		return append(q.Steps, "not known, and nothing is seen in the way: "+q.Unknown)
	default:
		return append(q.Steps, q.Asked+" answers")
	}
}

// answer finds the cause.
func (q *question) answer(ctx context.Context) {
	rows := slices.DeleteFunc(q.rows(), func(r found) bool { return r.PortKey != q.PortKey })
	if len(rows) == 0 {
		q.Cause = q.whyNoRow(ctx)

		return
	}

	for _, r := range rows {
		p := describe(q.node, r)
		q.stepf("IPv%s: %s %s -> %s of %s, in %s; held by %s",
			r.Family(), p.Protocol, p.Host, p.Pod, p.Owner, p.Backend, holder(r.Proto, p.HeldBy))

		if cause := q.whyNot(ctx, r); cause != "" {
			cause = fmt.Sprintf("IPv%s: %s", r.Family(), cause)
			if len(rows) > 1 {
				q.stepf("  %s", cause)
			}

			if q.Cause == "" {
				q.Cause = cause
			}
		}
	}
}

// whyNoRow says why no pod has the port.
func (q *question) whyNoRow(ctx context.Context) string {
	if err := q.unseenError(); err != nil {
		return "not known, for not all could be looked at: " + strings.ReplaceAll(err.Error(), "\n", "; ")
	}

	q.stepf("no pod has the host port, in any backend")

	for _, f := range []row.Family{row.IPv4, row.IPv6} {
		by := q.holders(row.Endpoint{PortKey: q.PortKey}, f)

		switch {
		case slices.Contains(by, unseen):
			q.Unknown = unseen + " has the port: the manager, if the rules are gone, or another one. Root sees which"

			return ""
		case slices.Contains(by, q.manager[f]):
			return fmt.Sprintf("IPv%s: the rules are gone: %s, the manager, holds the port for a pod, and the kernel has no rule. "+
				"Run or Sync of the manager puts them back, or the pod's next Add", f, q.manager[f])
		case len(by) > 0:
			return fmt.Sprintf("IPv%s: %s has the port, so that no pod can get it: Add fails with \"address already in use\"",
				f, strings.Join(by, ", "))
		}
	}

	for _, f := range []row.Family{row.IPv4, row.IPv6} {
		if claims := q.claims(ctx, f); claims != "" {
			return fmt.Sprintf("IPv%s: another port mapper has the port: %s", f, claims)
		}
	}

	if !shows(q.Proto) {
		q.stepf("the sockets that hold TCP ports are shown since Linux 6.8: whether rules were wiped cannot be told")
	}

	return "no pod has the host port: none was added, or it was removed"
}

// claims are the rules of other port mappers for the port.
func (q *question) claims(ctx context.Context, f row.Family) string {
	claims, err := othersClaims(ctx, f)
	if err != nil {
		q.stepf("cannot look for other port mappers: %v", err)
	}

	var texts []string

	for _, c := range claims {
		if c.covers(q.PortKey) {
			texts = append(texts, c.String())
		}
	}

	return strings.Join(texts, "; ")
}

// whyNot says why a row does not work, "" if it does.
func (q *question) whyNot(ctx context.Context, r found) string {
	if len(r.in.missing) > 0 {
		return "rules are not as they should be: " + strings.Join(r.in.missing, "; ")
	}

	if obstacles := blocked(r.Family()); len(obstacles) > 0 {
		return obstacles[0]
	}

	w := q.wayTo(r)
	if w.device == "" {
		return w.obstacle
	}

	q.stepf("  the way to the pod is %s", w.device)

	if r.IP.IsLoopback() {
		q.Unknown = "the row is for a loopback address, which no packet from outside reaches"

		return cmp.Or(w.obstacle, q.besides(r, w))
	}

	return cmp.Or(q.fromOutside(ctx, r, w), q.besides(r, w))
}

// wayTo looks up the way to a row's pod, as it is now.
func (q *question) wayTo(r found) way {
	network, err := readNetwork()
	if err != nil {
		q.stepf("  cannot look at all interfaces and neighbours: %v", err)
	}

	return network.wayTo(r.Pod.Addr())
}

// besides says what does not work of a row that is reached from outside.
func (q *question) besides(r found, w way) string {
	by := q.holders(r.Endpoint, r.Family())
	if len(by) > 0 && q.lacks(r, by) {
		return fmt.Sprintf("the port is not held: %s has it as well. Connections reach the pod as long as the rules stand",
			strings.Join(by, ", "))
	}

	sysctl := "/proc/sys/net/ipv4/conf/" + w.device + "/route_localnet"
	if set, err := localhost.IsSet(sysctl); r.in.loopback && r.ForLoopback() && !set && err == nil {
		return fmt.Sprintf("from the node, 127.0.0.1 does not reach the pod: %s is 0", sysctl)
	}

	return ""
}

// fromOutside sends a packet to a row, or waits for one, and says what keeps it from the pod.
func (q *question) fromOutside(ctx context.Context, r found, w way) string {
	if q.wait > 0 {
		return q.awaited(ctx, r)
	}

	to, err := nodeAddress(r.Row, w.device)
	if err != nil {
		return err.Error()
	}

	o, err := probe.Open(r.Family())
	if err != nil {
		q.Unknown = fmt.Sprintf("cannot send a probe: %v", err)

		return w.obstacle
	}
	defer func() { _ = o.Close() }()

	t, err := trace.Start(ctx, o.Addr())
	if err != nil {
		q.stepf("  cannot follow the probe: %v", err)
	} else {
		defer func() { _ = t.Close() }()
	}

	var (
		a     probe.Answer
		led   netip.AddrPort
		steps []trace.Step
	)

	for _, limit := range []time.Duration{shortTime, longTime} {
		ctx, cancel := context.WithTimeout(ctx, limit)
		a, err = o.Ask(ctx, r.Proto, netip.AddrPortFrom(to, r.Port))

		cancel()

		if err != nil {
			q.Unknown = fmt.Sprintf("cannot send a probe: %v", err)

			return w.obstacle
		}

		q.stepf("  a probe from outside, %s to %s: %s %s", a.Source, netip.AddrPortFrom(to, r.Port), a.Kind, a.Why)

		if t != nil {
			steps = q.follow(ctx, t, a.Source)
		}

		led = q.ledTo(ctx, r, a.Source)

		if a.Kind != probe.Silence || dropped(steps) >= 0 || !reached(steps, "postrouting-last") {
			break
		}
	}

	return q.judge(ctx, r, a, steps, led)
}

// dropped is the step at which a rule has dropped a packet, -1 if none has.
func dropped(steps []trace.Step) int {
	return slices.IndexFunc(steps, func(s trace.Step) bool { return s.Verdict == "drop" })
}

// reached reports whether a packet has come to a milestone, as far as is known.
func reached(steps []trace.Step, chain string) bool {
	return len(steps) == 0 || slices.ContainsFunc(steps, func(s trace.Step) bool { return s.Milestone && s.Chain == chain })
}

// follow returns the steps of a probe's first packet and then those of the others, and tells the
// first packet's.
func (q *question) follow(ctx context.Context, t *trace.Tracer, source netip.AddrPort) []trace.Step {
	const most = time.Second

	ctx, cancel := context.WithTimeout(ctx, most)
	defer cancel()

	all, err := t.Steps(ctx)
	if err != nil {
		q.stepf("  some of its way is not known: %v", err)
	}

	first := slices.IndexFunc(all, func(s trace.Step) bool { return s.From == source })
	if first < 0 {
		return nil
	}

	var steps, others []trace.Step

	for _, s := range all {
		if s.Packet == all[first].Packet {
			steps = append(steps, s)
		} else {
			others = append(others, s)
		}
	}

	q.tell(steps)

	return append(steps, others...)
}

// tell tells the steps of a packet.
func (q *question) tell(steps []trace.Step) {
	for _, s := range steps {
		if text := describeStep(s); text != "" {
			q.stepf("    %s", text)
		}
	}
}

// describeStep is a line about a step, "" for one that tells nothing.
func describeStep(s trace.Step) string {
	switch {
	case s.Milestone && strings.HasSuffix(s.Chain, "-first"):
		return fmt.Sprintf("%s: %s -> %s %s", s.Hook, s.From, s.To, strings.TrimSpace(s.In+" "+s.Out))
	case s.Milestone, s.Policy && s.Verdict == "accept":
		return ""
	default:
		where := s.Hook + ": " + whereOf(s)
		if strings.HasSuffix(where, " "+s.Verdict) { // nft has said it
			return where
		}

		return where + ": " + s.Verdict
	}
}

// whereOf names a rule, or a chain whose policy it was.
func whereOf(s trace.Step) string {
	chain := fmt.Sprintf("table %s %s, chain %s", s.Family, s.Table, s.Chain)
	if s.Policy {
		return chain + ", its policy"
	}

	return fmt.Sprintf("%s, rule %d%s", chain, s.Rule, ruleText(s.Family, s.Table, s.Chain, s.Rule))
}

// ledTo is where the kernel has led a probe, the zero AddrPort if it does not know. The probe's
// flow goes.
func (q *question) ledTo(ctx context.Context, r found, source netip.AddrPort) (led netip.AddrPort) {
	conn, err := nfnetlink.Dial()
	if err != nil {
		return led
	}
	defer func() { _ = conn.Close() }()

	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second) // also when somebody has had enough
	defer cancel()

	family := uint8(unix.AF_INET)
	if r.Family() == row.IPv6 {
		family = unix.AF_INET6
	}

	flows, err := conn.Flows(ctx, family, r.Proto.Number(), r.Port)
	if err != nil {
		q.stepf("  cannot look at flows: %v", err)
	}

	flows = slices.DeleteFunc(flows, func(f nfnetlink.Flow) bool { return f.Source != source })
	for _, f := range flows {
		led = f.Responder
	}

	_ = conn.DeleteFlows(ctx, family, flows) // else it ends by itself

	return led
}

// judge says what became of a probe, "" if it has reached the pod.
func (q *question) judge(ctx context.Context, r found, a probe.Answer, steps []trace.Step, led netip.AddrPort) string {
	if i := dropped(steps); i >= 0 && a.Kind != probe.Accepted {
		what := "the packet"
		if steps[i].Packet != steps[0].Packet {
			what = "the pod's answer"
		}

		return fmt.Sprintf("%s is dropped in the %s hook by %s", what, steps[i].Hook, whereOf(steps[i]))
	}

	if to := ledBy(steps); to.IsValid() {
		led = to
	}

	if led.IsValid() && led != r.Pod {
		text := fmt.Sprintf("something else has the port: packets go to %s, not to %s", led, r.Pod)
		if claims := q.claims(ctx, r.Family()); claims != "" {
			text += ": " + claims
		}

		return text
	}

	switch a.Kind {
	case probe.Accepted:
		return ""
	case probe.Refused:
		if led == r.Pod && reached(steps, "forward-last") {
			return fmt.Sprintf("the pod refuses: nothing listens on %s %s", r.Proto.API(), r.Pod)
		}
	case probe.Unreachable, probe.Silence:
	}

	return q.lost(r, a, steps)
}

// ledBy is where the first packet was going when it was routed, the zero AddrPort if that was not seen.
func ledBy(steps []trace.Step) netip.AddrPort {
	for _, s := range steps {
		if s.Packet == steps[0].Packet && (s.Hook == "forward" || s.Hook == "input") {
			return s.To
		}
	}

	return netip.AddrPort{}
}

// lost says where a packet ended that nothing is seen to have dropped.
func (q *question) lost(r found, a probe.Answer, steps []trace.Step) string {
	w := q.wayTo(r)

	switch {
	case len(steps) == 0 && w.obstacle == "":
		q.Unknown = strings.TrimSpace(fmt.Sprintf("a probe got %s %s", a.Kind, a.Why)) +
			", and could not be followed: the pod, a firewall or the node may be why"

		return ""
	case !reached(steps, "forward-first") && !reached(steps, "input-first"):
		return "the packet ended in routing, before the forward hook: reverse path filtering (rp_filter), or no route"
	case !reached(steps, "forward-last"):
		return "the packet ended in the forward hook, and no rule of nf_tables has dropped it: look at " +
			iptables.Command(r.Family()) + "-legacy-save -t filter, chain FORWARD"
	case w.obstacle != "":
		return w.obstacle
	case a.Kind == probe.Unreachable:
		return fmt.Sprintf("%s says: %s", a.From.Addr(), a.Why)
	case r.Proto == row.UDP:
		q.Unknown = "the packet has left for the pod, which need not answer one without data"

		return ""
	default:
		return fmt.Sprintf("the packet has left for the pod over %s, and no answer came back", w.device)
	}
}

// awaited waits for a packet from outside, and says what became of it.
func (q *question) awaited(ctx context.Context, r found) string {
	t, err := trace.StartNext(ctx, r.Family(), r.Proto, r.Port)
	if err != nil {
		q.Unknown = fmt.Sprintf("cannot follow a packet: %v", err)

		return ""
	}
	defer func() { _ = t.Close() }()

	ctx, cancel := context.WithTimeout(ctx, q.wait)
	defer cancel()

	q.stepf("  waiting for a packet from outside")

	steps, err := t.Steps(ctx)
	if err != nil && !errors.Is(err, context.DeadlineExceeded) {
		q.stepf("  some of its way is not known: %v", err)
	}

	if len(steps) == 0 {
		q.Unknown = fmt.Sprintf("no packet came to the port within %s: it is lost before the node, or nobody has sent one", q.wait)

		return ""
	}

	q.tell(steps)

	// Its answer is another packet, which is not followed.
	if dropped(steps) < 0 && reached(steps, "postrouting-last") {
		q.Unknown = "the packet has left the node for the pod; its answer is not followed"

		return q.wayTo(r).obstacle
	}

	return q.judge(ctx, r, probe.Answer{Kind: probe.Silence}, steps, netip.AddrPort{})
}
