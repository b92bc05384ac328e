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
	Cell     time.Duration // measured time of one cell
	Paths    []Path
	Kinds    []string
	Families []int // 4, 6
	Say      func(format string, args ...any)
}

// warmTime precedes the measured time of each cell, on the same connection.
func (o Options) warmTime() time.Duration { return max(o.Cell/5, 30*time.Millisecond) }

// Cell is one measurement.
type Cell struct {
	Round  int     `json:"round"`
	Path   string  `json:"path"`
	Kind   string  `json:"kind"`
	Family int     `json:"family"`
	Value  float64 `json:"value"` // rr: µs an exchange; crr: connects a second; streams: Gbit/s; pps: datagrams a second
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
		return float64(client.Count) / client.Time.Seconds()
	case Flood:
		return float64(server.Count) / client.Time.Seconds()
	}
	return float64(server.Count) * 8 / server.Time.Seconds() / 1e9
}

// streams is how many connections one figure of a stream is the median of: about one connection in five settles at four
// fifths of the others' rate, on every path, bare ones included.
const streams = 3

// measure is the figure of one cell.
func (b *bed) measure(w *wired, kind string, family int, o Options) (float64, error) {
	n := 1
	if kind == Stream || kind == StreamX {
		n = streams
	}
	var values []float64
	for range n {
		client, server, err := b.cell(w, kind, family, o.warmTime(), o.Cell)
		if err != nil {
			return 0, err
		}
		values = append(values, value(kind, client, server))
	}
	return quantile(values, .5), nil
}

// rounds measures every cell once a round. Within a round the kinds come in any
// order, and the paths and families of a kind in any order, next to each other:
// a cell and its baseline share the machine's mood.
func (b *bed) rounds(ctx context.Context, o Options) ([]Cell, error) {
	var cells []Cell
	var err error
	begin := time.Now()
	for round := range o.Rounds {
		kinds := slices.Clone(o.Kinds)
		rand.Shuffle(len(kinds), func(i, j int) { kinds[i], kinds[j] = kinds[j], kinds[i] })
		for _, kind := range kinds {
			block := b.block(o, round, kind)
			for i := range block {
				c := &block[i]
				if ctx.Err() != nil {
					return cells, ctx.Err()
				}
				w := b.paths[slices.IndexFunc(b.paths, func(w *wired) bool { return w.Name == c.Path })]
				if c.Value, err = b.measure(w, kind, c.Family, o); err != nil {
					c.Error = err.Error()
					o.Say("%s %s IPv%d: %v", c.Path, kind, c.Family, err)
				}
				cells = append(cells, *c)
			}
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

func (b *bed) block(o Options, round int, kind string) []Cell {
	var block []Cell
	for _, w := range b.paths {
		for _, f := range o.Families {
			if !w.carries(kind) {
				continue
			}
			block = append(block, Cell{Round: round, Path: w.Name, Kind: kind, Family: f})
		}
	}
	rand.Shuffle(len(block), func(i, j int) { block[i], block[j] = block[j], block[i] })
	return block
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
	o.Say("%d paths are set up; %d rounds, about %s", len(b.paths), o.Rounds, o.estimate().Round(time.Second))
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

func (o Options) estimate() time.Duration {
	n := 0
	for _, p := range o.Paths {
		for _, kind := range o.Kinds {
			switch {
			case !p.carries(kind):
			case kind == Stream || kind == StreamX:
				n += streams
			default:
				n++
			}
		}
	}
	return time.Duration(o.Rounds*n*len(o.Families)) * (o.Cell + o.warmTime() + 60*time.Millisecond)
}
