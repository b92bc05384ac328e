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

// ServiceRows are what a socket finds of a frontend: the number of its service port and the backends that it chooses from.
// A port of a node's address may be a NodePort. False: it is none.
func (d *Datapath) ServiceRows(f model.FrontendKey) (id uint32, backends []netip.AddrPort, found bool, err error) {
	svc, err := row[bpf.Service](d.maps["lash_services"], serviceKey(f))
	if svc == nil && err == nil {
		if svc, err = d.nodePort(f); svc == nil {
			return 0, nil, false, err
		}
	}
	if err != nil || svc.Flags&bpf.FrontendAddress != 0 {
		return 0, nil, false, err
	}
	first, count := svc.First, svc.Count
	if svc.Flags&bpf.FrontendLocalIn != 0 {
		first, count = 1, svc.Local
	}
	for slot := first; slot < first+count; slot++ {
		b, err := row[bpf.Backend](d.maps["lash_backends"], bpf.BackendKey{Service: svc.ID, Slot: slot})
		if err != nil {
			return 0, nil, false, err
		}
		if b != nil {
			backends = append(backends, netip.AddrPortFrom(b.Addr.Addr(), b.Port.Host()))
		}
	}
	return svc.ID, backends, true, nil
}

// nodePort is the row of a port that is served on every node's address, if f's is one. What only another node's own
// backends serve is left to that node.
func (d *Datapath) nodePort(f model.FrontendKey) (*bpf.Service, error) {
	ep, err := row[bpf.Endpoint](d.maps["lash_endpoints"], bpf.AddrFrom(f.Addr))
	if err != nil {
		return nil, err
	}
	remote := false
	if ep == nil {
		_, e, err := d.IPCacheRow(f.Addr)
		if err != nil || e == nil || e.Identity != bpf.IdentityRemoteNode && e.Identity != bpf.IdentityAPIServer {
			return nil, err
		}
		remote = true
	} else if ep.Flags&bpf.EndpointNodePort == 0 {
		return nil, nil
	}
	every := netip.IPv4Unspecified()
	if f.Addr.Is6() {
		every = netip.IPv6Unspecified()
	}
	svc, err := row[bpf.Service](d.maps["lash_services"], serviceKey(model.FrontendKey{Addr: every, L4: f.L4}))
	if svc != nil && remote && svc.Flags&bpf.FrontendLocalOut != 0 {
		return nil, nil
	}
	return svc, err
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
