// SPDX-License-Identifier: Apache-2.0

package state

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"github.com/cilium/statedb"

	"github.com/lash-net/lash/internal/model"
)

func newTables(t *testing.T) *Tables {
	t.Helper()
	tables, err := New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tables.Stop() })
	return tables
}

func TestEveryTablePrintsAsManyCellsAsColumns(t *testing.T) {
	tables := newTables(t)
	Insert(tables.DB, tables.NodeObjects, NodeObject{Source: "k8s", Name: "n"})
	Insert(tables.DB, tables.Nodes, Node{Name: "n"})
	Insert(tables.DB, tables.IPCache, IPCache{Prefix: netip.MustParsePrefix("10.0.0.0/8")})
	Insert(tables.DB, tables.Routes, Route{Dst: netip.MustParsePrefix("10.0.0.0/8")})
	Insert(tables.DB, tables.Warnings, Warning{Key: "k"})
	Insert(tables.DB, tables.NonMasquerade, NonMasquerade{Prefix: netip.MustParsePrefix("10.0.0.0/8"), Source: "s"})
	Insert(tables.DB, tables.TunnelPaths, TunnelPath{Prefix: netip.MustParsePrefix("10.0.0.0/8")})
	Insert(tables.DB, tables.Devices, Device{Ifindex: 2})
	Insert(tables.DB, tables.Local, Node{Name: "n"})
	Insert(tables.DB, tables.Endpoints, Endpoint{ID: 7})
	Insert(tables.DB, tables.Pods, Pod{Namespace: "a", Name: "b"})
	Insert(tables.DB, tables.Namespaces, Namespace{Name: "a"})
	Insert(tables.DB, tables.Identities, Identity{ID: 256, Labels: "k8s:app=x"})
	Insert(tables.DB, tables.PodIdentities, PodIdentity{Namespace: "a", Name: "b"})
	Insert(tables.DB, tables.CiliumEndpoints, CiliumEndpoint{Namespace: "a", Name: "b"})
	Insert(tables.DB, tables.Services, Service{Namespace: "a", Name: "b", Ports: []ServicePortSpec{{}}})
	Insert(tables.DB, tables.Slices, EndpointSlice{Namespace: "a", Name: "b", Ports: []SlicePort{{}}, Endpoints: []SliceEndpoint{{}}})
	Insert(tables.DB, tables.ServicePorts, ServicePort{ID: 1, Frontends: []model.Frontend{{}}, Backends: []model.Backend{{}}})
	Insert(tables.DB, tables.HealthChecks, HealthCheck{Namespace: "a", Name: "b"})
	Insert(tables.DB, tables.NodeHealth, NodeHealth{Name: "n", Paths: []model.HealthPath{{Addr: netip.MustParseAddr("10.0.0.1")}}})
	Insert(tables.DB, tables.Controllers, Controller{Name: "c"})
	Insert(tables.DB, tables.BadObjects, BadObject{Kind: "k"})
	txn := tables.DB.ReadTxn()
	metas := tables.DB.GetTables(txn)
	if len(metas) < 18 {
		t.Fatalf("only %d tables", len(metas))
	}
	for _, m := range metas {
		any := statedb.AnyTable{Meta: m}
		rows := 0
		for obj := range any.All(txn) {
			rows++
			if h, r := any.TableHeader(), any.TableRow(obj); len(h) != len(r) {
				t.Errorf("%s has columns %v and row %v", m.Name(), h, r)
			}
		}
		if rows != 1 {
			t.Errorf("%s has %d rows, want 1: the test must cover every table", m.Name(), rows)
		}
	}
}

func TestPrefixesOfBothFamiliesAreDifferentRows(t *testing.T) {
	tables := newTables(t)
	Insert(tables.DB, tables.IPCache,
		IPCache{Prefix: netip.MustParsePrefix("0.0.0.0/0")}, IPCache{Prefix: netip.MustParsePrefix("::/0")},
		IPCache{Prefix: netip.MustParsePrefix("10.0.0.0/8")}, IPCache{Prefix: netip.MustParsePrefix("10.0.0.0/16")})
	if got := tables.IPCache.NumObjects(tables.DB.ReadTxn()); got != 4 {
		t.Errorf("%d rows, want 4", got)
	}
}

func TestReplaceWritesOnlyDifferencesAndKeepsStrangers(t *testing.T) {
	tables := newTables(t)
	Insert(tables.DB, tables.Warnings, Warning{"ipam/x", "stays"}, Warning{"route/a", "same"}, Warning{"route/b", "goes"})
	before := tables.Warnings.Revision(tables.DB.ReadTxn())
	mine := func(w Warning) bool { return w.Key[:5] == "route" }
	equal := func(a, b Warning) bool { return a == b }
	want := []Warning{{"route/a", "same"}, {"route/c", "new"}}
	txn := tables.DB.WriteTxn(tables.Warnings)
	if !Replace(txn, tables.Warnings, want, equal, mine) {
		t.Error("Replace says nothing changed")
	}
	if got := tables.Warnings.Revision(txn) - before; got != 2 {
		t.Errorf("%d writes, want 2", got)
	}
	if Replace(txn, tables.Warnings, want, equal, mine) {
		t.Error("the second Replace wrote")
	}
	txn.Commit()
	got := Rows(tables.DB.ReadTxn(), tables.Warnings)
	if len(got) != 3 || got[0].Key != "ipam/x" || got[1].Key != "route/a" || got[2].Key != "route/c" {
		t.Errorf("rows are %v", got)
	}
}

// A stage must not announce its output as complete, nor write at all if it asks so, before its inputs are.
func TestStageWaitsForItsInputs(t *testing.T) {
	tables := newTables(t)
	w := tables.DB.WriteTxn(tables.Pods)
	podsDone := tables.Pods.RegisterInitializer(w, "test")
	w.Commit()
	stage := (&Stage[Warning]{
		Name: "stage", Out: tables.Warnings, Inputs: []Input{From(tables.Pods)}, Complete: true,
		Compute: func(txn statedb.ReadTxn, _ bool) []Warning {
			var out []Warning
			for p := range tables.Pods.All(txn) {
				out = append(out, Warning{p.Key(), p.Phase})
			}
			return out
		},
		Equal: func(a, b Warning) bool { return a == b },
	}).Register(tables.DB)
	ctx, cancel := context.WithCancel(t.Context())
	stopped := make(chan error)
	go func() { stopped <- stage.Run(ctx, tables.DB) }()
	defer func() { cancel(); <-stopped }()

	desired := Desired(tables.DB, tables.Warnings, func(w Warning) (string, string) { return w.Key, w.Text })
	Insert(tables.DB, tables.Pods, Pod{Namespace: "a", Name: "1", Phase: "Running"})
	snap := desired()
	if snap.Complete || len(snap.Rows) != 0 {
		t.Fatalf("the stage wrote early: %+v", snap)
	}
	w = tables.DB.WriteTxn(tables.Pods)
	podsDone(w)
	w.Commit()
	for !snap.Complete {
		wait(t, snap.Changed)
		snap = desired()
	}
	if snap.Rows["a/1"] != "Running" {
		t.Fatalf("snapshot is %+v", snap)
	}
	Delete(tables.DB, tables.Pods, Pod{Namespace: "a", Name: "1"})
	wait(t, snap.Changed)
	if snap = desired(); len(snap.Rows) != 0 {
		t.Errorf("rows are %v", snap.Rows)
	}
}

// However a table's changes are read, their sum is the table.
func TestDesiredChangesAddUpToTheTable(t *testing.T) {
	for seed := range uint64(20) {
		rng := rand.New(rand.NewPCG(seed, 9))
		tables := newTables(t)
		desired := DesiredChanges(tables.DB, tables.Warnings, func(w Warning) (string, string) { return w.Key, w.Text })
		got := map[string]string{}
		first := true
		read := func() (n int) {
			snap := desired()
			if snap.Partial == first || !snap.Complete {
				t.Fatalf("snapshot is %+v", snap)
			}
			first = false
			for _, k := range snap.Touched {
				delete(got, k)
				if v, ok := snap.Rows[k]; ok {
					got[k] = v
				}
			}
			return len(snap.Touched)
		}
		for range 100 {
			w := Warning{Key: fmt.Sprint(rng.IntN(8)), Text: fmt.Sprint(rng.IntN(100))}
			if rng.IntN(3) == 0 {
				Delete(tables.DB, tables.Warnings, w)
			} else {
				Insert(tables.DB, tables.Warnings, w)
			}
			if rng.IntN(4) == 0 {
				if n := read(); n > 8 {
					t.Fatalf("%d changes of 8 rows", n)
				}
			}
		}
		read()
		want := map[string]string{}
		for _, w := range Rows(tables.DB.ReadTxn(), tables.Warnings) {
			want[w.Key] = w.Text
		}
		if !maps.Equal(got, want) {
			t.Fatalf("seed %d: got %v, want %v", seed, got, want)
		}
		if n := read(); n != 0 {
			t.Errorf("%d changes of a table that did not change", n)
		}
		changed := desired().Changed
		Insert(tables.DB, tables.Warnings, Warning{Key: "x"})
		wait(t, changed)
	}
}

func wait(t *testing.T, chans []<-chan struct{}) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	ws := statedb.NewWatchSet()
	ws.Add(chans...)
	if _, err := ws.Wait(ctx, 0); err != nil {
		t.Fatal("nothing changed")
	}
}
