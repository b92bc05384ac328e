// SPDX-License-Identifier: Apache-2.0

package node

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/statedb"

	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/state"
)

func addrs(s ...string) (out []netip.Addr) {
	for _, a := range s {
		out = append(out, netip.MustParseAddr(a))
	}
	return out
}

func prefixes(s ...string) (out []netip.Prefix) {
	for _, p := range s {
		out = append(out, netip.MustParsePrefix(p))
	}
	return out
}

func always(netip.Prefix) bool { return true }
func never(netip.Prefix) bool  { return false }

func config() Config {
	return Config{Name: "n1", IPAM: IPAMClusterPool, IPv4: true, IPv6: true, AutoDirectRoutes: true, HostDevice: "lash_host", MasqueradeIP4: true, MasqueradeIP6: true}
}

func cluster() ([]model.Node, []model.Device) {
	return []model.Node{
			{Name: "n1", Addrs: addrs("172.18.0.1", "fd18::1"), PodCIDRs: prefixes("10.0.1.0/24", "fd00::100/120"), Routers: addrs("10.0.1.1", "fd00::101"), Local: true},
			{Name: "n2", Addrs: addrs("172.18.0.2", "fd18::2"), PodCIDRs: prefixes("10.0.2.0/24", "fd00::200/120"), Routers: addrs("10.0.2.1", "fd00::201"), Health: addrs("10.0.2.9", "fd00::209")},
			{Name: "n3", Addrs: addrs("192.168.7.3"), PodCIDRs: prefixes("10.0.3.0/24", "fd00::300/120")},
		}, []model.Device{
			{Ifindex: 2, Name: "eth0", Addrs: prefixes("172.18.0.1/16", "fd18::1/64"), DirectRouting: true},
		}
}

func TestRoutes(t *testing.T) {
	nodes, devices := cluster()
	rows, warnings := Routes(config(), nodes, devices, always)
	var got []string
	for _, r := range rows {
		got = append(got, fmt.Sprintf("%s via %v dev %s src %v %s", r.Dst, r.Via, r.Dev, r.Src, r.Scope))
	}
	want := []string{
		"10.0.1.0/24 via 10.0.1.1 dev lash_host src 10.0.1.1 global",
		"10.0.1.1/32 via invalid IP dev lash_host src invalid IP link",
		"10.0.2.0/24 via 172.18.0.2 dev eth0 src invalid IP global",
		"fd00::100/120 via invalid IP dev lash_host src fd00::101 link",
		"fd00::101/128 via invalid IP dev lash_host src invalid IP link",
		"fd00::200/120 via fd18::2 dev eth0 src invalid IP global",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got  %s\nwant %s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if len(warnings) != 2 || !strings.Contains(warnings[0].Text, "n3 (192.168.7.3)") || !strings.Contains(warnings[0].Text, "n1 (eth0 172.18.0.1/16)") || !strings.Contains(warnings[1].Text, "no InternalIP") {
		t.Errorf("warnings are %q", warnings)
	}
}

func TestRoutesWithoutAutoDirectAreOurOwnOnly(t *testing.T) {
	nodes, devices := cluster()
	cfg := config()
	cfg.AutoDirectRoutes = false
	rows, warnings := Routes(cfg, nodes, devices, always)
	if len(rows) != 4 || len(warnings) != 0 {
		t.Errorf("got %v, %v", rows, warnings)
	}
}

func TestSkipUnreachableSaysNothing(t *testing.T) {
	nodes, devices := cluster()
	cfg := config()
	cfg.SkipUnreachable = true
	if _, warnings := Routes(cfg, nodes, devices, always); len(warnings) != 0 {
		t.Errorf("got %v", warnings)
	}
}

func TestNativeCIDRThatMissesANodeIsNamed(t *testing.T) {
	nodes, devices := cluster()
	cfg := config()
	cfg.SkipUnreachable = true
	cfg.NativeCIDR4 = netip.MustParsePrefix("10.0.0.0/23") // covers 10.0.0 and 10.0.1 only
	_, warnings := Routes(cfg, nodes, devices, always)
	if len(warnings) != 2 || !strings.Contains(warnings[0].Text, "10.0.2.0/24 of node n2") || !strings.Contains(warnings[1].Text, "10.0.3.0/24 of node n3") {
		t.Errorf("got %q", warnings)
	}
	cfg.MasqueradeIP4 = false
	if _, warnings := Routes(cfg, nodes, devices, always); len(warnings) != 0 {
		t.Errorf("without masquerading got %q", warnings)
	}
}

func TestOverlappingPodCIDRsAreNamedAndTheLocalNodeWins(t *testing.T) {
	nodes, devices := cluster()
	nodes[1].PodCIDRs = prefixes("10.0.1.0/24")
	rows, warnings := Routes(config(), nodes[:2], devices, always)
	if len(warnings) != 1 || !strings.Contains(warnings[0].Text, "n1") || !strings.Contains(warnings[0].Text, "n2") {
		t.Errorf("got %q", warnings)
	}
	if rows[0].Dev != "lash_host" {
		t.Errorf("got %v", rows[0])
	}
}

func TestIPCache(t *testing.T) {
	nodes, devices := cluster()
	eps := []model.Endpoint{
		{ID: 7, IPv4: netip.MustParseAddr("10.0.1.9"), IPv6: netip.MustParseAddr("fd00::109"), Identity: 4711, State: model.EndpointReady, Ifindex: 9},
		{ID: 8, IPv4: netip.MustParseAddr("10.0.1.8"), Identity: 5, State: model.EndpointDeleting, Ifindex: 10},
	}
	var got []string
	// The API server's own node, another node, and a machine outside.
	servers := []netip.Addr{netip.MustParseAddr("172.18.0.1"), netip.MustParseAddr("172.18.0.2"), netip.MustParseAddr("fd18::99")}
	for _, r := range IPCache(config(), nodes, devices, eps, servers) {
		got = append(got, fmt.Sprintf("%s %d %v", r.Prefix, r.Identity, r.Node))
	}
	want := []string{
		"0.0.0.0/0 9 invalid IP",
		"10.0.1.1/32 1 invalid IP",
		"10.0.1.9/32 4711 invalid IP",
		"10.0.2.0/24 9 172.18.0.2",
		"10.0.2.1/32 6 172.18.0.2",
		"10.0.2.9/32 4 172.18.0.2",
		"10.0.3.0/24 9 192.168.7.3",
		"172.18.0.1/32 1 invalid IP",
		"172.18.0.2/32 7 invalid IP",
		"192.168.7.3/32 6 invalid IP",
		"::/0 10 invalid IP",
		"fd00::101/128 1 invalid IP",
		"fd00::109/128 4711 invalid IP",
		"fd00::200/120 10 fd18::2",
		"fd00::201/128 6 fd18::2",
		"fd00::209/128 4 fd18::2",
		"fd00::300/120 10 192.168.7.3",
		"fd18::1/128 1 invalid IP",
		"fd18::2/128 6 invalid IP",
		"fd18::99/128 16777217 invalid IP",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got  %s\nwant %s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	local := LocalAddrs(config(), nodes[:1], devices, eps)
	if len(local) != 6 || !local[netip.MustParseAddr("10.0.1.1")].Host || local[netip.MustParseAddr("fd00::109")].EndpointID != 7 {
		t.Errorf("local addresses are %v", local)
	}
}

func TestMerge(t *testing.T) {
	k := func(name, addr, cidr string) state.NodeObject {
		return state.NodeObject{Source: model.SourceKubernetes, Name: name, Addrs: addrs(addr), PodCIDRs: prefixes(cidr)}
	}
	c := func(name, addr, cidr string) state.NodeObject {
		return state.NodeObject{Source: model.SourceCustomResource, Name: name, Addrs: addrs(addr), PodCIDRs: prefixes(cidr), Routers: addrs("10.9.9.9")}
	}
	objects := []state.NodeObject{k("n1", "172.18.0.1", "10.1.1.0/24"), c("n1", "172.18.0.1", "10.0.1.0/24"),
		k("n2", "172.18.0.2", "10.1.2.0/24"), c("n2", "172.18.0.99", "10.0.2.0/24"), c("gone", "172.18.0.3", "10.0.3.0/24"), k("fresh", "172.18.0.4", "10.1.4.0/24")}
	show := func(nodes []model.Node) string {
		var s []string
		for _, n := range nodes {
			s = append(s, fmt.Sprintf("%s%v%v%s", n.Name, n.Addrs, n.PodCIDRs, n.Source))
		}
		return strings.Join(s, " ")
	}
	cfg := config()
	local := Local(cfg, model.Node{Routers: addrs("10.0.1.1")}, objects)
	if got, want := show([]model.Node{local}), "n1[172.18.0.1][10.0.1.0/24]local"; got != want || len(local.Routers) != 1 {
		t.Errorf("got %s, want %s", got, want)
	}
	if got, want := show(Merge(cfg, []model.Node{local}, objects, true)), "fresh[172.18.0.4][]k8s n1[172.18.0.1][10.0.1.0/24]local n2[172.18.0.2][10.0.2.0/24]custom-resource"; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if got := show(Merge(cfg, nil, objects, false)); !strings.Contains(got, "gone") {
		t.Errorf("a node was taken for departed before the list was complete: %s", got)
	}
	cfg.IPAM = IPAMKubernetes
	if got, want := show(Merge(cfg, nil, objects, true)), "fresh[172.18.0.4][10.1.4.0/24]k8s n2[172.18.0.2][10.1.2.0/24]custom-resource"; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	// An API server that is away, or an object that is gone, takes nothing from this node.
	if got := Local(cfg, local, nil); !state.EqualNode(got, local) {
		t.Errorf("got %v, want %v", got, local)
	}
}

// Nodes that come, change and go in any order leave the rows of those that remain, and no others.
func TestShuffledNodeEventsConverge(t *testing.T) {
	for seed := range uint64(8) {
		tables, err := state.New()
		if err != nil {
			t.Fatal(err)
		}
		w := tables.DB.WriteTxn(tables.NodeObjects)
		done := tables.NodeObjects.RegisterInitializer(w, "test")
		w.Commit()
		s := NewStages(tables, config())
		ctx, cancel := context.WithCancel(t.Context())
		stopped := make(chan error)
		go func() { stopped <- s.Nodes.Run(ctx, tables.DB) }()
		go func() { stopped <- s.IPCache.Run(ctx, tables.DB) }()
		go func() { stopped <- s.Routes.Run(ctx, tables.DB) }()
		nodes, devices := cluster()
		state.Insert(tables.DB, tables.Devices, devices...)
		state.Insert(tables.DB, tables.Local, nodes[0])
		rng := rand.New(rand.NewPCG(seed, 5))
		var events []func()
		for i := range 10 {
			name := fmt.Sprintf("m%d", i)
			a, c := addrs(fmt.Sprintf("172.18.1.%d", i)), prefixes(fmt.Sprintf("10.0.%d.0/24", 10+i))
			events = append(events,
				func() {
					state.Insert(tables.DB, tables.NodeObjects, state.NodeObject{Source: model.SourceKubernetes, Name: name, Addrs: a})
				},
				func() {
					state.Insert(tables.DB, tables.NodeObjects, state.NodeObject{Source: model.SourceCustomResource, Name: name, Addrs: a, PodCIDRs: c})
				})
		}
		rng.Shuffle(len(events), func(i, j int) { events[i], events[j] = events[j], events[i] })
		for i, e := range events {
			e()
			if i == 10 {
				w := tables.DB.WriteTxn(tables.NodeObjects)
				done(w)
				w.Commit()
			}
			if rng.IntN(3) == 0 {
				time.Sleep(time.Millisecond)
			}
		}
		for i := range 5 { // half of them depart; of some only the Node goes first
			state.Delete(tables.DB, tables.NodeObjects, state.NodeObject{Source: model.SourceKubernetes, Name: fmt.Sprintf("m%d", i)})
		}
		deadline := time.After(10 * time.Second)
		for {
			txn := tables.DB.ReadTxn()
			rows, changed := tables.Routes.AllWatch(txn)
			var got []string
			for r := range rows {
				if r.Dev == "eth0" {
					got = append(got, r.Dst.String())
				}
			}
			cache := 0
			for range tables.IPCache.All(txn) {
				cache++
			}
			complete, _ := tables.Routes.Initialized(txn)
			want := []string{"10.0.15.0/24", "10.0.16.0/24", "10.0.17.0/24", "10.0.18.0/24", "10.0.19.0/24"}
			if slices.Equal(got, want) && complete && cache == 6+2*5 {
				break
			}
			ws := statedb.NewWatchSet()
			_, ipcacheChanged := tables.IPCache.AllWatch(txn)
			ws.Add(changed, ipcacheChanged)
			wctx, wcancel := context.WithTimeout(ctx, 5*time.Second)
			ws.Wait(wctx, 0)
			wcancel()
			select {
			case <-deadline:
				t.Fatalf("seed %d: routes %v, %d ipcache rows, complete %v", seed, got, cache, complete)
			default:
			}
		}
		cancel()
		for range 3 {
			<-stopped
		}
		tables.Stop()
	}
}
