// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/lash-net/lash/sandbox/conformance"
	"github.com/lash-net/lash/sandbox/testbed"
)

func (a *app) conformance() *cobra.Command {
	o := conformance.Options{Options: testbed.Options{Say: a.say}, Out: a.out}
	cmd := &cobra.Command{
		Use:   "conformance",
		Short: "Run the upstream Kubernetes e2e suite's network specs against Lash",
		Long: `Start a cluster of six nodes in three zones, without kube-proxy, install Lash, and run the network specs of the
upstream Kubernetes e2e suite, built from its Go module: every spec of sig-network but those
that the list of skips names, each with its reason (--list shows it). Prints a line for each
spec; the last line is "conformance: N passed, M failed, K skipped", and the exit status is 0
only when M is 0. The cluster is taken down at the end; one that was up before is used, and
left up.`,
		Example: "  sandbox conformance --name conformance --mode native\n  sandbox conformance --focus 'HostPort|session affinity' --keep",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := o.Check(); err != nil {
				return err
			}
			if o.Procs < 1 {
				return fmt.Errorf("--procs %d: use 1 or more", o.Procs)
			}
			if o.Report == "" {
				o.Report = filepath.Join("dist", "conformance", o.Mode)
			}
			err := conformance.Run(cmd.Context(), a.name, o)
			if errors.Is(err, conformance.ErrFailed) {
				return ExitStatus(1)
			}
			return err
		},
	}
	testbedFlags(cmd, &o.Options)
	cmd.Flags().StringVar(&o.Focus, "focus", "", "only specs whose name matches this regular expression")
	cmd.Flags().IntVar(&o.Nodes, "nodes", 6, "nodes of the cluster; a few specs want two in each of the three zones")
	cmd.Flags().IntVar(&o.Procs, "procs", 4, "specs at once")
	cmd.Flags().DurationVar(&o.Limit, "timeout", 2*time.Hour, "of the whole run")
	cmd.Flags().BoolVar(&o.Keep, "keep", false, "leave the cluster up")
	cmd.Flags().BoolVar(&o.List, "list", false, "print what would run and what is skipped why, and end")
	cmd.Flags().StringVar(&o.Report, "report", "", "`directory` for log, report, summary and junit.xml (default dist/conformance/MODE)")
	return cmd
}
