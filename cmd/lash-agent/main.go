// SPDX-License-Identifier: Apache-2.0

// Command lash-agent runs on every node: it gives pods their network and keeps the kernel equal to what the cluster
// says. See wire.go for the order in which its parts start.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/lash-net/lash/internal/config"
	"github.com/lash-net/lash/internal/version"
)

// memoryLimit is the default of GOMEMLIMIT: the collector works harder before the agent takes more. Bytes.
const memoryLimit = 56 << 20

// cpusMost bounds what frugal leaves the agent on big nodes.
const cpusMost = 4

// frugal makes half of the CPUs that the agent may use the default of GOMAXPROCS, once it has started. From then on its
// work is many small pieces that follow each other, and spreading those over CPUs costs more, in threads that wake and
// sleep, than the pieces themselves; what takes long is done by the kernel. The rest of the node is the pods'.
func frugal() {
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(min(max(1, runtime.GOMAXPROCS(0)/2), cpusMost))
	}
}

func main() {
	if len(os.Args) == 2 && (os.Args[1] == "version" || os.Args[1] == "--version") {
		fmt.Println("lash-agent", version.Long())
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	do := start
	args := os.Args[1:]
	if len(args) > 0 && args[0] == "cleanup" {
		do, args = func(ctx context.Context, args []string) error { return cleanup(ctx, args, os.Stdout) }, args[1:]
	}
	if err := do(ctx, args); errors.Is(err, flag.ErrHelp) {
		fmt.Print(config.Usage("lash-agent"))
	} else if err != nil {
		fmt.Fprintln(os.Stderr, "lash-agent:", err)
		os.Exit(1)
	}
}

func start(ctx context.Context, args []string) error {
	cfg, err := config.Load("", args)
	if err != nil {
		return err
	}
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(memoryLimit)
	}
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(50)
	}
	log := newLogger(os.Stderr, cfg.Debug)
	klog.SetSlogLogger(log.With("subsys", "client-go"))
	log.Info("starting", "version", version.Long())
	for _, line := range cfg.Dump() {
		log.Info("  "+line, "subsys", "daemon")
	}
	for _, note := range cfg.Notes() {
		log.Warn("configuration", "note", note)
	}
	name, err := nodeName()
	if err != nil {
		return err
	}
	unlock, err := lock(ctx, filepath.Join(cfg.StateDir, "agent.lock"))
	if err != nil {
		return err
	}
	defer unlock()
	if mounted, err := mountBPF(cfg.BPFRoot); err != nil {
		return err
	} else if mounted {
		log.Info("BPF file system mounted", "path", cfg.BPFRoot)
	}
	return run(ctx, cfg, name, log)
}

// lockWait is how long a starting agent waits for one that is ending, as during an update of the DaemonSet.
const lockWait = 10 * time.Second

// lock makes this the only agent of the node: two would take sockets and map rows from each other.
func lock(ctx context.Context, path string) (unlock func(), err error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("state-dir: %w", err)
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("state-dir: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, lockWait)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		if err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err == nil {
			return func() { f.Close() }, nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("lock %s: %w: another agent runs on this node", path, err)
		}
	}
}

// newLogger writes the lines the field's users grep for: level=info msg="...".
func newLogger(w io.Writer, verbose bool) *slog.Logger {
	level := slog.LevelInfo
	if verbose {
		level = slog.LevelDebug
	}
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{
		Level: level,
		ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
			if a.Key == slog.LevelKey {
				a.Value = slog.StringValue(strings.ToLower(a.Value.String()))
			}
			return a
		},
	}))
}

// nodeName is the name of this node's Node object: K8S_NODE_NAME, which the chart takes from the pod's spec.nodeName,
// else the host's name.
func nodeName() (string, error) {
	if name := os.Getenv("K8S_NODE_NAME"); name != "" {
		return name, nil
	}
	name, err := os.Hostname()
	if err != nil {
		return "", fmt.Errorf("name of this node: %w; set K8S_NODE_NAME", err)
	}
	return strings.ToLower(name), nil
}
