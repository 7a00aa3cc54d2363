package tool

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/cri-o/hostport/internal/iptables"
	"github.com/cri-o/hostport/internal/nfnetlink"
	"github.com/cri-o/hostport/internal/probe"
	"github.com/cri-o/hostport/internal/row"
	"github.com/cri-o/hostport/internal/trace"
)

const (
	// shortTime is how long a probe may take that reaches the pod, or is dropped.
	shortTime = 700 * time.Millisecond
	// longTime is for one that has left for the pod: the kernel asks three times for the hardware
	// address, a second each, before it says that there is none (mcast_solicit; arp(7)).
	longTime = 4 * time.Second
)

// trail is what is known of a packet to a row, and of what followed it.
type trail struct {
	asked  netip.AddrPort // what it was for, as it came in
	answer probe.Answer
	first  []trace.Step   // its way through the node; none if that is not known
	others []trace.Step   // the ways of its repetitions and of the pod's answers
	led    netip.AddrPort // where the node has led it; the zero AddrPort if that is not known
}

// fromOutside sends a packet to a row, and says what keeps it from the pod.
func (q *question) fromOutside(ctx context.Context, r found, network *network, w way) string {
	to, err := network.nodeAddress(cmp.Or(q.IP, r.IP), r.Family(), w.device)
	if err != nil {
		q.unknownf("%v", err)

		return w.obstacle
	}

	o, err := probe.Open(r.Family())
	if err != nil {
		q.unknownf("cannot send a probe: %v", err)

		return w.obstacle
	}
	defer func() { _ = o.Close() }()

	tracer, err := trace.Start(ctx, o.Addr())
	if err != nil {
		q.stepf("  cannot follow the probe: %v", err)
	} else {
		defer func() { _ = tracer.Close() }()
	}

	t := trail{asked: netip.AddrPortFrom(to, r.Port)}

	for _, limit := range []time.Duration{shortTime, longTime} {
		soon, cancel := context.WithTimeout(ctx, limit)
		t.answer, err = o.Ask(soon, r.Proto, t.asked)

		cancel()

		t.led = q.ledTo(ctx, r, o.Addr())

		if err = cmp.Or(ctx.Err(), err); err != nil {
			q.unknownf("a probe came to no end: %v", err)

			return w.obstacle
		}

		q.stepf("  a probe from outside, %s to %s: %s", t.answer.Source, t.asked, outcomeOf(t.answer))

		if tracer != nil {
			q.follow(ctx, tracer, &t)
		}

		if t.answer.Kind != probe.Silence || t.dropped() != nil || len(t.first) > 0 && lastMilestone(t.first) != "postrouting-last" {
			break
		}
	}

	return q.judge(ctx, r, t, o.Device())
}

// outcomeOf is what became of a probe, in words.
func outcomeOf(a probe.Answer) string { return strings.TrimSpace(string(a.Kind) + " " + a.Why) }

// ledTo is where the kernel has led a probe, the zero AddrPort if it does not know. The flow that a
// probe leaves goes.
func (q *question) ledTo(ctx context.Context, r found, source netip.Addr) (led netip.AddrPort) {
	conn, err := nfnetlink.Dial()
	if err != nil {
		return led
	}
	defer func() { _ = conn.Close() }()

	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second) // also when somebody has had enough
	defer cancel()

	family := uint8(familyOf(r.Family())) //nolint:gosec // AF_INET or AF_INET6

	flows, err := conn.Flows(ctx, family, r.Proto.Number(), r.Port)
	if err != nil {
		q.stepf("  cannot look at flows: %v", err)
	}

	flows = slices.DeleteFunc(flows, func(f nfnetlink.Flow) bool { return f.Source.Addr() != source })
	for _, f := range flows {
		led = f.Responder
	}

	_ = conn.DeleteFlows(ctx, family, flows) // else it ends by itself

	return led
}

// follow notes and tells where a probe went.
func (q *question) follow(ctx context.Context, tracer *trace.Tracer, t *trail) {
	const most = time.Second

	soon, cancel := context.WithTimeout(ctx, most)
	defer cancel()

	steps, err := tracer.Steps(soon)
	if err != nil {
		q.stepf("  some of its way is not known: %v", err)

		// A way with gaps ends where nothing happened. That a rule has dropped a packet is sure.
		steps = slices.DeleteFunc(slices.Clone(steps), func(s trace.Step) bool { return !drops(s) })
	}

	t.sort(steps)
	q.tell(ctx, t.first)
}

// sort parts the steps of the first packet that comes from the asker from those of others.
func (t *trail) sort(steps []trace.Step) {
	t.first, t.others = nil, nil

	first := slices.IndexFunc(steps, func(s trace.Step) bool { return s.From == t.answer.Source })
	for _, s := range steps {
		if first >= 0 && s.Packet == steps[first].Packet {
			t.first = append(t.first, s)
		} else {
			t.others = append(t.others, s)
		}
	}
}

// tell tells the steps of a packet.
func (q *question) tell(ctx context.Context, steps []trace.Step) {
	for _, s := range steps {
		if text := describeStep(ctx, s); text != "" {
			q.stepf("    %s", text)
		}
	}
}

// describeStep is a line about a step, "" for one that tells nothing.
func describeStep(ctx context.Context, s trace.Step) string {
	switch {
	case s.Milestone && strings.HasSuffix(s.Chain, "-first"):
		return fmt.Sprintf("%s: %s -> %s %s", s.Hook, s.From, s.To, strings.TrimSpace(s.In+" "+s.Out))
	case s.Milestone, s.Policy && s.Verdict == "accept":
		return ""
	default:
		where := s.Hook + ": " + whereOf(ctx, s)
		if strings.HasSuffix(where, " "+s.Verdict) { // nft has said it
			return where
		}

		return where + ": " + s.Verdict
	}
}

// whereOf names a rule, or a chain whose policy it was.
func whereOf(ctx context.Context, s trace.Step) string {
	chain := fmt.Sprintf("table %s %s, chain %s", s.Family, s.Table, s.Chain)
	if s.Policy {
		return chain + ", its policy"
	}

	return fmt.Sprintf("%s, handle %d%s", chain, s.Rule, ruleText(ctx, s.Family, s.Table, s.Chain, s.Rule))
}

func drops(s trace.Step) bool { return s.Verdict == "drop" }

// dropped is the step at which a rule has dropped one of the packets, nil if none has.
func (t *trail) dropped() *trace.Step {
	for _, steps := range [][]trace.Step{t.first, t.others} {
		if i := slices.IndexFunc(steps, drops); i >= 0 {
			return &steps[i]
		}
	}

	return nil
}

// lastMilestone is the last one that a packet has passed.
func lastMilestone(steps []trace.Step) (chain string) {
	for _, s := range steps {
		if s.Milestone {
			chain = s.Chain
		}
	}

	return chain
}

// goal is where the first packet was going when it had passed prerouting, the zero AddrPort if that
// is not seen, and the rule of nf_tables that it matched last before.
func (t *trail) goal(ctx context.Context) (to netip.AddrPort, rule string) {
	for _, s := range t.first {
		if s.Hook != "prerouting" || s.To != t.asked {
			return s.To, rule
		}

		if !s.Milestone && s.Rule != 0 {
			rule = ", by " + whereOf(ctx, s)
		}
	}

	return t.led, ""
}

// judge says what became of a packet, "" if the pod has accepted it.
func (q *question) judge(ctx context.Context, r found, t trail, back string) string {
	to, rule := t.goal(ctx)

	switch to {
	case r.Pod, netip.AddrPort{}:
	case t.asked:
		return "the packet is not translated, and stays with the node: it is not tracked (notrack), or a rule accepts it before ours" + rule
	default:
		text := fmt.Sprintf("something else has the port: packets go to %s, not to %s%s", to, r.Pod, rule)
		if claims := q.claims(ctx, r.Family(), r.Endpoint); claims != "" && rule == "" {
			text += ": " + claims
		}

		return text
	}

	if t.answer.Kind == probe.Accepted {
		return ""
	}

	if s := t.dropped(); s != nil {
		what := "the packet"
		if s.To.Addr() == t.answer.Source.Addr() {
			what = "the pod's answer"
		}

		return fmt.Sprintf("%s is dropped in the %s hook by %s", what, s.Hook, whereOf(ctx, *s))
	}

	if t.answer.Kind == probe.Refused && to == r.Pod && q.ended("", r.Family(), t.first) == "" {
		return fmt.Sprintf("the pod refuses: nothing listens on %s %s", r.Proto.API(), r.Pod)
	}

	return q.lost(r, t, back)
}

// ended says where in the node a packet ended that no rule of nf_tables has dropped, "" if it has
// left the node or its way is not known.
func (q *question) ended(what string, f row.Family, steps []trace.Step) string {
	last := lastMilestone(steps)
	hook, inside := strings.CutSuffix(last, "-first")

	switch {
	case inside:
		return fmt.Sprintf("%s ended in the %s hook, and no rule of nf_tables has dropped it: look at %s-legacy-save, chain %s",
			what, hook, iptables.Command(f), strings.ToUpper(hook))
	case last == "prerouting-last":
		if obstacles := q.notForwarding(f, steps[0].In); len(obstacles) > 0 {
			return obstacles[0]
		}

		return what + " ended in routing, before the forward hook: reverse path filtering (rp_filter), or no route"
	default:
		return ""
	}
}

// lost says where a packet ended that nothing is seen to have dropped. Answers to it go back over
// an interface.
func (q *question) lost(r found, t trail, back string) string {
	network := q.network()
	w := network.wayTo(r.Pod.Addr())

	if cause := q.ended("the packet", r.Family(), t.first); cause != "" {
		return cause
	}

	answers := slices.DeleteFunc(slices.Clone(t.others), func(s trace.Step) bool { return s.To.Addr() != t.answer.Source.Addr() })
	if cause := q.ended("the pod's answer", r.Family(), answers); cause != "" {
		return cause
	}

	out := ""
	for _, s := range answers {
		out = cmp.Or(s.Out, out)
	}

	switch {
	case w.obstacle != "":
		return w.obstacle
	case len(t.first) == 0:
		q.unknownf("a probe got %s, and could not be followed: the pod, a firewall or the node may be why", outcomeOf(t.answer))
	case t.answer.Kind == probe.Unreachable:
		return q.unreachable(r, t, network, w)
	case out == w.device && out != "":
		return fmt.Sprintf("the pod sends its answer to another machine on %s, not to the node: look at the pod's routes", out)
	case out != "" && out != back:
		q.unknownf("the pod answers a probe, and the node sends the answer out over %s: rules of routing (ip rule) lead it there", out)
	case r.Proto == row.UDP:
		q.unknownf("the packet has left for the pod, which need not answer one without data")
	default:
		return fmt.Sprintf("the packet has left for the pod over %s, and no answer came back%s", w.device,
			cmp.Or(network.dead(w.device), ": the pod drops it, has no route back, or went a moment ago"))
	}

	return ""
}

// unreachable says who has answered by ICMP. What comes from behind the node has an address of the
// node's as well (nf_nat_icmp_reply_translation).
func (q *question) unreachable(r found, t trail, network *network, w way) string {
	switch left := lastMilestone(t.first) == "postrouting-last"; {
	case left && (t.answer.Why == "host unreachable" || t.answer.Why == "address unreachable"): // the neighbour entry may be gone by now
		return network.nobodyAt(w.device, r.Pod.Addr())
	case left:
		return "the pod says: " + t.answer.Why
	default:
		return "the node says: " + t.answer.Why
	}
}

// awaited waits for a packet from outside to one of several rows, and notes what became of it.
func (q *question) awaited(ctx context.Context, rows []found, causes []string) {
	tracer, err := trace.StartNext(ctx, q.Proto, q.Port, q.IP)
	if err != nil {
		q.unknownf("cannot follow a packet: %v", err)

		return
	}
	defer func() { _ = tracer.Close() }()

	waiting, cancel := context.WithTimeout(ctx, q.wait)
	defer cancel()

	q.stepf("waiting for a packet from outside")

	steps, err := tracer.Steps(waiting)

	switch {
	case err != nil:
		q.unknownf("the packet's way is not known: %v", err)

		return
	case len(steps) == 0 && ctx.Err() != nil:
		q.unknownf("no packet has come to the port yet: %v", ctx.Err())

		return
	case len(steps) == 0:
		q.unknownf("no packet came to prerouting within %s: nobody has sent one, or it is lost on its way or in the ingress hook", q.wait)

		return
	}

	q.tell(ctx, steps)

	t := trail{asked: steps[0].To, first: steps, answer: probe.Answer{Kind: probe.Silence, Source: steps[0].From}}

	i := slices.IndexFunc(rows, func(r found) bool { return r.IP == t.asked.Addr() })
	if i < 0 {
		i = slices.IndexFunc(rows, func(r found) bool { return !r.IP.IsValid() && r.Family() == row.FamilyOf(t.asked.Addr()) })
	}

	if i < 0 {
		q.unknownf("the packet was for %s, which no pod has", t.asked)

		return
	}

	// The answer is another packet, which is not followed.
	to, _ := t.goal(ctx)
	if to == rows[i].Pod && t.dropped() == nil && lastMilestone(steps) == "postrouting-last" {
		q.unknownf("the packet has left the node for the pod; its answer is not followed")

		causes[i] = q.network().wayTo(rows[i].Pod.Addr()).obstacle

		return
	}

	causes[i] = q.judge(ctx, rows[i], t, "")
}
