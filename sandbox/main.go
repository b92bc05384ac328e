// SPDX-License-Identifier: Apache-2.0

// Command sandbox runs a real multi-node Kubernetes on one machine, in network namespaces.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/lash-net/lash/sandbox/cli"
	"github.com/lash-net/lash/sandbox/cluster"
	"github.com/lash-net/lash/sandbox/node"
)

func main() {
	if handled, err := internal(os.Args[1:]); handled {
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	err := cli.Run(ctx, os.Args[1:])
	stop()
	var status cli.ExitStatus
	if errors.As(err, &status) {
		os.Exit(int(status))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "sandbox:", err)
		os.Exit(1)
	}
}

// internal runs the hidden subcommands with which the program starts itself.
func internal(args []string) (handled bool, err error) {
	switch {
	case len(args) == 2 && args[0] == node.LaunchCommand:
		return true, node.RunLaunch(args[1])
	case len(args) == 2 && args[0] == node.InitCommand:
		return true, node.Init(args[1], slog.New(slog.NewTextHandler(os.Stderr, nil)))
	case len(args) > 2 && args[0] == cluster.GoldenCommand:
		return true, cluster.RunGolden(args[1], args[2:])
	case len(args) == 4 && args[0] == cluster.ForwardCommand:
		return true, cluster.RunForward(args[1], args[2], args[3])
	}
	return false, nil
}
