// SPDX-License-Identifier: Apache-2.0

package node

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/state"
)

// Sources of ipcache rows.
const (
	sourceReserved  = "reserved"
	sourceNode      = "node"
	sourceEndpoint  = "endpoint"
	sourceAPIServer = "kube-apiserver"
)

// IPCache returns who is behind which prefix, sorted: this node's addresses are the host, other nodes' addresses
// remote nodes, health endpoints and this node's pods their identities; the API server's addresses are it wherever they are, but on this
// node; other nodes' pod CIDRs are the world behind that node until a pod is known better (state.Tables.Addresses), and
// everything else is the world. Of two claims to one prefix this node's wins, then the first by name.
func IPCache(cfg Config, nodes []model.Node, devices []model.Device, endpoints []model.Endpoint, apiServers []netip.Addr) []state.IPCache {
	rows := map[netip.Prefix]state.IPCache{}
	add := func(p netip.Prefix, id model.Identity, node netip.Addr, source string) {
		if !p.IsValid() || !cfg.Enabled(p.Addr()) {
			return
		}
		if _, ok := rows[p]; !ok {
			rows[p] = state.IPCache{Prefix: p, IPCacheEntry: model.IPCacheEntry{Identity: id, Node: node, Source: source}}
		}
	}
	for _, n := range nodes {
		if !n.Local {
			continue
		}
		for _, a := range append(slices.Clone(n.Addrs), n.Routers...) {
			add(single(a), model.IdentityHost, netip.Addr{}, sourceNode)
		}
	}
	for _, d := range devices {
		for _, p := range d.Addrs {
			add(single(p.Addr()), model.IdentityHost, netip.Addr{}, sourceNode)
		}
	}
	for _, ep := range endpoints {
		if ep.State == model.EndpointDeleting {
			continue
		}
		for _, a := range ep.Addrs() {
			add(single(a), ep.Identity, netip.Addr{}, sourceEndpoint)
		}
	}
	for _, n := range nodes {
		if n.Local {
			continue
		}
		for _, a := range n.Addrs {
			id := model.IdentityRemoteNode
			if slices.Contains(apiServers, a) {
				id = model.IdentityKubeAPIServer
			}
			add(single(a), id, netip.Addr{}, sourceNode)
		}
		for _, a := range n.Routers {
			add(single(a), model.IdentityRemoteNode, nodeAddr(n, a), sourceNode)
		}
		for _, a := range n.Health {
			add(single(a), model.IdentityHealth, nodeAddr(n, a), sourceNode)
		}
		for _, c := range n.PodCIDRs {
			add(c.Masked(), cfg.world(c.Addr()), nodeAddr(n, c.Addr()), sourceNode)
		}
	}
	for _, a := range apiServers {
		add(single(a), model.IdentityOutsideKubeAPIServer, netip.Addr{}, sourceAPIServer)
	}
	for _, a := range []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()} {
		add(netip.PrefixFrom(a, 0), cfg.world(a), netip.Addr{}, sourceReserved)
	}

	out := make([]state.IPCache, 0, len(rows))
	for _, r := range rows {
		out = append(out, r)
	}
	slices.SortFunc(out, func(a, b state.IPCache) int { return a.Prefix.Compare(b.Prefix) })
	return out
}

// world is who is behind addresses of which nothing else is known.
func (cfg Config) world(a netip.Addr) model.Identity { return model.World(a, cfg.IPv4 && cfg.IPv6) }

// behindAPIServer are the slices of the service default/kubernetes: of a large cluster's slices the only ones that matter here.
var behindAPIServer = state.SlicesByService("default/kubernetes")

// apiServers are the addresses in its slices.
func apiServers(slices []state.EndpointSlice) []netip.Addr {
	var out []netip.Addr
	for _, s := range slices {
		for _, e := range s.Endpoints {
			out = append(out, e.Addr)
		}
	}
	return out
}

// nodeAddr is the node's address of the family of a, else any.
func nodeAddr(n model.Node, a netip.Addr) netip.Addr {
	if x := n.AddrFor(a); x.IsValid() || len(n.Addrs) == 0 {
		return x
	}
	return n.Addrs[0]
}

// LocalAddrs returns this node's addresses as the datapath's endpoints map has them: its pods' and, marked Host, its own.
func LocalAddrs(cfg Config, local []model.Node, devices []model.Device, endpoints []model.Endpoint) map[netip.Addr]model.LocalAddr {
	rows := map[netip.Addr]model.LocalAddr{}
	host := func(a netip.Addr) {
		if a.IsValid() && cfg.Enabled(a) {
			rows[a] = model.LocalAddr{Identity: model.IdentityHost, Host: true}
		}
	}
	for _, ep := range endpoints {
		if ep.State == model.EndpointDeleting || ep.Ifindex == 0 {
			continue
		}
		for _, a := range ep.Addrs() {
			rows[a] = model.LocalAddr{EndpointID: ep.ID, Ifindex: ep.Ifindex, Identity: ep.Identity, MAC: ep.MAC, NodeMAC: ep.NodeMAC}
		}
	}
	for _, n := range local {
		for _, a := range append(slices.Clone(n.Addrs), n.Routers...) {
			host(a)
		}
	}
	for _, d := range devices {
		for _, p := range d.Addrs {
			host(p.Addr())
			if row, ok := rows[p.Addr()]; ok && row.Host && cfg.servesNodePorts(p.Addr()) {
				row.NodePort = true
				rows[p.Addr()] = row
			}
		}
	}
	return rows
}

// servesNodePorts reports whether NodePorts and HostPorts are served on an address of a device.
func (c Config) servesNodePorts(a netip.Addr) bool {
	if !c.NodePorts || a.IsLoopback() {
		return false
	}
	return len(c.NodePortCIDRs) == 0 || slices.ContainsFunc(c.NodePortCIDRs, func(p netip.Prefix) bool { return p.Contains(a) })
}

func single(a netip.Addr) netip.Prefix {
	if !a.IsValid() {
		return netip.Prefix{}
	}
	return netip.PrefixFrom(a, a.BitLen())
}

// overlaps returns a warning for each pair of nodes whose pod CIDRs overlap: one of them loses packets.
func overlaps(nodes []model.Node) []state.Warning {
	var out []state.Warning
	for i, a := range nodes {
		for _, b := range nodes[i+1:] {
			for _, p := range a.PodCIDRs {
				for _, q := range b.PodCIDRs {
					if p.Overlaps(q) {
						out = append(out, state.Warning{
							Key:  fmt.Sprintf("route/%s/%s", p, b.Name),
							Text: fmt.Sprintf("pod CIDR %s of node %s overlaps %s of node %s: give one of them another (delete its CiliumNode, or change Node.spec.podCIDRs)", p, a.Name, q, b.Name),
						})
					}
				}
			}
		}
	}
	return out
}
