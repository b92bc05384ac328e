// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"context"
	"errors"
	"fmt"

	"github.com/cilium/ebpf"

	"github.com/lash-net/lash/bpf"
)

// Forgotten counts what Forget removed.
type Forgotten struct{ Connections, Affinities, Pins, Sockets, Destroyed int }

// Forget removes what is remembered of backends that are no members of their service port any more: connections, so that
// the next TCP packet is refused and the next datagram chooses anew, the choices of clients, and of sockets. Sockets that
// are connected to such a backend are destroyed by destroy, which is given their cookies and returns how many it found.
// It must not run before the service maps are complete.
func (d *Datapath) Forget(ctx context.Context, destroy func(cookies map[uint64]bool) (int, error)) (f Forgotten, err error) {
	gone, err := d.strangers()
	if err != nil {
		return f, err
	}
	var conns []bpf.ConnKey
	err = listBatch(d.maps["lash_conn"], "lash_conn", func(k bpf.ConnKey, c bpf.Conn) {
		if leadsTo(gone, c) {
			conns = append(conns, k)
		}
	})
	if err != nil {
		return f, err
	}
	var affinities []bpf.AffinityKey
	err = listBatch(d.maps["lash_affinity"], "lash_affinity", func(k bpf.AffinityKey, v bpf.Affinity) {
		if gone(k.Service, v.Addr, v.Port) {
			affinities = append(affinities, k)
		}
	})
	if err != nil {
		return f, err
	}
	var pins []bpf.SockPinKey
	err = listBatch(d.maps["lash_sock_pin"], "lash_sock_pin", func(k bpf.SockPinKey, v bpf.SockPin) {
		if gone(v.Service, v.Addr, v.Port) {
			pins = append(pins, k)
		}
	})
	if err != nil {
		return f, err
	}
	cookies := map[uint64]bool{}
	var sockets []bpf.SockRevKey
	err = listBatch(d.maps["lash_sock_rev"], "lash_sock_rev", func(k bpf.SockRevKey, v bpf.SockRev) {
		if gone(v.Service, k.Addr, k.Port) {
			sockets, cookies[k.Cookie] = append(sockets, k), true
		}
	})
	if err != nil {
		return f, err
	}

	// Choices first: a socket that is told its backend is gone asks again at once.
	if f.Affinities, err = removeAll(ctx, d.maps["lash_affinity"], affinities); err != nil {
		return f, fmt.Errorf("affinity: %w", err)
	}
	if f.Pins, err = removeAll(ctx, d.maps["lash_sock_pin"], pins); err != nil {
		return f, fmt.Errorf("choice of a socket: %w", err)
	}
	if f.Connections, err = d.forgetConnections(ctx, conns, gone); err != nil {
		return f, fmt.Errorf("connection: %w", err)
	}
	if len(cookies) > 0 && destroy != nil {
		// What a socket asked for is kept until it is destroyed: only by it is it found again after a failure.
		if f.Destroyed, err = destroy(cookies); err != nil {
			return f, fmt.Errorf("sockets: %w", err)
		}
	}
	if f.Sockets, err = removeAll(ctx, d.maps["lash_sock_rev"], sockets); err != nil {
		return f, fmt.Errorf("socket: %w", err)
	}
	return f, nil
}

// leadsTo: the connection leads to a backend that is gone.
func leadsTo(gone func(service uint32, addr bpf.Addr, port bpf.BE16) bool, c bpf.Conn) bool {
	return c.Flags&bpf.ConnDNAT != 0 && c.Service != 0 && gone(c.Service, c.ToAddr, c.ToPort)
}

// forgetConnections removes those of the keys that lead to a backend that is gone still: a client may have used the ports
// again since they were listed.
func (d *Datapath) forgetConnections(ctx context.Context, keys []bpf.ConnKey, gone func(service uint32, addr bpf.Addr, port bpf.BE16) bool) (n int, err error) {
	conns := d.maps["lash_conn"]
	for _, k := range keys {
		if ctx.Err() != nil {
			return n, ctx.Err()
		}
		switch removed, err := removeConnection(conns, k, func(c bpf.Conn) bool { return leadsTo(gone, c) }); {
		case err != nil:
			return n, err
		case removed:
			n++
		}
	}
	return n, nil
}

// strangers tells whether a backend is no member of a service port.
func (d *Datapath) strangers() (func(service uint32, addr bpf.Addr, port bpf.BE16) bool, error) {
	members := map[bpf.MemberKey]struct{}{}
	if err := listBatch(d.maps["lash_members"], "lash_members", func(k bpf.MemberKey, _ uint32) { members[k] = struct{}{} }); err != nil {
		return nil, err
	}
	known := map[bpf.MemberKey]bool{}
	return func(service uint32, addr bpf.Addr, port bpf.BE16) bool {
		k := bpf.MemberKey{Service: service, Addr: addr, Port: port}
		if _, ok := members[k]; ok {
			return false
		}
		if gone, ok := known[k]; ok {
			return gone
		}
		// It may have come since.
		var state uint32
		known[k] = errors.Is(d.maps["lash_members"].Lookup(k, &state), ebpf.ErrKeyNotExist)
		return known[k]
	}, nil
}

func removeAll[K any](ctx context.Context, m *ebpf.Map, keys []K) (n int, err error) {
	for i := range keys {
		if ctx.Err() != nil {
			return n, ctx.Err()
		}
		if err := remove(m, &keys[i]); err != nil {
			return n, err
		}
		n++
	}
	return n, nil
}
