// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync/atomic"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/lash-net/lash/bpf"
)

// snatPorts is lash_snat_ports, mapped: what programs write meanwhile is never overwritten by mistake.
type snatPorts struct{ memory []byte }

const (
	ports      = 1 << 16
	portStride = 8 // of an array's values
)

// openSNATPorts maps lash_snat_ports and notes the ports of translations that are older than it.
func (d *Datapath) openSNATPorts() (err error) {
	if d.snat.memory, err = unix.Mmap(d.maps["lash_snat_ports"].FD(), 0, ports*portStride, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return fmt.Errorf("map lash_snat_ports: %w", err)
	}
	now, err := d.now()
	if err != nil {
		return err
	}
	conns := d.maps["lash_conn"]
	return listBatch(d.maps["lash_nat"], "lash_nat", func(_, owner bpf.ConnKey) {
		var c bpf.Conn
		if conns.Lookup(&owner, &c) == nil {
			for _, port := range claimed(owner, c) {
				atomic.StoreUint32(d.snat.at(port), now|1)
			}
		}
	})
}

func (s *snatPorts) close() {
	if s.memory != nil {
		unix.Munmap(s.memory)
		s.memory = nil
	}
}

func (s *snatPorts) at(port uint16) *uint32 {
	return (*uint32)(unsafe.Pointer(&s.memory[int(port)*portStride]))
}

// when is when the port was last claimed, in ticks; 0: nobody has it.
func (s *snatPorts) when(port uint16) uint32 { return atomic.LoadUint32(s.at(port)) }

// claimed are the ports by which packets of the record's connection are told from the node's own.
func claimed(k bpf.ConnKey, c bpf.Conn) (out []uint16) {
	if c.Flags&bpf.ConnNAT != 0 && c.NATPort != 0 { // 0: of packets without ports
		out = append(out, c.NATPort.Host())
	}
	if k.Kind == bpf.KeyNode {
		initiator, _ := ends(k, c)
		out = append(out, initiator.port.Host())
	}
	return out
}

// sweepTranslations removes rows of lash_nat that lead to no connection of theirs, locks that nobody holds any more, and
// marks of ports that nobody has.
func (d *Datapath) sweepTranslations(now, hz uint32, cutShort func(error) error) (removed int, err error) {
	nat, conns := d.maps["lash_nat"], d.maps["lash_conn"]
	// A record gets its translation a moment after its port is marked and its row is made, and not only when it is new.
	recent := func(when uint32) bool { return int32(now-when) <= int32(hz) }
	marked := func(port bpf.BE16) bool { when := d.snat.when(port.Host()); return when != 0 && recent(when) }
	stale := func(translated, owner bpf.ConnKey) (bool, bpf.Conn) {
		var c bpf.Conn
		if owner.Pending != 0 {
			return false, c
		}
		err := conns.Lookup(&owner, &c)
		return errors.Is(err, ebpf.ErrKeyNotExist) || err == nil && translatedKey(owner, c) != unordered(translated) &&
			!recent(c.Created) && !marked(translated.LoPort) && !marked(translated.HiPort), c
	}
	var used [ports]bool
	var gone []bpf.ConnKey
	locks := map[bpf.ConnKey]bool{}
	listed := listBatch(nat, "lash_nat", func(translated, owner bpf.ConnKey) {
		if translated.Kind == bpf.KeyLock {
			locks[translated] = true
			return
		}
		old, c := stale(translated, owner)
		if old {
			gone = append(gone, translated)
			return
		}
		for _, port := range claimed(owner, c) {
			used[port] = true
			atomic.CompareAndSwapUint32(d.snat.at(port), 0, now|1) // programs of an earlier version mark none
		}
	})
	if err := cutShort(listed); err != nil {
		return 0, err
	}
	// A lock is held for a moment only; one that is there again was left by an agent that ended.
	for k := range locks {
		if d.locks[k] {
			delete(locks, k)
			if err := remove(nat, &k); err != nil {
				return removed, fmt.Errorf("lock of translation %v: %w", k, err)
			}
		}
	}
	d.locks = locks
	for _, k := range gone {
		lock := k
		lock.Kind = bpf.KeyLock
		err := nat.Update(&lock, &lock, ebpf.UpdateNoExist)
		if errors.Is(err, ebpf.ErrKeyExist) {
			continue // somebody removes it
		}
		if err != nil && !errors.Is(err, unix.E2BIG) { // no room: for nobody else's lock either
			return removed, fmt.Errorf("lock translation %v: %w", k, err)
		}
		var owner bpf.ConnKey
		err = nat.Lookup(&k, &owner)
		if err == nil {
			if old, _ := stale(k, owner); old {
				removed++
				err = remove(nat, &k)
			}
		}
		if unlock := remove(nat, &lock); unlock != nil || err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return removed, fmt.Errorf("translation %v: %w", k, errors.Join(err, unlock))
		}
	}
	if listed != nil {
		return removed, nil
	}
	for port := range used {
		when := d.snat.when(uint16(port))
		// Whoever claimed it since has marked it anew.
		if when != 0 && !used[port] && !recent(when) {
			atomic.CompareAndSwapUint32(d.snat.at(uint16(port)), when, 0)
		}
	}
	return removed, nil
}

// Towards is a destination that connections are masqueraded to, from one address of the node.
type Towards struct {
	Node  netip.Addr
	To    netip.AddrPort
	Proto uint8
}

func (t Towards) String() string {
	return fmt.Sprintf("%s to %s (%s)", t.Node, t.To, protoName(t.Proto))
}

// PortUse is how many source ports one destination takes.
type PortUse struct {
	Towards
	Ports   int
	Dropped uint64     // packets for which there was none left
	Seconds int        // since the last of them
	Users   []PortUser // most ports first
}

// PortUser is an address that has source ports, a pod's or a client's.
type PortUser struct {
	Addr  netip.Addr
	Ports int
}

// SNATPorts is how many source ports there are for one destination, but for those of frontends and of the node's sockets.
func (d *Datapath) SNATPorts() int {
	n := int(d.cfg.SNATMax) - int(d.cfg.SNATMin) + 1
	if d.cfg.SNATFarMax != 0 {
		n += int(d.cfg.SNATFarMax) - int(d.cfg.SNATFarMin) + 1
	}
	return n
}

// ExhaustedPorts are the destinations towards which no source port was left within so many seconds, and how many packets
// were dropped for it. It costs next to nothing while there are none.
func (d *Datapath) ExhaustedPorts(seconds int) (map[Towards]PortUse, error) {
	now, err := d.now()
	if err != nil {
		return nil, err
	}
	hz, err := ticksPerSecond()
	if err != nil {
		return nil, err
	}
	out := map[Towards]PortUse{}
	err = list(d.maps["lash_snat_full"], "lash_snat_full", func(k bpf.SNATFullKey, v bpf.SNATFull) {
		t := Towards{k.NAT.Addr(), netip.AddrPortFrom(k.Dst.Addr(), k.Dport.Host()), k.Proto}
		if ago := int(int32(now-v.Last) / int32(hz)); ago <= seconds {
			out[t] = PortUse{Towards: t, Dropped: v.Packets, Seconds: max(ago, 0)}
		}
	})
	return out, err
}

// PortUses tells who has the source ports: of each destination that wanted tells, or of all that have ports if it is nil.
// Most ports first.
func (d *Datapath) PortUses(wanted map[Towards]PortUse) ([]PortUse, error) {
	users := map[Towards]map[netip.Addr]int{}
	for t := range wanted {
		users[t] = map[netip.Addr]int{}
	}
	conns := d.maps["lash_conn"]
	err := listBatch(d.maps["lash_nat"], "lash_nat", func(translated, owner bpf.ConnKey) {
		var c bpf.Conn
		if translated.Kind == bpf.KeyLock || conns.Lookup(&owner, &c) != nil || c.Flags&bpf.ConnNAT == 0 {
			return
		}
		client, peer := sides(owner, c)
		if c.Flags&bpf.ConnDNAT != 0 {
			peer = netip.AddrPortFrom(c.ToAddr.Addr(), c.ToPort.Host())
		}
		t := Towards{c.NATAddr.Addr(), peer, owner.Proto}
		if users[t] == nil {
			if wanted != nil {
				return
			}
			users[t] = map[netip.Addr]int{}
		}
		users[t][client.Addr()]++
	})
	var out []PortUse
	for t, by := range users {
		u := wanted[t]
		u.Towards = t
		for a, n := range by {
			u.Ports += n
			u.Users = append(u.Users, PortUser{a, n})
		}
		slices.SortFunc(u.Users, func(a, b PortUser) int { return cmp.Or(b.Ports-a.Ports, a.Addr.Compare(b.Addr)) })
		out = append(out, u)
	}
	slices.SortFunc(out, func(a, b PortUse) int { return cmp.Or(b.Ports-a.Ports, cmp.Compare(a.String(), b.String())) })
	return out, err
}
