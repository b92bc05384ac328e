// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"net/netip"
	"slices"

	"github.com/cilium/statedb"

	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/reconcile"
	"github.com/lash-net/lash/internal/state"
)

// Published is the Desired function of the loop over CiliumEndpoints: pods of this node that have an address and an
// identity. A pod without an endpoint has its address by its object, if it is one of this node's pod CIDRs: somebody
// else attached it, or it is just being attached; its identity counts all the same. A pod whose labels have no number
// yet keeps the one it is known by.
func Published(t *state.Tables) func() reconcile.Snapshot[string, state.PublishedEndpoint] {
	rows := &state.Keyed[string, state.PublishedEndpoint]{
		Sources: []state.Source[string]{
			state.Touches(t.DB, t.PodIdentities, func(r state.PodIdentity) []string { return []string{r.Key()} }),
			state.Touches(t.DB, t.Pods, func(r state.Pod) []string { return []string{r.Key()} }),
			state.Resets[string](t.Endpoints), state.Resets[string](t.Local),
		},
		Prepare: func(now statedb.ReadTxn) func(statedb.ReadTxn, string) (state.PublishedEndpoint, bool) {
			p := publisher{tables: t, attached: map[netip.Addr]bool{}}
			for n := range t.Local.All(now) {
				p.local = n
			}
			if p.self = p.local.IPv4(); !p.self.IsValid() {
				p.self = p.local.IPv6()
			}
			for ep := range t.Endpoints.All(now) {
				for _, a := range ep.Addrs() {
					p.attached[a] = true
				}
			}
			return p.row
		},
	}
	return rows.Desired(t.DB)
}

// publisher is what rows depend on besides their pod.
type publisher struct {
	tables   *state.Tables
	local    model.Node
	self     netip.Addr
	attached map[netip.Addr]bool
}

func (p publisher) row(txn statedb.ReadTxn, key string) (row state.PublishedEndpoint, ok bool) {
	t := p.tables
	who, _, known := t.PodIdentities.Get(txn, state.PodIdentityByName(key))
	pod, _, there := t.Pods.Get(txn, state.PodByName(key))
	if !known || !there || pod.UID != who.UID || !p.self.IsValid() {
		return row, false
	}
	row = state.PublishedEndpoint{Labels: who.Labels, Ports: named(pod.Ports), CiliumEndpoint: state.CiliumEndpoint{
		Namespace: who.Namespace, Name: who.Name, PodUID: who.UID, Node: p.self, Identity: who.Identity,
	}}
	if ep, ok := endpointOf(t, txn, who); ok {
		row.EndpointID, row.State, row.IPv4, row.IPv6, row.ContainerID = ep.ID, ep.State, ep.IPv4, ep.IPv6, ep.ContainerID
	} else if !pod.Terminating {
		row.State = model.EndpointDisconnected
		for _, a := range pod.IPs {
			if !p.attached[a] && slices.ContainsFunc(p.local.PodCIDRs, func(c netip.Prefix) bool { return c.Contains(a) }) {
				if a.Is4() {
					row.IPv4 = a
				} else {
					row.IPv6 = a
				}
			}
		}
	}
	if row.Identity == model.IdentityUnknown {
		if old, _, ok := t.CiliumEndpoints.Get(txn, state.CiliumEndpointByName(key)); ok && old.PodUID == who.UID {
			row.Identity = old.Identity
		}
	}
	return row, row.Identity != model.IdentityUnknown && (row.IPv4.IsValid() || row.IPv6.IsValid())
}

// endpointOf is the pod's endpoint once traffic may reach it.
func endpointOf(t *state.Tables, txn statedb.ReadTxn, pod state.PodIdentity) (model.Endpoint, bool) {
	for ep := range t.Endpoints.List(txn, state.EndpointByPod(pod.Key())) {
		if pod.Is(ep) && (ep.State == model.EndpointReady || ep.State == model.EndpointDisconnected) {
			return ep, true
		}
	}
	return model.Endpoint{}, false
}

// Identify is the identity of a new endpoint: its pod's if the number is known already, else init.
func Identify(t *state.Tables, ep model.Endpoint) (model.Identity, map[string]string) {
	who, _, ok := t.PodIdentities.Get(t.DB.ReadTxn(), state.PodIdentityByName(ep.PodName()))
	if !ok || !who.Is(ep) || who.Identity == model.IdentityUnknown {
		return model.IdentityInit, map[string]string{model.IdentityInit.String(): ""}
	}
	return who.Identity, who.Labels.Map()
}

// Outdated are the endpoints of this node whose labels have come to another number than theirs, with the new ones.
func Outdated(t *state.Tables, txn statedb.ReadTxn) []model.Endpoint {
	var out []model.Endpoint
	for ep := range t.Endpoints.All(txn) {
		who, _, ok := t.PodIdentities.Get(txn, state.PodIdentityByName(ep.PodName()))
		if !ok || !who.Is(ep) || who.Identity == model.IdentityUnknown || ep.State != model.EndpointReady {
			continue
		}
		if ep.Identity != who.Identity || model.LabelsOf(ep.Labels) != who.Labels {
			ep.Identity, ep.Labels = who.Identity, who.Labels.Map()
			out = append(out, ep)
		}
	}
	return out
}

// named are the ports that a policy can name, without what only this node needs of them.
func named(all []state.PodPort) (out []state.PodPort) {
	for _, p := range all {
		if p.Name != "" {
			out = append(out, state.PodPort{Name: p.Name, L4: p.L4})
		}
	}
	return out
}
