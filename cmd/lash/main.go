// SPDX-License-Identifier: Apache-2.0

// Command lash installs Lash on a cluster and shows what it does there; see package cli.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/lash-net/lash/internal/bench"
	"github.com/lash-net/lash/internal/cli"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == bench.WorkerArg { // executed by lash bench
		if err := bench.RunWorker(); err != nil {
			fmt.Fprintln(os.Stderr, "lash bench: worker:", err)
			os.Exit(1)
		}
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := cli.Main(ctx, os.Args[1:], cli.Streams{In: os.Stdin, Out: os.Stdout, Err: os.Stderr})
	stop()
	os.Exit(code)
}
