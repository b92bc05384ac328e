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

// Devices is lash_devices. Compare with SameDevice.
func (d *Datapath) Devices() reconcile.Target[int, model.Device] { return devices{d} }

// NonMasquerade is lash_ipmasq. Connections that are there keep what was decided.
func (d *Datapath) NonMasquerade() reconcile.Target[netip.Prefix, struct{}] { return ipmasq{d} }

// SameIPCache compares what the datapath has of two rows.
func SameIPCache(a, b model.IPCacheEntry) bool {
	a.Source, b.Source = "", ""
	return a == b
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
			MAC: v.MAC.B, NodeMAC: v.NodeMAC.B, Host: v.Flags&bpf.EndpointHost != 0, NodePort: v.Flags&bpf.EndpointNodePort != 0,
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
	if v.NodePort {
		row.Flags |= bpf.EndpointNodePort
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

type ipmasq struct{ d *Datapath }

func (t ipmasq) List(context.Context) (map[netip.Prefix]struct{}, error) {
	rows := map[netip.Prefix]struct{}{}
	err := list(t.d.maps["lash_ipmasq"], "lash_ipmasq", func(k bpf.IPCacheKey, _ uint32) { rows[k.Prefix()] = struct{}{} })
	return rows, err
}

func (t ipmasq) Put(_ context.Context, p netip.Prefix, _ struct{}) error {
	if err := t.d.maps["lash_ipmasq"].Put(bpf.IPCacheKeyFrom(p), uint32(1)); err != nil {
		return fmt.Errorf("not to be masqueraded to %s: %w", p, err)
	}
	return nil
}

func (t ipmasq) Delete(_ context.Context, p netip.Prefix) error {
	if err := remove(t.d.maps["lash_ipmasq"], bpf.IPCacheKeyFrom(p)); err != nil {
		return fmt.Errorf("not to be masqueraded to %s: %w", p, err)
	}
	return nil
}
