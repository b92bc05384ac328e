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
// are not copied there because there may be ten thousands.
func (t *Tables) Addresses(txn statedb.ReadTxn) map[netip.Prefix]model.IPCacheEntry {
	rows := make(map[netip.Prefix]model.IPCacheEntry, t.IPCache.NumObjects(txn)+2*t.CiliumEndpoints.NumObjects(txn))
	of := t.AddressOf(txn)
	put := func(p netip.Prefix) {
		if e, ok := of(txn, p); ok {
			rows[p] = e
		}
	}
	for r := range t.IPCache.All(txn) {
		put(r.Prefix)
	}
	for r := range t.CiliumEndpoints.All(txn) {
		for _, p := range r.Prefixes() {
			put(p)
		}
	}
	return rows
}

// AddressOf returns the function that says who is behind one prefix, by the nodes of now. While an address passes from
// one pod to another, two claim it: the new one's counts.
func (t *Tables) AddressOf(now statedb.ReadTxn) func(statedb.ReadTxn, netip.Prefix) (model.IPCacheEntry, bool) {
	nodes := map[netip.Addr]Node{}
	for n := range t.Nodes.All(now) {
		for _, a := range n.Addrs {
			nodes[a] = n
		}
	}
	return func(txn statedb.ReadTxn, p netip.Prefix) (e model.IPCacheEntry, ok bool) {
		if r, _, ok := t.IPCache.Get(txn, ipcacheByPrefix.Query(p)); ok {
			return r.IPCacheEntry, true
		}
		if !p.IsSingleIP() {
			return e, false
		}
		var best CiliumEndpoint
		for r := range t.CiliumEndpoints.List(txn, ciliumEndpointByPrefix.Query(p)) {
			if !ok || best.before(r) {
				best, ok = r, true
			}
		}
		if ok {
			e = model.IPCacheEntry{Identity: best.Identity, Node: nodeFor(nodes, best.Node, p.Addr()), Source: SourceCiliumEndpoint}
		}
		return e, ok
	}
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

var ipcacheByPrefix = byPrefix(func(r IPCache) netip.Prefix { return r.Prefix })

func newIPCache(db *statedb.DB) (statedb.RWTable[IPCache], error) {
	return statedb.NewTableAny(db, "ipcache",
		func() []string { return []string{"Prefix", "Identity", "Node", "Source"} },
		func(r IPCache) []string {
			return []string{r.Prefix.String(), r.Identity.String(), addr(r.Node), r.Source}
		}, ipcacheByPrefix)
}
