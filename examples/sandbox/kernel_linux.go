package main

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"

	"github.com/cri-o/hostport"
)

// kernelRows lists what is in the kernel now. That is all that a manager knows which has just
// been made, after a restart of the runtime. Sync tells it what is running.
func (d *demo) kernelRows(ctx context.Context) ([]hostport.Mapping, error) {
	if err := d.manager.Close(); err != nil { // there is one at a time
		return nil, fmt.Errorf("close manager: %w", err)
	}
	if err := d.open(); err != nil {
		return nil, err
	}
	rows := d.manager.Mappings()
	_, err := d.onHost(func() error { return d.manager.Sync(ctx, d.running) })
	return rows, err
}

// noRule is the carrier of what is not mapped.
const noRule = "none"

// carrier tells the rule that translates a destination. A row for one address
// comes before a row for any.
func carrier(rows []hostport.Mapping, network string, to netip.AddrPort) string {
	anyIP := netip.IPv4Unspecified()
	if to.Addr().Is6() {
		anyIP = netip.IPv6Unspecified()
	}
	for _, hostIP := range []netip.Addr{to.Addr(), anyIP} {
		for _, m := range rows {
			if strings.EqualFold(string(m.Protocol), network) && m.HostIP == hostIP.String() && m.HostPort == int32(to.Port()) {
				return ruleOf(m)
			}
		}
	}
	return noRule
}

// ruleOf tells what to look for in the kernel, and where it leads.
func ruleOf(m hostport.Mapping) string {
	var name string
	switch {
	case m.Backend == hostport.BackendIPTables:
		name = "KUBE-HP-" + m.PodIDHash
	case netip.MustParseAddr(m.HostIP).IsUnspecified():
		name = "hostports " + portKey(m)
	default: // the host IP stands under ASKED, and is too long to be here as well
		name = "hostipports … " + portKey(m)
	}
	return name + " → " + net.JoinHostPort(m.PodIP.String(), strconv.Itoa(int(m.ContainerPort)))
}

// portKey is how nft writes protocol and host port.
func portKey(m hostport.Mapping) string {
	return fmt.Sprintf("%s . %d", strings.ToLower(string(m.Protocol)), m.HostPort)
}
