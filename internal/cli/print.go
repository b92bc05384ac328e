// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"
)

// outputFlag gives cmd the flag -o.
func (a *app) outputFlag(cmd *cobra.Command) {
	cmd.Flags().StringVarP(&a.output, "output", "o", "", "json for everything there is to know")
	cmd.PreRunE = func(*cobra.Command, []string) error {
		if a.output != "" && a.output != "json" {
			return fmt.Errorf("--output=%s: must be json, or left out for a table", a.output)
		}
		return nil
	}
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"json"}, cobra.ShellCompDirectiveNoFileComp))
}

// printJSON prints v if -o json is given, and reports whether it is.
func (a *app) printJSON(v any) (bool, error) {
	if a.output != "json" {
		return false, nil
	}
	e := json.NewEncoder(a.Out)
	e.SetIndent("", "  ")
	return true, e.Encode(v)
}

// columns returns a writer that aligns tab-separated cells as the field's tools do: three spaces between columns.
func columns(w io.Writer) *tabwriter.Writer { return tabwriter.NewWriter(w, 5, 0, 3, ' ', 0) }

func row(w io.Writer, cells ...string) { fmt.Fprintln(w, strings.Join(cells, "\t")) }
