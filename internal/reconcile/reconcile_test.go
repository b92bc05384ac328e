// SPDX-License-Identifier: Apache-2.0

package reconcile

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// table is a minimal source of wanted rows.
type table struct {
	mu       sync.Mutex
	rows     map[string]int
	complete bool
	changed  chan struct{}

	partial bool // snapshots name what differs from the one before
	told    Snapshot[string, int]
}

func newTable(complete bool, rows map[string]int) *table {
	return &table{rows: rows, complete: complete, changed: make(chan struct{})}
}

func (t *table) set(complete bool, rows map[string]int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.rows, t.complete = rows, complete
	close(t.changed)
	t.changed = make(chan struct{})
}

func (t *table) desired() Snapshot[string, int] {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := Snapshot[string, int]{Rows: maps.Clone(t.rows), Complete: t.complete, Changed: []<-chan struct{}{t.changed}}
	before := t.told
	t.told = s
	if s.Partial = t.partial && before.Rows != nil && before.Complete == s.Complete; !s.Partial {
		return s
	}
	for _, rows := range []map[string]int{s.Rows, before.Rows} {
		for k := range rows {
			now, ok := s.Rows[k]
			if was, had := before.Rows[k]; now != was || ok != had {
				s.Touched = append(s.Touched, k)
			}
		}
	}
	return s
}

type fixture struct {
	loop    *Loop[string, int]
	health  func() Health
	written func() int
}

// start runs a loop inside a synctest bubble and stops it at the end of the test.
func start(t *testing.T, src *table, tgt *Fault[string, int], tweak ...func(*Config[string, int])) fixture {
	t.Helper()
	var mu sync.Mutex
	var h Health
	var writes int
	cfg := Config[string, int]{
		Name: "test", Target: tgt, Desired: src.desired, Equal: Comparable[int], Compare: strings.Compare,
		Report:  func(x Health) { mu.Lock(); h = x; mu.Unlock() },
		Written: func(p, d int) { mu.Lock(); writes += p + d; mu.Unlock() },
	}
	for _, f := range tweak {
		f(&cfg)
	}
	l := New(cfg)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- l.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run returned %v", err)
		}
	})
	synctest.Wait()
	return fixture{
		loop:    l,
		health:  func() Health { mu.Lock(); defer mu.Unlock(); return h },
		written: func() int { mu.Lock(); defer mu.Unlock(); return writes },
	}
}

func wantRows(t *testing.T, tgt *Fault[string, int], want map[string]int) {
	t.Helper()
	if got := tgt.Rows(); !maps.Equal(got, want) {
		t.Errorf("target has %v, want %v", got, want)
	}
}

func wantHistory(t *testing.T, tgt *Fault[string, int], want ...string) {
	t.Helper()
	if got := tgt.History(); !slices.Equal(got, want) {
		t.Errorf("writes were %v, want %v", got, want)
	}
}

func TestWritesOnlyDifferences(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := newTable(true, map[string]int{"a": 1, "b": 2, "c": 3})
		tgt := NewFault(map[string]int{"a": 1, "b": 1, "z": 9})
		start(t, src, tgt)
		wantHistory(t, tgt, "put b", "put c", "delete z") // puts first
		wantRows(t, tgt, map[string]int{"a": 1, "b": 2, "c": 3})
	})
}

func TestAppliedTwiceWritesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rows := map[string]int{"a": 1}
		src := newTable(true, rows)
		tgt := NewFault(rows)
		f := start(t, src, tgt)
		src.set(true, map[string]int{"a": 1})
		synctest.Wait()
		time.Sleep(time.Hour) // re-reads included
		wantHistory(t, tgt)
		if tgt.Lists() < 10 {
			t.Errorf("the target was read %d times in an hour, want one each 5 minutes", tgt.Lists())
		}
		if f.written() != 0 {
			t.Errorf("Written reported %d writes", f.written())
		}
	})
}

func TestNothingIsDeletedBeforeTheSourceIsComplete(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := newTable(false, map[string]int{"a": 1})
		tgt := NewFault(map[string]int{"old": 1})
		start(t, src, tgt)
		wantRows(t, tgt, map[string]int{"a": 1, "old": 1})
		src.set(true, map[string]int{"a": 1})
		synctest.Wait()
		wantRows(t, tgt, map[string]int{"a": 1})
	})
}

func TestOneFailingRowDoesNotBlockOthersAndIsRetried(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := newTable(true, map[string]int{"a": 1, "bad": 2, "c": 3})
		tgt := NewFault[string, int](nil)
		var tries atomic.Int64
		var mended atomic.Bool
		tgt.Fail = func(op string, k string) error {
			if op == "put" && k == "bad" {
				tries.Add(1)
				if !mended.Load() {
					return errors.New("no space")
				}
			}
			return nil
		}
		f := start(t, src, tgt)
		wantRows(t, tgt, map[string]int{"a": 1, "c": 3})
		if h := f.health(); h.Failing != 1 || !strings.Contains(h.Message, "put bad: no space") || !h.LastSuccess.IsZero() {
			t.Errorf("health is %+v", h)
		}
		time.Sleep(10 * time.Minute)
		if n := tries.Load(); n < 10 || n > 60 {
			t.Errorf("%d tries in 10 minutes; want exponential backoff up to 30 s", n)
		}
		mended.Store(true)
		time.Sleep(31 * time.Second)
		wantRows(t, tgt, map[string]int{"a": 1, "bad": 2, "c": 3})
		if h := f.health(); h.Failing != 0 || h.Message != "" || h.Errors != 0 || h.LastError.IsZero() {
			t.Errorf("health after recovery is %+v", h)
		}
	})
}

func TestAFailedWriteThatTookEffectIsUndoneWhenUnwanted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := newTable(true, map[string]int{"ghost": 1})
		tgt := NewFault[string, int](nil)
		tgt.Leak = true
		tgt.Fail = func(op string, _ string) error {
			if op == "put" {
				return errors.New("interrupted")
			}
			return nil
		}
		start(t, src, tgt)
		wantRows(t, tgt, map[string]int{"ghost": 1})
		src.set(true, nil)
		time.Sleep(time.Minute)
		wantRows(t, tgt, map[string]int{})
	})
}

func TestListFailureIsRetriedAndNothingIsWrittenBlindly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := newTable(true, map[string]int{"a": 1})
		tgt := NewFault(map[string]int{"z": 1})
		var mended atomic.Bool
		tgt.Fail = func(op string, _ string) error {
			if !mended.Load() && op == "list" {
				return errors.New("dump interrupted")
			}
			return nil
		}
		f := start(t, src, tgt)
		wantHistory(t, tgt)
		if h := f.health(); !strings.Contains(h.Message, "list: dump interrupted") {
			t.Errorf("health is %+v", h)
		}
		if err := f.loop.Sync(t.Context(), "a"); err == nil {
			t.Error("Sync succeeded although the target cannot be read")
		}
		mended.Store(true)
		time.Sleep(time.Minute)
		wantRows(t, tgt, map[string]int{"a": 1})
	})
}

func TestDriftIsRepairedByTheReread(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := newTable(true, map[string]int{"a": 1})
		tgt := NewFault[string, int](nil)
		start(t, src, tgt)
		tgt.Set("a", 7)
		tgt.Set("stranger", 7)
		time.Sleep(6 * time.Minute)
		wantRows(t, tgt, map[string]int{"a": 1})
	})
}

func TestRefreshRepairsAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := newTable(true, map[string]int{"a": 1})
		tgt := NewFault[string, int](nil)
		f := start(t, src, tgt)
		tgt.History()
		tgt.Set("a", 7)
		f.loop.Refresh()
		synctest.Wait()
		wantHistory(t, tgt, "put a")
		wantRows(t, tgt, map[string]int{"a": 1})
	})
}

func TestThrottleBoundsPassesButNotTheFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := newTable(true, nil)
		tgt := NewFault[string, int](nil)
		start(t, src, tgt, func(c *Config[string, int]) { c.Throttle = 100 * time.Millisecond })
		time.Sleep(time.Second)
		src.set(true, map[string]int{"a": 0})
		synctest.Wait()
		wantHistory(t, tgt, "put a")
		for i := range 50 {
			src.set(true, map[string]int{"a": i + 1})
			time.Sleep(time.Millisecond)
		}
		time.Sleep(100 * time.Millisecond)
		if n := len(tgt.History()); n > 2 {
			t.Errorf("50 changes in 50 ms made %d writes", n)
		}
		wantRows(t, tgt, map[string]int{"a": 50})
	})
}

func TestSyncReturnsTheErrorsOfItsRowsOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := newTable(true, map[string]int{"good": 1, "bad": 1})
		tgt := NewFault[string, int](nil)
		tgt.Fail = func(op, k string) error {
			if k == "bad" {
				return errors.New("broken")
			}
			return nil
		}
		f := start(t, src, tgt, func(c *Config[string, int]) { c.Throttle = time.Hour })
		src.set(true, map[string]int{"good": 2, "bad": 2})
		if err := f.loop.Sync(t.Context(), "good"); err != nil {
			t.Errorf("good: %v", err)
		}
		if got := tgt.Rows()["good"]; got != 2 {
			t.Errorf("Sync returned before the row was written: %d", got)
		}
		if err := f.loop.Sync(t.Context(), "bad"); err == nil || !strings.Contains(err.Error(), "broken") {
			t.Errorf("bad: %v", err)
		}
		if err := f.loop.Sync(t.Context()); err == nil {
			t.Error("Sync of all rows hid the failing one")
		}
	})
}

// Any order of changes with any failures ends in the same state once the failures stop.
func TestShuffledChangesAndFaultsConverge(t *testing.T) {
	for _, independent := range []bool{false, true} {
		t.Run(fmt.Sprintf("independent=%v", independent), func(t *testing.T) { shuffle(t, independent) })
	}
}

func shuffle(t *testing.T, apart bool) {
	for seed := range uint64(30) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				rng := rand.New(rand.NewPCG(seed, 1))
				src := newTable(false, map[string]int{})
				src.partial = seed%4 < 2
				tgt := NewFault(map[string]int{"k0": 3, "k7": 1, "left": 1})
				tgt.Leak = seed%2 == 0
				faults := rand.New(rand.NewPCG(seed, 2)) // used under the target's lock
				var mended atomic.Bool
				tgt.Fail = func(string, string) error {
					if !mended.Load() && faults.IntN(3) == 0 {
						return errors.New("injected")
					}
					return nil
				}
				if apart {
					to := newSlow(tgt)
					to.delay = map[string]time.Duration{"k1": time.Millisecond, "k2": 30 * time.Millisecond}
					defer func() {
						if to.clash != "" {
							t.Errorf("two writes of %s at the same time", to.clash)
						}
					}()
					independent(t, src, to)
				} else {
					start(t, src, tgt)
				}
				rows := map[string]int{}
				for range 200 {
					k := fmt.Sprintf("k%d", rng.IntN(10))
					if rng.IntN(3) == 0 {
						delete(rows, k)
					} else {
						rows[k] = rng.IntN(4)
					}
					src.set(rng.IntN(2) == 0, maps.Clone(rows))
					time.Sleep(time.Duration(rng.IntN(50)) * time.Millisecond)
				}
				synctest.Wait()
				mended.Store(true)
				src.set(true, maps.Clone(rows))
				time.Sleep(6 * time.Minute)
				wantRows(t, tgt, rows)
			})
		})
	}
}

// A pass over a partial snapshot looks at its rows and at those that failed before, and at no others.
func TestPartialSnapshotCostsWhatChanged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rows := map[string]int{}
		for i := range 1000 {
			rows[fmt.Sprint("k", i)] = i
		}
		src, tgt := newTable(true, rows), NewFault(map[string]int{})
		src.partial = true
		var fail atomic.Bool
		tgt.Fail = func(_, k string) error {
			if fail.Load() && k == "k1" {
				return errors.New("no")
			}
			return nil
		}
		compared := 0
		start(t, src, tgt, func(c *Config[string, int]) {
			c.Equal = func(a, b int) bool { compared++; return a == b }
		})
		wantRows(t, tgt, rows)
		change := func(f func()) {
			rows = maps.Clone(rows)
			f()
			src.set(true, rows)
			synctest.Wait()
		}
		compared = 0
		fail.Store(true)
		change(func() { rows["k1"], rows["new"] = -1, 5; delete(rows, "k2") })
		change(func() { rows["k3"] = -3 })
		if compared > 4 {
			t.Errorf("%d rows compared", compared)
		}
		fail.Store(false)
		time.Sleep(time.Second)
		synctest.Wait()
		wantRows(t, tgt, rows)
		// Listing the target anew is no reason to trust it with the rest.
		if err := tgt.Delete(t.Context(), "k500"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Minute)
		synctest.Wait()
		wantRows(t, tgt, rows)
	})
}

// A machine that is busy with other things makes a small change take long; that is no reason to wait for nine times as long.
func TestOnlyWholeSnapshotsAreRationed(t *testing.T) {
	for _, partial := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			src, tgt := newTable(true, map[string]int{}), NewFault(map[string]int{})
			src.partial = partial
			start(t, src, tgt, func(c *Config[string, int]) {
				c.Desired = func() Snapshot[string, int] {
					time.Sleep(time.Second)
					return src.desired()
				}
			})
			time.Sleep(10 * time.Minute / 4)
			src.set(true, map[string]int{"a": 1}) // the first of a burst runs at once
			time.Sleep(1100 * time.Millisecond)
			src.set(true, map[string]int{"a": 2})
			time.Sleep(2 * time.Second)
			synctest.Wait()
			if got := tgt.Rows()["a"]; (got == 2) != partial {
				t.Errorf("partial %v: row is %d", partial, got)
			}
			time.Sleep(10 * time.Second)
			wantRows(t, tgt, map[string]int{"a": 2})
		})
	}
}

func newSlow(fault *Fault[string, int]) *slow { return &slow{Fault: fault, writing: map[string]bool{}} }

// slow is a target reached over a network: its writes take a second, or as long as delay says.
type slow struct {
	*Fault[string, int]
	delay map[string]time.Duration

	mu      sync.Mutex
	writing map[string]bool
	clash   string // a row that was written twice at the same time
	most    int
}

func (s *slow) write(ctx context.Context, k string, f func() error) error {
	s.mu.Lock()
	if s.writing[k] {
		s.clash = k
	}
	s.writing[k] = true
	s.most = max(s.most, len(s.writing))
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.writing, k)
	}()
	delay, ok := s.delay[k]
	if !ok {
		delay = time.Second
	}
	select {
	case <-time.After(delay):
		return f()
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (s *slow) Put(ctx context.Context, k string, v int) error {
	return s.write(ctx, k, func() error { return s.Fault.Put(ctx, k, v) })
}

func (s *slow) Delete(ctx context.Context, k string) error {
	return s.write(ctx, k, func() error { return s.Fault.Delete(ctx, k) })
}

func TestParallelWritesOfASlowTarget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rows, old := map[string]int{}, map[string]int{}
		for i := range 20 {
			rows[fmt.Sprint("new", i)], old[fmt.Sprint("old", i)] = i, i
		}
		src, fault := newTable(true, rows), NewFault(old)
		fault.Fail = func(op, k string) error {
			if k == "new3" || k == "old3" {
				return errors.New("no")
			}
			return nil
		}
		tgt := newSlow(fault)
		f := start(t, src, fault, func(c *Config[string, int]) { c.Target, c.Compare, c.Parallel = tgt, nil, 8 })
		time.Sleep(6*time.Second + 50*time.Millisecond) // three batches of puts, three of deletes
		synctest.Wait()
		if got := f.health(); tgt.most != 8 || got.Failing != 2 || got.Rows != 20 {
			t.Errorf("%d at a time, %+v", tgt.most, got)
		}
		for i, w := range fault.History() {
			if strings.HasPrefix(w, "put") != (i < 19) {
				t.Errorf("write %d is %s", i, w)
			}
		}
		src.set(true, rows)
		fault.mu.Lock()
		fault.Fail = nil
		fault.mu.Unlock()
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if got := fault.Rows(); !maps.Equal(got, rows) {
			t.Errorf("rows are %v", got)
		}
	})
}

// independent starts a loop that does not wait for writes, at most four at a time.
func independent(t *testing.T, src *table, tgt *slow) fixture {
	return start(t, src, tgt.Fault, func(c *Config[string, int]) {
		c.Target, c.Compare, c.Parallel, c.Independent = tgt, nil, 4, true
	})
}

func TestASlowWriteHoldsUpItsOwnRowOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := newTable(true, map[string]int{"slow": 1, "a": 1})
		src.partial = true
		tgt := newSlow(NewFault(map[string]int{"old": 1}))
		tgt.delay = map[string]time.Duration{"slow": time.Minute}
		f := independent(t, src, tgt)
		time.Sleep(1100 * time.Millisecond)
		wantRows(t, tgt.Fault, map[string]int{"a": 1})
		src.set(true, map[string]int{"slow": 2, "b": 1}) // while the first value of slow is on its way
		time.Sleep(1100 * time.Millisecond)
		wantRows(t, tgt.Fault, map[string]int{"b": 1})
		time.Sleep(time.Minute)
		wantRows(t, tgt.Fault, map[string]int{"slow": 1, "b": 1})
		time.Sleep(time.Minute)
		wantRows(t, tgt.Fault, map[string]int{"slow": 2, "b": 1})
		src.set(true, map[string]int{"slow": 3, "b": 1})
		time.Sleep(time.Second)
		src.set(true, map[string]int{"b": 1}) // no longer wanted while it is written
		time.Sleep(2 * time.Minute)
		wantRows(t, tgt.Fault, map[string]int{"b": 1})
		if tgt.clash != "" || f.health().Rows != 1 || f.written() != 8 {
			t.Errorf("two writes of %q at the same time, %d writes, %+v", tgt.clash, f.written(), f.health())
		}
	})
}

func TestAnIndependentTargetsFailuresAndLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rows := map[string]int{}
		for i := range 20 {
			rows[fmt.Sprint("k", i)] = i
		}
		src, tgt := newTable(true, rows), newSlow(NewFault(map[string]int{}))
		tgt.Fail = func(op, k string) error {
			if k == "k3" {
				return errors.New("no")
			}
			return nil
		}
		f := independent(t, src, tgt)
		if err := f.loop.Sync(t.Context(), "k3", "k4"); err == nil || !strings.Contains(err.Error(), "put k3: no") {
			t.Errorf("Sync: %v", err)
		}
		if h := f.health(); tgt.most != 4 || h.Failing != 1 || h.Rows != 19 {
			t.Errorf("%d at a time, %+v", tgt.most, h)
		}
		tgt.Fault.mu.Lock()
		tgt.Fail = nil
		tgt.Fault.mu.Unlock()
		if err := f.loop.Sync(t.Context(), "k3"); err != nil {
			t.Errorf("Sync: %v", err)
		}
		wantRows(t, tgt.Fault, rows)
	})
}
