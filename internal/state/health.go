// SPDX-License-Identifier: Apache-2.0

package state

import (
	"fmt"
	"strings"
	"time"

	"github.com/cilium/statedb"

	"github.com/lash-net/lash/internal/model"
)

// NodeHealth is what probes of a node have found.
type NodeHealth = model.NodeHealth

var nodeHealthByName = byString("name", func(r NodeHealth) string { return r.Name })

// NodeHealthByName finds the health of a node.
func NodeHealthByName(name string) statedb.Query[NodeHealth] { return nodeHealthByName.Query(name) }

func newNodeHealth(db *statedb.DB) (statedb.RWTable[NodeHealth], error) {
	return statedb.NewTableAny(db, "node-health",
		func() []string { return []string{"Name", "Reachable", "Probed", "Paths"} },
		func(r NodeHealth) []string {
			reachable, probed := "no", "never"
			if r.Reachable() {
				reachable = "yes"
			}
			if at := r.Probed(); !at.IsZero() {
				probed = at.UTC().Format(time.RFC3339)
			}
			var paths []string
			for _, p := range r.Paths {
				where := "node"
				if p.Endpoint {
					where = "endpoint"
				}
				paths = append(paths, fmt.Sprintf("%s %s icmp=%s http=%s", where, p.Addr, outcome(p.ICMP), outcome(p.HTTP)))
			}
			return []string{r.Name, reachable, probed, strings.Join(paths, "; ")}
		}, nodeHealthByName)
}

func outcome(r model.ProbeResult) string {
	switch {
	case r.Failed():
		return "(" + r.Error + ")"
	case r.Answered():
		return r.RTT.String()
	}
	return "-"
}
