// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/lash-net/lash/api/agent"
	"github.com/lash-net/lash/internal/model"
)

func (a *app) healthCommand() *cobra.Command {
	var succinct bool
	status := &cobra.Command{
		Use: "status", Short: "Show whether this node reaches the nodes of the cluster", Args: cobra.NoArgs,
		Long: `Show whether this node reaches the nodes of the cluster. Each is probed at its own addresses ("Host") and at its health
endpoint, which stands for a pod ("Endpoint"): by an ICMP echo, which the kernel answers, and by HTTP, which the agent answers.`,
		Example: "  lash health status --node worker-1\n  lash health status --succinct",
	}
	status.Flags().BoolVar(&succinct, "succinct", false, "one line a node")
	a.outputFlag(status)
	status.RunE = func(cmd *cobra.Command, args []string) error {
		return a.health(cmd, args, func(h agent.ClusterHealth) error {
			w := columns(a.Out)
			if succinct {
				printClusterHealth(w, h, healthSuccinct)
				return w.Flush()
			}
			row(w, "Probe time:", orDash(stampOf(h.At)), "(Probe interval: "+h.Interval.String()+")")
			row(w, "Nodes:")
			printNodeHealth(w, h)
			return w.Flush()
		})
	}
	get := &cobra.Command{
		Use: "get [NODE]", Short: "Show what probes of one node have found; without a name, of this one", Args: cobra.MaximumNArgs(1),
		Example: "  lash health get\n  lash health get worker-2",
	}
	a.outputFlag(get)
	get.RunE = func(cmd *cobra.Command, args []string) error {
		return a.health(cmd, args, func(h agent.ClusterHealth) error {
			h.Nodes = slices.DeleteFunc(h.Nodes, func(n model.NodeHealth) bool {
				return len(args) == 0 && !n.Local || len(args) > 0 && n.Name != args[0]
			})
			if len(h.Nodes) == 0 {
				return fmt.Errorf("no node %q: 'lash node list' shows those there are", strings.Join(args, ""))
			}
			if done, err := a.printJSON(h.Nodes[0]); done || err != nil {
				return err
			}
			w := columns(a.Out)
			printNodeHealth(w, h)
			return w.Flush()
		})
	}
	return group("health", "Whether nodes reach each other", nil, status, get)
}

// health asks the agent for the health of all nodes and prints it, as JSON if that is to be whole.
func (a *app) health(cmd *cobra.Command, args []string, print func(agent.ClusterHealth) error) error {
	return a.onAgent(cmd, args, func(ctx context.Context, c *client) error {
		var h agent.ClusterHealth
		if err := c.get(ctx, "/v1/health", &h); err != nil {
			return err
		}
		if cmd.Name() == "status" {
			if done, err := a.printJSON(h); done || err != nil {
				return err
			}
		}
		if h.State == agent.StateDisabled {
			return fmt.Errorf("nodes do not probe each other: enable-health-checking is false")
		}
		return print(h)
	})
}

// How much printClusterHealth says of nodes.
type healthDetail int

const (
	healthFailing  healthDetail = iota // those that fail, one line each, and what fails
	healthSuccinct                     // all, one line each
	healthVerbose                      // all, each probe
)

// printClusterHealth prints the lines the field's users know. Cells are aligned with those of w.
func printClusterHealth(w io.Writer, h agent.ClusterHealth, detail healthDetail) {
	if h.State == agent.StateDisabled {
		row(w, "Cluster health:", h.State)
		return
	}
	row(w, "Cluster health:", fmt.Sprintf("%d/%d reachable", h.Reachable, h.Total), "("+orDash(stampOf(h.At))+")", "(Probe interval: "+h.Interval.String()+")")
	nodes := h.Nodes
	if detail == healthFailing {
		nodes = slices.DeleteFunc(slices.Clone(nodes), func(n model.NodeHealth) bool { return !n.Failed() })
	}
	row(w, "Name", "IP", "Node", "Endpoints")
	if detail == healthVerbose {
		printNodeHealth(w, h)
		return
	}
	const most = 10
	more := detail == healthFailing && len(nodes) > most
	if more {
		nodes = nodes[:most]
	}
	for _, n := range nodes {
		var counts [2]struct{ all, answered int }
		ip := ""
		for _, p := range n.Paths {
			c := &counts[0]
			if p.Endpoint {
				c = &counts[1]
			} else if ip == "" {
				ip = p.Addr.String()
			}
			c.all++
			if p.Answered() {
				c.answered++
			}
		}
		row(w, "  "+nodeTitle(h, n), ip, fmt.Sprintf("%d/%d", counts[0].answered, counts[0].all), fmt.Sprintf("%d/%d", counts[1].answered, counts[1].all))
	}
	if more {
		row(w, "  ...")
	}
	for _, n := range nodes { // after the lines the field has, one for each probe that fails
		for _, p := range n.Paths {
			for _, r := range []probe{{"ICMP", p.ICMP}, {"HTTP", p.HTTP}} {
				if r.Failed() {
					row(w, fmt.Sprintf("    %s, %s to %s %s: %s, since %s", n.Name, r.kind, strings.ToLower(where(p)), p.Addr, r.Error, stampOf(r.Since)))
				}
			}
		}
	}
}

// probe is one of the two of a path.
type probe struct {
	kind string
	model.ProbeResult
}

// printNodeHealth prints each probe of each node. The first address of its kind stands for the others in the field's
// tools, which call those "Secondary".
func printNodeHealth(w io.Writer, h agent.ClusterHealth) {
	for _, n := range h.Nodes {
		row(w, "  "+nodeTitle(h, n)+":")
		for i, p := range n.Paths {
			indent, title := "    ", where(p)
			if i > 0 && n.Paths[i-1].Endpoint == p.Endpoint {
				indent, title = "      ", "Secondary"
			}
			row(w, fmt.Sprintf("%s%s connectivity to %s:", indent, title, p.Addr))
			for _, r := range []probe{{"ICMP to stack", p.ICMP}, {"HTTP to agent", p.HTTP}} {
				cells := []string{indent + "  " + r.kind + ":"}
				switch {
				case r.Failed():
					cells = append(cells, r.Error, "(Last probed: "+stampOf(r.At)+")", "(failing since "+stampOf(r.Since)+")")
				case r.Answered():
					cells = append(cells, "OK, RTT="+r.RTT.String(), "(Last probed: "+stampOf(r.At)+")")
				default:
					cells = append(cells, "not probed yet")
				}
				row(w, cells...)
			}
		}
	}
}

func where(p model.HealthPath) string {
	if p.Endpoint {
		return "Endpoint"
	}
	return "Host"
}

func nodeTitle(h agent.ClusterHealth, n model.NodeHealth) string {
	title := n.Name
	if h.Cluster != "" {
		title = h.Cluster + "/" + n.Name
	}
	if n.Local {
		title += " (localhost)"
	}
	return title
}

func stampOf(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339)
}
