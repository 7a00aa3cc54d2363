package hostport

import (
	"slices"

	"github.com/cri-o/hostport/internal/row"
)

// change is what one operation has done so far, and how to take it back.
type change struct {
	m       *hostportManager
	delta   row.Delta
	undos   []func()
	release []row.Endpoint // sockets of rows that go, once the rules have gone
}

func (c *change) add(r *row.Row) {
	c.delta.Add = append(c.delta.Add, r)
	c.set(r.PortKey, append(slices.Clip(c.m.rows[r.PortKey]), r))
}

func (c *change) del(r *row.Row) {
	c.delta.Del = append(c.delta.Del, r)
	c.release = append(c.release, r.Endpoint)

	rest := slices.Clone(c.m.rows[r.PortKey])
	c.set(r.PortKey, slices.DeleteFunc(rest, func(o *row.Row) bool { return o == r }))
}

func (c *change) keep(r *row.Row) {
	c.delta.Keep = append(c.delta.Keep, r)
	c.amend(r)
}

// claim reports whether r is o's, as ownedBy does, and makes o known as the owner.
func (c *change) claim(o row.Owner, hash string, r *row.Row) bool {
	owned := c.m.ownedBy(o, hash, r)
	if owned && !r.Owner.Known() {
		c.amend(r)
		r.SetOwner(o)
	}

	return owned
}

// amend has undo make r what it is now.
func (c *change) amend(r *row.Row) {
	was := *r
	c.undos = append(c.undos, func() { *r = was })
}

func (c *change) set(k row.PortKey, rows []*row.Row) {
	before := c.m.rows[k]
	c.undos = append(c.undos, func() { c.m.setRows(k, before) })
	c.m.setRows(k, rows)
}

func (c *change) undo() { c.rollBack(savepoint{}) }

// savepoint is how far a change had come.
type savepoint struct{ del, add, keep, undos, release int }

func (c *change) savepoint() savepoint {
	return savepoint{len(c.delta.Del), len(c.delta.Add), len(c.delta.Keep), len(c.undos), len(c.release)}
}

// rollBack undoes what the change has done since.
func (c *change) rollBack(to savepoint) {
	for _, undo := range slices.Backward(c.undos[to.undos:]) {
		undo()
	}

	c.delta = row.Delta{Del: c.delta.Del[:to.del], Add: c.delta.Add[:to.add], Keep: c.delta.Keep[:to.keep]}
	c.undos, c.release = c.undos[:to.undos], c.release[:to.release]
}

// finish lets go of what the operation no longer needs.
func (c *change) finish() {
	for _, e := range c.release {
		c.m.sockets.Release(e)
	}
}
