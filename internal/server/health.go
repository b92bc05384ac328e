// SPDX-License-Identifier: Apache-2.0

package server

import (
	"net/http"

	"github.com/cilium/statedb"

	"github.com/lash-net/lash/api/agent"
	"github.com/lash-net/lash/internal/state"
)

// How many nodes a status names.
const (
	everyNode        = -1
	unreachableShown = 11 // that fail: one more than is printed, so that it shows that there are more
)

// clusterHealth says what probes have found: of every node, or of the first that fail.
func clusterHealth(t *state.Tables, txn statedb.ReadTxn, f Facts, nodes int) agent.ClusterHealth {
	h := agent.ClusterHealth{State: f.HealthDaemon.State, Cluster: f.Cluster, Interval: f.ProbeInterval}
	if h.State == agent.StateDisabled || h.State == "" {
		return agent.ClusterHealth{State: agent.StateDisabled}
	}
	for n := range t.NodeHealth.All(txn) {
		h.Total++
		if n.Reachable() {
			h.Reachable++
		}
		if at := n.Probed(); at.After(h.At) {
			h.At = at
		}
		if nodes == everyNode || n.Failed() && len(h.Nodes) < nodes {
			h.Nodes = append(h.Nodes, n)
		}
	}
	return h
}

func (s *Server) health(*http.Request) (any, error) {
	return clusterHealth(s.cfg.Tables, s.cfg.Tables.DB.ReadTxn(), s.cfg.Facts(), everyNode), nil
}
