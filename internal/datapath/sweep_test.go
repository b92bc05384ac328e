// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
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

// The sweep takes away marks of ports that nobody has, rows that lead to nobody, and locks that were left behind; it adds
// marks that are missing, and touches nothing that was made a moment ago.
func TestSweepOfTranslations(t *testing.T) {
	d := withMaps(t, Config{})
	now, err := d.now()
	if err != nil {
		t.Fatal(err)
	}
	hz, err := ticksPerSecond()
	if err != nil {
		t.Fatal(err)
	}
	addr := func(s string) bpf.Addr { return bpf.AddrFrom(netip.MustParseAddr(s)) }
	key := func(from string, port uint16) bpf.ConnKey {
		k, _ := bpf.ConnKeyOf(netip.AddrPortFrom(netip.MustParseAddr(from), port), netip.MustParseAddrPort("192.0.2.7:53"), 17)
		return k
	}
	conn := func(sport, port uint16, created uint32, translated bool) {
		k, fromHi := bpf.ConnKeyOf(netip.AddrPortFrom(netip.MustParseAddr("10.0.1.10"), sport), netip.MustParseAddrPort("192.0.2.7:53"), 17)
		c := bpf.Conn{Created: created, Expires: now + 1000*hz}
		if fromHi {
			c.Flags = bpf.ConnInitiatorHi
		}
		if translated {
			c.Flags |= bpf.ConnNAT
			c.NATAddr, c.NATPort = addr("172.18.0.11"), bpf.ToBE16(port)
		}
		if err := d.maps["lash_conn"].Put(&k, &c); err != nil {
			t.Fatal(err)
		}
		translatedTo := key("172.18.0.11", port)
		if err := d.maps["lash_nat"].Put(&translatedTo, &k); err != nil {
			t.Fatal(err)
		}
	}
	mark := func(port uint16, when uint32) { *d.snat.at(port) = when }
	old := now - 100*hz
	conn(1, 2001, old, true) // lives, and lacks its mark
	conn(2, 2002, old, true) // lives
	mark(2002, old)
	conn(3, 2003, old, false) // was translated once, to a row that is still there
	mark(2003, old)
	conn(4, 2004, now, false) // is being translated
	mark(2004, now|1)
	conn(8, 2008, old, false) // is being translated anew
	mark(2008, now|1)
	mark(2005, old) // nobody has it
	mark(2006, now|1)
	gone, nobody := key("172.18.0.11", 2007), key("10.0.1.10", 7)
	lock := key("172.18.0.11", 2002)
	lock.Kind = bpf.KeyLock
	for k, v := range map[bpf.ConnKey]bpf.ConnKey{gone: nobody, lock: lock} {
		if err := d.maps["lash_nat"].Put(&k, &v); err != nil {
			t.Fatal(err)
		}
	}
	check := func(removed int, rows, marked string) {
		t.Helper()
		s, err := d.Sweep(context.Background())
		if err != nil || s.Translations != removed {
			t.Errorf("%d translations removed, want %d; %v", s.Translations, removed, err)
		}
		var gotRows, gotMarks []string
		list(d.maps["lash_nat"], "lash_nat", func(k, _ bpf.ConnKey) {
			port := k.LoPort.Host()
			if port == 53 {
				port = k.HiPort.Host()
			}
			gotRows = append(gotRows, fmt.Sprintf("%d/%d", port, k.Kind))
		})
		for port := range uint16(3000) {
			if d.snat.when(port) != 0 {
				gotMarks = append(gotMarks, fmt.Sprint(port))
			}
		}
		slices.Sort(gotRows)
		if got := strings.Join(gotRows, " "); got != rows {
			t.Errorf("rows %s, want %s", got, rows)
		}
		if got := strings.Join(gotMarks, " "); got != marked {
			t.Errorf("marks of %s, want %s", got, marked)
		}
	}
	check(2, "2001/0 2002/0 2002/2 2004/0 2008/0", "2001 2002 2004 2006 2008")
	check(0, "2001/0 2002/0 2004/0 2008/0", "2001 2002 2004 2006 2008") // the lock was there twice
}

// Translations that nobody needs are removed also when there is no room for a lock.
func TestSweepOfTranslationsThatFillTheMap(t *testing.T) {
	d := withMaps(t, Config{})
	nat := d.maps["lash_nat"]
	for i := range nat.MaxEntries() {
		k := bpf.ConnKey{LoPort: bpf.ToBE16(uint16(i)), Proto: 17}
		if err := nat.Put(&k, &bpf.ConnKey{HiPort: bpf.ToBE16(uint16(i)), Proto: 17}); err != nil {
			t.Fatal(err)
		}
	}
	if s, err := d.Sweep(context.Background()); err != nil || s.Translations != int(nat.MaxEntries()) {
		t.Errorf("%d of %d translations removed, %v", s.Translations, nat.MaxEntries(), err)
	}
	var k, owner bpf.ConnKey
	if nat.Iterate().Next(&k, &owner) {
		t.Errorf("row %v is left", k)
	}
}

// A record is left for a second after it has expired: a program may have found it alive just before.
func TestSweepLeavesWhatExpiredAMomentAgo(t *testing.T) {
	d := withMaps(t, Config{})
	now, err := d.now()
	if err != nil {
		t.Fatal(err)
	}
	hz, err := ticksPerSecond()
	if err != nil {
		t.Fatal(err)
	}
	minute := 60 * hz
	for port, ago := range map[uint16]uint32{1: -minute, 2: 0, 3: 2 * hz, 4: minute} {
		if err := d.maps["lash_conn"].Put(&bpf.ConnKey{LoPort: bpf.ToBE16(port), Proto: 17}, &bpf.Conn{Expires: now - ago}); err != nil {
			t.Fatal(err)
		}
	}
	for _, removed := range []int{2, 0} {
		if s, err := d.Sweep(context.Background()); err != nil || s.Expired != removed {
			t.Errorf("%d expired, want %d; %v", s.Expired, removed, err)
		}
	}
	for port, kept := range map[uint16]bool{1: true, 2: true, 3: false, 4: false} {
		var c bpf.Conn
		if err := d.maps["lash_conn"].Lookup(&bpf.ConnKey{LoPort: bpf.ToBE16(port), Proto: 17}, &c); (err == nil) != kept {
			t.Errorf("record %d: %v, want kept %v", port, err, kept)
		}
	}
}

// A tuple that becomes another connection's between the look and the removal keeps its record.
func TestRemovalSparesWhatCameMeanwhile(t *testing.T) {
	d := withMaps(t, Config{})
	conns := d.maps["lash_conn"]
	k := bpf.ConnKey{LoPort: 1, HiPort: 2, Proto: 17}
	for _, meanwhile := range []bool{false, true} {
		old, fresh := bpf.Conn{Expires: 1}, bpf.Conn{Expires: 9}
		if err := conns.Put(&k, &old); err != nil {
			t.Fatal(err)
		}
		removed, err := removeConnection(conns, k, func(c bpf.Conn) bool {
			if meanwhile && c.Expires == old.Expires {
				if err := conns.Put(&k, &fresh); err != nil {
					t.Fatal(err)
				}
			}
			return c.Expires == old.Expires
		})
		var left bpf.Conn
		there := conns.Lookup(&k, &left) == nil
		if err != nil || removed == meanwhile || there != meanwhile || meanwhile && left.Expires != fresh.Expires {
			t.Errorf("meanwhile %v: removed %v, %v; left %v %+v", meanwhile, removed, err, there, left)
		}
	}
	if removed, err := removeConnection(conns, bpf.ConnKey{LoPort: 7}, func(bpf.Conn) bool { return true }); removed || err != nil {
		t.Errorf("no record: %v, %v", removed, err)
	}
}
