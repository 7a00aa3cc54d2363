package hostport

import (
	"context"
	_ "embed"
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

	return f.IPTables.Save(ctx, table)
}

func (f *fakeIPTables) Restore(ctx context.Context, input []byte) error {
	f.restores.Add(1)

	if f.restore != nil {
		var err error
		if input, err = f.restore(input); err != nil {
			return err
		}
	}

	return f.IPTables.Restore(ctx, input)
}

// lineError is an error about a line.
type lineError struct{ line int }

func (e *lineError) Error() string { return fmt.Sprintf("line %d failed", e.line) }
func (e *lineError) Line() int     { return e.line }

// crioSave is what CRI-O's iptables manager leaves for the pods crio-a and
// crio-b, written by hand from its layout: rows stand straight in the dispatch
// chains, and a row for one host address has it in the DNAT rule alone.
//
//go:embed internal/iptables/testdata/crio-iptables-save
var crioSave string
