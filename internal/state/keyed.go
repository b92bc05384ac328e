// SPDX-License-Identifier: Apache-2.0

package state

import (
	"context"
	"slices"
	"time"

	"github.com/cilium/statedb"

	"github.com/lash-net/lash/internal/reconcile"
)

// Keyed computes rows one at a time, each by its key, and only those that a change of its sources can have changed: what
// is as big as the cluster is not computed as a whole each time that a pod comes or goes. A Keyed has one reader.
type Keyed[K comparable, V any] struct {
	Sources []Source[K]
	// Prepare returns the function that computes the row of a key, if it has one. It is called anew after a change of a
	// source that [Resets], and when one becomes complete: what it has read of those holds until then.
	Prepare func(statedb.ReadTxn) func(statedb.ReadTxn, K) (V, bool)

	opened   bool
	complete int // how many sources were
	compute  func(statedb.ReadTxn, K) (V, bool)
}

// news is what a Keyed finds at one moment.
type news[K comparable] struct {
	txn      statedb.ReadTxn
	keys     map[K]struct{} // whose rows are to be computed
	all      bool           // they are all there are
	complete bool
	changed  []<-chan struct{}
}

// look finds what has changed since it looked last.
func (k *Keyed[K, V]) look(db *statedb.DB) news[K] {
	if !k.opened {
		for _, s := range k.Sources {
			s.open()
		}
	}
	n := news[K]{txn: db.ReadTxn(), keys: map[K]struct{}{}, all: !k.opened}
	k.opened = true
	complete := 0
	for _, s := range k.Sources {
		reset, changed := s.since(n.txn, n.keys)
		n.all = n.all || reset
		n.changed = append(n.changed, changed)
		if ok, ch := s.meta.Initialized(n.txn); ok {
			complete++
		} else {
			n.changed = append(n.changed, ch)
		}
	}
	n.all = n.all || complete != k.complete
	n.complete, k.complete = complete == len(k.Sources), complete
	if n.all {
		for _, s := range k.Sources {
			s.all(n.txn, n.keys)
		}
		k.compute = k.Prepare(n.txn)
	}
	return n
}

// Desired is the Desired function of a loop over the rows.
func (k *Keyed[K, V]) Desired(db *statedb.DB) func() reconcile.Snapshot[K, V] {
	rows := map[K]V{}
	return func() reconcile.Snapshot[K, V] {
		n := k.look(db)
		snap := reconcile.Snapshot[K, V]{Rows: rows, Complete: n.complete, Changed: n.changed, Partial: !n.all}
		if n.all {
			clear(rows)
		}
		for key := range n.keys {
			if row, ok := k.compute(n.txn, key); ok {
				rows[key] = row
			} else {
				delete(rows, key)
			}
			if !n.all {
				snap.Touched = append(snap.Touched, key)
			}
		}
		return snap
	}
}

// KeyedStage keeps the rows of one table that it owns equal to those of a Keyed.
type KeyedStage[K comparable, Row any] struct {
	Name  string
	Out   statedb.RWTable[Row]
	Rows  Keyed[K, Row]
	ByKey func(K) statedb.Query[Row]
	Equal func(a, b Row) bool

	done func(statedb.WriteTxn)
}

// Register announces that the output is complete only when this stage says so. It must be called before any reader
// of the output starts.
func (s *KeyedStage[K, Row]) Register(db *statedb.DB) *KeyedStage[K, Row] {
	txn := db.WriteTxn(s.Out)
	defer txn.Commit()
	s.done = s.Out.RegisterInitializer(txn, s.Name)
	return s
}

// Run computes until ctx ends.
func (s *KeyedStage[K, Row]) Run(ctx context.Context, db *statedb.DB) error {
	for {
		began := time.Now()
		n := s.step(db)
		settle := Settle
		if n.all { // as long as a Stage waits; what follows a change costs what has changed
			settle = min(max(Settle, 4*time.Since(began)), settleMax)
		}
		ws := statedb.NewWatchSet()
		ws.Add(n.changed...)
		if _, err := ws.Wait(ctx, settle); err != nil || ctx.Err() != nil {
			return nil
		}
	}
}

// Step computes once. It returns channels of which one is closed when there is more to compute.
func (s *KeyedStage[K, Row]) Step(db *statedb.DB) (changed []<-chan struct{}) {
	return s.step(db).changed
}

func (s *KeyedStage[K, Row]) step(db *statedb.DB) news[K] {
	n := s.Rows.look(db)
	w := db.WriteTxn(s.Out)
	if s.write(w, n) {
		w.Commit()
	} else {
		w.Abort()
	}
	return n
}

func (s *KeyedStage[K, Row]) write(w statedb.WriteTxn, n news[K]) (changed bool) {
	if n.complete && s.done != nil {
		s.done(w)
		s.done = nil
		changed = true
	}
	if n.all {
		rows := make([]Row, 0, len(n.keys))
		for key := range n.keys {
			if row, ok := s.Rows.compute(n.txn, key); ok {
				rows = append(rows, row)
			}
		}
		return Replace(w, s.Out, rows, s.Equal, All[Row]) || changed
	}
	for key := range n.keys {
		row, ok := s.Rows.compute(n.txn, key)
		old, _, had := s.Out.Get(w, s.ByKey(key))
		switch {
		case ok && !(had && s.Equal(old, row)):
			mustWrite(s.Out.Insert(w, row))
			changed = true
		case !ok && had:
			mustWrite(s.Out.Delete(w, old))
			changed = true
		}
	}
	return changed
}

// Source is a table that the rows of a Keyed depend on.
type Source[K comparable] struct {
	meta statedb.TableMeta
	open func()
	// since adds the keys that changes since the last call touch, or says that all are. The channel is closed when there
	// is more.
	since func(txn statedb.ReadTxn, touched map[K]struct{}) (all bool, changed <-chan struct{})
	// all adds the keys that the table's rows touch.
	all func(txn statedb.ReadTxn, keys map[K]struct{})
}

// Resets is a source of which any change can change any row: of a table that is small or seldom changes.
func Resets[K comparable, Row any](tbl statedb.Table[Row]) Source[K] {
	var changed <-chan struct{}
	return Source[K]{
		meta: tbl,
		open: func() {},
		since: func(txn statedb.ReadTxn, _ map[K]struct{}) (bool, <-chan struct{}) {
			if changed != nil {
				select {
				case <-changed:
				default:
					return false, changed
				}
			}
			_, changed = tbl.AllWatch(txn)
			return true, changed
		},
		all: func(statedb.ReadTxn, map[K]struct{}) {},
	}
}

// Touches is a source of which a row touches the rows of some keys.
func Touches[K comparable, Row any](db *statedb.DB, tbl statedb.Table[Row], keys func(Row) []K) Source[K] {
	return TouchesBy(db, tbl, keys, func(_ statedb.ReadTxn, k K, touched map[K]struct{}) { touched[k] = struct{}{} })
}

// TouchesBy is a source of which a row touches what expand finds, at the time of the change, for the names in it.
func TouchesBy[K, Name comparable, Row any](db *statedb.DB, tbl statedb.Table[Row], names func(Row) []Name, expand func(statedb.ReadTxn, Name, map[K]struct{})) Source[K] {
	var changes statedb.ChangeIterator[Row]
	primary := tbl.PrimaryIndexer()
	last := map[string][]Name{} // what each row named when it was seen last: a change touches that, too
	take := func(txn statedb.ReadTxn, touched map[K]struct{}) <-chan struct{} {
		seq, changed := changes.Next(txn)
		for c := range seq {
			key := string(primary.ObjectToKey(c.Object))
			before := last[key]
			var now []Name
			if !c.Deleted {
				now = names(c.Object)
			}
			if len(now) == 0 {
				delete(last, key)
			} else if !slices.Equal(before, now) {
				last[key] = now
			}
			for _, n := range before {
				expand(txn, n, touched)
			}
			for _, n := range now {
				expand(txn, n, touched)
			}
		}
		return changed
	}
	return Source[K]{
		meta: tbl,
		open: func() {
			w := db.WriteTxn(tbl)
			defer w.Commit()
			var err error
			if changes, err = tbl.Changes(w); err != nil {
				panic("state: " + err.Error()) // the transaction does not hold the table: a mistake in the lines above
			}
		},
		since: func(txn statedb.ReadTxn, touched map[K]struct{}) (bool, <-chan struct{}) {
			take(txn, touched)
			return false, take(txn, touched) // only when there is nothing more the iterator gives a channel to wait for
		},
		all: func(txn statedb.ReadTxn, keys map[K]struct{}) {
			for _, names := range last {
				for _, n := range names {
					expand(txn, n, keys)
				}
			}
		},
	}
}
