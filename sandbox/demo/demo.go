// SPDX-License-Identifier: Apache-2.0

// Package demo is the end-to-end test that a newcomer runs first (`make demo`): a cluster of three nodes,
// a pod network, ordinary workloads, and checks of everything that a pod may expect of its network.
package demo

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/lash-net/lash/sandbox/testbed"
)

//go:embed workloads.yaml
var workloads string

// Options of Run.
type Options struct {
	testbed.Options
	// Resilience adds what must hold while agents, nodes and the API server go away. Takes some minutes, with Lash only.
	Resilience bool
	Services   bool // also restart backends and ill-treat agents under load through every kind of service, and create malformed objects
	Switch     bool // also pass to the other mode and back, five times under traffic
	// WriteGolden is a directory to write golden files to instead of comparing with them; empty: compare.
	WriteGolden string
	Out         io.Writer
}

const (
	nodes    = 3
	parallel = 4                // checks at once: each is a kubectl or two
	patience = 30 * time.Second // of one check, retries included
)

// ErrFailed is returned when a check failed; the checks' own lines say which and why.
var ErrFailed = errors.New("the demo failed")

// Run brings the cluster up, checks it, and leaves it up. The last line it prints is the summary.
func Run(ctx context.Context, name string, o Options) error {
	passed, failed, err := run(ctx, name, o)
	if err != nil {
		fmt.Fprintf(o.Out, "FAIL %s\n", err)
		failed++
	}
	fmt.Fprintf(o.Out, "demo: %d passed, %d failed\n", passed, failed)
	if failed > 0 {
		return ErrFailed
	}
	return nil
}

func run(ctx context.Context, name string, o Options) (passed, failed int, err error) {
	o.Nodes = nodes
	c, err := testbed.Up(ctx, name, o.Options)
	if err != nil {
		return 0, 0, err
	}
	defer c.Unlock()
	if _, err := c.KubectlInput(ctx, workloads, "apply", "-f", "-"); err != nil {
		return 0, 0, err
	}
	for _, d := range []string{"ds/web", "ds/client"} {
		if _, err := c.Kubectl(ctx, "-n", "demo", "rollout", "status", d, "--timeout=120s"); err != nil {
			return 0, 0, fmt.Errorf("%w\n%s", err, testbed.Overview(ctx, c))
		}
	}
	o.Say("workloads Ready")
	w, err := look(ctx, c)
	if err != nil {
		return 0, 0, err
	}
	passed, failed = runChecks(ctx, w.checks(o), o)
	if o.Services && failed == 0 {
		o.Say("services: backends are restarted, agents go away, malformed objects come, under load through every kind of service")
		p, f := checkServices(ctx, w, o)
		passed, failed = passed+p, failed+f
	}
	if o.Resilience && failed == 0 {
		o.Say("resilience: agents, nodes and the API server go away while pods talk")
		p, f := checkResilience(ctx, w, o)
		passed, failed = passed+p, failed+f
	}
	if o.Switch && failed == 0 {
		if w, err = look(ctx, c); err != nil { // nodes may have been replaced
			return passed, failed, err
		}
		p, f := checkSwitch(ctx, w, o)
		passed, failed = passed+p, failed+f
	}
	return passed, failed, nil
}

// check is one thing that must hold; do is retried until it does or patience ends.
type check struct {
	name string
	do   func(ctx context.Context) error
}

func runChecks(ctx context.Context, checks []check, o Options) (passed, failed int) {
	errs := make([]error, len(checks))
	slots := make(chan struct{}, parallel)
	var wg sync.WaitGroup
	var mu sync.Mutex
	for i, ch := range checks {
		wg.Add(1)
		slots <- struct{}{}
		go func() {
			defer func() { <-slots; wg.Done() }()
			errs[i] = until(ctx, patience, ch.do)
			mu.Lock()
			defer mu.Unlock()
			if errs[i] != nil {
				failed++
				fmt.Fprintf(o.Out, "FAIL %s: %s\n", ch.name, oneLine(errs[i]))
				return
			}
			passed++
			fmt.Fprintf(o.Out, "ok   %s\n", ch.name)
		}()
	}
	wg.Wait()
	return passed, failed
}

// until repeats do until it succeeds, and returns its last error when the time is over.
func until(ctx context.Context, limit time.Duration, do func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	pause := 100 * time.Millisecond
	var last error
	for {
		err := do(ctx)
		if err == nil {
			return nil
		}
		if ctx.Err() == nil || last == nil {
			last = err // what the deadline cut off says nothing
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("after %s: %w", limit, last)
		case <-time.After(pause):
			pause = min(2*pause, 2*time.Second)
		}
	}
}

func oneLine(err error) string {
	return strings.Join(strings.Fields(strings.ReplaceAll(err.Error(), "\n", " ")), " ")
}
