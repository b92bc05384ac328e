// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"

	"github.com/lash-net/lash/bpf"
	"github.com/lash-net/lash/internal/cni"
	"github.com/lash-net/lash/internal/config"
	"github.com/lash-net/lash/internal/datapath/netdev"
)

// cleanup removes everything of Lash from this node and checks that nothing is left. It needs no agent, no API server
// and no memory of what was installed.
func cleanup(ctx context.Context, args []string, out io.Writer) error {
	cfg, err := config.Load("", args)
	if err != nil {
		return err
	}
	unlock, err := lock(ctx, filepath.Join(cfg.StateDir, "agent.lock"))
	if err != nil {
		return fmt.Errorf("%w: end it first, it would put back what is removed", err)
	}
	defer unlock()
	host, err := netdev.OpenHost()
	if err != nil {
		return err
	}
	defer host.Close()

	// The configuration first: no pod starts with a network that is being taken down.
	install := cni.Installation{ConfDir: cfg.CNIConfDir, BinDir: cfg.CNIBinDir}
	errs := []error{install.Uninstall()}
	what := netdev.CleanupConfig{BPFRoot: cfg.BPFRoot, Paths: []string{filepath.Dir(cfg.SocketPath)}}
	for _, names := range bpf.Programs {
		what.Programs = append(what.Programs, names...)
	}
	slices.Sort(what.Programs)
	what.Programs = slices.Compact(what.Programs)
	removed, err := host.Cleanup(what)
	errs = append(errs, err)
	for _, r := range removed {
		fmt.Fprintln(out, "removed", r)
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	left, err := host.Cleanup(what)
	if err != nil {
		return err
	}
	if len(left) > 0 {
		return fmt.Errorf("came back after it was removed: %s; does another agent run on this node?", strings.Join(left, ", "))
	}
	return nil
}
