// SPDX-License-Identifier: Apache-2.0

package state

import (
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/lash-net/lash/internal/model"
)

func TestAddressesOfPodsOnOtherNodes(t *testing.T) {
	a, p := netip.MustParseAddr, netip.MustParsePrefix
	nodes := []Node{
		{Name: "n1", Local: true, Addrs: []netip.Addr{a("172.18.0.11"), a("fd00:172::11")}},
		{Name: "n2", Addrs: []netip.Addr{a("172.18.0.12"), a("fd00:172::12")}},
		{Name: "n3", Addrs: []netip.Addr{a("172.18.0.13")}},
	}
	cache := []IPCache{
		{p("0.0.0.0/0"), model.IPCacheEntry{Identity: 2}},
		{p("10.0.2.0/24"), model.IPCacheEntry{Identity: 2, Node: a("172.18.0.12")}},
		{p("172.18.0.12/32"), model.IPCacheEntry{Identity: 6, Source: "node"}},
		{p("10.0.1.5/32"), model.IPCacheEntry{Identity: 300, Source: "endpoint"}},
	}
	eps := []CiliumEndpoint{
		{Namespace: "d", Name: "a", Node: a("172.18.0.12"), IPv4: a("10.0.2.1"), IPv6: a("fd00:2::1"), Identity: 300, EndpointID: 7, Created: 10},
		{Namespace: "d", Name: "v6-by-v4", Node: a("172.18.0.13"), IPv6: a("fd00:3::1"), Identity: 301, EndpointID: 7},
		{Namespace: "d", Name: "here", Node: a("172.18.0.11"), IPv4: a("10.0.1.6"), Identity: 302},
		{Namespace: "d", Name: "unknown-node", Node: a("172.18.0.99"), IPv4: a("10.0.9.1"), Identity: 303},
		{Namespace: "d", Name: "no-identity", Node: a("172.18.0.12"), IPv4: a("10.0.2.2")},
		{Namespace: "d", Name: "claims-a-node", Node: a("172.18.0.13"), IPv4: a("172.18.0.12"), Identity: 304},
		{Namespace: "d", Name: "stale", Node: a("172.18.0.12"), IPv4: a("10.0.1.5"), Identity: 305, Created: 99},
		// 10.0.2.3 passed from x to y, 10.0.2.4 from a pod with an endpoint to one that is known by its object only.
		{Namespace: "d", Name: "x", Node: a("172.18.0.12"), IPv4: a("10.0.2.3"), Identity: 306, EndpointID: 1, Created: 10},
		{Namespace: "d", Name: "y", Node: a("172.18.0.13"), IPv4: a("10.0.2.3"), Identity: 307, EndpointID: 2, Created: 11},
		{Namespace: "d", Name: "z", Node: a("172.18.0.12"), IPv4: a("10.0.2.4"), Identity: 308, EndpointID: 3, Created: 10},
		{Namespace: "d", Name: "q", Node: a("172.18.0.12"), IPv4: a("10.0.2.4"), Identity: 309, Created: 12},
		{Namespace: "d", Name: "p", Node: a("172.18.0.12"), IPv4: a("10.0.2.4"), Identity: 310, Created: 13},
	}
	want := map[netip.Prefix]model.IPCacheEntry{
		p("0.0.0.0/0"):      {Identity: 2},
		p("10.0.2.0/24"):    {Identity: 2, Node: a("172.18.0.12")},
		p("172.18.0.12/32"): {Identity: 6, Source: "node"},
		p("10.0.1.5/32"):    {Identity: 300, Source: "endpoint"},
		p("10.0.2.1/32"):    {Identity: 300, Node: a("172.18.0.12"), Source: "custom-resource"},
		p("fd00:2::1/128"):  {Identity: 300, Node: a("fd00:172::12"), Source: "custom-resource"},
		p("fd00:3::1/128"):  {Identity: 301, Node: a("172.18.0.13"), Source: "custom-resource"},
		p("10.0.1.6/32"):    {Identity: 302, Source: "custom-resource"},
		p("10.0.9.1/32"):    {Identity: 303, Node: a("172.18.0.99"), Source: "custom-resource"},
		p("10.0.2.3/32"):    {Identity: 307, Node: a("172.18.0.13"), Source: "custom-resource"},
		p("10.0.2.4/32"):    {Identity: 308, Node: a("172.18.0.12"), Source: "custom-resource"},
	}
	for range 20 {
		rand.Shuffle(len(eps), func(i, j int) { eps[i], eps[j] = eps[j], eps[i] })
		tables := newTables(t)
		Insert(tables.DB, tables.Nodes, nodes...)
		Insert(tables.DB, tables.IPCache, cache...)
		Insert(tables.DB, tables.CiliumEndpoints, eps...)
		if d := cmp.Diff(want, tables.Addresses(tables.DB.ReadTxn()), cmp.Comparer(func(a, b netip.Addr) bool { return a == b }), cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); d != "" {
			t.Fatal(d)
		}
	}
}

func TestOfSeveralNumbersForTheSameLabelsAllNodesTakeTheFirst(t *testing.T) {
	ids := []Identity{{ID: 700, Labels: "k8s:a=1", Created: 6}, {ID: 500, Labels: "k8s:a=1", Created: 6}, {ID: 300, Labels: "k8s:a=1", Created: 7}, {ID: 256, Labels: "k8s:a=12", Created: 1}}
	for range 10 {
		rand.Shuffle(len(ids), func(i, j int) { ids[i], ids[j] = ids[j], ids[i] })
		tables := newTables(t)
		Insert(tables.DB, tables.Identities, ids...)
		if got, ok := tables.IdentityOf(tables.DB.ReadTxn(), "k8s:a=1"); !ok || got.ID != 500 {
			t.Errorf("got %+v", got)
		}
		if _, ok := tables.IdentityOf(tables.DB.ReadTxn(), "k8s:a="); ok {
			t.Error("the beginning of labels is enough")
		}
	}
}
