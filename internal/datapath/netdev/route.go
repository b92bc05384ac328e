// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/reconcile"
)

// Routes is the part of one of the node's routing tables that carries one of our protocol numbers, both families.
//
// IPv6 differs in two ways that a wanted row has to respect: a gateway must not be an address of the node itself, so
// the node's own pod CIDR has a device and no gateway; and routes have no scope, so List reports link for those
// without a gateway and global for the others.
type Routes struct {
	host     *Host
	protocol netlink.RouteProtocol
	table    int
	metric   int // 0: the default
}

var _ reconcile.Target[netip.Prefix, model.Route] = (*Routes)(nil)

// Routes returns the main routing table of the node as a target of a reconcile loop.
func (h *Host) Routes() *Routes { return &Routes{h, RouteProtocol, unix.RT_TABLE_MAIN, 0} }

// ServiceRoutes is the same for routes to services' addresses. There may be tens of thousands, and they have no part in
// what becomes of others' packets: they are kept apart, in the table of the node's own addresses, which every lookup asks
// first. No rule and no routing daemon's route comes before them; an address that is the node's own, metric 0, does.
func (h *Host) ServiceRoutes() *Routes {
	return &Routes{h, ServiceRouteProtocol, unix.RT_TABLE_LOCAL, 1}
}

// CompareRoutes orders puts: routes to single addresses first, since gateways are reached by them.
func CompareRoutes(a, b netip.Prefix) int {
	if a.IsSingleIP() != b.IsSingleIP() {
		if a.IsSingleIP() {
			return -1
		}
		return 1
	}
	return a.Compare(b)
}

// List returns the routes that carry our protocol number.
func (r *Routes) List(context.Context) (map[netip.Prefix]model.Route, error) {
	nl, err := r.host.open()
	if err != nil {
		return nil, fmt.Errorf("netlink: %w", err)
	}
	defer nl.Close()
	routes, err := ourRoutes(nl, r.protocol, r.table)
	if err != nil {
		return nil, err
	}
	names, err := linkNames(nl)
	if err != nil {
		return nil, err
	}
	rows := make(map[netip.Prefix]model.Route, len(routes))
	for _, route := range routes {
		rows[prefixOf(route.Dst)] = model.Route{
			Via: addrOf(route.Gw), Dev: names[route.LinkIndex], Src: addrOf(route.Src), MTU: route.MTU, Scope: scopeOf(route),
		}
	}
	return rows, nil
}

func scopeOf(route netlink.Route) string {
	v4 := route.Dst.IP.To4() != nil && len(route.Dst.IP) == 4
	if v4 && route.Scope == netlink.SCOPE_LINK || !v4 && route.Gw == nil {
		return model.ScopeLink
	}
	return model.ScopeGlobal
}

// Put creates or replaces one route. A route to the same destination that somebody else has installed stays, and is an
// error that names its owner's protocol.
func (r *Routes) Put(_ context.Context, dst netip.Prefix, row model.Route) error {
	nl, err := r.host.open()
	if err != nil {
		return fmt.Errorf("netlink: %w", err)
	}
	defer nl.Close()
	dst = dst.Masked()
	link, err := nl.LinkByName(row.Dev)
	if err != nil {
		return fmt.Errorf("route %s: device %s: %w", dst, row.Dev, err)
	}
	route := &netlink.Route{
		Dst: ipNet(dst), LinkIndex: link.Attrs().Index, Gw: row.Via.AsSlice(), Src: row.Src.AsSlice(),
		MTU: row.MTU, Protocol: r.protocol, Table: r.table, Priority: r.metric,
	}
	if row.Scope == model.ScopeLink && dst.Addr().Is4() {
		route.Scope = netlink.SCOPE_LINK
	}
	err = nl.RouteAdd(route) // fails if there is one of the same destination and metric
	if errors.Is(err, unix.EEXIST) {
		if err := r.ownedByOthers(nl, dst); err != nil {
			return err
		}
		err = nl.RouteReplace(route)
	}
	switch {
	case errors.Is(err, unix.ENETUNREACH), errors.Is(err, unix.EHOSTUNREACH):
		return fmt.Errorf("route %s via %s dev %s: %w; the gateway is not on this link: auto-direct-node-routes needs nodes that share a layer 2 network",
			dst, row.Via, row.Dev, err)
	case err != nil:
		return fmt.Errorf("route %s via %s dev %s: %w", dst, row.Via, row.Dev, err)
	}
	return nil
}

// ownedByOthers returns an error if the table has a route to dst of our metric that is not ours.
func (r *Routes) ownedByOthers(nl *netlink.Handle, dst netip.Prefix) error {
	filter := &netlink.Route{Dst: ipNet(dst), Table: r.table}
	routes, err := dump(func() ([]netlink.Route, error) {
		return nl.RouteListFiltered(familyOf(dst.Addr()), filter, netlink.RT_FILTER_DST|netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return fmt.Errorf("routes to %s: %w", dst, err)
	}
	const defaultMetric6 = 1024 // IP6_RT_PRIO_USER
	for _, route := range routes {
		sameMetric := route.Priority == r.metric || r.metric == 0 && dst.Addr().Is6() && route.Priority == defaultMetric6
		if route.Protocol != r.protocol && sameMetric {
			return fmt.Errorf("route %s: there is one of protocol %s already, which is left alone", dst, route.Protocol)
		}
	}
	return nil
}

// Delete removes our route to dst. That there is none is no error.
func (r *Routes) Delete(_ context.Context, dst netip.Prefix) error {
	nl, err := r.host.open()
	if err != nil {
		return fmt.Errorf("netlink: %w", err)
	}
	defer nl.Close()
	// The kernel compares the protocol: a route of somebody else's is never hit.
	err = nl.RouteDel(&netlink.Route{Dst: ipNet(dst.Masked()), Protocol: r.protocol, Table: r.table, Scope: netlink.SCOPE_NOWHERE})
	if err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("delete route %s: %w", dst, err)
	}
	return nil
}

// ourRoutes lists a table's routes of one protocol. The kernel chooses them: there may be many others.
func ourRoutes(nl *netlink.Handle, protocol netlink.RouteProtocol, table int) ([]netlink.Route, error) {
	if err := nl.SetStrictCheck(true); err != nil {
		return nil, fmt.Errorf("list routes: strict checks: %w", err)
	}
	defer nl.SetStrictCheck(false)
	filter := &netlink.Route{Protocol: protocol, Table: table}
	routes, err := dump(func() ([]netlink.Route, error) {
		return nl.RouteListFiltered(netlink.FAMILY_ALL, filter, netlink.RT_FILTER_PROTOCOL|netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	return routes, nil
}

func linkNames(nl *netlink.Handle) (map[int]string, error) {
	links, err := dump(nl.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	names := make(map[int]string, len(links))
	for _, link := range links {
		names[link.Attrs().Index] = link.Attrs().Name
	}
	return names, nil
}

func familyOf(a netip.Addr) int {
	if a.Is4() {
		return netlink.FAMILY_V4
	}
	return netlink.FAMILY_V6
}
