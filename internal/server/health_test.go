// SPDX-License-Identifier: Apache-2.0

package server

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/lash-net/lash/api/agent"
	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/state"
)

func TestClusterHealth(t *testing.T) {
	f := &Facts{Cluster: "lab", HealthDaemon: agent.Component{State: agent.StateOk}, ProbeInterval: time.Minute}
	s, tables := newServer(t, f)
	at := time.Date(2026, 11, 25, 3, 0, 0, 0, time.UTC)
	for i := range 30 {
		r := model.ProbeResult{At: at.Add(time.Duration(i) * time.Second), RTT: time.Millisecond, Since: at}
		n := model.NodeHealth{Name: fmt.Sprintf("n%02d", i), Paths: []model.HealthPath{{Addr: netip.MustParseAddr("172.18.0.1"), ICMP: r, HTTP: r}}}
		switch {
		case i >= 28: // not probed yet
			n.Paths[0].ICMP, n.Paths[0].HTTP = model.ProbeResult{}, model.ProbeResult{}
		case i%2 == 0:
			n.Paths[0].HTTP.Error = "refused"
		}
		state.Insert(tables.DB, tables.NodeHealth, n)
	}
	h := get[agent.Status](t, s, "/v1/status", 200).ClusterHealth
	if h.Reachable != 14 || h.Total != 30 || !h.At.Equal(at.Add(27*time.Second)) || h.Interval != time.Minute || h.Cluster != "lab" || len(h.Nodes) != unreachableShown || h.Nodes[1].Name != "n02" {
		t.Errorf("health in the status is %+v", h)
	}
	for _, path := range []string{"/v1/status?nodes", "/v1/health"} {
		if path == "/v1/health" {
			h = get[agent.ClusterHealth](t, s, path, 200)
		} else {
			h = get[agent.Status](t, s, path, 200).ClusterHealth
		}
		if h.Reachable != 14 || len(h.Nodes) != 30 || h.Nodes[28].Failed() || h.Nodes[28].Reachable() {
			t.Errorf("%s: %+v", path, h)
		}
	}
	f.HealthDaemon = agent.Component{State: agent.StateDisabled}
	if h := get[agent.Status](t, s, "/v1/status", 200).ClusterHealth; h.State != agent.StateDisabled || h.Total != 0 {
		t.Errorf("disabled: %+v", h)
	}
}
