// SPDX-License-Identifier: Apache-2.0

package state

import (
	"net/netip"

	"github.com/cilium/statedb"

	"github.com/lash-net/lash/internal/model"
)

// IPCache says who is behind a prefix.
type IPCache struct {
	Prefix netip.Prefix
	model.IPCacheEntry
}

// Split is the row as a loop's key and value.
func (r IPCache) Split() (netip.Prefix, model.IPCacheEntry) { return r.Prefix, r.IPCacheEntry }

func newIPCache(db *statedb.DB) (statedb.RWTable[IPCache], error) {
	return statedb.NewTableAny(db, "ipcache",
		func() []string { return []string{"Prefix", "Identity", "Node", "Source"} },
		func(r IPCache) []string {
			return []string{r.Prefix.String(), r.Identity.String(), addr(r.Node), r.Source}
		}, byPrefix(func(r IPCache) netip.Prefix { return r.Prefix }))
}
