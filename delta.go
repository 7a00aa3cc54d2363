package hostport

import (
	"iter"
	"slices"
)

// delta is what one operation changes. A row is moved by a del and an add of
// one endpoint, which no packet sees apart.
type delta struct {
	del, add []*row
	keep     []*row // rows that ought to stand: checked, and put back if missing
}

func (d *delta) empty() bool { return len(d.del)+len(d.add)+len(d.keep) == 0 }

// size is how many rows change.
func (d *delta) size() int { return len(d.del) + len(d.add) }

// parts divides what changes into parts of at most so many rows, but for those of
// one port: one may take the place of another, or come before it.
func (d *delta) parts(most int) []delta {
	if d.size() <= most {
		return []delta{*d}
	}

	var order []portKey

	ofPort := map[portKey]delta{}

	for i, rows := range [][]*row{d.del, d.add} {
		for _, r := range rows {
			p, known := ofPort[r.portKey]
			if !known {
				order = append(order, r.portKey)
			}

			if i == 0 {
				p.del = append(p.del, r)
			} else {
				p.add = append(p.add, r)
			}

			ofPort[r.portKey] = p
		}
	}

	var (
		parts []delta
		part  delta
	)

	for _, port := range order {
		p := ofPort[port]
		if part.size() > 0 && part.size()+p.size() > most {
			parts, part = append(parts, part), delta{}
		}

		part.del, part.add = append(part.del, p.del...), append(part.add, p.add...)
	}

	return append(parts, part)
}

// tableBefore is the table without deltas, which it is with.
func tableBefore(deltas []delta, table iter.Seq[*row]) []*row {
	rows := slices.Collect(table)
	for _, d := range slices.Backward(deltas) {
		rows = append(slices.DeleteFunc(rows, func(r *row) bool { return slices.Contains(d.add, r) }), d.del...)
	}

	return rows
}

// shared, in place of a delta's index, stands for lines that are for all.
const shared = -1
