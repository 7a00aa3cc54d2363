package main

import (
	"fmt"
	"path/filepath"
	"strings"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/plotutil"
	"gonum.org/v1/plot/vg"
)

// plots draws what depends on the rows that are there.
func (r *runner) plots(dir string) error {
	for _, p := range []struct {
		what, unit string
		factor     float64
		log        bool
		sizes      []int
	}{
		{add, "ms", 1000, true, r.sizes},
		{remove, "ms", 1000, true, r.sizes},
		{rate, "of those without a mapper", 1, false, r.busy},
	} {
		c := plot.New()
		c.Title.Text, c.X.Label.Text, c.Y.Label.Text = p.what, "rows there", p.unit
		c.Legend.Top, c.Legend.Left, c.Legend.XOffs = true, true, 16*vg.Centimeter

		if p.log {
			c.Y.Scale, c.Y.Tick.Marker = plot.LogScale{}, plot.LogTicks{Prec: -1}
		} else {
			c.Y.Min = 0
		}

		for i, k := range kinds() {
			if err := r.draw(c, i, k.name, p.what, p.factor, p.sizes); err != nil {
				return err
			}
		}

		c.X.Max *= 1.5 // the legend is there

		file := filepath.Join(dir, strings.ToLower(p.what)+".svg")
		if err := c.Save(24*vg.Centimeter, 12*vg.Centimeter, file); err != nil {
			return fmt.Errorf("draw %s: %w", p.what, err)
		}
	}

	return nil
}

// spread is points with their quartiles.
type spread struct {
	plotter.XYs
	plotter.YErrors
}

func (r *runner) draw(c *plot.Plot, i int, mapper, what string, factor float64, sizes []int) error {
	var s spread

	for _, size := range sizes {
		if values := r.figures[cell{what, mapper, size}]; len(values) > 0 {
			low, middle, high := quartiles(values)
			s.XYs = append(s.XYs, plotter.XY{X: float64(size), Y: middle * factor})
			s.YErrors = append(s.YErrors, struct{ Low, High float64 }{(middle - low) * factor, (high - middle) * factor})
		}
	}

	line, err := plotter.NewLine(s)
	if err != nil {
		return fmt.Errorf("draw %s: %w", mapper, err)
	}

	bars, err := plotter.NewYErrorBars(s)
	if err != nil {
		return fmt.Errorf("draw %s: %w", mapper, err)
	}

	line.Color, line.Dashes = plotutil.Color(i), plotutil.Dashes(i/7)
	bars.Color = line.Color
	c.Add(line, bars)
	c.Legend.Add(mapper, line)

	return nil
}
