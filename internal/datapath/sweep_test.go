// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"context"
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/rlimit"

	"github.com/lash-net/lash/bpf"
	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/testutil"
)

// withMaps is a datapath of maps that are not pinned, and the clock.
func withMaps(t *testing.T, cfg Config) *Datapath {
	t.Helper()
	testutil.NeedRoot(t)
	if err := rlimit.RemoveMemlock(); err != nil {
		t.Skipf("memory for maps cannot be locked: %v", err)
	}
	d := &Datapath{cfg: cfg, maps: map[string]*ebpf.Map{}, programs: map[string]*ebpf.Program{}, departed: map[netip.Prefix]bool{}}
	for _, object := range []string{"pod", "sock"} {
		spec, err := bpf.Load(object)
		if err != nil {
			t.Fatal(err)
		}
		for name, m := range spec.Maps {
			if !isOurs(name) || d.maps[name] != nil {
				continue
			}
			if m.Type != ebpf.RingBuf && name != "lash_snat_ports" { // whose sizes are given
				m.MaxEntries = min(m.MaxEntries, 1024)
			}
			if d.maps[name], err = ebpf.NewMap(m); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { d.maps[name].Close() })
		}
	}
	spec, err := bpf.Load("pod")
	if err != nil {
		t.Fatal(err)
	}
	clock := spec.Programs["clock"]
	if err := clock.Instructions.AssociateMap("lash_runtime", d.maps["lash_runtime"]); err != nil {
		t.Fatal(err)
	}
	if d.programs["clock"], err = ebpf.NewProgram(clock); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.programs["clock"].Close() })
	if err := d.openSNATPorts(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.snat.close)
	return d
}

func TestSweepRemovesWhatLeftTheIPCache(t *testing.T) {
	d := withMaps(t, Config{PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.0.1.0/24")}})
	ctx := context.Background()
	addr := func(s string) bpf.Addr { return bpf.AddrFrom(netip.MustParseAddr(s)) }
	put := func(m string, k, v any) {
		t.Helper()
		if err := d.maps[m].Put(k, v); err != nil {
			t.Fatal(err)
		}
	}
	node := netip.MustParseAddr("172.18.0.13")
	rows := map[string]model.IPCacheEntry{
		"0.0.0.0/0":      {Identity: model.IdentityWorld},
		"10.0.2.0/24":    {Identity: model.IdentityWorld, Node: netip.MustParseAddr("172.18.0.12")},
		"10.0.2.7/32":    {Identity: 300, Node: netip.MustParseAddr("172.18.0.12")},
		"10.0.3.0/24":    {Identity: model.IdentityWorld, Node: node},
		"172.18.0.13/32": {Identity: model.IdentityRemoteNode},
	}
	for p, e := range rows {
		if err := d.IPCache().Put(ctx, netip.MustParsePrefix(p), e); err != nil {
			t.Fatal(err)
		}
	}
	put("lash_endpoints", addr("10.0.1.2"), &bpf.Endpoint{ID: 1})
	now, err := d.now()
	if err != nil {
		t.Fatal(err)
	}
	peers := map[string]bool{"10.0.2.7": true, "10.0.2.8": false, "10.0.3.9": true, "172.18.0.13": true, "172.18.0.200": false} // gone
	for peer := range peers {
		put("lash_conn", &bpf.ConnKey{Lo: addr("10.0.1.2"), Hi: addr(peer), Proto: 6}, &bpf.Conn{Expires: now + 100000})
		put("lash_sock_rev", &bpf.SockRevKey{Cookie: 1, Addr: addr(peer)}, &bpf.SockRev{})
	}
	if s, err := d.Sweep(ctx); err != nil || s.Orphaned != 0 || s.Sockets != 0 || s.Connections != len(peers) {
		t.Errorf("nothing is gone: %+v %v", s, err)
	}
	for _, p := range []string{"10.0.2.7/32", "10.0.3.0/24", "172.18.0.13/32"} {
		if err := d.IPCache().Delete(ctx, netip.MustParsePrefix(p)); err != nil {
			t.Fatal(err)
		}
	}
	if s, err := d.Sweep(ctx); err != nil || s.Orphaned != 3 || s.Sockets != 3 {
		t.Errorf("three are gone: %+v %v", s, err)
	}
	for peer, gone := range peers {
		var c bpf.Conn
		var r bpf.SockRev
		err := d.maps["lash_conn"].Lookup(&bpf.ConnKey{Lo: addr("10.0.1.2"), Hi: addr(peer), Proto: 6}, &c)
		err2 := d.maps["lash_sock_rev"].Lookup(&bpf.SockRevKey{Cookie: 1, Addr: addr(peer)}, &r)
		if (err != nil) != gone || (err2 != nil) != gone {
			t.Errorf("%s: connection %v, socket %v, want gone %v", peer, err, err2, gone)
		}
	}
	// a prefix that came back, and one that departed before: its new connections are nobody's business
	if err := d.IPCache().Delete(ctx, netip.MustParsePrefix("10.0.2.0/24")); err != nil {
		t.Fatal(err)
	}
	if err := d.IPCache().Put(ctx, netip.MustParsePrefix("10.0.2.0/24"), rows["10.0.2.0/24"]); err != nil {
		t.Fatal(err)
	}
	put("lash_conn", &bpf.ConnKey{Lo: addr("10.0.1.2"), Hi: addr("10.0.3.9"), Proto: 6}, &bpf.Conn{Expires: now + 100000})
	if s, err := d.Sweep(ctx); err != nil || s.Orphaned != 0 || s.Sockets != 0 {
		t.Errorf("nothing is gone any more: %+v %v", s, err)
	}
}
