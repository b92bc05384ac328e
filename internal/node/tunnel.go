// SPDX-License-Identifier: Apache-2.0

package node

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/cilium/statedb"

	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/reconcile"
	"github.com/lash-net/lash/internal/state"
)

// tunnelTo is the address of the peer to which packets for a, one of its pods, are encapsulated; false if they are
// routed. Each node says what it takes, and none is sent what it does not take: while the nodes of a cluster differ, or
// pass from one mode to the other, any two of them have a way in each direction.
func tunnelTo(cfg Config, peer model.Node, devices []model.Device, a netip.Addr) (netip.Addr, bool) {
	if cfg.Tunnel == "" || peer.Local || peer.Tunnel != cfg.Tunnel {
		return netip.Addr{}, false
	}
	if via := peer.AddrFor(a); cfg.Hybrid && via.IsValid() {
		if _, direct := connected(devices, via); direct {
			return netip.Addr{}, false
		}
	}
	to := underlay(cfg, peer)
	return to, to.IsValid()
}

// mismatch is why nothing is encapsulated to a peer that takes encapsulated packets and would get them, "" if nothing
// is wrong.
func mismatch(cfg Config, peer model.Node) string {
	switch {
	case cfg.Tunnel == "" || peer.Tunnel == "":
		return ""
	case peer.Tunnel != cfg.Tunnel:
		return fmt.Sprintf("it takes %s, this node uses %s; set tunnel-protocol and tunnel-port to the same on all nodes", peer.Tunnel, cfg.Tunnel)
	case !underlay(cfg, peer).IsValid():
		return "it has no InternalIP of the family of underlay-protocol"
	}
	return ""
}

// underlay is the address to which packets to the peer are encapsulated, invalid if it has none of the family.
func underlay(cfg Config, peer model.Node) netip.Addr {
	if cfg.UnderlayIPv6 {
		return peer.IPv6()
	}
	return peer.IPv4()
}

// WantsTunnel reports whether this node is to have the tunnel device: it encapsulates, or another does, which may have
// sent a packet here before it learns that this node takes none any more. So the last one to give the tunnel up takes
// nothing from anybody.
func WantsTunnel(cfg Config, nodes []model.Node) bool {
	for _, n := range nodes {
		if !n.Local && n.Tunnel != "" {
			return true
		}
	}
	return cfg.Tunnel != ""
}

// Overlay says of each row whose prefix another node has whether packets to it are encapsulated, and to which of the
// node's addresses, and, where there is a tunnel, marks the addresses of other nodes themselves: these may encapsulate.
// A pod CIDR that is still routed to the host device stays marked: the way around the tunnel comes first.
func Overlay(cfg Config, nodes []model.Node, devices []model.Device, routed func(netip.Prefix) bool, rows map[netip.Prefix]model.IPCacheEntry) {
	device := WantsTunnel(cfg, nodes)
	owner := map[netip.Addr]model.Node{}
	for _, n := range nodes {
		if n.Local {
			continue
		}
		for _, a := range n.Addrs {
			owner[a] = n
			if row, ok := rows[single(a)]; ok && device && row.Identity != model.IdentityHost {
				row.Peer = true
				rows[single(a)] = row
			}
		}
	}
	for p, row := range rows {
		peer, ok := owner[row.Node]
		if !ok {
			continue
		}
		to, ok := tunnelTo(cfg, peer, devices, p.Addr())
		if i := slices.IndexFunc(peer.PodCIDRs, func(c netip.Prefix) bool { return c.Contains(p.Addr()) }); !ok && i >= 0 {
			to = underlay(cfg, peer)
			ok = to.IsValid() && routed(peer.PodCIDRs[i].Masked())
		}
		if ok {
			row.Node, row.Tunnel = to, true
			rows[p] = row
		}
	}
}

// othersKnown reports whether all is known that the way to other nodes depends on: how packets go there now, and of each
// node both of its objects. Before that nothing about other nodes is written: what an earlier agent has left is better than a
// guess, and a loop deletes nothing while a table is incomplete.
func othersKnown(t *state.Tables, txn statedb.ReadTxn) bool {
	paths, _ := t.TunnelPaths.Initialized(txn)
	nodes, _ := t.Nodes.Initialized(txn)
	return paths && nodes
}

// DesiredIPCache is the Desired function of the loop over the ipcache: rows, which reads the inputs, and what Overlay
// says of them.
func DesiredIPCache(t *state.Tables, cfg Config, rows func(statedb.ReadTxn) map[netip.Prefix]model.IPCacheEntry, inputs ...state.Input) func() reconcile.Snapshot[netip.Prefix, model.IPCacheEntry] {
	inputs = append(inputs, state.From(t.Nodes), state.From(t.Devices), state.From(t.TunnelPaths))
	return state.DesiredOf(t.DB, inputs, func(txn statedb.ReadTxn) map[netip.Prefix]model.IPCacheEntry {
		r := rows(txn)
		rowsComplete, _ := t.IPCache.Initialized(txn)
		if !rowsComplete || !othersKnown(t, txn) {
			maps.DeleteFunc(r, func(_ netip.Prefix, row model.IPCacheEntry) bool {
				return row.Node.IsValid() || row.Identity == model.IdentityRemoteNode || row.Identity == model.IdentityKubeAPIServer
			})
		}
		Overlay(cfg, state.Rows(txn, t.Nodes), state.Rows(txn, t.Devices), func(p netip.Prefix) bool {
			path, _, _ := t.TunnelPaths.Get(txn, state.TunnelPathByPrefix(p))
			return path.Routed
		}, r)
		return r
	})
}
