package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"strings"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
	v1 "k8s.io/api/core/v1"

	"github.com/cri-o/hostport"
)

// errPortTaken is a code from where plugins may choose.
const errPortTaken = 100

// config is what the runtime writes to standard input.
type config struct {
	types.PluginConf

	Backend      hostport.Backend `json:"backend"`
	ConditionsV4 []string         `json:"conditionsV4"`
	ConditionsV6 []string         `json:"conditionsV6"`

	RuntimeConfig struct {
		PortMappings []struct {
			HostPort      int32  `json:"hostPort"`
			ContainerPort int32  `json:"containerPort"`
			Protocol      string `json:"protocol"`
			HostIP        string `json:"hostIP"` //nolint:tagliatelle // as the specification spells it
		} `json:"portMappings"`
	} `json:"runtimeConfig"`
}

func main() {
	skel.PluginMainFuncs(
		skel.CNIFuncs{Add: cmdAdd, Del: cmdDel, Check: cmdCheck, GC: cmdGC, Status: cmdStatus},
		version.PluginSupports("1.0.0", "1.1.0"), "host ports with hostport")
}

func cmdAdd(args *skel.CmdArgs) error {
	conf, err := parse(args.StdinData)
	if err != nil {
		return err
	}

	err = eachAddress(conf, args, func(m *hostport.Manager, id string, pod *hostport.PodPortMapping) error {
		if err := m.Add(id, pod, ""); err != nil { // the route to the container tells the interface
			return errors.Join(err, m.Remove(id, nil)) // what its other address has got
		}

		return nil
	})
	if err != nil {
		return coded(err)
	}

	return types.PrintResult(conf.PrevResult, conf.CNIVersion) //nolint:wrapcheck // says what it is
}

func cmdDel(args *skel.CmdArgs) error {
	conf, err := parse(args.StdinData)
	if err != nil {
		return err
	}

	return withManager(conf, func(m *hostport.Manager) error {
		return m.Remove(sandboxID(conf, args.IfName, args.ContainerID), nil) // whatever ADD was given
	})
}

func cmdCheck(args *skel.CmdArgs) error {
	conf, err := parse(args.StdinData)
	if err != nil {
		return err
	}

	return eachAddress(conf, args, func(m *hostport.Manager, id string, pod *hostport.PodPortMapping) error {
		return m.Check(context.Background(), id, pod)
	})
}

func cmdGC(args *skel.CmdArgs) error {
	conf, err := parse(args.StdinData)
	if err != nil {
		return err
	}

	// Without the list nobody knows what is valid; null is an empty one.
	var given map[string]json.RawMessage
	if err := json.Unmarshal(args.StdinData, &given); err != nil || given["cni.dev/valid-attachments"] == nil {
		return types.NewError(types.ErrInvalidNetworkConfig, "cni.dev/valid-attachments is missing", "")
	}

	ids := make([]string, 0, len(conf.ValidAttachments))
	for _, a := range conf.ValidAttachments {
		ids = append(ids, sandboxID(conf, a.IfName, a.ContainerID))
	}

	return withManager(conf, func(m *hostport.Manager) error { return m.Keep(context.Background(), ids) })
}

func cmdStatus(args *skel.CmdArgs) error {
	conf, err := parse(args.StdinData)
	if err != nil {
		return err
	}

	m, err := hostport.New(options(conf)...)
	if err != nil {
		return types.NewError(types.ErrPluginNotAvailable, "host ports cannot be mapped", err.Error())
	}

	for _, s := range m.Status() {
		// A family that the node does not have is no fault: there are no addresses of it either.
		if s.Err != nil && !errors.Is(s.Err, hostport.ErrUnavailable) {
			err = errors.Join(err, fmt.Errorf("IPv%s: %w", s.Family, s.Err))
		}
	}

	if err = errors.Join(err, m.Close()); err != nil {
		return types.NewError(types.ErrPluginNotAvailable, "host ports cannot be mapped", err.Error())
	}

	return nil
}

func parse(stdin []byte) (*config, error) {
	conf := &config{}
	if err := json.Unmarshal(stdin, conf); err != nil {
		return nil, types.NewError(types.ErrDecodingFailure, "the configuration is not what it should be", err.Error())
	}

	if len(conf.ConditionsV4)+len(conf.ConditionsV6) > 0 {
		return nil, types.NewError(types.ErrInvalidNetworkConfig, "conditionsV4 and conditionsV6 are not supported",
			"a host port would be open to more than they say")
	}

	if err := version.ParsePrevResult(&conf.PluginConf); err != nil {
		return nil, types.NewError(types.ErrDecodingFailure, "prevResult is not what it should be", err.Error())
	}

	return conf, nil
}

// options of a manager that lives for one call: it can hold no port, and never knows whose the rows
// of others are, nor what there is of other networks.
func options(conf *config) []hostport.Option {
	opts := []hostport.Option{hostport.WithoutSockets(), hostport.WithoutTakeover(), hostport.WithScope(conf.Name)}
	if conf.Backend != "" {
		opts = append(opts, hostport.WithBackend(conf.Backend))
	}

	return opts
}

// withManager makes a manager, also where it will not work: to take out what cannot be there is
// success, and any other call says why it fails.
func withManager(conf *config, do func(m *hostport.Manager) error) error {
	m, ok := hostport.NewMetaHostportManager(options(conf)...).(*hostport.Manager)
	if !ok {
		return errors.ErrUnsupported
	}

	err := do(m)

	return coded(errors.Join(err, m.Close()))
}

// sandboxID names an attachment. The scope of the network is what stands before the first slash:
// CNI has none in any of the three. The container comes last, as its ids are of one length: with
// iptables a port's number follows in what is hashed.
func sandboxID(conf *config, ifName, containerID string) string {
	return conf.Name + "/" + ifName + "/" + containerID
}

// eachAddress calls do for each address of a container that is to have host ports.
func eachAddress(conf *config, args *skel.CmdArgs, do func(m *hostport.Manager, id string, pod *hostport.PodPortMapping) error) error {
	if conf.PrevResult == nil {
		return types.NewError(types.ErrInvalidNetworkConfig, "prevResult is missing: chain this behind the plugin of the interface", "")
	}

	mappings := mappingsOf(conf)
	if len(mappings) == 0 {
		return nil
	}

	ips, err := addresses(conf)
	if err != nil {
		return err
	}

	namespace, name := podOf(args)

	return withManager(conf, func(m *hostport.Manager) error {
		for _, ip := range ips {
			pod := &hostport.PodPortMapping{Namespace: namespace, Name: name, IP: ip, PortMappings: mappings}
			if err := do(m, sandboxID(conf, args.IfName, args.ContainerID), pod); err != nil {
				return err
			}
		}

		return nil
	})
}

// mappingsOf has protocols and addresses in the one spelling that GC and DEL find with iptables.
func mappingsOf(conf *config) []*hostport.PortMapping {
	mappings := make([]*hostport.PortMapping, 0, len(conf.RuntimeConfig.PortMappings))

	for _, pm := range conf.RuntimeConfig.PortMappings {
		if ip := net.ParseIP(pm.HostIP); ip != nil {
			pm.HostIP = ip.String()
		}

		mappings = append(mappings, &hostport.PortMapping{
			HostPort: pm.HostPort, ContainerPort: pm.ContainerPort, HostIP: pm.HostIP, Protocol: v1.Protocol(strings.ToUpper(pm.Protocol)),
		})
	}

	return mappings
}

// addresses are the container's first one in each family. Those of interfaces outside it are in
// prevResult too.
func addresses(conf *config) ([]net.IP, error) {
	result, err := current.NewResultFromResult(conf.PrevResult)
	if err != nil {
		return nil, types.NewError(types.ErrDecodingFailure, "prevResult is not what it should be", err.Error())
	}

	var (
		ips  []net.IP
		seen = map[bool]bool{}
	)

	for _, ip := range result.IPs {
		if i := ip.Interface; i != nil && (*i < 0 || *i >= len(result.Interfaces) || result.Interfaces[*i].Sandbox == "") {
			continue
		}

		if v4 := ip.Address.IP.To4() != nil; !seen[v4] {
			seen[v4] = true
			ips = append(ips, ip.Address.IP)
		}
	}

	if len(ips) == 0 {
		return nil, types.NewError(types.ErrInvalidNetworkConfig, "prevResult has no address of the container", "")
	}

	return ips, nil
}

// podOf is the pod's name, for errors and the log, where a runtime of Kubernetes gives it.
func podOf(args *skel.CmdArgs) (namespace, name string) {
	for arg := range strings.SplitSeq(args.Args, ";") {
		switch key, value, _ := strings.Cut(arg, "="); key {
		case "K8S_POD_NAMESPACE":
			namespace = value
		case "K8S_POD_NAME":
			name = value
		}
	}

	return namespace, name
}

// coded gives an error the code by which a runtime tells what to do.
func coded(err error) error {
	conflict, cniErr := (*hostport.ConflictError)(nil), (*types.Error)(nil)

	switch {
	case err == nil || errors.As(err, &cniErr):
		return err
	case errors.As(err, &conflict):
		return types.NewError(errPortTaken, err.Error(), "")
	case errors.Is(err, hostport.ErrInvalidMapping):
		return types.NewError(types.ErrInvalidNetworkConfig, err.Error(), "")
	case errors.Is(err, hostport.ErrOtherManager):
		return types.NewError(types.ErrTryAgainLater, err.Error(), "")
	default:
		return err
	}
}
