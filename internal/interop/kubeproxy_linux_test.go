package interop

import (
	"fmt"
	"net/netip"
	"os/exec"
	"strings"

	"github.com/stretchr/testify/require"
	"sigs.k8s.io/knftables"
)

// kubeProxy stands in for kube-proxy on a node: it writes what kube-proxy writes
// for one Service, whose endpoint is the node's other pod. Its node port, TCP and
// UDP, is nodePort, and its external IP is the node's other address, with TCP port
// externalPort.
type kubeProxy string

// The forms, by the program that makes them.
const (
	proxyNFTables       kubeProxy = "nft"
	proxyIPTablesNFT    kubeProxy = "iptables-nft"
	proxyIPTablesLegacy kubeProxy = "iptables-legacy"
)

const (
	nodePort     = 30080
	externalPort = 8443
)

func (n *node) startKubeProxy(form kubeProxy) {
	n.t.Helper()

	for _, f := range families() {
		if form == proxyNFTables {
			n.command(kubeProxyNFTables(n, f), "nft", "-f", "-")

			continue
		}

		program := strings.Replace(string(form), "iptables", map[knftables.Family]string{"ip": "iptables", "ip6": "ip6tables"}[f], 1)

		n.command(kubeProxyIPTables(n, f), program+"-restore", "--noflush")

		// kube-proxy puts its jumps at the head of a chain, that for masquerading too.
		n.command("", program, "-w", "-t", "nat", "-I", "OUTPUT",
			"-m", "comment", "--comment", "kubernetes service portals", "-j", "KUBE-SERVICES")
		n.command("", program, "-w", "-t", "nat", "-I", "PREROUTING",
			"-m", "comment", "--comment", "kubernetes service portals", "-j", "KUBE-SERVICES")
		n.command("", program, "-w", "-t", "nat", "-I", "POSTROUTING",
			"-m", "comment", "--comment", "kubernetes postrouting rules", "-j", "KUBE-POSTROUTING")
	}
}

// command runs a program on the host.
func (n *node) command(stdin, name string, args ...string) {
	n.t.Helper()

	n.do(func() {
		cmd := exec.CommandContext(n.t.Context(), name, args...)
		cmd.Stdin = strings.NewReader(stdin)

		out, err := cmd.CombinedOutput()
		require.NoError(n.t, err, "%s %v: %s", name, args, out)
	})
}

// clusterIP is the Service's.
func clusterIP(f knftables.Family) netip.Addr {
	return netip.MustParseAddr(map[knftables.Family]string{"ip": "10.96.0.10", "ip6": "fd00:10:96::a"}[f])
}

func podNetwork(f knftables.Family) string {
	return map[knftables.Family]string{"ip": "10.88.0.0/16", "ip6": "fd00:10:88::/64"}[f]
}

// kubeProxyNFTables is kube-proxy's table: verdict maps lead to a chain of the
// Service, and that to one of each endpoint.
func kubeProxyNFTables(n *node, f knftables.Family) string {
	var b strings.Builder

	write := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	ip, addr := string(f), map[knftables.Family]string{"ip": "ipv4_addr", "ip6": "ipv6_addr"}[f]

	write("table %s kube-proxy {", ip)
	write(`comment "rules for kube-proxy"`)
	write(`set cluster-ips { type %s; comment "Active ClusterIPs"; elements = { %s }; }`, addr, clusterIP(f))
	write(`set nodeport-ips { type %s; comment "IPs that accept NodePort traffic"; elements = { %s }; }`, addr, n.NodeIP(isV6(f)))
	write("map no-endpoint-services { type %s . inet_proto . inet_service : verdict; }", addr)
	write("map no-endpoint-nodeports { type inet_proto . inet_service : verdict; }")
	write("map firewall-ips { type %s . inet_proto . inet_service : verdict; }", addr)

	var ips, nodePorts []string

	for _, s := range []struct {
		proto, name string
		external    bool
	}{{"tcp", "http", true}, {"udp", "dns", false}} {
		var (
			service  = "service-ULMVA6XW-default/svc/" + s.proto + "/" + s.name
			external = "external-ULMVA6XW-default/svc/" + s.proto + "/" + s.name
			endpoint = "endpoint-5OJB2KTY-default/svc/" + s.proto + "/" + s.name + "__" +
				strings.ReplaceAll(n.podIP(other, f).String(), ":", ".") + "/80"
			pod = n.podIP(other, f)
		)

		write("chain %s { %s saddr %s jump mark-for-masquerade; meta l4proto %s dnat to %s; }",
			endpoint, ip, pod, s.proto, netip.AddrPortFrom(pod, 80))
		write("chain %s { %s daddr %s %s dport %d %s saddr != %s jump mark-for-masquerade; numgen random mod 1 vmap { 0 : goto %s }; }",
			service, ip, clusterIP(f), s.proto, externalPort, ip, podNetwork(f), endpoint)
		write("chain %s { jump mark-for-masquerade; goto %s; }", external, service)

		ips = append(ips, fmt.Sprintf("%s . %s . %d : goto %s", clusterIP(f), s.proto, externalPort, service))
		nodePorts = append(nodePorts, fmt.Sprintf("%s . %d : goto %s", s.proto, nodePort, external))

		if s.external {
			ips = append(ips, fmt.Sprintf("%s . %s . %d : goto %s", n.OtherNodeIP(isV6(f)), s.proto, externalPort, external))
		}
	}

	write(`map service-ips { type %s . inet_proto . inet_service : verdict; comment "ClusterIP, ExternalIP and LoadBalancer IP traffic"; elements = { %s }; }`,
		addr, strings.Join(ips, ", "))
	write(`map service-nodeports { type inet_proto . inet_service : verdict; comment "NodePort traffic"; elements = { %s }; }`,
		strings.Join(nodePorts, ", "))
	write("chain mark-for-masquerade { mark set mark or 0x4000; }")
	write("chain masquerading { mark and 0x4000 == 0 return; mark set mark xor 0x4000; masquerade fully-random; }")
	write("chain services {")
	write("%s daddr . meta l4proto . th dport vmap @service-ips", ip)
	write("%s daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports", ip)
	write("}")
	write("chain service-endpoints-check { %s daddr . meta l4proto . th dport vmap @no-endpoint-services; }", ip)
	write("chain nodeport-endpoints-check { %s daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports; }", ip)
	write("chain firewall-check { %s daddr . meta l4proto . th dport vmap @firewall-ips; }", ip)

	for _, c := range []struct{ kind, hook, priority, rules string }{
		{"filter", "prerouting", "-110", "ct state new jump firewall-check"},
		{"filter", "input", "-110", "ct state new jump nodeport-endpoints-check; ct state new jump service-endpoints-check"},
		{"filter", "forward", "-110", "ct state new jump service-endpoints-check"},
		{"filter", "output", "-110", "ct state new jump service-endpoints-check; ct state new jump firewall-check"},
		{"nat", "output", "-100", "jump services"},
		{"nat", "prerouting", "-100", "jump services"},
		{"nat", "postrouting", "100", "jump masquerading"},
	} {
		write("chain %s-%s { type %s hook %s priority %s; %s; }", c.kind, c.hook, c.kind, c.hook, c.priority, c.rules)
	}

	write("}")

	return b.String()
}

// kubeProxyIPTables is kube-proxy's part of the nat table, without the jumps from
// the built-in chains.
func kubeProxyIPTables(n *node, f knftables.Family) string {
	var chains, rules strings.Builder

	write := func(format string, args ...any) { fmt.Fprintf(&rules, format+"\n", args...) }
	loopback := map[knftables.Family]string{"ip": "127.0.0.0/8", "ip6": "::1/128"}[f]

	for _, chain := range []string{
		"KUBE-SERVICES", "KUBE-NODEPORTS", "KUBE-POSTROUTING", "KUBE-MARK-MASQ", "KUBE-PROXY-CANARY",
		"KUBE-EXT-XPGD46QRK7WJZT7O", "KUBE-SVC-XPGD46QRK7WJZT7O", "KUBE-SEP-SXIVWICOYRO3J4NJ",
		"KUBE-EXT-GNZBNJ2PO5MGZ6GT", "KUBE-SVC-GNZBNJ2PO5MGZ6GT", "KUBE-SEP-RS4RBKLTHTF2IUXJ",
	} {
		fmt.Fprintf(&chains, ":%s - [0:0]\n", chain)
	}

	write("-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN")
	write("-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000")
	write(`-A KUBE-POSTROUTING -m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE --random-fully`)
	write("-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000")

	for _, s := range []struct{ proto, name, service, endpoint string }{
		{"tcp", "http", "XPGD46QRK7WJZT7O", "SXIVWICOYRO3J4NJ"},
		{"udp", "dns", "GNZBNJ2PO5MGZ6GT", "RS4RBKLTHTF2IUXJ"},
	} {
		name, pod := "default/svc:"+s.name, n.podIP(other, f)

		write("-A KUBE-NODEPORTS -m comment --comment %s -m %s -p %[2]s --dport %d -j KUBE-EXT-%s", name, s.proto, nodePort, s.service)
		write(`-A KUBE-SERVICES -m comment --comment "%s cluster IP" -m %s -p %[2]s -d %s --dport %d -j KUBE-SVC-%s`,
			name, s.proto, clusterIP(f), externalPort, s.service)

		if s.proto == "tcp" {
			write(`-A KUBE-SERVICES -m comment --comment "%s external IP" -m %s -p %[2]s -d %s --dport %d -j KUBE-EXT-%s`,
				name, s.proto, n.OtherNodeIP(isV6(f)), externalPort, s.service)
		}

		write(`-A KUBE-EXT-%s -m comment --comment "masquerade traffic for %s external destinations" -j KUBE-MARK-MASQ`, s.service, name)
		write("-A KUBE-EXT-%s -j KUBE-SVC-%[1]s", s.service)
		write(`-A KUBE-SVC-%s -m comment --comment "%s cluster IP" -m %s -p %[3]s -d %s --dport %d ! -s %s -j KUBE-MARK-MASQ`,
			s.service, name, s.proto, clusterIP(f), externalPort, podNetwork(f))
		write(`-A KUBE-SVC-%s -m comment --comment "%s -> %s" -j KUBE-SEP-%s`, s.service, name, netip.AddrPortFrom(pod, 80), s.endpoint)
		write("-A KUBE-SEP-%s -m comment --comment %s -s %s -j KUBE-MARK-MASQ", s.endpoint, name, pod)
		write("-A KUBE-SEP-%s -m comment --comment %s -m %s -p %[3]s -j DNAT --to-destination %s", s.endpoint, name, s.proto, netip.AddrPortFrom(pod, 80))
	}

	// IPv6 has no localhost node ports.
	write(`-A KUBE-SERVICES -m comment --comment "kubernetes service nodeports; NOTE: this must be the last rule in this chain" %s-m addrtype --dst-type LOCAL -j KUBE-NODEPORTS`,
		map[bool]string{true: "! -d " + loopback + " "}[isV6(f)])

	return "*nat\n" + chains.String() + rules.String() + "COMMIT\n"
}
