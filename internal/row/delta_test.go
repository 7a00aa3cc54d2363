package row

import (
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
)

func TestParts(t *testing.T) {
	t.Parallel()

	r := func(port uint16) *Row { return &Row{Endpoint: Endpoint{PortKey: PortKey{Proto: TCP, Port: port}}} }
	d := Delta{Del: []*Row{r(1), r(2), r(3)}, Add: []*Row{r(3), r(1), r(4), r(1)}, Keep: []*Row{r(9)}}

	assert.Len(t, d.Parts(7), 1)
	assert.Len(t, (&Delta{}).Parts(1), 1)

	for most, want := range map[int]string{
		6: "[1 2 3]+[1 1 3] []+[4]",
		4: "[1 2]+[1 1] [3]+[3 4]",
		1: "[1]+[1 1] [2]+[] [3]+[3] []+[4]",
	} {
		var texts []string

		for _, part := range d.Parts(most) {
			ports := map[bool][]uint16{}

			for i, rows := range [][]*Row{part.Del, part.Add} {
				for _, r := range rows {
					ports[i > 0] = append(ports[i > 0], r.Port)
				}
			}

			texts = append(texts, fmt.Sprintf("%v+%v", ports[false], ports[true]))
		}

		assert.Equal(t, want, strings.Join(texts, " "), most)
	}
}
