// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/lash-net/lash/sandbox/demo"
	"github.com/lash-net/lash/sandbox/testbed"
)

func (a *app) addDemo(root *cobra.Command) {
	o := demo.Options{Options: testbed.Options{Say: a.say}, Out: a.out}
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Start three nodes with Lash, run workloads, check everything, leave the cluster up",
		Long: `Start a cluster of three nodes, install Lash with its own installer, run workloads and check
what pods expect of their network. Prints a line for each check; the last line is
"demo: N passed, M failed", and the exit status is 0 only when M is 0. The cluster stays up.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := o.Check(); err != nil {
				return err
			}
			if (o.Resilience || o.Services || o.Switch) && o.With != "lash" {
				return fmt.Errorf("--resilience, --services and --switch go with --with lash only")
			}
			err := demo.Run(cmd.Context(), a.name, o)
			if errors.Is(err, demo.ErrFailed) {
				return ExitStatus(1)
			}
			return err
		},
	}
	testbedFlags(cmd, &o.Options)
	cmd.Flags().BoolVar(&o.Switch, "switch", false, "also pass to the other mode and back, five times under traffic")
	cmd.Flags().BoolVar(&o.Fresh, "fresh", false, "start from an empty cluster even if one is up")
	cmd.Flags().BoolVar(&o.Resilience, "resilience", false, "also kill, remove and restart agents, nodes and the API server while pods talk (four minutes)")
	cmd.Flags().BoolVar(&o.Services, "services", false, "also restart backends, kill and remove agents, and create malformed objects, under load through every kind of service (eight minutes)")
	cmd.Flags().StringVar(&o.WriteGolden, "write-golden", "", "directory to write golden files of addresses and routes to, instead of comparing with them")
	root.AddCommand(cmd)
}

func testbedFlags(cmd *cobra.Command, o *testbed.Options) {
	cmd.Flags().StringVar(&o.With, "with", "lash", "pod network: lash, bridge (the distribution's bridge plugin and kube-proxy)")
	cmd.Flags().StringVar(&o.Mode, "mode", "vxlan", "how packets travel between nodes, with lash: vxlan, native")
	cmd.Flags().StringVar(&o.Lash, "lash", "bin/lash", "path of the lash program")
	cmd.Flags().StringVar(&o.Image, "image", "dist/lash.oci.tar", "path of Lash's image archive")
	cmd.Flags().StringArrayVar(&o.Set, "set", nil, "chart value KEY=VALUE for the installation; may be repeated")
}
