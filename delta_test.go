package hostport

import (
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
)

func TestParts(t *testing.T) {
	t.Parallel()

	r := func(port uint16) *row { return &row{endpoint: endpoint{portKey: portKey{proto: tcp, port: port}}} }
	d := delta{del: []*row{r(1), r(2), r(3)}, add: []*row{r(3), r(1), r(4), r(1)}, keep: []*row{r(9)}}

	assert.Len(t, d.parts(7), 1)
	assert.Len(t, (&delta{}).parts(1), 1)

	for most, want := range map[int]string{
		6: "[1 2 3]+[1 1 3] []+[4]",
		4: "[1 2]+[1 1] [3]+[3 4]",
		1: "[1]+[1 1] [2]+[] [3]+[3] []+[4]",
	} {
		var texts []string

		for _, part := range d.parts(most) {
			ports := map[bool][]uint16{}

			for i, rows := range [][]*row{part.del, part.add} {
				for _, r := range rows {
					ports[i > 0] = append(ports[i > 0], r.port)
				}
			}

			texts = append(texts, fmt.Sprintf("%v+%v", ports[false], ports[true]))
		}

		assert.Equal(t, want, strings.Join(texts, " "), most)
	}
}
