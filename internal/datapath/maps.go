// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"github.com/cilium/ebpf"

	"github.com/lash-net/lash/bpf"
	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/reconcile"
)

// Endpoints is lash_endpoints, and with each pod's addresses its row of lash_ifaces.
func (d *Datapath) Endpoints() reconcile.Target[netip.Addr, model.LocalAddr] { return endpoints{d} }

// IPCache is lash_ipcache. Sources are not kept in the kernel: compare with SameIPCache.
func (d *Datapath) IPCache() reconcile.Target[netip.Prefix, model.IPCacheEntry] { return ipcache{d} }

// Services is lash_services with lash_backends. The kernel keeps numbers and backends,
// not names: compare with SameService.
func (d *Datapath) Services() reconcile.Target[model.Frontend, model.FrontendEntry] {
	return services{d}
}

// Devices is lash_devices. Compare with SameDevice.
func (d *Datapath) Devices() reconcile.Target[int, model.Device] { return devices{d} }

// SameIPCache compares what the datapath has of two rows.
func SameIPCache(a, b model.IPCacheEntry) bool {
	a.Source, b.Source = "", ""
	return a == b
}

// SameService compares what the datapath has of two rows.
func SameService(a, b model.FrontendEntry) bool {
	if a.ID != b.ID {
		return false
	}
	x, y := active(a.Backends), active(b.Backends)
	if len(x) != len(y) {
		return false
	}
	for i := range x {
		if x[i].Addr != y[i].Addr || x[i].Port != y[i].Port || x[i].Proto != y[i].Proto {
			return false
		}
	}
	return true
}

// SameDevice compares what the datapath has of two rows.
func SameDevice(a, b model.Device) bool {
	return a.IPv4 == b.IPv4 && a.IPv6 == b.IPv6 && a.MAC == b.MAC && a.MTU == b.MTU
}

func list[K, V any](m *ebpf.Map, name string, each func(K, V)) error {
	var k K
	var v V
	it := m.Iterate()
	for it.Next(&k, &v) {
		each(k, v)
	}
	if err := it.Err(); err != nil {
		return fmt.Errorf("read %s: %w", name, err)
	}
	return nil
}

func remove(m *ebpf.Map, k any) error {
	if err := m.Delete(k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return err
	}
	return nil
}

type endpoints struct{ d *Datapath }

func (t endpoints) List(context.Context) (map[netip.Addr]model.LocalAddr, error) {
	rows := map[netip.Addr]model.LocalAddr{}
	err := list(t.d.maps["lash_endpoints"], "lash_endpoints", func(k bpf.Addr, v bpf.Endpoint) {
		rows[k.Addr()] = model.LocalAddr{
			EndpointID: v.ID, Ifindex: int(v.Ifindex), Identity: model.Identity(v.Identity),
			MAC: v.MAC.B, NodeMAC: v.NodeMAC.B, Host: v.Flags&bpf.EndpointHost != 0,
		}
	})
	return rows, err
}

// Put writes the device's row first: a pod must be known by it before it is reachable.
func (t endpoints) Put(_ context.Context, a netip.Addr, v model.LocalAddr) error {
	row := bpf.Endpoint{
		Ifindex: uint32(v.Ifindex), Identity: uint32(v.Identity), ID: v.EndpointID,
		MAC: bpf.MAC{B: v.MAC}, NodeMAC: bpf.MAC{B: v.NodeMAC},
	}
	if v.Host {
		row.Flags |= bpf.EndpointHost
	} else if err := t.d.changeIface(uint32(v.Ifindex), func(i *bpf.Iface) {
		i.ID, i.Identity, i.MAC, i.NodeMAC = row.ID, row.Identity, row.MAC, row.NodeMAC
		if a.Is4() {
			i.IP4 = bpf.AddrFrom(a)
		} else {
			i.IP6 = bpf.AddrFrom(a)
		}
	}); err != nil {
		return err
	}
	if err := t.d.maps["lash_endpoints"].Put(bpf.AddrFrom(a), &row); err != nil {
		return fmt.Errorf("endpoint %s: %w", a, err)
	}
	return nil
}

func (t endpoints) Delete(_ context.Context, a netip.Addr) error {
	var row bpf.Endpoint
	key := bpf.AddrFrom(a)
	if err := t.d.maps["lash_endpoints"].Lookup(key, &row); err != nil {
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			return nil
		}
		return fmt.Errorf("endpoint %s: %w", a, err)
	}
	if err := remove(t.d.maps["lash_endpoints"], key); err != nil {
		return fmt.Errorf("endpoint %s: %w", a, err)
	}
	if row.Flags&bpf.EndpointHost != 0 {
		return nil
	}
	return t.d.changeIface(row.Ifindex, func(i *bpf.Iface) {
		if i.IP4 == key {
			i.IP4 = bpf.Addr{}
		}
		if i.IP6 == key {
			i.IP6 = bpf.Addr{}
		}
	})
}

// changeIface changes a device's row; one without addresses is removed.
func (d *Datapath) changeIface(ifindex uint32, change func(*bpf.Iface)) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	row := d.ifaces[ifindex]
	change(&row)
	if row.IP4 == (bpf.Addr{}) && row.IP6 == (bpf.Addr{}) {
		delete(d.ifaces, ifindex)
		if err := remove(d.maps["lash_ifaces"], ifindex); err != nil {
			return fmt.Errorf("device %d: %w", ifindex, err)
		}
		return nil
	}
	if err := d.maps["lash_ifaces"].Put(ifindex, &row); err != nil {
		return fmt.Errorf("device %d: %w", ifindex, err)
	}
	d.ifaces[ifindex] = row
	return nil
}

type ipcache struct{ d *Datapath }

func (t ipcache) List(context.Context) (map[netip.Prefix]model.IPCacheEntry, error) {
	rows := map[netip.Prefix]model.IPCacheEntry{}
	err := list(t.d.maps["lash_ipcache"], "lash_ipcache", func(k bpf.IPCacheKey, v bpf.IPCacheEntry) {
		rows[k.Prefix()] = model.IPCacheEntry{
			Identity: model.Identity(v.Identity), Node: v.Node.Addr(), Tunnel: v.Flags&bpf.IPCacheTunnel != 0, Peer: v.Flags&bpf.IPCachePeer != 0,
		}
	})
	return rows, err
}

func (t ipcache) Put(_ context.Context, p netip.Prefix, v model.IPCacheEntry) error {
	row := bpf.IPCacheEntry{Identity: uint32(v.Identity), Node: bpf.AddrFrom(v.Node)}
	if v.Tunnel {
		row.Flags |= bpf.IPCacheTunnel
	}
	if v.Peer {
		row.Flags |= bpf.IPCachePeer
	}
	before, err := t.lookup(p)
	if err != nil {
		return err
	}
	if err := t.d.maps["lash_ipcache"].Put(bpf.IPCacheKeyFrom(p), &row); err != nil {
		return fmt.Errorf("ipcache %s: %w", p, err)
	}
	t.d.epochs.changed(p, before, &row)
	t.d.mu.Lock()
	defer t.d.mu.Unlock()
	delete(t.d.departed, p)
	return nil
}

func (t ipcache) Delete(_ context.Context, p netip.Prefix) error {
	before, err := t.lookup(p)
	if err != nil {
		return err
	}
	if err := remove(t.d.maps["lash_ipcache"], bpf.IPCacheKeyFrom(p)); err != nil {
		return fmt.Errorf("ipcache %s: %w", p, err)
	}
	after, err := t.lookup(p)
	if err != nil {
		return err
	}
	t.d.epochs.changed(p, before, after)
	t.d.mu.Lock()
	defer t.d.mu.Unlock()
	t.d.departed[p] = true
	return nil
}

// lookup is what programs find for the first address of p, nil if nothing.
func (t ipcache) lookup(p netip.Prefix) (*bpf.IPCacheEntry, error) {
	var row bpf.IPCacheEntry
	switch err := t.d.maps["lash_ipcache"].Lookup(bpf.IPCacheKeyFrom(netip.PrefixFrom(p.Addr(), p.Addr().BitLen())), &row); {
	case errors.Is(err, ebpf.ErrKeyNotExist):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("ipcache %s: %w", p, err)
	}
	return &row, nil
}

type services struct{ d *Datapath }

func serviceKey(f model.Frontend) bpf.ServiceKey {
	return bpf.ServiceKey{Addr: bpf.AddrFrom(f.Addr), Port: bpf.ToBE16(f.Port), Proto: f.Proto, Scope: f.Scope}
}

// active are the backends that new connections may go to.
func active(all []model.Backend) []model.Backend {
	out := make([]model.Backend, 0, len(all))
	for _, b := range all {
		if b.State == model.BackendActive {
			out = append(out, b)
		}
	}
	if len(out) == 0 {
		// Only terminating ones are left: better than refusing.
		return append(out, all...)
	}
	return out
}

func (t services) List(context.Context) (map[model.Frontend]model.FrontendEntry, error) {
	slots := map[bpf.BackendKey]bpf.Backend{}
	if err := list(t.d.maps["lash_backends"], "lash_backends", func(k bpf.BackendKey, v bpf.Backend) { slots[k] = v }); err != nil {
		return nil, err
	}
	rows := map[model.Frontend]model.FrontendEntry{}
	err := list(t.d.maps["lash_services"], "lash_services", func(k bpf.ServiceKey, v bpf.Service) {
		f := model.Frontend{Addr: k.Addr.Addr(), L4: model.L4{Proto: k.Proto, Port: k.Port.Host()}, Scope: k.Scope}
		e := model.FrontendEntry{ID: v.ID, Type: model.TypeClusterIP}
		for slot := uint32(1); slot <= v.Count; slot++ {
			b, ok := slots[bpf.BackendKey{Service: v.ID, Slot: slot}]
			if !ok { // half written: no row of the table equals it, so it is written again
				e.ID = 0
				break
			}
			e.Backends = append(e.Backends, model.Backend{Addr: b.Addr.Addr(), Port: b.Port.Host(), Proto: b.Proto, State: model.BackendActive})
		}
		rows[f] = e
	})
	return rows, err
}

// Put writes the slots, then the count that uses them, then removes slots beyond it:
// a lookup in between finds a backend of the old or of the new set.
func (t services) Put(_ context.Context, f model.Frontend, e model.FrontendEntry) error {
	var old bpf.Service
	key := serviceKey(f)
	if err := t.d.maps["lash_services"].Lookup(key, &old); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("service %s: %w", f, err)
	}
	backends := active(e.Backends)
	for i, b := range backends {
		row := bpf.Backend{Addr: bpf.AddrFrom(b.Addr), Port: bpf.ToBE16(b.Port), Proto: b.Proto}
		if err := t.d.maps["lash_backends"].Put(bpf.BackendKey{Service: e.ID, Slot: uint32(i) + 1}, &row); err != nil {
			return fmt.Errorf("service %s, backend %s: %w", f, b, err)
		}
	}
	if err := t.d.maps["lash_services"].Put(key, &bpf.Service{ID: e.ID, Count: uint32(len(backends))}); err != nil {
		return fmt.Errorf("service %s: %w", f, err)
	}
	from := uint32(len(backends)) + 1
	if old.ID != e.ID {
		from = 1
	}
	return t.clear(f, old, from)
}

func (t services) clear(f model.Frontend, svc bpf.Service, from uint32) error {
	for slot := from; slot <= svc.Count; slot++ {
		if err := remove(t.d.maps["lash_backends"], bpf.BackendKey{Service: svc.ID, Slot: slot}); err != nil {
			return fmt.Errorf("service %s, slot %d: %w", f, slot, err)
		}
	}
	return nil
}

func (t services) Delete(_ context.Context, f model.Frontend) error {
	var old bpf.Service
	key := serviceKey(f)
	if err := t.d.maps["lash_services"].Lookup(key, &old); err != nil {
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			return nil
		}
		return fmt.Errorf("service %s: %w", f, err)
	}
	if err := remove(t.d.maps["lash_services"], key); err != nil {
		return fmt.Errorf("service %s: %w", f, err)
	}
	return t.clear(f, old, 1)
}

type devices struct{ d *Datapath }

func (t devices) List(context.Context) (map[int]model.Device, error) {
	rows := map[int]model.Device{}
	err := list(t.d.maps["lash_devices"], "lash_devices", func(k uint32, v bpf.Device) {
		rows[int(k)] = model.Device{Ifindex: int(k), MAC: v.MAC.B, MTU: int(v.MTU), IPv4: v.IP4.Addr(), IPv6: v.IP6.Addr()}
	})
	return rows, err
}

func (t devices) Put(_ context.Context, ifindex int, v model.Device) error {
	row := bpf.Device{IP4: bpf.AddrFrom(v.IPv4), IP6: bpf.AddrFrom(v.IPv6), MAC: bpf.MAC{B: v.MAC}, MTU: uint16(v.MTU)}
	if err := t.d.maps["lash_devices"].Put(uint32(ifindex), &row); err != nil {
		return fmt.Errorf("device %s: %w", v.Name, err)
	}
	return nil
}

func (t devices) Delete(_ context.Context, ifindex int) error {
	if err := remove(t.d.maps["lash_devices"], uint32(ifindex)); err != nil {
		return fmt.Errorf("device %d: %w", ifindex, err)
	}
	return nil
}
