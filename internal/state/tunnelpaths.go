// SPDX-License-Identifier: Apache-2.0

package state

import (
	"net/netip"
	"strconv"

	"github.com/cilium/statedb"
)

// TunnelPath is what the kernel has, not what is wanted, of the two things that lead packets to a pod CIDR into the
// tunnel. They change in an order in which no packet finds only the second.
type TunnelPath struct {
	Prefix netip.Prefix
	Marked bool // its row of the ipcache: programs encapsulate
	Routed bool // its route leads to the host device, where programs see what the node itself sends
}

var tunnelPathByPrefix = byPrefix(func(r TunnelPath) netip.Prefix { return r.Prefix })

// TunnelPathByPrefix finds the row of a pod CIDR.
func TunnelPathByPrefix(p netip.Prefix) statedb.Query[TunnelPath] { return tunnelPathByPrefix.Query(p) }

func newTunnelPaths(db *statedb.DB) (statedb.RWTable[TunnelPath], error) {
	return statedb.NewTableAny(db, "tunnel-paths",
		func() []string { return []string{"Prefix", "Marked", "Routed"} },
		func(r TunnelPath) []string {
			return []string{r.Prefix.String(), strconv.FormatBool(r.Marked), strconv.FormatBool(r.Routed)}
		}, tunnelPathByPrefix)
}
