package row

import "iter"

// Delta is what one operation changes. A row is moved by a del and an add of
// one endpoint, which no packet sees apart.
type Delta struct {
	Del, Add []*Row
	Keep     []*Row // rows that are to stand: checked, and put back if missing
}

// Empty reports whether it names no row.
func (d *Delta) Empty() bool { return len(d.Del)+len(d.Add)+len(d.Keep) == 0 }

// Size is how many rows change.
func (d *Delta) Size() int { return len(d.Del) + len(d.Add) }

// Parts divides what changes into parts of at most so many rows. Those of one port stay
// together: one may take the place of another, or come before it.
func (d *Delta) Parts(most int) []Delta {
	if d.Size() <= most {
		return []Delta{*d}
	}

	var order []PortKey

	ofPort := map[PortKey]Delta{}

	for i, rows := range [][]*Row{d.Del, d.Add} {
		for _, r := range rows {
			p, known := ofPort[r.PortKey]
			if !known {
				order = append(order, r.PortKey)
			}

			if i == 0 {
				p.Del = append(p.Del, r)
			} else {
				p.Add = append(p.Add, r)
			}

			ofPort[r.PortKey] = p
		}
	}

	var (
		parts []Delta
		part  Delta
	)

	for _, port := range order {
		p := ofPort[port]
		if part.Size() > 0 && part.Size()+p.Size() > most {
			parts, part = append(parts, part), Delta{}
		}

		part.Del, part.Add = append(part.Del, p.Del...), append(part.Add, p.Add...)
	}

	return append(parts, part)
}

// Target is what the kernel is to hold.
type Target struct {
	// Deltas are what operations change, in their order; the rows of one port go together.
	Deltas []Delta
	// Rows yields every row that stands once the deltas are committed. Where the kernel
	// turns out not to hold what it should, it is put back from there.
	Rows iter.Seq[*Row]
	// Base is set if what leads packets to rows is to stand, and the guard of loopback
	// addresses, whatever rows there are. Without it nothing of ours is to stand.
	Base bool
	// Whole has all of the rows looked at, and not only what the deltas touch.
	Whole bool
	// Exactly has whatever else bears our names taken out. It goes with Whole.
	Exactly bool
}

// Nothing is the target of a backend that is to have nothing of ours.
func Nothing() Target { return Target{Rows: func(func(*Row) bool) {}, Whole: true, Exactly: true} }

// Shared stands, in place of a delta's index, for lines that are for all.
const Shared = -1
