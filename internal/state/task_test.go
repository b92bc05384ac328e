// SPDX-License-Identifier: Apache-2.0

package state

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"time"
)

func TestTaskIsDoneOnChangeAndRetriedOnFailure(t *testing.T) {
	tables := newTables(t)
	done := make(chan int, 100)
	n := 0
	task := &Task{Name: "t", Inputs: []Input{From(tables.Pods.ToTable())}, Log: slog.New(slog.DiscardHandler), Do: func(context.Context) error {
		n++
		done <- n
		if n == 2 {
			return errors.New("not now")
		}
		return nil
	}}
	ctx, cancel := context.WithCancel(t.Context())
	stopped := make(chan error)
	go func() { stopped <- task.Run(ctx, tables) }()
	expect := func(want int) {
		t.Helper()
		select {
		case got := <-done:
			if got != want {
				t.Fatalf("got run %d, want %d", got, want)
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("run %d did not happen", want)
		}
	}
	expect(1)
	Insert(tables.DB, tables.Pods, Pod{Namespace: "a", Name: "b"})
	expect(2)
	expect(3) // by itself, after the failure
	for timeout := time.After(10 * time.Second); ; {
		c, _, changed, ok := tables.Controllers.GetWatch(tables.DB.ReadTxn(), controllerByName.Query("t"))
		if ok && c.Errors == 0 && c.LastError != 0 && c.LastSuccess != 0 && c.Message == "no error" {
			break
		}
		select {
		case <-changed:
		case <-timeout:
			t.Fatalf("controller is %+v", c)
		}
	}
	cancel()
	if err := <-stopped; err != nil {
		t.Error(err)
	}
}
