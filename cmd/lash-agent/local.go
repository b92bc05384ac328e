// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/cilium/statedb"

	v2 "github.com/lash-net/lash/api/v2"
	"github.com/lash-net/lash/internal/cni"
	"github.com/lash-net/lash/internal/config"
	"github.com/lash-net/lash/internal/datapath"
	"github.com/lash-net/lash/internal/datapath/netdev"
	"github.com/lash-net/lash/internal/k8s"
	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/node"
	"github.com/lash-net/lash/internal/state"
)

// errRestart ends the agent so that it starts anew with what changed; the datapath forwards meanwhile.
type errRestart string

func (e errRestart) Error() string { return "restart needed: " + string(e) }

func localCheckpoint(cfg *config.Config) string { return filepath.Join(cfg.StateDir, "node.json") }

func deletionsDir(cfg *config.Config) string {
	return filepath.Join(filepath.Dir(cfg.StateDir), "deletions")
}

// restoreLocal writes the local node as the last agent knew it, so that a node that ran before starts without an API
// server.
func (a *agent) restoreLocal() {
	b, err := os.ReadFile(localCheckpoint(a.cfg))
	if errors.Is(err, os.ErrNotExist) {
		return
	}
	var n model.Node
	if err == nil {
		err = json.Unmarshal(b, &n)
	}
	if err == nil && n.Name != a.name {
		err = fmt.Errorf("it is of node %q", n.Name)
	}
	if err != nil {
		a.log.Warn("checkpoint of the node is not used", "path", localCheckpoint(a.cfg), "error", err)
		return
	}
	// Families may have been switched off since; Local filters what objects say in the same way.
	n = node.Local(a.nodeCfg, model.Node{Routers: n.Routers, Health: n.Health}, []state.NodeObject{
		{Source: model.SourceKubernetes, Name: a.name, Addrs: n.Addrs, PodCIDRs: n.PodCIDRs, Zone: n.Zone, Labels: n.Labels},
		{Source: model.SourceCustomResource, Name: a.name, PodCIDRs: n.PodCIDRs},
	})
	off := func(r netip.Addr) bool { return !a.nodeCfg.Enabled(r) }
	n.Routers, n.Health = slices.DeleteFunc(n.Routers, off), slices.DeleteFunc(n.Health, off)
	state.Insert(a.tables.DB, a.tables.Local, n)
}

// local is the row of this node.
func (a *agent) local(txn statedb.ReadTxn) (model.Node, bool) {
	n, _, ok := a.tables.Local.Get(txn, state.NodeByName(a.name))
	return n, ok
}

// updateLocal changes the row of this node and its checkpoint.
func (a *agent) updateLocal(change func(model.Node) model.Node) (model.Node, error) {
	w := a.tables.DB.WriteTxn(a.tables.Local)
	defer w.Abort()
	prev, _ := a.local(w)
	n := change(prev)
	if state.EqualNode(prev, n) {
		return n, nil
	}
	if _, _, err := a.tables.Local.Insert(w, n); err != nil {
		return n, err
	}
	b, err := json.Marshal(n)
	if err != nil {
		return n, err
	}
	if err := os.MkdirAll(a.cfg.StateDir, 0o755); err != nil {
		return n, fmt.Errorf("checkpoint of the node: %w", err)
	}
	if err := cni.WriteFile(localCheckpoint(a.cfg), b, 0o644); err != nil {
		return n, fmt.Errorf("checkpoint of the node: %w", err)
	}
	w.Commit()
	a.log.Info("local node changed", "addresses", n.Addrs, "podCIDRs", n.PodCIDRs, "routers", n.Routers)
	return n, nil
}

// localNode keeps the row of this node equal to what its objects say. Programs are loaded for the node's pod CIDRs: other
// ones need a restart.
func (a *agent) localNode(restart func(error)) *state.Task {
	return &state.Task{
		Name:   "local-node",
		Inputs: []state.Input{state.From(a.tables.NodeObjects.ToTable())},
		Do: func(context.Context) error {
			n, err := a.updateLocal(func(prev model.Node) model.Node {
				return node.Local(a.nodeCfg, prev, a.ownObjects(a.tables.DB.ReadTxn()))
			})
			if changed := a.cidrsChanged(n); err == nil && changed != nil {
				restart(changed)
			}
			return err
		},
	}
}

// cidrsChanged is the reason to restart if the programs were loaded for other pod CIDRs than the node has.
func (a *agent) cidrsChanged(n model.Node) error {
	if loaded := a.loaded.Load(); loaded != nil && !slices.Equal(*loaded, n.PodCIDRs) {
		return errRestart(fmt.Sprintf("the pod CIDRs of the node changed from %v to %v", *loaded, n.PodCIDRs))
	}
	return nil
}

// ownObjects are the Node and the CiliumNode of this node, as far as they have been read.
func (a *agent) ownObjects(txn statedb.ReadTxn) []state.NodeObject {
	var out []state.NodeObject
	for _, source := range []string{model.SourceKubernetes, model.SourceCustomResource} {
		if o, _, ok := a.tables.NodeObjects.Get(txn, state.NodeObjectBySource(source, a.name)); ok {
			out = append(out, o)
		}
	}
	return out
}

// waitForCIDRs returns when the node has its addresses and a pod CIDR of each enabled family.
func (a *agent) waitForCIDRs(ctx context.Context) error {
	said := ""
	for {
		txn := a.tables.DB.ReadTxn()
		_, localChanged := a.tables.Local.AllWatch(txn)
		_, objectsChanged := a.tables.NodeObjects.AllWatch(txn)
		n, _ := a.local(txn)
		if err := a.ipam.SetCIDRs(n.PodCIDRs); err != nil {
			a.log.Error("pod CIDR cannot be used", "error", err)
		}
		_, err := a.ipam.Ready()
		if len(n.Addrs) == 0 {
			err = fmt.Errorf("node %s has no InternalIP yet: its Node object must exist and the API server must answer (see Kubernetes in lash status)", a.name)
		}
		if err == nil {
			return nil
		}
		for _, o := range a.ownObjects(txn) {
			if o.Error != "" {
				err = fmt.Errorf("%w; the operator says: %s", err, o.Error)
			}
		}
		a.phase.Store(&phase{waiting: err.Error()})
		ws := statedb.NewWatchSet()
		ws.Add(localChanged, objectsChanged)
		// Most starts wait some milliseconds for their CIDRs: that is not worth a line.
		quiet, cancel := ctx, context.CancelFunc(func() {})
		if said != err.Error() {
			quiet, cancel = context.WithTimeout(ctx, 2*time.Second)
		}
		_, _ = ws.Wait(quiet, 0)
		timedOut := quiet.Err() != nil
		cancel()
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if timedOut {
			a.log.Info("waiting: "+err.Error(), "node", a.name)
			said = err.Error()
		}
	}
}

// prepareNode chooses devices and router addresses and makes the node's own pair of devices.
func (a *agent) prepareNode() (netdev.Base, error) {
	n, _ := a.local(a.tables.DB.ReadTxn())
	found, err := a.detect(n)
	if err != nil {
		return netdev.Base{}, err
	}
	wanted := append(slices.Clone(n.Routers), deviceAddrs(netdev.HostDevice)...)
	r4, r6, err := a.ipam.AllocateRouter(wanted...)
	if err != nil {
		return netdev.Base{}, err
	}
	base, err := a.host.EnsureBase(netdev.BaseConfig{Router4: r4, Router6: r6, MTU: found.MTU})
	if err != nil {
		return base, err
	}
	for _, change := range base.Changes {
		a.log.Info("node prepared", "change", change)
	}
	if a.cfg.Tunnel() { // the programs are loaded for it
		a.tunnel.mu.Lock()
		err := a.ensureTunnel(true)
		a.tunnel.mu.Unlock()
		if err != nil {
			return base, err
		}
	}
	routeMTU := a.routeMTU(found.MTU)
	_, err = a.updateLocal(func(n model.Node) model.Node {
		n.Routers, n.RouteMTU = nil, routeMTU
		for _, r := range []netip.Addr{r4, r6} {
			if r.IsValid() {
				n.Routers = append(n.Routers, r)
			}
		}
		return n
	})
	if err != nil {
		return base, err
	}
	a.network.Store(&model.PodNetwork{Router4: r4, Router6: r6, MTU: found.MTU, RouteMTU: routeMTU})
	return base, nil
}

// routeMTU is the MTU of pods' default routes and of routes through the tunnel; that of devices is mtu.
func (a *agent) routeMTU(mtu int) int {
	if a.cfg.Tunnel() {
		return mtu - a.cfg.TunnelOverhead()
	}
	return mtu
}

// detect chooses the node's devices and keeps their rows.
func (a *agent) detect(n model.Node) (netdev.Detection, error) {
	found, err := a.host.Detect(netdev.DetectConfig{NodeAddrs: n.Addrs, Devices: a.cfg.Devices, DirectRouting: a.cfg.DirectRoutingDevice, MTU: a.cfg.MTU})
	if err != nil {
		return found, fmt.Errorf("choose devices: %w", err)
	}
	w := a.tables.DB.WriteTxn(a.tables.Devices)
	defer w.Abort()
	if state.Replace(w, a.tables.Devices, found.Devices, state.EqualDevice, state.All[model.Device]) {
		w.Commit()
		for _, d := range found.Devices {
			a.log.Info("device selected", "device", d.Name, "ifindex", d.Ifindex, "reason", d.Reason, "directRouting", d.DirectRouting, "mtu", d.MTU)
		}
	}
	a.detection.Store(&found)
	return found, nil
}

// deviceAddrs are the addresses of a device of the node; none if it is not there.
func deviceAddrs(name string) []netip.Addr {
	dev, err := net.InterfaceByName(name)
	if err != nil {
		return nil
	}
	addrs, err := dev.Addrs()
	if err != nil {
		return nil
	}
	var out []netip.Addr
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil && !p.Addr().IsLinkLocalUnicast() {
			out = append(out, p.Addr().Unmap())
		}
	}
	return out
}

func (a *agent) datapathConfig(base netdev.Base) (datapath.Config, error) {
	n, _ := a.local(a.tables.DB.ReadTxn())
	cfg := a.cfg
	c := datapath.Config{
		Root:        filepath.Join(cfg.BPFRoot, "lash"),
		HostIfindex: base.HostIfindex, HostMAC: base.HostMAC, Routers: n.Routers, PodCIDRs: n.PodCIDRs,
		HostRouting: a.routing.BPF,
		Masquerade4: cfg.EnableIPv4 && cfg.EnableIPv4Masquerade && cfg.EnableBPFMasquerade, Masquerade6: cfg.EnableIPv6 && cfg.EnableIPv6Masquerade && cfg.EnableBPFMasquerade,
		ConnMax: uint32(cfg.BPFCTMax), ServiceMax: uint32(cfg.BPFLBMapMax), NoTCX: !cfg.EnableTCX,
		OutsideClusterIP: cfg.LBExternalClusterIP, DropNoBackend: cfg.ServiceNoBackend == "drop", NoBindProtection: !cfg.NodePortBindProtection,
		SockHostOnly: cfg.LBSockHostNSOnly,
		MaglevSize:   uint32(cfg.LBMaglevTableSize), MaglevSeed: cfg.MaglevSeed(),
		XDP: cfg.LBAcceleration != "disabled", XDPSpread: cfg.LBXDPSpread,
		NoServices: !cfg.KubeProxyReplacement, DSR: cfg.KubeProxyReplacement,
		DSRGeneve: cfg.LBDSRDispatch == "geneve" && cfg.DSRProblem() == "", DSRPort: cfg.DSRPort(),
	}
	c.OverlayIfindex, c.TunnelPort = a.overlay()
	c.TunnelGeneve = cfg.TunnelProtocol == netdev.Geneve
	if d := a.detection.Load(); d != nil {
		if direct, ok := d.DirectRouting(); ok {
			c.DirectIfindex, c.TunnelMTU = direct.Ifindex, direct.MTU-cfg.TunnelOverhead()
			for _, a := range []netip.Addr{direct.IPv4, direct.IPv6} {
				if a.IsValid() {
					c.NodeAddrs = append(c.NodeAddrs, a)
				}
			}
		}
	}
	for _, p := range []netip.Prefix{cfg.IPv4NativeRoutingCIDR, cfg.IPv6NativeRoutingCIDR} {
		if p.IsValid() && a.nodeCfg.Enabled(p.Addr()) {
			c.NativeCIDRs = append(c.NativeCIDRs, p)
		}
	}
	near, far, err := sourcePorts(cfg.NodePortRange)
	if err != nil {
		return c, err
	}
	c.SNATMin, c.SNATMax = near.First, near.Last
	if cfg.EnableBPFMasquerade { // otherwise those are netfilter's
		c.SNATFarMin, c.SNATFarMax = far.First, far.Last
	}
	return c, nil
}

// excluded are destinations that keep pods' addresses, IPv4 first: the native routing CIDR, or, if none is set, the pod
// CIDRs of this node, and in either case, by the ipcache, those of all others.
func (a *agent) excluded() []netip.Prefix {
	n, _ := a.local(a.tables.DB.ReadTxn())
	var out []netip.Prefix
	for _, v6 := range []bool{false, true} {
		native := a.cfg.IPv4NativeRoutingCIDR
		if v6 {
			native = a.cfg.IPv6NativeRoutingCIDR
		}
		if native.IsValid() && a.nodeCfg.Enabled(native.Addr()) {
			out = append(out, native)
			continue
		}
		for _, c := range n.PodCIDRs {
			if c.Addr().Is6() == v6 {
				out = append(out, c)
			}
		}
	}
	return out
}

// publishNode keeps the CiliumNode of this node equal to what the other nodes must know.
func (a *agent) publishNode() *state.Task {
	return &state.Task{
		Name:   "publish-node",
		Inputs: []state.Input{state.From(a.tables.Local.ToTable()), state.From(a.tables.NodeObjects.ToTable())},
		Do: func(ctx context.Context) error {
			txn := a.tables.DB.ReadTxn()
			n, ok := a.local(txn)
			own, _, haveNode := a.tables.NodeObjects.Get(txn, state.NodeObjectBySource(model.SourceKubernetes, a.name))
			if complete, _ := a.tables.NodeObjects.Initialized(txn); !ok || !haveNode || !complete || len(n.Addrs) == 0 {
				return nil
			}
			want := k8s.PublishedNode{Name: a.name, OwnerUID: own.UID}
			for _, x := range n.Addrs {
				want.Addresses = append(want.Addresses, v2.NodeAddress{Type: v2.InternalIP, IP: x.String()})
			}
			for _, x := range n.Routers {
				want.Addresses = append(want.Addresses, v2.NodeAddress{Type: v2.CiliumInternalIP, IP: x.String()})
			}
			for _, x := range n.Health {
				if x.Is4() {
					want.Health.IPv4 = x.String()
				} else {
					want.Health.IPv6 = x.String()
				}
			}
			have, _, exists := a.tables.NodeObjects.Get(txn, state.NodeObjectBySource(model.SourceCustomResource, a.name))
			cidrs := true
			if a.cfg.IPAM == node.IPAMKubernetes {
				want.PodCIDRs = []string{}
				for _, c := range n.PodCIDRs {
					want.PodCIDRs = append(want.PodCIDRs, c.String())
				}
				cidrs = slices.Equal(have.PodCIDRs, n.PodCIDRs)
			}
			if exists && cidrs && have.OwnerUID == own.UID && slices.Equal(have.Addrs, n.Addrs) && slices.Equal(have.Routers, n.Routers) &&
				slices.Equal(have.Health, n.Health) {
				return nil
			}
			return a.api.PublishNode(ctx, want)
		},
	}
}
