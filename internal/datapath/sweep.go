// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"time"

	"github.com/cilium/ebpf"

	"github.com/lash-net/lash/bpf"
	"github.com/lash-net/lash/internal/model"
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
type Swept struct{ Connections, Expired, Orphaned, Translations, Sockets int }

// Sweep removes connections that have expired or whose pod or node is gone, translations
// that lead to none, and what sockets remember of backends that are gone. A connection
// that the datapath may still use is never removed: its row is read again right before, and
// a program that found it alive in its last moment has a second to go on with it.
func (d *Datapath) Sweep(ctx context.Context) (Swept, error) {
	var s Swept
	now, err := d.now()
	if err != nil {
		return s, err
	}
	hz, err := ticksPerSecond()
	if err != nil {
		return s, err
	}
	expired := func(c bpf.Conn) bool { return int32(now-c.Expires) > int32(hz) }
	conns := d.maps["lash_conn"]
	gone := orphans{d: d, known: map[bpf.Addr]bool{}, departed: d.takeDeparted()}
	for p := range gone.departed {
		if !p.IsSingleIP() {
			gone.ranges = append(gone.ranges, p)
		}
	}
	whole := true // no map was changed so much that its walk was cut short
	cutShort := func(err error) error {
		if errors.Is(err, ebpf.ErrIterationAborted) {
			whole = false
			return nil
		}
		return err
	}
	defer func() {
		if !whole || err != nil {
			d.returnDeparted(gone.departed)
		}
	}()
	var doomed []bpf.ConnKey
	if err = cutShort(list(conns, "lash_conn", func(k bpf.ConnKey, c bpf.Conn) {
		s.Connections++
		switch {
		case expired(c):
			s.Expired++
		case gone.of(k, c):
			s.Orphaned++
		default:
			return
		}
		doomed = append(doomed, k)
	})); err != nil {
		return s, err
	}
	for _, k := range doomed {
		if _, err = removeConnection(conns, k, func(c bpf.Conn) bool { return expired(c) || gone.of(k, c) }); err != nil {
			return s, fmt.Errorf("connection %v: %w", k, err)
		}
		if err = ctx.Err(); err != nil {
			return s, err
		}
	}
	if s.Translations, err = d.sweepTranslations(now, hz, cutShort); err != nil {
		return s, err
	}
	var sockets []bpf.SockRevKey
	if err = cutShort(list(d.maps["lash_sock_rev"], "lash_sock_rev", func(k bpf.SockRevKey, _ bpf.SockRev) {
		if gone.has(k.Addr) {
			sockets = append(sockets, k)
		}
	})); err != nil {
		return s, err
	}
	for _, k := range sockets {
		s.Sockets++
		if err = remove(d.maps["lash_sock_rev"], &k); err != nil {
			return s, fmt.Errorf("socket %d: %w", k.Cookie, err)
		}
	}
	return s, nil
}

// removeConnection removes a record if it is doomed still. Its tuple may have become another connection's since it was
// listed, and may at any moment: what is taken out is looked at, too, and goes back if it is alive.
func removeConnection(conns *ebpf.Map, k bpf.ConnKey, doomed func(bpf.Conn) bool) (bool, error) {
	var c bpf.Conn
	if err := conns.Lookup(&k, &c); err != nil || !doomed(c) {
		return false, missing(err)
	}
	if err := conns.LookupAndDelete(&k, &c); err != nil {
		return false, missing(err)
	}
	if doomed(c) {
		return true, nil
	}
	err := conns.Update(&k, &c, ebpf.UpdateNoExist)
	if errors.Is(err, ebpf.ErrKeyExist) {
		err = nil // a packet has made it anew
	}
	return false, err
}

// missing is no error: somebody else has removed the row.
func missing(err error) error {
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil
	}
	return err
}

// end is one side of a connection.
type end struct {
	addr bpf.Addr
	port bpf.BE16
}

// ends are the initiator's side of a record and the responder's, as its key has them.
func ends(k bpf.ConnKey, c bpf.Conn) (initiator, responder end) {
	lo, hi := end{k.Lo, k.LoPort}, end{k.Hi, k.HiPort}
	if c.Flags&bpf.ConnInitiatorHi != 0 {
		return hi, lo
	}
	return lo, hi
}

// tuple is a connection's two sides in either order, the smaller one first.
type tuple [2]end

func order(a, b end) tuple {
	if c := bytes.Compare(a.addr[:], b.addr[:]); c > 0 || c == 0 && a.port > b.port {
		a, b = b, a
	}
	return tuple{a, b}
}

func unordered(k bpf.ConnKey) tuple { return order(end{k.Lo, k.LoPort}, end{k.Hi, k.HiPort}) }

// translatedKey is the tuple a record's connection has beyond its translation.
func translatedKey(k bpf.ConnKey, c bpf.Conn) tuple {
	initiator, responder := ends(k, c)
	if c.Flags&bpf.ConnNAT != 0 {
		initiator = end{c.NATAddr, c.NATPort}
	}
	if c.Flags&bpf.ConnDNAT != 0 {
		responder = end{c.ToAddr, c.ToPort}
	}
	return order(initiator, responder)
}

// takeDeparted returns the prefixes that left the ipcache since the last Sweep.
func (d *Datapath) takeDeparted() map[netip.Prefix]bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	taken := d.departed
	d.departed = map[netip.Prefix]bool{}
	return taken
}

// returnDeparted leaves them to the next Sweep.
func (d *Datapath) returnDeparted(taken map[netip.Prefix]bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	maps.Copy(d.departed, taken)
}

// orphans tells which addresses were pods' or nodes' and are nobody's now: inside this
// node's pod CIDRs without an endpoint, inside a native routing CIDR and of no known node,
// or departed from the ipcache. That a prefix has departed is forgotten by a restart of
// the agent; then its connections stay until they expire.
type orphans struct {
	d        *Datapath
	known    map[bpf.Addr]bool
	departed map[netip.Prefix]bool
	ranges   []netip.Prefix // those of departed that are no single address
}

// of tells whether a side of the connection is gone. Of a service's connection that is the backend's, not the frontend's.
func (o orphans) of(k bpf.ConnKey, c bpf.Conn) bool {
	initiator, responder := ends(k, c)
	if c.Flags&bpf.ConnDNAT != 0 {
		responder.addr = c.ToAddr
	}
	return o.has(initiator.addr) || o.has(responder.addr)
}

func (o orphans) has(a bpf.Addr) bool {
	if gone, ok := o.known[a]; ok {
		return gone
	}
	o.known[a] = o.look(a)
	return o.known[a]
}

func (o orphans) look(a bpf.Addr) bool {
	addr := a.Addr()
	if !addr.IsValid() {
		return false
	}
	if within(addr, o.d.cfg.PodCIDRs) {
		var ep bpf.Endpoint
		return errors.Is(o.d.maps["lash_endpoints"].Lookup(a, &ep), ebpf.ErrKeyNotExist)
	}
	single := netip.PrefixFrom(addr, addr.BitLen())
	if !o.departed[single] && !within(addr, o.ranges) && !within(addr, o.d.cfg.NativeCIDRs) {
		return false
	}
	var e bpf.IPCacheEntry
	err := o.d.maps["lash_ipcache"].Lookup(bpf.IPCacheKeyFrom(single), &e)
	unknown := errors.Is(err, ebpf.ErrKeyNotExist) || err == nil && model.Identity(e.Identity).World() && e.Node == (bpf.Addr{})
	// Of a single address that departed, what is found now is the pod CIDR around it.
	return unknown || o.departed[single] && model.Identity(e.Identity).World()
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
