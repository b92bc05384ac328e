// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/cilium/ebpf"

	"github.com/lash-net/lash/bpf"
	"github.com/lash-net/lash/internal/model"
)

// found is what the kernel has under one number.
type found struct {
	heads     []bpf.Service // of the frontends, without flags
	frontends []model.Frontend
	slots     map[uint32]bpf.Backend
	members   map[netip.AddrPort]uint32
	ranges    []netip.Prefix
	table     bool
}

// List reads all service ports back from the kernel. One that is not whole, because an agent ended while it wrote it, has
// no number in its row, so that it equals no wanted one and is written again. Rows that service ports share are mended.
func (t *ServicePorts) List(context.Context) (map[uint32]model.ServicePort, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	all, addrs, err := t.read()
	if err != nil {
		return nil, err
	}
	t.have = make(map[uint32]*written, len(all))
	clear(t.ports.wanted)
	clear(t.addrs.wanted)
	rows := make(map[uint32]model.ServicePort, len(all))
	for id, f := range all {
		w, err := t.rebuild(id, f)
		if err != nil {
			return nil, fmt.Errorf("service port %d: %w", id, err)
		}
		t.have[id] = w
		row := w.port
		if w.doubt {
			row.ID = 0
		}
		rows[id] = row
		for port, bits := range t.d.portUse(w.port) {
			count(t.ports.wanted, port, bits)
		}
		for a, bits := range addressUse(w.port) {
			count(t.addrs.wanted, a, bits)
		}
	}
	ports, err := t.d.listPorts()
	if err != nil {
		return nil, err
	}
	return rows, errors.Join(t.ports.mend(ports), t.addrs.mend(addrs))
}

func count[K comparable](m map[K]*counts, k K, bits uint8) {
	if m[k] == nil {
		m[k] = &counts{}
	}
	m[k].change(bits, 1)
}

// read collects the rows of all maps by number; addrs are the rows of addresses.
func (t *ServicePorts) read() (all map[uint32]*found, addrs map[netip.Addr]uint8, err error) {
	all, addrs = map[uint32]*found{}, map[netip.Addr]uint8{}
	of := func(id uint32) *found {
		if all[id] == nil {
			all[id] = &found{slots: map[uint32]bpf.Backend{}, members: map[netip.AddrPort]uint32{}}
		}
		return all[id]
	}
	maps := t.d.maps
	err = errors.Join(
		listBatch(maps["lash_services"], "lash_services", func(k bpf.ServiceKey, v bpf.Service) {
			a := keyAddr(k.Addr)
			if v.Flags&bpf.FrontendAddress != 0 {
				addrs[a] = uint8(v.Flags)
				return
			}
			f := model.Frontend{Type: frontendType(v.Flags), FrontendKey: model.FrontendKey{Addr: a, L4: model.L4{Proto: k.Proto, Port: k.Port.Host()}}}
			for _, flag := range frontendFlags {
				*flag.field(&f) = v.Flags&flag.bit != 0
			}
			u := of(v.ID)
			v.Flags = 0
			u.heads, u.frontends = append(u.heads, v), append(u.frontends, f)
		}),
		listBatch(maps["lash_backends"], "lash_backends", func(k bpf.BackendKey, v bpf.Backend) { of(k.Service).slots[k.Slot] = v }),
		listBatch(maps["lash_members"], "lash_members", func(k bpf.MemberKey, v uint32) {
			of(k.Service).members[netip.AddrPortFrom(k.Addr.Addr(), k.Port.Host())] = v
		}),
		list(maps["lash_source_ranges"], "lash_source_ranges", func(k bpf.SourceRangeKey, _ uint32) {
			u := of(k.Service)
			u.ranges = append(u.ranges, bpf.IPCacheKey{Prefixlen: k.Prefixlen - 32, Addr: k.Addr}.Prefix())
		}),
		list(maps["lash_maglev"], "lash_maglev", func(id uint32, _ uint32) { of(id).table = true }),
	)
	return all, addrs, err
}

// keyAddr is the address of a key; all zero is IPv6's unspecified one.
func keyAddr(a bpf.Addr) netip.Addr {
	if a == (bpf.Addr{}) {
		return netip.IPv6Unspecified()
	}
	return a.Addr()
}

// rebuild makes a service port of what was found, in doubt if the parts do not fit.
func (t *ServicePorts) rebuild(id uint32, f *found) (*written, error) {
	w := &written{port: model.ServicePort{ID: id, Frontends: f.frontends, Ranges: f.ranges}}
	slices.SortFunc(w.port.Frontends, func(a, b model.Frontend) int { return a.FrontendKey.Compare(b.FrontendKey) })
	slices.SortFunc(w.port.Ranges, netip.Prefix.Compare)
	var head bpf.Service
	for i, h := range f.heads {
		if w.port.Proto, w.port.IPv6 = f.frontends[i].Proto, f.frontends[i].Addr.Is6(); i == 0 {
			head = h
		}
		w.doubt = w.doubt || h != head
	}
	w.doubt = w.doubt || len(f.heads) == 0
	w.port.Affinity = head.Affinity
	end := head.Local
	if head.Count > 0 {
		end = max(end, head.First-1+head.Count)
	}
	w.doubt = w.doubt || int(end) != len(f.slots)

	slotOf := map[netip.AddrPort]uint32{}
	for slot, b := range f.slots {
		if slot == 0 || slot > uint32(1<<20) { // of damage only: the count that removes slots must reach it
			w.doubt = true
			continue
		}
		at := netip.AddrPortFrom(b.Addr.Addr(), b.Port.Host())
		if _, twice := slotOf[at]; twice || slot > end || b.Proto != w.port.Proto {
			w.doubt = true
		}
		slotOf[at] = slot
		mb := model.Backend{
			Addr: at.Addr(), Port: at.Port(), Local: slot <= head.Local, Cluster: slot >= head.First && slot < head.First+head.Count,
			Host: b.Flags&bpf.BackendHost != 0,
		}
		w.port.Backends = append(w.port.Backends, mb)
		if state, ok := f.members[at]; !ok || state != bpf.MemberActive {
			w.doubt = true
		}
		for int(slot) > len(w.slots) {
			w.slots = append(w.slots, 0)
		}
	}
	for at, state := range f.members {
		if _, active := slotOf[at]; !active {
			w.port.Backends = append(w.port.Backends, model.Backend{Addr: at.Addr(), Port: at.Port()})
			w.doubt = w.doubt || state != bpf.MemberKeeps
		}
	}
	slices.SortFunc(w.port.Backends, model.Backend.Compare)
	for i, b := range w.port.Backends {
		if slot, ok := slotOf[netip.AddrPortFrom(b.Addr, b.Port)]; ok {
			w.slots[slot-1] = i
		}
	}
	first, count, table := maglevRange(w.port, head)
	if w.doubt {
		return w, nil
	}
	if table {
		same, err := t.m.matches(t.d.maps["lash_maglev"], id, first, w.rows()[first-1:first-1+count])
		w.doubt = !same
		return w, err
	}
	w.doubt = f.table
	return w, nil
}

// tableOf opens the Maglev table of a service port; nil: it has none.
func (d *Datapath) tableOf(id uint32) (*ebpf.Map, error) {
	var inner *ebpf.Map
	err := d.maps["lash_maglev"].Lookup(id, &inner)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil, nil
	}
	return inner, err
}
