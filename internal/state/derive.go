// SPDX-License-Identifier: Apache-2.0

package state

import (
	"context"
	"fmt"
	"iter"
	"maps"
	"slices"
	"time"

	"github.com/cilium/statedb"

	"github.com/lash-net/lash/internal/reconcile"
)

// Input is a table that a stage reads.
type Input struct {
	meta  statedb.TableMeta
	watch func(statedb.ReadTxn) <-chan struct{}
}

// From makes a table an input.
func From[Row any](tbl statedb.Table[Row]) Input {
	return Input{tbl, func(txn statedb.ReadTxn) <-chan struct{} {
		_, ch := tbl.AllWatch(txn)
		return ch
	}}
}

// FromSome makes what a query finds in a table an input.
func FromSome[Row any](tbl statedb.Table[Row], q statedb.Query[Row]) Input {
	return Input{tbl, func(txn statedb.ReadTxn) <-chan struct{} {
		_, ch := tbl.ListWatch(txn, q)
		return ch
	}}
}

// Settle is how long a stage waits for more changes after the first one, so that a burst is computed once. A stage that
// takes long to compute waits longer: under constant change it uses at most a fifth of a CPU.
const (
	Settle    = 2 * time.Millisecond
	settleMax = 500 * time.Millisecond
)

// Stage keeps the rows of one table that it owns equal to a pure function of other tables.
type Stage[Row any] struct {
	Name   string
	Out    statedb.RWTable[Row]
	Inputs []Input
	// Complete makes the stage write nothing before all inputs are complete, for rows that are wrong, not merely
	// missing, while inputs are.
	Complete bool
	// Compute is given a snapshot and whether all inputs are complete in it.
	Compute func(txn statedb.ReadTxn, complete bool) []Row
	Equal   func(a, b Row) bool
	// Mine says which rows of Out are the stage's; nil: all.
	Mine func(Row) bool

	done func(statedb.WriteTxn)
}

// Register announces that the output is complete only when this stage says so. It must be called before any reader
// of the output starts.
func (s *Stage[Row]) Register(db *statedb.DB) *Stage[Row] {
	txn := db.WriteTxn(s.Out)
	defer txn.Commit()
	s.done = s.Out.RegisterInitializer(txn, s.Name)
	return s
}

// Run computes until ctx ends.
func (s *Stage[Row]) Run(ctx context.Context, db *statedb.DB) error {
	mine := s.Mine
	if mine == nil {
		mine = All[Row]
	}
	for {
		txn := db.ReadTxn()
		chans, complete := Watch(txn, s.Inputs)
		ws := statedb.NewWatchSet()
		ws.Add(chans...)
		began := time.Now()
		if complete || !s.Complete {
			rows := s.Compute(txn, complete)
			w := db.WriteTxn(s.Out)
			changed := Replace(w, s.Out, rows, s.Equal, mine)
			if complete && s.done != nil {
				s.done(w)
				s.done = nil
				changed = true
			}
			if changed {
				w.Commit()
			} else {
				w.Abort()
			}
		}
		if _, err := ws.Wait(ctx, min(max(Settle, 4*time.Since(began)), settleMax)); err != nil || ctx.Err() != nil {
			return nil
		}
	}
}

// Desired is the Desired function of a loop over a table.
func Desired[Row any, K comparable, V any](db *statedb.DB, tbl statedb.Table[Row], split func(Row) (K, V)) func() reconcile.Snapshot[K, V] {
	return DesiredOf(db, []Input{From(tbl)}, func(txn statedb.ReadTxn) map[K]V {
		rows := map[K]V{}
		for r := range tbl.All(txn) {
			k, v := split(r)
			rows[k] = v
		}
		return rows
	})
}

// DesiredChanges is the Desired function of a loop over a table of which each pass looks at the changed rows only.
func DesiredChanges[Row any, K comparable, V any](db *statedb.DB, tbl statedb.RWTable[Row], split func(Row) (K, V)) func() reconcile.Snapshot[K, V] {
	changes := Track(db, tbl)
	rows := map[K]V{}
	opened, complete := false, false
	return func() reconcile.Snapshot[K, V] {
		txn := db.ReadTxn()
		touched := map[K]struct{}{}
		for row, deleted := range changes.Next(txn) {
			k, v := split(row)
			touched[k] = struct{}{}
			if deleted {
				delete(rows, k)
			} else {
				rows[k] = v
			}
		}
		snap := reconcile.Snapshot[K, V]{Rows: rows, Touched: slices.Collect(maps.Keys(touched))}
		snap.Changed, snap.Complete = pending(txn, tbl)
		snap.Changed = append(snap.Changed, changes.Changed(txn))
		snap.Partial = opened && complete == snap.Complete
		opened, complete = true, snap.Complete
		return snap
	}
}

// Tracker reads what changed in a table since it was last asked.
type Tracker[Row any] struct{ it statedb.ChangeIterator[Row] }

// Track returns a tracker whose first Next has every row.
func Track[Row any](db *statedb.DB, tbl statedb.RWTable[Row]) *Tracker[Row] {
	txn := db.WriteTxn(tbl)
	defer txn.Commit()
	it, err := tbl.Changes(txn)
	if err != nil {
		panic("state: " + err.Error()) // the transaction holds the table
	}
	return &Tracker[Row]{it}
}

// Next yields rows that changed since, in the order of the changes; gone says that the row was deleted. It must be
// consumed whole.
func (t *Tracker[Row]) Next(txn statedb.ReadTxn) iter.Seq2[Row, bool] {
	seq, _ := t.it.Next(txn)
	return func(yield func(Row, bool) bool) {
		for c := range seq {
			if !yield(c.Object, c.Deleted) {
				return
			}
		}
	}
}

// Changed is closed when Next has more.
func (t *Tracker[Row]) Changed(txn statedb.ReadTxn) <-chan struct{} {
	_, watch := t.it.Next(txn)
	return watch
}

// DesiredOf is the Desired function of a loop over a pure function of tables.
func DesiredOf[K comparable, V any](db *statedb.DB, inputs []Input, compute func(statedb.ReadTxn) map[K]V) func() reconcile.Snapshot[K, V] {
	return func() reconcile.Snapshot[K, V] {
		txn := db.ReadTxn()
		chans, complete := Watch(txn, inputs)
		return reconcile.Snapshot[K, V]{Rows: compute(txn), Complete: complete, Changed: chans}
	}
}

// Watch returns channels that are closed when an input changes or becomes complete, and whether all are complete.
func Watch(txn statedb.ReadTxn, inputs []Input) (chans []<-chan struct{}, complete bool) {
	complete = true
	for _, in := range inputs {
		chans = append(chans, in.watch(txn))
		more, ok := pending(txn, in.meta)
		chans, complete = append(chans, more...), complete && ok
	}
	return chans, complete
}

// pending returns whether the table is complete, and if not, a channel that is closed when it is.
func pending(txn statedb.ReadTxn, meta statedb.TableMeta) (chans []<-chan struct{}, complete bool) {
	if ok, ch := meta.Initialized(txn); !ok {
		return []<-chan struct{}{ch}, false
	}
	return nil, true
}

// Pending names the tables that are not complete, with what they wait for.
func (t *Tables) Pending() []string {
	txn := t.DB.ReadTxn()
	var pending []string
	for _, m := range t.DB.GetTables(txn) {
		if p := m.PendingInitializers(txn); len(p) > 0 {
			pending = append(pending, fmt.Sprintf("%s (%v)", m.Name(), p))
		}
	}
	return pending
}
