// SPDX-License-Identifier: Apache-2.0

package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/lash-net/lash/api/agent"
	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/state"
)

type dumps map[string][][]string

func (d dumps) Dump(name string) ([]string, [][]string, error) {
	rows, ok := d[name]
	if !ok {
		return nil, nil, errors.New("map lash_" + name + " is not there")
	}
	return []string{"A", "B"}, rows, nil
}

func newServer(t *testing.T, f *Facts) (*Server, *state.Tables) {
	t.Helper()
	tables, err := state.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tables.Stop() })
	return New(Config{Tables: tables, Facts: func() Facts { return *f }, Datapath: dumps{"ct": {{"x", "y"}}}, Log: slog.New(slog.DiscardHandler)}), tables
}

func get[T any](t *testing.T, h http.Handler, path string, code int) T {
	t.Helper()
	rec := httptest.NewRecorder()
	h.ServeHTTP(rec, httptest.NewRequest("GET", path, nil))
	if rec.Code != code {
		t.Errorf("GET %s: %d, want %d: %s", path, rec.Code, code, rec.Body)
	}
	var v T
	if err := json.Unmarshal(rec.Body.Bytes(), &v); err != nil {
		t.Errorf("GET %s: %v in %s", path, err, rec.Body)
	}
	return v
}

func TestAnswers(t *testing.T) {
	f := &Facts{Node: "n1", Ready: true, KubeProxyReplacement: true, SocketLB: true, IPv4Masquerade: true, MasqueradeMode: "BPF", Why: []agent.Requirement{{Requirement: "r"}}}
	s, tables := newServer(t, f)
	state.Insert(tables.DB, tables.Endpoints, model.Endpoint{ID: 7, Namespace: "d", Pod: "p", IPv4: netip.MustParseAddr("10.0.1.7"), Identity: 4711, Labels: map[string]string{"app": "x"}})
	state.Insert(tables.DB, tables.IPCache,
		state.IPCache{Prefix: netip.MustParsePrefix("10.0.1.7/32"), IPCacheEntry: model.IPCacheEntry{Identity: 4711}},
		state.IPCache{Prefix: netip.MustParsePrefix("10.0.1.8/32"), IPCacheEntry: model.IPCacheEntry{Identity: 4712}},
		state.IPCache{Prefix: netip.MustParsePrefix("0.0.0.0/0"), IPCacheEntry: model.IPCacheEntry{Identity: 2}})
	state.Insert(tables.DB, tables.Identities, state.Identity{ID: 4711, Labels: "k8s:app=x;k8s:b="})
	state.Insert(tables.DB, tables.CiliumEndpoints, state.CiliumEndpoint{Namespace: "d", Name: "r", IPv4: netip.MustParseAddr("10.0.2.1"), Identity: 4711, Node: netip.MustParseAddr("172.18.0.12")})
	state.Insert(tables.DB, tables.Devices, model.Device{Ifindex: 2, Name: "eth0", DirectRouting: true})
	state.Insert(tables.DB, tables.Controllers, model.Controller{Name: "routes", LastSuccess: 5, Message: "no error"}, model.Controller{Name: "x", Errors: 3, LastError: 7, Message: "m"})
	state.Insert(tables.DB, tables.Warnings, state.Warning{Key: "k", Text: "w"})
	state.Insert(tables.DB, tables.Pods,
		state.Pod{Namespace: "d", Name: "p", Running: true}, state.Pod{Namespace: "d", Name: "old", Running: true},
		state.Pod{Namespace: "d", Name: "host", Running: true, HostNetwork: true}, state.Pod{Namespace: "d", Name: "pending"})
	front := func(a string, proto uint8, port uint16) model.Frontend {
		return model.Frontend{FrontendKey: model.FrontendKey{Addr: netip.MustParseAddr(a), L4: model.L4{Proto: proto, Port: port}}, Type: "ClusterIP"}
	}
	state.Insert(tables.DB, tables.ServicePorts,
		state.ServicePort{ID: 2, Proto: 6, Frontends: []model.Frontend{front("10.96.0.1", 6, 443), front("0.0.0.0", 6, 30443)}, Backends: []model.Backend{
			{Addr: netip.MustParseAddr("10.0.1.7"), Port: 6443, Cluster: true}, {Addr: netip.MustParseAddr("10.0.1.8"), Port: 6443, Terminating: true}, {Addr: netip.MustParseAddr("10.0.1.9"), Port: 6443}}},
		state.ServicePort{ID: 1, Proto: 17, Frontends: []model.Frontend{front("10.96.0.9", 17, 53)}})

	st := get[agent.Status](t, s, "/v1/status", 200)
	if st.Node != "n1" || st.KubeProxyReplacement.Mode != "True" || st.KubeProxyReplacement.Services[0].State != "Enabled" || st.Hubble.State != "Disabled" ||
		st.Masquerading.Mode != "BPF" || st.Masquerading.Devices[0] != "eth0" || len(st.Warnings) != 1 || st.Why != nil {
		t.Errorf("status is %+v", st)
	}
	if len(st.Controllers) != 2 || !st.Controllers[0].Healthy() || st.Controllers[1].Healthy() || st.Controllers[0].LastError != nil {
		t.Errorf("controllers are %+v", st.Controllers)
	}
	if m := st.ManagedPods; m.Managed != 1 || m.Total != 2 || m.Unmanaged[0] != "d/old" {
		t.Errorf("managed pods are %+v", m)
	}
	if why := get[agent.Status](t, s, "/v1/status?why", 200).Why; len(why) != 1 {
		t.Errorf("why is %v", why)
	}
	if eps := get[[]model.Endpoint](t, s, "/v1/endpoints", 200); len(eps) != 1 || eps[0].ID != 7 {
		t.Errorf("endpoints are %v", eps)
	}
	if ep := get[model.Endpoint](t, s, "/v1/endpoints/7", 200); ep.Pod != "p" {
		t.Errorf("endpoint is %v", ep)
	}
	ips := get[[]agent.IP](t, s, "/v1/ip", 200)
	var lines []string
	for _, ip := range ips {
		lines = append(lines, strings.TrimSpace(fmt.Sprintln(ip.Prefix, ip.Identity, ip.Labels, ip.Node, ip.Source)))
	}
	if want := []string{"0.0.0.0/0 reserved:world [reserved:world] invalid IP", "10.0.1.7/32 4711 [k8s:app=x k8s:b] invalid IP", "10.0.1.8/32 4712 [4712] invalid IP",
		"10.0.2.1/32 4711 [k8s:app=x k8s:b] 172.18.0.12 custom-resource"}; !slices.Equal(lines, want) {
		t.Errorf("ips are %q", lines)
	}
	ids := get[[]agent.Identity](t, s, "/v1/identities", 200)
	if n := len(ids); n != 12 || ids[0].ID != 1 || ids[10].ID != 4711 || ids[11].ID != 16777217 || ids[10].Labels[1] != "k8s:b" {
		t.Errorf("identities are %+v", ids)
	}
	if id := get[agent.Identity](t, s, "/v1/identities/7", 200); !slices.Equal(id.Labels, []string{"reserved:kube-apiserver", "reserved:remote-node"}) {
		t.Errorf("identity 7 is %+v", id)
	}
	if id := get[agent.Identity](t, s, "/v1/identities/4711", 200); len(id.Labels) != 2 {
		t.Errorf("identity 4711 is %+v", id)
	}
	get[agent.Error](t, s, "/v1/identities/4712", 404)
	get[agent.Error](t, s, "/v1/identities/x", 400)
	if svcs := get[[]agent.Service](t, s, "/v1/services", 200); len(svcs) != 3 || svcs[0].Frontend != "10.96.0.9:53/UDP" ||
		len(svcs[1].Backends) != 2 || svcs[1].Backends[1].State != "terminating" || svcs[1].Flags[0] != "non-routable" {
		t.Errorf("services are %+v", svcs)
	}
	if tbl := get[agent.Table](t, s, "/v1/bpf/ct", 200); len(tbl.Rows) != 1 || tbl.Columns[0] != "A" {
		t.Errorf("ct is %+v", tbl)
	}
	if tbl := get[agent.Table](t, s, "/v1/db/devices", 200); len(tbl.Rows) != 1 || len(tbl.Columns) != len(tbl.Rows[0]) {
		t.Errorf("devices are %+v", tbl)
	}
	if db := get[[]agent.TableInfo](t, s, "/v1/db", 200); len(db) < 14 {
		t.Errorf("tables are %+v", db)
	}
	if nodes := get[[]model.Node](t, s, "/v1/nodes", 200); nodes == nil || len(nodes) != 0 {
		t.Errorf("no nodes are %v, want []", nodes)
	}
}

func TestWrongRequestsSayWhatIsRight(t *testing.T) {
	s, _ := newServer(t, &Facts{})
	for path, want := range map[string]struct {
		code int
		text string
	}{
		"/v1/endpoints/0":     {400, "1 to 65535"},
		"/v1/endpoints/x":     {400, "1 to 65535"},
		"/v1/endpoints/70000": {400, "1 to 65535"},
		"/v1/endpoints/9":     {404, "lash endpoint list"},
		"/v1/db/nothing":      {404, "service-ports"},
		"/v1/bpf/nothing":     {404, "ipcache"},
		"/v1/bpf/nat":         {500, "lash_nat"},
	} {
		if e := get[agent.Error](t, s, path, want.code); !strings.Contains(e.Error, want.text) {
			t.Errorf("GET %s says %q, want %q in it", path, e.Error, want.text)
		}
	}
}

func TestHealthFollowsReadiness(t *testing.T) {
	f := &Facts{NotReady: "no pod CIDR yet"}
	s, _ := newServer(t, f)
	for _, ready := range []bool{false, true} {
		f.Ready = ready
		rec := httptest.NewRecorder()
		s.Health().ServeHTTP(rec, httptest.NewRequest("GET", "/healthz", nil))
		if ready && rec.Code != 200 || !ready && (rec.Code != 503 || !strings.Contains(rec.Body.String(), "no pod CIDR yet")) {
			t.Errorf("ready %v: %d %s", ready, rec.Code, rec.Body)
		}
	}
}

// What uses the agent's CPU and memory can be asked on the socket, never on a port.
func TestProfilesAreOnTheSocketOnly(t *testing.T) {
	s, _ := newServer(t, &Facts{})
	for _, h := range []struct {
		handler http.Handler
		code    int
	}{{s, http.StatusOK}, {s.Health(), http.StatusNotFound}} {
		rec := httptest.NewRecorder()
		h.handler.ServeHTTP(rec, httptest.NewRequest("GET", "/debug/pprof/heap?debug=1", nil))
		if rec.Code != h.code || (rec.Code == http.StatusOK) != strings.Contains(rec.Body.String(), "heap profile") {
			t.Errorf("%d, want %d: %.80s", rec.Code, h.code, rec.Body)
		}
	}
}

func TestServeReplacesTheSocketOfADeadAgentAndEndsWithItsContext(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "run", "lash.sock")
	if err := os.MkdirAll(filepath.Dir(socket), 0o755); err != nil {
		t.Fatal(err)
	}
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket})
	if err != nil {
		t.Fatal(err)
	}
	dead.SetUnlinkOnClose(false)
	dead.Close()
	s, _ := newServer(t, &Facts{Node: "n1"})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, socket) }()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}}}
	deadline := time.Now().Add(10 * time.Second)
	for {
		resp, err := client.Get("http://agent/v1/status")
		if err == nil {
			resp.Body.Close()
			break
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	if fi, err := os.Stat(socket); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v, %v", fi, err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket remained: %v", err)
	}
}

// A client that has connected and asks nothing counts as one in the middle of a request.
func TestServeDoesNotWaitForAClientThatAsksNothing(t *testing.T) {
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "lash.sock"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- serve(ctx, l, http.NotFoundHandler()) }()
	for _, request := range []string{"", "GET / HTTP/1.0\r\n\r\n"} { // connections are accepted in order
		conn, err := net.Dial("unix", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if request == "" {
			continue
		}
		if _, err := io.WriteString(conn, request); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadAll(conn); err != nil {
			t.Fatal(err)
		}
	}
	start := time.Now()
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	// Waiting for such a client takes net/http five seconds.
	if took := time.Since(start); took > 4*time.Second {
		t.Errorf("the server ended after %s", took)
	}
}
