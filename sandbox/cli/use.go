// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/lash-net/lash/sandbox/cluster"
	"github.com/lash-net/lash/sandbox/node"
	"github.com/lash-net/lash/sandbox/plan"
)

func (a *app) kubeconfig() *cobra.Command {
	var internal, print bool
	cmd := &cobra.Command{
		Use:   "kubeconfig",
		Short: "Print the administrator's kubeconfig",
		Long: `Print the administrator's kubeconfig. Its server is a port of 127.0.0.1, so that any
program on this machine can use it. With --internal the server is the API server's own
address, for programs inside the sandbox's namespaces (sandbox exec).`,
		Example: "  export KUBECONFIG=$(sandbox kubeconfig --path)\n  sandbox kubeconfig > kubeconfig",
		Args:    cobra.NoArgs,
		RunE: func(_ *cobra.Command, _ []string) error {
			c, err := a.open()
			if err != nil {
				return err
			}
			if print {
				fmt.Fprintln(a.out, c.Kubeconfig(internal))
				return nil
			}
			b, err := os.ReadFile(c.Kubeconfig(internal))
			if err != nil {
				return err
			}
			_, err = a.out.Write(b)
			return err
		},
	}
	cmd.Flags().BoolVar(&internal, "internal", false, "for programs inside the sandbox's namespaces")
	cmd.Flags().BoolVar(&print, "path", false, "print the file's path instead of its content")
	return cmd
}

func (a *app) kubectl() *cobra.Command {
	return &cobra.Command{
		Use:                "kubectl [--name NAME] ARGS...",
		Short:              "Run kubectl as administrator",
		Example:            "  sandbox kubectl get pods -A\n  sandbox kubectl --name other apply -f demo.yaml",
		DisableFlagParsing: true, // the rest is kubectl's
		RunE: func(_ *cobra.Command, args []string) error {
			args, err := a.takeName(args)
			if err != nil {
				return err
			}
			c, err := a.open()
			if err != nil {
				return err
			}
			t, err := c.Target(plan.ControlPlane)
			if err != nil {
				return err
			}
			argv, env := c.KubectlCommand(args)
			return enter(t, argv, env)
		},
	}
}

// takeName takes --name, where it comes first, out of arguments that are another program's.
func (a *app) takeName(args []string) ([]string, error) {
	if len(args) > 0 && args[0] == "--name" {
		if len(args) < 2 {
			return nil, errors.New("--name needs a value")
		}
		a.name = args[1]
		return args[2:], nil
	}
	if len(args) > 0 && strings.HasPrefix(args[0], "--name=") {
		a.name = strings.TrimPrefix(args[0], "--name=")
		return args[1:], nil
	}
	return args, nil
}

func enter(t node.Target, argv, env []string) error {
	status, err := t.Enter(argv, env)
	if err != nil {
		return err
	}
	if status != 0 {
		return ExitStatus(status)
	}
	return nil
}

func (a *app) exec() *cobra.Command {
	var generator bool
	cmd := &cobra.Command{
		Use:   "exec NODE -- COMMAND...",
		Short: "Run a command inside a node (or in the network namespace of cp, outside, sw)",
		Long: `Run a command inside a node: in all of its namespaces and in its cgroup. The hosts cp
(control plane), outside and sw (the underlay's bridge) are network namespaces only. Input,
output and the exit status are the command's.`,
		Example: "  sandbox exec n1 -- ctr -n k8s.io containers ls\n  sandbox exec outside -- curl http://172.18.0.11",
		Args:    cobra.MinimumNArgs(2),
		RunE: func(_ *cobra.Command, args []string) error {
			c, err := a.open()
			if err != nil {
				return err
			}
			target := c.Target
			if generator {
				target = c.Generator
			}
			t, err := target(args[0])
			if err != nil {
				return err
			}
			argv := args[1:]
			if argv[0] == "--" {
				argv = argv[1:]
			}
			if len(argv) == 0 {
				return errors.New("exec needs a command after the node's name")
			}
			return enter(t, argv, os.Environ())
		},
	}
	cmd.Flags().BoolVar(&generator, cluster.GeneratorFlag, false, "as a load generator of `sandbox demo --services`, while that runs")
	_ = cmd.Flags().MarkHidden(cluster.GeneratorFlag)
	cmd.Flags().SetInterspersed(false) // flags after NODE are the command's, with -- or without
	return cmd
}

func (a *app) load() *cobra.Command {
	return &cobra.Command{
		Use:   "load IMAGE.tar...",
		Short: "Import image archives (docker or OCI) into every node; later nodes get them too",
		Args:  cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.locked(cmd.Context(), func(c *cluster.Cluster) error {
				for _, f := range args {
					if err := c.Load(cmd.Context(), f); err != nil {
						return err
					}
					a.say("loaded %s into %d nodes", filepath.Base(f), len(c.Nodes))
				}
				return nil
			})
		},
	}
}

func (a *app) addNode() *cobra.Command {
	return &cobra.Command{
		Use:   "add-node",
		Short: "Add a node and print its name",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.locked(cmd.Context(), func(c *cluster.Cluster) error {
				n, err := c.AddNode(cmd.Context())
				if err != nil {
					return err
				}
				a.say("node %s is registered", n)
				fmt.Fprintln(a.out, n)
				return nil
			})
		},
	}
}

func (a *app) removeNode() *cobra.Command {
	return &cobra.Command{
		Use:   "remove-node NODE",
		Short: "Remove a node for good: the machine, its Node object and its pods",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.locked(cmd.Context(), func(c *cluster.Cluster) error {
				if err := c.RemoveNode(cmd.Context(), args[0]); err != nil {
					return err
				}
				a.say("node %s is gone", args[0])
				return nil
			})
		},
	}
}

func (a *app) kill() *cobra.Command {
	return &cobra.Command{
		Use:   "kill NODE...",
		Short: "Power failure of nodes: everything in them ends at once",
		Long: `Power failure of nodes: every process in them gets SIGKILL and their network disappears.
Disks stay: "sandbox restart" boots them with the same name, addresses and containerd.`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.locked(cmd.Context(), func(c *cluster.Cluster) error {
				for _, n := range args {
					if err := c.KillNode(cmd.Context(), n); err != nil {
						return err
					}
					a.say("node %s is off", n)
				}
				return nil
			})
		},
	}
}

func (a *app) restart() *cobra.Command {
	var all bool
	var wait time.Duration
	cmd := &cobra.Command{
		Use:   "restart NODE... | --all",
		Short: "Boot nodes again, as after a power failure",
		Args: func(_ *cobra.Command, args []string) error {
			if all != (len(args) == 0) {
				return errors.New("name the nodes, or use --all")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.locked(cmd.Context(), func(c *cluster.Cluster) error {
				if all {
					args = c.Nodes
				}
				if err := c.RestartNodes(cmd.Context(), args...); err != nil {
					return err
				}
				a.say("booted %s", strings.Join(args, ", "))
				if wait == 0 {
					return nil
				}
				if err := c.WaitBooted(cmd.Context(), wait, args...); err != nil {
					return err
				}
				a.say("Kubernetes has them back and restarts their pods")
				return nil
			})
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "all nodes at once")
	cmd.Flags().DurationVar(&wait, "wait", 60*time.Second, "wait so long until kubelet has reported the new boot; 0 does not wait")
	return cmd
}

func (a *app) startStop(what string) *cobra.Command {
	short := map[string]string{"start": "Start", "stop": "Stop (kill -9)"}[what]
	return &cobra.Command{
		Use:       what + " COMPONENT...",
		Short:     short + " parts of the control plane: " + strings.Join(cluster.Components, ", "),
		Example:   "  sandbox " + what + " apiserver",
		ValidArgs: cluster.Components,
		Args:      cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			for _, p := range args {
				if err := cluster.CheckComponent(p); err != nil {
					return err
				}
			}
			return a.locked(cmd.Context(), func(c *cluster.Cluster) error {
				for _, p := range args {
					if what == "stop" {
						if err := c.StopComponent(cmd.Context(), p); err != nil {
							return err
						}
						a.say("%s is stopped", p)
						continue
					}
					if err := c.StartComponent(p); err != nil {
						return err
					}
					if p == "apiserver" {
						if err := c.WaitAPIServer(cmd.Context()); err != nil {
							return err
						}
					}
					a.say("%s runs", p)
				}
				return nil
			})
		},
	}
}

func (a *app) logs() *cobra.Command {
	return &cobra.Command{
		Use:   "logs NODE|COMPONENT",
		Short: "Print the log of a part of the control plane, or of a node's containerd, kubelet and kube-proxy",
		Args:  cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			c, err := a.open()
			if err != nil {
				return err
			}
			files, err := c.Logs(args[0])
			if err != nil {
				return err
			}
			for _, f := range files {
				b, err := os.ReadFile(f)
				if errors.Is(err, os.ErrNotExist) {
					continue
				}
				if err != nil {
					return err
				}
				fmt.Fprintf(a.out, "==> %s <==\n%s", f, b)
			}
			return nil
		},
	}
}
