// SPDX-License-Identifier: Apache-2.0

// Command bench is `make bench`: Lash's datapath against the bare namespaces,
// in one run, with gates. `lash bench` is the same within the CLI.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/lash-net/lash/internal/bench"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == bench.WorkerArg {
		if err := bench.RunWorker(); err != nil {
			fmt.Fprintln(os.Stderr, "bench: worker:", err)
			os.Exit(1)
		}
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	err := bench.Main(ctx, os.Args[1:], "dist/bench.json", os.Stdout, os.Stderr)
	switch {
	case err == nil || errors.Is(err, flag.ErrHelp):
	case ctx.Err() != nil:
		fmt.Fprintln(os.Stderr, "bench: interrupted, everything is taken down")
		os.Exit(130)
	default:
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}
