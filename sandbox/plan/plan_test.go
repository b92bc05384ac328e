// SPDX-License-Identifier: Apache-2.0

package plan

import (
	"net/netip"
	"testing"
)

func TestNetnsNamesBelongToOneSandbox(t *testing.T) {
	for _, c := range []struct{ sandbox, host string }{{"lash", "n1"}, {"a-n1", "cp"}, {"a", "outside"}, {"x-y-z", "n150"}, {"a", "sw"}} {
		s, h, ok := ParseNetns(Netns(c.sandbox, c.host))
		if !ok || s != c.sandbox || h != c.host {
			t.Errorf("%v: got %q %q %v", c, s, h, ok)
		}
	}
	for _, ns := range []string{"", "sb-", "sb-lash", "sb-lash-x1", "sb-lash-n0", "lash-n1", "sb--n1", "sb-A-n1", "sb-lash-n1x"} {
		if s, h, ok := ParseNetns(ns); ok {
			t.Errorf("%q taken for sandbox %q host %q", ns, s, h)
		}
	}
}

func TestAddressesAreDistinctAndInside(t *testing.T) {
	seen := map[netip.Addr]string{}
	put := func(who string, p netip.Prefix, a netip.Addr) {
		if other, dup := seen[a]; dup {
			t.Errorf("%s and %s share %s", who, other, a)
		}
		seen[a] = who
		if !p.Contains(a) {
			t.Errorf("%s: %s is outside %s", who, a, p)
		}
	}
	put("gw", Underlay4, Gateway4)
	put("gw6", Underlay6, Gateway6)
	put("cp", Underlay4, ControlPlane4)
	put("cp6", Underlay6, ControlPlane6)
	put("out", Underlay4, Outside4)
	put("out6", Underlay6, Outside6)
	put("dns", Services4, DNS4)
	put("dns6", Services6, DNS6)
	put("api", Services4, APIService4)
	for i := 1; i <= MaxNodes; i++ {
		v4, v6 := NodeAddrs(i)
		put(NodeName(i), Underlay4, v4)
		put(NodeName(i), Underlay6, v6)
	}
	ranges := []netip.Prefix{Underlay4, Underlay6, Beyond4, Beyond6, Pods4, Pods6, Services4, Services6,
		netip.MustParsePrefix("fd00::/104")} // the default cluster pool of Lash
	for i, a := range ranges {
		for _, b := range ranges[i+1:] {
			if a.Overlaps(b) {
				t.Errorf("%s overlaps %s", a, b)
			}
		}
	}
}

func TestNodeNames(t *testing.T) {
	for _, bad := range []string{"", "n", "n0", "n01", "n151", "x1", "n-1", "1"} {
		if i, err := NodeIndex(bad); err == nil {
			t.Errorf("%q accepted as node %d", bad, i)
		}
	}
	if i, err := NodeIndex("n12"); err != nil || i != 12 {
		t.Errorf("n12: %d %v", i, err)
	}
}

func TestSandboxNames(t *testing.T) {
	for name, good := range map[string]bool{"lash": true, "a": true, "a-1": true, "": false, "-a": false, "a-": false, "A": false, "a b": false, "abcdefghijklmnopqrstu": false} {
		if (CheckName(name) == nil) != good {
			t.Errorf("CheckName(%q) = %v", name, CheckName(name))
		}
	}
}

func TestNodesTakeTheZonesInTurn(t *testing.T) {
	for i, want := range map[int]string{1: "zone-1", 3: "zone-3", 4: "zone-1", MaxNodes: "zone-3"} {
		if got := Zone(i); got != want {
			t.Errorf("node %d is in %s, want %s", i, got, want)
		}
	}
}
