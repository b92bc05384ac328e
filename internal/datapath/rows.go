// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"net/netip"

	"github.com/cilium/ebpf"

	"github.com/lash-net/lash/bpf"
	"github.com/lash-net/lash/internal/model"
)

// Single rows, as programs find them. Nil: there is none.

// EndpointRow is an address's row of lash_endpoints.
func (d *Datapath) EndpointRow(a netip.Addr) (*bpf.Endpoint, error) {
	return row[bpf.Endpoint](d.maps["lash_endpoints"], bpf.AddrFrom(a))
}

// IfaceRow is a pod's device's row of lash_ifaces.
func (d *Datapath) IfaceRow(ifindex int) (*bpf.Iface, error) {
	return row[bpf.Iface](d.maps["lash_ifaces"], uint32(ifindex))
}

// DeviceRow is a device's row of lash_devices.
func (d *Datapath) DeviceRow(ifindex int) (*bpf.Device, error) {
	return row[bpf.Device](d.maps["lash_devices"], uint32(ifindex))
}

// IPCacheRow is the row of lash_ipcache that an address meets, and its prefix. Where a shorter prefix has the same value,
// it is that one's: the longer makes no difference.
func (d *Datapath) IPCacheRow(a netip.Addr) (p netip.Prefix, e *bpf.IPCacheEntry, err error) {
	key := bpf.IPCacheKey{Prefixlen: 128, Addr: bpf.AddrFrom(a)}
	if e, err = row[bpf.IPCacheEntry](d.maps["lash_ipcache"], key); e == nil {
		return p, nil, err
	}
	least := uint32(0)
	if a.Is4() {
		least = 96
	}
	for key.Prefixlen > least {
		shorter := key
		shorter.Prefixlen--
		other, err := row[bpf.IPCacheEntry](d.maps["lash_ipcache"], shorter)
		if err != nil {
			return p, nil, err
		}
		if other == nil || *other != *e {
			break
		}
		key = shorter
	}
	if a.Is4() {
		return netip.PrefixFrom(a, int(key.Prefixlen-least)).Masked(), e, nil
	}
	return netip.PrefixFrom(netip.AddrFrom16(key.Addr), int(key.Prefixlen)).Masked(), e, nil
}

// ConnRow is a connection's row of lash_conn.
func (d *Datapath) ConnRow(k bpf.ConnKey) (*bpf.Conn, error) {
	raw, err := d.maps["lash_conn"].LookupBytes(&k)
	if raw == nil {
		return nil, err
	}
	c := bpf.ConnFrom(raw)
	return &c, nil
}

// FrontendRow is a frontend and the backends that whoever asks for it chooses from.
type FrontendRow struct {
	bpf.Service
	Key      model.FrontendKey // the row's: of a port that is served on every node's address, the unspecified address
	Scope    string            // of Backends: ScopeAll or ScopeLocal
	Slot     uint32            // of the first of Backends
	Backends []netip.AddrPort
}

// Scopes of a FrontendRow.
const (
	ScopeAll   = "of all nodes"
	ScopeLocal = "of this node only"
)

// Address says that the row is of an address alone: of a port that no service has.
func (f *FrontendRow) Address() bool { return f.Flags&bpf.FrontendAddress != 0 }

// SocketFrontend is what a socket finds (sock.c), of loopback addresses one of the node. A port of a node's address may be
// a NodePort; what only another node's own backends serve is left to that node.
func (d *Datapath) SocketFrontend(f model.FrontendKey) (*FrontendRow, error) {
	svc, err := row[bpf.Service](d.maps["lash_services"], serviceKey(f))
	if svc != nil || err != nil {
		return d.withBackends(svc, f, bpf.FrontendLocalIn, err)
	}
	remote := false
	ep, err := d.EndpointRow(f.Addr)
	switch {
	case err != nil:
		return nil, err
	case f.Addr.IsLoopback():
	case ep == nil:
		_, e, err := d.IPCacheRow(f.Addr)
		if err != nil || e == nil || e.Identity != bpf.IdentityRemoteNode && e.Identity != bpf.IdentityAPIServer {
			return nil, err
		}
		remote = true
	case ep.Flags&bpf.EndpointNodePort == 0:
		return nil, nil
	}
	f = everyNode(f)
	svc, err = row[bpf.Service](d.maps["lash_services"], serviceKey(f))
	if svc != nil && remote && svc.Flags&bpf.FrontendLocalOut != 0 {
		return nil, nil
	}
	return d.withBackends(svc, f, bpf.FrontendLocalIn, err)
}

// PacketFrontend is what a packet finds (lib/lb.h), from inside of the cluster or from outside.
func (d *Datapath) PacketFrontend(f model.FrontendKey, outside bool) (*FrontendRow, error) {
	local := uint32(bpf.FrontendLocalIn)
	if outside {
		local = bpf.FrontendLocalOut
	}
	if ports := f.Proto == model.ProtoTCP || f.Proto == model.ProtoUDP || f.Proto == model.ProtoSCTP; ports {
		svc, err := row[bpf.Service](d.maps["lash_services"], serviceKey(f))
		if svc != nil || err != nil {
			return d.withBackends(svc, f, local, err)
		}
		if ep, err := d.EndpointRow(f.Addr); err != nil || ep != nil && ep.Flags&bpf.EndpointNodePort == 0 {
			return nil, err
		} else if ep != nil {
			f = everyNode(f)
			svc, err := row[bpf.Service](d.maps["lash_services"], serviceKey(f))
			return d.withBackends(svc, f, local, err)
		}
	} else if ep, err := d.EndpointRow(f.Addr); ep != nil || err != nil {
		return nil, err
	}
	f.L4 = model.L4{}
	svc, err := row[bpf.Service](d.maps["lash_services"], serviceKey(f))
	return d.withBackends(svc, f, local, err)
}

// everyNode is the key of the port on every node's address.
func everyNode(f model.FrontendKey) model.FrontendKey {
	if f.Addr.Is4() {
		f.Addr = netip.IPv4Unspecified()
	} else {
		f.Addr = netip.IPv6Unspecified()
	}
	return f
}

// withBackends reads those in the slots that a choice is made from; local is the flag that narrows it to this node's.
func (d *Datapath) withBackends(svc *bpf.Service, f model.FrontendKey, local uint32, err error) (*FrontendRow, error) {
	if svc == nil || err != nil {
		return nil, err
	}
	r := &FrontendRow{Service: *svc, Key: f, Scope: ScopeAll, Slot: svc.First}
	count := svc.Count
	if svc.Flags&local != 0 {
		r.Slot, count, r.Scope = 1, svc.Local, ScopeLocal
	}
	if r.Address() {
		count = 0
	}
	for slot := r.Slot; slot < r.Slot+count; slot++ {
		b, err := row[bpf.Backend](d.maps["lash_backends"], bpf.BackendKey{Service: svc.ID, Slot: slot})
		if err != nil {
			return nil, err
		}
		if b != nil {
			r.Backends = append(r.Backends, netip.AddrPortFrom(b.Addr.Addr(), b.Port.Host()))
		}
	}
	return r, nil
}

func row[V any](m *ebpf.Map, key any) (*V, error) {
	var v V
	switch err := m.Lookup(key, &v); {
	case errors.Is(err, ebpf.ErrKeyNotExist):
		return nil, nil
	case err != nil:
		return nil, err
	}
	return &v, nil
}

// Config is what the programs were loaded with.
func (d *Datapath) Config() Config { return d.cfg }
