// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// Kinds is all kinds of traffic, in the order of the report.
var Kinds = []string{RR, CRR, Stream, StreamX, Flood}

// Options says what to measure and for how long.
type Options struct {
	Rounds   int           // at least 1; ten for a result
	Cell     time.Duration // measured time of one connection
	Paths    []Path
	Kinds    []string
	Families []int // 4, 6
	Say      func(format string, args ...any)
}

// warmTime precedes the measured time of each cell, on the same connection.
func (o Options) warmTime() time.Duration { return max(o.Cell/5, 30*time.Millisecond) }

// Cell is one figure: of a path, or of its baseline as it was measured beside it.
type Cell struct {
	Round  int     `json:"round"`
	Path   string  `json:"path"`
	Beside string  `json:"beside,omitempty"` // of a baseline: the path that this is to be compared with
	Kind   string  `json:"kind"`
	Family int     `json:"family"`
	Value  float64 `json:"value"` // rr: µs an exchange; crr: connects a second, median over slices of 5 ms; streams: Gbit/s; pps: datagrams a second
	Error  string  `json:"error,omitempty"`
}

// wired is a path that is set up, with a worker at each end.
type wired struct {
	Path
	pair           Pair
	client, server *worker
}

// bed is everything set up: topology and workers.
type bed struct {
	topology   *Topology
	paths      []*wired
	congestion string
	cpus       [2]int // the one that both ends share, and streamx's other
	realTime   bool
}

// newBed sets all paths up. It must be called, and the bed used, on a locked
// thread: the workers die with it.
func newBed(o Options) (*bed, error) {
	b := &bed{}
	if err := b.setUp(o); err != nil {
		b.close()
		return nil, err
	}
	return b, nil
}

func (b *bed) setUp(o Options) (err error) {
	if b.cpus, err = pickCPUs(); err != nil {
		return err
	}
	if b.topology, err = NewTopology(); err != nil {
		return err
	}
	for _, p := range o.Paths {
		w := &wired{Path: p}
		b.paths = append(b.paths, w)
		if w.pair, err = p.Setup(b.topology); err != nil {
			return fmt.Errorf("path %s: %w", p.Name, err)
		}
		if w.client, err = startWorker(w.pair.Client, w.pair.Group); err != nil {
			return err
		}
		if w.server, err = startWorker(w.pair.Server, w.pair.Group); err != nil {
			return err
		}
	}
	b.congestion = "reno" // always there; cubic is what most systems use
	if b.check("cubic") == nil {
		b.congestion = "cubic"
	}
	return nil
}

// check asks a worker to listen with the algorithm: it may not be in this kernel.
func (b *bed) check(algorithm string) error {
	w := b.paths[0].server
	if err := w.tell(order{Do: "check", Addr: netip.AddrPortFrom(netip.IPv6Unspecified(), 0), CPU: b.cpus[0], Congestion: algorithm}); err != nil {
		return err
	}
	a, err := w.hear()
	b.realTime = a.RealTime
	return err
}

func (b *bed) close() {
	for _, w := range b.paths {
		for _, end := range []*worker{w.client, w.server} {
			if end != nil {
				end.stop()
			}
		}
	}
	if b.topology != nil {
		b.topology.Close()
	}
}

// pickCPUs prefers the last CPUs: interrupts favour the first.
func pickCPUs() ([2]int, error) {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return [2]int{}, fmt.Errorf("CPUs of this process: %w", err)
	}
	var cpus []int
	for i := range runtime.NumCPU() + 1024 {
		if set.IsSet(i) {
			cpus = append(cpus, i)
		}
	}
	if len(cpus) == 0 {
		return [2]int{}, errors.New("this process may run on no CPU")
	}
	last := cpus[len(cpus)-1]
	other := last
	if len(cpus) > 1 {
		other = cpus[len(cpus)-2]
	}
	return [2]int{last, other}, nil
}

// cell runs one measurement.
func (b *bed) cell(w *wired, kind string, family int, warm, duration time.Duration) (client, server Result, err error) {
	if w.pair.Around != nil {
		end, err := w.pair.Around()
		if err != nil {
			return client, server, err
		}
		defer end()
	}
	addr := w.pair.Server4
	if family == 6 {
		addr = w.pair.Server6
	}
	o := order{Do: "listen", Kind: kind, Addr: netip.AddrPortFrom(addr, 0), CPU: b.cpus[0], Congestion: b.congestion, Warm: warm, Duration: duration}
	if err := w.server.tell(o); err != nil {
		return client, server, err
	}
	a, err := w.server.hear()
	if err != nil {
		return client, server, fmt.Errorf("server: %w", err)
	}
	o.Do = "serve"
	if err := w.server.tell(o); err != nil {
		return client, server, err
	}
	o.Do, o.Addr = "drive", netip.AddrPortFrom(addr, a.Port)
	if w.pair.Frontend != nil {
		if o.Addr, err = w.pair.Frontend(o.Addr); err != nil {
			return client, server, err
		}
	}
	if kind == StreamX {
		o.CPU = b.cpus[1]
	}
	if err := w.client.tell(o); err != nil {
		return client, server, err
	}
	c, cErr := w.client.hear()
	s, sErr := w.server.hear()
	if cErr != nil {
		err = fmt.Errorf("client: %w", cErr)
	}
	if sErr != nil {
		err = errors.Join(err, fmt.Errorf("server: %w", sErr))
	}
	return c.Result, s.Result, err
}

// value is the figure of a cell, from what both ends saw.
func value(kind string, client, server Result) float64 {
	switch kind {
	case RR:
		return float64(client.P50) / 1e3
	case CRR:
		return 1 / client.P50.Seconds()
	case Flood:
		return float64(server.Count) / client.Time.Seconds()
	}
	return float64(server.Count) * 8 / server.Time.Seconds() / 1e9
}

// repeats is how many connections one figure is the median of. Of streams about one in five settles at four fifths of
// the others' rate, on every path, bare ones included; connects scatter most.
func repeats(kind string) int {
	switch kind {
	case Stream, StreamX:
		return 3
	case CRR:
		return 4
	}
	return 2
}

// comparison is a path and its baseline, measured by turns: what changes in the machine meanwhile, changes for both.
type comparison struct {
	path, baseline *wired // nil: the path is a baseline that nothing is compared with
	kind           string
}

// comparisons are all that one round makes.
func comparisons(paths []*wired, kinds []string) []comparison {
	var all []comparison
	for _, w := range paths {
		for _, kind := range kinds {
			c := comparison{path: w, kind: kind}
			if i := slices.IndexFunc(paths, func(b *wired) bool { return b.Name == w.Against }); i >= 0 {
				c.baseline = paths[i]
			}
			compared := slices.ContainsFunc(paths, func(o *wired) bool { return o.Against == w.Name && o.carries(kind) })
			if w.carries(kind) && (c.baseline != nil || !compared) {
				all = append(all, c)
			}
		}
	}
	return all
}

// compare measures both sides of a comparison in each family, the families in any order: baseline, path, path, baseline, and
// so on. An error is the figure's.
func (b *bed) compare(c comparison, round int, o Options) []Cell {
	var cells []Cell
	for _, i := range rand.Perm(len(o.Families)) {
		sides := []Cell{{Round: round, Path: c.path.Name, Kind: c.kind, Family: o.Families[i]}}
		ends := []*wired{c.path}
		if c.baseline != nil {
			sides = append(sides, Cell{Round: round, Path: c.baseline.Name, Beside: c.path.Name, Kind: c.kind, Family: o.Families[i]})
			ends = append(ends, c.baseline)
		}
		values := make([][]float64, len(sides))
		for n := range repeats(c.kind) * len(sides) {
			at := len(sides) - 1 - n%len(sides)
			if n/len(sides)%2 == 1 {
				at = n % len(sides)
			}
			client, server, err := b.cell(ends[at], c.kind, sides[at].Family, o.warmTime(), o.Cell)
			if err != nil {
				sides[at].Error = err.Error()
				o.Say("%s %s IPv%d: %v", sides[at].Path, c.kind, sides[at].Family, err)
				continue
			}
			values[at] = append(values[at], value(c.kind, client, server))
		}
		for at := range sides {
			sides[at].Value = quantile(values[at], .5)
		}
		cells = append(cells, sides...)
	}
	return cells
}

// rounds makes every comparison once a round, in any order.
func (b *bed) rounds(ctx context.Context, o Options) ([]Cell, error) {
	var cells []Cell
	all := comparisons(b.paths, o.Kinds)
	begin := time.Now()
	for round := range o.Rounds {
		rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
		for _, c := range all {
			if ctx.Err() != nil {
				return cells, ctx.Err()
			}
			cells = append(cells, b.compare(c, round, o)...)
		}
		for _, c := range b.topology.clusters {
			if err := c.sweep(ctx); err != nil {
				return cells, err
			}
		}
		spent := time.Since(begin)
		left := spent / time.Duration(round+1) * time.Duration(o.Rounds-round-1)
		o.Say("round %d of %d done, %s left", round+1, o.Rounds, left.Round(time.Second))
	}
	return cells, nil
}

// Run sets the paths up, measures them and takes everything down.
func Run(ctx context.Context, o Options) (*Report, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	b, err := newBed(o)
	if err != nil {
		return nil, err
	}
	defer b.close()
	o.Say("%d paths are set up; %d rounds, about %s", len(b.paths), o.Rounds, b.estimate(o).Round(time.Second))
	cells, err := b.rounds(ctx, o)
	if err != nil {
		return nil, err
	}
	programs, err := b.programs(ctx, o)
	if err != nil {
		return nil, err
	}
	report := newReport(o, b, cells, programs)
	if c := b.topology.clusters[native]; c != nil {
		if report.Lookups, err = c.lookups(); err != nil {
			return nil, err
		}
		for _, l := range report.Lookups {
			report.OK = report.OK && l.Verdict == pass
		}
	}
	return report, nil
}

// estimate is how long the rounds take: what precedes and follows a connection's measured time is some 20 ms.
func (b *bed) estimate(o Options) time.Duration {
	n := 0
	for _, c := range comparisons(b.paths, o.Kinds) {
		sides := 1
		if c.baseline != nil {
			sides = 2
		}
		n += sides * repeats(c.kind)
	}
	return time.Duration(o.Rounds*n*len(o.Families)) * (o.Cell + o.warmTime() + 20*time.Millisecond)
}
