// SPDX-License-Identifier: Apache-2.0

package state

import (
	"net/netip"

	"github.com/cilium/statedb"
)

// NonMasquerade is a destination outside of the cluster to which pods of this node keep their addresses.
type NonMasquerade struct {
	Prefix netip.Prefix
	Source string // who says so
}

// Split is the row as a loop's key and value.
func (r NonMasquerade) Split() (netip.Prefix, struct{}) { return r.Prefix, struct{}{} }

func newNonMasquerade(db *statedb.DB) (statedb.RWTable[NonMasquerade], error) {
	return statedb.NewTableAny(db, "non-masquerade",
		func() []string { return []string{"Destination", "Source"} },
		func(r NonMasquerade) []string { return []string{r.Prefix.String(), r.Source} },
		byPrefix(func(r NonMasquerade) netip.Prefix { return r.Prefix }))
}
