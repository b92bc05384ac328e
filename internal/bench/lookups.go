// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"fmt"
	"io"
	"text/tabwriter"
)

// Lookups is how many map lookups one packet of an established connection made.
type Lookups struct {
	Program string         `json:"program"`
	Case    string         `json:"case"`
	Maps    map[string]int `json:"maps"` // by map name
	Hashed  int            `json:"hashed"`
	Verdict string         `json:"verdict,omitempty"`
}

func printLookups(w io.Writer, all []Lookups) error {
	if len(all) == 0 {
		return nil
	}
	fmt.Fprintf(w, "\nMap lookups of one packet of an established connection\n")
	t := tabwriter.NewWriter(w, 2, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "program\tcase\tlookups in hash and LPM maps\tall\tverdict\t")
	for _, l := range all {
		fmt.Fprintf(t, "%s\t%s\t%d\t%v\t%s\t\n", l.Program, l.Case, l.Hashed, l.Maps, dash(l.Verdict))
	}
	return t.Flush()
}
