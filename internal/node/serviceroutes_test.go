// SPDX-License-Identifier: Apache-2.0

package node

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/state"
)

// frontend is a frontend of the tests; node: its address is a node's.
func frontend(address string, port uint16, node bool) model.Frontend {
	return model.Frontend{FrontendKey: model.FrontendKey{Addr: netip.MustParseAddr(address), L4: model.L4{Proto: model.ProtoTCP, Port: port}}, Node: node}
}

// A service's address has a route while any service port has a frontend of it, with the source and MTU of now.
func TestServiceRoutesFollowServicesAndTheNode(t *testing.T) {
	tables, err := state.New()
	if err != nil {
		t.Fatal(err)
	}
	defer tables.Stop()
	cfg := config()
	desired := DesiredServiceRoutes(tables, cfg)
	check := func(what string, want ...string) {
		t.Helper()
		snap := desired()
		var got []string
		for dst, r := range snap.Rows {
			got = append(got, fmt.Sprintf("%s via %v dev %s src %v mtu %d %s", dst, r.Via, r.Dev, r.Src, r.MTU, r.Scope))
		}
		slices.Sort(got)
		if !slices.Equal(got, want) || !snap.Complete {
			t.Errorf("%s: complete %v, got\n%s\nwant\n%s", what, snap.Complete, strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	}
	check("nothing is known")
	web := model.ServicePort{ID: 1, Frontends: []model.Frontend{
		frontend("10.96.0.10", 80, false), frontend("0.0.0.0", 30080, true), frontend("172.18.0.2", 80, true), frontend("198.18.0.1", 80, false),
	}}
	external := frontend("203.0.113.1", 80, false) // perhaps a gateway's
	external.Type = model.TypeExternalIPs
	web.Frontends = append([]model.Frontend{external}, web.Frontends...)
	https := model.ServicePort{ID: 2, Frontends: []model.Frontend{frontend("10.96.0.10", 443, false)}}
	six := model.ServicePort{ID: 3, IPv6: true, Frontends: []model.Frontend{frontend("fd00:96::10", 80, false)}}
	state.Insert(tables.DB, tables.ServicePorts, web, https, six)
	check("the node has no router yet")

	nodes, devices := cluster()
	state.Insert(tables.DB, tables.Local, nodes[0])
	check("the node's address is on none of its devices",
		"10.96.0.10/32 via 10.0.1.1 dev lash_host src 10.0.1.1 mtu 0 global",
		"198.18.0.1/32 via 10.0.1.1 dev lash_host src 10.0.1.1 mtu 0 global",
		"fd00:96::10/128 via invalid IP dev lash_host src fd00::101 mtu 0 link")
	state.Insert(tables.DB, tables.Devices, devices...)
	all := []string{
		"10.96.0.10/32 via 10.0.1.1 dev lash_host src 172.18.0.1 mtu 0 global",
		"198.18.0.1/32 via 10.0.1.1 dev lash_host src 172.18.0.1 mtu 0 global",
		"fd00:96::10/128 via invalid IP dev lash_host src fd18::1 mtu 0 link",
	}
	check("all is known", all...)
	state.Delete(tables.DB, tables.ServicePorts, https)
	check("another port of the address is served still", all...)
	web.Frontends = web.Frontends[:4]
	state.Insert(tables.DB, tables.ServicePorts, web)
	check("an address is taken away", all[0], all[2])
	state.Delete(tables.DB, tables.ServicePorts, web)
	check("a service is gone", all[2])

	cfg.Tunnel = "vxlan:8472"
	local := nodes[0]
	local.RouteMTU = 1450
	state.Insert(tables.DB, tables.Local, local)
	desired = DesiredServiceRoutes(tables, cfg)
	check("by the tunnel", "fd00:96::10/128 via invalid IP dev lash_host src fd18::1 mtu 1450 link")
}
