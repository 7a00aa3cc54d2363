package main

import (
	"context"
	"sync/atomic"

	"k8s.io/klog/v2/textlogger"

	"github.com/cri-o/hostport"
)

// ours is hostport as a runtime has it: a manager that stays, with the sockets of its
// ports and a log.
type ours struct {
	*hostport.Manager

	options []hostport.Option
	pods    map[string][]*hostport.PodPortMapping
	log     counter
}

// counter counts what is written to it.
type counter struct{ atomic.Int64 }

func (c *counter) Write(b []byte) (int, error) {
	c.Add(int64(len(b)))

	return len(b), nil
}

// newOurs makes a manager that uses nftables, or a variant of iptables.
func newOurs(via string) func(tools) (mapper, error) {
	return func(tools) (mapper, error) {
		o := &ours{pods: map[string][]*hostport.PodPortMapping{}}
		backend := hostport.BackendNFTables

		if via == viaNFT || via == viaLegacy {
			backend = hostport.BackendIPTables

			for _, program := range []string{"iptables-", "ip6tables-"} { // as a kubelet says which it uses
				if _, _, err := execute(nil, "", program+via, "-t", "mangle", "-N", "KUBE-IPTABLES-HINT"); err != nil {
					return nil, err
				}
			}
		}

		o.options = []hostport.Option{
			hostport.WithBackend(backend), hostport.WithTimeout(patience),
			hostport.WithLogger(textlogger.NewLogger(textlogger.NewConfig(textlogger.Output(&o.log)))),
		}

		err := o.renew()

		return o, err
	}
}

func mapping(p pod) *hostport.PodPortMapping {
	return &hostport.PodPortMapping{
		Namespace: "default", Name: "k8s_pod_default", IP: p.IP.AsSlice(),
		PortMappings: []*hostport.PortMapping{{HostPort: int32(p.HostPort), ContainerPort: int32(p.ContainerPort), Protocol: p.Proto}},
	}
}

// renew makes the manager.
func (o *ours) renew() (err error) {
	o.Manager, err = hostport.New(o.options...)

	return err
}

func (o *ours) fill(pods []pod) error {
	for _, p := range pods {
		o.pods[p.ID] = []*hostport.PodPortMapping{mapping(p)}
	}

	return o.sync()
}

func (o *ours) sync() error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()

	return o.Sync(ctx, o.pods)
}

func (o *ours) add(p pod) error    { return o.Add(p.ID, mapping(p), "") }
func (o *ours) remove(p pod) error { return o.Remove(p.ID, mapping(p)) }
func (o *ours) logged() int64      { return o.log.Load() }
func (o *ours) close() error       { return o.Close() }
