// SPDX-License-Identifier: Apache-2.0

// Package service turns Services and EndpointSlices into frontends: which address and port is translated to which
// backends. It reads the tables services and endpointslices, writes frontends, and owns the numbers of services.
package service

import (
	"slices"

	"github.com/cilium/statedb"

	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/state"
)

// Numbers remembers the number of each frontend, so that it stays while the frontend exists.
type Numbers struct {
	byFrontend map[model.Frontend]uint32
	used       map[uint32]struct{}
}

// NewNumbers returns numbers that are known already: those a previous run left in the kernel.
func NewNumbers(known map[model.Frontend]model.FrontendEntry) *Numbers {
	n := &Numbers{byFrontend: map[model.Frontend]uint32{}, used: map[uint32]struct{}{}}
	keys := make([]model.Frontend, 0, len(known))
	for f := range known {
		keys = append(keys, f)
	}
	slices.SortFunc(keys, model.Frontend.Compare)
	for _, f := range keys {
		id := known[f].ID
		if _, taken := n.used[id]; id == 0 || taken {
			continue
		}
		n.byFrontend[f] = id
		n.used[id] = struct{}{}
	}
	return n
}

// assign gives every row its number: the one it has, else the smallest free one, in the order of the rows. Numbers of
// frontends that are gone become free.
func (n *Numbers) assign(rows []state.Frontend) {
	present := make(map[model.Frontend]struct{}, len(rows))
	for _, r := range rows {
		present[r.Key] = struct{}{}
	}
	for f, id := range n.byFrontend {
		if _, ok := present[f]; !ok {
			delete(n.byFrontend, f)
			delete(n.used, id)
		}
	}
	next := uint32(1)
	for i := range rows {
		id, ok := n.byFrontend[rows[i].Key]
		if !ok {
			for {
				if _, taken := n.used[next]; !taken {
					break
				}
				next++
			}
			id = next
			n.byFrontend[rows[i].Key] = id
			n.used[id] = struct{}{}
		}
		rows[i].Entry.ID = id
	}
}

// Config is what the stage needs to know.
type Config struct {
	Node       string // this node's name, for internalTrafficPolicy: Local
	IPv4, IPv6 bool
	Numbers    *Numbers
}

// Stage keeps the table frontends equal to Frontends of the tables services and endpointslices. It writes nothing before
// both are complete: a frontend whose slices have not been read yet would lose its backends.
func Stage(t *state.Tables, cfg Config) *state.Stage[state.Frontend] {
	stage := &state.Stage[state.Frontend]{
		Name:     "service-frontends",
		Out:      t.Frontends,
		Inputs:   []state.Input{state.From(t.Services), state.From(t.Slices)},
		Complete: true,
		Compute: func(txn statedb.ReadTxn, _ bool) []state.Frontend {
			return Frontends(cfg, state.Rows(txn, t.Services), func(key string) []state.EndpointSlice {
				return statedb.Collect(t.Slices.List(txn, state.SlicesByService(key)))
			})
		},
		Equal: state.Frontend.Equal,
	}
	return stage.Register(t.DB)
}

// Frontends computes the ClusterIP frontends of services, of every type that has a cluster IP, sorted.
func Frontends(cfg Config, services []state.Service, slicesOf func(key string) []state.EndpointSlice) []state.Frontend {
	services = slices.Clone(services)
	slices.SortFunc(services, func(a, b state.Service) int {
		if a.Key() < b.Key() {
			return -1
		}
		return 1
	})
	var rows []state.Frontend
	seen := map[model.Frontend]struct{}{}
	for _, svc := range services {
		if svc.Type == "ExternalName" || len(svc.ClusterIPs) == 0 {
			continue
		}
		eps := slicesOf(svc.Key())
		for _, ip := range svc.ClusterIPs {
			if ip.Is4() && !cfg.IPv4 || ip.Is6() && !cfg.IPv6 {
				continue
			}
			for _, port := range svc.Ports {
				if port.Proto != model.ProtoTCP && port.Proto != model.ProtoUDP {
					continue
				}
				key := model.Frontend{Addr: ip, L4: port.L4}
				if _, dup := seen[key]; dup {
					continue // the API server gives an address to one service; an object that says otherwise comes second
				}
				seen[key] = struct{}{}
				rows = append(rows, state.Frontend{Key: key, Entry: model.FrontendEntry{
					Type:      model.TypeClusterIP,
					Namespace: svc.Namespace,
					Name:      svc.Name,
					PortName:  port.Name,
					Backends:  backends(cfg, svc, port, ip.Is6(), eps),
				}})
			}
		}
	}
	slices.SortFunc(rows, func(a, b state.Frontend) int { return a.Key.Compare(b.Key) })
	cfg.Numbers.assign(rows)
	return rows
}

// backends are the ready endpoints of one port, or, if there is none, those that still serve while they terminate, as
// kube-proxy does it (KEP-1669). Slices name a port as the service does; their port numbers are resolved target ports.
func backends(cfg Config, svc state.Service, port state.ServicePort, ipv6 bool, eps []state.EndpointSlice) []model.Backend {
	ready := map[model.Backend]struct{}{}
	terminating := map[model.Backend]struct{}{}
	for _, slice := range eps {
		if slice.IPv6 != ipv6 {
			continue
		}
		for _, sp := range slice.Ports {
			if sp.Name != port.Name || sp.Proto != port.Proto || sp.Port == 0 {
				continue
			}
			for _, ep := range slice.Endpoints {
				if svc.InternalLocal && ep.Node != cfg.Node {
					continue
				}
				b := model.Backend{Addr: ep.Addr, Port: sp.Port, Proto: sp.Proto, State: model.BackendActive}
				switch {
				case ep.Ready || svc.PublishNotReady && !ep.Terminating:
					ready[b] = struct{}{}
				case ep.Serving && ep.Terminating:
					b.State = model.BackendTerminating
					terminating[b] = struct{}{}
				}
			}
		}
	}
	if len(ready) == 0 {
		ready = terminating
	}
	out := make([]model.Backend, 0, len(ready))
	for b := range ready {
		out = append(out, b)
	}
	slices.SortFunc(out, model.Backend.Compare)
	return out
}
