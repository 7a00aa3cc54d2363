package hostport

import "iter"

// delta is what one operation changes. A row is moved by a del and an add of
// one endpoint, which no packet sees apart.
type delta struct {
	del, add []*row
	keep     []*row // rows that are to stand: checked, and put back if missing
}

// empty reports whether it names no row.
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

// target is what the kernel is to hold.
type target struct {
	// deltas are what operations change, in their order; the rows of one port go together.
	deltas []delta
	// rows yields every row that stands once the deltas are committed. Where the kernel
	// turns out not to hold what it should, it is put back from there.
	rows iter.Seq[*row]
	// base is set if what leads packets to rows is to stand, and the guard of loopback
	// addresses, whatever rows there are. Without it nothing of ours is to stand.
	base bool
	// whole has all of the rows looked at, and not only what the deltas touch.
	whole bool
	// exactly has whatever else bears our names taken out. It goes with whole.
	exactly bool
}

// nothing is the target of a backend that is to have nothing of ours.
func nothing() target { return target{rows: func(func(*row) bool) {}, whole: true, exactly: true} }

// shared stands, in place of a delta's index, for lines that are for all.
const shared = -1
