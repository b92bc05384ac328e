// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/lash-net/lash/bpf"
	"github.com/lash-net/lash/internal/model"
)

func testAddr(s string) netip.Addr { return netip.MustParseAddr(s) }

func testFrontend(addr string, port uint16, tweak func(*model.Frontend)) model.Frontend {
	f := model.Frontend{FrontendKey: model.FrontendKey{Addr: testAddr(addr), L4: model.L4{Proto: 6, Port: port}}}
	if tweak != nil {
		tweak(&f)
	}
	return f
}

func outside(f *model.Frontend)     { f.Outside = true }
func nodePort(f *model.Frontend)    { f.Outside, f.Node = true, true }
func withMaglev(f *model.Frontend)  { f.Outside, f.Maglev = true, true }
func localMaglev(f *model.Frontend) { f.Outside, f.Maglev, f.LocalOut = true, true, true }

// testBackends makes backends of words: "c" cluster, "l" local, "b" both, "k" keeps; their addresses count up.
func testBackends(kinds string) (out []model.Backend) {
	for i, k := range kinds {
		out = append(out, model.Backend{Addr: netip.AddrFrom4([4]byte{10, 0, 1, byte(i + 1)}), Port: 8080, Cluster: k == 'c' || k == 'b', Local: k == 'l' || k == 'b'})
	}
	return slices.DeleteFunc(out, func(b model.Backend) bool { return kinds[b.Addr.As4()[3]-1] == '-' })
}

// dumpMaps is everything in the maps of services.
func dumpMaps(t *testing.T, d *Datapath) map[string]any {
	t.Helper()
	out := map[string]any{}
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	check(list(d.maps["lash_services"], "", func(k bpf.ServiceKey, v bpf.Service) { out[fmt.Sprintf("service %v", k)] = v }))
	check(list(d.maps["lash_backends"], "", func(k bpf.BackendKey, v bpf.Backend) { out[fmt.Sprintf("backend %v", k)] = v }))
	check(list(d.maps["lash_members"], "", func(k bpf.MemberKey, v uint32) { out[fmt.Sprintf("member %v", k)] = v }))
	check(list(d.maps["lash_source_ranges"], "", func(k bpf.SourceRangeKey, v uint32) { out[fmt.Sprintf("range %v", k)] = v }))
	check(list(d.maps["lash_maglev"], "", func(k uint32, v uint32) { out[fmt.Sprintf("maglev %v", k)] = true }))
	check(list(d.maps["lash_ports"], "", func(k uint32, v uint8) {
		if v != 0 {
			out[fmt.Sprintf("port %v", k)] = v
		}
	}))
	return out
}

func serviceMaps(t *testing.T) *Datapath {
	d := withMaps(t, Config{MaglevSize: 251})
	for name, m := range d.maps {
		if name == "lash_ports" { // indexed by all port numbers
			m.Close()
			spec, err := bpf.Load("pod")
			if err != nil {
				t.Fatal(err)
			}
			if d.maps[name], err = ebpf.NewMap(spec.Maps[name]); err != nil {
				t.Fatal(err)
			}
		}
	}
	return d
}

var samplePorts = map[uint32]model.ServicePort{
	3: {ID: 3, Proto: 6, Affinity: 30, Backends: testBackends("cclbk"), Frontends: []model.Frontend{
		testFrontend("0.0.0.0", 30080, nodePort), testFrontend("10.96.0.3", 80, nil), testFrontend("192.0.2.9", 80, func(f *model.Frontend) { f.Outside, f.Ranges, f.Deny, f.LocalOut = true, true, true, true }),
	}, Ranges: []netip.Prefix{netip.MustParsePrefix("10.9.0.0/16"), netip.MustParsePrefix("10.10.0.0/16")}},
	4: {ID: 4, Proto: 6, Backends: testBackends("ccc"), Frontends: []model.Frontend{testFrontend("10.96.0.3", 443, nil), testFrontend("192.0.2.10", 443, withMaglev)}},
	5: {ID: 5, Proto: 6, Backends: testBackends("lbc"), Frontends: []model.Frontend{testFrontend("192.0.2.11", 443, localMaglev)}},
	6: {ID: 6, Proto: 6, Frontends: []model.Frontend{testFrontend("10.96.0.6", 80, nil)}},
	7: {ID: 7, Proto: 6, IPv6: true, Frontends: []model.Frontend{testFrontend("::", 30081, nodePort), testFrontend("fd96::7", 80, nil)},
		Backends: []model.Backend{{Addr: testAddr("fd00::1"), Port: 80, Cluster: true}, {Addr: testAddr("fd18::1"), Port: 6443, Cluster: true, Host: true}}},
}

func TestServicePortsAreReadBackAsTheyWereWritten(t *testing.T) {
	d := serviceMaps(t)
	ctx := context.Background()
	target := d.ServicePorts()
	for id, v := range samplePorts {
		if err := target.Put(ctx, id, v); err != nil {
			t.Fatal(err)
		}
	}
	before := dumpMaps(t, d)
	for _, fresh := range []*ServicePorts{target, newServicePorts(d)} { // a restart, too
		got, err := fresh.List(ctx)
		if err != nil {
			t.Fatal(err)
		}
		for id, v := range samplePorts {
			if !SameServicePort(got[id], v) {
				t.Errorf("%d: got\n%+v, want\n%+v", id, got[id], v)
			}
		}
		if len(got) != len(samplePorts) {
			t.Errorf("%d service ports, want %d", len(got), len(samplePorts))
		}
		// Nothing is written that is there: slots stay as they were, however the target came to know them.
		for id, v := range samplePorts {
			if err := fresh.Put(ctx, id, v); err != nil {
				t.Fatal(err)
			}
		}
		if after := dumpMaps(t, d); !reflect.DeepEqual(before, after) {
			t.Errorf("maps changed:\n%v\n%v", before, after)
		}
	}
	for id := range samplePorts {
		if err := target.Delete(ctx, id); err != nil {
			t.Fatal(err)
		}
	}
	if left := dumpMaps(t, d); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

// The kernel's rows say what kind of address each is, as the field's do, also after a restart; a change of kind is a change.
func TestFrontendsAreListedWithTheirKind(t *testing.T) {
	d := serviceMaps(t)
	ctx := context.Background()
	v := model.ServicePort{ID: 6, Proto: 6, Backends: testBackends("c")}
	for i, kind := range frontendTypes {
		v.Frontends = append(v.Frontends, testFrontend(fmt.Sprintf("10.96.0.%d", 10+i), 80, func(f *model.Frontend) { f.Type, f.Outside = kind, kind != model.TypeClusterIP }))
	}
	if err := d.ServicePorts().Put(ctx, v.ID, v); err != nil {
		t.Fatal(err)
	}
	_, rows, err := d.Dump("lb")
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []string{"[1 backends]", "[ClusterIP, non-routable, 1 backends]", "[NodePort, 1 backends]", "[LoadBalancer, 1 backends]", "[ExternalIPs, 1 backends]", "[HostPort, 1 backends]"} {
		row := []string{fmt.Sprintf("10.96.0.%d:80/TCP (0)", 10+i), "0.0.0.0:0 (6) (0) " + want}
		if !slices.ContainsFunc(rows, func(r []string) bool { return slices.Equal(r, row) }) {
			t.Errorf("no row %q in %q", row, rows)
		}
	}
	got, err := newServicePorts(d).List(ctx)
	if err != nil || !SameServicePort(got[v.ID], v) {
		t.Errorf("read back %+v, %v", got[v.ID], err)
	}
	v.Frontends = slices.Clone(v.Frontends)
	v.Frontends[1].Type = model.TypeHostPort
	if SameServicePort(got[v.ID], v) {
		t.Error("another kind of address is no change")
	}
}

func TestSourceRangesAreListedWithTheirPolicy(t *testing.T) {
	d := serviceMaps(t)
	allowed := samplePorts[3]
	allowed.ID, allowed.Ranges = 4, []netip.Prefix{netip.MustParsePrefix("2001:db8::/32")}
	allowed.Frontends = []model.Frontend{testFrontend("192.0.2.10", 80, func(f *model.Frontend) { f.Outside, f.Ranges = true, true })}
	for id, v := range map[uint32]model.ServicePort{3: samplePorts[3], 4: allowed} {
		if err := d.ServicePorts().Put(context.Background(), id, v); err != nil {
			t.Fatal(err)
		}
	}
	_, rows, err := d.Dump("lb-source-ranges")
	if want := [][]string{{"3", "10.10.0.0/16", "deny"}, {"3", "10.9.0.0/16", "deny"}, {"4", "2001:db8::/32", "allow"}}; err != nil || !reflect.DeepEqual(rows, want) {
		t.Errorf("got %q, %v, want %q", rows, err, want)
	}
}

func TestRowsOfServicePorts(t *testing.T) {
	d := serviceMaps(t)
	ctx := context.Background()
	if err := d.ServicePorts().Put(ctx, 3, samplePorts[3]); err != nil {
		t.Fatal(err)
	}
	var row bpf.Service
	lookup := func(addr string, port uint16, proto uint8) bpf.Service {
		t.Helper()
		if err := d.maps["lash_services"].Lookup(bpf.ServiceKey{Addr: bpf.AddrFrom(testAddr(addr)), Port: bpf.ToBE16(port), Proto: proto}, &row); err != nil {
			t.Fatalf("%s: %v", addr, err)
		}
		return row
	}
	// l is of this node only, b of both sets, c of the cluster only: slots l b c c.
	want := bpf.Service{ID: 3, Count: 3, First: 2, Local: 2, Affinity: 30}
	if got := lookup("10.96.0.3", 80, 6); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	want.Flags = bpf.FrontendOutside | bpf.FrontendRanges | bpf.FrontendDeny | bpf.FrontendLocalOut
	if got := lookup("192.0.2.9", 80, 6); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	want.Flags = bpf.FrontendOutside | bpf.FrontendNode
	if got := lookup("0.0.0.0", 30080, 6); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if got := lookup("10.96.0.3", 0, 0); got != (bpf.Service{Flags: bpf.FrontendAddress}) {
		t.Errorf("the address: %+v", got)
	}
	if got := lookup("192.0.2.9", 0, 0); got != (bpf.Service{Flags: bpf.FrontendAddress | bpf.FrontendOutside}) {
		t.Errorf("the load balancer's address: %+v", got)
	}
	if err := d.maps["lash_services"].Lookup(bpf.ServiceKey{Addr: bpf.AddrFrom(netip.IPv4Unspecified())}, &row); !errors.Is(err, ebpf.ErrKeyNotExist) {
		t.Errorf("every address of the node is a service's: %v", err)
	}
	for slot, last := range map[uint32]byte{1: 3, 2: 4} {
		var b bpf.Backend
		if err := d.maps["lash_backends"].Lookup(bpf.BackendKey{Service: 3, Slot: slot}, &b); err != nil || b.Addr[15] != last || b.Port.Host() != 8080 {
			t.Errorf("slot %d: %+v, %v", slot, b, err)
		}
	}
	for port, want := range map[uint32]uint8{30080: bpf.PortFrontend | bpf.PortNode, 80: bpf.PortFrontend, 8080: 0} {
		var got uint8
		if err := d.maps["lash_ports"].Lookup(port, &got); err != nil || got != want {
			t.Errorf("port %d: %d, want %d (%v)", port, got, want, err)
		}
	}
}

func TestBackendsKeepTheirSlots(t *testing.T) {
	all := testBackends("cccccccccc")
	slots, head := place(all, nil, nil)
	if want := []int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9}; !slices.Equal(slots, want) || head != (bpf.Service{Count: 10, First: 1}) {
		t.Fatalf("got %v, %+v", slots, head)
	}
	less := testBackends("ccc-cccccc")
	next, _ := place(less, all, slots)
	moved := 0
	for slot, i := range next {
		if less[i] != all[slots[slot]] {
			moved++
		}
	}
	if moved != 1 {
		t.Errorf("%d slots changed when one of ten backends went, want 1", moved)
	}
	// Every order of kinds gives three ranges, wherever backends were before.
	rng := rand.New(rand.NewPCG(1, 1))
	var before []model.Backend
	var beforeSlots []int
	for range 500 {
		kinds := make([]byte, 12)
		for i := range kinds {
			kinds[i] = "clbk-"[rng.IntN(5)]
		}
		now := testBackends(string(kinds))
		slots, head := place(now, before, beforeSlots)
		seen := map[int]bool{}
		for slot, i := range slots {
			n := uint32(slot + 1)
			if seen[i] || now[i].Local != (n <= head.Local) || now[i].Cluster != (n >= head.First && n < head.First+head.Count) {
				t.Fatalf("%s: slots %v, %+v", kinds, slots, head)
			}
			seen[i] = true
		}
		for i, b := range now {
			if b.Active() != seen[i] {
				t.Fatalf("%s: %v has a slot: %v", kinds, b, seen[i])
			}
		}
		before, beforeSlots = now, slots
	}
}

// Whatever fails on the way, what is wanted in the end is all there is.
func TestFailingWritesOfServicePortsConverge(t *testing.T) {
	ctx := context.Background()
	want := serviceMaps(t)
	for id, v := range samplePorts {
		if err := want.ServicePorts().Put(ctx, id, v); err != nil {
			t.Fatal(err)
		}
	}
	wanted := dumpMaps(t, want)
	names := []string{"lash_services", "lash_backends", "lash_members", "lash_source_ranges", "lash_maglev"}
	for seed := range uint64(16) {
		rng := rand.New(rand.NewPCG(seed, 5))
		d := serviceMaps(t)
		target := d.ServicePorts()
		// A map that is closed refuses everything.
		broken := func(f func()) {
			name := names[rng.IntN(len(names))]
			good := d.maps[name]
			shut, err := good.Clone()
			if err != nil {
				t.Fatal(err)
			}
			shut.Close()
			d.maps[name] = shut
			f()
			d.maps[name] = good
		}
		for range 30 {
			id := uint32(3 + rng.IntN(7))
			v := model.ServicePort{ID: id, Proto: 6, Affinity: uint32(rng.IntN(3))}
			kinds := make([]byte, rng.IntN(9))
			for i := range kinds {
				kinds[i] = "clbk-"[rng.IntN(5)]
			}
			v.Backends = testBackends(string(kinds))
			for i := range 1 + rng.IntN(3) {
				v.Frontends = append(v.Frontends, testFrontend(fmt.Sprintf("10.96.%d.%d", id, i), uint16(80+rng.IntN(3)), []func(*model.Frontend){nil, outside, nodePort, withMaglev}[rng.IntN(4)]))
			}
			if rng.IntN(3) == 0 {
				v.Ranges = []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(rng.IntN(4))}), 16)}
			}
			step := func() {
				if rng.IntN(4) == 0 {
					target.Delete(ctx, id)
				} else {
					target.Put(ctx, id, v)
				}
			}
			if rng.IntN(2) == 0 {
				broken(step)
			} else {
				step()
			}
		}
		if seed%2 == 0 { // the agent ended there
			target = newServicePorts(d)
		}
		var have map[uint32]model.ServicePort
		var err error
		if seed%4 < 2 {
			if have, err = target.List(ctx); err != nil {
				t.Fatal(err)
			}
		}
		for id := range uint32(12) {
			v, ok := samplePorts[id]
			switch {
			case ok && SameServicePort(have[id], v):
			case ok:
				err = target.Put(ctx, id, v)
			default:
				err = target.Delete(ctx, id)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		if seed%4 >= 2 && seed%2 == 0 {
			continue // it could not know what is there
		}
		got := dumpMaps(t, d)
		for _, m := range []map[string]any{got, wanted} { // slots depend on history
			maps.DeleteFunc(m, func(k string, _ any) bool { return len(k) > 7 && k[:7] == "backend" })
		}
		if !reflect.DeepEqual(got, wanted) {
			for k, v := range got {
				if !reflect.DeepEqual(wanted[k], v) {
					t.Errorf("seed %d: has %s = %v, wanted %v", seed, k, v, wanted[k])
				}
			}
			for k, v := range wanted {
				if got[k] == nil {
					t.Errorf("seed %d: lacks %s = %v", seed, k, v)
				}
			}
		}
		if have, err = newServicePorts(d).List(ctx); err != nil {
			t.Fatal(err)
		}
		for id, v := range samplePorts {
			if !SameServicePort(have[id], v) {
				t.Errorf("seed %d: %d is %+v, want %+v", seed, id, have[id], v)
			}
		}
	}
}

func TestAFrontendThatAnotherHasByNowStays(t *testing.T) {
	d := serviceMaps(t)
	ctx := context.Background()
	target := d.ServicePorts()
	a := model.ServicePort{ID: 1, Proto: 6, Frontends: []model.Frontend{testFrontend("10.96.0.1", 80, nil), testFrontend("192.0.2.1", 80, outside)}}
	b := model.ServicePort{ID: 2, Proto: 6, Frontends: []model.Frontend{testFrontend("192.0.2.1", 80, outside)}}
	put := func(id uint32, v model.ServicePort) {
		t.Helper()
		if err := target.Put(ctx, id, v); err != nil {
			t.Fatal(err)
		}
	}
	put(1, a)
	put(2, b)
	a.Frontends = a.Frontends[:1]
	put(1, a)
	var row bpf.Service
	if err := d.maps["lash_services"].Lookup(serviceKey(b.Frontends[0].FrontendKey), &row); err != nil || row.ID != 2 {
		t.Errorf("got %+v, %v", row, err)
	}
	if !addressIs(t, d, "192.0.2.1") {
		t.Error("the address is nobody's")
	}
	if err := target.Delete(ctx, 2); err != nil {
		t.Fatal(err)
	}
	if addressIs(t, d, "192.0.2.1") || !addressIs(t, d, "10.96.0.1") {
		t.Error("rows of addresses do not follow their service ports")
	}
}

func addressIs(t *testing.T, d *Datapath, a string) bool {
	t.Helper()
	var row bpf.Service
	err := d.maps["lash_services"].Lookup(bpf.ServiceKey{Addr: bpf.AddrFrom(testAddr(a))}, &row)
	if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		t.Fatal(err)
	}
	return err == nil
}

func TestMaglevMovesLittle(t *testing.T) {
	m := newMaglev(16381, []byte("seed"))
	var rows []bpf.Backend
	for _, b := range testBackends("cccccccccc") {
		rows = append(rows, backendRow(6, b))
	}
	full := m.table(rows)
	share := map[uint32]int{}
	for _, i := range full {
		share[i]++
	}
	for i := range rows {
		if n := share[uint32(i)]; n < 1600 || n > 1680 {
			t.Errorf("backend %d has %d entries of %d", i, n, len(full))
		}
	}
	for gone := range rows {
		less := m.table(slices.Delete(slices.Clone(rows), gone, gone+1))
		moved := 0
		for e, i := range less {
			if int(i) >= gone {
				i++
			}
			if int(full[e]) != gone && full[e] != i {
				moved++
			}
		}
		if float64(moved) > .02*float64(len(full)) {
			t.Errorf("without backend %d, %.1f %% of the entries of others move", gone, 100*float64(moved)/float64(len(full)))
		}
	}
	if other := newMaglev(16381, []byte("another")).table(rows); slices.Equal(full, other) {
		t.Error("the seed does not matter")
	}
}

// The table in the kernel gives each entry to the same backend whatever slots backends have.
func TestMaglevTableDoesNotDependOnSlots(t *testing.T) {
	ctx := context.Background()
	tableOf := func(kinds ...string) (out []string) {
		d := serviceMaps(t)
		for _, k := range kinds {
			if err := d.ServicePorts().Put(ctx, 1, model.ServicePort{ID: 1, Proto: 6, Backends: testBackends(k), Frontends: []model.Frontend{testFrontend("192.0.2.1", 80, withMaglev)}}); err != nil {
				t.Fatal(err)
			}
		}
		inner, err := d.tableOf(1)
		if err != nil || inner == nil {
			t.Fatal(inner, err)
		}
		defer inner.Close()
		for i := range uint32(251) {
			var slot uint32
			var b bpf.Backend
			if err := errors.Join(inner.Lookup(i, &slot), d.maps["lash_backends"].Lookup(bpf.BackendKey{Service: 1, Slot: slot}, &b)); err != nil {
				t.Fatalf("entry %d, slot %d: %v", i, slot, err)
			}
			out = append(out, b.Addr.Addr().String())
		}
		return out
	}
	want := tableOf("cclbb")
	for _, history := range [][]string{{"ccccc", "cclbb"}, {"c-c", "-cl", "cclbb"}, {"lllll", "", "cclbb"}} {
		if got := tableOf(history...); !slices.Equal(got, want) {
			t.Errorf("after %v the table differs", history)
		}
	}
}
