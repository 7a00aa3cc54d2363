package hostport

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cri-o/hostport/internal/nfnetlink"
	"github.com/cri-o/hostport/internal/nftables"
	"github.com/cri-o/hostport/internal/nodeaddr"
	"github.com/cri-o/hostport/internal/row"
	"github.com/cri-o/hostport/internal/testbed"
)

// Addresses that come and go, pods that die without a word, and the flows of those who
// send meanwhile: a part of the suite of faults.

// way is how the node has an address. It may have one in several ways.
type way uint8

const (
	ofInterface way = 1 << iota
	byRoute         // alone
	ofService       // on kube-ipvs0

	own = ofInterface | byRoute
)

// traffic is what goes on between the steps, and what is known of it.
type traffic struct {
	has     map[netip.Addr]way  // of the addresses that come and go
	changed map[netip.Addr]bool // in this step
	toggled []string            // the last of them, for whoever looks for a bug
	silent  [2]bool             // pods that have died without a word
	streams []*stream
	dialers chan struct{} // one for each connection that is being made
	dialing sync.WaitGroup
	clients []*client
	others  []*others
	// excused are flows that nobody can know of any more; see docs/limits.md.
	excused map[string]bool
}

// roaming are the addresses that come and go. The peer has them while the node does not.
func roaming(f IPFamily) []netip.Addr {
	return []netip.Addr{vip(f), vip(f).Next()}
}

// hostIPs are the addresses for which there may be rows, and at which is asked.
func (c *chaos) hostIPs(f IPFamily) []netip.Addr {
	return append(roaming(f), c.nodeIP(f), c.otherNodeIP(f))
}

func pick[T any](c *chaos, list []T) T { return list[c.random.IntN(len(list))] }

func (c *chaos) family() IPFamily { return pick(c, []IPFamily{IPv4, IPv6}) }

// setUpTraffic makes what is there whatever happens.
func (c *chaos) setUpTraffic() {
	c.traffic = traffic{
		has: map[netip.Addr]way{}, changed: map[netip.Addr]bool{},
		dialers: make(chan struct{}, 4), excused: map[string]bool{},
	}

	require.NoError(c.t, c.Host.AddDevice(nodeaddr.ServiceDevice, false))

	for _, f := range []IPFamily{IPv4, IPv6} {
		for _, ip := range roaming(f) {
			require.NoError(c.t, c.Peer.AddAddress("eth0", row.HostPrefix(ip)))
		}

		c.routeToPeer(f)
		c.addOthers(f)

		for _, from := range []*testbed.Namespace{c.Client, c.Host, c.Pods[0].Namespace} {
			c.streams = append(c.streams, c.stream(from, f))
		}
	}

	c.commandWith(foreignRules(nil), "nft", "-f", "-")
	c.t.Cleanup(c.dialing.Wait)
}

func (c *chaos) routeToPeer(f IPFamily) {
	for _, ip := range roaming(f) {
		require.NoError(c.t, c.Host.AddRoute(row.HostPrefix(ip), c.PeerIP(f == IPv6)))
	}
}

// stream sends from one port to several, and never pauses.
type stream struct {
	family IPFamily
	to     atomic.Pointer[[]row.Endpoint]
}

// streamPort is where streams come from.
const streamPort = 40_000

func (c *chaos) stream(from *testbed.Namespace, f IPFamily) *stream {
	s := &stream{family: f}
	s.to.Store(&[]row.Endpoint{})

	var datagrams net.PacketConn

	require.NoError(c.t, from.Do(func() (err error) {
		datagrams, err = (&net.ListenConfig{}).ListenPacket(c.t.Context(), "udp"+string(f), fmt.Sprintf(":%d", streamPort))

		return err
	}))

	raw := rawSCTP(c.t, from, f)
	done := make(chan struct{})
	ctx, stop := context.WithCancel(context.Background())

	go func() {
		defer close(done)

		for tick := time.NewTicker(10 * time.Millisecond); ctx.Err() == nil; {
			for _, to := range *s.to.Load() {
				if to.Proto == row.UDP {
					_, _ = datagrams.WriteTo([]byte("hello\n"), net.UDPAddrFromAddrPort(netip.AddrPortFrom(to.IP, to.Port)))
				} else {
					_ = unix.Sendto(raw, sctpInit(streamPort, to.Port), 0, sockaddrOf(to.IP, 0))
				}
			}

			select {
			case <-ctx.Done():
			case <-tick.C:
			}
		}
	}()

	c.t.Cleanup(func() {
		stop()
		<-done
		assert.NoError(c.t, datagrams.Close())
		assert.NoError(c.t, unix.Close(raw))
	})

	return s
}

// client is a TCP connection to a row's port.
type client struct {
	*connection

	family IPFamily
	owner  string
	at     row.Endpoint // of the row
	ip     netip.Addr
	pod    netip.AddrPort
}

// others are flows that are none of the manager's, to the number of a host port.
type others struct {
	family IPFamily
	conns  []*connection
	to     []netip.AddrPort
	before []string
}

// What others have for themselves. No row leads to foreignPodPort.
const (
	foreignPort    = firstPort + 3
	foreignPodPort = 81
	foreignSource  = 41_000
)

// foreignRules are a ruleset of others, which translates what is for some addresses. It
// makes the kernel track and translate whatever becomes of ours.
func foreignRules(to map[IPFamily]netip.Addr) string {
	var b strings.Builder

	for f, addrs := range map[IPFamily][2]string{IPv4: {"ip", "198.51.100.2"}, IPv6: {"ip6", "2001:db8:2::2"}} {
		ip := to[f]
		if !ip.IsValid() {
			ip = serviceIP(f, 1)
		}

		fmt.Fprintf(&b, `add table %[1]s others
			delete table %[1]s others
			add table %[1]s others
			add chain %[1]s others prerouting { type nat hook prerouting priority -150; }
			add rule %[1]s others prerouting %[1]s daddr %[2]s meta l4proto { tcp, udp } th dport %[3]d dnat %[1]s to %[4]s
			`, addrs[0], ip, foreignPort, netip.AddrPortFrom(netip.MustParseAddr(addrs[1]), foreignPodPort))
	}

	return b.String()
}

// addOthers has others begin their flows: to the peer, and by a translation to it.
func (c *chaos) addOthers(f IPFamily) {
	c.commandWith(foreignRules(map[IPFamily]netip.Addr{f: c.nodeIP(f)}), "nft", "-f", "-")

	peer := c.PeerIP(f == IPv6)
	o := &others{family: f, to: []netip.AddrPort{netip.AddrPortFrom(peer, foreignPort), netip.AddrPortFrom(c.nodeIP(f), foreignPort)}}

	for _, port := range []uint16{foreignPort, foreignPodPort} {
		for _, network := range []string{"tcp", "udp"} {
			_, err := c.Peer.Serve(network, netip.AddrPortFrom(peer, port))
			require.NoError(c.t, err)
		}
	}

	for _, to := range o.to {
		o.conns = append(o.conns, c.connect(c.t, to))
	}

	c.ask(o)
	o.before = c.flowsOf(o)
	require.Len(c.t, o.before, 4)

	c.others = append(c.others, o)
}

// ask has the others' flows carry something.
func (c *chaos) ask(o *others) {
	for i, to := range o.to {
		assert.Equal(c.t, "peer", o.conns[i].asks())

		ctx, cancel := context.WithTimeout(c.t.Context(), patience)
		from := netip.AddrPortFrom(c.ClientIP(o.family == IPv6), foreignSource)

		a, err := c.Client.AskFrom(ctx, "udp", from, to)
		if assert.NoError(c.t, err) {
			assert.Equal(c.t, "peer", a.From)
		}

		cancel()
	}
}

func (c *chaos) flowsOf(o *others) []string {
	var list []string

	for _, flow := range c.flows(o.family) {
		if slices.Contains(o.to, flow.Destination) && flow.Responder.Addr() == c.PeerIP(o.family == IPv6) {
			list = append(list, fmt.Sprint(flow))
		}
	}

	return slices.Sorted(slices.Values(list))
}

// isOthers reports whether a flow leads where no row ever did: whatever leads to the
// peer, or where somebody's element of our maps has led.
func (c *chaos) isOthers(flow nfnetlink.Flow) bool {
	to := flow.Responder

	return to.Addr() == c.PeerIP(to.Addr().Is6()) || flow.Translated && to.Port() == foreignPodPort
}

func (c *chaos) flows(f IPFamily) []nfnetlink.Flow {
	list, err := c.reader().Flows(c.t.Context(), nftables.NewLayout(f).Table.Family, 0, 0)
	require.NoError(c.t, err)

	return list
}

// flushRuleset does so, and loads what others have, as a firewall does.
func (c *chaos) flushRuleset() {
	c.commandWith("flush ruleset\n"+foreignRules(nil), "nft", "-f", "-")
	c.hintAgain()
}

// allMoves are the ways in which things come and go.
func (c *chaos) allMoves() map[string]func() {
	ip, how := c.roamer(), pick(c, []way{ofInterface, byRoute, ofService})

	return map[string]func(){
		"address": func() { c.toggle(ip, how) },
		"address twice": func() {
			c.toggle(ip, how)
			c.begin(ip)
			c.toggle(ip, how)
		},
		"pod dies, or is back": func() {
			if i := c.random.IntN(len(c.silent)); c.silent[i] {
				c.revive(i)
			} else {
				c.silence(i)
				c.silent[i] = true
			}
		},
	}
}

// roamer is an address that comes or goes, to which somebody sends if there is one.
func (c *chaos) roamer() netip.Addr {
	s := pick(c, c.streams)
	ips := roaming(s.family)

	for _, to := range *s.to.Load() {
		if slices.Contains(ips, to.IP) {
			return to.IP
		}
	}

	return pick(c, ips)
}

// begin has a client begin a flow to each UDP row of an address: what is sent all the time
// goes on as it began.
func (c *chaos) begin(ip netip.Addr) {
	for _, r := range c.allRows(row.FamilyOf(ip)) {
		if r.Proto != row.UDP || !r.Overlaps(row.Endpoint{IP: ip}) {
			continue
		}

		require.NoError(c.t, c.Client.Do(func() error {
			conn, err := (&net.Dialer{}).DialContext(c.t.Context(), "udp", netip.AddrPortFrom(ip, r.Port).String())
			if err != nil {
				return err
			}

			_, err = conn.Write([]byte("hello\n"))

			return errors.Join(err, conn.Close())
		}))
	}
}

// someToggled is how many are remembered.
const someToggled = 20

// toggle has the node get an address in some way, or lose it.
func (c *chaos) toggle(ip netip.Addr, how way) {
	// A route stands beside no other.
	if had := c.has[ip]; had&byRoute != 0 || had != 0 && how == byRoute {
		how = had & -had
	}

	device, prefix := "eth1", row.HostPrefix(ip)
	come, goes := c.Host.AddAddress, c.Host.RemoveAddress

	switch how {
	case byRoute:
		come, goes = c.Host.AddLocalRoute, c.Host.RemoveLocalRoute
	case ofService:
		device = nodeaddr.ServiceDevice
		come = func(string, netip.Prefix) error {
			c.assignService(ip)

			return nil
		}
	default:
	}

	c.changed[ip] = true
	c.has[ip] ^= how
	c.toggled = append(c.toggled, fmt.Sprintf("%s %v -> %03b", time.Now().Format("05.000"), ip, c.has[ip]))
	c.toggled = c.toggled[max(0, len(c.toggled)-someToggled):]

	if c.has[ip]&how == 0 {
		require.NoError(c.t, goes(device, prefix))
	} else {
		require.NoError(c.t, come(device, prefix))
	}
}

// revive takes back what silence does.
func (c *chaos) revive(i int) {
	require.NoError(c.t, c.Pods[i].Do(func() error {
		_, err := execute(c.t, "delete table inet dead", "nft", "-f", "-")

		return err
	}))

	c.silent[i] = false
}

// lostAddresses notes that the node has lost the addresses of IPv6.
func (c *chaos) lostAddresses() {
	for _, ip := range c.hostIPs(IPv6) {
		c.changed[ip] = true
		delete(c.has, ip)
	}

	c.routeToPeer(IPv6)
}

func (c *chaos) isNodes(ip netip.Addr) bool {
	return c.has[ip]&own != 0 || !slices.Contains(roaming(row.FamilyOf(ip)), ip)
}

// leads reports whether packets to an address meet the rows.
func (c *chaos) leads(ip netip.Addr) bool {
	return c.isNodes(ip) || c.variant != viaNFTables && c.has[ip] == ofService
}

// services are the addresses of a family that belong to Services alone.
func (c *chaos) services(f IPFamily) (list []netip.Addr) {
	for _, ip := range roaming(f) {
		if c.has[ip] == ofService {
			list = append(list, ip)
		}
	}

	return list
}

// allRows are the model's of a family, in an order.
func (c *chaos) allRows(f IPFamily) (rows []*row.Row) {
	for _, id := range slices.Sorted(maps.Keys(c.model)) {
		for _, r := range c.model[id] {
			if r.Family() == f {
				rows = append(rows, r)
			}
		}
	}

	return rows
}

// rowAt is the row for packets to a port of an address, and which others there are.
func (c *chaos) rowsAt(to row.Endpoint) (by *row.Row, all []*row.Row) {
	for _, r := range c.allRows(row.FamilyOf(to.IP)) {
		if r.PortKey == to.PortKey && r.Overlaps(to) {
			all = append(all, r)

			if by == nil || r.IP.IsValid() {
				by = r
			}
		}
	}

	return by, all
}

// podOf is the number of the pod that has an address.
func (c *chaos) podOf(ip netip.Addr) int {
	return slices.IndexFunc(c.Pods, func(p *testbed.Pod) bool { return p.IPv4 == ip || p.IPv6 == ip })
}

// goOn changes where some of the streams go, and has clients connect.
func (c *chaos) goOn() {
	clear(c.changed)

	for range 2 {
		const some = 4

		s := pick(c, c.streams)
		to := append(slices.Clone(*s.to.Load()), row.Endpoint{
			PortKey: row.PortKey{Proto: pick(c, []row.Protocol{row.UDP, row.UDP, row.SCTP}), Port: uint16(firstPort + c.random.IntN(somePorts))}, IP: pick(c, c.hostIPs(s.family)),
		})

		if r := c.anyRow(s.family); r != nil && r.Proto != row.TCP {
			to[len(to)-1].PortKey = r.PortKey
		}

		to = to[max(0, len(to)-some):]
		s.to.Store(&to)
	}

	for _, f := range []IPFamily{IPv4, IPv6} {
		if r := c.anyRow(f); r != nil && r.Proto == row.TCP {
			c.dial(r)
		}
	}
}

// dial has a client connect to a row, at one of its addresses.
func (c *chaos) dial(r *row.Row) {
	const some = 12

	f := r.Family()
	ips := slices.DeleteFunc(c.hostIPs(f), func(ip netip.Addr) bool {
		by, _ := c.rowsAt(row.Endpoint{PortKey: r.PortKey, IP: ip})

		return by != r || !c.leads(ip)
	})

	if len(ips) == 0 {
		return
	}

	ip, pod := pick(c, ips), c.podOf(r.Pod.Addr())
	to := netip.AddrPortFrom(ip, r.Port)

	if !c.silent[pod] {
		if len(c.clients) < some {
			k := &client{connection: c.connect(c.t, to), family: f, owner: r.Owner.ID, at: r.Endpoint, ip: ip, pod: r.Pod}
			assert.Equal(c.t, c.Pods[pod].Name, k.asks())

			c.clients = append(c.clients, k)
		}

		return
	}

	select {
	case c.dialers <- struct{}{}:
		c.dialing.Go(func() { // whoever answers, in some seconds
			_, _ = c.Client.Ask(c.t.Context(), "tcp", to) // which ends before the test's cleanup
			<-c.dialers
		})
	default:
	}
}

// forget closes the clients' connections of which nobody knows any more what becomes.
func (c *chaos) forget(unknown func(*client) bool) {
	c.clients = slices.DeleteFunc(c.clients, func(k *client) bool {
		if !unknown(k) {
			return false
		}

		_ = k.Close()

		return true
	})
}

// checkClients asks at the connections of rows that stand, and has those of the others
// end.
func (c *chaos) checkClients() {
	c.forget(func(k *client) bool {
		by, all := c.rowsAt(row.Endpoint{PortKey: k.at.PortKey, IP: k.ip})
		led := slices.ContainsFunc(all, func(r *row.Row) bool { return r.HasLedTo(k.pod) })
		mine := slices.ContainsFunc(all, func(r *row.Row) bool { return r.Endpoint == k.at && r.Owner.ID == k.owner && r.HasLedTo(k.pod) })

		switch {
		case !led || !c.leads(k.ip):
			if by == nil || !c.leads(k.ip) || !c.silent[c.podOf(by.Pod.Addr())] { // who resets it
				k.isReset()
			}

			return true
		case mine && !c.changed[k.ip]:
			if pod := c.podOf(k.pod.Addr()); !c.silent[pod] {
				assert.Equal(c.t, c.Pods[pod].Name, k.asks())
			}

			return false
		default:
			return true
		}
	})
}

// staleFlows are those that do not go where they would if they began now.
func (c *chaos) staleFlows(f IPFamily) (list []string) {
	for _, flow := range c.flows(f) {
		if why := c.stale(flow); why != "" && !c.excused[fmt.Sprint(flow)] {
			list = append(list, fmt.Sprintf("flow %v: %s", flow, why))
		}
	}

	return list
}

// stale says what is wrong with a flow, if anything. A connection goes on to where a row
// led before it was moved.
func (c *chaos) stale(flow nfnetlink.Flow) string {
	to := row.Endpoint{PortKey: row.PortKey{Proto: row.ProtocolOf(flow.Protocol), Port: flow.Destination.Port()}, IP: flow.Destination.Addr()}
	if to.Port < firstPort || to.Port >= firstPort+somePorts || c.isOthers(flow) {
		return ""
	}

	by, all := c.rowsAt(to)
	from := flow.Source.Addr()
	translates := from.Is4() || !from.IsLinkLocalUnicast() && !from.IsLoopback() // which the host takes while it has no other

	switch {
	case !flow.Translated && translates && to.Proto != row.TCP && c.isNodes(to.IP) && by != nil:
		return "not to " + by.String()
	case !flow.Translated:
		return ""
	case !c.leads(to.IP):
		return "not to an address of the node"
	case by == nil:
		return "no row"
	case to.Proto == row.UDP && by.Pod != flow.Responder,
		!slices.ContainsFunc(all, func(r *row.Row) bool { return r.HasLedTo(flow.Responder) }):
		return "not by " + by.String()
	default:
		return ""
	}
}

// changedServices compares the set of Services' addresses.
func (c *chaos) changedServices(f IPFamily) []string {
	if c.variant != viaNFTables || len(c.allRows(f)) == 0 {
		return nil
	}

	msgs, err := c.reader().Dump(c.t.Context(), nftables.NewLayout(f).Table.Elements(nftables.Services))
	require.NoError(c.t, err)

	have := map[netip.Addr]bool{}

	for _, m := range msgs {
		list, err := nfnetlink.ParseElements(m)
		require.NoError(c.t, err)

		for _, e := range list {
			ip, _ := netip.AddrFromSlice(e.Key)
			have[ip] = true
		}
	}

	want := map[netip.Addr]bool{}
	for _, ip := range c.services(f) {
		want[ip] = true
	}

	if maps.Equal(want, have) {
		return nil
	}

	return []string{fmt.Sprintf("services %v, want %v", have, want)}
}

// excuse notes what a new process cannot know of the flows that were there while there
// was none: that an address has come or gone, what rows led to before they were moved, and
// what unknown rows led to, which it has not found.
func (c *chaos) excuse(flows []nfnetlink.Flow, before, unknown []*row.Row) {
	led := func(to row.Endpoint, pod netip.AddrPort) (moved, left bool) {
		covers := func(r *row.Row) bool { return r.PortKey == to.PortKey && r.Overlaps(to) }
		moved = slices.ContainsFunc(before, func(r *row.Row) bool { return covers(r) && slices.Contains(r.Former, pod) })
		left = slices.ContainsFunc(unknown, func(r *row.Row) bool { return covers(r) && r.HasLedTo(pod) })

		return moved, left
	}

	for _, flow := range flows {
		to := row.Endpoint{PortKey: row.PortKey{Proto: row.ProtocolOf(flow.Protocol), Port: flow.Destination.Port()}, IP: flow.Destination.Addr()}
		if moved, left := led(to, flow.Responder); moved || (left || c.changed[to.IP]) && c.stale(flow) != "" {
			c.excused[fmt.Sprint(flow)] = true
		}
	}

	c.forget(func(k *client) bool {
		moved, left := led(row.Endpoint{PortKey: k.at.PortKey, IP: k.ip}, k.pod)

		return c.changed[k.ip] || moved || left
	})

	for _, rows := range c.model {
		for _, r := range rows {
			r.Former = nil
		}
	}
}

// checkOthers compares the flows of others with what they were.
func (c *chaos) checkOthers() {
	for _, o := range c.others {
		assert.Equal(c.t, o.before, c.flowsOf(o))
		c.ask(o)
	}
}
