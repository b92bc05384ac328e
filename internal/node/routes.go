// SPDX-License-Identifier: Apache-2.0

package node

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/state"
)

// Routes returns the wanted routes, sorted, and what a person should know about them: to this node's pods by the host
// device; to each other node's pods by the host device too, if packets to them are encapsulated, for what the node
// itself sends; else, with automatic direct routes, by that node's address, if it is on a subnet that a device of this
// node is connected to. Only pod CIDRs that are marked are routed to the host device: the programs encapsulate first.
func Routes(cfg Config, nodes []model.Node, devices []model.Device, marked func(netip.Prefix) bool) ([]state.Route, []state.Warning) {
	rows := map[netip.Prefix]model.Route{}
	var warnings []state.Warning
	warn := func(key, format string, args ...any) {
		warnings = append(warnings, state.Warning{Key: "route/" + key, Text: fmt.Sprintf(format, args...)})
	}
	var local model.Node
	for _, n := range nodes {
		if !n.Local {
			continue
		}
		local = n
		for _, r := range n.Routers {
			rows[single(r)] = model.Route{Dev: cfg.HostDevice, Scope: model.ScopeLink}
			for _, c := range n.PodCIDRs {
				if c.Addr().Is4() == r.Is4() {
					rows[c.Masked()] = byHost(cfg, r, 0)
				}
			}
		}
	}
	for _, n := range nodes {
		for _, c := range n.PodCIDRs {
			native := cfg.NativeCIDR4
			key, masquerade := "ipv4-native-routing-cidr", cfg.MasqueradeIP4
			if c.Addr().Is6() {
				native, key, masquerade = cfg.NativeCIDR6, "ipv6-native-routing-cidr", cfg.MasqueradeIP6
			}
			_, tunnel := tunnelTo(cfg, n, devices, c.Addr())
			if masquerade && native.IsValid() && !tunnel && !(native.Contains(c.Addr()) && native.Bits() <= c.Bits()) {
				warn("native/"+c.String(), "pod CIDR %s of node %s lies outside %s %s: packets to its pods lose their source address; widen %s", c, n.Name, key, native, key)
			}
			if n.Local {
				continue
			}
			if _, taken := rows[c.Masked()]; taken {
				continue // overlaps says so
			}
			if tunnel && marked(c.Masked()) {
				if i := slices.IndexFunc(local.Routers, func(r netip.Addr) bool { return r.Is4() == c.Addr().Is4() }); i >= 0 {
					rows[c.Masked()] = byHost(cfg, local.Routers[i], local.RouteMTU)
				}
				continue
			}
			if why := mismatch(cfg, n); why != "" {
				warn(c.String()+"/tunnel", "packets to pod CIDR %s of node %s are not encapsulated: %s", c, n.Name, why)
			}
			if !cfg.AutoDirectRoutes {
				continue
			}
			via := n.AddrFor(c.Addr())
			if !via.IsValid() {
				if !cfg.SkipUnreachable {
					warn(c.String(), "no route to pod CIDR %s: node %s has no InternalIP of its family", c, n.Name)
				}
				continue
			}
			dev, ok := connected(devices, via)
			if !ok {
				switch {
				case cfg.SkipUnreachable || len(devices) == 0:
				case cfg.Tunnel != "":
					warn(c.String(), "no way to pod CIDR %s: node %s (%s) does not take %s, and is not on a subnet of node %s (%s); its agent is not ready, or routes natively",
						c, n.Name, via, cfg.Tunnel, cfg.Name, subnets(devices, via.Is4()))
				default:
					warn(c.String(), "no direct route to pod CIDR %s: node %s (%s) is not on a subnet of node %s (%s); let the network route it and set auto-direct-node-routes=false, or set direct-routing-skip-unreachable=true",
						c, n.Name, via, cfg.Name, subnets(devices, via.Is4()))
				}
				continue
			}
			rows[c.Masked()] = model.Route{Via: via, Dev: dev, Scope: model.ScopeGlobal}
		}
	}
	warnings = append(warnings, overlaps(nodes)...)

	out := make([]state.Route, 0, len(rows))
	for dst, r := range rows {
		out = append(out, state.Route{Dst: dst, Route: r})
	}
	slices.SortFunc(out, func(a, b state.Route) int { return a.Dst.Compare(b.Dst) })
	return out, warnings
}

// byHost is a route through the host device from the router's address.
func byHost(cfg Config, router netip.Addr, mtu int) model.Route {
	if router.Is4() {
		return model.Route{Via: router, Dev: cfg.HostDevice, Src: router, MTU: mtu, Scope: model.ScopeGlobal}
	}
	// IPv6 refuses a gateway that is an address of the node itself.
	return model.Route{Dev: cfg.HostDevice, Src: router, MTU: mtu, Scope: model.ScopeLink}
}

// connected is the device that has a subnet with a, the direct routing device first.
func connected(devices []model.Device, a netip.Addr) (string, bool) {
	for _, direct := range []bool{true, false} {
		for _, d := range devices {
			if d.DirectRouting != direct {
				continue
			}
			for _, p := range d.Addrs {
				if p.Contains(a) && !p.IsSingleIP() {
					return d.Name, true
				}
			}
		}
	}
	return "", false
}

func subnets(devices []model.Device, v4 bool) string {
	s := ""
	for _, d := range devices {
		for _, p := range d.Addrs {
			if p.Addr().Is4() == v4 && !p.Addr().IsLinkLocalUnicast() {
				if s != "" {
					s += ", "
				}
				s += d.Name + " " + p.String()
			}
		}
	}
	if s == "" {
		return "no address"
	}
	return s
}
