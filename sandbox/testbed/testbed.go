// SPDX-License-Identifier: Apache-2.0

// Package testbed makes what the checks of this program run on: a cluster with a pod network,
// Lash installed by its own installer or the distribution's plugins, Ready, with DNS.
package testbed

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	"github.com/lash-net/lash/sandbox/cluster"
)

// Options of Up.
type Options struct {
	With  string   // pod network: "lash" or "bridge"
	Lash  string   // path of the lash program, with "lash"
	Image string   // path of Lash's image archive, with "lash"
	Mode  string   // with "lash": one of Modes
	Set   []string // chart values for `lash install --set`
	Nodes int      // of the cluster
	Fresh bool     // always start from an empty cluster
	Say   func(format string, args ...any)
}

// Modes are how packets travel between nodes, and the chart value for it.
var Modes = map[string]string{"vxlan": "routingMode=tunnel", "native": "routingMode=native"}

// Check says which option is wrong and what it may be.
func (o Options) Check() error {
	switch {
	case o.With != "lash" && o.With != "bridge":
		return fmt.Errorf("--with %q: use lash or bridge", o.With)
	case Modes[o.Mode] == "":
		return fmt.Errorf("--mode %q: use vxlan or native", o.Mode)
	}
	return nil
}

// Up returns a cluster that is ready for work, locked. What it started stays up on an error, for a look.
func Up(ctx context.Context, name string, o Options) (*cluster.Cluster, error) {
	c, err := start(ctx, name, o)
	if err != nil {
		return nil, err
	}
	if err := o.equip(ctx, c); err != nil {
		c.Unlock()
		return nil, err
	}
	return c, nil
}

func (o Options) equip(ctx context.Context, c *cluster.Cluster) error {
	if o.With == "lash" {
		if err := install(ctx, c, o); err != nil {
			return err
		}
	}
	if err := c.WaitNodesReady(ctx, 120*time.Second); err != nil {
		return fmt.Errorf("%w\n%s", err, Overview(ctx, c))
	}
	if _, err := c.Kubectl(ctx, "-n", "kube-system", "rollout", "status", "deploy/coredns", "--timeout=120s"); err != nil {
		return fmt.Errorf("%w\n%s", err, Overview(ctx, c))
	}
	o.Say("nodes Ready, DNS too")
	return nil
}

// start reuses a cluster that fits, and makes a new one otherwise. It is locked.
func start(ctx context.Context, name string, o Options) (*cluster.Cluster, error) {
	opts := cluster.Options{Nodes: o.Nodes, Proxy: "none", CNI: "none", DNS: 2}
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
			o.Say("a cluster %q of %d nodes is up already: using it (--fresh makes a new one)", name, o.Nodes)
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
			return fmt.Errorf("%w\n%s", err, Overview(ctx, c))
		}
	}
	o.Say("Lash is installed and Ready")
	return nil
}

// Overview is what one looks at first when something does not become Ready.
func Overview(ctx context.Context, c *cluster.Cluster) string {
	ctx = context.WithoutCancel(ctx)
	pods, _ := c.Kubectl(ctx, "get", "nodes,pods", "-A", "-o", "wide")
	events, _ := c.Kubectl(ctx, "get", "events", "-A", "--field-selector=type=Warning", "--sort-by=.lastTimestamp")
	lines := strings.Split(strings.TrimSpace(events), "\n")
	return pods + "\n" + strings.Join(lines[max(0, len(lines)-15):], "\n")
}
