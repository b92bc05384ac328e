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
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/lash-net/lash/sandbox/cluster"
)

//go:embed workloads.yaml
var workloads string

// Options of Run.
type Options struct {
	With  string   // pod network: "lash" or "bridge"
	Lash  string   // path of the lash program, with --with lash
	Image string   // path of Lash's image archive, with --with lash
	Mode  string   // with "lash": one of Modes
	Set   []string // chart values for `lash install --set`
	Fresh bool     // always start from an empty cluster
	// Resilience adds what must hold while agents, nodes and the API server go away. Takes some minutes, with Lash only.
	Resilience bool
	Switch     bool // also pass to the other mode and back, five times under traffic
	// WriteGolden is a directory to write golden files to instead of comparing with them; empty: compare.
	WriteGolden string
	Out         io.Writer
	Say         func(format string, args ...any)
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
	c, err := start(ctx, name, o)
	if err != nil {
		return 0, 0, err
	}
	defer c.Unlock()
	if o.With == "lash" {
		if err := install(ctx, c, o); err != nil {
			return 0, 0, err
		}
	}
	if err := c.WaitNodesReady(ctx, 120*time.Second); err != nil {
		return 0, 0, fmt.Errorf("%w\n%s", err, podsOverview(ctx, c))
	}
	o.Say("nodes Ready")
	if _, err := c.KubectlInput(ctx, workloads, "apply", "-f", "-"); err != nil {
		return 0, 0, err
	}
	for _, d := range []string{"ds/web", "ds/client"} {
		if _, err := c.Kubectl(ctx, "-n", "demo", "rollout", "status", d, "--timeout=120s"); err != nil {
			return 0, 0, fmt.Errorf("%w\n%s", err, podsOverview(ctx, c))
		}
	}
	if _, err := c.Kubectl(ctx, "-n", "kube-system", "rollout", "status", "deploy/coredns", "--timeout=120s"); err != nil {
		return 0, 0, fmt.Errorf("%w\n%s", err, podsOverview(ctx, c))
	}
	o.Say("workloads Ready")
	w, err := look(ctx, c)
	if err != nil {
		return 0, 0, err
	}
	passed, failed = runChecks(ctx, w.checks(o), o)
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

// start reuses a cluster that fits, and makes a new one otherwise. It is locked.
func start(ctx context.Context, name string, o Options) (*cluster.Cluster, error) {
	opts := cluster.Options{Nodes: nodes, Proxy: "none", CNI: "none", DNS: 2}
	if o.With == "bridge" {
		opts.Proxy, opts.CNI = "iptables", "bridge"
	}
	c, err := cluster.Open(name, o.Say)
	if err == nil {
		if err := c.TryLock(); err != nil {
			return nil, err
		}
		if why := misfit(ctx, c, opts); why != "" || o.Fresh {
			if why == "" {
				why = "a fresh one was asked for"
			}
			o.Say("a cluster %q is up, but %s: making a new one", name, why)
			err := c.Down(ctx)
			c.Unlock()
			if err != nil {
				return nil, err
			}
		} else {
			o.Say("a cluster %q of %d nodes is up already: using it (--fresh makes a new one)", name, nodes)
			return c, nil
		}
	} else if !errors.Is(err, cluster.ErrNotUp) {
		return nil, err
	}
	if c, err = cluster.New(name, o.Say); err != nil {
		return nil, err
	}
	err = c.Up(ctx, opts)
	if err != nil && ctx.Err() != nil {
		o.Say("interrupted: cleaning up")
		return nil, errors.Join(errors.New("interrupted"), c.Down(context.WithoutCancel(ctx)))
	}
	if err != nil {
		return nil, err
	}
	return c, c.TryLock()
}

func misfit(ctx context.Context, c *cluster.Cluster, o cluster.Options) string {
	s := c.Status(ctx)
	switch {
	case !c.Whole:
		return "its start was cut short"
	case !s.Ready:
		return "its API server is not ready"
	case len(c.Nodes) != o.Nodes:
		return fmt.Sprintf("it has %d nodes", len(c.Nodes))
	case c.CNI != o.CNI || c.Proxy != o.Proxy:
		return fmt.Sprintf("it was started with --cni %s --proxy %s", c.CNI, c.Proxy)
	case slices.ContainsFunc(s.Machines, func(m cluster.NodeStatus) bool { return !m.Running }):
		return "one of its nodes is stopped"
	case slices.ContainsFunc(s.Components, func(p cluster.ProcessStatus) bool { return !p.Running }):
		return "a part of its control plane is stopped"
	}
	return ""
}

// install puts Lash on the cluster with its own installer, as on any cluster.
func install(ctx context.Context, c *cluster.Cluster, o Options) error {
	for _, f := range []string{o.Lash, o.Image} {
		if _, err := os.Stat(f); err != nil {
			return fmt.Errorf("%w (make it with `make build image`)", err)
		}
	}
	if err := c.Load(ctx, o.Image); err != nil {
		return err
	}
	o.Say("image loaded")
	verb := "install"
	if _, err := c.Kubectl(ctx, "-n", "kube-system", "get", "ds/lash"); err == nil {
		verb = "upgrade"
	}
	args := []string{verb, "--kubeconfig", c.Kubeconfig(false), "--set", Modes[o.Mode]}
	for _, s := range o.Set {
		args = append(args, "--set", s)
	}
	if out, err := exec.CommandContext(ctx, o.Lash, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("lash %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	if verb == "upgrade" { // the image may be new under its old name
		if _, err := c.Kubectl(ctx, "-n", "kube-system", "rollout", "restart", "ds/lash", "deploy/lash-operator"); err != nil {
			return err
		}
	}
	for _, what := range []string{"ds/lash", "deploy/lash-operator"} {
		if _, err := c.Kubectl(ctx, "-n", "kube-system", "rollout", "status", what, "--timeout=120s"); err != nil {
			return fmt.Errorf("%w\n%s", err, podsOverview(ctx, c))
		}
	}
	o.Say("Lash is installed and Ready")
	return nil
}

// podsOverview is what one looks at first when something does not become Ready.
func podsOverview(ctx context.Context, c *cluster.Cluster) string {
	ctx = context.WithoutCancel(ctx)
	pods, _ := c.Kubectl(ctx, "get", "nodes,pods", "-A", "-o", "wide")
	events, _ := c.Kubectl(ctx, "get", "events", "-A", "--field-selector=type=Warning", "--sort-by=.lastTimestamp")
	lines := strings.Split(strings.TrimSpace(events), "\n")
	return pods + "\n" + strings.Join(lines[max(0, len(lines)-15):], "\n")
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
