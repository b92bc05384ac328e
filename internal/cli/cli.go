// SPDX-License-Identifier: Apache-2.0

// Package cli is the lash command. Commands that show a node ask the agent's socket; where there is none, on a
// developer's machine, they find the agent's pod through the kubeconfig and run themselves in it. Commands that change a
// cluster drive the chart of package deploy through Helm's library.
//
// It reads what its flags lead to and writes to the cluster only in install, upgrade and uninstall.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
	"k8s.io/klog/v2"

	"github.com/lash-net/lash/api/agent"
	"github.com/lash-net/lash/internal/version"
)

// Streams are where a command reads and writes.
type Streams struct {
	In       io.Reader
	Out, Err io.Writer
}

// errSilent ends the program with status 1 when everything has been said already.
var errSilent = errors.New("")

// app is what all commands share.
type app struct {
	Streams
	socket                         string
	kubeconfig, context, namespace string
	node                           string
	output                         string
}

// Main runs the command line and returns the exit status: 0, or 1 with the reason on Err.
func Main(ctx context.Context, args []string, s Streams) int {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(400) // a short life: memory is cheaper than collecting it
	}
	klog.LogToStderr(false)
	klog.SetOutput(io.Discard)
	root := newRoot(s)
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	if !errors.Is(err, errSilent) {
		fmt.Fprintf(s.Err, "Error: %v\n", err)
	}
	return 1
}

func newRoot(s Streams) *cobra.Command {
	a := &app{Streams: s}
	root := &cobra.Command{
		Use:   "lash",
		Short: "Install Lash on a Kubernetes cluster, and see what it does there",
		Long: `lash installs Lash, Kubernetes networking in eBPF, and shows its state.

Commands about a node (status, monitor, explain, config, endpoint, ip, node, service, prefilter, bpf, db) answer from the agent of this node when run in its
pod; elsewhere they find an agent through the kubeconfig, on the node given by --node.`,
		Example: `  lash install                       install on the cluster of the current context
  lash status --wait                 wait until every node is ready
  lash status --node worker-1 --why  what decides how this node forwards packets`,
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetOut(s.Out)
	root.SetErr(s.Err)
	root.SetIn(s.In)
	root.SuggestionsMinimumDistance = 2
	f := root.PersistentFlags()
	f.StringVar(&a.socket, "socket", agent.Socket, "socket of the agent")
	f.StringVar(&a.kubeconfig, "kubeconfig", "", "kubeconfig file (default: $KUBECONFIG, or ~/.kube/config)")
	f.StringVar(&a.context, "context", "", "context of the kubeconfig (default: its current one)")
	f.StringVarP(&a.namespace, "namespace", "n", "kube-system", "namespace of Lash")
	f.StringVar(&a.node, "node", "", "name of the node whose agent is asked")
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return fmt.Errorf("%w; '%s --help' shows the flags there are", err, cmd.CommandPath())
	})
	root.AddGroup(&cobra.Group{ID: "cluster", Title: "Commands for a cluster:"}, &cobra.Group{ID: "node", Title: "Commands for a node:"})
	root.AddCommand(
		a.installCommand(), a.upgradeCommand(), a.uninstallCommand(), a.sysdumpCommand(),
		a.statusCommand(), a.endpointCommand(), a.identityCommand(), a.ipCommand(), a.nodeCommand(), a.serviceCommand(), a.prefilterCommand(), a.bpfCommand(), a.dbCommand(),
		a.monitorCommand(), a.explainCommand(), a.healthCommand(), a.configCommand(),
		a.benchCommand(), a.versionCommand(),
	)
	return root
}

func (a *app) versionCommand() *cobra.Command {
	var clientOnly bool
	cmd := &cobra.Command{
		Use:     "version",
		Short:   "Show the version of this command and of the agent",
		GroupID: "node",
		Args:    cobra.NoArgs,
	}
	cmd.Flags().BoolVar(&clientOnly, "client", false, "only this command's version")
	a.outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		mine := agent.Version{Version: version.Version, Commit: version.Commit, Go: runtime.Version(), Arch: runtime.GOARCH}
		show := func(v any) error {
			if done, err := a.printJSON(v); done || err != nil {
				return err
			}
			fmt.Fprintln(a.Out, "Client:", version.Long())
			return nil
		}
		if clientOnly {
			return show(mine)
		}
		return a.onAgent(cmd, args, func(ctx context.Context, c *client) error {
			var v agent.Version
			if err := c.get(ctx, "/v1/version", &v); err != nil {
				return errors.Join(show(mine), err)
			}
			if done, err := a.printJSON(map[string]agent.Version{"client": mine, "agent": v}); done || err != nil {
				return err
			}
			fmt.Fprintln(a.Out, "Client:", version.Long())
			commit := ""
			if v.Commit != "" {
				commit = " (" + v.Commit + ")"
			}
			fmt.Fprintf(a.Out, "Agent:  %s%s %s linux/%s, kernel %s\n", v.Version, commit, v.Go, v.Arch, v.Kernel)
			return nil
		})
	}
	return cmd
}
