// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"

	"github.com/cilium/ebpf"

	"github.com/lash-net/lash/bpf"
	"github.com/lash-net/lash/internal/model"
)

// ServicePorts is lash_services and what its rows lead to: lash_backends, lash_members, lash_maglev, lash_source_ranges,
// and the rows that service ports share, lash_ports and those of addresses. It is a target keyed by the number of a
// service port. The kernel keeps neither names nor types: compare with SameServicePort.
//
// A packet in between finds the old or the new: what rows lead to is written before them, and removed after them. Service
// ports may be written at the same time, each by one caller; List must not run meanwhile.
type ServicePorts struct {
	d *Datapath
	m *maglev

	mu      sync.Mutex
	have    map[uint32]*written // what the kernel has
	ports   shared[uint16]
	addrs   shared[netip.Addr]
	removed bool // members have been, since TakeRemoved
}

// written is a service port in the kernel.
type written struct {
	port  model.ServicePort
	slots []int // for each slot, from 1, the backend's index in port.Backends
	// doubt: a write failed, so that port has whatever may be there, and the slots up to their number anything.
	doubt bool
}

// ServicePorts is the target; there is one.
func (d *Datapath) ServicePorts() *ServicePorts {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.services == nil {
		d.services = newServicePorts(d)
	}
	return d.services
}

func newServicePorts(d *Datapath) *ServicePorts {
	t := &ServicePorts{d: d, m: newMaglev(d.cfg.maglevSize(), d.cfg.MaglevSeed), have: map[uint32]*written{}}
	t.ports = shared[uint16]{wanted: map[uint16]*counts{}, write: d.writePort}
	t.addrs = shared[netip.Addr]{wanted: map[netip.Addr]*counts{}, write: d.writeAddress}
	return t
}

// SameServicePort compares what the datapath has of two rows.
func SameServicePort(a, b model.ServicePort) bool {
	return a.ID == b.ID && a.Affinity == b.Affinity && slices.Equal(a.Ranges, b.Ranges) &&
		slices.Equal(a.Frontends, b.Frontends) && slices.EqualFunc(a.Backends, b.Backends, sameBackend)
}

func sameBackend(a, b model.Backend) bool {
	a.Terminating, b.Terminating = false, false
	// Who gets no new connections has no slot, and no flags.
	a.Host, b.Host = a.Host && a.Active(), b.Host && b.Active()
	return a == b
}

// TakeRemoved reports whether backends have been removed since it was last called: what the datapath remembers of them
// is to be forgotten (Forget).
func (t *ServicePorts) TakeRemoved() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	removed := t.removed
	t.removed = false
	return removed
}

// place gives each backend that gets new connections a slot: first those of this node only, then those of both sets, then
// those of the cluster only, so that each set is a range. Backends keep the slots they have where they can.
func place(backends []model.Backend, old []model.Backend, oldSlots []int) (slots []int, head bpf.Service) {
	kind := func(b model.Backend) int {
		switch {
		case b.Local && b.Cluster:
			return 1
		case b.Cluster:
			return 2
		}
		return 0
	}
	var counts [3]int
	for _, b := range backends {
		if b.Active() {
			counts[kind(b)]++
		}
	}
	begin := [4]int{0, counts[0], counts[0] + counts[1], counts[0] + counts[1] + counts[2]}
	slots = make([]int, begin[3])
	for i := range slots {
		slots[i] = -1
	}
	placed := make([]bool, len(backends))
	for slot, i := range oldSlots {
		at, ok := slices.BinarySearchFunc(backends, old[i], model.Backend.Compare)
		if !ok || !backends[at].Active() {
			continue
		}
		if k := kind(backends[at]); slot >= begin[k] && slot < begin[k+1] {
			slots[slot], placed[at] = at, true
		}
	}
	next := begin
	for i, b := range backends {
		if !b.Active() || placed[i] {
			continue
		}
		k := kind(b)
		for slots[next[k]] >= 0 {
			next[k]++
		}
		slots[next[k]] = i
	}
	return slots, bpf.Service{Count: uint32(counts[1] + counts[2]), First: uint32(counts[0] + 1), Local: uint32(counts[0] + counts[1])}
}

func backendRow(proto uint8, b model.Backend) bpf.Backend {
	row := bpf.Backend{Addr: bpf.AddrFrom(b.Addr), Port: bpf.ToBE16(b.Port), Proto: proto}
	if b.Host {
		row.Flags |= bpf.BackendHost
	}
	return row
}

func memberKey(id uint32, b model.Backend) bpf.MemberKey {
	return bpf.MemberKey{Service: id, Addr: bpf.AddrFrom(b.Addr), Port: bpf.ToBE16(b.Port)}
}

func serviceKey(f model.FrontendKey) bpf.ServiceKey {
	return bpf.ServiceKey{Addr: bpf.AddrFrom(f.Addr), Port: bpf.ToBE16(f.Port), Proto: f.Proto}
}

func rangeKey(id uint32, p netip.Prefix) bpf.SourceRangeKey {
	k := bpf.IPCacheKeyFrom(p)
	return bpf.SourceRangeKey{Prefixlen: 32 + k.Prefixlen, Service: id, Addr: k.Addr}
}

var frontendFlags = []struct {
	bit   uint32
	field func(*model.Frontend) *bool
}{
	{bpf.FrontendOutside, func(f *model.Frontend) *bool { return &f.Outside }},
	{bpf.FrontendLocalOut, func(f *model.Frontend) *bool { return &f.LocalOut }},
	{bpf.FrontendLocalIn, func(f *model.Frontend) *bool { return &f.LocalIn }},
	{bpf.FrontendRanges, func(f *model.Frontend) *bool { return &f.Ranges }},
	{bpf.FrontendDeny, func(f *model.Frontend) *bool { return &f.Deny }},
	{bpf.FrontendMaglev, func(f *model.Frontend) *bool { return &f.Maglev }},
	{bpf.FrontendDSR, func(f *model.Frontend) *bool { return &f.DSR }},
	{bpf.FrontendNode, func(f *model.Frontend) *bool { return &f.Node }},
}

// frontendTypes are kinds of frontends, by their numbers in the flags of a row.
var frontendTypes = []string{"", model.TypeClusterIP, model.TypeNodePort, model.TypeLoadBalancer, model.TypeExternalIPs, model.TypeHostPort}

// frontendType is the kind of a row's frontend; empty: an earlier agent wrote it, or it is the row of an address.
func frontendType(flags uint32) string {
	if n := flags >> bpf.FrontendTypeShift; n < uint32(len(frontendTypes)) {
		return frontendTypes[n]
	}
	return ""
}

// maglevRange are the slots that the Maglev table leads to: those for packets from outside, which all frontends with a
// table have in common. ok: there is a table.
func maglevRange(v model.ServicePort, head bpf.Service) (first, count uint32, ok bool) {
	for _, f := range v.Frontends {
		if f.Maglev && f.LocalOut {
			return 1, head.Local, true
		}
		if f.Maglev {
			return head.First, head.Count, true
		}
	}
	return 0, 0, false
}

// Put writes the service port of a number.
func (t *ServicePorts) Put(_ context.Context, id uint32, v model.ServicePort) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	old := t.have[id]
	if old == nil {
		old = &written{}
	}
	keep := old.slots
	if old.doubt {
		keep = nil
	}
	slots, head := place(v.Backends, old.port.Backends, keep)
	head.ID, head.Affinity = id, v.Affinity
	if err := t.replace(id, old, &written{port: v, slots: slots}, head); err != nil {
		return fmt.Errorf("service %s/%s port %q: %w", v.Namespace, v.Name, v.Port, err)
	}
	return nil
}

// Delete removes the service port of a number.
func (t *ServicePorts) Delete(_ context.Context, id uint32) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	old := t.have[id]
	if old == nil {
		return nil
	}
	if err := t.replace(id, old, &written{}, bpf.Service{ID: id}); err != nil {
		return fmt.Errorf("service port %d: %w", id, err)
	}
	delete(t.have, id)
	return nil
}

// replace writes what is new, then the frontends that lead to it, then removes what is old. If it fails, what may be there
// is remembered.
func (t *ServicePorts) replace(id uint32, old, now *written, head bpf.Service) error {
	both := union(old, now)
	err := errors.Join(t.writeBackends(id, old, now), t.writeMaglev(id, old, now, head), t.writeRanges(id, old, now))
	err = errors.Join(err, t.share(old, both))
	t.have[id] = both
	if err != nil {
		return err
	}
	err = errors.Join(t.writeFrontends(old, now, head), t.removeFrontends(id, old, now))
	if err != nil {
		return err
	}
	err = errors.Join(t.removeBackends(id, old, now), t.removeRanges(id, old, now), t.removeMaglev(id, old, now))
	if err != nil {
		return err
	}
	if err := t.share(both, now); err != nil {
		t.have[id] = &written{port: now.port, slots: now.slots, doubt: true}
		return err
	}
	t.have[id] = now
	return nil
}

// union is what may be in the kernel while it is on the way from old to now.
func union(old, now *written) *written {
	u := &written{port: now.port, doubt: true, slots: make([]int, max(len(old.slots), len(now.slots)))}
	u.port.Frontends = slices.Clone(now.port.Frontends)
	for _, f := range old.port.Frontends {
		if !slices.Contains(u.port.Frontends, f) {
			u.port.Frontends = append(u.port.Frontends, f)
		}
	}
	u.port.Backends = slices.Concat(now.port.Backends, old.port.Backends)
	u.port.Ranges = slices.Concat(now.port.Ranges, old.port.Ranges)
	return u
}

// share makes the rows that service ports share have what this one wants.
func (t *ServicePorts) share(before, now *written) error {
	return errors.Join(t.ports.swap(t.d.portUse(before.port), t.d.portUse(now.port), before.doubt && now.doubt),
		t.addrs.swap(addressUse(before.port), addressUse(now.port), before.doubt && now.doubt))
}

// writeBackends writes members and slots that are new or changed.
func (t *ServicePorts) writeBackends(id uint32, old, now *written) error {
	was := make(map[model.Backend]struct{}, len(old.port.Backends))
	if !old.doubt {
		for _, b := range old.port.Backends {
			was[member(b)] = struct{}{}
		}
	}
	var members []bpf.MemberKey
	var states []uint32
	for _, b := range now.port.Backends {
		if _, same := was[member(b)]; same {
			continue
		}
		state := uint32(bpf.MemberKeeps)
		if b.Active() {
			state = bpf.MemberActive
		}
		members, states = append(members, memberKey(id, b)), append(states, state)
	}
	if err := putAll(t.d.maps["lash_members"], members, states); err != nil {
		return fmt.Errorf("members: %w", err)
	}
	var keys []bpf.BackendKey
	var rows []bpf.Backend
	had := old.rows()
	for slot, row := range now.rows() {
		if old.doubt || slot >= len(had) || had[slot] != row {
			keys, rows = append(keys, bpf.BackendKey{Service: id, Slot: uint32(slot + 1)}), append(rows, row)
		}
	}
	if err := putAll(t.d.maps["lash_backends"], keys, rows); err != nil {
		return fmt.Errorf("backends: %w", err)
	}
	return nil
}

// member is what lash_members has of a backend.
func member(b model.Backend) model.Backend {
	return model.Backend{Addr: b.Addr, Port: b.Port, Cluster: b.Active()}
}

// rows are the slots' rows, from slot 1; of one in doubt they mean nothing.
func (w *written) rows() []bpf.Backend {
	if w.doubt {
		return make([]bpf.Backend, len(w.slots))
	}
	out := make([]bpf.Backend, len(w.slots))
	for slot, i := range w.slots {
		out[slot] = backendRow(w.port.Proto, w.port.Backends[i])
	}
	return out
}

// writeMaglev writes the table if there is one and it is not that of the slots.
func (t *ServicePorts) writeMaglev(id uint32, old, now *written, head bpf.Service) error {
	first, count, ok := maglevRange(now.port, head)
	if !ok {
		return nil
	}
	_, oldHead := place(old.port.Backends, nil, nil)
	oldFirst, oldCount, had := maglevRange(old.port, oldHead)
	rows, oldRows := now.rows()[first-1:first-1+count], old.rows()
	if !old.doubt && had && oldFirst == first && slices.Equal(rows, oldRows[oldFirst-1:oldFirst-1+oldCount]) {
		return nil
	}
	order := make([]int, len(rows)) // of the slots, by address
	for i := range order {
		order[i] = i
	}
	slices.SortFunc(order, func(a, b int) int {
		return now.port.Backends[now.slots[int(first)-1+a]].Compare(now.port.Backends[now.slots[int(first)-1+b]])
	})
	// The kernel takes a grace period to accept a new table. Others go on meanwhile; nobody else writes this service port.
	t.mu.Unlock()
	defer t.mu.Lock()
	return t.m.write(t.d.maps["lash_maglev"], id, first, rows, order)
}

func (t *ServicePorts) writeRanges(id uint32, old, now *written) error {
	for _, p := range now.port.Ranges {
		if !old.doubt && slices.Contains(old.port.Ranges, p) {
			continue
		}
		if err := t.d.maps["lash_source_ranges"].Put(rangeKey(id, p), uint32(1)); err != nil {
			return fmt.Errorf("source range %s: %w", p, err)
		}
	}
	return nil
}

func frontendRow(f model.Frontend, head bpf.Service) bpf.Service {
	for _, flag := range frontendFlags {
		if *flag.field(&f) {
			head.Flags |= flag.bit
		}
	}
	head.Flags |= uint32(max(slices.Index(frontendTypes, f.Type), 0)) << bpf.FrontendTypeShift
	return head
}

// writeFrontends writes the rows of frontends that are new or changed.
func (t *ServicePorts) writeFrontends(old, now *written, head bpf.Service) error {
	_, oldHead := place(old.port.Backends, nil, nil)
	oldHead.ID, oldHead.Affinity = head.ID, old.port.Affinity
	var keys []bpf.ServiceKey
	var rows []bpf.Service
	for _, f := range now.port.Frontends {
		row := frontendRow(f, head)
		same := func(o model.Frontend) bool { return o.FrontendKey == f.FrontendKey && frontendRow(o, oldHead) == row }
		if old.doubt || !slices.ContainsFunc(old.port.Frontends, same) {
			keys, rows = append(keys, serviceKey(f.FrontendKey)), append(rows, row)
		}
	}
	if err := putAll(t.d.maps["lash_services"], keys, rows); err != nil {
		return fmt.Errorf("frontends: %w", err)
	}
	return nil
}

// removeFrontends removes rows that are no longer this service port's, unless another has them by now.
func (t *ServicePorts) removeFrontends(id uint32, old, now *written) error {
	for _, f := range old.port.Frontends {
		if slices.ContainsFunc(now.port.Frontends, func(o model.Frontend) bool { return o.FrontendKey == f.FrontendKey }) {
			continue
		}
		var row bpf.Service
		key := serviceKey(f.FrontendKey)
		err := t.d.maps["lash_services"].Lookup(key, &row)
		switch {
		case errors.Is(err, ebpf.ErrKeyNotExist) || err == nil && row.ID != id:
			continue
		case err == nil:
			err = remove(t.d.maps["lash_services"], key)
		}
		if err != nil {
			return fmt.Errorf("frontend %s: %w", f.FrontendKey, err)
		}
	}
	return nil
}

func (t *ServicePorts) removeBackends(id uint32, old, now *written) error {
	for slot := len(now.slots); slot < len(old.slots); slot++ {
		if err := remove(t.d.maps["lash_backends"], bpf.BackendKey{Service: id, Slot: uint32(slot + 1)}); err != nil {
			return fmt.Errorf("slot %d: %w", slot+1, err)
		}
	}
	for _, b := range old.port.Backends {
		if _, still := slices.BinarySearchFunc(now.port.Backends, b, model.Backend.Compare); still {
			continue
		}
		if err := remove(t.d.maps["lash_members"], memberKey(id, b)); err != nil {
			return fmt.Errorf("member %s: %w", b, err)
		}
		t.removed = true
	}
	return nil
}

func (t *ServicePorts) removeMaglev(id uint32, old, now *written) error {
	_, _, table := maglevRange(now.port, bpf.Service{})
	if _, _, had := maglevRange(old.port, bpf.Service{}); table || !had && !old.doubt {
		return nil
	}
	if err := remove(t.d.maps["lash_maglev"], id); err != nil {
		return fmt.Errorf("Maglev table: %w", err)
	}
	return nil
}

func (t *ServicePorts) removeRanges(id uint32, old, now *written) error {
	for _, p := range old.port.Ranges {
		if slices.Contains(now.port.Ranges, p) {
			continue
		}
		if err := remove(t.d.maps["lash_source_ranges"], rangeKey(id, p)); err != nil {
			return fmt.Errorf("source range %s: %w", p, err)
		}
	}
	return nil
}
