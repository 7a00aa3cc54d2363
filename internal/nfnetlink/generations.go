package nfnetlink

import "sync"

// Generations are those of the ruleset that this process has made, as far as they
// are known. The zero value is none.
type Generations struct {
	mu  sync.Mutex
	own map[uint32]bool
}

// maxGenerations bounds what is remembered: it is asked for within a second.
const maxGenerations = 10_000

// Add notes that a generation is ours.
func (g *Generations) Add(gen uint32) {
	g.mu.Lock()
	defer g.mu.Unlock()

	if len(g.own) >= maxGenerations || g.own == nil {
		g.own = map[uint32]bool{}
	}

	g.own[gen] = true
}

// Has reports whether a generation is known to be ours.
func (g *Generations) Has(gen uint32) bool {
	g.mu.Lock()
	defer g.mu.Unlock()

	return g.own[gen]
}
