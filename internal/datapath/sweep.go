// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/cilium/ebpf"

	"github.com/lash-net/lash/bpf"
)

// now is the kernel's tick counter, read by the clock program.
func (d *Datapath) now() (uint32, error) {
	if _, err := d.programs["clock"].Run(&ebpf.RunOptions{Data: make([]byte, 14)}); err != nil {
		return 0, fmt.Errorf("clock: %w", err)
	}
	var rt bpf.Runtime
	if err := d.maps["lash_runtime"].Lookup(uint32(0), &rt); err != nil {
		return 0, fmt.Errorf("clock: %w", err)
	}
	return uint32(rt.Ticks), nil
}

// Swept counts what one Sweep found and removed.
type Swept struct{ Connections, Expired, Orphaned, Translations int }

// Sweep removes connections that have expired or whose pod is gone, and translations
// that lead to none. A connection that the datapath may still use is never removed:
// its row is read again right before.
func (d *Datapath) Sweep(ctx context.Context) (Swept, error) {
	var s Swept
	now, err := d.now()
	if err != nil {
		return s, err
	}
	conns, nat := d.maps["lash_conn"], d.maps["lash_nat"]
	known := map[bpf.Addr]bool{}
	var doomed []bpf.ConnKey
	if err := list(conns, "lash_conn", func(k bpf.ConnKey, c bpf.Conn) {
		s.Connections++
		switch {
		case int32(now-c.Expires) > 0:
			s.Expired++
		case d.orphaned(k.Lo, known) || d.orphaned(k.Hi, known):
			s.Orphaned++
		default:
			return
		}
		doomed = append(doomed, k)
	}); err != nil && !errors.Is(err, ebpf.ErrIterationAborted) {
		return s, err
	}
	for _, k := range doomed {
		var c bpf.Conn
		if err := conns.Lookup(&k, &c); err != nil {
			continue
		}
		if int32(now-c.Expires) <= 0 && !d.orphaned(k.Lo, known) && !d.orphaned(k.Hi, known) {
			continue // a new connection of the same tuple
		}
		if err := remove(conns, &k); err != nil {
			return s, fmt.Errorf("connection %v: %w", k, err)
		}
		if ctx.Err() != nil {
			return s, ctx.Err()
		}
	}
	var stale []bpf.ConnKey
	if err := list(nat, "lash_nat", func(translated, owner bpf.ConnKey) {
		var c bpf.Conn
		if err := conns.Lookup(&owner, &c); errors.Is(err, ebpf.ErrKeyNotExist) || err == nil && !leadsTo(translated, c) {
			stale = append(stale, translated)
		}
	}); err != nil && !errors.Is(err, ebpf.ErrIterationAborted) {
		return s, err
	}
	for _, k := range stale {
		s.Translations++
		if err := remove(nat, &k); err != nil {
			return s, fmt.Errorf("translation %v: %w", k, err)
		}
	}
	return s, nil
}

// leadsTo: the record still carries the translated address and port.
func leadsTo(translated bpf.ConnKey, c bpf.Conn) bool {
	if c.Flags&bpf.ConnNAT == 0 {
		return false
	}
	return translated.Lo == c.NATAddr && translated.LoPort == c.NATPort ||
		translated.Hi == c.NATAddr && translated.HiPort == c.NATPort
}

// orphaned: the address belongs to the pods, but nobody has it (any more): it is inside
// this node's pod CIDRs without an endpoint, or inside a native routing CIDR and of no
// known node.
func (d *Datapath) orphaned(a bpf.Addr, known map[bpf.Addr]bool) bool {
	if gone, ok := known[a]; ok {
		return gone
	}
	known[a] = d.lookOrphaned(a)
	return known[a]
}

func (d *Datapath) lookOrphaned(a bpf.Addr) bool {
	addr := a.Addr()
	if !addr.IsValid() {
		return false
	}
	if within(addr, d.cfg.PodCIDRs) {
		var ep bpf.Endpoint
		return errors.Is(d.maps["lash_endpoints"].Lookup(a, &ep), ebpf.ErrKeyNotExist)
	}
	if within(addr, d.cfg.NativeCIDRs) {
		var e bpf.IPCacheEntry
		err := d.maps["lash_ipcache"].Lookup(bpf.IPCacheKeyFrom(netip.PrefixFrom(addr, addr.BitLen())), &e)
		return errors.Is(err, ebpf.ErrKeyNotExist) || err == nil && e.Identity == bpf.IdentityWorld && e.Node == (bpf.Addr{})
	}
	return false
}

func within(a netip.Addr, prefixes []netip.Prefix) bool {
	for _, p := range prefixes {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// sweepEvery bounds how long an expired row stays. The datapath itself ignores expired
// rows; this only gives their memory back.
const sweepEvery = 10 * time.Second

// RunSweep sweeps until ctx ends. Report is told of every pass.
func (d *Datapath) RunSweep(ctx context.Context, report func(Swept, error)) error {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			report(d.Sweep(ctx))
		}
	}
}
