package interop

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/klog/v2/ktesting"
	"sigs.k8s.io/knftables"

	"github.com/cri-o/hostport"
)

// Each runtime's calls lead packets to its pods, and no longer.
func TestCallers(t *testing.T) {
	for _, c := range callers {
		t.Run(c.name, func(t *testing.T) {
			n := newNode(t)
			n.serve(web, 80)
			n.serve(other, 80)

			// start is the start of a process, with the pods that it has records of.
			start := func(before ...sandbox) (r caller) {
				n.do(func() {
					var err error
					r, err = c.start(t.Context(), before,
						hostport.WithLogger(ktesting.NewLogger(t, ktesting.NewConfig(ktesting.Verbosity(2)))))
					require.NoError(t, err)
				})

				return r
			}
			both := func(check func(n *node, f knftables.Family)) {
				t.Helper()
				eachFamily(n, func(_ *testing.T, n *node, f knftables.Family) { check(n, f) })
			}

			webBox, otherBox, rival := n.sandbox(webID, web, 8080), n.sandbox(otherID, other, 9090), n.sandbox(otherID, other, 8080)
			r := start()

			n.do(func() {
				require.NoError(t, r.setUp(t.Context(), webBox))

				var conflict *hostport.ConflictError
				require.ErrorAs(t, r.setUp(t.Context(), rival), &conflict)
				assert.Equal(t, webID, conflict.OtherID)

				// A runtime tears down what it could not set up.
				require.NoError(t, r.tearDown(t.Context(), rival))
				require.NoError(t, r.setUp(t.Context(), otherBox))
			})
			both(func(n *node, f knftables.Family) { n.works(web, f, 8080); n.works(other, f, 9090) })

			// The other pod goes while no process runs.
			n.do(func() { require.NoError(t, r.stop()) })

			webBox.ips = nil // not known any more
			r = start(webBox)

			both(func(n *node, f knftables.Family) {
				n.works(web, f, 8080)

				if c.syncs {
					n.gone(f, 9090)
				}
			})

			n.do(func() {
				webBox = n.sandbox(webID, web, 8080)
				require.NoError(t, r.tearDown(t.Context(), webBox))
				require.NoError(t, r.tearDown(t.Context(), webBox), "again")
				require.NoError(t, r.tearDown(t.Context(), n.sandbox(lateID, web)), "never set up, and without ports")
				require.NoError(t, r.tearDown(t.Context(), otherBox))
			})
			both(func(n *node, f knftables.Family) { n.gone(f, 8080); n.gone(f, 9090) })

			n.do(func() { require.NoError(t, r.stop()) })
		})
	}
}

// sandbox has the rows of podMappings in both families, as the kubelet gives them: what is for an
// address of one family comes with the other's as well.
func (n *node) sandbox(id string, i int, ports ...int32) sandbox {
	config := &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Namespace: "ns", Name: n.Pods[i].Name},
		PortMappings: []*runtimeapi.PortMapping{{ContainerPort: 80}}, // a port without a host port
	}

	var ips []string

	for _, f := range families() {
		ips = append(ips, n.podIP(i, f).String())

		for _, port := range ports {
			for _, pm := range podMappings(n, f, port) {
				if pm.HostIP == "" && isV6(f) {
					continue // there already
				}

				config.PortMappings = append(config.PortMappings, &runtimeapi.PortMapping{
					Protocol: runtimeapi.Protocol(runtimeapi.Protocol_value[string(pm.Protocol)]),
					HostPort: pm.HostPort, ContainerPort: pm.ContainerPort, HostIp: pm.HostIP,
				})
			}
		}
	}

	return sandbox{id: id, config: config, ips: ips}
}

// Where host ports are disabled, a runtime's calls are the same.
func TestCallersDisabled(t *testing.T) {
	m := newCRIO133NoopManager()

	require.NoError(t, m.Sync(t.Context(), map[string][]*hostport.PodPortMapping{webID: {}}))
	require.NoError(t, m.Add(webID, "web", "10.88.0.2", []*hostport.PortMapping{{HostPort: 8080, ContainerPort: 80}}))
	require.NoError(t, m.Remove(webID, nil))
	require.NoError(t, m.Close())
}
