// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/lash-net/lash/internal/cni"
	"github.com/lash-net/lash/internal/config"
	"github.com/lash-net/lash/internal/datapath"
	"github.com/lash-net/lash/internal/datapath/netdev"
	"github.com/lash-net/lash/internal/endpoint"
	"github.com/lash-net/lash/internal/events"
	"github.com/lash-net/lash/internal/explain"
	"github.com/lash-net/lash/internal/health"
	"github.com/lash-net/lash/internal/identity"
	"github.com/lash-net/lash/internal/ipam"
	"github.com/lash-net/lash/internal/k8s"
	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/node"
	"github.com/lash-net/lash/internal/reconcile"
	"github.com/lash-net/lash/internal/server"
	"github.com/lash-net/lash/internal/state"
)

// Throttles of the loops: how often at most a burst of changes makes a loop look at its table.
const (
	rowThrottle     = 10 * time.Millisecond
	serviceThrottle = 5 * time.Millisecond
)

// servicesAtOnce are written at the same time: only those that get a Maglev table wait for the kernel.
const servicesAtOnce = 32

// agent is what the parts share. It is filled in by run from top to bottom and not changed afterwards, except where a
// field says so.
type agent struct {
	cfg     *config.Config
	log     *slog.Logger
	name    string // of this node
	started time.Time

	tables  *state.Tables
	api     *k8s.Client
	nodeCfg node.Config
	routing node.HostRouting
	ipam    *ipam.Allocator
	host    *netdev.Host
	dp      *datapath.Datapath // nil until the node has its addresses
	eps     *endpoint.Endpoints
	prober  *health.Prober
	explain *explain.Explainer

	monitoring *monitoring
	hub        atomic.Pointer[events.Hub] // nil until the datapath is open

	kinds        []string                         // API kinds that are watched
	network      atomic.Pointer[model.PodNetwork] // what new pods get
	detection    atomic.Pointer[netdev.Detection]
	tunnel       tunnelDevice
	services     *reconcile.Loop[uint32, model.ServicePort] // nil: kube-proxy serves
	noServices   bool                                       // the kernel had none when the agent started
	kubernetes   atomic.Pointer[apiHealth]
	phase        atomic.Pointer[phase]
	attached     atomic.Bool                       // socket programs
	accelerating sync.Mutex                        // one look at XDP at a time
	slower       atomic.Pointer[map[string]string] // why devices have no XDP, by name; nil: not attached yet
	loaded       atomic.Pointer[[]netip.Prefix]    // pod CIDRs the programs were loaded for
	cniConf      atomic.Pointer[string]
}

// phase is how far the agent is.
type phase struct {
	ready   bool
	waiting string             // for what, while not ready
	dp      *datapath.Datapath // set once it may be asked
}

// run is the table of contents of the agent. It returns when ctx ends or a part fails for good; the datapath goes on
// forwarding in both cases.
func run(ctx context.Context, cfg *config.Config, name string, log *slog.Logger) error {
	a := &agent{cfg: cfg, log: log, name: name, started: time.Now()}
	a.phase.Store(&phase{waiting: "starting"})
	g, ctx := newGroup(ctx)

	// 1. What needs neither kernel nor API server.
	var err error
	if a.tables, err = state.New(); err != nil {
		return err
	}
	defer a.tables.Stop()
	a.ipam = ipam.New(cfg.IPAM, cfg.EnableIPv4, cfg.EnableIPv6)
	a.nodeCfg = nodeConfig(cfg, name)
	a.prober = health.NewProber(health.Config{Tables: a.tables, Port: uint16(cfg.ClusterHealthPort), Log: log})
	a.chooseHostRouting()
	a.monitoring = newMonitoring(cfg)
	a.explain = &explain.Explainer{
		Tables: a.tables, Datapath: func() *datapath.Datapath { return a.phase.Load().dp }, Sockets: func(pods bool) bool { return a.attached.Load() && !(pods && cfg.LBSockHostNSOnly) },
		Peers: explain.Remote{Port: uint16(cfg.ClusterHealthPort)},
	}
	endpointLog := endpoint.NewLog(a.tables, a.endpointChanged)
	g.start("endpoint-log", endpointLog.Run)
	srv := server.New(server.Config{
		Tables: a.tables, Facts: a.facts, Datapath: dumper{a}, Prefilter: dumper{a}, Events: listener{a}, Options: a.monitoring, Explain: a.explain, EndpointLog: endpointLog, Log: log,
	})
	g.start("api", func(ctx context.Context) error { return srv.Serve(ctx, cfg.SocketPath) })
	g.start("health", func(ctx context.Context) error { return srv.ServeHealth(ctx, cfg.AgentHealthPort) })

	// 2. The API server: rows arrive when it answers; nothing below waits for it but the first start of a node.
	if a.api, err = k8s.Connect(cfg.K8sKubeConfigPath, "lash-agent"); err != nil {
		return g.stop(err)
	}
	reflectors := k8s.Reflectors(a.api, a.tables, name, cfg.K8sServiceProxyName, log)
	stages := node.NewStages(a.tables, a.nodeCfg)
	a.restoreLocal()
	for _, r := range reflectors {
		a.kinds = append(a.kinds, r.Name)
		g.start(r.Name, r.Run)
	}
	a.task(g, a.heartbeat())
	a.task(g, a.localNode(g.cancel))
	a.task(g, a.publishNode())
	if err := a.startIdentities(g); err != nil {
		return g.stop(err)
	}

	// 3. The node's own addresses and devices.
	if a.host, err = netdev.OpenHost(); err != nil {
		return g.stop(err)
	}
	defer a.host.Close()
	if err := a.waitForCIDRs(ctx); err != nil {
		return g.stop(err)
	}
	watcher, err := a.host.Watch()
	if err != nil {
		return g.stop(fmt.Errorf("watch the node's devices: %w", err))
	}
	base, err := a.prepareNode()
	if err != nil {
		return g.stop(err)
	}

	// 4. The datapath: programs are loaded once; what an earlier agent attached forwards until it is replaced.
	dpCfg, err := a.datapathConfig(base)
	if err != nil {
		return g.stop(err)
	}
	if a.dp, err = datapath.Open(dpCfg, log); err != nil {
		return g.stop(err)
	}
	a.loaded.Store(&dpCfg.PodCIDRs)
	if n, _ := a.local(a.tables.DB.ReadTxn()); a.cidrsChanged(n) != nil {
		return g.stop(a.cidrsChanged(n))
	}
	defer a.dp.Close()
	ring, err := a.startEvents(g)
	if err != nil {
		return g.stop(err)
	}
	defer ring.Close()
	a.phase.Store(&phase{waiting: "restoring endpoints", dp: a.dp})

	// 5. Loops that make the kernel equal to tables.
	raised := func(why string, err error) {
		if err != nil {
			log.Error("decisions of connections were not invalidated", "why", why, "error", err)
		}
	}
	raise := func(why string) func(int, int) { return func(int, int) { raised(why, a.dp.Raise(why)) } }
	endpoints := reconcile.New(reconcile.Config[netip.Addr, model.LocalAddr]{
		Name: "datapath-endpoints", Target: a.dp.Endpoints(), Desired: node.DesiredLocalAddrs(a.tables, a.nodeCfg),
		Equal: reconcile.Comparable[model.LocalAddr], Written: raise("endpoints"), Report: a.tables.Report, Log: log,
	})
	marks := record(a.tables, a.dp.IPCache(), func(p *state.TunnelPath, v model.IPCacheEntry) { p.Marked = v.Tunnel })
	ways := record(a.tables, a.host.Routes(), func(p *state.TunnelPath, v model.Route) { p.Routed = intoTunnel(v) })
	ipcache := reconcile.New(reconcile.Config[netip.Prefix, model.IPCacheEntry]{
		Name: "datapath-ipcache", Target: marks, Desired: node.DesiredIPCache(a.tables, a.nodeCfg),
		Equal: datapath.SameIPCache, Written: func(int, int) { raised("ipcache", a.dp.RaiseForIPCache()) }, Report: a.tables.Report, Log: log, Throttle: rowThrottle,
	})
	devices := reconcile.New(reconcile.Config[int, model.Device]{
		Name: "datapath-devices", Target: a.dp.Devices(), Desired: state.Desired(a.tables.DB, a.tables.Devices.ToTable(), state.SplitDevice),
		Equal: datapath.SameDevice, Written: raise("devices"), Report: a.tables.Report, Log: log,
	})
	routes := reconcile.New(reconcile.Config[netip.Prefix, model.Route]{
		Name: "node-routes", Target: ways, Desired: state.Desired(a.tables.DB, a.tables.Routes.ToTable(), state.Route.Split),
		Equal: reconcile.Comparable[model.Route], Compare: netdev.CompareRoutes, Written: raise("routes"), Report: a.tables.Report, Log: log,
		Throttle: rowThrottle,
	})
	// Announced before the loops start: until the pods of before are restored, nothing of theirs is deleted.
	a.eps, err = endpoint.New(endpoint.Config{
		Tables: a.tables, Addresses: a.ipam, Devices: a.host, Inventory: a.host, Programs: a.dp, Rows: endpoints,
		Network: a.podNetwork, Identify: func(ep model.Endpoint) (model.Identity, map[string]string) { return identity.Identify(a.tables, ep) }, Socket: cfg.CNISocketPath, StateDir: cfg.StateDir, Deletions: deletionsDir(cfg), Log: log,
	})
	if err != nil {
		return g.stop(err)
	}
	a.startPublishing(g)
	a.task(g, a.endpointIdentities())
	g.start("datapath-endpoints", endpoints.Run)
	g.start("datapath-ipcache", ipcache.Run)
	g.start("datapath-devices", devices.Run)
	g.start("node-routes", routes.Run)
	a.startMasquerading(g)
	g.start("node-stage", func(ctx context.Context) error { return stages.Nodes.Run(ctx, a.tables.DB) })
	g.start("ipcache-stage", func(ctx context.Context) error { return stages.IPCache.Run(ctx, a.tables.DB) })
	g.start("routes-stage", func(ctx context.Context) error { return stages.Routes.Run(ctx, a.tables.DB) })
	g.start("warnings-stage", func(ctx context.Context) error { return stages.Warnings.Run(ctx, a.tables.DB) })

	// 6. Services, at the sockets of the node's cgroup.
	if err := a.startServices(ctx, g); err != nil {
		return g.stop(err)
	}

	// 7. Programs on devices, and pods.
	if err := a.attachNode(ctx, base, devices); err != nil {
		return g.stop(err)
	}
	serviceRoutes := a.startServiceRoutes(g)
	g.start("cni", a.eps.Run)
	g.start("connection-sweep", a.sweep)
	a.task(g, a.exhaustedPorts())
	a.task(g, a.sockmap())
	a.task(g, a.keepAccelerated())
	a.task(g, a.keepTunnel(g.cancel))
	g.start("netlink-watcher", watcher.Run)
	g.start("netlink-changes", func(ctx context.Context) error {
		return a.followKernel(ctx, watcher, base, devices, routes, serviceRoutes)
	})

	// 8. Ready, and what follows from it.
	if err := a.waitUntilReady(ctx, endpoints, ipcache, devices); err != nil {
		return g.stop(err)
	}
	if err := a.announce(); err != nil {
		return g.stop(err)
	}
	frugal()
	a.task(g, a.markNode())
	a.task(g, a.announceTunnel(ipcache))
	a.startHealth(g)
	if cfg.UnmanagedPodWatcherPeriod > 0 {
		a.task(g, a.unmanagedPods())
	}
	return g.wait()
}

// nodeConfig is what the stages of package node need of the configuration.
func nodeConfig(cfg *config.Config, name string) node.Config {
	tunnel := ""
	if cfg.Tunnel() {
		tunnel = fmt.Sprintf("%s:%d", cfg.TunnelProtocol, cfg.TunnelUDPPort())
	}
	return node.Config{
		Tunnel: tunnel, Hybrid: cfg.RoutingMode == "hybrid", UnderlayIPv6: cfg.UnderlayIPv6(),
		Name: name, IPAM: cfg.IPAM, IPv4: cfg.EnableIPv4, IPv6: cfg.EnableIPv6,
		AutoDirectRoutes: cfg.AutoDirectNodeRoutes, SkipUnreachable: cfg.DirectRoutingSkipUnreach,
		NativeCIDR4: cfg.IPv4NativeRoutingCIDR, NativeCIDR6: cfg.IPv6NativeRoutingCIDR, HostDevice: netdev.HostDevice,
		NodePorts: cfg.KubeProxyReplacement, NodePortCIDRs: cfg.NodePortAddresses,
		MasqueradeIP4: cfg.EnableIPv4Masquerade, MasqueradeIP6: cfg.EnableIPv6Masquerade,
	}
}

// attachNode attaches the programs of lash_host and of the node's devices, whose rows are written first.
func (a *agent) attachNode(ctx context.Context, base netdev.Base, devices *reconcile.Loop[int, model.Device]) error {
	if err := devices.Sync(ctx); err != nil {
		return err
	}
	if err := a.dp.AttachHost(base.HostIfindex, netdev.HostDevice); err != nil {
		return fmt.Errorf("attach programs to %s: %w", netdev.HostDevice, err)
	}
	if a.cfg.Tunnel() {
		if err := a.mendTunnel(); err != nil {
			return err
		}
	}
	for _, d := range state.Rows(a.tables.DB.ReadTxn(), a.tables.Devices) {
		if err := a.dp.AttachDevice(d.Ifindex, d.Name); err != nil {
			return fmt.Errorf("attach programs to %s: %w", d.Name, err)
		}
	}
	return a.accelerate()
}

// installation is where the container runtime finds the plugin.
func (a *agent) installation() cni.Installation {
	i := cni.Installation{
		ConfDir: a.cfg.CNIConfDir, BinDir: a.cfg.CNIBinDir, Binary: pluginBinary(), Exclusive: a.cfg.CNIExclusive,
		Socket: a.cfg.CNISocketPath,
	}
	if n := a.network.Load(); n != nil {
		i.MTU, i.RouteMTU = n.MTU, n.RouteMTU
	}
	return i
}

// pluginBinary is beside the agent's own binary.
func pluginBinary() string {
	self, err := os.Executable()
	if err != nil {
		return filepath.Join("/usr/bin", cni.PluginName)
	}
	return filepath.Join(filepath.Dir(self), cni.PluginName)
}

// announce installs the plugin and makes the container runtime use it: from now on the kubelet reports the node ready.
func (a *agent) announce() error {
	i := a.installation()
	if err := i.InstallBinary(); err != nil {
		return fmt.Errorf("install the CNI plugin: %w", err)
	}
	if err := i.WriteConf(); err != nil {
		return err
	}
	conf := filepath.Join(i.ConfDir, cni.ConfName)
	a.cniConf.Store(&conf)
	a.phase.Store(&phase{ready: true, dp: a.dp})
	a.log.Info("agent is ready", "duration", time.Since(a.started).Round(time.Millisecond), "node", a.name, "hostRouting", a.routing.BPF)
	return nil
}

// podNetwork is what new pods get.
func (a *agent) podNetwork() (model.PodNetwork, error) {
	if n := a.network.Load(); n != nil {
		return *n, nil
	}
	return model.PodNetwork{}, errors.New("the agent has no router address yet; see its log")
}
