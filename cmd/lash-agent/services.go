// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"

	"github.com/lash-net/lash/internal/datapath"
	"github.com/lash-net/lash/internal/datapath/netdev"
	"github.com/lash-net/lash/internal/k8s"
	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/node"
	"github.com/lash-net/lash/internal/reconcile"
	"github.com/lash-net/lash/internal/server"
	"github.com/lash-net/lash/internal/service"
	"github.com/lash-net/lash/internal/state"
)

// startServices keeps the service maps equal to the cluster's services and attaches the socket programs, or takes
// them away if kube-proxy is to do the work.
func (a *agent) startServices(ctx context.Context, g *group) error {
	if !a.cfg.KubeProxyReplacement {
		return a.dp.DetachCgroup()
	}
	target := a.dp.ServicePorts()
	known, err := target.List(ctx)
	if err != nil {
		return fmt.Errorf("read the service maps: %w", err)
	}
	a.noServices = len(known) == 0
	stage := service.New(a.tables, a.serviceConfig(known))
	forget := a.forgetRemoved(target)
	loop := reconcile.New(reconcile.Config[uint32, model.ServicePort]{
		Name: "datapath-services", Target: target, Desired: state.DesiredChanges(a.tables.DB, a.tables.ServicePorts, state.SplitServicePort),
		Equal: datapath.SameServicePort, Written: func(int, int) { forget.kick() }, Report: a.tables.Report, Log: a.log, Throttle: serviceThrottle, Parallel: servicesAtOnce,
	})
	a.services = loop
	g.start("service-stage", stage.Run)
	g.start("datapath-services", loop.Run)
	g.start("service-sweep", func(ctx context.Context) error { return forget.run(ctx, loop) })
	a.answerHealth(g)
	path, err := cgroupRoot(a.cfg.CgroupRoot)
	if err != nil {
		return err
	}
	if err := a.dp.AttachCgroup(path); err != nil {
		return fmt.Errorf("attach socket programs to cgroup %s (cgroup-root): %w", path, err)
	}
	a.attached.Store(true)
	return nil
}

// startServiceRoutes leads what the node itself sends to services' addresses to lash_host, and returns the loop: for what the
// socket programs cannot translate. Where kube-proxy serves there are none.
func (a *agent) startServiceRoutes(g *group) *reconcile.Loop[netip.Prefix, model.Route] {
	loop := reconcile.New(reconcile.Config[netip.Prefix, model.Route]{
		Name: "service-routes", Target: a.host.ServiceRoutes(), Desired: node.DesiredServiceRoutes(a.tables, a.nodeCfg),
		Equal: reconcile.Comparable[model.Route], Report: a.tables.Report, Log: a.log, Throttle: rowThrottle,
	})
	g.start("service-routes", loop.Run)
	return loop
}

// lbFact is how services are served.
func (a *agent) lbFact() server.LoadBalancing {
	cfg := a.cfg
	f := server.LoadBalancing{
		Mode: map[string]string{"snat": "SNAT", "dsr": "DSR", "hybrid": "Hybrid"}[cfg.LBMode], Algorithm: "Random", SessionAffinity: cfg.SessionAffinity,
		NodePortRange: fmt.Sprintf("%d-%d", cfg.NodePortRange.First, cfg.NodePortRange.Last), Annotations: k8s.ServiceAnnotations(),
	}
	if cfg.LBMode != "snat" {
		f.DSRDispatch = map[string]string{"opt": "IP Option/Extension", "ipip": "IPIP", "geneve": "Geneve"}[cfg.LBDSRDispatch]
	}
	if cfg.LBAlgorithm == "maglev" {
		f.Algorithm = fmt.Sprintf("Maglev (Table Size: %d)", cfg.LBMaglevTableSize)
	}
	f.Acceleration, f.NotAccelerated = a.acceleration()
	return f
}

// answerHealth answers load balancers, and who asks for kube-proxy.
func (a *agent) answerHealth(g *group) {
	healthy := func() bool { return a.phase.Load().ready }
	checks := server.NewServiceHealth(a.tables, healthy, a.log)
	context.AfterFunc(g.ctx, func() { checks.Close() })
	a.task(g, &state.Task{Name: "service-health-checks", Inputs: []state.Input{state.From(a.tables.HealthChecks.ToTable())}, Do: checks.Sync})
	if addr := a.cfg.KPRHealthzBindAddr; addr != "" {
		g.start("kube-proxy-healthz", func(ctx context.Context) error {
			return server.ServeProxyHealth(ctx, addr, healthy, a.takesConnections)
		})
	}
}

// takesConnections: load balancers may send new ones to the node, for nobody is about to remove it.
func (a *agent) takesConnections() bool {
	n, _, ok := a.tables.NodeObjects.Get(a.tables.DB.ReadTxn(), state.NodeObjectBySource(model.SourceKubernetes, a.name))
	return !ok || !n.Leaving
}

// forgetting makes the datapath forget backends that are gone, as soon as they are and once after the start: some may have
// gone while the agent was absent.
type forgetting struct {
	a      *agent
	target *datapath.ServicePorts
	due    chan struct{}
}

func (a *agent) forgetRemoved(target *datapath.ServicePorts) *forgetting {
	return &forgetting{a, target, make(chan struct{}, 1)}
}

// kick is called after each pass that wrote.
func (f *forgetting) kick() {
	if !f.target.TakeRemoved() {
		return
	}
	select {
	case f.due <- struct{}{}:
	default:
	}
}

// Bounds of the time between two looks at all connections, and before one that failed is tried again.
const (
	forgetThrottle = 200 * time.Millisecond
	forgetRetry    = 5 * time.Second
)

func (f *forgetting) run(ctx context.Context, loop *reconcile.Loop[uint32, model.ServicePort]) error {
	// Members that have not been read yet are not gone.
	for {
		complete, done := f.a.tables.ServicePorts.Initialized(f.a.tables.DB.ReadTxn())
		if complete && loop.Sync(ctx) == nil {
			break
		}
		select {
		case <-ctx.Done():
			return nil
		case <-done:
		case <-time.After(forgetRetry):
		}
	}
	health := reconcile.Health{Name: "service-sweep"}
	for {
		n, err := f.a.dp.Forget(ctx, f.a.destroySockets)
		if ctx.Err() != nil {
			return nil
		}
		again := (<-chan time.Time)(nil)
		switch {
		case errors.Is(err, netdev.ErrNoSockDestroy):
			f.a.log.Warn(err.Error())
			err = nil
		case err != nil:
			again = time.After(forgetRetry)
		}
		if n != (datapath.Forgotten{}) {
			f.a.log.Info("backends that are gone are forgotten", "connections", n.Connections, "affinities", n.Affinities, "sockets", n.Sockets+n.Pins, "destroyed", n.Destroyed)
		}
		health.LastSuccess, health.Errors, health.Message = time.Now(), 0, ""
		if err != nil {
			health.LastError, health.Errors, health.Message = time.Now(), health.Errors+1, err.Error()
		}
		f.a.tables.Report(health)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(forgetThrottle):
		}
		select {
		case <-ctx.Done():
			return nil
		case <-f.due:
		case <-again:
		}
	}
}

// destroySockets ends those of the cookies in the network namespaces of this node and of its pods.
func (a *agent) destroySockets(cookies map[uint64]bool) (n int, err error) {
	if n, err = netdev.DestroySockets(cookies); err != nil {
		return n, err
	}
	for _, ep := range state.Rows(a.tables.DB.ReadTxn(), a.tables.Endpoints) {
		ns, err := os.Open(ep.NetnsPath)
		if err != nil {
			continue // the pod is gone, and its sockets with it
		}
		err = netdev.InNetns(ns, func() error {
			more, err := netdev.DestroySockets(cookies)
			n += more
			return err
		})
		ns.Close()
		if err != nil {
			return n, fmt.Errorf("pod %s: %w", ep.PodName(), err)
		}
	}
	return n, nil
}

// serviceConfig is what the stage needs of the configuration; known is what an earlier agent left in the kernel.
func (a *agent) serviceConfig(known map[uint32]model.ServicePort) service.Config {
	cfg := a.cfg
	return service.Config{
		Node: a.name, IPv4: cfg.EnableIPv4, IPv6: cfg.EnableIPv6, Topology: cfg.ServiceTopology, Affinity: cfg.SessionAffinity,
		NodePortFirst: cfg.NodePortRange.First, NodePortLast: cfg.NodePortRange.Last,
		Maglev: cfg.LBAlgorithm == "maglev", OutsideClusterIP: cfg.LBExternalClusterIP, AllRanges: cfg.LBSourceRangeAllTypes,
		DSR:     map[uint8]bool{model.ProtoTCP: cfg.LBMode != "snat", model.ProtoUDP: cfg.LBMode == "dsr", model.ProtoSCTP: cfg.LBMode == "dsr"},
		Selects: k8s.Selects, Numbers: service.NewNumbers(known),
	}
}
