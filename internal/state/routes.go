// SPDX-License-Identifier: Apache-2.0

package state

import (
	"net/netip"
	"strconv"

	"github.com/cilium/statedb"

	"github.com/lash-net/lash/internal/model"
)

// Route is a wanted route of the main table.
type Route struct {
	Dst netip.Prefix
	model.Route
}

// Split is the row as a loop's key and value.
func (r Route) Split() (netip.Prefix, model.Route) { return r.Dst, r.Route }

func newRoutes(db *statedb.DB) (statedb.RWTable[Route], error) {
	return statedb.NewTableAny(db, "routes",
		func() []string { return []string{"Destination", "Via", "Device", "Source", "MTU", "Scope"} },
		func(r Route) []string {
			mtu := ""
			if r.MTU > 0 {
				mtu = strconv.Itoa(r.MTU)
			}
			return []string{r.Dst.String(), addr(r.Via), r.Dev, addr(r.Src), mtu, r.Scope}
		}, byPrefix(func(r Route) netip.Prefix { return r.Dst }))
}
