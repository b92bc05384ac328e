// SPDX-License-Identifier: Apache-2.0

package state

import (
	"context"
	"log/slog"
	"time"

	"github.com/cilium/statedb"

	"github.com/lash-net/lash/internal/reconcile"
)

// Task is work that follows from tables and is no row of a target: it is done when an input changes and again after
// each Interval, must do nothing if there is nothing to do, and is retried with backoff when it fails.
type Task struct {
	Name     string
	Inputs   []Input
	Interval time.Duration // 0: only when an input changes
	Do       func(ctx context.Context) error
	Log      *slog.Logger
}

// Bounds of the delay before a failed task is done again.
const (
	taskRetryMin = 200 * time.Millisecond
	taskRetryMax = 15 * time.Second
)

// Run does the task until ctx ends.
func (t *Task) Run(ctx context.Context, tables *Tables) error {
	health := reconcile.Health{Name: t.Name}
	delay := taskRetryMin
	for {
		chans, _ := Watch(tables.DB.ReadTxn(), t.Inputs)
		err := t.Do(ctx)
		if ctx.Err() != nil {
			return nil
		}
		wait := t.Interval
		if err != nil {
			if health.Errors == 0 || health.Message != err.Error() {
				t.Log.Warn("task failed, will be retried", "task", t.Name, "error", err)
			}
			health.Errors++
			health.Message, health.LastError = err.Error(), time.Now()
			wait, delay = delay, min(2*delay, taskRetryMax)
		} else {
			health.Errors, health.Message, health.LastSuccess = 0, "", time.Now()
			delay = taskRetryMin
		}
		tables.Report(health)

		ws := statedb.NewWatchSet()
		ws.Add(chans...)
		wctx, cancel := ctx, context.CancelFunc(func() {})
		if wait > 0 {
			wctx, cancel = context.WithTimeout(ctx, wait)
		}
		ws.Wait(wctx, Settle)
		cancel()
		if ctx.Err() != nil {
			return nil
		}
	}
}
