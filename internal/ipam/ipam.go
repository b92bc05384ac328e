// SPDX-License-Identifier: Apache-2.0

// Package ipam hands out the addresses of the local node's pod CIDRs, both families. It owns who has which address and
// nothing else: the CIDRs come from the node's object, the addresses in use after a restart from checkpoints and from
// the host device, so it keeps no file of its own.
package ipam

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strings"
	"sync"
)

// Router is the owner of the router addresses.
const Router = "router"

// ErrNoCIDR is returned while the node has no pod CIDR of an enabled family.
var ErrNoCIDR = errors.New("this node has no pod CIDR yet")

// ErrExhausted is returned when no address is left.
var ErrExhausted = errors.New("no address left")

// Allocator hands out addresses. Its methods may be called concurrently.
type Allocator struct {
	mode   string // ipam of the configuration, for errors
	v4, v6 bool

	mu      sync.Mutex
	owners  map[netip.Addr]string
	pools   [2]pool // IPv4, IPv6
	changed chan struct{}
}

type pool struct {
	cidrs []netip.Prefix
	last  netip.Addr // the address handed out last
}

// New returns an allocator for the enabled families; mode is the ipam mode, named in errors.
func New(mode string, ipv4, ipv6 bool) *Allocator {
	return &Allocator{mode: mode, v4: ipv4, v6: ipv6, owners: map[netip.Addr]string{}, changed: make(chan struct{})}
}

// SetCIDRs sets the node's pod CIDRs. CIDRs of a family that is off are ignored; addresses that were handed out of a
// CIDR that is gone stay with their owners until released.
func (a *Allocator) SetCIDRs(cidrs []netip.Prefix) error {
	var pools [2][]netip.Prefix
	var errs []error
	for _, c := range cidrs {
		f := family(c.Addr())
		if !a.enabled(f) {
			continue
		}
		if c.Addr().BitLen()-c.Bits() < 2 {
			errs = append(errs, fmt.Errorf("pod CIDR %s is too small: it needs a prefix length of at most %d", c, c.Addr().BitLen()-2))
			continue
		}
		if i := slices.IndexFunc(pools[f], c.Overlaps); i >= 0 {
			if pools[f][i] != c.Masked() {
				errs = append(errs, fmt.Errorf("pod CIDR %s overlaps %s", c, pools[f][i]))
			}
			continue
		}
		pools[f] = append(pools[f], c.Masked())
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	same := true
	for f := range pools {
		same = same && slices.Equal(pools[f], a.pools[f].cidrs)
		a.pools[f].cidrs = pools[f]
	}
	if !same {
		close(a.changed)
		a.changed = make(chan struct{})
	}
	return errors.Join(errs...)
}

// Ready returns nil if every enabled family has a CIDR, else an error that says what is missing and who must act, and
// a channel that is closed when the CIDRs change.
func (a *Allocator) Ready() (<-chan struct{}, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	var missing []string
	for f := range a.pools {
		if a.enabled(f) && len(a.pools[f].cidrs) == 0 {
			missing = append(missing, familyName(f))
		}
	}
	if len(missing) == 0 {
		return a.changed, nil
	}
	who := "lash-operator must put them into CiliumNode.spec.ipam.podCIDRs; see the operator's log"
	if a.mode == "kubernetes" {
		who = "the controller manager must put them into Node.spec.podCIDRs; start it with --allocate-node-cidrs and --cluster-cidr for each family"
	}
	return a.changed, fmt.Errorf("%w (%s): %s", ErrNoCIDR, strings.Join(missing, " and "), who)
}

// Allocate gives owner one new address of each enabled family, or nothing and an error.
func (a *Allocator) Allocate(owner string) (v4, v6 netip.Addr, err error) {
	if _, err := a.Ready(); err != nil {
		return v4, v6, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.v4 {
		if v4, err = a.take(0, owner); err != nil {
			return netip.Addr{}, netip.Addr{}, err
		}
	}
	if a.v6 {
		if v6, err = a.take(1, owner); err != nil {
			delete(a.owners, v4)
			return netip.Addr{}, netip.Addr{}, err
		}
	}
	return v4, v6, nil
}

// AllocateRouter returns the router addresses: those it already has, else wanted ones that lie in a CIDR and are free
// (so that a restart keeps them), else new ones.
func (a *Allocator) AllocateRouter(wanted ...netip.Addr) (v4, v6 netip.Addr, err error) {
	if _, err := a.Ready(); err != nil {
		return v4, v6, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	var got [2]netip.Addr
	for addr, owner := range a.owners {
		if f := family(addr); owner == Router && a.contains(f, addr) {
			got[f] = addr
		}
	}
	for _, w := range wanted {
		if !w.IsValid() {
			continue
		}
		f := family(w)
		_, taken := a.owners[w]
		if a.enabled(f) && !got[f].IsValid() && !taken && a.contains(f, w) {
			a.owners[w] = Router
			got[f] = w
		}
	}
	for f := range got {
		if !a.enabled(f) || got[f].IsValid() {
			continue
		}
		if got[f], err = a.take(f, Router); err != nil {
			return netip.Addr{}, netip.Addr{}, err
		}
	}
	return got[0], got[1], nil
}

// Reserve records that owner has addr, as found after a restart. It needs no CIDR. It is an error if another owner has
// the address.
func (a *Allocator) Reserve(addr netip.Addr, owner string) error {
	if !addr.IsValid() {
		return nil
	}
	addr = addr.Unmap()
	a.mu.Lock()
	defer a.mu.Unlock()
	if have, ok := a.owners[addr]; ok && have != owner {
		return fmt.Errorf("address %s belongs to %s", addr, have)
	}
	a.owners[addr] = owner
	return nil
}

// Release gives addresses back; an address that nobody has is no error.
func (a *Allocator) Release(addrs ...netip.Addr) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, addr := range addrs {
		delete(a.owners, addr.Unmap())
	}
}

// Usage is one family's use of its CIDRs.
type Usage struct {
	Family    string // IPv4 or IPv6
	Allocated uint64
	Total     uint64 // usable addresses; saturates at the largest uint64
	CIDRs     []netip.Prefix
}

// Usage returns the enabled families, IPv4 first.
func (a *Allocator) Usage() []Usage {
	a.mu.Lock()
	defer a.mu.Unlock()
	var out []Usage
	for f := range a.pools {
		if !a.enabled(f) {
			continue
		}
		u := Usage{Family: familyName(f), CIDRs: slices.Clone(a.pools[f].cidrs)}
		for addr := range a.owners {
			if family(addr) == f {
				u.Allocated++
			}
		}
		for _, c := range u.CIDRs {
			u.Total = saturatingAdd(u.Total, usable(c))
		}
		out = append(out, u)
	}
	return out
}

// Allocation is one address in use.
type Allocation struct {
	Addr  netip.Addr
	Owner string
}

// Allocations returns the addresses in use, sorted.
func (a *Allocator) Allocations() []Allocation {
	a.mu.Lock()
	defer a.mu.Unlock()
	out := make([]Allocation, 0, len(a.owners))
	for addr, owner := range a.owners {
		out = append(out, Allocation{addr, owner})
	}
	slices.SortFunc(out, func(x, y Allocation) int { return x.Addr.Compare(y.Addr) })
	return out
}

// take hands out the next free address after the last one, so that a released address rests as long as possible.
func (a *Allocator) take(f int, owner string) (netip.Addr, error) {
	p := &a.pools[f]
	start := 0
	addr := p.last
	if i := slices.IndexFunc(p.cidrs, func(c netip.Prefix) bool { return addr.IsValid() && c.Contains(addr) }); i >= 0 {
		start = i
	} else {
		addr = netip.Addr{}
	}
	// One round over all CIDRs, ending where it began; in a large CIDR a free address comes after at most one more
	// step than there are owners.
	for n := 0; n <= len(p.cidrs); n++ {
		c := p.cidrs[(start+n)%len(p.cidrs)]
		if !addr.IsValid() || !c.Contains(addr) {
			addr = c.Addr()
		}
		end := lastAddr(c)
		for addr = addr.Next(); addr != end && c.Contains(addr); addr = addr.Next() {
			if _, taken := a.owners[addr]; !taken {
				a.owners[addr] = owner
				p.last = addr
				return addr, nil
			}
		}
		addr = netip.Addr{}
	}
	var total uint64
	for _, c := range p.cidrs {
		total = saturatingAdd(total, usable(c))
	}
	remedy := "Node.spec.podCIDRs"
	if a.mode != "kubernetes" {
		remedy = fmt.Sprintf("cluster-pool-%s-mask-size", strings.ToLower(familyName(f)))
	}
	return netip.Addr{}, fmt.Errorf("%w in the %s pod CIDR %s of this node, all %d are in use: delete pods of the node, lower the kubelet's maxPods, or give nodes larger pod CIDRs (%s)",
		ErrExhausted, familyName(f), joined(p.cidrs), total, remedy)
}

func (a *Allocator) contains(f int, addr netip.Addr) bool {
	return slices.ContainsFunc(a.pools[f].cidrs, func(c netip.Prefix) bool {
		return c.Contains(addr) && addr != c.Addr() && addr != lastAddr(c)
	})
}

func (a *Allocator) enabled(f int) bool {
	if f == 0 {
		return a.v4
	}
	return a.v6
}

func family(addr netip.Addr) int {
	if addr.Is4() {
		return 0
	}
	return 1
}

func familyName(f int) string { return [2]string{"IPv4", "IPv6"}[f] }

// usable is the number of addresses of c without the first (network) and the last (broadcast).
func usable(c netip.Prefix) uint64 {
	host := c.Addr().BitLen() - c.Bits()
	if host >= 64 {
		return math.MaxUint64
	}
	return 1<<host - 2
}

func saturatingAdd(a, b uint64) uint64 {
	if a+b < a {
		return math.MaxUint64
	}
	return a + b
}

func lastAddr(c netip.Prefix) netip.Addr {
	b := c.Masked().Addr().AsSlice()
	for i := c.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 1 << (7 - i%8)
	}
	last, _ := netip.AddrFromSlice(b)
	return last
}

func joined(cidrs []netip.Prefix) string {
	s := make([]string, len(cidrs))
	for i, c := range cidrs {
		s[i] = c.String()
	}
	return strings.Join(s, ", ")
}
