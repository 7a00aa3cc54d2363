package hostport

import "sync"

// generations are those of nf_tables that our own transactions have made, as far
// as they are known.
type generations struct {
	mu  sync.Mutex
	own map[uint32]bool
}

// maxGenerations bounds what is remembered: it is asked for within a second.
const maxGenerations = 10_000

func (g *generations) add(gen uint32) {
	g.mu.Lock()
	defer g.mu.Unlock()

	if len(g.own) >= maxGenerations || g.own == nil {
		g.own = map[uint32]bool{}
	}

	g.own[gen] = true
}

func (g *generations) has(gen uint32) bool {
	g.mu.Lock()
	defer g.mu.Unlock()

	return g.own[gen]
}
