// SPDX-License-Identifier: Apache-2.0

package server

import (
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/lash-net/lash/internal/state"
)

func TestServiceHealth(t *testing.T) {
	tables, err := state.New()
	if err != nil {
		t.Fatal(err)
	}
	defer tables.Stop()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := uint16(l.Addr().(*net.TCPAddr).Port)
	var healthy atomic.Bool
	healthy.Store(true)
	s := NewServiceHealth(tables, healthy.Load, slog.New(slog.DiscardHandler))
	defer s.Close()
	ask := func() (int, string, string) {
		t.Helper()
		res, err := http.Get(fmt.Sprintf("http://127.0.0.1:%d/", port))
		if err != nil {
			return 0, "", err.Error()
		}
		defer res.Body.Close()
		b, _ := io.ReadAll(res.Body)
		return res.StatusCode, res.Header.Get("X-Load-Balancing-Endpoint-Weight"), strings.TrimSpace(string(b))
	}
	check := state.HealthCheck{Namespace: "ns", Name: "a", Port: port, Endpoints: 2}
	state.Insert(tables.DB, tables.HealthChecks, check)
	if err := s.Sync(t.Context()); err == nil {
		t.Error("a port that another has is no error")
	}
	l.Close()
	for range 2 { // a second time changes nothing
		if err := s.Sync(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if code, weight, body := ask(); code != 200 || weight != "2" || body != `{"service":{"namespace":"ns","name":"a"},"localEndpoints":2,"serviceProxyHealthy":true}` {
		t.Errorf("got %d, %s, %s", code, weight, body)
	}
	check.Endpoints = 0
	state.Insert(tables.DB, tables.HealthChecks, check)
	if code, weight, body := ask(); code != 503 || weight != "0" || !strings.Contains(body, `"localEndpoints":0`) {
		t.Errorf("without endpoints: %d, %s, %s", code, weight, body)
	}
	check.Endpoints = 1
	state.Insert(tables.DB, tables.HealthChecks, check)
	healthy.Store(false)
	if code, _, body := ask(); code != 503 || !strings.Contains(body, `"serviceProxyHealthy":false`) {
		t.Errorf("unhealthy: %d, %s", code, body)
	}
	state.Delete(tables.DB, tables.HealthChecks, check)
	if err := s.Sync(t.Context()); err != nil {
		t.Fatal(err)
	}
	if code, _, _ := ask(); code != 0 {
		t.Errorf("a port that is no service's answers %d", code)
	}
}

func TestProxyHealth(t *testing.T) {
	for _, tt := range []struct {
		healthy, eligible bool
		healthz, livez    int
	}{{true, true, 200, 200}, {true, false, 503, 200}, {false, true, 503, 503}} {
		h := proxyHealth(func() bool { return tt.healthy }, func() bool { return tt.eligible })
		for path, want := range map[string]int{"/healthz": tt.healthz, "/livez": tt.livez, "/": 404} {
			w := httptest.NewRecorder()
			h.ServeHTTP(w, httptest.NewRequest("GET", path, nil))
			var body struct {
				LastUpdated, CurrentTime string
				NodeEligible             *bool
			}
			if w.Code != want {
				t.Errorf("%+v: %s answers %d, want %d", tt, path, w.Code, want)
			}
			if path == "/" {
				continue
			}
			if err := json.Unmarshal(w.Body.Bytes(), &body); err != nil || body.LastUpdated == "" || body.CurrentTime == "" ||
				(body.NodeEligible != nil) != (path == "/healthz") || body.NodeEligible != nil && *body.NodeEligible != tt.eligible {
				t.Errorf("%+v: %s answers %s, %v", tt, path, w.Body, err)
			}
		}
	}
}

func TestCoverageOfSockets(t *testing.T) {
	for want, f := range map[string]Facts{
		"":            {KubeProxyReplacement: true},
		"Full":        {KubeProxyReplacement: true, SocketLB: true},
		"Hostns-only": {KubeProxyReplacement: true, SocketLB: true, SocketLBHostOnly: true},
	} {
		if got := kubeProxyReplacement(f, nil).SocketLBCoverage; got != want {
			t.Errorf("%+v: %q", f, got)
		}
	}
}
