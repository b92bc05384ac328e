// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"

	"github.com/lash-net/lash/internal/datapath"
	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/reconcile"
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
	stage := service.New(a.tables, a.serviceConfig(known))
	loop := reconcile.New(reconcile.Config[uint32, model.ServicePort]{
		Name: "datapath-services", Target: target, Desired: state.DesiredChanges(a.tables.DB, a.tables.ServicePorts, state.SplitServicePort),
		Equal: datapath.SameServicePort, Report: a.tables.Report, Log: a.log, Throttle: serviceThrottle,
	})
	g.start("service-stage", stage.Run)
	g.start("datapath-services", loop.Run)
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

// serviceConfig is what the stage needs of the configuration; known is what an earlier agent left in the kernel.
func (a *agent) serviceConfig(known map[uint32]model.ServicePort) service.Config {
	return service.Config{
		Node: a.name, IPv4: a.cfg.EnableIPv4, IPv6: a.cfg.EnableIPv6, Topology: true, NodePortFirst: a.cfg.NodePortRange.First, NodePortLast: a.cfg.NodePortRange.Last,
		Numbers: service.NewNumbers(known),
	}
}
