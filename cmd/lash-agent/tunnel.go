// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"

	"github.com/cilium/statedb"

	"github.com/lash-net/lash/internal/datapath/netdev"
	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/node"
	"github.com/lash-net/lash/internal/reconcile"
	"github.com/lash-net/lash/internal/state"
)

// tunnelDevice is what the agent knows of the device that packets between nodes are encapsulated by.
type tunnelDevice struct {
	mu       sync.Mutex
	now      netdev.Tunnel // as ensured last
	known    bool          // whether attached is; an earlier agent may have attached something
	attached int           // interface number that from_overlay is attached to; 0: none
	loaded   int           // and that the programs were loaded for
}

// ensureTunnel makes the device, or removes it. The caller holds the lock.
func (a *agent) ensureTunnel(wanted bool) error {
	config := netdev.TunnelConfig{}
	if wanted {
		config = netdev.TunnelConfig{Protocol: a.cfg.TunnelProtocol, Port: a.cfg.TunnelUDPPort(), MTU: a.detection.Load().MTU}
	}
	now, err := a.host.EnsureTunnel(config)
	if err != nil {
		return fmt.Errorf("tunnel: %w", err)
	}
	if len(now.Changes) > 0 {
		a.log.Info("tunnel device", "changes", strings.Join(now.Changes, "; "))
	}
	a.tunnel.now = now
	return nil
}

// overlay is the tunnel device and its port as the programs are to know them. A node that leaves the tunnel loads them
// for the device that is still there, so that what is known of other nodes holds until they are routed to.
func (a *agent) overlay() (ifindex int, port uint16) {
	t := &a.tunnel
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.now.Ifindex != 0 {
		t.loaded = t.now.Ifindex
		return t.loaded, a.cfg.TunnelUDPPort()
	}
	for _, name := range []string{netdev.VXLANDevice, netdev.GeneveDevice} {
		if dev, err := net.InterfaceByName(name); err == nil {
			return dev.Index, 0
		}
	}
	return 0, 0
}

// attachTunnel attaches the program to the device there is, or forgets the one that is gone. The caller holds the lock.
func (a *agent) attachTunnel() error {
	t := &a.tunnel
	if a.cfg.Tunnel() && t.loaded != 0 && t.now.Ifindex != t.loaded {
		return errRestart("device " + t.now.Name + " was replaced")
	}
	if t.known && t.now.Ifindex == t.attached {
		return nil
	}
	for _, name := range []string{netdev.VXLANDevice, netdev.GeneveDevice} {
		if name == t.now.Name {
			continue
		}
		if err := a.dp.DetachOverlay(t.attached, name); err != nil {
			return err
		}
	}
	if t.now.Name != "" {
		if err := a.dp.AttachOverlay(t.now.Ifindex, t.now.Name); err != nil {
			return fmt.Errorf("attach programs to %s: %w", t.now.Name, err)
		}
	}
	t.attached, t.known = t.now.Ifindex, true
	return nil
}

// keepTunnel has the device there as long as this node or another encapsulates.
func (a *agent) keepTunnel(restart func(error)) *state.Task {
	return &state.Task{
		Name:   "tunnel-device",
		Inputs: []state.Input{state.From(a.tables.Nodes.ToTable())},
		Do: func(context.Context) error {
			txn := a.tables.DB.ReadTxn()
			wanted := node.WantsTunnel(a.nodeCfg, state.Rows(txn, a.tables.Nodes))
			if complete, _ := a.tables.Nodes.Initialized(txn); !wanted && !complete {
				return nil
			}
			a.tunnel.mu.Lock()
			defer a.tunnel.mu.Unlock()
			if err := a.ensureTunnel(wanted); err != nil {
				return err
			}
			err := a.attachTunnel()
			if r, ok := err.(errRestart); ok {
				restart(r)
				return nil
			}
			return err
		},
	}
}

// mendTunnel makes the device anew that somebody else has changed or removed.
func (a *agent) mendTunnel() error {
	a.tunnel.mu.Lock()
	defer a.tunnel.mu.Unlock()
	if a.tunnel.now.Name == "" {
		return nil
	}
	if err := a.ensureTunnel(true); err != nil {
		return err
	}
	return a.attachTunnel()
}

// announceTunnel tells the other nodes whether this one takes encapsulated packets. It is done when the device and its
// program are in place, or, by a node that has left the tunnel, when its own rows send nothing there any more.
func (a *agent) announceTunnel(ipcache *reconcile.Loop[netip.Prefix, model.IPCacheEntry]) *state.Task {
	return &state.Task{
		Name:   "announce-tunnel",
		Inputs: []state.Input{state.From(a.tables.Nodes.ToTable()), state.From(a.tables.NodeObjects.ToTable()), state.From(a.tables.TunnelPaths.ToTable())},
		Do: func(ctx context.Context) error {
			txn := a.tables.DB.ReadTxn()
			own, _, ok := a.tables.NodeObjects.Get(txn, state.NodeObjectBySource(model.SourceCustomResource, a.name))
			complete, _ := a.tables.Nodes.Initialized(txn)
			if !ok || !complete || own.Tunnel == a.nodeCfg.Tunnel {
				return nil
			}
			if err := ipcache.Sync(ctx); err != nil {
				return err
			}
			for p := range a.tables.TunnelPaths.All(a.tables.DB.ReadTxn()) {
				if a.nodeCfg.Tunnel == "" && p.Marked {
					return nil
				}
			}
			if err := a.api.AnnounceTunnel(ctx, a.name, a.nodeCfg.Tunnel); err != nil {
				return err
			}
			a.log.Info("tunnel announced", "before", own.Tunnel, "now", a.nodeCfg.Tunnel)
			return nil
		},
	}
}

// intoTunnel reports whether the route leads another node's pods into the tunnel: the node's own pod CIDR has no MTU.
func intoTunnel(r model.Route) bool { return r.Dev == netdev.HostDevice && r.MTU > 0 }

// recorded is a target that notes in tunnel-paths what it has: there, and not where it is wanted, the other target's
// loop sees how far this one is.
type recorded[V any] struct {
	reconcile.Target[netip.Prefix, V]
	tables *state.Tables
	set    func(*state.TunnelPath, V)
	done   func(statedb.WriteTxn) // of the first List; nil after it
}

// record announces that tunnel-paths is complete only when the target has been listed.
func record[V any](tables *state.Tables, target reconcile.Target[netip.Prefix, V], set func(*state.TunnelPath, V)) *recorded[V] {
	txn := tables.DB.WriteTxn(tables.TunnelPaths)
	defer txn.Commit()
	var v V
	return &recorded[V]{target, tables, set, tables.TunnelPaths.RegisterInitializer(txn, fmt.Sprintf("list of %T", v))}
}

// note writes rows; those that are not in it are as if the target had the zero V if all is true.
func (r *recorded[V]) note(rows map[netip.Prefix]V, all bool) error {
	txn := r.tables.DB.WriteTxn(r.tables.TunnelPaths)
	defer txn.Abort()
	paths := map[netip.Prefix]V{}
	if all {
		var none V
		for p := range r.tables.TunnelPaths.All(txn) {
			paths[p.Prefix] = none
		}
	}
	for p, v := range rows {
		if aboutTunnel(p) {
			paths[p] = v
		}
	}
	changed := all && r.done != nil
	for p, v := range paths {
		before, _, _ := r.tables.TunnelPaths.Get(txn, state.TunnelPathByPrefix(p))
		after := before
		after.Prefix = p
		r.set(&after, v)
		if after == before {
			continue
		}
		changed = true
		var err error
		if after.Marked || after.Routed {
			_, _, err = r.tables.TunnelPaths.Insert(txn, after)
		} else {
			_, _, err = r.tables.TunnelPaths.Delete(txn, after)
		}
		if err != nil {
			return err
		}
	}
	if all && r.done != nil {
		r.done(txn)
		r.done = nil
	}
	if changed {
		txn.Commit()
	}
	return nil
}

func (r *recorded[V]) List(ctx context.Context) (map[netip.Prefix]V, error) {
	rows, err := r.Target.List(ctx)
	if err == nil {
		err = r.note(rows, true)
	}
	return rows, err
}

// claim notes a step that would leave a prefix routed and not marked, were the other loop to take its own at the same
// time, before it is done: the one that comes second is refused, and looks again.
func (r *recorded[V]) claim(p netip.Prefix, v V) error {
	txn := r.tables.DB.WriteTxn(r.tables.TunnelPaths)
	defer txn.Abort()
	before, _, _ := r.tables.TunnelPaths.Get(txn, state.TunnelPathByPrefix(p))
	after := before
	after.Prefix = p
	r.set(&after, v)
	routes, unmarks := after.Routed && !before.Routed, before.Marked && !after.Marked
	switch {
	case !routes && !unmarks:
		return nil
	case after.Routed && !after.Marked:
		return fmt.Errorf("%s: the way into the tunnel is changing", p)
	}
	var err error
	if after.Marked || after.Routed {
		_, _, err = r.tables.TunnelPaths.Insert(txn, after)
	} else {
		_, _, err = r.tables.TunnelPaths.Delete(txn, after)
	}
	if err == nil {
		txn.Commit()
	}
	return err
}

// aboutTunnel: the prefix may be another node's pod CIDR. Single addresses, of which there are ten thousands, are not noted.
func aboutTunnel(p netip.Prefix) bool { return !p.IsSingleIP() && p.Bits() > 0 }

func (r *recorded[V]) Put(ctx context.Context, p netip.Prefix, v V) error {
	if !aboutTunnel(p) {
		return r.Target.Put(ctx, p, v)
	}
	if err := r.claim(p, v); err != nil {
		return err
	}
	if err := r.Target.Put(ctx, p, v); err != nil {
		return err
	}
	return r.note(map[netip.Prefix]V{p: v}, false)
}

func (r *recorded[V]) Delete(ctx context.Context, p netip.Prefix) error {
	if !aboutTunnel(p) {
		return r.Target.Delete(ctx, p)
	}
	var none V
	if err := r.claim(p, none); err != nil {
		return err
	}
	if err := r.Target.Delete(ctx, p); err != nil {
		return err
	}
	return r.note(map[netip.Prefix]V{p: none}, false)
}
