// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cilium/statedb"

	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/reconcile"
	"github.com/lash-net/lash/internal/state"
)

// api is an API server with the identities of a cluster: creation is a compare-and-swap, answers may fail before or
// after they took effect, and each agent hears of changes in their order, but late.
type api struct {
	mu     sync.Mutex
	clock  int64
	rows   map[model.Identity]state.Identity
	agents []chan change
	fail   float64
	calls  int
	asked  int
	unused []model.Identity // marks taken away
}

type change struct {
	row  state.Identity
	gone bool
}

var errAPI = errors.New("the API server says no")

func (a *api) publish(c change) {
	for _, ch := range a.agents {
		ch <- c
	}
}

func (a *api) CreateIdentity(_ context.Context, id model.Identity, labels model.Labels) (taken bool, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.calls++
	if rand.Float64() < a.fail {
		return false, errAPI
	}
	if _, ok := a.rows[id]; ok {
		return true, nil
	}
	a.clock++
	a.rows[id] = state.Identity{ID: id, Labels: labels, Created: a.clock}
	a.publish(change{row: a.rows[id]})
	if rand.Float64() < a.fail {
		return false, errAPI // it took effect all the same
	}
	return false, nil
}

func (a *api) IdentityLabels(_ context.Context, id model.Identity) (model.Labels, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.asked++
	if row, ok := a.rows[id]; ok && rand.Float64() >= a.fail {
		return row.Labels, nil
	}
	return "", errAPI
}

func (a *api) UseIdentity(_ context.Context, id model.Identity) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if rand.Float64() < a.fail {
		return errAPI
	}
	a.unused = append(a.unused, id)
	if row, ok := a.rows[id]; ok && row.Unused {
		row.Unused = false
		a.rows[id] = row
		a.publish(change{row: row})
	}
	return nil
}

func (a *api) set(row state.Identity) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.rows[row.ID] = row
	a.publish(change{row: row})
}

func (a *api) remove(id model.Identity) {
	a.mu.Lock()
	defer a.mu.Unlock()
	row := a.rows[id]
	delete(a.rows, id)
	a.publish(change{row, true})
}

// agent runs the stage and the loop of one node; its watch of identities lags by up to lag.
func agent(t *testing.T, a *api, lag time.Duration) *state.Tables {
	t.Helper()
	tables := newTables(t)
	state.Insert(tables.DB, tables.Namespaces, state.Namespace{Name: "default"})
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	ch := make(chan change, 100000)
	a.mu.Lock()
	for _, row := range a.rows {
		ch <- change{row: row}
	}
	a.agents = append(a.agents, ch)
	a.mu.Unlock()
	wg.Go(func() {
		for {
			select {
			case <-ctx.Done():
				return
			case c := <-ch:
				if lag > 0 {
					time.Sleep(rand.N(lag))
				}
				if c.gone {
					state.Delete(tables.DB, tables.Identities, c.row)
				} else {
					state.Insert(tables.DB, tables.Identities, c.row)
				}
			}
		}
	})
	stage := Stage(tables, config(t, ""))
	loop := reconcile.New(reconcile.Config[model.Labels, Need]{
		Name: "identities", Target: &Allocator{Tables: tables, Store: a, Node: fmt.Sprint("n", len(a.agents))}, Desired: Pending(tables), Equal: reconcile.Comparable[Need],
		Log: slog.New(slog.DiscardHandler), Parallel: 600, Independent: true, RetryMin: time.Millisecond, RetryMax: 20 * time.Millisecond, Reread: 50 * time.Millisecond,
	})
	wg.Go(func() { stage.Run(ctx, tables.DB) })
	wg.Go(func() { loop.Run(ctx) })
	t.Cleanup(func() { cancel(); wg.Wait() })
	return tables
}

// until waits for tables that goroutines write.
func until(t *testing.T, what string, ok func() error) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(time.Millisecond) {
		err := ok()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s did not happen: %v", what, err)
		}
	}
}

func labelled(i int) map[string]string { return map[string]string{"app": fmt.Sprint(i)} }

// settled checks that all agents have given all their pods the numbers of the API server, the same for the same labels.
func settled(a *api, agents ...*state.Tables) error {
	numbers := map[model.Labels]model.Identity{}
	for i, x := range agents {
		txn := x.DB.ReadTxn()
		if n := x.Pods.NumObjects(txn); n != x.PodIdentities.NumObjects(txn) {
			return fmt.Errorf("agent %d has %d pods", i, n)
		}
		for r := range x.PodIdentities.All(txn) {
			if had, ok := numbers[r.Labels]; r.Identity == 0 || ok && had != r.Identity {
				return fmt.Errorf("agent %d: %s has %d and %d", i, r.Labels, r.Identity, had)
			}
			numbers[r.Labels] = r.Identity
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for l, id := range numbers {
		if a.rows[id].Labels != l {
			return fmt.Errorf("%d is %q, not %q", id, a.rows[id].Labels, l)
		}
	}
	return nil
}

// Agents that race for the same labels, with a failing API server, late watches and pods in any order, end with one
// number for each set of labels.
func TestRacingAgentsAllocateWithoutDuplicates(t *testing.T) {
	const sets = 600 // of 65280 numbers: some have the same hash
	a := &api{rows: map[model.Identity]state.Identity{}, fail: .2}
	agents := []*state.Tables{agent(t, a, 0), agent(t, a, time.Millisecond), agent(t, a, 3*time.Millisecond)}
	know(agents[0], "n1", "n2", "n3", "n4") // the others do not know yet that they are not alone
	var wg sync.WaitGroup
	for _, x := range agents {
		wg.Go(func() {
			for _, i := range rand.Perm(sets) {
				state.Insert(x.DB, x.Pods, pod(fmt.Sprint("p", i), labelled(i)))
				if i%10 == 0 {
					time.Sleep(time.Millisecond)
				}
			}
		})
	}
	wg.Wait()
	until(t, "agreement", func() error { return settled(a, agents...) })
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.rows) != sets {
		t.Errorf("%d identities for %d sets of labels", len(a.rows), sets)
	}
	for id := range a.rows {
		if id < model.IdentityMin || id > model.IdentityMax {
			t.Errorf("identity %d", id)
		}
	}
}

// Two numbers for the same labels, which a race around a deletion can make, are settled in the same way by all.
func TestDuplicatesConverge(t *testing.T) {
	a := &api{rows: map[model.Identity]state.Identity{}}
	agents := []*state.Tables{agent(t, a, 0), agent(t, a, time.Millisecond)}
	for _, x := range agents {
		state.Insert(x.DB, x.Pods, pod("p", labelled(1)))
	}
	until(t, "agreement", func() error { return settled(a, agents...) })
	l := statedb.Collect(agents[0].PodIdentities.All(agents[0].DB.ReadTxn()))[0]
	a.set(state.Identity{ID: l.Identity.Next(), Labels: l.Labels, Created: -1}) // older
	until(t, "the change to the older", func() error {
		if now := statedb.Collect(agents[1].PodIdentities.All(agents[1].DB.ReadTxn()))[0]; now.Identity != l.Identity.Next() {
			return fmt.Errorf("%d", now.Identity)
		}
		return settled(a, agents...)
	})
}

func TestALostIdentityComesBackWithItsNumber(t *testing.T) {
	a := &api{rows: map[model.Identity]state.Identity{}, fail: .3}
	x := agent(t, a, 0)
	state.Insert(x.DB, x.Pods, pod("p", labelled(1)))
	until(t, "allocation", func() error { return settled(a, x) })
	row := statedb.Collect(x.PodIdentities.All(x.DB.ReadTxn()))[0]
	// The endpoint's number is kept although the hash leads to another: after a restart, from the checkpoint.
	kept := row.Identity.Next().Next()
	state.Insert(x.DB, x.Endpoints, model.Endpoint{ID: 1, Namespace: "default", Pod: "p", UID: "uid-p", Identity: kept, Labels: row.Labels.Map(), State: model.EndpointReady})
	a.remove(row.Identity)
	until(t, "its return", func() error {
		if r := statedb.Collect(x.PodIdentities.All(x.DB.ReadTxn()))[0]; r.Identity != kept {
			return fmt.Errorf("%d", r.Identity)
		}
		return settled(a, x)
	})
	// And if others have that number by now, another is found.
	a.mu.Lock()
	a.rows[kept] = state.Identity{ID: kept, Labels: "k8s:app=thief"}
	a.publish(change{row: a.rows[kept]})
	a.mu.Unlock()
	until(t, "another number", func() error { return settled(a, x) })
}

func TestMarkedIdentitiesAreKeptByTheirUsers(t *testing.T) {
	a := &api{rows: map[model.Identity]state.Identity{}, fail: .3}
	a.rows[900] = state.Identity{ID: 900, Labels: "k8s:app=nobody", Unused: true}
	x := agent(t, a, 0)
	state.Insert(x.DB, x.Pods, pod("p", labelled(1)))
	until(t, "allocation", func() error { return settled(a, x) })
	for range 3 { // as often as it is marked
		a.mu.Lock()
		var used state.Identity
		for id, r := range a.rows {
			if id != 900 {
				used = r
			}
		}
		used.Unused = true
		a.rows[used.ID] = used
		a.publish(change{row: used})
		a.mu.Unlock()
		until(t, "the mark's removal", func() error {
			a.mu.Lock()
			defer a.mu.Unlock()
			if a.rows[used.ID].Unused {
				return errors.New("still marked")
			}
			return nil
		})
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.rows[900].Unused {
		t.Error("a mark of somebody else's identity was removed")
	}
}

// Nothing is allocated before the identities that exist have been read.
func TestNothingIsAllocatedBlindly(t *testing.T) {
	tables := newTables(t)
	w := tables.DB.WriteTxn(tables.Identities)
	done := tables.Identities.RegisterInitializer(w, "test")
	w.Commit()
	state.Insert(tables.DB, tables.PodIdentities, state.PodIdentity{Namespace: "default", Name: "a", Labels: server})
	if snap := Pending(tables)(); len(snap.Rows) != 0 || snap.Complete {
		t.Errorf("%+v", snap)
	}
	w = tables.DB.WriteTxn(tables.Identities)
	done(w)
	w.Commit()
	if snap := Pending(tables)(); len(snap.Rows) != 1 || !snap.Complete {
		t.Errorf("%+v", snap)
	}
}

// Of nodes that want the same number at once all but one come too late. They hear who got it; asking is for when they do not.
func TestWhoComesTooLateHearsWhoHasTheNumber(t *testing.T) {
	for _, heard := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			tables := newTables(t)
			a := &api{rows: map[model.Identity]state.Identity{server.Number(): {ID: server.Number(), Labels: server}}}
			if heard {
				go func() {
					time.Sleep(hearsay / 2)
					state.Insert(tables.DB, tables.Identities, a.rows[server.Number()])
				}()
			}
			if err := (&Allocator{Tables: tables, Store: a}).Put(t.Context(), server, Need{}); err != nil {
				t.Fatal(err)
			}
			if a.calls != 1 || len(a.rows) != 1 || (a.asked > 0) == heard {
				t.Errorf("heard %v: %d creations, %d questions, %d identities", heard, a.calls, a.asked, len(a.rows))
			}
		})
	}
}

func TestExhaustionIsAnErrorThatSaysWhatToDo(t *testing.T) {
	tables := newTables(t)
	w := tables.DB.WriteTxn(tables.Identities)
	for id := model.IdentityMin; id <= model.IdentityMax; id++ {
		tables.Identities.Insert(w, state.Identity{ID: id, Labels: model.Labels(fmt.Sprint("k8s:x=", id))})
	}
	w.Commit()
	a := &api{rows: map[model.Identity]state.Identity{}}
	err := (&Allocator{Tables: tables, Store: a}).Put(t.Context(), server, Need{})
	if err == nil || a.calls != 0 {
		t.Errorf("%v after %d calls", err, a.calls)
	}
}
