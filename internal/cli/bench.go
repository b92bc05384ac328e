// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"errors"
	"flag"

	"github.com/spf13/cobra"

	"github.com/lash-net/lash/internal/bench"
)

// benchCommand hands its arguments to package bench, whose flags are those of
// `make bench`.
func (a *app) benchCommand() *cobra.Command {
	return &cobra.Command{
		Use:                "bench [flags]",
		Short:              "Measure this machine: Lash against bare network namespaces",
		GroupID:            "node",
		DisableFlagParsing: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			err := bench.Main(cmd.Context(), args, "", a.Out, a.Err)
			if errors.Is(err, flag.ErrHelp) {
				return nil
			}
			return err
		},
	}
}
