package hostport

import (
	"encoding/json"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	v1 "k8s.io/api/core/v1"

	"github.com/cri-o/hostport/internal/row"
)

// podAt is a pod with host ports, for tests.
func podAt(ip string, mappings ...*PortMapping) *PodPortMapping {
	return &PodPortMapping{Namespace: "ns", Name: "pod", IP: net.ParseIP(ip), PortMappings: mappings}
}

func TestRowsOf(t *testing.T) {
	t.Parallel()

	const v4, v6 = "10.88.0.5", "fd00::5"

	for _, tc := range []struct {
		name string
		pod  *PodPortMapping
		want []string
	}{
		{name: "nil"},
		{name: "host network", pod: &PodPortMapping{HostNetwork: true, PortMappings: []*PortMapping{{HostPort: -1}}}},
		{name: "no mappings, no IP", pod: &PodPortMapping{}},
		{name: "no host port, no IP", pod: podAt("", &PortMapping{ContainerPort: 80}, nil)},
		{name: "host port 0 is skipped whatever else it says", pod: podAt(v4, &PortMapping{ContainerPort: -1, Protocol: "X"})},
		{
			name: "protocols in any case",
			pod: podAt(v4,
				&PortMapping{HostPort: 1, ContainerPort: 65535},
				&PortMapping{HostPort: 1, ContainerPort: 2, Protocol: "udp"},
				&PortMapping{HostPort: 1, ContainerPort: 3, Protocol: v1.ProtocolSCTP}),
			want: []string{
				"TCP 0.0.0.0:1 -> 10.88.0.5:65535", "UDP 0.0.0.0:1 -> 10.88.0.5:2", "SCTP 0.0.0.0:1 -> 10.88.0.5:3",
			},
		},
		{
			name: "host IPs of IPv4",
			pod: podAt(v4,
				&PortMapping{HostPort: 1, ContainerPort: 1},
				&PortMapping{HostPort: 2, ContainerPort: 2, HostIP: "0.0.0.0"},
				&PortMapping{HostPort: 3, ContainerPort: 3, HostIP: "192.0.2.1"},
				&PortMapping{HostPort: 4, ContainerPort: 4, HostIP: "::ffff:192.0.2.1"},
				&PortMapping{HostPort: 5, ContainerPort: 5, HostIP: "::"},
				&PortMapping{HostPort: 6, ContainerPort: 6, HostIP: "2001:db8::1"}),
			want: []string{
				"TCP 0.0.0.0:1 -> 10.88.0.5:1", "TCP 0.0.0.0:2 -> 10.88.0.5:2",
				"TCP 192.0.2.1:3 -> 10.88.0.5:3", "TCP 192.0.2.1:4 -> 10.88.0.5:4",
			},
		},
		{
			name: "host IPs of IPv6",
			pod: podAt(v6,
				&PortMapping{HostPort: 1, ContainerPort: 1},
				&PortMapping{HostPort: 2, ContainerPort: 2, HostIP: "0.0.0.0"},
				&PortMapping{HostPort: 3, ContainerPort: 3, HostIP: "::"},
				&PortMapping{HostPort: 4, ContainerPort: 4, HostIP: "2001:DB8:0::1"}),
			want: []string{
				"TCP [::]:1 -> [fd00::5]:1", "TCP [::]:3 -> [fd00::5]:3", "TCP [2001:db8::1]:4 -> [fd00::5]:4",
			},
		},
		{
			name: "host IPs that are unusual",
			pod: podAt("169.254.1.1",
				&PortMapping{HostPort: 1, ContainerPort: 1, HostIP: "169.254.7.7"},
				&PortMapping{HostPort: 2, ContainerPort: 2, HostIP: "127.0.0.1"},
				&PortMapping{HostPort: 3, ContainerPort: 3, HostIP: "::ffff:0.0.0.0"},
				&PortMapping{HostPort: 4, ContainerPort: 4, HostIP: "1.0.0.0"},
				&PortMapping{HostPort: 5, ContainerPort: 5, HostIP: "223.255.255.255"}),
			want: []string{
				"TCP 169.254.7.7:1 -> 169.254.1.1:1", "TCP 127.0.0.1:2 -> 169.254.1.1:2", "TCP 0.0.0.0:3 -> 169.254.1.1:3",
				"TCP 1.0.0.0:4 -> 169.254.1.1:4", "TCP 223.255.255.255:5 -> 169.254.1.1:5",
			},
		},
		{
			name: "host IPs of IPv6 that are unusual",
			pod: podAt("fec0::5",
				&PortMapping{HostPort: 1, ContainerPort: 1, HostIP: "fe80::1"},
				&PortMapping{HostPort: 2, ContainerPort: 2, HostIP: "::1"},
				&PortMapping{HostPort: 3, ContainerPort: 3, HostIP: "::192.0.2.1"}),
			want: []string{"TCP [fe80::1]:1 -> [fec0::5]:1", "TCP [::1]:2 -> [fec0::5]:2", "TCP [::c000:201]:3 -> [fec0::5]:3"},
		},
		{
			name: "the same row twice",
			pod: podAt(v4,
				&PortMapping{HostPort: 1, ContainerPort: 1},
				&PortMapping{HostPort: 1, ContainerPort: 1, Protocol: "tcp", HostIP: "0.0.0.0"}),
			want: []string{"TCP 0.0.0.0:1 -> 10.88.0.5:1"},
		},
		{
			name: "a port on any address and on one",
			pod: podAt(v4,
				&PortMapping{HostPort: 1, ContainerPort: 1},
				&PortMapping{HostPort: 1, ContainerPort: 2, HostIP: "192.0.2.1"}),
			want: []string{"TCP 0.0.0.0:1 -> 10.88.0.5:1", "TCP 192.0.2.1:1 -> 10.88.0.5:2"},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()

			rows, err := rowsOf("id", tc.pod)
			require.NoError(t, err)

			got := make([]string, 0, len(rows))
			for _, r := range rows {
				got = append(got, r.String())
			}

			assert.Equal(t, append([]string{}, tc.want...), got)
		})
	}
}

func TestRowsOfInvalid(t *testing.T) {
	t.Parallel()

	good := &PortMapping{HostPort: 80, ContainerPort: 80}
	hostIP := func(ip string) *PortMapping { return &PortMapping{HostPort: 81, ContainerPort: 1, HostIP: ip} }

	const (
		wantHost = `want an IP address that a node can have, without zone, or "", "0.0.0.0" or "::" for any`
		wantPod  = "want an IP address that a node can forward to"
	)

	for _, tc := range []struct {
		name string
		id   string
		pod  *PodPortMapping
		want string
	}{
		{
			"host port below range", "id", podAt("10.0.0.1", good, &PortMapping{HostPort: -1, ContainerPort: 1}),
			"row 1 (hostPort -1): hostPort -1: want 1 to 65535",
		},
		{
			"host port above range", "id", podAt("10.0.0.1", &PortMapping{HostPort: 70000, ContainerPort: 1}),
			"row 0 (hostPort 70000): hostPort 70000: want 1 to 65535",
		},
		{
			"container port 0", "id", podAt("10.0.0.1", &PortMapping{HostPort: 1}),
			"row 0 (hostPort 1): containerPort 0: want 1 to 65535",
		},
		{
			"container port below range", "id", podAt("10.0.0.1", &PortMapping{HostPort: 1, ContainerPort: -1}),
			"row 0 (hostPort 1): containerPort -1: want 1 to 65535",
		},
		{
			"container port above range", "id", podAt("10.0.0.1", &PortMapping{HostPort: 1, ContainerPort: 65536}),
			"row 0 (hostPort 1): containerPort 65536: want 1 to 65535",
		},
		{
			"protocol", "id", podAt("10.0.0.1", &PortMapping{HostPort: 1, ContainerPort: 1, Protocol: "ICMP"}),
			`row 0 (hostPort 1): protocol "ICMP": want TCP, UDP or SCTP`,
		},
		{"host name", "id", podAt("10.0.0.1", hostIP("localhost")), `row 0 (hostPort 81): hostIP "localhost": ` + wantHost},
		{"host IP with prefix", "id", podAt("10.0.0.1", hostIP("192.0.2.1/32")), `hostIP "192.0.2.1/32": ` + wantHost},
		{"host IP with zone", "id", podAt("fd00::1", hostIP("fe80::1%eth0")), `hostIP "fe80::1%eth0": ` + wantHost},
		{"multicast host IP", "id", podAt("10.0.0.1", hostIP("224.0.0.1")), `hostIP "224.0.0.1" (multicast): ` + wantHost},
		{"last multicast host IP", "id", podAt("10.0.0.1", hostIP("239.255.255.255")), `(multicast): ` + wantHost},
		{"mapped multicast host IP", "id", podAt("10.0.0.1", hostIP("::ffff:224.0.0.1")), `hostIP "::ffff:224.0.0.1" (multicast): ` + wantHost},
		{"multicast host IP in IPv6", "id", podAt("fd00::1", hostIP("ff02::1")), `hostIP "ff02::1" (multicast): ` + wantHost},
		{"broadcast host IP", "id", podAt("10.0.0.1", hostIP("255.255.255.255")), `hostIP "255.255.255.255" (broadcast): ` + wantHost},
		{"reserved host IP", "id", podAt("10.0.0.1", hostIP("240.0.0.1")), `hostIP "240.0.0.1" (of 240.0.0.0/4): ` + wantHost},
		{"host IP of this network", "id", podAt("10.0.0.1", hostIP("0.1.2.3")), `hostIP "0.1.2.3" (of 0.0.0.0/8): ` + wantHost},
		{"mapped host IP of this network", "id", podAt("10.0.0.1", hostIP("::ffff:0.0.0.1")), `(of 0.0.0.0/8): ` + wantHost},
		{
			"bad row of the other family", "id", podAt("10.0.0.1", good, &PortMapping{HostPort: 1, HostIP: "::"}),
			"row 1 (hostPort 1): containerPort 0: want 1 to 65535",
		},
		{"bad host IP of the other family", "id", podAt("10.0.0.1", good, hostIP("ff02::1")), `row 1 (hostPort 81): hostIP "ff02::1"`},
		{"no pod IP", "id", podAt("", good), `row 0 (hostPort 80): pod IP <nil> (missing): ` + wantPod},
		{"unspecified pod IP", "id", podAt("0.0.0.0", good), `pod IP 0.0.0.0 (unspecified): ` + wantPod},
		{"unspecified pod IP in IPv6", "id", podAt("::", good), `pod IP :: (unspecified): ` + wantPod},
		{"pod IP of this network", "id", podAt("0.1.2.3", good), `pod IP 0.1.2.3 (of 0.0.0.0/8): ` + wantPod},
		{"loopback pod IP", "id", podAt("127.0.0.1", good), `pod IP 127.0.0.1 (loopback): ` + wantPod},
		{"last loopback pod IP", "id", podAt("127.255.255.255", good), `pod IP 127.255.255.255 (loopback): ` + wantPod},
		{"loopback pod IP in IPv6", "id", podAt("::1", good), `pod IP ::1 (loopback): ` + wantPod},
		{"multicast pod IP", "id", podAt("224.0.0.1", good), `pod IP 224.0.0.1 (multicast): ` + wantPod},
		{"multicast pod IP in IPv6", "id", podAt("ff02::1", good), `pod IP ff02::1 (multicast): ` + wantPod},
		{"reserved pod IP", "id", podAt("240.0.0.1", good), `pod IP 240.0.0.1 (of 240.0.0.0/4): ` + wantPod},
		{"last reserved pod IP", "id", podAt("255.255.255.254", good), `pod IP 255.255.255.254 (of 240.0.0.0/4): ` + wantPod},
		{"broadcast pod IP", "id", podAt("255.255.255.255", good), `pod IP 255.255.255.255 (broadcast): ` + wantPod},
		{"link-local pod IP in IPv6", "id", podAt("fe80::1", good), `pod IP fe80::1 (link-local): ` + wantPod},
		{"last link-local pod IP in IPv6", "id", podAt("febf::1", good), `pod IP febf::1 (link-local): ` + wantPod},
		{
			"pod IP in four bytes", "id",
			&PodPortMapping{Namespace: "ns", Name: "pod", IP: net.IP{255, 255, 255, 255}, PortMappings: []*PortMapping{good}},
			"pod IP 255.255.255.255 (broadcast): " + wantPod,
		},
		{
			"pod IP of odd length", "id",
			&PodPortMapping{Namespace: "ns", Name: "pod", IP: net.IP{1, 2, 3}, PortMappings: []*PortMapping{good}},
			"pod IP ?010203 (neither 4 nor 16 bytes): " + wantPod,
		},
		{"no sandbox id", "", podAt("10.0.0.1", good), "row 0 (hostPort 80): sandbox id \"\": want one for each pod"},
		{
			"rows that differ in the container port", "id",
			podAt("10.0.0.1", good, &PortMapping{HostPort: 80, ContainerPort: 81, HostIP: "0.0.0.0"}),
			"row 1 (hostPort 80): containerPort 81: want 80, as in an earlier row of the same host port",
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()

			rows, err := rowsOf(tc.id, tc.pod)
			require.ErrorIs(t, err, ErrInvalidMapping)
			assert.Nil(t, rows)
			assert.ErrorContains(t, err, "pod ns/pod: invalid port mapping: row ")
			assert.ErrorContains(t, err, tc.want)
		})
	}
}

// Of two mappings of a pod that lead elsewhere, the second is wrong.
func TestRowsOfPodInvalid(t *testing.T) {
	t.Parallel()

	pm, other := &PortMapping{HostPort: 80, ContainerPort: 8080}, &PortMapping{HostPort: 80, ContainerPort: 8081}
	pod, err := rowsOfPod("id", []*PodPortMapping{podAt("10.0.0.1", pm), podAt("fd00::1", pm), podAt("10.0.0.1", other)})
	require.ErrorIs(t, err, ErrInvalidMapping)
	assert.EqualError(t, err, "pod ns/pod: invalid port mapping: row TCP 0.0.0.0:80 -> 10.0.0.1:8081: "+
		"want 10.0.0.1:8080, as in an earlier mapping of the pod")

	for f, p := range pod {
		assert.True(t, p.stays, f)
		assert.Empty(t, p.rows, f)
	}
}

// Of several IPs of a family the first counts, and where none is known, what stands stays.
func TestRowsOfPod(t *testing.T) {
	t.Parallel()

	pm, more := &PortMapping{HostPort: 80, ContainerPort: 8080}, &PortMapping{HostPort: 81, ContainerPort: 8081}
	unknown := podAt("", pm)

	for _, tc := range []struct {
		name  string
		pod   []*PodPortMapping
		want  map[IPFamily]string
		stays map[IPFamily]bool
	}{
		{name: "none"},
		{name: "nil", pod: []*PodPortMapping{nil}},
		{
			name: "two IPs of a family",
			pod:  []*PodPortMapping{podAt("10.0.0.1", pm), podAt("fd00::1", pm), podAt("10.0.0.2", pm, more), podAt("10.0.0.1", more)},
			want: map[IPFamily]string{
				IPv4: "TCP 0.0.0.0:80 -> 10.0.0.1:8080; TCP 0.0.0.0:81 -> 10.0.0.1:8081", IPv6: "TCP [::]:80 -> [fd00::1]:8080",
			},
		},
		{name: "no IP", pod: []*PodPortMapping{unknown}, stays: map[IPFamily]bool{IPv4: true, IPv6: true}},
		{
			name:  "one IP",
			pod:   []*PodPortMapping{unknown, podAt("10.0.0.1", pm)},
			want:  map[IPFamily]string{IPv4: "TCP 0.0.0.0:80 -> 10.0.0.1:8080"},
			stays: map[IPFamily]bool{IPv6: true},
		},
		{name: "no IP and no host port", pod: []*PodPortMapping{podAt("", &PortMapping{ContainerPort: 80}, nil)}},
		{name: "host network", pod: []*PodPortMapping{{HostNetwork: true, PortMappings: []*PortMapping{pm}}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()

			pod, err := rowsOfPod("id", tc.pod)
			require.NoError(t, err)

			for _, f := range []IPFamily{IPv4, IPv6} {
				assert.Equal(t, tc.want[f], listRows(pod[f].rows), f)
				assert.Equal(t, tc.stays[f], pod[f].stays, f)
			}
		})
	}
}

// What Add refuses may be there from before: Remove finds whatever can be an address.
func TestClaimsOf(t *testing.T) {
	t.Parallel()

	pod := podAt("",
		&PortMapping{HostPort: 1, HostIP: "224.0.0.1"}, &PortMapping{HostPort: 2, HostIP: "255.255.255.255"},
		&PortMapping{HostPort: 3, HostIP: "0.1.2.3"}, &PortMapping{HostPort: 4, HostIP: "::ffff:224.0.0.1"},
		&PortMapping{HostPort: 5, HostIP: "ff02::1"}, &PortMapping{HostPort: 6, ContainerPort: -1},
		// And nothing else.
		&PortMapping{HostPort: -1}, &PortMapping{HostPort: 7, HostIP: "localhost"}, &PortMapping{HostPort: 8, Protocol: "ICMP"}, nil)

	for f, want := range map[IPFamily][]string{
		IPv4: {"224.0.0.1:1", "255.255.255.255:2", "0.1.2.3:3", "224.0.0.1:4", "0.0.0.0:6"},
		IPv6: {"[ff02::1]:5", "[::]:6"},
	} {
		var got []string
		for _, c := range refsOf("id", pod, f) {
			got = append(got, netip.AddrPortFrom(c.HostIP(f), c.Port).String())
		}

		assert.Equal(t, want, got)
	}
}

func TestHashedBy(t *testing.T) {
	t.Parallel()

	for _, pm := range []*PortMapping{
		{HostPort: 80, ContainerPort: 1},
		{HostPort: 80, ContainerPort: 1, Protocol: "tcp", HostIP: "0.0.0.0"},
		{HostPort: 80, ContainerPort: 1, Protocol: "UDP", HostIP: "192.0.2.1"},
		{HostPort: 80, ContainerPort: 1, Protocol: "sctp", HostIP: "::ffff:192.0.2.1"},
	} {
		rows, err := rowsOf("id", podAt("10.0.0.1", pm))
		require.NoError(t, err)
		require.Len(t, rows, 1)

		assert.True(t, rows[0].HashedBy("id"), rows[0])
		assert.False(t, rows[0].HashedBy("other"), rows[0])
	}
}

func TestConflictErrorText(t *testing.T) {
	t.Parallel()

	err := &ConflictError{
		Pod: "ns/new", OtherPod: "ns/old", Protocol: v1.ProtocolTCP, HostPort: 80, HostIP: "::", OtherHostIP: "2001:db8::1",
	}
	assert.EqualError(t, err, "pod ns/new: host port TCP [::]:80 is taken by pod ns/old (TCP [2001:db8::1]:80)")
}

func FuzzRowsOf(f *testing.F) {
	f.Add("id", "ns", "pod", []byte{10, 0, 0, 1}, int32(80), int32(80), "TCP", "", int32(80), "::1")
	f.Add("id", "ns", "pod", []byte(net.ParseIP("ff02::1")), int32(1), int32(1), "UDP", "224.0.0.1", int32(2), "::ffff:255.255.255.255")
	f.Add("id", "ns", "pod", []byte{169, 254, 1, 1}, int32(1), int32(1), "", "0.1.2.3", int32(2), "fe80::1")
	f.Add("id", "ns", "a\"\n*filter", []byte(net.ParseIP("fd00::1")), int32(1), int32(65535), "", "::ffff:1.2.3.4", int32(-1), "0.0.0.0")

	f.Fuzz(func(t *testing.T, id, namespace, name string, ip []byte,
		hostPort, containerPort int32, protocol, hostIP string, hostPort2 int32, hostIP2 string,
	) {
		pod := &PodPortMapping{Namespace: namespace, Name: name, IP: ip, PortMappings: []*PortMapping{
			{HostPort: hostPort, ContainerPort: containerPort, Protocol: v1.Protocol(protocol), HostIP: hostIP},
			{HostPort: hostPort2, ContainerPort: containerPort, Protocol: v1.Protocol(protocol), HostIP: hostIP2},
		}}

		rows, err := rowsOf(id, pod)
		if err != nil {
			require.ErrorIs(t, err, ErrInvalidMapping)
			require.Empty(t, rows)

			return
		}

		claims := map[row.Endpoint]bool{}

		for _, f := range []IPFamily{IPv4, IPv6} {
			for _, c := range refsOf(id, pod, f) {
				claims[c.Endpoint] = true
			}
		}

		for _, r := range rows {
			assert.True(t, claims[r.Endpoint], "Remove does not find what Add made of %s", r)
			assert.LessOrEqual(t, len(r.Label), row.MaxLabel)
			assert.Empty(t, strings.Trim(r.Label, " ._-abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"))
			assert.True(t, utf8.ValidString(r.Label))
			assert.Regexp(t, "^[A-Z2-7]{16}$", r.Hash)

			if r.IP.IsValid() {
				assert.Equal(t, r.Family(), row.FamilyOf(r.IP))
			}
		}
	})
}

// The README shows a program that compiles.
func TestEmbedIt(t *testing.T) {
	t.Parallel()

	program, err := os.ReadFile("examples/embed/main.go")
	require.NoError(t, err)

	readme, err := os.ReadFile("README.md")
	require.NoError(t, err)

	_, code, _ := strings.Cut(string(program), "\n") // the first line is a comment
	assert.Contains(t, string(readme), "```go\n"+code+"```\n")
}

// CRI-O stores a sandbox's mappings in the annotation io.kubernetes.cri-o.PortMappings, which
// another version of the runtime reads after a restart.
func TestJSONOfPortMappings(t *testing.T) {
	t.Parallel()

	mappings := []*PortMapping{
		{HostPort: 8080, ContainerPort: 80, Protocol: v1.ProtocolTCP},
		{HostPort: 5353, ContainerPort: 53, Protocol: v1.ProtocolUDP, HostIP: "2001:db8::1"},
	}

	const annotation = `[
		{"HostPort": 8080, "ContainerPort": 80, "Protocol": "TCP", "HostIP": ""},
		{"HostPort": 5353, "ContainerPort": 53, "Protocol": "UDP", "HostIP": "2001:db8::1"}]`

	got, err := json.Marshal(mappings)
	require.NoError(t, err)
	assert.JSONEq(t, annotation, string(got))

	for name, stored := range map[string]string{
		"as now":                 annotation,
		"of CRI-O 1.18 or older": strings.ReplaceAll(annotation, "{", `{"Name": "",`),
	} {
		var read []*PortMapping

		require.NoError(t, json.Unmarshal([]byte(stored), &read), name)
		assert.Equal(t, mappings, read, name)
	}
}
