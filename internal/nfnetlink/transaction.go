package nfnetlink

// Transaction is what somebody, this process included, has changed in nf_tables
// at once.
type Transaction struct {
	// Generation is the ruleset's after it. Where it is 0, transactions have been
	// lost, and anything may have changed.
	Generation uint32
	// Changes are what it has made, replaced or deleted, each once.
	Changes map[Change]bool
}

// Change is about a table, a chain with its rules, or a set with its elements.
type Change struct {
	Family  uint8
	Table   string
	Chain   string // empty where it is no chain
	Deleted bool
	Last    bool // a rule behind all others (Linux 5.15; before, it is not told)
}

// NextGeneration follows g.
func NextGeneration(g uint32) uint32 { return max(g+1, 1) }
