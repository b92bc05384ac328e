// SPDX-License-Identifier: Apache-2.0

// Package podcidr decides which node has which CIDR for its pods: the arithmetic of ipam cluster-pool, without
// Kubernetes. Plan reads pools and nodes and writes nothing but its result.
//
// What must hold, whatever the input:
//
//   - a CIDR a node has is never changed or taken away, for pods may be using it;
//   - no two nodes get overlapping CIDRs, and no node gets one that overlaps an address in Avoid;
//   - planning again on the result of a plan changes nothing, and the order of nodes does not matter;
//   - one node's trouble leaves the others alone.
package podcidr

import (
	"cmp"
	"errors"
	"fmt"
	"math/big"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// Pool is the address space of one family.
type Pool struct {
	Family   string         // "IPv4" or "IPv6", for errors
	CIDRs    []netip.Prefix // disjoint, in the order they are used
	MaskSize int            // prefix length of a node's part
	CIDRKey  string         // the configuration key that enlarges the pool
}

// Node is a node as far as Plan is concerned.
type Node struct {
	Name     string
	Created  time.Time
	PodCIDRs []string // as stored, unchecked
}

// Result is what a node should have. Err says why something is missing; the rest is valid all the same.
type Result struct {
	PodCIDRs []string
	Changed  bool
	Err      error
}

// Plan returns the result for every node, by name. Names are unique. Avoid lists what must not be handed out: addresses
// of nodes, service ranges. Among nodes with overlapping CIDRs the oldest is right.
func Plan(pools []Pool, nodes []Node, avoid []netip.Prefix) map[string]Result {
	nodes = slices.Clone(nodes)
	slices.SortFunc(nodes, func(a, b Node) int {
		return cmp.Or(a.Created.Compare(b.Created), strings.Compare(a.Name, b.Name))
	})

	used := newTaken(avoid)
	results := make(map[string]Result, len(nodes))
	has := make(map[string][]netip.Prefix, len(nodes))
	for _, n := range nodes {
		var errs []error
		for i, s := range n.PodCIDRs {
			p, err := netip.ParsePrefix(s)
			if err != nil || p.Masked() != p {
				errs = append(errs, fmt.Errorf("spec.ipam.podCIDRs[%d]=%q is not a CIDR: remove it and another is assigned", i, s))
				continue
			}
			if owner, ok := used.owner(p); ok && owner != n.Name {
				errs = append(errs, fmt.Errorf("spec.ipam.podCIDRs[%d]=%s overlaps a pod CIDR of node %s: drain this node and delete its CiliumNode to get another", i, p, owner))
			}
			used.add(p, n.Name)
			has[n.Name] = append(has[n.Name], p)
		}
		results[n.Name] = Result{PodCIDRs: n.PodCIDRs, Err: errors.Join(errs...)}
	}

	cursors := make([]cursor, len(pools))
	for _, n := range nodes {
		r := results[n.Name]
		if r.Err != nil {
			continue // a person must look at it first
		}
		var errs []error
		for i, pool := range pools {
			if slices.ContainsFunc(has[n.Name], func(p netip.Prefix) bool { return p.Addr().Is6() == pool.ipv6() }) {
				continue
			}
			p, ok := cursors[i].next(pool, used)
			if !ok {
				errs = append(errs, exhausted(pool))
				continue
			}
			used.add(p, n.Name)
			r.PodCIDRs = insert(r.PodCIDRs, p)
			r.Changed = true
		}
		r.Err = errors.Join(errs...)
		results[n.Name] = r
	}
	return results
}

// Overlaps describes which of avoid lie in the pools, at most one line a pool and family of things.
func Overlaps(pools []Pool, avoid []netip.Prefix, what string) []string {
	var out []string
	for _, pool := range pools {
		for _, cidr := range pool.CIDRs {
			var in []string
			for _, p := range avoid {
				if p.Overlaps(cidr) {
					in = append(in, p.String())
				}
			}
			if len(in) == 0 {
				continue
			}
			slices.Sort(in)
			shown := strings.Join(in[:min(3, len(in))], ", ")
			if len(in) > 3 {
				shown += fmt.Sprintf(" and %d more", len(in)-3)
			}
			out = append(out, fmt.Sprintf("pool %s contains %s %s: they are not handed out to pods, but choose a pool apart from them (%s)", cidr, what, shown, pool.CIDRKey))
		}
	}
	return out
}

func (p Pool) ipv6() bool { return p.Family == "IPv6" }

func exhausted(pool Pool) error {
	var cidrs []string
	for _, c := range pool.CIDRs {
		cidrs = append(cidrs, c.String())
	}
	return fmt.Errorf("no /%d is left in the %s pool %s: add a CIDR to %s", pool.MaskSize, pool.Family, strings.Join(cidrs, ", "), pool.CIDRKey)
}

// insert keeps IPv4 before IPv6 and otherwise the order there was.
func insert(cidrs []string, p netip.Prefix) []string {
	cidrs = slices.Clone(cidrs)
	if p.Addr().Is4() {
		return slices.Insert(cidrs, 0, p.String())
	}
	return append(cidrs, p.String())
}

// taken is the set of prefixes that are in use, for questions both ways: what contains p, what does p contain. The first
// costs one map access a prefix length in use, the second a binary search.
type taken struct {
	byPrefix map[netip.Prefix]string // the owner, "" for what is to be avoided
	sorted   []netip.Prefix          // by address, then by length
	lengths  map[bool][]int          // IPv6 or not -> prefix lengths in use, sorted
}

func newTaken(avoid []netip.Prefix) *taken {
	t := &taken{byPrefix: map[netip.Prefix]string{}, lengths: map[bool][]int{}}
	for _, p := range avoid {
		t.add(p.Masked(), "")
	}
	return t
}

func (t *taken) add(p netip.Prefix, owner string) {
	if o, ok := t.byPrefix[p]; ok {
		if o == "" {
			t.byPrefix[p] = owner
		}
		return
	}
	t.byPrefix[p] = owner
	i, _ := slices.BinarySearchFunc(t.sorted, p, comparePrefixes)
	t.sorted = slices.Insert(t.sorted, i, p)
	lengths := t.lengths[p.Addr().Is6()]
	if i, ok := slices.BinarySearch(lengths, p.Bits()); !ok {
		t.lengths[p.Addr().Is6()] = slices.Insert(lengths, i, p.Bits())
	}
}

// covering returns the shortest prefix in use that contains p.
func (t *taken) covering(p netip.Prefix) (netip.Prefix, bool) {
	for _, bits := range t.lengths[p.Addr().Is6()] {
		if bits > p.Bits() {
			break
		}
		q := netip.PrefixFrom(p.Addr(), bits).Masked()
		if _, ok := t.byPrefix[q]; ok {
			return q, true
		}
	}
	return netip.Prefix{}, false
}

// within returns the prefixes in use that lie within p, p itself among them.
func (t *taken) within(p netip.Prefix) []netip.Prefix {
	first, _ := slices.BinarySearchFunc(t.sorted, p, comparePrefixes)
	last := first
	for last < len(t.sorted) && p.Contains(t.sorted[last].Addr()) {
		last++
	}
	return t.sorted[first:last]
}

// owner returns a node that has a prefix overlapping p.
func (t *taken) owner(p netip.Prefix) (string, bool) {
	for _, bits := range t.lengths[p.Addr().Is6()] {
		if bits > p.Bits() {
			break
		}
		if o := t.byPrefix[netip.PrefixFrom(p.Addr(), bits).Masked()]; o != "" {
			return o, true
		}
	}
	for _, q := range t.within(p) {
		if o := t.byPrefix[q]; o != "" {
			return o, true
		}
	}
	return "", false
}

func comparePrefixes(a, b netip.Prefix) int {
	return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
}

// cursor walks a pool from its lowest address upwards; within one plan nothing behind it becomes free.
type cursor struct {
	cidr int
	at   netip.Addr
}

func (c *cursor) next(pool Pool, used *taken) (netip.Prefix, bool) {
	for ; c.cidr < len(pool.CIDRs); c.cidr, c.at = c.cidr+1, (netip.Addr{}) {
		cidr := pool.CIDRs[c.cidr]
		if !c.at.IsValid() {
			c.at = cidr.Addr()
		}
		for c.at.IsValid() && cidr.Contains(c.at) {
			p := netip.PrefixFrom(c.at, pool.MaskSize)
			if q, ok := used.covering(p); ok {
				c.at = after(q)
				continue
			}
			c.at = after(p)
			if len(used.within(p)) == 0 {
				return p, true
			}
		}
	}
	return netip.Prefix{}, false
}

// after returns the first address behind p, the zero Addr at the end of the address space.
func after(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	n := new(big.Int).SetBytes(b)
	n.Add(n, new(big.Int).Lsh(big.NewInt(1), uint(p.Addr().BitLen()-p.Bits())))
	if n.BitLen() > len(b)*8 {
		return netip.Addr{}
	}
	a, _ := netip.AddrFromSlice(n.FillBytes(b))
	return a
}
