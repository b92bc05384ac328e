// SPDX-License-Identifier: Apache-2.0

package node

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/cilium/statedb"

	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/reconcile"
	"github.com/lash-net/lash/internal/state"
)

// Stages are the stages of this package; each runs by itself.
type Stages struct {
	Nodes    *state.Stage[state.Node]
	IPCache  *state.Stage[state.IPCache]
	Routes   *state.Stage[state.Route]
	Warnings *state.Stage[state.Warning]
}

// NewStages prepares the stages. None of them waits for the API server: what is missing in an incomplete table is
// missing in theirs, and loops delete nothing before the tables are complete.
func NewStages(t *state.Tables, cfg Config) Stages {
	s := Stages{
		Nodes: &state.Stage[state.Node]{
			Name:   "nodes",
			Out:    t.Nodes,
			Inputs: []state.Input{state.From(t.Local), state.From(t.NodeObjects)},
			Compute: func(txn statedb.ReadTxn, complete bool) []state.Node {
				return Merge(cfg, state.Rows(txn, t.Local), state.Rows(txn, t.NodeObjects), complete)
			},
			Equal: state.EqualNode,
		},
		IPCache: &state.Stage[state.IPCache]{
			Name:   "node-ipcache",
			Out:    t.IPCache,
			Inputs: []state.Input{state.From(t.Nodes), state.From(t.Devices), state.From(t.Endpoints), state.FromSome(t.Slices, behindAPIServer)},
			Compute: func(txn statedb.ReadTxn, _ bool) []state.IPCache {
				return IPCache(cfg, state.Rows(txn, t.Nodes), state.Rows(txn, t.Devices), state.Rows(txn, t.Endpoints), apiServers(statedb.Collect(t.Slices.List(txn, behindAPIServer))))
			},
			Equal: reconcile.Comparable[state.IPCache],
		},
		Routes: &state.Stage[state.Route]{
			Name:   "node-routes",
			Out:    t.Routes,
			Inputs: []state.Input{state.From(t.Nodes), state.From(t.Devices), state.From(t.TunnelPaths)},
			Compute: func(txn statedb.ReadTxn, _ bool) []state.Route {
				nodes := state.Rows(txn, t.Nodes)
				if !othersKnown(t, txn) {
					nodes = slices.DeleteFunc(nodes, func(n model.Node) bool { return !n.Local })
				}
				rows, _ := Routes(cfg, nodes, state.Rows(txn, t.Devices), func(p netip.Prefix) bool {
					path, _, _ := t.TunnelPaths.Get(txn, state.TunnelPathByPrefix(p))
					return path.Marked
				})
				return rows
			},
			Equal: reconcile.Comparable[state.Route],
		},
		Warnings: &state.Stage[state.Warning]{
			Name:   "node-warnings",
			Out:    t.Warnings,
			Inputs: []state.Input{state.From(t.Nodes), state.From(t.Devices)},
			Compute: func(txn statedb.ReadTxn, _ bool) []state.Warning {
				_, warnings := Routes(cfg, state.Rows(txn, t.Nodes), state.Rows(txn, t.Devices), func(netip.Prefix) bool { return true })
				return warnings
			},
			Equal: reconcile.Comparable[state.Warning],
			Mine:  func(w state.Warning) bool { return strings.HasPrefix(w.Key, "route/") },
		},
	}
	s.Nodes.Register(t.DB)
	s.IPCache.Register(t.DB)
	s.Routes.Register(t.DB)
	return s
}

// DesiredLocalAddrs is the Desired function of the loop over the endpoints map.
func DesiredLocalAddrs(t *state.Tables, cfg Config) func() reconcile.Snapshot[netip.Addr, model.LocalAddr] {
	return state.DesiredOf(t.DB, []state.Input{state.From(t.Local), state.From(t.Devices), state.From(t.Endpoints)},
		func(txn statedb.ReadTxn) map[netip.Addr]model.LocalAddr {
			return LocalAddrs(cfg, state.Rows(txn, t.Local), state.Rows(txn, t.Devices), state.Rows(txn, t.Endpoints))
		})
}
