// SPDX-License-Identifier: Apache-2.0

package ipam

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"sync"
	"testing"
)

func cidrs(s ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, c := range s {
		out = append(out, netip.MustParsePrefix(c))
	}
	return out
}

func ready(t *testing.T, s ...string) *Allocator {
	t.Helper()
	a := New("cluster-pool", true, false)
	if err := a.SetCIDRs(cidrs(s...)); err != nil {
		t.Fatal(err)
	}
	return a
}

func TestAllOf254AddressesAndNeverNetworkOrBroadcast(t *testing.T) {
	a := ready(t, "10.0.1.0/24")
	router, _, err := a.AllocateRouter()
	if err != nil || router != netip.MustParseAddr("10.0.1.1") {
		t.Fatalf("router %v, %v", router, err)
	}
	seen := map[netip.Addr]bool{router: true}
	for i := range 253 {
		v4, v6, err := a.Allocate(fmt.Sprint(i))
		if err != nil {
			t.Fatalf("address %d: %v", i, err)
		}
		if v6.IsValid() || seen[v4] || v4 == netip.MustParseAddr("10.0.1.0") || v4 == netip.MustParseAddr("10.0.1.255") {
			t.Fatalf("address %d is %v, %v", i, v4, v6)
		}
		seen[v4] = true
	}
	_, _, err = a.Allocate("one too many")
	if !errors.Is(err, ErrExhausted) || !strings.Contains(err.Error(), "10.0.1.0/24") || !strings.Contains(err.Error(), "cluster-pool-ipv4-mask-size") {
		t.Errorf("exhaustion says %v", err)
	}
	if u := a.Usage()[0]; u.Allocated != 254 || u.Total != 254 {
		t.Errorf("usage is %+v", u)
	}
	free := netip.MustParseAddr("10.0.1.77")
	a.Release(free)
	if v4, _, err := a.Allocate("again"); err != nil || v4 != free {
		t.Errorf("after a release got %v, %v", v4, err)
	}
}

func TestAReleasedAddressRests(t *testing.T) {
	a := ready(t, "10.0.1.0/24")
	first, _, _ := a.Allocate("a")
	a.Release(first)
	for range 253 {
		v4, _, err := a.Allocate("b")
		if err != nil || v4 == first {
			t.Fatalf("got %v, %v", v4, err)
		}
		a.Release(v4)
	}
	if v4, _, _ := a.Allocate("c"); v4 != first {
		t.Errorf("after a full round got %v, want %v", v4, first)
	}
}

func TestBothFamiliesOrNeither(t *testing.T) {
	a := New("kubernetes", true, true)
	if _, _, err := a.Allocate("x"); !errors.Is(err, ErrNoCIDR) || !strings.Contains(err.Error(), "IPv4 and IPv6") || !strings.Contains(err.Error(), "--allocate-node-cidrs") {
		t.Errorf("without CIDRs: %v", err)
	}
	changed, _ := a.Ready()
	if err := a.SetCIDRs(cidrs("10.0.0.0/24", "fd00::/126")); err != nil {
		t.Fatal(err)
	}
	select {
	case <-changed:
	default:
		t.Error("the change of CIDRs was not announced")
	}
	for i := range 2 {
		v4, v6, err := a.Allocate(fmt.Sprint(i))
		if err != nil || !v4.Is4() || !v6.Is6() {
			t.Fatalf("%v %v %v", v4, v6, err)
		}
	}
	before := len(a.Allocations())
	if _, _, err := a.Allocate("x"); !errors.Is(err, ErrExhausted) || !strings.Contains(err.Error(), "fd00::/126") {
		t.Errorf("exhausted IPv6: %v", err)
	}
	if len(a.Allocations()) != before {
		t.Error("a failed allocation kept an IPv4 address")
	}
}

func TestRestartKeepsAddresses(t *testing.T) {
	a := New("cluster-pool", true, false)
	// Checkpoints are read before the API server has told the CIDR.
	pod, router := netip.MustParseAddr("10.0.1.1"), netip.MustParseAddr("10.0.1.9")
	if err := a.Reserve(pod, "default/a"); err != nil {
		t.Fatal(err)
	}
	if err := a.Reserve(pod, "default/a"); err != nil {
		t.Errorf("reserving twice: %v", err)
	}
	if err := a.Reserve(pod, "default/b"); err == nil {
		t.Error("two owners of one address")
	}
	if err := a.SetCIDRs(cidrs("10.0.1.0/24")); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if got, _, err := a.AllocateRouter(router); err != nil || got != router {
			t.Errorf("router %v, %v; want %v", got, err, router)
		}
	}
	if got, _, _ := a.Allocate("default/b"); got == pod || got == router {
		t.Errorf("allocated %v again", got)
	}
}

func TestARouterAddressOutsideTheCIDROrOfAPodIsNotKept(t *testing.T) {
	a := ready(t, "10.0.1.0/24")
	pod := netip.MustParseAddr("10.0.1.5")
	if err := a.Reserve(pod, "default/a"); err != nil {
		t.Fatal(err)
	}
	for _, w := range []string{"10.9.9.9", "10.0.1.0", "10.0.1.255", "10.0.1.5"} {
		got, _, err := a.AllocateRouter(netip.MustParseAddr(w))
		if err != nil || got == netip.MustParseAddr(w) {
			t.Errorf("router for wish %s: %v, %v", w, got, err)
		}
	}
}

func TestBadCIDRsAreNamedAndOthersUsed(t *testing.T) {
	a := New("kubernetes", true, false)
	err := a.SetCIDRs(cidrs("10.0.0.0/31", "10.0.1.0/24", "10.0.1.128/25", "fd00::/64"))
	if err == nil || !strings.Contains(err.Error(), "10.0.0.0/31") || !strings.Contains(err.Error(), "10.0.1.128/25") {
		t.Errorf("got %v", err)
	}
	if _, _, err := a.Allocate("x"); err != nil {
		t.Error(err)
	}
}

func TestHugeIPv6CIDR(t *testing.T) {
	a := New("cluster-pool", false, true)
	if err := a.SetCIDRs(cidrs("fd00::/64", "fd01::/64")); err != nil {
		t.Fatal(err)
	}
	if _, v6, err := a.Allocate("x"); err != nil || v6 != netip.MustParseAddr("fd00::1") {
		t.Errorf("%v %v", v6, err)
	}
	if u := a.Usage()[0]; u.Total != 1<<64-1 {
		t.Errorf("total %d", u.Total)
	}
}

// Whatever is done in whatever order: an address has one owner, lies inside a CIDR, and exhaustion is reported exactly
// when all are taken.
func TestProperties(t *testing.T) {
	for seed := range uint64(50) {
		rng := rand.New(rand.NewPCG(seed, 9))
		bits := 26 + rng.IntN(5)
		c := netip.PrefixFrom(netip.MustParseAddr("10.7.0.0"), bits)
		extra := netip.PrefixFrom(netip.MustParseAddr("10.8.0.0"), bits)
		a := ready(t, c.String(), extra.String())
		total := int(a.Usage()[0].Total)
		have := map[netip.Addr]string{}
		for i := range 2000 {
			if rng.IntN(5) < 3 {
				owner := fmt.Sprint(i)
				addr, _, err := a.Allocate(owner)
				if len(have) == total {
					if !errors.Is(err, ErrExhausted) {
						t.Fatalf("seed %d: full, yet %v %v", seed, addr, err)
					}
					continue
				}
				if err != nil {
					t.Fatalf("seed %d: %d of %d in use, yet %v", seed, len(have), total, err)
				}
				if _, dup := have[addr]; dup || !(c.Contains(addr) || extra.Contains(addr)) || addr == c.Addr() || addr == extra.Addr() || addr == lastAddr(c) || addr == lastAddr(extra) {
					t.Fatalf("seed %d: bad address %v", seed, addr)
				}
				have[addr] = owner
			} else {
				for addr := range have {
					a.Release(addr)
					delete(have, addr)
					break
				}
			}
		}
		for _, al := range a.Allocations() {
			if have[al.Addr] != al.Owner {
				t.Fatalf("seed %d: %v", seed, al)
			}
		}
	}
}

func TestConcurrentAllocationsDiffer(t *testing.T) {
	a := ready(t, "10.0.0.0/20")
	var mu sync.Mutex
	seen := map[netip.Addr]bool{}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 200 {
				v4, _, err := a.Allocate("x")
				mu.Lock()
				if err != nil || seen[v4] {
					t.Errorf("%v %v", v4, err)
				}
				seen[v4] = true
				mu.Unlock()
			}
		})
	}
	wg.Wait()
}
