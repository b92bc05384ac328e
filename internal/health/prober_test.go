// SPDX-License-Identifier: Apache-2.0

package health

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/state"
)

// world is a cluster in which addresses can be dead, and time is virtual.
type world struct {
	t      *testing.T
	tables *state.Tables
	prober *Prober

	mu    sync.Mutex
	dead  map[netip.Addr]bool
	asked map[netip.Addr][]time.Time // by ping
	now   int                        // probes under way
	most  int
}

func inWorld(t *testing.T, test func(w *world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		tables, err := state.New()
		if err != nil {
			t.Fatal(err)
		}
		w := &world{t: t, tables: tables, dead: map[netip.Addr]bool{}, asked: map[netip.Addr][]time.Time{}}
		w.prober = NewProber(Config{
			Tables: tables, Port: 4240, Log: slog.New(slog.DiscardHandler),
			Ping: func(ctx context.Context, a netip.Addr) (time.Duration, error) {
				w.mu.Lock()
				w.asked[a] = append(w.asked[a], time.Now())
				w.now++
				w.most = max(w.most, w.now)
				w.mu.Unlock()
				defer func() { w.mu.Lock(); w.now--; w.mu.Unlock() }()
				return w.answer(ctx, a, 3*time.Second, "Connection timed out")
			},
			Hello: func(ctx context.Context, a netip.AddrPort) (time.Duration, error) {
				return w.answer(ctx, a.Addr(), 3*time.Second, "connection refused")
			},
		})
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- w.prober.Run(ctx) }()
		test(w)
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if err := tables.Stop(); err != nil {
			t.Error(err)
		}
	})
}

func (w *world) answer(ctx context.Context, a netip.Addr, patience time.Duration, problem string) (time.Duration, error) {
	w.mu.Lock()
	dead := w.dead[a]
	w.mu.Unlock()
	if !dead {
		time.Sleep(time.Millisecond)
		return time.Millisecond, nil
	}
	select {
	case <-time.After(patience):
	case <-ctx.Done():
	}
	return 0, errors.New(problem)
}

func (w *world) kill(dead bool, addrs ...string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, a := range addrs {
		w.dead[netip.MustParseAddr(a)] = dead
	}
}

func (w *world) times(addr string) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.asked[netip.MustParseAddr(addr)])
}

func (w *world) row(name string) model.NodeHealth {
	w.t.Helper()
	r, _, ok := w.tables.NodeHealth.Get(w.tables.DB.ReadTxn(), state.NodeHealthByName(name))
	if !ok {
		w.t.Fatalf("no row of %s", name)
	}
	return r
}

func node(name string, own, endpoint []string) model.Node {
	n := model.Node{Name: name, Local: name == "n1"}
	for _, a := range own {
		n.Addrs = append(n.Addrs, netip.MustParseAddr(a))
	}
	for _, a := range endpoint {
		n.Health = append(n.Health, netip.MustParseAddr(a))
	}
	return n
}

var three = []model.Node{
	node("n1", []string{"172.18.0.1", "fd18::1"}, []string{"10.0.1.9", "fd00::109"}),
	node("n2", []string{"172.18.0.2", "fd18::2"}, []string{"10.0.2.9", "fd00::209"}),
	node("n3", []string{"172.18.0.3", "fd18::3"}, nil),
}

func TestEveryAddressIsAskedAtOnceAndThenAtIntervals(t *testing.T) {
	inWorld(t, func(w *world) {
		nodes := slices.Clone(three)
		rand.Shuffle(len(nodes), func(i, j int) { nodes[i], nodes[j] = nodes[j], nodes[i] })
		for _, n := range nodes {
			state.Insert(w.tables.DB, w.tables.Nodes, n)
		}
		time.Sleep(time.Second)
		for _, n := range three {
			r := w.row(n.Name)
			if !r.Reachable() || r.Failed() || len(r.Paths) != len(n.Addrs)+len(n.Health) || r.Local != n.Local {
				t.Errorf("after a second: %+v", r)
			}
		}
		// 60 s * ln(1+3).
		if got := w.prober.Interval().Round(time.Millisecond); got != 83178*time.Millisecond {
			t.Errorf("interval is %v", got)
		}
		time.Sleep(100 * time.Second)
		for _, n := range three {
			for _, a := range append(n.Addrs, n.Health...) {
				if got := w.times(a.String()); got != 2 {
					t.Errorf("%s was asked %d times", a, got)
				}
			}
		}
	})
}

func TestWhatFailsIsNamedWithItsBeginning(t *testing.T) {
	inWorld(t, func(w *world) {
		state.Insert(w.tables.DB, w.tables.Nodes, three...)
		time.Sleep(time.Second)
		w.kill(true, "fd00::209")
		time.Sleep(100 * time.Second)
		r := w.row("n2")
		if !r.Failed() || r.Reachable() || failures(r) != "ICMP to endpoint fd00::209: Connection timed out; HTTP to endpoint fd00::209: connection refused" {
			t.Errorf("failures of n2: %s", failures(r))
		}
		if other := w.row("n3"); !other.Reachable() {
			t.Errorf("n3: %+v", other)
		}
		since := r.Paths[3].ICMP.Since
		// It is asked again sooner than those that answer.
		before, peaceful := w.times("fd00::209"), w.times("fd18::3")
		time.Sleep(80 * time.Second)
		if more, others := w.times("fd00::209")-before, w.times("fd18::3")-peaceful; more < 4 || others > 2 {
			t.Errorf("in 80 s the dead one was asked %d times, another one %d times", more, others)
		}
		if r := w.row("n2"); !r.Paths[3].ICMP.Since.Equal(since) || !r.Paths[3].ICMP.At.After(since) || r.Paths[0].ICMP.Since.After(since) {
			t.Errorf("failing since %v: %+v", since, r.Paths)
		}
		w.kill(false, "fd00::209")
		time.Sleep(20 * time.Second)
		if r := w.row("n2"); !r.Reachable() || !r.Paths[3].ICMP.Since.After(since) {
			t.Errorf("after it came back: %+v", r)
		}
	})
}

func TestNodesThatComeGoAndChange(t *testing.T) {
	inWorld(t, func(w *world) {
		state.Insert(w.tables.DB, w.tables.Nodes, three[0], three[1])
		time.Sleep(30 * time.Second)
		// New: asked at once, not when the others are.
		state.Insert(w.tables.DB, w.tables.Nodes, three[2])
		time.Sleep(time.Second)
		if !w.row("n3").Reachable() {
			t.Error("a new node was not asked at once")
		}
		// Its health endpoint came later; what is known of the node stays, while it is being asked, too.
		w.kill(true, "10.0.3.9")
		state.Insert(w.tables.DB, w.tables.Nodes, node("n3", []string{"172.18.0.3", "fd18::3"}, []string{"10.0.3.9"}))
		time.Sleep(time.Second)
		if r := w.row("n3"); len(r.Paths) != 3 || !r.Paths[0].Answered() || r.Paths[2].Failed() || r.Paths[2].Answered() || r.Failed() || r.Reachable() {
			t.Errorf("while the new address is being asked: %+v", r)
		}
		// It changes in the middle of a probe: the new address is asked at once.
		state.Insert(w.tables.DB, w.tables.Nodes, node("n3", []string{"172.18.0.3", "fd18::3"}, []string{"10.0.3.8"}))
		time.Sleep(3 * time.Second)
		if r := w.row("n3"); len(r.Paths) != 3 || !r.Reachable() {
			t.Errorf("after the address has changed: %+v", r)
		}
		state.Delete(w.tables.DB, w.tables.Nodes, three[2])
		synctest.Wait()
		if _, _, ok := w.tables.NodeHealth.Get(w.tables.DB.ReadTxn(), state.NodeHealthByName("n3")); ok {
			t.Error("a node that is gone has a row")
		}
		asked := w.times("172.18.0.3")
		time.Sleep(5 * time.Minute)
		if w.times("172.18.0.3") != asked {
			t.Error("a node that is gone is asked")
		}
		if got := w.tables.NodeHealth.NumObjects(w.tables.DB.ReadTxn()); got != 2 {
			t.Errorf("%d rows", got)
		}
	})
}

// Thousands of nodes at once, a part of them dead: no burst at the start, none later.
func TestManyNodesAreNoBurst(t *testing.T) {
	if testing.Short() {
		t.Skip("thousands of nodes")
	}
	const count = 1000
	inWorld(t, func(w *world) {
		var nodes []model.Node
		for i := range count {
			a := fmt.Sprintf("10.1.%d.%d", i/250, i%250)
			nodes = append(nodes, node(fmt.Sprint("x", i), []string{a}, nil))
			if i%10 == 0 {
				w.kill(true, a)
			}
		}
		begin := time.Now()
		state.Insert(w.tables.DB, w.tables.Nodes, nodes...)
		time.Sleep(20 * time.Minute)
		perSecond, reachable := map[int]int{}, 0
		w.mu.Lock()
		defer w.mu.Unlock()
		for _, n := range nodes {
			asked := w.asked[n.Addrs[0]]
			if dead := w.dead[n.Addrs[0]]; len(asked) < 2 || !dead && len(asked) > 4 || asked[0].Sub(begin) > 40*time.Second {
				t.Errorf("%s was asked %d times, first after %v", n.Addrs[0], len(asked), asked[0].Sub(begin))
			}
			for _, at := range asked {
				perSecond[int(at.Sub(begin)/time.Second)]++
			}
		}
		for r := range w.tables.NodeHealth.All(w.tables.DB.ReadTxn()) {
			if r.Reachable() {
				reachable++
			}
		}
		busiest := 0
		for _, n := range perSecond {
			busiest = max(busiest, n)
		}
		if busiest > 51 || w.most > parallel || reachable != count-count/10 {
			t.Errorf("%d nodes asked in the busiest second, %d at once at most, %d reachable", busiest, w.most, reachable)
		}
		t.Logf("interval %v, %d nodes asked in the busiest second, %d at once at most", w.prober.Interval(), busiest, w.most)
	})
}

func TestPathsAreKeptWhateverTheOrder(t *testing.T) {
	n := three[1]
	known := pathsOf(n, nil)
	for i := range known {
		known[i].ICMP.RTT = time.Duration(i + 1)
	}
	rand.Shuffle(len(known), func(i, j int) { known[i], known[j] = known[j], known[i] })
	var got []string
	for _, p := range pathsOf(n, known) {
		got = append(got, fmt.Sprint(p.Addr, p.Endpoint, p.ICMP.RTT))
	}
	if want := "172.18.0.2 false 1ns, fd18::2 false 2ns, 10.0.2.9 true 3ns, fd00::209 true 4ns"; strings.Join(got, ", ") != want {
		t.Errorf("got %v", got)
	}
}
