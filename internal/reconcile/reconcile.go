// SPDX-License-Identifier: Apache-2.0

package reconcile

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"maps"
	"reflect"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Target is one kind of kernel object (rows of a map, routes, links ...) that the loop makes equal to a table.
type Target[K comparable, V any] interface {
	// List returns only what is recognisably ours.
	List(ctx context.Context) (map[K]V, error)
	// Put creates or replaces one object.
	Put(ctx context.Context, k K, v V) error
	// Delete removes one object; an object that is already gone is no error.
	Delete(ctx context.Context, k K) error
}

// Snapshot is what is wanted at one moment.
type Snapshot[K comparable, V any] struct {
	Rows map[K]V
	// Complete says that every source of the rows has been read: only then is anything deleted.
	Complete bool
	// Partial says that since the snapshot before no other rows than those of Touched can have changed, be it in value or in
	// whether they are there: a pass then costs what has changed, not what there is.
	Partial bool
	Touched []K
	// Changed are channels of which one is closed when the rows, or Complete, may have changed since.
	Changed []<-chan struct{}
}

// Health is the state of one loop after a pass.
type Health struct {
	Name        string
	Rows        int       // rows known to be in the target
	Failing     int       // rows that failed and will be retried
	LastSuccess time.Time // zero: never
	LastError   time.Time
	Errors      uint64 // failed passes since the last pass without an error
	Message     string // the last error, empty if the last pass had none
}

// Config describes one loop.
type Config[K comparable, V any] struct {
	Name   string
	Target Target[K, V]
	// Desired returns the wanted rows. The loop does not modify the map, and has no use for it after the next call.
	Desired func() Snapshot[K, V]
	Equal   func(a, b V) bool
	// Compare, if set, orders puts; deletes go in the reverse order. Without it the order is arbitrary.
	Compare func(a, b K) int
	// Written, if set, is called after a pass that changed the target, before Sync's callers are answered.
	Written func(puts, deletes int)
	Report  func(Health)
	Log     *slog.Logger

	// Throttle is the least time between two passes caused by changes; the first of a burst runs at once. It grows with
	// the time Desired takes to compute everything: under constant change that is at most a tenth. A partial snapshot costs
	// what has changed, however long it takes on a machine that is busy with other things.
	Throttle time.Duration
	// Parallel is how many puts, and then how many deletes, run at the same time, for targets that are reached over a
	// network; default 1. With Compare it must be 1.
	Parallel int
	// Independent says that no row of the target needs another, or its deletion: a pass begins writes and does not wait
	// for them, so that a slow answer holds up nothing but its own row.
	Independent bool
	// Reread is the time after which the target is listed again, default 5 minutes.
	Reread time.Duration
	// RetryMin and RetryMax bound the delay before a failed row or list is tried again, default 100 ms and 30 s.
	RetryMin, RetryMax time.Duration
}

// Comparable is the Equal function of types for which == says all.
func Comparable[V comparable](a, b V) bool { return a == b }

// Loop keeps a Target equal to its wanted rows.
type Loop[K comparable, V any] struct {
	cfg Config[K, V]

	// Below: used by the goroutine of Run only.
	actual   map[K]V // what the target has; nil: not read
	unknown  map[K]struct{}
	retry    map[K]retry
	listFail retry
	readAt   time.Time
	health   Health
	busy     map[K]struct{} // rows of an Independent target that are being written
	again    map[K]struct{} // rows whose write has ended since the last pass: something else may be wanted by now

	writes sync.WaitGroup
	slots  chan struct{}

	mu      sync.Mutex
	waiters []waiter[K]
	refresh bool
	ended   []write[K, V]
	kick    chan struct{}
}

// write is one put or delete.
type write[K comparable, V any] struct {
	key K
	put bool
	row V
	err error
}

type retry struct {
	attempts int
	at       time.Time
	err      error
}

type waiter[K comparable] struct {
	keys []K
	done chan error
}

// New returns a loop; Run starts it.
func New[K comparable, V any](cfg Config[K, V]) *Loop[K, V] {
	if cfg.Reread == 0 {
		cfg.Reread = 5 * time.Minute
	}
	if cfg.RetryMin == 0 {
		cfg.RetryMin = 100 * time.Millisecond
	}
	if cfg.RetryMax == 0 {
		cfg.RetryMax = 30 * time.Second
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Loop[K, V]{
		cfg:     cfg,
		unknown: map[K]struct{}{},
		retry:   map[K]retry{},
		busy:    map[K]struct{}{},
		again:   map[K]struct{}{},
		slots:   make(chan struct{}, max(1, cfg.Parallel)),
		health:  Health{Name: cfg.Name},
		kick:    make(chan struct{}, 1),
	}
}

// Run applies the wanted rows until ctx ends. It returns nil then; the target keeps what it has.
func (l *Loop[K, V]) Run(ctx context.Context) error {
	defer l.answerAll(context.Canceled)
	defer l.writes.Wait()
	for ctx.Err() == nil {
		l.mu.Lock()
		waiters := l.waiters
		l.waiters = nil
		if l.refresh {
			l.readAt, l.refresh = time.Time{}, false
		}
		l.mu.Unlock()

		if len(waiters) > 0 {
			l.writes.Wait()
		}
		l.collect()
		started := time.Now()
		snap := l.cfg.Desired()
		throttle := l.cfg.Throttle
		if !snap.Partial {
			throttle = max(throttle, 9*time.Since(started))
		}
		l.pass(ctx, snap, waiters)
		if len(waiters) > 0 {
			l.writes.Wait()
			l.collect()
		}
		l.answer(waiters)
		if !l.wait(ctx, time.Until(l.next()), snap.Changed) {
			continue
		}
		if d := throttle - time.Since(started); d > 0 {
			l.wait(ctx, d, nil)
		}
	}
	return nil
}

// wait returns true when one of the channels is closed, and false when the time is up, someone kicked, or ctx ended.
func (l *Loop[K, V]) wait(ctx context.Context, d time.Duration, chans []<-chan struct{}) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	cases := []reflect.SelectCase{
		{Dir: reflect.SelectRecv, Chan: reflect.ValueOf(ctx.Done())},
		{Dir: reflect.SelectRecv, Chan: reflect.ValueOf(l.kick)},
		{Dir: reflect.SelectRecv, Chan: reflect.ValueOf(timer.C)},
	}
	for _, ch := range chans {
		cases = append(cases, reflect.SelectCase{Dir: reflect.SelectRecv, Chan: reflect.ValueOf(ch)})
	}
	i, _, _ := reflect.Select(cases)
	return i >= 3
}

// Sync waits for a pass that began after the call and returns the errors of the given rows, or of all rows if none is
// given. A row that is awaiting its retry is tried in that pass.
func (l *Loop[K, V]) Sync(ctx context.Context, keys ...K) error {
	w := waiter[K]{keys: keys, done: make(chan error, 1)}
	l.mu.Lock()
	l.waiters = append(l.waiters, w)
	l.mu.Unlock()
	l.Kick()
	select {
	case err := <-w.done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("waiting for %s: %w", l.cfg.Name, ctx.Err())
	}
}

// Kick makes a pass happen soon.
func (l *Loop[K, V]) Kick() {
	select {
	case l.kick <- struct{}{}:
	default:
	}
}

// Refresh makes the target be listed again soon, because someone else may have changed it.
func (l *Loop[K, V]) Refresh() {
	l.mu.Lock()
	l.refresh = true
	l.mu.Unlock()
	l.Kick()
}

// next is when a pass must happen although nothing changed.
func (l *Loop[K, V]) next() time.Time {
	if l.actual == nil {
		return l.listFail.at
	}
	at := l.readAt.Add(l.cfg.Reread)
	for k, r := range l.retry {
		if _, busy := l.busy[k]; !busy && r.at.Before(at) {
			at = r.at
		}
	}
	return at
}

// pass makes the target equal to the snapshot as far as it can now.
func (l *Loop[K, V]) pass(ctx context.Context, snap Snapshot[K, V], waiters []waiter[K]) {
	now := time.Now()
	partial := snap.Partial
	if l.actual == nil || now.Sub(l.readAt) >= l.cfg.Reread {
		partial = false
		if l.actual == nil && len(waiters) == 0 && now.Before(l.listFail.at) {
			return
		}
		l.writes.Wait() // what is read is not on its way
		l.collect()
		if err := l.read(ctx, now); err != nil {
			l.report(now, fmt.Errorf("list: %w", err))
			return
		}
	}
	for _, w := range waiters {
		for _, k := range w.keys {
			if r, ok := l.retry[k]; ok {
				r.at = now
				l.retry[k] = r
			}
		}
	}

	// Puts before deletes, so that a lookup never misses in between.
	var todo []write[K, V]
	look := maps.Keys(snap.Rows)
	if partial {
		look = l.touched(snap)
	}
	for _, k := range l.sorted(look) {
		row, wanted := snap.Rows[k]
		if _, busy := l.busy[k]; busy || !wanted {
			continue
		}
		have, ok := l.actual[k]
		_, doubt := l.unknown[k]
		if ok && !doubt && l.cfg.Equal(have, row) {
			delete(l.retry, k)
			continue
		}
		if r, ok := l.retry[k]; ok && now.Before(r.at) {
			continue
		}
		todo = append(todo, write[K, V]{key: k, put: true, row: row})
	}
	done := l.write(ctx, todo)

	if snap.Complete && ctx.Err() == nil {
		have := l.known()
		if partial {
			have = l.touched(snap)
		}
		todo = nil
		for _, k := range l.unwanted(have, snap.Rows) {
			_, busy := l.busy[k]
			if r, failed := l.retry[k]; !busy && !(failed && now.Before(r.at)) {
				todo = append(todo, write[K, V]{key: k})
			}
		}
		done = append(done, l.write(ctx, todo)...)
	} else {
		// A row that was wanted once, failed and is no longer wanted must not keep the loop unhealthy.
		for k := range l.retry {
			if _, ok := snap.Rows[k]; !ok {
				delete(l.retry, k)
			}
		}
	}
	clear(l.again)
	l.wrote(done)
	l.report(now, l.errors())
}

// write does the writes and returns them; those of an Independent target it begins, and collect learns of their ends.
func (l *Loop[K, V]) write(ctx context.Context, todo []write[K, V]) []write[K, V] {
	do := func(w write[K, V]) error {
		if w.put {
			return l.cfg.Target.Put(ctx, w.key, w.row)
		}
		return l.cfg.Target.Delete(ctx, w.key)
	}
	if !l.cfg.Independent {
		return l.each(ctx, todo, do)
	}
	for _, w := range todo {
		l.busy[w.key] = struct{}{}
		l.writes.Go(func() {
			l.slots <- struct{}{}
			w.err = do(w)
			<-l.slots
			l.mu.Lock()
			l.ended = append(l.ended, w)
			l.mu.Unlock()
			l.Kick()
		})
	}
	return nil
}

// collect takes note of writes that have ended since.
func (l *Loop[K, V]) collect() {
	l.mu.Lock()
	ended := l.ended
	l.ended = nil
	l.mu.Unlock()
	for _, w := range ended {
		delete(l.busy, w.key)
		l.again[w.key] = struct{}{}
		l.know(w)
	}
	l.wrote(ended)
}

// know takes note of what a write did to the target.
func (l *Loop[K, V]) know(w write[K, V]) {
	verb := "delete"
	if w.put {
		verb = "put"
	}
	if w.err != nil {
		// What a failed write left behind is not known, so an equal row is written again and an unwanted one deleted.
		l.unknown[w.key] = struct{}{}
		l.failed(w.key, time.Now(), fmt.Errorf("%s %v: %w", verb, w.key, w.err))
		return
	}
	delete(l.unknown, w.key)
	delete(l.retry, w.key)
	if w.put {
		l.actual[w.key] = w.row
	} else {
		delete(l.actual, w.key)
	}
}

// wrote tells what changed the target.
func (l *Loop[K, V]) wrote(all []write[K, V]) {
	puts, deletes := 0, 0
	for _, w := range all {
		switch {
		case w.err != nil:
		case w.put:
			puts++
		default:
			deletes++
		}
	}
	if puts+deletes == 0 {
		return
	}
	l.cfg.Log.Debug("target written", "loop", l.cfg.Name, "puts", puts, "deletes", deletes)
	if l.cfg.Written != nil {
		l.cfg.Written(puts, deletes)
	}
}

// each does the writes until ctx ends, as many at a time as Parallel says, and returns those that it did.
func (l *Loop[K, V]) each(ctx context.Context, todo []write[K, V], do func(write[K, V]) error) (done []write[K, V]) {
	tried := make([]bool, len(todo))
	var next atomic.Int64
	work := func() {
		for i := next.Add(1) - 1; i < int64(len(todo)) && ctx.Err() == nil; i = next.Add(1) - 1 {
			todo[i].err, tried[i] = do(todo[i]), true
		}
	}
	if n := min(l.cfg.Parallel, len(todo)); n > 1 {
		var wg sync.WaitGroup
		for range n {
			wg.Go(work)
		}
		wg.Wait()
	} else {
		work()
	}
	for i, w := range todo {
		if tried[i] {
			done = append(done, w)
			l.know(w)
		}
	}
	return done
}

func (l *Loop[K, V]) read(ctx context.Context, now time.Time) error {
	rows, err := l.cfg.Target.List(ctx)
	if err != nil {
		l.actual = nil
		l.listFail = l.backoff(l.listFail, now, err)
		return err
	}
	if rows == nil {
		rows = map[K]V{}
	}
	l.actual, l.readAt, l.listFail = rows, now, retry{}
	clear(l.unknown)
	return nil
}

// touched are the rows that a partial snapshot makes worth a look: its own, and those that earlier passes left undone.
func (l *Loop[K, V]) touched(snap Snapshot[K, V]) iter.Seq[K] {
	set := make(map[K]struct{}, len(snap.Touched)+len(l.retry)+len(l.unknown)+len(l.again))
	for _, k := range snap.Touched {
		set[k] = struct{}{}
	}
	for k := range l.retry {
		set[k] = struct{}{}
	}
	maps.Copy(set, l.unknown)
	maps.Copy(set, l.again)
	return maps.Keys(set)
}

// known are the rows that the target has or may have.
func (l *Loop[K, V]) known() iter.Seq[K] {
	return func(yield func(K) bool) {
		for k := range l.actual {
			if !yield(k) {
				return
			}
		}
		for k := range l.unknown {
			if _, twice := l.actual[k]; !twice && !yield(k) {
				return
			}
		}
	}
}

// unwanted are those of keys that the target has, or may have, and that are not wanted.
func (l *Loop[K, V]) unwanted(keys iter.Seq[K], rows map[K]V) []K {
	var out []K
	for k := range keys {
		_, wanted := rows[k]
		_, have := l.actual[k]
		_, doubt := l.unknown[k]
		if !wanted && (have || doubt) {
			out = append(out, k)
		}
	}
	out = l.sorted(slices.Values(out))
	slices.Reverse(out)
	return out
}

func (l *Loop[K, V]) sorted(seq func(func(K) bool)) []K {
	if l.cfg.Compare == nil {
		return slices.Collect(seq)
	}
	return slices.SortedFunc(seq, l.cfg.Compare)
}

func (l *Loop[K, V]) failed(k K, now time.Time, err error) {
	r := l.backoff(l.retry[k], now, err)
	if r.attempts == 1 {
		l.cfg.Log.Warn("row failed, will be retried", "loop", l.cfg.Name, "error", err)
	}
	l.retry[k] = r
}

func (l *Loop[K, V]) backoff(r retry, now time.Time, err error) retry {
	delay := l.cfg.RetryMin << min(r.attempts, 20)
	if delay > l.cfg.RetryMax || delay <= 0 {
		delay = l.cfg.RetryMax
	}
	return retry{attempts: r.attempts + 1, at: now.Add(delay), err: err}
}

func (l *Loop[K, V]) errors() error {
	var errs []error
	for _, k := range l.sorted(maps.Keys(l.retry)) {
		errs = append(errs, l.retry[k].err)
	}
	return errors.Join(errs...)
}

func (l *Loop[K, V]) report(now time.Time, err error) {
	l.health.Rows = len(l.actual)
	l.health.Failing = len(l.retry)
	if err != nil {
		l.health.LastError = now
		l.health.Errors++
		l.health.Message = err.Error()
	} else {
		if l.health.Errors > 0 {
			l.cfg.Log.Info("loop healthy again", "loop", l.cfg.Name)
		}
		l.health.LastSuccess = now
		l.health.Errors = 0
		l.health.Message = ""
	}
	if l.cfg.Report != nil {
		l.cfg.Report(l.health)
	}
}

func (l *Loop[K, V]) answer(waiters []waiter[K]) {
	for _, w := range waiters {
		var err error
		switch {
		case l.actual == nil:
			err = fmt.Errorf("%s: list: %w", l.cfg.Name, l.listFail.err)
		case len(w.keys) == 0:
			err = l.errors()
		default:
			var errs []error
			for _, k := range w.keys {
				errs = append(errs, l.retry[k].err)
			}
			err = errors.Join(errs...)
		}
		w.done <- err
	}
}

func (l *Loop[K, V]) answerAll(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, w := range l.waiters {
		w.done <- fmt.Errorf("%s stopped: %w", l.cfg.Name, err)
	}
	l.waiters = nil
}
