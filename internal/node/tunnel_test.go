// SPDX-License-Identifier: Apache-2.0

package node

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/statedb"
	"github.com/google/go-cmp/cmp"

	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/state"
)

// tunnelled is the cluster of the other tests with every node in tunnel mode.
func tunnelled() (Config, []model.Node, []model.Device) {
	cfg := config()
	cfg.Tunnel = "vxlan:8472"
	nodes, devices := cluster()
	nodes[0].RouteMTU = 1450
	for i := range nodes {
		nodes[i].Tunnel = cfg.Tunnel
	}
	return cfg, nodes, devices
}

// routeLines prints routes as ip(8) does.
func routeLines(rows []state.Route) []string {
	var out []string
	for _, r := range rows {
		line := r.Dst.String()
		if r.Dst.IsSingleIP() {
			line = r.Dst.Addr().String()
		}
		if r.Via.IsValid() {
			line += " via " + r.Via.String()
		}
		line += " dev " + r.Dev
		if r.Scope == model.ScopeLink && r.Dst.Addr().Is4() {
			line += " scope link"
		}
		if r.Src.IsValid() {
			line += " src " + r.Src.String()
		}
		if r.MTU > 0 {
			line += fmt.Sprintf(" mtu %d", r.MTU)
		}
		out = append(out, line)
	}
	return out
}

func rowLines(rows map[netip.Prefix]model.IPCacheEntry) []string {
	var out []string
	for _, p := range slices.SortedFunc(maps.Keys(rows), netip.Prefix.Compare) {
		line := fmt.Sprintf("%s %d", p, rows[p].Identity)
		if rows[p].Node.IsValid() {
			line += " at " + rows[p].Node.String()
		}
		if rows[p].Tunnel {
			line += " tunnel"
		}
		if rows[p].Peer {
			line += " peer"
		}
		out = append(out, line)
	}
	return out
}

// ipcacheOf is the whole way from nodes to what the datapath gets.
func ipcacheOf(cfg Config, nodes []model.Node, devices []model.Device) map[netip.Prefix]model.IPCacheEntry {
	rows, o := map[netip.Prefix]model.IPCacheEntry{}, newOverlay(cfg, nodes, devices, never)
	for _, r := range IPCache(cfg, nodes, devices, nil, nil) {
		rows[r.Prefix] = o.row(r.Prefix, r.IPCacheEntry)
	}
	return rows
}

// The routes of the seeds' node, one to one, and of the same cluster routed natively.
func TestRoutesOfEachModeHaveTheShapeOfTheSeeds(t *testing.T) {
	nodes := []model.Node{
		{Name: "worker", Addrs: addrs("172.18.0.3"), PodCIDRs: prefixes("10.0.2.0/24"), Routers: addrs("10.0.2.194"), RouteMTU: 1450, Local: true},
		{Name: "control-plane", Addrs: addrs("172.18.0.2"), PodCIDRs: prefixes("10.0.0.0/24"), Routers: addrs("10.0.0.109"), Tunnel: "vxlan:8472"},
		{Name: "worker2", Addrs: addrs("172.18.0.4"), PodCIDRs: prefixes("10.0.1.0/24"), Tunnel: "vxlan:8472"},
	}
	devices := []model.Device{{Ifindex: 31, Name: "eth0", Addrs: prefixes("172.18.0.3/16"), DirectRouting: true}}
	cfg := config()
	cfg.Name = "worker"
	for mode, want := range map[string][]string{
		"vxlan:8472": {
			"10.0.0.0/24 via 10.0.2.194 dev lash_host src 10.0.2.194 mtu 1450",
			"10.0.1.0/24 via 10.0.2.194 dev lash_host src 10.0.2.194 mtu 1450",
			"10.0.2.0/24 via 10.0.2.194 dev lash_host src 10.0.2.194",
			"10.0.2.194 dev lash_host scope link",
		},
		"": {
			"10.0.0.0/24 via 172.18.0.2 dev eth0",
			"10.0.1.0/24 via 172.18.0.4 dev eth0",
			"10.0.2.0/24 via 10.0.2.194 dev lash_host src 10.0.2.194",
			"10.0.2.194 dev lash_host scope link",
		},
	} {
		cfg.Tunnel = mode
		rows, warnings := Routes(cfg, nodes, devices, always)
		if diff := cmp.Diff(want, routeLines(rows)); diff != "" || len(warnings) > 0 {
			t.Errorf("mode %q (-want +got):\n%s%v", mode, diff, warnings)
		}
	}
}

func TestTunnelCarriesBothFamiliesOverEither(t *testing.T) {
	cfg, nodes, devices := tunnelled()
	nodes = nodes[:2]
	want := []string{
		"10.0.1.0/24 via 10.0.1.1 dev lash_host src 10.0.1.1",
		"10.0.1.1 dev lash_host scope link",
		"10.0.2.0/24 via 10.0.1.1 dev lash_host src 10.0.1.1 mtu 1450",
		"fd00::100/120 dev lash_host src fd00::101",
		"fd00::101 dev lash_host",
		"fd00::200/120 dev lash_host src fd00::101 mtu 1450",
	}
	for _, v6 := range []bool{false, true} {
		cfg.UnderlayIPv6 = v6
		rows, warnings := Routes(cfg, nodes, devices, always)
		if diff := cmp.Diff(want, routeLines(rows)); diff != "" || len(warnings) > 0 {
			t.Errorf("(-want +got):\n%s%v", diff, warnings)
		}
		at := map[bool]string{false: "172.18.0.2", true: "fd18::2"}[v6]
		wantRows := []string{
			"0.0.0.0/0 9", "10.0.1.1/32 1", "10.0.2.0/24 9 at " + at + " tunnel", "10.0.2.1/32 6 at " + at + " tunnel", "10.0.2.9/32 4 at " + at + " tunnel", "172.18.0.1/32 1", "172.18.0.2/32 6 peer",
			"::/0 10", "fd00::101/128 1", "fd00::200/120 10 at " + at + " tunnel", "fd00::201/128 6 at " + at + " tunnel", "fd00::209/128 4 at " + at + " tunnel", "fd18::1/128 1", "fd18::2/128 6 peer",
		}
		if diff := cmp.Diff(wantRows, rowLines(ipcacheOf(cfg, nodes, devices))); diff != "" {
			t.Errorf("IPv6 underlay %v (-want +got):\n%s", v6, diff)
		}
	}
}

// Who encapsulates to whom: only a node in tunnel mode does, and only to one that says it takes the same.
func TestNobodyIsSentWhatItDoesNotTake(t *testing.T) {
	for _, tc := range []struct {
		name, own, peer string
		hybrid          bool
		encapsulated    string // pod CIDRs, comma separated
		device          bool
		warning         string
	}{
		{"both tunnel", "vxlan:8472", "vxlan:8472", false, "10.0.2.0/24,10.0.3.0/24", true, ""},
		{"neither", "", "", false, "", false, "node n3 (192.168.7.3) is not on a subnet"},
		{"the peer has not switched yet", "vxlan:8472", "", false, "", true, "n3 (192.168.7.3) does not take vxlan:8472"},
		{"the peer has left already; it is routed to, and what it still sends is taken", "", "vxlan:8472", false, "", true, "node n3 (192.168.7.3) is not on a subnet"},
		{"another port", "vxlan:8472", "vxlan:4789", false, "", true, "set tunnel-protocol and tunnel-port to the same on all nodes"},
		{"another protocol", "vxlan:8472", "geneve:6081", false, "", true, "it takes geneve:6081, this node uses vxlan:8472"},
		{"hybrid: direct on the same link, tunnel across", "vxlan:8472", "vxlan:8472", true, "10.0.3.0/24", true, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			nodes, devices := cluster()
			cfg := config()
			cfg.IPv6, cfg.Tunnel, cfg.Hybrid = false, tc.own, tc.hybrid
			for i := range nodes {
				nodes[i].Addrs, nodes[i].PodCIDRs, nodes[i].Routers = cfg.addrs(nodes[i].Addrs), cfg.prefixes(nodes[i].PodCIDRs), cfg.addrs(nodes[i].Routers)
				nodes[i].Tunnel = tc.peer
			}
			var marked, routed []string
			rows := ipcacheOf(cfg, nodes, devices)
			for _, p := range slices.SortedFunc(maps.Keys(rows), netip.Prefix.Compare) {
				if rows[p].Tunnel && !p.IsSingleIP() {
					marked = append(marked, p.String())
				}
				if peer := rows[p].Peer; peer != (tc.device && (p.String() == "172.18.0.2/32" || p.String() == "192.168.7.3/32")) {
					t.Errorf("%s: peer %v", p, peer)
				}
			}
			routes, warnings := Routes(cfg, nodes, devices, always)
			for _, r := range routes {
				if r.Dev == cfg.HostDevice && !nodes[0].PodCIDRs[0].Contains(r.Dst.Addr()) {
					routed = append(routed, r.Dst.String())
				}
			}
			if strings.Join(marked, ",") != tc.encapsulated || strings.Join(routed, ",") != tc.encapsulated {
				t.Errorf("rows %v and routes %v are for the tunnel, want %q", marked, routed, tc.encapsulated)
			}
			if WantsTunnel(cfg, nodes) != tc.device {
				t.Errorf("device wanted: %v", !tc.device)
			}
			text := ""
			for _, w := range warnings {
				text += w.Text + "\n"
			}
			if (tc.warning == "") != (text == "") || !strings.Contains(text, tc.warning) {
				t.Errorf("warnings %q, want %q", text, tc.warning)
			}
		})
	}
}

func TestHybridDecidesForEachFamily(t *testing.T) {
	cfg, nodes, devices := tunnelled()
	cfg.Hybrid = true
	devices[0].Addrs = prefixes("172.18.0.1/16", "fd18::1/128") // n2 is on the same link by IPv4 only
	rows, warnings := Routes(cfg, nodes[:2], devices, always)
	want := []string{
		"10.0.1.0/24 via 10.0.1.1 dev lash_host src 10.0.1.1", "10.0.1.1 dev lash_host scope link", "10.0.2.0/24 via 172.18.0.2 dev eth0",
		"fd00::100/120 dev lash_host src fd00::101", "fd00::101 dev lash_host", "fd00::200/120 dev lash_host src fd00::101 mtu 1450",
	}
	if diff := cmp.Diff(want, routeLines(rows)); diff != "" || len(warnings) > 0 {
		t.Errorf("(-want +got):\n%s%v", diff, warnings)
	}
}

func TestPeerWithoutAddressOfTheUnderlayIsNamed(t *testing.T) {
	cfg, nodes, devices := tunnelled()
	cfg.UnderlayIPv6, cfg.SkipUnreachable = true, true
	_, warnings := Routes(cfg, nodes, devices, always)
	if len(warnings) != 2 || !strings.Contains(warnings[0].Text, "of node n3 are not encapsulated: it has no InternalIP of the family of underlay-protocol") {
		t.Errorf("got %v", warnings)
	}
}

func TestNativeCIDRSaysNothingOfWhatIsEncapsulated(t *testing.T) {
	cfg, nodes, devices := tunnelled()
	cfg.NativeCIDR4 = netip.MustParsePrefix("10.0.1.0/24")
	if _, warnings := Routes(cfg, nodes, devices, always); len(warnings) != 0 {
		t.Errorf("got %v", warnings)
	}
}

// Nodes that pass to the tunnel, back, come and go in any order leave the rows, routes and the need for a device that
// follow from where they have ended.
func TestShuffledChangesOfModeConverge(t *testing.T) {
	for seed := range uint64(8) {
		tables, err := state.New()
		if err != nil {
			t.Fatal(err)
		}
		cfg := config()
		cfg.IPv6 = false
		if seed%2 == 0 {
			cfg.Tunnel = "vxlan:8472"
		}
		w := tables.DB.WriteTxn(tables.NodeObjects)
		done := tables.NodeObjects.RegisterInitializer(w, "test")
		w.Commit()
		s := NewStages(tables, cfg)
		desired := DesiredIPCache(tables, cfg)
		ctx, cancel := context.WithCancel(t.Context())
		stopped := make(chan error)
		go func() { stopped <- s.Nodes.Run(ctx, tables.DB) }()
		go func() { stopped <- s.IPCache.Run(ctx, tables.DB) }()
		go func() { stopped <- s.Routes.Run(ctx, tables.DB) }()
		nodes, devices := cluster()
		nodes[0].Addrs, nodes[0].PodCIDRs, nodes[0].Routers, nodes[0].RouteMTU = cfg.addrs(nodes[0].Addrs), cfg.prefixes(nodes[0].PodCIDRs), cfg.addrs(nodes[0].Routers), 1450
		state.Insert(tables.DB, tables.Devices, devices...)
		state.Insert(tables.DB, tables.Local, nodes[0])

		for i := range 6 { // as if the kernel had every row marked: the order is tested where the loops are
			state.Insert(tables.DB, tables.TunnelPaths, state.TunnelPath{Prefix: netip.MustParsePrefix(fmt.Sprintf("10.0.%d.0/24", 10+i)), Marked: true})
		}
		final := map[string]string{} // what each announces in the end
		rng := rand.New(rand.NewPCG(seed, 7))
		write := func(i int, tunnel string) {
			name, a, c := fmt.Sprintf("m%d", i), addrs(fmt.Sprintf("172.18.1.%d", i)), prefixes(fmt.Sprintf("10.0.%d.0/24", 10+i))
			state.Insert(tables.DB, tables.NodeObjects, state.NodeObject{Source: model.SourceKubernetes, Name: name, Addrs: a},
				state.NodeObject{Source: model.SourceCustomResource, Name: name, Addrs: a, PodCIDRs: c, Tunnel: tunnel})
			final[name] = tunnel
		}
		modes := []string{"", "vxlan:8472", "vxlan:8472", "geneve:6081"}
		for step := range 60 {
			write(rng.IntN(6), modes[rng.IntN(len(modes))])
			if step == 20 {
				w := tables.DB.WriteTxn(tables.NodeObjects)
				done(w)
				w.Commit()
			}
			if rng.IntN(4) == 0 {
				time.Sleep(time.Millisecond)
			}
		}
		var wantRows, wantRoutes []string
		wantDevice := cfg.Tunnel != ""
		for i := range 6 {
			tunnel, ok := final[fmt.Sprintf("m%d", i)]
			if !ok {
				continue
			}
			wantDevice = wantDevice || tunnel != ""
			row, route := fmt.Sprintf("10.0.%d.0/24 2 at 172.18.1.%d", 10+i, i), fmt.Sprintf("10.0.%d.0/24 via 172.18.1.%d dev eth0", 10+i, i)
			if tunnel == cfg.Tunnel && tunnel != "" {
				row, route = row+" tunnel", fmt.Sprintf("10.0.%d.0/24 via 10.0.1.1 dev lash_host src 10.0.1.1 mtu 1450", 10+i)
			}
			wantRows, wantRoutes = append(wantRows, row), append(wantRoutes, route)
		}
		remote := func(lines []string) []string {
			return slices.DeleteFunc(lines, func(l string) bool { return !strings.HasPrefix(l, "10.0.1") || strings.HasPrefix(l, "10.0.1.") })
		}
		var rows, routes []string
		for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); {
			txn := tables.DB.ReadTxn()
			_, changed := tables.Routes.AllWatch(txn)
			snap := desired()
			rows, routes = remote(rowLines(snap.Rows)), remote(routeLines(state.Rows(txn, tables.Routes)))
			if snap.Complete && slices.Equal(rows, wantRows) && slices.Equal(routes, wantRoutes) && WantsTunnel(cfg, state.Rows(txn, tables.Nodes)) == wantDevice {
				rows, routes = wantRows, wantRoutes
				break
			}
			ws := statedb.NewWatchSet()
			ws.Add(append(snap.Changed, changed)...)
			wctx, wcancel := context.WithTimeout(ctx, time.Second)
			ws.Wait(wctx, 0)
			wcancel()
		}
		if diff := cmp.Diff(append(wantRows, wantRoutes...), append(rows, routes...)); diff != "" {
			t.Errorf("seed %d (-want +got):\n%s", seed, diff)
		}
		cancel()
		for range 3 {
			<-stopped
		}
		tables.Stop()
	}
}

// Until its CiliumNode has been read it is not known what a node takes: nothing of it changes in the kernel.
func TestRestartDoesNotRouteToNodesItHasHalfRead(t *testing.T) {
	cfg := config()
	cfg.IPAM, cfg.Tunnel = IPAMKubernetes, "vxlan:8472"
	half := []state.NodeObject{{Source: model.SourceKubernetes, Name: "n2", Addrs: addrs("172.18.0.2"), PodCIDRs: prefixes("10.0.2.0/24")}}
	if got := Merge(cfg, nil, half, false); len(got) != 0 {
		t.Errorf("got %v", got)
	}
	if got := Merge(cfg, nil, half, true); len(got) != 1 {
		t.Errorf("got %v", got)
	}
}

// Whatever changes, the ipcache's rows that follow changes are those that are computed at once: no source is forgotten.
func TestIPCacheThatFollowsChangesIsThatOfTheWhole(t *testing.T) {
	for seed := range uint64(10) {
		rng := rand.New(rand.NewPCG(seed, 5))
		tables, err := state.New()
		if err != nil {
			t.Fatal(err)
		}
		w := tables.DB.WriteTxn(tables.TunnelPaths)
		done := tables.TunnelPaths.RegisterInitializer(w, "test")
		w.Commit()
		cfg, nodes, devices := tunnelled()
		cfg.Hybrid = seed%2 == 0
		ip := func() netip.Addr { return netip.AddrFrom4([4]byte{10, 0, byte(rng.IntN(4)), byte(rng.IntN(4))}) }
		desired := DesiredIPCache(tables, cfg)
		for step := range 300 {
			n := nodes[rng.IntN(len(nodes))]
			switch rng.IntN(20) {
			case 0:
				n.Tunnel = []string{"", cfg.Tunnel}[rng.IntN(2)]
				state.Insert(tables.DB, tables.Nodes, n)
			case 1:
				state.Delete(tables.DB, tables.Nodes, n)
			case 2:
				state.Insert(tables.DB, tables.Devices, devices...)
			case 3:
				state.Delete(tables.DB, tables.Devices, devices[0])
			case 4:
				state.Insert(tables.DB, tables.TunnelPaths, state.TunnelPath{Prefix: n.PodCIDRs[0], Routed: rng.IntN(2) == 0})
			case 5, 6, 7:
				state.Insert(tables.DB, tables.IPCache, state.IPCache{Prefix: single(ip()), IPCacheEntry: model.IPCacheEntry{Identity: model.IdentityHealth, Node: n.Addrs[0]}})
			case 8, 9:
				state.Delete(tables.DB, tables.IPCache, state.IPCache{Prefix: single(ip())})
			case 10, 11, 12, 13, 14, 15:
				ep := state.CiliumEndpoint{Namespace: "d", Name: fmt.Sprint(rng.IntN(10)), IPv4: ip(), Node: n.Addrs[0], Identity: model.Identity(rng.IntN(3)), Created: int64(rng.IntN(3))}
				if rng.IntN(2) == 0 {
					ep.IPv6 = netip.AddrFrom16([16]byte{0: 0xfd, 15: byte(rng.IntN(4))})
				}
				state.Insert(tables.DB, tables.CiliumEndpoints, ep)
			default:
				state.Delete(tables.DB, tables.CiliumEndpoints, state.CiliumEndpoint{Namespace: "d", Name: fmt.Sprint(rng.IntN(10))})
			}
			if step == 150 {
				w := tables.DB.WriteTxn(tables.TunnelPaths)
				done(w)
				w.Commit()
			}
			if d := cmp.Diff(rowLines(DesiredIPCache(tables, cfg)().Rows), rowLines(desired().Rows)); d != "" {
				t.Fatalf("seed %d, step %d (-whole +followed):\n%s", seed, step, d)
			}
		}
		tables.Stop()
	}
}
