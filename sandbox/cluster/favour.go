// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"time"

	"github.com/lash-net/lash/sandbox/node"
	"github.com/lash-net/lash/sandbox/plan"
)

// generators is the cgroup of load generators, below that of their node, whose socket programs see them; of all other
// hosts below the sandbox's, since a cgroup with processes of its own cannot hand the CPU's controller on.
const generators = "generators"

func (c *Cluster) generatorCgroup(host string) string {
	if slices.Contains(c.Nodes, host) {
		return c.cgroup(host) + "/" + generators
	}
	return c.cgroup(generators)
}

// Favour lets load generators (GeneratorCommand) have the CPU before everything else of the sandbox, and the sandbox before
// other programs of the machine: a generator that waits for the CPU measures the machine. Until undo is called, which also
// ends what generators there are.
func (c *Cluster) Favour() (undo func() error, err error) {
	var made []string
	var undone []func() error
	undo = func() error {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		var errs []error
		for _, path := range made {
			errs = append(errs, c.layout.Kill(ctx, path), c.layout.Remove(ctx, path))
		}
		for _, u := range slices.Backward(undone) {
			errs = append(errs, u())
		}
		return errors.Join(errs...)
	}
	favoured := []string{cgroupRoot, cgroupRoot + "/" + c.Name}
	for _, host := range append([]string{plan.ControlPlane}, c.Nodes...) {
		path := c.generatorCgroup(host)
		if err := c.layout.Create(path); err != nil {
			return nil, errors.Join(err, undo())
		}
		made, favoured = append(made, path), append(favoured, path)
	}
	for _, path := range favoured {
		u, err := c.layout.Favour(path)
		if err != nil {
			return nil, errors.Join(err, undo())
		}
		undone = append(undone, u)
	}
	return undo, nil
}

// Generator is Target for what Favour favours.
func (c *Cluster) Generator(host string) (node.Target, error) {
	t, err := c.Target(host)
	if err != nil {
		return t, err
	}
	t.Cgroup = c.generatorCgroup(host)
	if !c.layout.Exists(t.Cgroup) {
		return t, fmt.Errorf("no load generators are favoured in sandbox %q", c.Name)
	}
	return t, nil
}

// GeneratorCommand is ExecCommand for a load generator, while Favour is in force.
func (c *Cluster) GeneratorCommand(ctx context.Context, host string, argv ...string) (*exec.Cmd, error) {
	return c.execCommand(ctx, host, []string{"--" + GeneratorFlag}, argv)
}

// GeneratorFlag of `sandbox exec` is what GeneratorCommand uses.
const GeneratorFlag = "generator"

// PodGeneratorCommand is a load generator on a node, in the network namespace of a process there that has that number on
// the node: a client like the pod's own processes, also to the node's socket programs. It is a program of this machine.
func (c *Cluster) PodGeneratorCommand(ctx context.Context, node, pid string, argv ...string) (*exec.Cmd, error) {
	return c.GeneratorCommand(ctx, node, append([]string{"nsenter", "--net=/proc/" + pid + "/ns/net", "--"}, argv...)...)
}

// BesideGeneratorCommand is the same outside of the node's cgroup: the node's socket programs do not see it.
func (c *Cluster) BesideGeneratorCommand(ctx context.Context, node, pid string, argv ...string) (*exec.Cmd, error) {
	if _, err := c.Target(node); err != nil {
		return nil, err
	}
	netns := fmt.Sprintf("--net=/proc/%d/root/proc/%s/ns/net", c.init(node).Pid, pid)
	return c.GeneratorCommand(ctx, plan.ControlPlane, append([]string{"nsenter", netns, "--"}, argv...)...)
}
