// SPDX-License-Identifier: Apache-2.0

package node

import (
	"net/netip"
	"slices"

	"github.com/cilium/statedb"

	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/reconcile"
	"github.com/lash-net/lash/internal/state"
)

// DesiredServiceRoutes is the Desired function of the loop over routes to services' addresses. They lead to the host
// device, whose program serves what the node itself asks of them and no program has translated at the socket. An address
// of a node has none, nor has an external one.
func DesiredServiceRoutes(t *state.Tables, cfg Config) func() reconcile.Snapshot[netip.Prefix, model.Route] {
	type key = netip.Prefix
	rows := &state.Keyed[key, model.Route]{
		Sources: []state.Source[key]{
			state.Touches(t.DB, t.ServicePorts, state.ServiceAddresses), state.Resets[key](t.Local), state.Resets[key](t.Devices),
		},
		Prepare: func(now statedb.ReadTxn) func(statedb.ReadTxn, key) (model.Route, bool) {
			to := map[bool]model.Route{} // by whether it is IPv6
			for n := range t.Local.All(now) {
				for _, r := range n.Routers {
					to[r.Is6()] = serviceRoute(cfg, n, r, state.Rows(now, t.Devices))
				}
			}
			return func(txn statedb.ReadTxn, p key) (model.Route, bool) {
				_, _, served := t.ServicePorts.Get(txn, state.ServicePortsByAddress(p))
				route, ok := to[p.Addr().Is6()]
				return route, served && ok
			}
		},
	}
	return rows.Desired(t.DB)
}

// serviceRoute is the route to any service's address of the router's family. Its source is the address by which others
// know the node, so that a process that asks for its own address towards a service learns that one.
func serviceRoute(cfg Config, local model.Node, router netip.Addr, devices []model.Device) model.Route {
	mtu := 0
	if cfg.Tunnel != "" {
		mtu = local.RouteMTU
	}
	route := byHost(cfg, router, mtu)
	own := local.AddrFor(router)
	if slices.ContainsFunc(devices, func(d model.Device) bool {
		return slices.ContainsFunc(d.Addrs, func(p netip.Prefix) bool { return p.Addr() == own })
	}) {
		route.Src = own
	}
	return route
}
