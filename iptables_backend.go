package hostport

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"syscall"
)

// iptablesBackend keeps the rows in the nat table through iptables(8), and the
// guard of loopback addresses in the raw table.
//
// In the steady state a change is one iptables-restore with the delta alone.
// The backend knows which range chains there are, and the transaction itself
// asserts that what it stands on is still there. When that fails, the table is
// read, and the same transaction is made again for what is really there, with
// all that is missing.
type iptablesBackend struct {
	ipt programs
	// guard and nat are the rules that stand whatever rows there are.
	guard, nat []iptRule
	// before is set for a backend that is not the one in use: rows are only
	// taken out.
	before bool
	watch  tableWatch
	// state is what the kernel holds; nil: not known, has to be read.
	state *natState
	// doubtful rows, by hash, are from transactions that failed: a process that
	// was killed may have committed before. They are removed where they are
	// found and are not in the table.
	doubtful map[string]*row
	// most is how many rows one transaction changes; what changes more goes in
	// several, by one process. partly is set if the operation at hand has tried that.
	most   int
	partly bool
}

// programs are those of iptables(8) for one family.
type programs = IPTables

// familyOfIPTables is the family of programs.
func familyOfIPTables(ipt programs) ipFamily {
	if ipt.IsIPv6() {
		return IPv6
	}

	return IPv4
}

// onlyBefore makes b one that is not in use: the guard stands with what is.
func (b *iptablesBackend) onlyBefore() { b.before, b.guard = true, nil }

// rowsAtOnce is most for iptables-nft. What it does with the names of chains takes
// the square of their number: 10,000 rows in one transaction took 6 s of CPU to add
// and 34 s to remove, in ten 1.8 s and 1.7 s (1.8.9).
const rowsAtOnce = 1000

// natState is what has to be known of the nat table to write a delta.
type natState struct {
	// shared has the range chains, by name, and the jumps to them, as lines,
	// with the number of rows that use each. What the kernel does not have is
	// not in the map.
	shared map[string]int
	// base are the base chains, by name, and base rules, as lines, that are in
	// place; wrong are rules, as lines, that stand in place of each of these.
	base  map[string]bool
	wrong map[string][]string
	// strays are the rows that do not stand as this package would put them.
	strays map[string]*stray // by hash
}

// stray is what there is of a row that stands in other rules than ours, such
// as CRI-O's.
type stray struct {
	jumps  []savedRule // that lead to its chains
	chains []string
}

// newIPTablesBackend returns a backend that translates what comes from loopback addresses,
// and guards them, if told so.
func newIPTablesBackend(ipt programs, localhost, guard bool) *iptablesBackend {
	f := familyOfIPTables(ipt)
	b := &iptablesBackend{ipt: ipt, nat: natRules(f, localhost), doubtful: map[string]*row{}, most: rowsAtOnce}

	if guard {
		b.guard = guardRules(f)
	}

	return b
}

func (b *iptablesBackend) kind(*row) string { return "iptables" }

func (b *iptablesBackend) name(r *row) string { return r.hash }

func (b *iptablesBackend) ownedBy(id string, r *row) bool { return r.hashedBy(id) }

// exempt does nothing: kube-proxy's rules come first, and accept what is for a Service.
func (b *iptablesBackend) exempt([]netip.Addr) (due bool) { return false }

func (b *iptablesBackend) list(ctx context.Context) (rows []*row, intact bool, err error) {
	b.watch.begin(ctx)

	t, state, err := b.read(ctx)
	if err != nil {
		return nil, false, err
	}

	rows = t.rows(familyOfIPTables(b.ipt))
	whole := true

	for _, r := range rows {
		switch {
		case t.holds(r):
			whole = state.use(r) && whole
		case t.leadsTo(r):
			r.astray = true
			state.strays[r.hash] = t.stray(r)
		default:
			whole = false
		}
	}

	if whole { // else the first operation repairs it
		b.state = state
	}

	return rows, whole && state.intact(), nil
}

// intact tells whether all base chains and rules are in place, and nothing that
// is to be taken out.
func (st *natState) intact() bool {
	for _, there := range st.base {
		if !there {
			return false
		}
	}

	for _, uses := range st.shared {
		if uses == 0 {
			return false
		}
	}

	return len(st.wrong) == 0
}

// use counts r as a user of the range chains that lead to it. It tells whether
// these are all there.
func (st *natState) use(r *row) bool {
	whole := true

	for _, s := range r.sides() {
		for _, j := range s.path {
			for _, key := range []string{j.target, j.String()} {
				_, ok := st.shared[key]
				whole = whole && ok
				st.shared[key]++
			}
		}
	}

	return whole
}

// read returns the nat table, and what that and the raw table are without any
// rows.
func (b *iptablesBackend) read(ctx context.Context) (*savedTable, *natState, error) {
	raw := &savedTable{}

	if len(b.guard) > 0 {
		var err error
		if raw, err = b.save(ctx, rawTable); err != nil {
			return nil, nil, err
		}
	}

	t, err := b.save(ctx, natTable)
	if err != nil {
		return nil, nil, err
	}

	st := t.state(b.nat)

	for _, g := range b.guard {
		st.find(raw, g)
	}

	return t, st, nil
}

func (b *iptablesBackend) save(ctx context.Context, table string) (*savedTable, error) {
	save, err := b.ipt.Save(ctx, table)
	if err != nil {
		return nil, fmt.Errorf("list rules: %w", err)
	}

	return parseSave(save, table)
}

func (b *iptablesBackend) reconcile(ctx context.Context, t target) ([]string, error) {
	switch {
	case !t.base:
		return b.tried(ctx, func() ([]string, error) { return b.tryDemolish(ctx) })
	case t.whole:
		return b.tried(ctx, func() ([]string, error) { return b.tryRepair(ctx, t.rows, t.exactly) })
	}

	restored, err := b.apply(ctx, t.deltas, t.rows)
	if restored {
		return []string{"rules"}, err
	}

	return nil, err
}

func (b *iptablesBackend) apply(ctx context.Context, deltas []delta, table iter.Seq[*row]) (restored bool, err error) {
	b.partly = false
	restored, err = b.try(ctx, deltas, table)

	switch {
	case err == nil:
		clear(b.doubtful) // a failure is followed by a repair, which takes them out
	case b.partly || !isRefused(err):
		b.state = nil

		for _, d := range deltas {
			for _, r := range slices.Concat(d.add, d.del) {
				b.doubtful[r.hash] = r
			}
		}
	}

	if err == nil || !b.partly {
		return restored, err
	}

	ctx, cancel := withGrace(ctx)
	defer cancel()

	before := slices.Values(target{deltas: deltas, rows: table}.rowsBefore())

	if _, backErr := b.reconcile(ctx, target{rows: before, base: true, whole: true}); backErr != nil {
		if refused := (*refusedError)(nil); errors.As(err, &refused) { // then something has changed
			err = refused.err
		}

		err = fmt.Errorf("%w; what is done could not be taken back: %v", err, backErr) //nolint:errorlint // is not the cause
	}

	return restored, err
}

// try is apply, but for what a failure leaves to be done.
func (b *iptablesBackend) try(ctx context.Context, deltas []delta, table iter.Seq[*row]) (restored bool, err error) {
	if !b.needsLook(ctx, deltas) {
		s := newScript(b.state, b.most)
		s.base(b.guard, b.nat)

		for i, d := range deltas {
			s.delta(i, d)
		}

		err := b.run(ctx, s)
		if err == nil || ctx.Err() != nil || isRefused(err) {
			return false, err
		}
	}

	for try := 0; ; try++ {
		b.watch.begin(ctx)

		t, state, err := b.read(ctx)
		if err != nil {
			return false, err
		}

		s := b.restoration(t, state, deltas, table, false)
		restored := slices.ContainsFunc(s.lines, func(l scriptLine) bool {
			return l.delta == shared && (strings.HasPrefix(l.text, cmdAppend) || strings.HasPrefix(l.text, cmdInsert))
		})

		err = b.runChanges(ctx, s)
		if err == nil || ctx.Err() != nil || isRefused(err) || try >= maxOvertaken {
			return restored && err == nil, err
		}
	}
}

// needsLook reports whether the tables have to be read: where deltas have rows that are
// to stand, also when others may have changed something, for that a rule stands before
// another cannot be asserted.
func (b *iptablesBackend) needsLook(ctx context.Context, deltas []delta) bool {
	keeps := slices.ContainsFunc(deltas, func(d delta) bool { return len(d.keep) > 0 })

	return b.state == nil || keeps && b.watch.changed(ctx)
}

// runChanges commits a script that was made from a look, unless that has found nothing
// to change.
func (b *iptablesBackend) runChanges(ctx context.Context, s *script) error {
	if len(s.changes()) > 0 {
		return b.run(ctx, s)
	}

	s.settle()
	b.state = s.state

	return nil
}

// run commits a script.
func (b *iptablesBackend) run(ctx context.Context, s *script) error {
	done := b.watch.operation(ctx)
	err := b.ipt.Restore(ctx, s.input())
	done(s, err)

	b.partly = b.partly || s.transactions > 1

	if err != nil {
		// What comes first may have been put there.
		if b.partly || slices.ContainsFunc(b.guard, func(g iptRule) bool { return !s.state.base[g.String()] }) {
			b.state = nil
		}

		// In a user namespace net.core.wmem_default is the limit for iptables-nft.
		if errors.Is(err, syscall.EMSGSIZE) {
			b.most = max(min(b.most, rowsAtOnce)/4, 1)
		}

		return s.blame(err)
	}

	s.settle()
	b.state = s.state

	return nil
}

// restoration writes what it takes from t to the table with deltas applied, and
// with purge to nothing else.
func (b *iptablesBackend) restoration(t *savedTable, state *natState, deltas []delta, table iter.Seq[*row], purge bool) *script {
	s := newScript(state, b.most)
	s.base(b.guard, b.nat)

	of := map[*row]int{} // the delta that a row is in
	gone := maps.Clone(b.doubtful)

	for i, d := range deltas {
		for _, r := range slices.Concat(d.add, d.keep) {
			of[r] = i
		}

		for _, r := range d.del {
			gone[r.hash] = r
		}
	}

	wanted := map[string]*row{}
	for r := range table {
		wanted[r.hash] = r
		delete(gone, r.hash)
	}

	index := func(r *row) int {
		if i, ok := of[r]; ok {
			return i
		}

		return shared
	}

	var missing []*row

	for _, r := range wanted {
		switch {
		case t.holds(r):
			s.usePath(index(r), r, r.sides())
		case t.leadsTo(r) && r.astray:
			s.state.strays[r.hash] = t.stray(r)
		default:
			missing = append(missing, r)
		}
	}

	broken := delta{del: slices.Collect(maps.Values(gone)), add: missing}

	for _, part := range broken.parts(b.most) {
		s.room(part.size())
		s.clear(index, t.stray, slices.Concat(part.add, part.del)...)
		s.put(index, part.add...)
	}

	if purge {
		s.purge(t, b.nat, slices.Collect(maps.Values(wanted)))
	}

	s.sweep(t)

	return s
}

// holds tells whether a row stands in t as this package puts it. The range
// chains that lead there are another matter.
func (t *savedTable) holds(r *row) bool {
	for _, s := range r.sides() {
		if jumps := t.jumps[s.jump.target]; len(jumps) != 1 || jumps[0].iptRule != s.jump {
			return false
		}

		if rules := t.chains[s.rule.chain]; len(rules) != 1 || rules[0].iptRule != s.rule {
			return false
		}
	}

	return r.ip.IsValid() || !t.takesFrom(r)
}

// takesFrom tells whether r, which is for any address, stands before what may be
// for one address.
func (t *savedTable) takesFrom(r *row) bool {
	jump := r.dnatSide().jump

	return slices.ContainsFunc(t.chains[jump.chain][t.index(jump):], func(o savedRule) bool {
		return o.proto == r.proto && o.dports.lo <= r.port && r.port <= o.dports.hi &&
			(isRange(o.target) || firstRule(t.chains[o.target]).dst.IsValid())
	})
}

// leadsTo tells whether r stands in t where CRI-O puts it: with its jumps
// straight in the dispatch chains.
func (t *savedTable) leadsTo(r *row) bool {
	dnat, masq := t.jumps[r.dnatChain()], t.jumps[r.masqChain()]
	if len(dnat) != 1 || dnat[0].chain != dnatDispatch || len(masq) != 1 || masq[0].chain != masqDispatch {
		return false
	}

	found := rowFrom(r.hash, firstRule(t.chains[r.dnatChain()]), dnat)

	return found != nil && found.endpoint == r.endpoint && found.pod == r.pod &&
		firstRule(t.chains[r.masqChain()]).target == masqTarget
}

func firstRule(rules []savedRule) iptRule {
	if len(rules) == 0 {
		return iptRule{}
	}

	return rules[0].iptRule
}

// stray is whatever t has of a row.
func (t *savedTable) stray(r *row) *stray {
	s := &stray{}

	for _, chain := range []string{r.dnatChain(), r.masqChain()} {
		s.jumps = append(s.jumps, t.jumps[chain]...)

		if _, ok := t.chains[chain]; ok {
			s.chains = append(s.chains, chain)
		}
	}

	return s
}

// index is where a rule stands in its chain, or -1.
func (t *savedTable) index(rule iptRule) int {
	return slices.IndexFunc(t.chains[rule.chain], func(r savedRule) bool { return r.iptRule == rule })
}

// state is t without any rows. base are the rules that ought to stand.
func (t *savedTable) state(base []iptRule) *natState {
	st := &natState{shared: map[string]int{}, base: map[string]bool{}, wrong: map[string][]string{}, strays: map[string]*stray{}}

	for name := range t.chains {
		if isRange(name) {
			st.shared[name] = 0

			for _, j := range t.jumps[name] {
				if !j.other {
					st.shared[j.iptRule.String()] = 0
				}
			}
		}
	}

	for _, b := range base {
		if ourChain(b.target) {
			_, st.base[b.target] = t.chains[b.target]
		}

		st.find(t, b)
	}

	return st
}

// find finds out whether a base rule is in place, and what stands in place of it or
// besides: then all of that has to go, as what goes is the first of several copies.
func (st *natState) find(t *savedTable, base iptRule) {
	line, chain := base.String(), t.chains[base.chain]

	var like []string

	for _, r := range chain {
		if r.target == base.target && r.comment == base.comment && r.src == base.src && r.dst == base.dst {
			like = append(like, r.line)
		}
	}

	at := t.index(base)
	first := base.chain == postRouting || base.target == dropTarget
	st.base[line] = at >= 0 && !(first && slices.ContainsFunc(chain[:at], mayEnd))

	if len(like) > 1 || len(like) == 1 && !st.base[line] {
		st.wrong[line] = like
	}
}

// mayEnd reports whether a rule before one of ours may keep packets from it: by a
// verdict, RETURN being one in a base chain, or by a chain of others, whatever is in
// it now. CNI plugins' rules accept what comes from their network. Of the targets that
// nat and raw can have, those named go on to the next rule (iptables-extensions(8)),
// and what is dropped gets nowhere. Calico and Kubernetes insist on being first.
func mayEnd(r savedRule) bool {
	switch r.target {
	case "", "AUDIT", "CLASSIFY", "CONNMARK", "CT", "HMARK", "IDLETIMER", "LED", "LOG", "MARK", "NFLOG",
		"NOTRACK", "RATEEST", "SET", "TCPMSS", "TEE", "TRACE", "ULOG", dropTarget:
		return false
	}

	return !strings.HasPrefix(r.target, "KUBE-") && !strings.HasPrefix(r.target, "cali-")
}

// isRange tells whether a chain is a range chain by its name.
func isRange(chain string) bool {
	for _, prefix := range []string{dnatPrefix, masqPrefix} {
		if rest, ok := strings.CutPrefix(chain, prefix); ok {
			proto, ports, _ := strings.Cut(rest, "-")
			_, ok := parsePorts(strings.Replace(ports, "-", ":", 1))

			return ok && slices.Contains([]protocol{tcp, udp, sctp}, protocol(strings.ToLower(proto)))
		}
	}

	return false
}

// script is the input of one iptables-restore, and what the kernel holds once
// that is through.
type script struct {
	state *natState
	lines []scriptLine
	// most is how many rows one transaction changes, rows how many the last one does
	// so far, transactions how many there are for the nat table.
	most, rows, transactions int
	// uses overlays state.shared: the number of rows that use each chain and
	// jump, -1 for one that is gone. It becomes part of it when the script has
	// been committed.
	uses    map[string]int
	seen    map[string]bool // what the script itself has asserted or made
	gone    map[string]bool // hashes of rows whose chains the script has flushed
	deleted map[string]bool // rules, as lines, that the script has deleted
}

type scriptLine struct {
	text  string
	delta int
	row   *row
	// own marks a rule in a chain that the script itself has made: if that
	// fails, it is for what the rule says and not for what is missing.
	own bool
}

func newScript(st *natState, most int) *script {
	return &script{
		state: st, most: most, transactions: 1, uses: map[string]int{},
		seen: map[string]bool{}, gone: map[string]bool{}, deleted: map[string]bool{},
	}
}

func (s *script) emit(delta int, r *row, text string) {
	s.lines = append(s.lines, scriptLine{text: text, delta: delta, row: r})
}

// room begins another transaction if there is no room for more rows in this one.
func (s *script) room(rows int) {
	if s.rows > 0 && s.rows+rows > s.most {
		s.emit(shared, nil, cmdCommit)
		s.emit(shared, nil, "*"+natTable)
		s.rows = 0
		s.transactions++
	}

	s.rows += rows
}

// delete takes out a rule, the first where several have the same line.
func (s *script) delete(delta int, r *row, line string) {
	s.emit(delta, r, cmdDelete+line)
	s.deleted[line] = true
}

func (s *script) input() []byte {
	var b bytes.Buffer

	for _, l := range s.lines {
		b.WriteString(l.text + "\n")
	}

	b.WriteString(cmdCommit + "\n")

	return b.Bytes()
}

// blame finds the delta that an error of iptables-restore is about. Where
// that is one rule of a row, what the kernel refused is that rule.
func (s *script) blame(err error) error {
	at := interface{ Line() int }(nil)
	if !errors.As(err, &at) {
		return err
	}

	i := at.Line() - 1
	if i < 0 || i >= len(s.lines) {
		return err
	}

	l := s.lines[i]
	if l.row != nil {
		err = &rowError{l.row, err}
	}

	if l.own && l.delta != shared {
		return &refusedError{delta: l.delta, err: err}
	}

	return err
}

// settle makes the state what the script has made of the kernel.
func (s *script) settle() {
	for key, n := range s.uses {
		if n < 0 {
			delete(s.state.shared, key)
		} else {
			s.state.shared[key] = n
		}
	}

	for hash := range s.gone {
		delete(s.state.strays, hash)
	}

	for key := range s.state.base {
		s.state.base[key] = true
	}

	clear(s.state.wrong)
}

// users is how many rows use a range chain or a jump to one, and whether the
// kernel has it.
func (s *script) users(key string) (n int, there bool) {
	n, there = s.uses[key]
	if !there {
		n, there = s.state.shared[key]
	}

	return max(n, 0), there && n >= 0
}

// base makes the transaction fail unless the base chains and rules are in
// place. Those that are known not to be are put there. The guard is first, and
// committed by itself: it stands whatever becomes of the rest.
func (s *script) base(guard, nat []iptRule) {
	if len(guard) > 0 {
		s.emit(shared, nil, "*"+rawTable)

		for _, g := range guard {
			s.ensure(g, cmdInsert) // before whatever may end the walk
		}

		s.emit(shared, nil, cmdCommit)
	}

	s.emit(shared, nil, "*"+natTable)

	for _, b := range nat {
		if ourChain(b.target) && !s.state.base[b.target] && !s.seen[b.target] {
			s.seen[b.target] = true
			s.emit(shared, nil, cmdNewChain+b.target)
		}

		// Services come before host ports, so those go last.
		cmd := cmdAppend
		if b.chain == postRouting {
			cmd = cmdInsert
		}

		s.ensure(b, cmd)
	}
}

// ensure makes the transaction fail unless a base rule is in place. If it is
// known not to be, or not alone, it is put there by cmd.
func (s *script) ensure(rule iptRule, cmd string) {
	line := rule.String()

	for _, wrong := range s.state.wrong[line] {
		s.delete(shared, nil, wrong)
	}

	if s.state.base[line] && len(s.state.wrong[line]) == 0 {
		cmd = cmdCheck
	}

	s.emit(shared, nil, cmd+line)
}

// delta writes what one operation changes.
func (s *script) delta(i int, d delta) {
	for _, r := range d.keep {
		s.room(1)
		s.assert(i, r)
	}

	for _, part := range d.parts(s.most) {
		s.room(part.size())
		s.drop(i, part.del...)
		s.put(func(*row) int { return i }, part.add...)
	}
}

// stray is how r stands, if not as this package would put it.
func (s *script) stray(r *row) *stray {
	if s.gone[r.hash] {
		return nil
	}

	return s.state.strays[r.hash]
}

// assert makes the transaction fail unless r stands.
func (s *script) assert(i int, r *row) {
	for _, side := range r.sides() {
		for _, j := range side.path {
			s.assertOnce(j)
		}

		s.emit(i, r, cmdCheck+side.jump.String())
		s.emit(i, r, cmdCheck+side.rule.String())
	}
}

func (s *script) assertOnce(j iptRule) {
	if line := j.String(); !s.seen[line] {
		s.seen[line] = true
		s.emit(shared, nil, cmdCheck+line)
	}
}

// put writes rows and what leads to them. The DNAT sides come first and then
// the masquerade sides: what the kernel visits together, to look for loops, it
// has then made together, which makes that a tenth faster.
func (s *script) put(index func(*row) int, rows ...*row) {
	sides := make([][]side, len(rows))

	for j, r := range rows {
		s.chooseDepth(r)
		sides[j] = r.sides()
		s.usePath(index(r), r, sides[j])
	}

	for which := range 2 {
		for j, r := range rows {
			s.putSide(index(r), r, sides[j][which])
		}
	}
}

// chooseDepth decides where a row is to stand. A row for one address goes as
// deep as can be: it has to come before one for any address of the same port,
// wherever that stands.
func (s *script) chooseDepth(r *row) {
	for r.depth = ownRows; r.depth < rangeLevels-1; r.depth++ {
		if n, _ := s.users(r.rangeChain(dnatPrefix, r.depth)); n < fewRows && !r.ip.IsValid() {
			return
		}
	}
}

func (s *script) putSide(i int, r *row, side side) {
	// Makes the chain, or empties one that was left over.
	s.emit(i, r, ":"+side.rule.chain+" - [0:0]")
	s.emit(i, r, cmdAppend+side.rule.String())
	s.lines[len(s.lines)-1].own = true

	if side.first {
		s.emit(i, r, cmdInsert+side.jump.String())
	} else {
		s.emit(i, r, cmdAppend+side.jump.String())
	}
}

// usePath makes the range chains that lead to r, where they are missing. Of
// the jumps that are there it asserts the first: each takes time, as iptables
// reads the whole chain that a jump leads to.
func (s *script) usePath(i int, r *row, sides []side) {
	for _, side := range sides {
		for level, j := range side.path {
			n, there := s.users(j.target)
			if !there {
				s.emit(i, r, cmdNewChain+j.target)
			}

			s.uses[j.target] = n + 1

			line := j.String()

			n, there = s.users(line)
			if !there {
				cmd := cmdAppend
				if level > ownRows {
					cmd = cmdInsert // before the rows that stand beside it
				}

				s.emit(i, r, cmd+line)
				s.seen[line] = true
			} else if level == 0 {
				s.assertOnce(j)
			}

			s.uses[line] = n + 1
		}
	}
}

// drop takes rows out, and the range chains that were there for them alone. All are
// flushed first: iptables-nft looks at every rule that is deleted before a flush (1.8.9).
func (s *script) drop(i int, rows ...*row) {
	var ours []*row

	for _, r := range rows {
		if s.stray(r) != nil {
			s.clear(func(*row) int { return i }, s.stray, r)

			continue
		}

		ours = append(ours, r)

		for _, side := range r.sides() {
			s.emit(i, r, cmdFlushChain+side.rule.chain)
		}
	}

	for _, r := range ours {
		for _, side := range r.sides() {
			s.emit(i, r, cmdDelete+side.jump.String())
			s.emit(i, r, cmdDelChain+side.rule.chain)

			for _, j := range slices.Backward(side.path) {
				line := j.String()
				if s.unuse(line) {
					s.emit(i, r, cmdDelete+line)
					delete(s.seen, line)
				}

				if s.unuse(j.target) {
					s.emit(i, r, cmdDelChain+j.target)
				}
			}
		}
	}
}

// unuse counts one user less, and tells whether that was the last.
func (s *script) unuse(key string) bool {
	n, _ := s.users(key)
	if n > 1 {
		s.uses[key] = n - 1

		return false
	}

	s.uses[key] = -1

	return true
}

// clear takes out whatever there is of rows. All are flushed first: one may lead to
// another, and iptables-nft forgets that it has deleted a rule if it is told to
// flush its chain then (1.8.9).
func (s *script) clear(index func(*row) int, strayOf func(*row) *stray, rows ...*row) {
	found := make([]*stray, len(rows))

	for i, r := range rows {
		found[i] = strayOf(r)
		s.gone[r.hash] = true

		for _, chain := range found[i].chains {
			s.emit(index(r), r, cmdFlushChain+chain)
		}
	}

	for i, r := range rows {
		for _, j := range s.left(found[i].jumps) {
			s.delete(index(r), r, j.line)
		}

		for _, chain := range found[i].chains {
			s.emit(index(r), r, cmdDelChain+chain)
		}
	}
}

// left is what of rules the script has not deleted, nor the chain that they are in.
func (s *script) left(rules []savedRule) []savedRule {
	return slices.DeleteFunc(slices.Clone(rules), func(r savedRule) bool {
		return s.deleted[r.line] || s.gone[rowOfChain(r.chain)]
	})
}

// sweep takes out the range chains that lead to nothing any more, and jumps to others
// that no row needs.
func (s *script) sweep(t *savedTable) {
	for again := true; again; {
		again = false

		for chain := range s.state.shared {
			rules, ok := t.chains[chain]
			if n, there := s.users(chain); !ok || n > 0 || !there || len(s.left(rules)) > 0 {
				continue
			}

			for _, j := range s.left(t.jumps[chain]) {
				s.delete(shared, nil, j.line)
				s.uses[j.iptRule.String()] = -1
			}

			s.emit(shared, nil, cmdDelChain+chain)
			s.uses[chain], again = -1, true
		}
	}

	for chain := range s.state.shared {
		for _, j := range s.left(t.jumps[chain]) {
			if n, there := s.users(j.iptRule.String()); there && n == 0 {
				s.delete(shared, nil, j.line)
				s.uses[j.iptRule.String()] = -1
			}
		}
	}
}
