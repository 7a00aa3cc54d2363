package interop

import (
	"fmt"
	"net"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/cri-o/hostport"
	"github.com/cri-o/hostport/hostporttest"
)

// metrics counts what a manager does, for Prometheus.
type metrics struct {
	operations *prometheus.HistogramVec
	repairs    *prometheus.CounterVec
	takeovers  *prometheus.CounterVec
	inSync     *prometheus.GaugeVec
}

func newMetrics(registry prometheus.Registerer) *metrics {
	auto := promauto.With(registry)

	return &metrics{
		operations: auto.NewHistogramVec(prometheus.HistogramOpts{
			Name: "hostport_operation_seconds", Help: "How long operations took.",
			Buckets: prometheus.ExponentialBuckets(50e-6, 4, 10), // from a transaction to the time limit
		}, []string{"family", "kind", "result"}),
		repairs: auto.NewCounterVec(prometheus.CounterOpts{
			Name: "hostport_repairs_total", Help: "What others had broken and was put right.",
		}, []string{"family"}),
		takeovers: auto.NewCounterVec(prometheus.CounterOpts{
			Name: "hostport_takeovers_total", Help: "Ports from before that a new pod has got.",
		}, []string{"family"}),
		inSync: auto.NewGaugeVec(prometheus.GaugeOpts{
			Name: "hostport_in_sync", Help: "1 if the kernel holds what it should.",
		}, []string{"family"}),
	}
}

// Observe implements hostport.Observer.
func (m *metrics) Observe(e hostport.Event) {
	family := "IPv" + string(e.Family)

	switch e.Kind {
	case hostport.EventRepair:
		m.repairs.WithLabelValues(family).Add(float64(e.Repairs))
	case hostport.EventTakeover:
		m.takeovers.WithLabelValues(family).Add(float64(e.Removed))
	case hostport.EventHealth:
		m.inSync.WithLabelValues(family).Set(map[bool]float64{true: 1}[e.Health == hostport.HealthInSync])
	default: // Add, Remove and Sync
		result := "ok"
		if e.Err != nil {
			result = "failed"
		}

		m.operations.WithLabelValues(family, string(e.Kind), result).Observe(e.Took.Seconds())
	}
}

// An Observer feeds Prometheus. A runtime makes its manager with the same option.
func Example_metrics() {
	var node hostporttest.Node

	registry := prometheus.NewRegistry()

	manager, err := hostport.New(node.Option(), hostport.WithObserver(newMetrics(registry)))
	if err != nil {
		fmt.Println(err)

		return
	}

	web := &hostport.PodPortMapping{
		Name: "web", IP: net.ParseIP("10.88.0.2"), PortMappings: []*hostport.PortMapping{{HostPort: 8080, ContainerPort: 80}},
	}
	fmt.Println(manager.Add("sandbox-1", web, ""))
	fmt.Println(manager.Add("sandbox-2", web, "") != nil)

	families, err := registry.Gather()
	if err != nil {
		fmt.Println(err)
	}

	for _, family := range families {
		for _, m := range family.GetMetric() {
			fmt.Print(family.GetName())

			for _, label := range m.GetLabel() {
				fmt.Print(" ", label.GetValue())
			}

			fmt.Println("", m.GetGauge().GetValue(), m.GetHistogram().GetSampleCount())
		}
	}

	fmt.Println(manager.Close())
	// Output:
	// <nil>
	// true
	// hostport_in_sync IPv4 1 0
	// hostport_in_sync IPv6 1 0
	// hostport_operation_seconds IPv4 add failed 0 1
	// hostport_operation_seconds IPv4 add ok 0 1
	// <nil>
}
