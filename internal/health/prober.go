// SPDX-License-Identifier: Apache-2.0

package health

import (
	"context"
	"log/slog"
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cilium/statedb"

	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/state"
)

const (
	baseInterval = time.Minute
	// A cluster of any size starts no more probes than this: nodes a second, and nodes at once.
	startGap = 20 * time.Millisecond
	parallel = 32
	// A node that did not answer is asked again sooner, by this factor.
	retryFactor = 6
)

// Interval is the time between two probes of a node: it grows with the logarithm of the cluster's size, as the field's
// does, so that the probes a node answers do not grow as its cluster does.
func Interval(nodes int) time.Duration {
	return time.Duration(float64(baseInterval) * math.Log1p(float64(nodes)))
}

// Config is what a Prober needs.
type Config struct {
	Tables *state.Tables
	Port   uint16 // of responders
	Log    *slog.Logger

	// Ping and Hello ask; nil: the functions of that name.
	Ping  func(context.Context, netip.Addr) (time.Duration, error)
	Hello func(context.Context, netip.AddrPort) (time.Duration, error)
}

// Prober asks all nodes, each again and again.
type Prober struct {
	cfg      Config
	interval atomic.Int64
}

// NewProber prepares a prober.
func NewProber(cfg Config) *Prober {
	if cfg.Ping == nil {
		cfg.Ping = Ping
	}
	if cfg.Hello == nil {
		cfg.Hello = Hello
	}
	return &Prober{cfg: cfg}
}

// Interval is the present time between two probes of a node.
func (p *Prober) Interval() time.Duration { return time.Duration(p.interval.Load()) }

// peer is a node in the prober's eyes.
type peer struct {
	health  model.NodeHealth // as in the table
	due     time.Time
	probing bool
}

// Run asks until ctx ends. A node is asked for the first time, and when its addresses have changed, as soon as the
// limits allow; then at intervals of up to a tenth more or less, so that nodes which came together are not asked together
// for long.
func (p *Prober) Run(ctx context.Context) error {
	peers := map[string]*peer{}
	results := make(chan model.NodeHealth, parallel) // none is stuck
	var probes sync.WaitGroup
	defer probes.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	timer := time.NewTimer(0)
	defer timer.Stop()
	look := func() <-chan struct{} {
		nodes, changed := p.cfg.Tables.Nodes.AllWatch(p.cfg.Tables.DB.ReadTxn())
		p.follow(peers, statedb.Collect(nodes))
		return changed
	}
	changed := look()
	running, started := 0, time.Time{}
	for ctx.Err() == nil {
		var next *peer
		for _, x := range peers {
			if !x.probing && len(x.health.Paths) > 0 && (next == nil || x.due.Before(next.due)) {
				next = x
			}
		}
		if next != nil && running < parallel {
			now := time.Now()
			at := next.due
			if earliest := started.Add(startGap); at.Before(earliest) {
				at = earliest
			}
			if !at.After(now) {
				next.probing, started = true, now
				running++
				health := next.health
				probes.Go(func() { results <- p.probe(ctx, health) })
				continue
			}
			timer.Reset(at.Sub(now))
		}
		select {
		case <-ctx.Done():
		case <-changed:
			changed = look()
		case <-timer.C:
		case r := <-results:
			running--
			if x := peers[r.Name]; x != nil && ctx.Err() == nil {
				x.probing = false
				p.finish(x, r)
			}
		}
	}
	return nil
}

// follow makes peers and rows those of nodes.
func (p *Prober) follow(peers map[string]*peer, nodes []model.Node) {
	p.interval.Store(int64(Interval(len(nodes))))
	now := time.Now()
	var write, gone []model.NodeHealth
	present := make(map[string]bool, len(nodes))
	for _, n := range nodes {
		present[n.Name] = true
		x := peers[n.Name]
		if x == nil {
			x = &peer{health: model.NodeHealth{Name: n.Name}, due: now}
			peers[n.Name] = x
			write = append(write, x.health)
		}
		paths := pathsOf(n, x.health.Paths)
		if x.health.Local == n.Local && slices.EqualFunc(paths, x.health.Paths, samePath) {
			continue
		}
		x.health.Local, x.health.Paths, x.due = n.Local, paths, now
		write = append(write, x.health)
	}
	for name, x := range peers {
		if !present[name] {
			gone = append(gone, x.health)
			delete(peers, name)
		}
	}
	if len(write) > 0 {
		state.Insert(p.cfg.Tables.DB, p.cfg.Tables.NodeHealth, write...)
	}
	if len(gone) > 0 {
		state.Delete(p.cfg.Tables.DB, p.cfg.Tables.NodeHealth, gone...)
	}
}

// pathsOf are the paths to a node, with what is known of them.
func pathsOf(n model.Node, known []model.HealthPath) []model.HealthPath {
	paths := make([]model.HealthPath, 0, len(n.Addrs)+len(n.Health))
	for i, addrs := range [][]netip.Addr{n.Addrs, n.Health} {
		for _, addr := range addrs {
			path := model.HealthPath{Addr: addr, Endpoint: i == 1}
			if k := slices.IndexFunc(known, func(x model.HealthPath) bool { return samePath(x, path) }); k >= 0 {
				path = known[k]
			}
			paths = append(paths, path)
		}
	}
	return paths
}

func samePath(a, b model.HealthPath) bool { return a.Addr == b.Addr && a.Endpoint == b.Endpoint }

// probe asks one node at all addresses, in both ways, at once.
func (p *Prober) probe(ctx context.Context, n model.NodeHealth) model.NodeHealth {
	n.Paths = slices.Clone(n.Paths)
	var asking sync.WaitGroup
	for i := range n.Paths {
		path := &n.Paths[i]
		asking.Go(func() {
			path.ICMP = outcome(path.ICMP, func() (time.Duration, error) { return p.cfg.Ping(ctx, path.Addr) })
		})
		asking.Go(func() {
			path.HTTP = outcome(path.HTTP, func() (time.Duration, error) {
				return p.cfg.Hello(ctx, netip.AddrPortFrom(path.Addr, p.cfg.Port))
			})
		})
	}
	asking.Wait()
	return n
}

func outcome(before model.ProbeResult, ask func() (time.Duration, error)) model.ProbeResult {
	r := model.ProbeResult{At: time.Now().UTC()}
	rtt, err := ask()
	if err != nil {
		r.Error = err.Error()
	} else {
		r.RTT = rtt
	}
	if r.Since = before.Since; before.At.IsZero() || before.Failed() != r.Failed() {
		r.Since = r.At
	}
	return r
}

// finish takes over what a probe has found. Addresses may have come and gone while it ran.
func (p *Prober) finish(x *peer, found model.NodeHealth) {
	before := x.health
	paths := slices.Clone(x.health.Paths)
	all := true
	for i, path := range paths {
		k := slices.IndexFunc(found.Paths, func(f model.HealthPath) bool { return samePath(f, path) })
		if k < 0 {
			all = false
			continue
		}
		paths[i] = found.Paths[k]
	}
	x.health.Paths = paths
	state.Insert(p.cfg.Tables.DB, p.cfg.Tables.NodeHealth, x.health)
	if all {
		x.due = time.Now().Add(p.pause(x.health))
	}
	switch failed := x.health.Failed(); {
	case failed && !before.Failed():
		p.cfg.Log.Warn("node does not answer health probes", "node", x.health.Name, "probes", failures(x.health))
	case !failed && before.Failed():
		p.cfg.Log.Info("node answers health probes again", "node", x.health.Name)
	}
}

// pause is the time until the next probe.
func (p *Prober) pause(n model.NodeHealth) time.Duration {
	pause := p.Interval()
	if n.Failed() {
		pause /= retryFactor
	}
	return pause*9/10 + rand.N(pause/5+1)
}

// failures names the probes of a node that were not answered.
func failures(n model.NodeHealth) string {
	var out []string
	for _, path := range n.Paths {
		where := " to node "
		if path.Endpoint {
			where = " to endpoint "
		}
		for _, r := range []struct {
			kind string
			model.ProbeResult
		}{{"ICMP", path.ICMP}, {"HTTP", path.HTTP}} {
			if r.Failed() {
				out = append(out, r.kind+where+path.Addr.String()+": "+r.Error)
			}
		}
	}
	return strings.Join(out, "; ")
}
