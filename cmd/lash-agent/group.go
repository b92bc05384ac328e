// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"sync"

	"github.com/lash-net/lash/internal/state"
)

// group runs the parts of the agent; the first that fails ends all.
type group struct {
	ctx    context.Context
	cancel context.CancelCauseFunc
	parts  sync.WaitGroup
}

func newGroup(parent context.Context) (*group, context.Context) {
	ctx, cancel := context.WithCancelCause(parent)
	return &group{ctx: ctx, cancel: cancel}, ctx
}

// start starts a part. A part that returns without error has done its work.
func (g *group) start(name string, run func(context.Context) error) {
	g.parts.Go(func() {
		if err := run(g.ctx); err != nil && g.ctx.Err() == nil {
			g.cancel(fmt.Errorf("%s: %w", name, err))
		}
	})
}

// stop ends all parts because of err, or because of what ended them already.
func (g *group) stop(err error) error {
	g.cancel(err)
	return g.wait()
}

// wait returns when ctx has ended and all parts have: nil if the agent was told to end.
func (g *group) wait() error {
	<-g.ctx.Done()
	g.parts.Wait()
	if err := context.Cause(g.ctx); err != context.Canceled {
		return err
	}
	return nil
}

func (a *agent) task(g *group, t *state.Task) {
	t.Log = a.log
	g.start(t.Name, func(ctx context.Context) error { return t.Run(ctx, a.tables) })
}
