// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"log/slog"
	"net/netip"
	"testing"
	"time"

	"github.com/lash-net/lash/bpf"
	"github.com/lash-net/lash/internal/model"
)

// A pod that comes or goes where the way was the same before makes nothing slow at once; whatever changes a way, or who
// somebody is, does.
func TestEpochRisesAtOnceWhereDecisionsChange(t *testing.T) {
	d := withMaps(t, Config{})
	d.log = slog.New(slog.DiscardHandler)
	node, other := netip.MustParseAddr("172.18.0.12"), netip.MustParseAddr("172.18.0.13")
	world := model.IPCacheEntry{Identity: model.IdentityWorld}
	at := func(id model.Identity, node netip.Addr, tunnel bool) *model.IPCacheEntry {
		return &model.IPCacheEntry{Identity: id, Node: node, Tunnel: tunnel}
	}
	epoch := func() uint32 {
		var rt bpf.Runtime
		if err := d.maps["lash_runtime"].Lookup(uint32(0), &rt); err != nil {
			t.Fatal(err)
		}
		return rt.Epoch
	}
	for _, step := range []struct {
		what   string
		prefix string
		row    *model.IPCacheEntry // nil: deleted
		atOnce bool
	}{
		{"everything else", "0.0.0.0/0", &world, true},
		{"a node's pod CIDR", "10.0.2.0/24", at(model.IdentityWorld, node, true), true},
		{"a pod of it", "10.0.2.1/32", at(300, node, true), false},
		{"the same again", "10.0.2.1/32", at(300, node, true), false},
		{"its labels edited", "10.0.2.1/32", at(301, node, true), true},
		{"a pod moves there from another way", "10.0.2.1/32", at(301, other, true), true},
		{"it goes, and what is left leads elsewhere", "10.0.2.1/32", nil, true},
		{"a pod beside the tunnel", "10.0.2.2/32", at(302, node, false), true},
		{"it goes", "10.0.2.2/32", nil, true},
		{"a pod", "10.0.2.3/32", at(303, node, true), false},
		{"it goes", "10.0.2.3/32", nil, false},
		{"a known address outside", "192.0.2.1/32", at(model.IdentityLocal, netip.Addr{}, false), true},
		{"an address outside that is a node's", "192.0.2.2/32", at(model.IdentityRemoteNode, netip.Addr{}, false), true},
		{"a node that may encapsulate", "172.18.0.12/32", &model.IPCacheEntry{Identity: model.IdentityRemoteNode, Peer: true}, true},
		{"of the other family, where nothing is known", "fd00::1/128", at(304, node, true), true},
		{"the pod CIDR leaves the tunnel", "10.0.2.0/24", at(model.IdentityWorld, node, false), true},
	} {
		before, p := epoch(), netip.MustParsePrefix(step.prefix)
		var err error
		if step.row != nil {
			err = d.IPCache().Put(t.Context(), p, *step.row)
		} else {
			err = d.IPCache().Delete(t.Context(), p)
		}
		if err != nil {
			t.Fatal(err)
		}
		if err := d.RaiseForIPCache(); err != nil {
			t.Fatal(err)
		}
		if raised := epoch() != before; raised != step.atOnce {
			t.Errorf("%s: epoch raised at once: %v", step.what, raised)
		}
		if late := d.epochs.late != nil; late == step.atOnce {
			t.Errorf("%s: raised later: %v", step.what, late)
		}
		d.epochs.settle()
	}

	// Many changes are one late raise, an urgent one in between is good for those before it, and nothing due is lost at the end.
	before := epoch()
	pod := func(i byte) {
		if err := d.IPCache().Put(t.Context(), netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, 2, i}), 32), *at(300, node, false)); err != nil {
			t.Fatal(err)
		}
		if err := d.RaiseForIPCache(); err != nil {
			t.Fatal(err)
		}
	}
	for i := range byte(100) {
		pod(i)
	}
	if epoch() != before {
		t.Error("raised for each pod")
	}
	time.Sleep(lateRaise + 200*time.Millisecond)
	if epoch() != before+1 {
		t.Errorf("raised %d times for a burst", epoch()-before)
	}
	pod(200)
	d.Raise("test")
	time.Sleep(lateRaise + 200*time.Millisecond)
	if epoch() != before+2 {
		t.Errorf("raised %d times, want 2", epoch()-before)
	}
	pod(201)
	if !d.epochs.settle() {
		t.Error("nothing was due")
	}
}
