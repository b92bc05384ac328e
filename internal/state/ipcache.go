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

// SourceCiliumEndpoint marks what a CiliumEndpoint says.
const SourceCiliumEndpoint = "custom-resource"

// Addresses says who is behind which prefix: the rows of ipcache and, where these have none, the CiliumEndpoints', which
// are not copied there because there may be ten thousands. While an address passes from one pod to another, two claim
// it: the new one's counts.
func (t *Tables) Addresses(txn statedb.ReadTxn) map[netip.Prefix]model.IPCacheEntry {
	nodes := map[netip.Addr]Node{}
	for n := range t.Nodes.All(txn) {
		for _, a := range n.Addrs {
			nodes[a] = n
		}
	}
	rows := make(map[netip.Prefix]model.IPCacheEntry, t.IPCache.NumObjects(txn)+2*t.CiliumEndpoints.NumObjects(txn))
	for r := range t.IPCache.All(txn) {
		rows[r.Prefix] = r.IPCacheEntry
	}
	contested := map[netip.Addr]CiliumEndpoint{}
	each := func(f func(CiliumEndpoint, netip.Addr)) {
		for r := range t.CiliumEndpoints.All(txn) {
			for _, a := range [...]netip.Addr{r.IPv4, r.IPv6} {
				if a.IsValid() && r.Identity != model.IdentityUnknown {
					f(r, a)
				}
			}
		}
	}
	put := func(r CiliumEndpoint, a netip.Addr) {
		rows[netip.PrefixFrom(a, a.BitLen())] = model.IPCacheEntry{Identity: r.Identity, Node: nodeFor(nodes, r.Node, a), Source: SourceCiliumEndpoint}
	}
	each(func(r CiliumEndpoint, a netip.Addr) {
		switch have, ok := rows[netip.PrefixFrom(a, a.BitLen())]; {
		case !ok:
			put(r, a)
		case have.Source == SourceCiliumEndpoint:
			contested[a] = CiliumEndpoint{}
		}
	})
	if len(contested) == 0 {
		return rows
	}
	each(func(r CiliumEndpoint, a netip.Addr) {
		if best, ok := contested[a]; ok && (best.Name == "" || best.before(r)) {
			contested[a] = r
		}
	})
	for a, r := range contested {
		put(r, a)
	}
	return rows
}

// nodeFor is the address by which the pod with address a is reached: its node's of the same family if it has one, none
// if the node is this one.
func nodeFor(nodes map[netip.Addr]Node, node, a netip.Addr) netip.Addr {
	n, ok := nodes[node]
	switch {
	case !ok:
		return node
	case n.Local:
		return netip.Addr{}
	}
	if x := n.AddrFor(a); x.IsValid() {
		return x
	}
	return node
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
