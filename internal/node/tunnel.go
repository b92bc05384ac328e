// SPDX-License-Identifier: Apache-2.0

package node

import (
	"fmt"
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

// overlay says of a row whose prefix another node has whether packets to it are encapsulated, and to which of the node's
// addresses, and, where there is a tunnel, marks the addresses of other nodes themselves: these may encapsulate. A pod
// CIDR that is still routed to the host device stays marked: the way around the tunnel comes first.
type overlay struct {
	cfg     Config
	devices []model.Device
	routed  func(netip.Prefix) bool
	device  bool
	owner   map[netip.Addr]model.Node // other nodes, by their addresses
}

func newOverlay(cfg Config, nodes []model.Node, devices []model.Device, routed func(netip.Prefix) bool) *overlay {
	o := &overlay{cfg: cfg, devices: devices, routed: routed, device: WantsTunnel(cfg, nodes), owner: map[netip.Addr]model.Node{}}
	for _, n := range nodes {
		if n.Local {
			continue
		}
		for _, a := range n.Addrs {
			o.owner[a] = n
		}
	}
	return o
}

func (o *overlay) row(p netip.Prefix, row model.IPCacheEntry) model.IPCacheEntry {
	if _, node := o.owner[p.Addr()]; node && p.IsSingleIP() && o.device && row.Identity != model.IdentityHost {
		row.Peer = true
	}
	peer, ok := o.owner[row.Node]
	if !ok {
		return row
	}
	to, ok := tunnelTo(o.cfg, peer, o.devices, p.Addr())
	if i := slices.IndexFunc(peer.PodCIDRs, func(c netip.Prefix) bool { return c.Contains(p.Addr()) }); !ok && i >= 0 {
		to = underlay(o.cfg, peer)
		ok = to.IsValid() && o.routed(peer.PodCIDRs[i].Masked())
	}
	if ok {
		row.Node, row.Tunnel = to, true
	}
	return row
}

// othersKnown reports whether all is known that the way to other nodes depends on: how packets go there now, and of each
// node both of its objects. Before that nothing about other nodes is written: what an earlier agent has left is better than a
// guess, and a loop deletes nothing while a table is incomplete.
func othersKnown(t *state.Tables, txn statedb.ReadTxn) bool {
	paths, _ := t.TunnelPaths.Initialized(txn)
	nodes, _ := t.Nodes.Initialized(txn)
	return paths && nodes
}

// DesiredIPCache is the Desired function of the loop over the ipcache: who is behind a prefix (state.Tables.Addresses), and
// what overlay says of it.
func DesiredIPCache(t *state.Tables, cfg Config) func() reconcile.Snapshot[netip.Prefix, model.IPCacheEntry] {
	type key = netip.Prefix
	rows := &state.Keyed[key, model.IPCacheEntry]{
		Sources: []state.Source[key]{
			state.Touches(t.DB, t.IPCache, func(r state.IPCache) []key { return []key{r.Prefix} }),
			state.Touches(t.DB, t.CiliumEndpoints, state.CiliumEndpoint.Prefixes),
			state.Resets[key](t.Nodes), state.Resets[key](t.Devices), state.Resets[key](t.TunnelPaths),
		},
		Prepare: func(now statedb.ReadTxn) func(statedb.ReadTxn, key) (model.IPCacheEntry, bool) {
			rowsComplete, _ := t.IPCache.Initialized(now)
			known := rowsComplete && othersKnown(t, now)
			of := t.AddressOf(now)
			o := newOverlay(cfg, state.Rows(now, t.Nodes), state.Rows(now, t.Devices), func(p netip.Prefix) bool {
				path, _, _ := t.TunnelPaths.Get(now, state.TunnelPathByPrefix(p))
				return path.Routed
			})
			return func(txn statedb.ReadTxn, p key) (model.IPCacheEntry, bool) {
				row, ok := of(txn, p)
				if !ok || !known && (row.Node.IsValid() || row.Identity == model.IdentityRemoteNode || row.Identity == model.IdentityKubeAPIServer) {
					return row, false
				}
				return o.row(p, row), true
			}
		},
	}
	return rows.Desired(t.DB)
}
