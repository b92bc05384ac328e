// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"time"

	api "github.com/lash-net/lash/api/agent"
	"github.com/lash-net/lash/internal/datapath/netdev"
	"github.com/lash-net/lash/internal/explain"
	"github.com/lash-net/lash/internal/health"
	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/state"
)

// Names of the tasks that keep this node answering.
const (
	taskHealthResponder = "health-responder"
	taskHealthEndpoint  = "health-endpoint"
)

// healthCheck is how often the health endpoint is looked at: its devices are the node's, where others may delete them.
const healthCheck = 30 * time.Second

// startHealth makes this node answer other nodes' probes, at its own addresses and at its health endpoint, and probe
// them. Nothing waits for it.
func (a *agent) startHealth(g *group) {
	a.task(g, a.healthEndpoint(g))
	if !a.cfg.EnableHealthChecking {
		return
	}
	a.task(g, a.healthResponder(g))
	g.start("health-prober", func(ctx context.Context) error { return a.prober.Run(ctx) })
}

// healthResponder answers at the node's own addresses.
func (a *agent) healthResponder(g *group) *state.Task {
	r := health.NewResponder(uint16(a.cfg.ClusterHealthPort), a.log)
	r.Handle("POST "+explain.PathHop, a.explain)
	context.AfterFunc(g.ctx, func() { r.Close() })
	return &state.Task{
		Name:   taskHealthResponder,
		Inputs: []state.Input{state.From(a.tables.Local.ToTable())},
		Do: func(context.Context) error {
			n, _ := a.local(a.tables.DB.ReadTxn())
			return r.Listen(n.Addrs...)
		},
	}
}

// healthEndpoint keeps the health endpoint as it should be and tells the other nodes its addresses, or, if there should be
// none, takes away what an earlier configuration has left. The endpoint listens before anybody can know of it.
func (a *agent) healthEndpoint(g *group) *state.Task {
	var ns *os.File
	t := &state.Task{Name: taskHealthEndpoint}
	publish := func(addrs []netip.Addr) error {
		_, err := a.updateLocal(func(n model.Node) model.Node {
			n.Health = addrs
			return n
		})
		return err
	}
	if !a.cfg.EnableHealthChecking || !a.cfg.EnableHealthEndpoint {
		t.Do = func(ctx context.Context) error { return errors.Join(a.eps.RemoveHealth(ctx), publish(nil)) }
		return t
	}
	r := health.NewResponder(uint16(a.cfg.ClusterHealthPort), a.log)
	t.Interval = healthCheck
	t.Do = func(ctx context.Context) (err error) {
		if ns == nil {
			if ns, err = netdev.NewNetns(); err != nil {
				return err
			}
			// With the file and the listener, the namespace goes, and with it the devices.
			context.AfterFunc(g.ctx, func() { errors.Join(r.Close(), ns.Close()) })
		}
		err = netdev.InNetns(ns, func() error {
			everywhere := netip.IPv6Unspecified() // IPv4, too
			if !a.cfg.EnableIPv6 {
				everywhere = netip.IPv4Unspecified()
			}
			return r.Listen(everywhere)
		})
		if err != nil {
			return err
		}
		ep, err := a.eps.AddHealth(ctx, ns)
		if err != nil {
			return err
		}
		return publish(ep.Addrs())
	}
	return t
}

// healthFact says whether this node answers probes.
func (a *agent) healthFact() api.Component {
	if !a.cfg.EnableHealthChecking {
		return api.Component{State: api.StateDisabled}
	}
	for _, task := range []string{taskHealthResponder, taskHealthEndpoint} {
		c, _, ok := a.tables.Controllers.Get(a.tables.DB.ReadTxn(), state.ControllerByName(task))
		if ok && c.Errors > 0 {
			return api.Component{State: api.StateFailure, Message: c.Message}
		}
	}
	return api.Component{State: api.StateOk}
}
