// SPDX-License-Identifier: Apache-2.0

package podcidr

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

var start = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func pfx(s string) netip.Prefix { return netip.MustParsePrefix(s) }

func pool4(mask int, cidrs ...string) Pool {
	p := Pool{Family: "IPv4", MaskSize: mask, CIDRKey: "cluster-pool-ipv4-cidr"}
	for _, c := range cidrs {
		p.CIDRs = append(p.CIDRs, pfx(c))
	}
	return p
}

func pool6(mask int, cidrs ...string) Pool {
	p := Pool{Family: "IPv6", MaskSize: mask, CIDRKey: "cluster-pool-ipv6-cidr"}
	for _, c := range cidrs {
		p.CIDRs = append(p.CIDRs, pfx(c))
	}
	return p
}

func TestPlan(t *testing.T) {
	for _, tt := range []struct {
		name  string
		pools []Pool
		nodes []Node
		avoid []netip.Prefix
		want  map[string]string // CIDRs, or ! and a part of the error
	}{
		{"both families, in the order of creation", []Pool{pool4(24, "10.0.0.0/8"), pool6(120, "fd00::/104")},
			[]Node{{Name: "b", Created: start}, {Name: "a", Created: start.Add(time.Second)}}, nil,
			map[string]string{"b": "10.0.0.0/24,fd00::/120", "a": "10.0.1.0/24,fd00::100/120"}},
		{"the gap is filled", []Pool{pool4(24, "10.0.0.0/16")},
			[]Node{{Name: "a", PodCIDRs: []string{"10.0.0.0/24"}}, {Name: "b", PodCIDRs: []string{"10.0.2.0/24"}}, {Name: "c"}}, nil,
			map[string]string{"a": "10.0.0.0/24", "b": "10.0.2.0/24", "c": "10.0.1.0/24"}},
		{"a missing family is added", []Pool{pool4(24, "10.0.0.0/16"), pool6(120, "fd00::/104")},
			[]Node{{Name: "a", PodCIDRs: []string{"fd00::300/120"}}}, nil,
			map[string]string{"a": "10.0.0.0/24,fd00::300/120"}},
		{"an allocation outside of the pool is kept", []Pool{pool4(24, "10.0.0.0/16")},
			[]Node{{Name: "a", PodCIDRs: []string{"192.168.7.0/24"}}}, nil,
			map[string]string{"a": "192.168.7.0/24"}},
		{"an allocation of another size is kept and kept clear of", []Pool{pool4(24, "10.0.0.0/16")},
			[]Node{{Name: "a", PodCIDRs: []string{"10.0.0.0/22"}}, {Name: "b", PodCIDRs: []string{"10.0.4.128/25"}}, {Name: "c"}}, nil,
			map[string]string{"a": "10.0.0.0/22", "b": "10.0.4.128/25", "c": "10.0.5.0/24"}},
		{"node addresses and service ranges are avoided", []Pool{pool4(24, "10.0.0.0/8")},
			[]Node{{Name: "a"}, {Name: "b"}}, []netip.Prefix{pfx("10.0.0.7/32"), pfx("10.0.1.0/24"), pfx("10.0.2.0/23")},
			map[string]string{"a": "10.0.4.0/24", "b": "10.0.5.0/24"}},
		{"the second CIDR of a pool is used after the first", []Pool{pool4(24, "10.1.0.0/24", "10.9.0.0/23")},
			[]Node{{Name: "a"}, {Name: "b"}, {Name: "c"}, {Name: "d"}}, nil,
			map[string]string{"a": "10.1.0.0/24", "b": "10.9.0.0/24", "c": "10.9.1.0/24", "d": "!no /24 is left in the IPv4 pool 10.1.0.0/24, 10.9.0.0/23: add a CIDR to cluster-pool-ipv4-cidr"}},
		{"an exhausted family does not hold the other back", []Pool{pool4(24, "10.1.0.0/24"), pool6(120, "fd00::/104")},
			[]Node{{Name: "a"}, {Name: "b"}}, nil,
			map[string]string{"a": "10.1.0.0/24,fd00::/120", "b": "fd00::100/120!no /24 is left"}},
		{"the older of two nodes with the same CIDR is right", []Pool{pool4(24, "10.0.0.0/16")},
			[]Node{{Name: "a", Created: start.Add(1), PodCIDRs: []string{"10.0.0.0/24"}}, {Name: "b", Created: start, PodCIDRs: []string{"10.0.0.0/24"}}, {Name: "c"}}, nil,
			map[string]string{"a": "10.0.0.0/24!spec.ipam.podCIDRs[0]=10.0.0.0/24 overlaps a pod CIDR of node b: drain this node", "b": "10.0.0.0/24", "c": "10.0.1.0/24"}},
		{"a malformed CIDR is named", []Pool{pool4(24, "10.0.0.0/16")},
			[]Node{{Name: "a", PodCIDRs: []string{"10.0.0.1/24"}}, {Name: "b", PodCIDRs: []string{"x"}}, {Name: "c"}}, nil,
			map[string]string{"a": `10.0.0.1/24!spec.ipam.podCIDRs[0]="10.0.0.1/24" is not a CIDR: remove it`, "b": `x!spec.ipam.podCIDRs[0]="x"`, "c": "10.0.0.0/24"}},
		{"the last address there is", []Pool{pool4(24, "255.255.255.0/24")},
			[]Node{{Name: "a"}, {Name: "b"}}, nil, map[string]string{"a": "255.255.255.0/24", "b": "!no /24 is left"}},
		{"a huge pool", []Pool{pool6(120, "fd00::/16")},
			[]Node{{Name: "a"}}, []netip.Prefix{pfx("fd00::/17")}, map[string]string{"a": "fd00:8000::/120"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for range 5 {
				rand.Shuffle(len(tt.nodes), func(i, j int) { tt.nodes[i], tt.nodes[j] = tt.nodes[j], tt.nodes[i] })
				got := Plan(tt.pools, tt.nodes, tt.avoid)
				for name, want := range tt.want {
					cidrs, errText, _ := strings.Cut(want, "!")
					r := got[name]
					if strings.Join(r.PodCIDRs, ",") != cidrs {
						t.Errorf("%s: got %v, want %s", name, r.PodCIDRs, cidrs)
					}
					if (r.Err != nil) != (errText != "") || r.Err != nil && !strings.Contains(r.Err.Error(), errText) {
						t.Errorf("%s: error %v, want %q", name, r.Err, errText)
					}
				}
			}
		})
	}
}

// TestPlanProperties checks what must hold on random clusters: small pools, so that blocks collide and run out.
func TestPlanProperties(t *testing.T) {
	for seed := range uint64(2000) {
		r := rand.New(rand.NewPCG(seed, 1))
		pools := []Pool{pool4(24+r.IntN(4), "10.0.0.0/22", "10.8.0.0/23"), pool6(120+r.IntN(4), "fd00::/118")}
		var nodes []Node
		for i := range r.IntN(30) {
			n := Node{Name: fmt.Sprintf("n%d", i), Created: start.Add(time.Duration(r.IntN(5)) * time.Second)}
			if r.IntN(3) == 0 {
				n.PodCIDRs = append(n.PodCIDRs, pfx(fmt.Sprintf("10.0.%d.%d/%d", r.IntN(6), r.IntN(256), 22+r.IntN(6))).Masked().String())
			}
			if r.IntN(3) == 0 {
				n.PodCIDRs = append(n.PodCIDRs, pfx(fmt.Sprintf("fd00::%x00/%d", r.IntN(8), 118+r.IntN(4))).Masked().String())
			}
			nodes = append(nodes, n)
		}
		var avoid []netip.Prefix
		for range r.IntN(4) {
			avoid = append(avoid, pfx(fmt.Sprintf("10.0.%d.%d/32", r.IntN(4), r.IntN(256))))
		}

		results := Plan(pools, nodes, avoid)

		shuffled := slices.Clone(nodes)
		r.Shuffle(len(shuffled), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
		if again := Plan(pools, shuffled, avoid); !sameResults(again, results) {
			t.Fatalf("seed %d: another order of nodes gives another plan:\n%v\n%v", seed, results, again)
		}

		var all []netip.Prefix
		for _, n := range nodes {
			for _, c := range results[n.Name].PodCIDRs {
				all = append(all, pfx(c))
			}
		}
		for i := range nodes {
			n, res := nodes[i], results[nodes[i].Name]
			for _, c := range n.PodCIDRs {
				if !slices.Contains(res.PodCIDRs, c) {
					t.Fatalf("seed %d: %s lost %s", seed, n.Name, c)
				}
			}
			for _, c := range res.PodCIDRs {
				if slices.Contains(n.PodCIDRs, c) {
					continue
				}
				p, overlapping := pfx(c), 0
				for _, q := range all {
					if p.Overlaps(q) {
						overlapping++ // p itself is one
					}
				}
				if overlapping != 1 || slices.ContainsFunc(avoid, p.Overlaps) {
					t.Fatalf("seed %d: %s got %s, which is not free", seed, n.Name, c)
				}
				if !slices.ContainsFunc(pools, func(pool Pool) bool {
					return p.Bits() == pool.MaskSize && slices.ContainsFunc(pool.CIDRs, func(q netip.Prefix) bool { return q.Contains(p.Addr()) })
				}) {
					t.Fatalf("seed %d: %s got %s, which is not of the pools", seed, n.Name, c)
				}
			}
			if res.Err != nil && strings.Contains(res.Err.Error(), "is left") {
				pool := pools[0]
				if strings.Contains(res.Err.Error(), "IPv6") {
					pool = pools[1]
				}
				if free, ok := anyFree(pool, append(all, avoid...)); ok {
					t.Fatalf("seed %d: %s got nothing though %s is free", seed, n.Name, free)
				}
			}
		}

		for i := range nodes {
			nodes[i].PodCIDRs = results[nodes[i].Name].PodCIDRs
		}
		for name, res := range Plan(pools, nodes, avoid) {
			if res.Changed {
				t.Fatalf("seed %d: planning twice changed %s to %v", seed, name, res.PodCIDRs)
			}
		}
	}
}

func TestFiveThousandNodesAreTheSamePlanTwice(t *testing.T) {
	pools, nodes, avoid := fiveThousand()
	results := Plan(pools, nodes, avoid)
	for i := range nodes {
		nodes[i].PodCIDRs = results[nodes[i].Name].PodCIDRs
	}
	for name, again := range Plan(pools, nodes, avoid) {
		if again.Changed || again.Err != nil || !slices.Equal(again.PodCIDRs, results[name].PodCIDRs) {
			t.Fatalf("%s has %v and gets %+v", name, results[name].PodCIDRs, again)
		}
	}
	if got := results["node-4999"].PodCIDRs; !slices.Equal(got, []string{"10.35.135.0/24", "fd00::13:8700/120"}) {
		t.Errorf("last node has %v", got)
	}
}

func BenchmarkPlanFiveThousandNodes(b *testing.B) {
	pools, nodes, avoid := fiveThousand()
	for b.Loop() {
		Plan(pools, nodes, avoid)
	}
}

// fiveThousand are new nodes, a pool of each family, and as many other prefixes to keep away from.
func fiveThousand() (pools []Pool, nodes []Node, avoid []netip.Prefix) {
	avoid = []netip.Prefix{pfx("10.0.0.0/12")}
	for i := range 5000 {
		nodes = append(nodes, Node{Name: fmt.Sprintf("node-%04d", i)})
		avoid = append(avoid, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 200, byte(i >> 8), byte(i)}), 32))
	}
	return []Pool{pool4(24, "10.0.0.0/8"), pool6(120, "fd00::/104")}, nodes, avoid
}

func TestOverlapsAreDescribed(t *testing.T) {
	got := Overlaps([]Pool{pool4(24, "10.0.0.0/8")}, []netip.Prefix{pfx("10.0.0.1/32"), pfx("192.0.2.1/32"), pfx("10.0.0.2/32")}, "node addresses")
	if len(got) != 1 || !strings.Contains(got[0], "pool 10.0.0.0/8 contains node addresses 10.0.0.1/32, 10.0.0.2/32") {
		t.Errorf("got %q", got)
	}
}

func sameResults(a, b map[string]Result) bool {
	text := func(m map[string]Result) map[string]string {
		out := map[string]string{}
		for k, v := range m {
			out[k] = fmt.Sprint(v.PodCIDRs, v.Changed, v.Err)
		}
		return out
	}
	return reflect.DeepEqual(text(a), text(b))
}

func anyFree(pool Pool, taken []netip.Prefix) (netip.Prefix, bool) {
	for _, cidr := range pool.CIDRs {
		for a := cidr.Addr(); a.IsValid() && cidr.Contains(a); a = after(netip.PrefixFrom(a, pool.MaskSize)) {
			p := netip.PrefixFrom(a, pool.MaskSize)
			if !slices.ContainsFunc(taken, p.Overlaps) {
				return p, true
			}
		}
	}
	return netip.Prefix{}, false
}
