// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/state"
)

// know makes nodes known.
func know(t *state.Tables, names ...string) {
	for _, n := range names {
		state.Insert(t.DB, t.Nodes, model.Node{Name: n})
	}
}

func TestNodesShareTheTimeEvenlyInAnOrderOfTheLabels(t *testing.T) {
	names := []string{"n1", "n2", "n3", "n4", "n5"}
	tables := newTables(t)
	if d := (&Allocator{Tables: tables, Node: "n1"}).turn(server); d != 0 {
		t.Errorf("a node that is alone waits %s", d)
	}
	know(tables, names...)
	first := map[string]int{}
	for i := range 1000 {
		labels := model.LabelsOf(labelled(i))
		var all []time.Duration
		for _, n := range names {
			d := (&Allocator{Tables: tables, Node: n}).turn(labels)
			if all = append(all, d); d == 0 {
				first[n]++
			}
		}
		slices.Sort(all)
		if want := []time.Duration{0, turnMin / 2, turnMin, turnMin / 2 * 3, 2 * turnMin}; !slices.Equal(all, want) {
			t.Fatalf("%s: %v", labels, all)
		}
	}
	for _, n := range names { // 200 each is to be expected, with a deviation of 13
		if first[n] < 120 || first[n] > 280 {
			t.Errorf("who is first: %v", first)
		}
	}
}

// Nodes that start pods of one kind at the same time create one identity and ask for no other; a node that is gone
// holds nobody up for longer than the turns take, and one that others do not know of is none of their business.
func TestNodesInTurnsAskOnceForEachSetOfLabels(t *testing.T) {
	const sets, late = 100, turnMin / 2
	for _, dead := range []string{"", "n1", "n2", "n3"} {
		synctest.Test(t, func(t *testing.T) {
			a := &api{rows: map[model.Identity]state.Identity{}}
			var nodes []*Allocator
			for _, n := range []string{"n1", "n2", "n3"} {
				tables := newTables(t)
				know(tables, "n1", "n2", "n3")
				heard := make(chan change, sets)
				a.agents = append(a.agents, heard)
				go func() {
					for range sets {
						c := <-heard
						go func() {
							time.Sleep(late)
							state.Insert(tables.DB, tables.Identities, c.row)
						}()
					}
				}()
				if n != dead {
					nodes = append(nodes, &Allocator{Tables: tables, Store: a, Node: n})
				}
			}
			began := time.Now()
			var wg sync.WaitGroup
			for i := range sets {
				for _, n := range nodes {
					wg.Go(func() {
						if err := n.Put(t.Context(), model.LabelsOf(labelled(i)), Need{}); err != nil {
							t.Error(err)
						}
					})
				}
			}
			wg.Wait()
			if took := time.Since(began); took > 2*turnMin {
				t.Errorf("without %q: took %s", dead, took)
			}
			time.Sleep(late)
			synctest.Wait()
			if len(a.rows) != sets || a.calls != sets {
				t.Errorf("without %q: %d identities for %d sets of labels, asked for %d times", dead, len(a.rows), sets, a.calls)
			}
			for _, n := range nodes {
				if got := n.Tables.Identities.NumObjects(n.Tables.DB.ReadTxn()); got != sets {
					t.Errorf("without %q: %s knows %d", dead, n.Node, got)
				}
			}
		})
	}
}

// Labels that have a number by the time of the turn get no second one, whatever the number is.
func TestATurnEndsWhenTheLabelsHaveANumber(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tables := newTables(t)
		know(tables, "a", "b")
		a := &Allocator{Tables: tables, Store: &api{rows: map[model.Identity]state.Identity{}}}
		for i := 0; a.turn(server) < 2*turnMin; i++ { // until it is the last of three
			a.Node = fmt.Sprint("n", i)
		}
		go func() {
			time.Sleep(turnMin)
			state.Insert(tables.DB, tables.Identities, state.Identity{ID: server.Number().Next(), Labels: server})
		}()
		began := time.Now()
		if err := a.Put(t.Context(), server, Need{}); err != nil || time.Since(began) != turnMin {
			t.Errorf("%v after %s", err, time.Since(began))
		}
		if asked := a.Store.(*api).calls; asked != 0 {
			t.Errorf("asked %d times for a number that is there", asked)
		}
	})
}

// Nodes whose names are alike, as those of one pool, do not have their turns at the same time.
func TestNeighboursByNameHaveTurnsOfTheirOwn(t *testing.T) {
	tables := newTables(t)
	for i := range 50 {
		know(tables, fmt.Sprintf("pool-%02d", i))
	}
	var apart time.Duration
	const sets = 500
	for i := range sets {
		labels := model.LabelsOf(labelled(i))
		apart += ((&Allocator{Tables: tables, Node: "pool-17"}).turn(labels) - (&Allocator{Tables: tables, Node: "pool-18"}).turn(labels)).Abs()
	}
	if mean, even := apart/sets, turnsMost*turnMin/3; mean < even*8/10 || mean > even*12/10 {
		t.Errorf("two neighbours are %s apart, nodes are %s on the average", mean, even)
	}
}

// Turns are as long as the API server's answers make it worth while, and in no cluster is the last of them far off.
func TestTurnsGrowWithTheAnswersAndNotWithTheCluster(t *testing.T) {
	tables := newTables(t)
	a := &Allocator{Tables: tables, Node: "n"}
	last := func() (d time.Duration) {
		for i := range 2000 {
			d = max(d, a.turn(model.LabelsOf(labelled(i))))
		}
		return d
	}
	know(tables, "n", "x")
	for _, c := range []struct{ answer, turn time.Duration }{{0, turnMin}, {time.Millisecond, turnMin}, {50 * time.Millisecond, 150 * time.Millisecond}, {time.Minute, turnMax}, {0, turnMin}} {
		for range 300 {
			a.turns.took(c.answer)
		}
		if got := last().Round(time.Millisecond); got != c.turn {
			t.Errorf("answers take %s: a turn is %s, not %s", c.answer, got, c.turn)
		}
	}
	for i := range 200 {
		know(tables, fmt.Sprint("x", i))
	}
	if got := last(); got > turnsMost*turnMin || got < turnsMost*turnMin*3/4 {
		t.Errorf("the last of 200 waits %s", got)
	}
}
