// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/lash-net/lash/internal/config"
	"github.com/lash-net/lash/internal/datapath"
	"github.com/lash-net/lash/internal/datapath/netdev"
	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/node"
	"github.com/lash-net/lash/internal/reconcile"
	"github.com/lash-net/lash/internal/state"
)

// fakeKernel has rows and routes, and looks at both after each change.
type fakeKernel struct {
	mu     sync.Mutex
	rows   map[netip.Prefix]model.IPCacheEntry
	routes map[netip.Prefix]model.Route
	wrong  []string
}

// check finds pod CIDRs of other nodes that are routed to the host device and not marked: what a pod sends there is
// dropped, for programs ask the routing table where nothing is marked.
func (k *fakeKernel) check() {
	for p, r := range k.routes {
		if r.Dev == netdev.HostDevice && r.MTU > 0 && !k.rows[p].Tunnel {
			k.wrong = append(k.wrong, fmt.Sprintf("%s is routed to %s and not marked", p, r.Dev))
		}
	}
}

type fakeTarget[V any] struct {
	k    *fakeKernel
	have map[netip.Prefix]V
}

func (t fakeTarget[V]) List(context.Context) (map[netip.Prefix]V, error) {
	t.k.mu.Lock()
	defer t.k.mu.Unlock()
	return maps.Clone(t.have), nil
}

func (t fakeTarget[V]) Put(_ context.Context, p netip.Prefix, v V) error {
	t.k.mu.Lock()
	defer t.k.mu.Unlock()
	t.have[p] = v
	t.k.check()
	return nil
}

func (t fakeTarget[V]) Delete(_ context.Context, p netip.Prefix) error {
	t.k.mu.Lock()
	defer t.k.mu.Unlock()
	delete(t.have, p)
	t.k.check()
	return nil
}

// reconcile runs the stages and loops that make the kernel equal what the agent's tables say, until stop is called.
func (k *fakeKernel) reconcile(t *testing.T, a *agent) (stop func()) {
	tables := a.tables
	stages := node.NewStages(tables, a.nodeCfg)
	marks := record(tables, fakeTarget[model.IPCacheEntry]{k, k.rows}, func(p *state.TunnelPath, v model.IPCacheEntry) { p.Marked = v.Tunnel })
	ways := record(tables, fakeTarget[model.Route]{k, k.routes}, func(p *state.TunnelPath, v model.Route) { p.Routed = intoTunnel(v) })
	ipcache := reconcile.New(reconcile.Config[netip.Prefix, model.IPCacheEntry]{Name: "ipcache", Target: marks, Desired: node.DesiredIPCache(a.tables, a.nodeCfg), Equal: datapath.SameIPCache})
	routes := reconcile.New(reconcile.Config[netip.Prefix, model.Route]{
		Name: "routes", Target: ways, Equal: reconcile.Comparable[model.Route], Desired: state.Desired(tables.DB, tables.Routes.ToTable(), state.Route.Split),
	})
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for _, run := range []func(context.Context) error{
		ipcache.Run, routes.Run,
		func(ctx context.Context) error { return stages.Nodes.Run(ctx, tables.DB) },
		func(ctx context.Context) error { return stages.IPCache.Run(ctx, tables.DB) },
		func(ctx context.Context) error { return stages.Routes.Run(ctx, tables.DB) },
	} {
		wg.Go(func() { _ = run(ctx) })
	}
	return func() {
		cancel()
		wg.Wait()
	}
}

// Whatever the mode this node starts in and the others pass to, at no moment do packets find the second half of the way
// into the tunnel without the first.
func TestModesChangeWithoutAGap(t *testing.T) {
	const peers = 5
	for seed := range uint64(6) {
		rng := rand.New(rand.NewPCG(seed, 11))
		k := &fakeKernel{rows: map[netip.Prefix]model.IPCacheEntry{}, routes: map[netip.Prefix]model.Route{}}
		announced := make([]string, peers)
		for range 6 { // agents, one after another
			cfg := config.Default()
			cfg.RoutingMode = []string{"native", "tunnel"}[rng.IntN(2)]
			tables, err := state.New()
			if err != nil {
				t.Fatal(err)
			}
			a := &agent{cfg: cfg, name: "n1", tables: tables, nodeCfg: nodeConfig(cfg, "n1")}
			w := tables.DB.WriteTxn(tables.NodeObjects)
			objectsRead := tables.NodeObjects.RegisterInitializer(w, "test")
			w.Commit()
			stop := k.reconcile(t, a)
			addrs := func(s string) []netip.Addr { return []netip.Addr{netip.MustParseAddr(s)} }
			cidrs := func(s string) []netip.Prefix { return []netip.Prefix{netip.MustParsePrefix(s)} }
			state.Insert(tables.DB, tables.Devices, model.Device{Ifindex: 2, Name: "eth0", Addrs: cidrs("172.18.0.1/16"), DirectRouting: true})
			state.Insert(tables.DB, tables.Local, model.Node{Name: "n1", Local: true, Addrs: addrs("172.18.0.1"), PodCIDRs: cidrs("10.0.1.0/24"), Routers: addrs("10.0.1.1"), RouteMTU: 1450})
			write := func(i int) {
				name, addr, cidr := fmt.Sprintf("m%d", i), addrs(fmt.Sprintf("172.18.1.%d", i)), cidrs(fmt.Sprintf("10.0.%d.0/24", 10+i))
				state.Insert(tables.DB, tables.NodeObjects, state.NodeObject{Source: model.SourceKubernetes, Name: name, Addrs: addr},
					state.NodeObject{Source: model.SourceCustomResource, Name: name, Addrs: addr, PodCIDRs: cidr, Tunnel: announced[i]})
			}
			for i := range peers {
				write(i)
			}
			w = tables.DB.WriteTxn(tables.NodeObjects)
			objectsRead(w)
			w.Commit()
			for range 15 {
				i := rng.IntN(peers)
				announced[i] = []string{"", "vxlan:8472"}[rng.IntN(2)]
				write(i)
				if rng.IntN(2) == 0 {
					time.Sleep(time.Duration(rng.IntN(4)) * time.Millisecond)
				}
			}
			settled := func() string {
				k.mu.Lock()
				defer k.mu.Unlock()
				if own := netip.MustParsePrefix("10.0.1.0/24"); k.routes[own].Dev != netdev.HostDevice {
					return fmt.Sprintf("%s: %+v", own, k.routes[own])
				}
				for i, tunnel := range announced {
					p, want := netip.MustParsePrefix(fmt.Sprintf("10.0.%d.0/24", 10+i)), tunnel != "" && a.nodeCfg.Tunnel != ""
					if k.rows[p].Tunnel != want || (k.routes[p].Dev == netdev.HostDevice) != want {
						return fmt.Sprintf("%s: %+v, %+v; want tunnel %v", p, k.rows[p], k.routes[p], want)
					}
				}
				return ""
			}
			last := "?"
			for deadline := time.Now().Add(10 * time.Second); last != "" && time.Now().Before(deadline); last = settled() {
				time.Sleep(time.Millisecond)
			}
			stop()
			tables.Stop()
			if last != "" {
				t.Fatalf("seed %d, %s: %s", seed, cfg.RoutingMode, last)
			}
		}
		if len(k.wrong) > 0 {
			t.Errorf("seed %d: %d times, first %s", seed, len(k.wrong), k.wrong[0])
		}
	}
}

// An agent that starts again hears of the others in any order: of a pod before its node, of a Node before its CiliumNode.
// What its predecessor wrote about them stays as it is until all are known.
func TestRestartKeepsTheWaysToOthersUntilAllAreKnown(t *testing.T) {
	p := netip.MustParsePrefix
	peer := netip.MustParseAddr("172.18.1.0")
	rows := map[netip.Prefix]model.IPCacheEntry{
		p("10.0.10.0/24"):  {Identity: model.IdentityWorld, Node: peer, Tunnel: true},
		p("10.0.10.5/32"):  {Identity: 300, Node: peer, Tunnel: true},
		p("172.18.1.0/32"): {Identity: model.IdentityRemoteNode, Peer: true},
	}
	routes := map[netip.Prefix]model.Route{p("10.0.10.0/24"): {Via: netip.MustParseAddr("10.0.1.1"), Dev: netdev.HostDevice, MTU: 1450}}
	k := &fakeKernel{rows: maps.Clone(rows), routes: maps.Clone(routes)}
	cfg := config.Default()
	tables, err := state.New()
	if err != nil {
		t.Fatal(err)
	}
	defer tables.Stop()
	a := &agent{cfg: cfg, name: "n1", tables: tables, nodeCfg: nodeConfig(cfg, "n1")}
	w := tables.DB.WriteTxn(tables.NodeObjects)
	objectsRead := tables.NodeObjects.RegisterInitializer(w, "test")
	w.Commit()
	defer k.reconcile(t, a)()
	state.Insert(tables.DB, tables.Devices, model.Device{Ifindex: 2, Name: "eth0", Addrs: []netip.Prefix{p("172.18.0.1/16")}, DirectRouting: true})
	state.Insert(tables.DB, tables.Local, model.Node{Name: "n1", Local: true, Addrs: []netip.Addr{netip.MustParseAddr("172.18.0.1")}, PodCIDRs: []netip.Prefix{p("10.0.1.0/24")}, Routers: []netip.Addr{netip.MustParseAddr("10.0.1.1")}, RouteMTU: 1450})
	unchanged := func(after string) {
		t.Helper()
		time.Sleep(50 * time.Millisecond) // the loops have seen it
		k.mu.Lock()
		defer k.mu.Unlock()
		for prefix, row := range rows {
			if !datapath.SameIPCache(k.rows[prefix], row) {
				t.Errorf("after %s, %s is %+v, was %+v", after, prefix, k.rows[prefix], row)
			}
		}
		if r := k.routes[p("10.0.10.0/24")]; !intoTunnel(r) {
			t.Errorf("after %s, the route is %+v", after, r)
		}
	}
	state.Insert(tables.DB, tables.CiliumEndpoints, state.CiliumEndpoint{Namespace: "default", Name: "pod", Identity: 300, Node: peer, IPv4: netip.MustParseAddr("10.0.10.5")})
	unchanged("the pod")
	state.Insert(tables.DB, tables.NodeObjects, state.NodeObject{Source: model.SourceKubernetes, Name: "m0", Addrs: []netip.Addr{peer}})
	unchanged("the Node")
	state.Insert(tables.DB, tables.NodeObjects, state.NodeObject{Source: model.SourceCustomResource, Name: "m0", Addrs: []netip.Addr{peer}, PodCIDRs: []netip.Prefix{p("10.0.10.0/24")}, Tunnel: "vxlan:8472"})
	unchanged("the CiliumNode")
	w = tables.DB.WriteTxn(tables.NodeObjects)
	objectsRead(w)
	w.Commit()
	unchanged("the list's end")
}
