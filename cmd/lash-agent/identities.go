// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"net/netip"
	"time"

	"github.com/lash-net/lash/internal/identity"
	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/reconcile"
	"github.com/lash-net/lash/internal/state"
)

const (
	// Requests to the API server at a time: enough for a hundred a second even if each takes a third of one.
	apiParallel = 32
	// The same for numbers, of which most are not asked for but waited for, while it is other nodes' turn.
	identityParallel = 128
	// How soon an object that somebody else deleted is made again. Listing it is reading a table.
	apiReread = 30 * time.Second
)

// startIdentities turns the labels of this node's pods into numbers, asking the API server for those that have none.
func (a *agent) startIdentities(g *group) error {
	filter, err := model.ParseLabelFilter(a.cfg.Labels)
	if err != nil {
		return err
	}
	stage := identity.Stage(a.tables, identity.Config{Cluster: a.cfg.ClusterName, Filter: filter})
	loop := reconcile.New(reconcile.Config[model.Labels, identity.Need]{
		Name: "identities", Target: &identity.Allocator{Tables: a.tables, Store: a.api, Node: a.name}, Desired: identity.Pending(a.tables),
		Equal: reconcile.Comparable[identity.Need], Report: a.tables.Report, Log: a.log,
		Throttle: rowThrottle, Parallel: identityParallel, Independent: true, Reread: apiReread,
	})
	g.start("identity-stage", func(ctx context.Context) error { return stage.Run(ctx, a.tables.DB) })
	g.start("identities", loop.Run)
	return nil
}

// startPublishing tells the cluster of this node's pods by their CiliumEndpoints, once it is known which there are.
func (a *agent) startPublishing(g *group) {
	target := a.api.Endpoints(a.tables, func() []netip.Addr {
		n, _ := a.local(a.tables.DB.ReadTxn())
		return n.Addrs
	})
	loop := reconcile.New(reconcile.Config[string, state.PublishedEndpoint]{
		Name: "cilium-endpoints", Target: target, Desired: identity.Published(a.tables), Equal: state.PublishedEndpoint.Same,
		Report: a.tables.Report, Log: a.log, Throttle: rowThrottle, Parallel: apiParallel, Independent: true, Reread: apiReread,
	})
	g.start("cilium-endpoints", func(ctx context.Context) error {
		_, read := a.tables.CiliumEndpoints.Initialized(a.tables.DB.ReadTxn())
		select {
		case <-ctx.Done():
			return nil
		case <-read:
		}
		return loop.Run(ctx)
	})
}

// endpointIdentities gives endpoints the numbers that their pods' labels have come to: those that began before theirs
// was known, and those whose labels, or whose namespace's, somebody has edited.
func (a *agent) endpointIdentities() *state.Task {
	return &state.Task{
		Name:   "endpoint-identities",
		Inputs: []state.Input{state.From(a.tables.Endpoints.ToTable()), state.From(a.tables.PodIdentities.ToTable())},
		Do: func(context.Context) error {
			var errs []error
			for _, ep := range identity.Outdated(a.tables, a.tables.DB.ReadTxn()) {
				if err := a.eps.SetIdentity(ep.ID, ep.Identity, ep.Labels); err != nil {
					errs = append(errs, err)
					continue
				}
				a.log.Info("identity of endpoint changed", "endpoint", ep.ID, "pod", ep.PodName(), "identity", uint32(ep.Identity))
			}
			return errors.Join(errs...)
		},
	}
}
