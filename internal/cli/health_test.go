// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/lash-net/lash/api/agent"
	"github.com/lash-net/lash/internal/model"
)

// referenceHealth is what the field's status of the lab shows.
func referenceHealth() agent.ClusterHealth {
	at := func(h, m, s int) time.Time { return time.Date(2026, 11, 23, h, m, s, 0, time.UTC) }
	ok := func(rtt time.Duration, at time.Time) model.ProbeResult {
		return model.ProbeResult{At: at, RTT: rtt, Since: at}
	}
	first, second := at(7, 43, 56), at(7, 44, 20)
	return agent.ClusterHealth{
		State: agent.StateOk, Cluster: "lab", Reachable: 2, Total: 2, At: first, Interval: 96566274746,
		Nodes: []model.NodeHealth{{Name: "nodea", Local: true, Paths: []model.HealthPath{
			{Addr: netip.MustParseAddr("172.18.0.11"), ICMP: ok(390952, first), HTTP: ok(453567, first)},
			{Addr: netip.MustParseAddr("10.244.1.193"), Endpoint: true, ICMP: ok(244781, second), HTTP: ok(1912802, second)},
		}}},
	}
}

// The lines are those of the field, blank for blank.
func TestHealthLooksAsUsersKnow(t *testing.T) {
	const verbose = `Cluster health:   2/2 reachable   (2026-11-23T07:43:56Z)   (Probe interval: 1m36.566274746s)
Name              IP              Node                     Endpoints
  lab/nodea (localhost):
    Host connectivity to 172.18.0.11:
      ICMP to stack:   OK, RTT=390.952µs   (Last probed: 2026-11-23T07:43:56Z)
      HTTP to agent:   OK, RTT=453.567µs   (Last probed: 2026-11-23T07:43:56Z)
    Endpoint connectivity to 10.244.1.193:
      ICMP to stack:   OK, RTT=244.781µs    (Last probed: 2026-11-23T07:44:20Z)
      HTTP to agent:   OK, RTT=1.912802ms   (Last probed: 2026-11-23T07:44:20Z)
`
	var b bytes.Buffer
	w := columns(&b)
	printClusterHealth(w, referenceHealth(), healthVerbose)
	w.Flush()
	if b.String() != verbose {
		t.Errorf("printed\n%s\nwant\n%s", b.String(), verbose)
	}
	const brief = `Cluster health:           1/2 reachable   (2026-11-23T07:43:56Z)   (Probe interval: 1m5.91673732s)
Name                      IP              Node                     Endpoints
  lab/nodea (localhost)   172.18.0.11     1/1                      0/1
`
	h := referenceHealth()
	h.Reachable, h.Interval = 1, 65916737320
	h.Nodes[0].Paths[1].ICMP.Error = "Connection timed out"
	b.Reset()
	w = columns(&b)
	printClusterHealth(w, h, healthFailing)
	w.Flush()
	if !strings.HasPrefix(b.String(), brief) || !strings.HasSuffix(b.String(), "0/1\n    nodea, ICMP to endpoint 10.244.1.193: Connection timed out, since 2026-11-23T07:44:20Z\n") {
		t.Errorf("printed\n%s\nwant\n%s", b.String(), brief)
	}
}

func TestHealthForms(t *testing.T) {
	h := referenceHealth()
	fail := model.ProbeResult{At: now, Since: now.Add(-time.Hour), Error: `Get "http://[fd00::2]:4240/hello": dial tcp [fd00::2]:4240: connect: no route to host`}
	h.Nodes[0].Paths = append(h.Nodes[0].Paths, model.HealthPath{Addr: netip.MustParseAddr("fd00::2"), Endpoint: true, ICMP: h.Nodes[0].Paths[0].ICMP, HTTP: fail})
	h.Nodes = append(h.Nodes, model.NodeHealth{Name: "nodeb", Paths: []model.HealthPath{{Addr: netip.MustParseAddr("172.18.0.12")}}})
	for i := range 11 {
		h.Nodes = append(h.Nodes, model.NodeHealth{Name: fmt.Sprintf("x%02d", i), Paths: []model.HealthPath{{Addr: netip.MustParseAddr("172.18.1.1"), ICMP: model.ProbeResult{At: now, Since: now, Error: "Connection timed out"}, HTTP: fail}}})
	}
	var b bytes.Buffer
	for _, detail := range []healthDetail{healthFailing, healthSuccinct, healthVerbose} {
		w := columns(&b)
		printClusterHealth(w, h, detail)
		w.Flush()
		fmt.Fprintln(&b)
	}
	path := filepath.Join("testdata", "health.golden")
	if *update {
		if err := os.WriteFile(path, b.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if b.String() != string(want) {
		t.Errorf("printed\n%s\nwant\n%s", b.String(), want)
	}
}
