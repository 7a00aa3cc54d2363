package hostport

import (
	"context"
	"fmt"
	"sync/atomic"
)

// fakeIPTables is an IPTables, usually a real one, that fails when told to.
type fakeIPTables struct {
	IPTables

	// save and restore, where set, are asked first; restore may change the
	// input. Their errors are returned and nothing is executed then.
	save    func() error
	restore func(input []byte) ([]byte, error)

	saves, restores atomic.Int32 // calls
}

func (f *fakeIPTables) Save(ctx context.Context, table string) ([]byte, error) {
	f.saves.Add(1)

	if f.save != nil {
		if err := f.save(); err != nil {
			return nil, err
		}
	}

	return f.IPTables.Save(ctx, table) //nolint:wrapcheck // passed on as it is
}

func (f *fakeIPTables) Restore(ctx context.Context, input []byte) error {
	f.restores.Add(1)

	if f.restore != nil {
		var err error
		if input, err = f.restore(input); err != nil {
			return err
		}
	}

	return f.IPTables.Restore(ctx, input) //nolint:wrapcheck // passed on as it is
}

// lineError is an error about a line.
type lineError struct{ line int }

func (e *lineError) Error() string { return fmt.Sprintf("line %d failed", e.line) }
func (e *lineError) Line() int     { return e.line }

// crioSave is what CRI-O's iptables manager leaves for the pods crio-a
// and crio-b, written by
// hand from its layout: rows stand straight in the dispatch chains, and a row
// for one host address has it in the DNAT rule alone.
const crioSave = `*nat
:PREROUTING ACCEPT [0:0]
:INPUT ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:CRIO-HOSTPORTS-MASQ - [0:0]
:CRIO-MASQ-A33B2C2JJMBCNBAU - [0:0]
:CRIO-MASQ-A54SAWTXE33BXYWD - [0:0]
:KUBE-HOSTPORTS - [0:0]
:KUBE-HP-A33B2C2JJMBCNBAU - [0:0]
:KUBE-HP-A54SAWTXE33BXYWD - [0:0]
-A PREROUTING -m comment --comment "kube hostport portals" -m addrtype --dst-type LOCAL -j KUBE-HOSTPORTS
-A OUTPUT -m comment --comment "kube hostport portals" -m addrtype --dst-type LOCAL -j KUBE-HOSTPORTS
-A POSTROUTING -m comment --comment "kube hostport masquerading" -m conntrack --ctstate DNAT -j CRIO-HOSTPORTS-MASQ
-A CRIO-HOSTPORTS-MASQ -m comment --comment "k8s_b_default_uid_0_ hostport 8081" -j CRIO-MASQ-A54SAWTXE33BXYWD
-A CRIO-HOSTPORTS-MASQ -m comment --comment "k8s_a_default_uid_0_ hostport 8080" -j CRIO-MASQ-A33B2C2JJMBCNBAU
-A CRIO-MASQ-A33B2C2JJMBCNBAU -s 10.88.0.2/32 -d 10.88.0.2/32 -p tcp -m comment --comment "k8s_a_default_uid_0_ hostport 8080" -m conntrack --ctorigdstport 8080 -m tcp --dport 80 -j MASQUERADE
-A CRIO-MASQ-A54SAWTXE33BXYWD -s 10.88.0.3/32 -d 10.88.0.3/32 -p udp -m comment --comment "k8s_b_default_uid_0_ hostport 8081" -m conntrack --ctorigdstport 8081 -m udp --dport 53 -j MASQUERADE
-A KUBE-HOSTPORTS -p udp -m comment --comment "k8s_b_default_uid_0_ hostport 8081" -m udp --dport 8081 -j KUBE-HP-A54SAWTXE33BXYWD
-A KUBE-HOSTPORTS -p tcp -m comment --comment "k8s_a_default_uid_0_ hostport 8080" -m tcp --dport 8080 -j KUBE-HP-A33B2C2JJMBCNBAU
-A KUBE-HP-A33B2C2JJMBCNBAU -p tcp -m comment --comment "k8s_a_default_uid_0_ hostport 8080" -m tcp -j DNAT --to-destination 10.88.0.2:80
-A KUBE-HP-A54SAWTXE33BXYWD -d 192.0.2.1/32 -p udp -m comment --comment "k8s_b_default_uid_0_ hostport 8081" -m udp -j DNAT --to-destination 10.88.0.3:53
COMMIT
`
