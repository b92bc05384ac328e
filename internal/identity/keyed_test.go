// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/state"
)

// Whatever changes, rows that follow changes are those that are computed at once: no source is forgotten.
func TestRowsThatFollowChangesAreThoseOfTheWhole(t *testing.T) {
	addresses := cmp.Options{cmp.Comparer(func(a, b netip.Addr) bool { return a == b })}
	for seed := range uint64(10) {
		rng := rand.New(rand.NewPCG(seed, 5))
		x := newTables(t)
		cfg := config(t, "")
		stage, pending, published := Stage(x, cfg), Pending(x), Published(x)
		name := func() string { return fmt.Sprint("p", rng.IntN(8)) }
		some := func() map[string]string { return labelled(rng.IntN(4)) }
		ip := func(n int) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, 1, byte(n)}) }
		for step := range 300 {
			switch n := name(); rng.IntN(12) {
			case 0, 1, 2:
				p := pod(n, some())
				p.UID += fmt.Sprint(rng.IntN(2))
				p.HostNetwork, p.Terminating = rng.IntN(9) == 0, rng.IntN(5) == 0
				if rng.IntN(2) == 0 {
					p.IPs = []netip.Addr{ip(rng.IntN(8))}
				}
				state.Insert(x.DB, x.Pods, p)
			case 3:
				state.Delete(x.DB, x.Pods, state.Pod{Namespace: "default", Name: n})
			case 4, 5:
				for _, r := range state.Rows(x.DB.ReadTxn(), x.PodIdentities) {
					if rng.IntN(4) == 0 {
						state.Insert(x.DB, x.Identities, state.Identity{ID: model.Identity(256 + rng.IntN(6)), Labels: r.Labels, Created: int64(rng.IntN(3)), Unused: rng.IntN(3) == 0})
					}
				}
			case 6:
				state.Delete(x.DB, x.Identities, state.Identity{ID: model.Identity(256 + rng.IntN(6))})
			case 7:
				state.Insert(x.DB, x.Namespaces, state.Namespace{Name: "default", Labels: map[string]string{"team": fmt.Sprint(rng.IntN(2))}})
			case 8:
				state.Delete(x.DB, x.Namespaces, state.Namespace{Name: "default"})
			case 9:
				id := 1 + rng.IntN(4)
				state.Insert(x.DB, x.Endpoints, model.Endpoint{ID: uint16(id), Namespace: "default", Pod: n, IPv4: ip(id), State: model.EndpointReady})
			case 10:
				state.Delete(x.DB, x.Endpoints, model.Endpoint{ID: uint16(1 + rng.IntN(4))})
			case 11:
				state.Insert(x.DB, x.Local, model.Node{Name: "n1", Local: true, Addrs: []netip.Addr{ip(200 + rng.IntN(2))}, PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.0.1.0/24")}})
			}
			stage.Step(x.DB)
			before := state.Rows(x.DB.ReadTxn(), x.PodIdentities)
			Stage(x, cfg).Step(x.DB)
			if d := cmp.Diff(state.Rows(x.DB.ReadTxn(), x.PodIdentities), before); d != "" {
				t.Fatalf("seed %d, step %d: pod-identities (-whole +followed)\n%s", seed, step, d)
			}
			if d := cmp.Diff(Pending(x)().Rows, pending().Rows); d != "" {
				t.Fatalf("seed %d, step %d: pending (-whole +followed)\n%s", seed, step, d)
			}
			if d := cmp.Diff(Published(x)().Rows, published().Rows, addresses); d != "" {
				t.Fatalf("seed %d, step %d: published (-whole +followed)\n%s", seed, step, d)
			}
		}
	}
}
