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

	"github.com/cri-o/hostport/internal/row"
)

// report is what explain has to say.
type report struct {
	Asked   string  `json:"port"` // with an address, if that was asked about
	Verdict verdict `json:"verdict"`
	// Steps are what was looked at, and what was seen.
	Steps []string `json:"steps"`
	// Cause is why the port does not answer, "" if it does.
	Cause string `json:"cause"`
	// Unknown is why it is not known whether it does, "" if it is.
	Unknown string `json:"unknown,omitempty"`
}

// verdict is an answer in a word.
type verdict string

const (
	answered verdict = "answers"
	faulty   verdict = "fault"
	notKnown verdict = "unknown"
)

func (r *report) stepf(format string, args ...any) {
	r.Steps = append(r.Steps, fmt.Sprintf(format, args...))
}

// question is a port that is asked about.
type question struct {
	*node
	*report

	row.Endpoint // of whatever address, if it has none

	wait time.Duration // for a packet from outside; 0: send one
}

func explain(ctx context.Context, out output, text string, wait time.Duration) error {
	asked, err := parseEndpoint(text)
	if err != nil {
		return err
	}

	ctx, cancel := context.WithTimeout(ctx, patience+wait)
	defer cancel()

	n, err := look(ctx)
	if err != nil {
		return err
	}

	q := &question{n, &report{Asked: shortly(asked), Steps: []string{}}, asked, wait}
	q.answer(ctx)

	last := q.conclude()

	if err := errors.Join(out.print(q.report, append(q.Steps, last)), n.unseenError(q.families()...)); err != nil {
		return err
	}

	return map[verdict]error{faulty: errFound, notKnown: errUnknown}[q.Verdict]
}

// conclude comes to the verdict, and returns it as a line.
func (q *question) conclude() string {
	switch {
	case q.Cause != "":
		q.Verdict = faulty

		return "cause: " + q.Cause
	case q.Unknown != "":
		q.Verdict = notKnown

		return "not known, and nothing is seen in the way: " + q.Unknown
	default:
		q.Verdict = answered

		return q.Asked + " answers a probe from outside. A rule for some clients or one interface alone shows with -wait"
	}
}

// unknownf notes why something is not known. The first reason is the one that counts.
func (q *question) unknownf(format string, args ...any) {
	q.Unknown = cmp.Or(q.Unknown, fmt.Sprintf(format, args...))
}

// answer finds the cause.
func (q *question) answer(ctx context.Context) {
	rows := slices.DeleteFunc(q.rows(), func(r found) bool { return !slices.Contains(q.families(), r.Family()) || !q.isAbout(r.Endpoint) })

	q.Cause = q.wipedAway()
	if len(rows) == 0 {
		if q.Cause == "" {
			q.Cause = q.whyNoRow(ctx)
		}

		return
	}

	for _, f := range q.families() {
		switch {
		case slices.ContainsFunc(rows, func(r found) bool { return r.Family() == f }), q.unseen[f] != nil, q.hasLost(f):
		case slices.Contains(q.holders(q.Endpoint, f), unseen):
			q.unknownf("IPv%s: %s has the port: the manager, if the rules are gone, or another one. Root sees which", f, unseen)
		default:
			q.stepf("IPv%s: no pod has the host port", f)
		}
	}

	causes := make([]string, len(rows))
	network := q.network()

	for i, r := range rows {
		p := describe(q.node, r)
		q.stepf("IPv%s: %s %s -> %s of %s, in %s; held by %s",
			r.Family(), p.Protocol, p.Host, p.Pod, pod(r.Row), p.Backend, holder(r.Proto, p.HeldBy))

		causes[i] = q.whyNot(ctx, r, network)
	}

	if q.wait > 0 && strings.Join(causes, "")+q.Cause == "" {
		q.awaited(ctx, rows, causes)
	}

	for i, cause := range causes {
		if cause == "" {
			continue
		}

		cause = fmt.Sprintf("IPv%s: %s", rows[i].Family(), cause)
		if len(rows) > 1 {
			q.stepf("%s", cause)
		}

		q.Cause = cmp.Or(q.Cause, cause)
	}
}

// families are those asked about that the node has.
func (q *question) families() (all []row.Family) {
	for _, f := range []row.Family{row.IPv4, row.IPv6} {
		if _, has := q.unseen[f]; has && (!q.IP.IsValid() || row.FamilyOf(q.IP) == f) {
			all = append(all, f)
		}
	}

	return all
}

// isAbout reports whether packets to an endpoint, of a family asked about, are among those asked about.
func (q *question) isAbout(e row.Endpoint) bool {
	return e.PortKey == q.PortKey && e.Overlaps(q.Endpoint)
}

// hasLost reports whether the port has lost its rules in a family, as far as that is seen.
func (q *question) hasLost(f row.Family) bool {
	return q.unseen[f] == nil && slices.ContainsFunc(q.wiped(f), q.isAbout)
}

// wipedAway says that the port has lost its rules in a family, "" if none is seen to have.
func (q *question) wipedAway() (cause string) {
	for _, f := range q.families() {
		if !q.hasLost(f) {
			continue
		}

		text := fmt.Sprintf("IPv%s: the rules are gone: %s, the manager, holds the port for a pod, and the kernel has no rule. "+
			"Run or Sync of the manager puts them back, or the pod's next Add", f, q.manager[f])
		q.stepf("%s", text)
		cause = cmp.Or(cause, text)
	}

	return cause
}

// whyNoRow says why no pod has the port.
func (q *question) whyNoRow(ctx context.Context) string {
	if len(q.families()) == 0 {
		return fmt.Sprintf("the node has no IPv%s", row.FamilyOf(q.IP))
	}

	if err := q.unseenError(q.families()...); err != nil {
		q.unknownf("not all could be looked at: %s", strings.ReplaceAll(err.Error(), "\n", "; "))

		return ""
	}

	q.stepf("no pod has the host port, in any backend")

	for _, f := range q.families() {
		by := q.holders(q.Endpoint, f)

		switch {
		case slices.Contains(by, unseen):
			q.unknownf("%s has the port: the manager, if the rules are gone, or another one. Root sees which", unseen)

			return ""
		case len(by) > 0:
			return fmt.Sprintf("IPv%s: %s has the port, so that no pod can get it: Add fails with \"address already in use\"",
				f, strings.Join(by, ", "))
		}
	}

	for _, f := range q.families() {
		if claims := q.claims(ctx, f, q.Endpoint); claims != "" {
			return fmt.Sprintf("IPv%s: another port mapper has the port: %s", f, claims)
		}
	}

	if q.Proto == row.TCP && !shows(q.Proto) {
		q.stepf("the sockets that hold TCP ports are shown since Linux 6.8: whether rules were wiped cannot be told")
	}

	for _, r := range q.rows() {
		if r.Port == q.Port {
			other := row.Endpoint{PortKey: r.PortKey, IP: r.HostIP(r.Family())}

			return fmt.Sprintf("no pod has the host port, but one has %s", shortly(other))
		}
	}

	return "no pod has the host port: none was added, or it was removed"
}

// claims are the rules of other port mappers for an endpoint.
func (q *question) claims(ctx context.Context, f row.Family, e row.Endpoint) string {
	claims, err := othersClaims(ctx, f)
	if err != nil {
		q.stepf("cannot look for other port mappers: %v", err)
	}

	var texts []string

	for _, c := range claims {
		if c.covers(e) {
			texts = append(texts, c.String())
		}
	}

	return strings.Join(texts, "; ")
}

// whyNot says why a row does not work, "" if it does or a packet has to come first.
func (q *question) whyNot(ctx context.Context, r found, network *network) string {
	if len(r.in.missing) > 0 {
		return "rules are not as they should be: " + strings.Join(r.in.missing, "; ")
	}

	w := network.wayTo(r.Pod.Addr())
	if w.unknown != "" {
		q.unknownf("%s", w.unknown)
	}

	ip := cmp.Or(q.IP, r.IP)

	var obstacles []string
	if !ip.IsLoopback() { // which the node alone reaches, without forwarding
		obstacles = append(q.blocked(r.Family()), lacksAddress(ip)...)
	}

	if !ip.IsLoopback() && w.device != "" {
		obstacles = append(obstacles, q.notForwarding(r.Family(), network.uplinks[r.Family()], w.device)...)
	}

	switch {
	case len(obstacles) > 0:
		return obstacles[0]
	case w.device == "":
		return w.obstacle
	}

	q.stepf("  the way to the pod is %s", w.device)

	switch {
	case ip == netip.IPv6Loopback():
		return "::1 leads to no pod: IPv6 has no route_localnet. The node reaches its host ports by its other addresses"
	case ip.IsLoopback():
		q.unknownf("no packet from outside reaches a loopback address: see whether the node itself does")

		return cmp.Or(w.obstacle, q.besides(r, w))
	case q.wait > 0:
		return q.besides(r, w)
	default:
		return cmp.Or(q.fromOutside(ctx, r, network, w), q.besides(r, w))
	}
}

// besides says what does not work of a row that is reached from outside.
func (q *question) besides(r found, w way) string {
	if by := q.holders(r.Endpoint, r.Family()); len(by) > 0 && q.lacks(r) {
		return fmt.Sprintf("the port is not held: %s has it as well. Connections reach the pod as long as the rules stand",
			strings.Join(by, ", "))
	}

	if r.in.loopback && r.ForLoopback() && (!q.IP.IsValid() || q.IP.IsLoopback()) {
		return q.notOpened(w.device)
	}

	return ""
}

// network is what the node knows of its neighbours, as it is now.
func (q *question) network() *network {
	n, err := readNetwork()
	if err != nil {
		q.stepf("cannot look at all interfaces and neighbours: %v", err)
	}

	return n
}
