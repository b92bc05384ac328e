// SPDX-License-Identifier: Apache-2.0

// Package cli is the sandbox program's command line: it parses, calls package cluster, and prints.
package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/lash-net/lash/sandbox/cluster"
	"github.com/lash-net/lash/sandbox/deps"
)

// ExitStatus is returned for a command that ran and ended with this status; nothing is printed for it.
type ExitStatus int

func (e ExitStatus) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// NameVariable is the environment variable with the default of --name.
const NameVariable = "LASH_SANDBOX"

type app struct {
	name  string
	start time.Time
	out   io.Writer
}

// Run parses args and does what they say.
func Run(ctx context.Context, args []string) error {
	a := &app{start: time.Now(), out: os.Stdout}
	root := &cobra.Command{
		Use:   "sandbox",
		Short: "A real multi-node Kubernetes on one machine, in network namespaces",
		Long: `sandbox runs a real Kubernetes on one machine: etcd, kube-apiserver, controller manager and
scheduler, and nodes that are network namespaces with a containerd and a kubelet each. It
needs no Docker, no virtual machine and no image registry; nothing in it reaches the
network outside, and nothing of the machine's own network is touched.

  sandbox up --nodes 3           a cluster without a pod network: bring your own CNI
  sandbox load my-cni.tar        put its image on every node
  sandbox kubectl apply -f ...   use it
  sandbox exec n1 -- ip route    look into a node
  sandbox down                   leave nothing behind

Hosts: nodes n1, n2 ... (172.18.0.11 ..., fd00:172:18::11 ...), the control plane cp
(172.18.0.2), and outside (172.18.0.200; 203.0.113.200 behind the gateway), a machine that
knows nothing about pods. Services are 10.96.0.0/16 and fd00:10:96::/112.`,
		SilenceUsage: true, SilenceErrors: true,
	}
	def := cluster.DefaultName
	if v := os.Getenv(NameVariable); v != "" {
		def = v
	}
	root.PersistentFlags().StringVar(&a.name, "name", def, "which sandbox; several may run side by side (default from $"+NameVariable+")")
	root.AddCommand(a.up(), a.down(), a.status(), a.kubeconfig(), a.kubectl(), a.exec(), a.load(),
		a.addNode(), a.removeNode(), a.kill(), a.restart(), a.startStop("start"), a.startStop("stop"), a.logs(), a.prepare(), a.deps(), a.conformance())
	a.addDemo(root)
	root.SetArgs(args)
	return root.ExecuteContext(ctx)
}

// say prints a progress line with the seconds since the start.
func (a *app) say(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "%6.1fs  %s\n", time.Since(a.start).Seconds(), fmt.Sprintf(format, args...))
}

func (a *app) open() (*cluster.Cluster, error) { return cluster.Open(a.name, a.say) }

// locked opens the sandbox and keeps others from changing it meanwhile.
func (a *app) locked(ctx context.Context, f func(*cluster.Cluster) error) error {
	c, err := a.open()
	if err != nil {
		return err
	}
	if err := c.Lock(ctx); err != nil {
		return err
	}
	defer c.Unlock()
	if c, err := a.open(); err != nil { // it may have changed while we waited
		return err
	} else {
		return f(c)
	}
}

func (a *app) up() *cobra.Command {
	var o cluster.Options
	cmd := &cobra.Command{
		Use:   "up",
		Short: "Start a cluster",
		Long: `Start a cluster: seconds when everything is cached, some minutes the first time, when
Kubernetes, etcd and CoreDNS are built from their Go modules. Debian packages that are
missing are installed with apt-get. Ctrl-C cleans up; leftovers of a crash are cleaned
before starting.

Nodes stay NotReady until a CNI is there. --cni bridge installs the distribution's bridge
plugin with static routes (use it with --proxy iptables), to try the sandbox by itself.`,
		Example: "  sandbox up --nodes 3\n  sandbox up --nodes 2 --cni bridge --proxy iptables --name other",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx := cmd.Context()
			c, err := cluster.New(a.name, a.say)
			if err != nil {
				return err
			}
			err = c.Up(ctx, o)
			if err != nil && ctx.Err() != nil {
				a.say("interrupted: cleaning up")
				return errors.Join(errors.New("interrupted"), c.Down(context.WithoutCancel(ctx)))
			}
			if errors.Is(err, cluster.ErrAlreadyUp) {
				return err
			}
			if err != nil && len(c.Nodes) > 0 {
				return fmt.Errorf("%w\nWhat was started is left for a look (`sandbox status%s`); `sandbox down%s` removes it", err, nameFlag(a.name), nameFlag(a.name))
			}
			if err != nil {
				return err
			}
			a.say("sandbox %q is up: sandbox kubectl%s get pods -A, or export KUBECONFIG=%s", a.name, nameFlag(a.name), c.Kubeconfig(false))
			return nil
		},
	}
	cmd.Flags().IntVar(&o.Nodes, "nodes", 3, "how many nodes")
	cmd.Flags().StringVar(&o.Proxy, "proxy", "none", "service proxy on every node: none, iptables (kube-proxy)")
	cmd.Flags().StringVar(&o.CNI, "cni", "none", "pod network: none (bring your own), bridge")
	cmd.Flags().IntVar(&o.DNS, "dns", 2, "replicas of CoreDNS; 0 for none")
	return cmd
}

func nameFlag(name string) string {
	if name == cluster.DefaultName {
		return ""
	}
	return " --name " + name
}

func (a *app) down() *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use:   "down",
		Short: "End a cluster and remove all of it, from any state",
		Long: `End a cluster and remove all of it: processes, namespaces, cgroups, mounts, files. It
works from any state, also after a crash or kill -9 of this program. What was built is kept
in ` + cluster.CacheDir + `; remove that directory to be rid of it too.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			names := []string{a.name}
			if all {
				names = cluster.Names()
			}
			var errs []error
			for _, n := range names {
				c, err := cluster.New(n, a.say)
				if err != nil {
					return err
				}
				if len(c.Exists()) == 0 {
					a.say("sandbox %q is not up", n)
					continue
				}
				if err := c.Down(cmd.Context()); err != nil {
					errs = append(errs, err)
					continue
				}
				a.say("sandbox %q is down, nothing is left of it", n)
			}
			return errors.Join(errs...)
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "every sandbox of this machine")
	return cmd
}

func (a *app) status() *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show the processes and nodes of a cluster; exit status 1 if it is not up",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.open()
			if err != nil {
				if others := cluster.Names(); errors.Is(err, cluster.ErrNotUp) && len(others) > 0 {
					err = fmt.Errorf("%w; on this machine: %s", err, strings.Join(others, ", "))
				}
				return err
			}
			s := c.Status(cmd.Context())
			switch output {
			case "json":
				e := json.NewEncoder(a.out)
				e.SetIndent("", "  ")
				return e.Encode(s)
			case "":
				printStatus(a.out, s)
				return nil
			}
			return fmt.Errorf("-o %q: use json", output)
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "", "json")
	return cmd
}

func printStatus(w io.Writer, s cluster.Status) {
	ready := "not ready"
	if s.Ready {
		ready = "ready"
	}
	fmt.Fprintf(w, "Sandbox %s: API server %s, proxy %s, cni %s\nKubeconfig %s\n\n", s.Name, ready, s.Proxy, s.CNI, s.Kubeconfig)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "CONTROL PLANE\tSTATE\tPID\tMIB\tLOG")
	for _, p := range s.Components {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\n", p.Name, state(p.Running), number(p.Pid), number(p.MiB), p.Log)
	}
	fmt.Fprintln(t, "\t\t\t\t\nNODE\tSTATE\tPID\tREADY\tADDRESSES\tPOD CIDRS")
	for _, n := range s.Machines {
		r := n.Ready
		if r == "" {
			r = "-"
		}
		cidrs := strings.Join(n.PodCIDRs, ",")
		if cidrs == "" {
			cidrs = "-"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\n", n.Name, state(n.Running), number(n.Pid), r, strings.Join(n.Addresses, ","), cidrs)
	}
	t.Flush()
}

func state(running bool) string {
	if running {
		return "running"
	}
	return "stopped"
}

func number(i int) string {
	if i == 0 {
		return "-"
	}
	return fmt.Sprint(i)
}

func (a *app) deps() *cobra.Command {
	return &cobra.Command{
		Use:   "deps",
		Short: "Install the Debian packages that a sandbox needs (up does it by itself)",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := deps.Cluster.Ensure(cmd.Context(), a.say); err != nil {
				return err
			}
			a.say("every package is installed")
			return nil
		},
	}
}

func (a *app) prepare() *cobra.Command {
	return &cobra.Command{
		Use:   "prepare",
		Short: "Build and cache everything that up needs, without starting anything",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := cluster.New(a.name, a.say)
			if err != nil {
				return err
			}
			if _, err := c.Prepare(cmd.Context()); err != nil {
				return err
			}
			a.say("everything is in %s", cluster.CacheDir)
			return nil
		},
	}
}
