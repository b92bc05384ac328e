// SPDX-License-Identifier: Apache-2.0

package state

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"testing"

	"github.com/cilium/statedb"

	"github.com/lash-net/lash/internal/model"
)

// keyedOf is a Keyed with every kind of source: of each label set, which pods have it, in which namespaces, and its identity.
func keyedOf(tables *Tables) *Keyed[model.Labels, string] {
	return &Keyed[model.Labels, string]{
		Sources: []Source[model.Labels]{
			Touches(tables.DB, tables.PodIdentities, func(r PodIdentity) []model.Labels { return []model.Labels{r.Labels} }),
			TouchesBy(tables.DB, tables.CiliumEndpoints, func(r CiliumEndpoint) []string { return []string{r.Key()} },
				func(txn statedb.ReadTxn, pod string, touched map[model.Labels]struct{}) {
					if r, _, ok := tables.PodIdentities.Get(txn, PodIdentityByName(pod)); ok {
						touched[r.Labels] = struct{}{}
					}
				}),
			Resets[model.Labels](tables.Namespaces),
		},
		Prepare: func(now statedb.ReadTxn) func(statedb.ReadTxn, model.Labels) (string, bool) {
			namespaces := fmt.Sprint(Rows(now, tables.Namespaces))
			complete, _ := tables.CiliumEndpoints.Initialized(now)
			return func(txn statedb.ReadTxn, l model.Labels) (string, bool) {
				row, ok := fmt.Sprint(namespaces, complete), false
				for r := range tables.PodIdentities.List(txn, PodIdentitiesByLabels(l)) {
					ep, _, _ := tables.CiliumEndpoints.Get(txn, CiliumEndpointByName(r.Key()))
					row, ok = row+fmt.Sprint(r.Key(), ep.EndpointID), true
				}
				return row, ok
			}
		},
	}
}

// After any changes, what was computed by and by is what is computed at once, and every snapshot names what differs
// from the one before.
func TestKeyedComputesWhatChanges(t *testing.T) {
	for seed := range uint64(20) {
		rng := rand.New(rand.NewPCG(seed, 3))
		tables := newTables(t)
		w := tables.DB.WriteTxn(tables.CiliumEndpoints)
		done := tables.CiliumEndpoints.RegisterInitializer(w, "test")
		w.Commit()
		desired := keyedOf(tables).Desired(tables.DB)
		have := map[model.Labels]string{}
		partial, touched := 0, 0
		for step := range 300 {
			for range rng.IntN(3) {
				pod := PodIdentity{Namespace: "d", Name: fmt.Sprint("p", rng.IntN(10)), Labels: model.Labels(fmt.Sprint("k8s:app=", rng.IntN(5)))}
				ep := CiliumEndpoint{Namespace: "d", Name: pod.Name, EndpointID: uint16(rng.IntN(4))}
				switch n := rng.IntN(40); {
				case n < 12:
					Insert(tables.DB, tables.PodIdentities, pod)
				case n < 22:
					Delete(tables.DB, tables.PodIdentities, pod)
				case n < 30:
					Insert(tables.DB, tables.CiliumEndpoints, ep)
				case n < 39:
					Delete(tables.DB, tables.CiliumEndpoints, ep)
				default:
					Insert(tables.DB, tables.Namespaces, Namespace{Name: fmt.Sprint(step)})
				}
			}
			if step == 100 {
				w := tables.DB.WriteTxn(tables.CiliumEndpoints)
				done(w)
				w.Commit()
			}
			snap := desired()
			if snap.Complete != (step >= 100) {
				t.Fatalf("seed %d, step %d: complete %v", seed, step, snap.Complete)
			}
			if snap.Partial {
				partial++
				touched += len(snap.Touched)
				for _, k := range snap.Touched {
					if row, ok := snap.Rows[k]; ok {
						have[k] = row
					} else {
						delete(have, k)
					}
				}
			} else {
				have = maps.Clone(snap.Rows)
			}
			if want := keyedOf(tables).Desired(tables.DB)().Rows; !maps.Equal(have, want) || !maps.Equal(snap.Rows, want) {
				t.Fatalf("seed %d, step %d: followed %v, rows %v, want %v", seed, step, have, snap.Rows, want)
			}
		}
		if partial < 200 || touched > 2*partial+200 {
			t.Errorf("seed %d: %d partial snapshots touched %d rows", seed, partial, touched)
		}
	}
}

// Nothing is missed that changes while it is looked at.
func TestKeyedWakesForEveryChange(t *testing.T) {
	tables := newTables(t)
	desired := keyedOf(tables).Desired(tables.DB)
	const n = 500
	go func() {
		for i := range n {
			Insert(tables.DB, tables.PodIdentities, PodIdentity{Namespace: "d", Name: fmt.Sprint(i), Labels: model.Labels(fmt.Sprint(i))})
			if i%50 == 0 {
				Insert(tables.DB, tables.Namespaces, Namespace{Name: fmt.Sprint(i)})
			}
		}
	}()
	for {
		snap := desired()
		if len(snap.Rows) == n {
			return
		}
		wait(t, snap.Changed)
	}
}

func TestKeyedStageWritesWhatItsRowsAre(t *testing.T) {
	tables := newTables(t)
	w := tables.DB.WriteTxn(tables.Pods)
	done := tables.Pods.RegisterInitializer(w, "test")
	w.Commit()
	stage := (&KeyedStage[string, Warning]{
		Name: "stage", Out: tables.Warnings, ByKey: WarningByKey, Equal: func(a, b Warning) bool { return a == b },
		Rows: Keyed[string, Warning]{
			Sources: []Source[string]{Touches(tables.DB, tables.Pods, func(r Pod) []string { return []string{r.Key()} }), Resets[string](tables.Namespaces)},
			Prepare: func(now statedb.ReadTxn) func(statedb.ReadTxn, string) (Warning, bool) {
				n := tables.Namespaces.NumObjects(now)
				return func(txn statedb.ReadTxn, key string) (Warning, bool) {
					p, _, ok := tables.Pods.Get(txn, PodByName(key))
					return Warning{key, fmt.Sprint(p.Phase, n)}, ok
				}
			},
		},
	}).Register(tables.DB)
	check := func(writes int, complete bool, want ...Warning) {
		t.Helper()
		before := tables.Warnings.Revision(tables.DB.ReadTxn())
		stage.Step(tables.DB)
		txn := tables.DB.ReadTxn()
		if got := Rows(txn, tables.Warnings); fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("rows are %v, want %v", got, want)
		}
		if ok, _ := tables.Warnings.Initialized(txn); ok != complete {
			t.Errorf("complete %v, want %v", ok, complete)
		}
		if got := tables.Warnings.Revision(txn) - before; got != uint64(writes) {
			t.Errorf("%d writes, want %d", got, writes)
		}
	}
	pod := func(name, phase string) Pod { return Pod{Namespace: "a", Name: name, Phase: phase} }
	Insert(tables.DB, tables.Pods, pod("1", "x"), pod("2", "x"))
	check(2, false, Warning{"a/1", "x0"}, Warning{"a/2", "x0"})
	w = tables.DB.WriteTxn(tables.Pods)
	done(w)
	w.Commit()
	check(0, true, Warning{"a/1", "x0"}, Warning{"a/2", "x0"})
	Insert(tables.DB, tables.Pods, pod("1", "y"), pod("2", "x"), pod("3", "x"))
	Delete(tables.DB, tables.Pods, pod("2", ""))
	check(3, true, Warning{"a/1", "y0"}, Warning{"a/3", "x0"})
	Insert(tables.DB, tables.Namespaces, Namespace{Name: "n"})
	check(2, true, Warning{"a/1", "y1"}, Warning{"a/3", "x1"})
	check(0, true, Warning{"a/1", "y1"}, Warning{"a/3", "x1"})
}
