// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/lash-net/lash/sandbox/testbed"
)

// seen is what two pings look like where captures are taken, in a mode.
func seen(mode string) map[string][]frame {
	const client, clientHost, web, webHost = "a1 > a2", "a2 > a1", "b1 > b2", "b2 > b1"
	n1, n2 := nodeAddr("n1", "v4"), nodeAddr("n2", "v4")
	got := map[string][]frame{}
	tunnel := mode == "vxlan"
	for range 2 {
		for _, reply := range []bool{false, true} {
			own, delivered, ttl := client, webHost, uint8(63)
			outer := frame{reply: reply, vni: 1000, port: 8472, oSrc: n1, oDst: n2, tunnelled: true, macs: client, ttl: 64}
			from, to := "source pod", "destination pod"
			if reply {
				own, delivered, from, to = web, clientHost, to, from
				outer.vni, outer.oSrc, outer.oDst, outer.macs = 2000, n2, n1, web
			}
			if !tunnel {
				outer, ttl = frame{reply: reply, macs: "n1 > n2", ttl: 63}, 62
			}
			got[from] = append(got[from], frame{reply: reply, macs: own, ttl: 64})
			got[to] = append(got[to], frame{reply: reply, macs: delivered, ttl: ttl})
			got["n1"], got["n2"] = append(got["n1"], outer), append(got["n2"], outer)
			if tunnel {
				bare := frame{reply: reply, macs: outer.macs, ttl: 64}
				got["n1 tunnel"], got["n2 tunnel"] = append(got["n1 tunnel"], bare), append(got["n2 tunnel"], bare)
			}
		}
	}
	return got
}

func TestWhatIsSeenOnTheWireIsJudged(t *testing.T) {
	ids := map[bool]uint32{false: 1000, true: 2000}
	for mode := range testbed.Modes {
		if err := judge(mode, seen(mode), ids); err != nil {
			t.Errorf("%s: %v", mode, err)
		}
	}
	for _, tc := range []struct {
		mode, place, says string
		change            func(*frame)
	}{
		{"vxlan", "n1", "VNI 7", func(f *frame) { f.vni = 7 }},
		{"vxlan", "n2", "VNI", func(f *frame) { f.vni = 3000 - f.vni }}, // the receiver's
		{"vxlan", "n1", "port 4789", func(f *frame) { f.port = 4789 }},
		{"vxlan", "n1", "from 192.0.2.1", func(f *frame) { f.oSrc = netip.MustParseAddr("192.0.2.1") }},
		{"vxlan", "n2", "encapsulated: false", func(f *frame) { f.tunnelled = false }},
		{"vxlan", "n1", "inside is x > y", func(f *frame) { f.macs = "x > y" }},
		{"vxlan", "n2 tunnel", "inside is x > y", func(f *frame) { f.macs = "x > y" }},
		{"vxlan", "n1 tunnel", "with TTL 63", func(f *frame) { f.ttl = 63 }},
		{"vxlan", "destination pod", "delivered with 62", func(f *frame) { f.ttl-- }},
		{"vxlan", "source pod", "delivered", func(f *frame) { f.macs = "x > y" }},
		{"native", "n2", "encapsulated: true", func(f *frame) { f.tunnelled = true }},
	} {
		got := seen(tc.mode)
		for i := range got[tc.place] {
			tc.change(&got[tc.place][i])
		}
		if err := judge(tc.mode, got, ids); err == nil || !strings.Contains(err.Error(), tc.says) {
			t.Errorf("%s, %s: %v, want %q", tc.mode, tc.place, err, tc.says)
		}
	}
	for _, place := range slices.Sorted(maps.Keys(seen("vxlan"))) {
		got := seen("vxlan")
		got[place] = got[place][1:]
		if judge("vxlan", got, ids) == nil {
			t.Errorf("a packet missing at %s is no fault", place)
		}
		delete(got, place)
		if judge("vxlan", got, ids) == nil {
			t.Errorf("no packets at %s are no fault", place)
		}
	}
}
