// SPDX-License-Identifier: Apache-2.0

package service

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/state"
)

func config() Config {
	return Config{Node: "n1", IPv4: true, IPv6: true, Topology: true, Affinity: true, NodePortFirst: 30000, NodePortLast: 32767, Numbers: NewNumbers(nil)}
}

// running is a stage over its tables.
type running struct {
	t      *testing.T
	tables *state.Tables
}

func start(t *testing.T, cfg Config) running {
	t.Helper()
	tables, err := state.New()
	if err != nil {
		t.Fatal(err)
	}
	stage := New(tables, cfg)
	ctx, cancel := context.WithCancel(t.Context())
	stopped := make(chan error)
	go func() { stopped <- stage.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-stopped; tables.Stop() })
	return running{t, tables}
}

func (r running) rows() []state.ServicePort {
	return state.Rows(r.tables.DB.ReadTxn(), r.tables.ServicePorts)
}

// lines are the service ports without numbers, sorted.
func (r running) lines() []string {
	var out []string
	for _, row := range r.rows() {
		out = append(out, line(row))
	}
	slices.Sort(out)
	return out
}

func (r running) warnings() []string {
	var out []string
	for _, w := range state.Rows(r.tables.DB.ReadTxn(), r.tables.Warnings) {
		out = append(out, w.Text)
	}
	return out
}

// becomes waits until the service ports are those wanted.
func (r running) becomes(want ...string) {
	r.t.Helper()
	slices.Sort(want)
	var got []string
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		if got = r.lines(); slices.Equal(got, want) {
			return
		}
	}
	r.t.Fatalf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
}

func (r running) id(frontend string) uint32 {
	r.t.Helper()
	for _, row := range r.rows() {
		for _, f := range row.Frontends {
			if f.FrontendKey.String() == frontend {
				return row.ID
			}
		}
	}
	r.t.Fatalf("no frontend %s in %v", frontend, r.lines())
	return 0
}

func TestConflictsHaveOneWinnerThatIsTheOlder(t *testing.T) {
	r := start(t, config())
	external := func(name string, created int64, clusterIP string) state.Service {
		return svc(name, func(s *state.Service) { s.Created, s.ExternalIPs = created, []netip.Addr{ip("192.0.2.1")} }, clusterIP)
	}
	young, old := external("a", 200, "10.96.0.1"), external("b", 100, "10.96.0.2")
	state.Insert(r.tables.DB, r.tables.Services, young)
	r.becomes("ns/a http: 10.96.0.1:80/TCP ClusterIP, 192.0.2.1:80/TCP ExternalIPs out =")
	state.Insert(r.tables.DB, r.tables.Services, old)
	r.becomes("ns/a http: 10.96.0.1:80/TCP ClusterIP =", "ns/b http: 10.96.0.2:80/TCP ClusterIP, 192.0.2.1:80/TCP ExternalIPs out =")
	want := "service ns/a: ExternalIPs 192.0.2.1:80/TCP is that of service ns/b: give one of them another address or port"
	if got := r.warnings(); !slices.Equal(got, []string{want}) {
		t.Errorf("warnings: %q", got)
	}
	state.Delete(r.tables.DB, r.tables.Services, old)
	r.becomes("ns/a http: 10.96.0.1:80/TCP ClusterIP, 192.0.2.1:80/TCP ExternalIPs out =")
	if got := r.warnings(); len(got) != 0 {
		t.Errorf("warnings are left: %q", got)
	}
}

// A pod whose HostPort a NodePort has keeps its other ports, and gets the port when the service goes.
func TestServicesWinOverPods(t *testing.T) {
	cfg := config()
	cfg.NodePortFirst, cfg.NodePortLast = 30000, 30099
	r := start(t, cfg)
	pod := state.Pod{Namespace: "ns", Name: "p", IPs: []netip.Addr{ip("10.0.1.5")}, Ports: []state.PodPort{
		{L4: model.L4{Proto: 6, Port: 8080}, HostPort: 31000}, {L4: model.L4{Proto: 6, Port: 9090}, HostPort: 9090},
	}}
	state.Insert(r.tables.DB, r.tables.Pods, pod)
	other := "ns/p : 0.0.0.0:9090/TCP HostPort out local-out local-in node = 10.0.1.5:9090 local"
	lost := "ns/p : 0.0.0.0:31000/TCP HostPort out local-out local-in node = 10.0.1.5:8080 local"
	r.becomes(other, lost)
	s := svc("a", func(s *state.Service) { s.Type, s.Ports[0].NodePort = "NodePort", 31000 }, "10.96.0.1")
	state.Insert(r.tables.DB, r.tables.Services, s)
	r.becomes(other, "ns/a http: 0.0.0.0:31000/TCP NodePort out node, 10.96.0.1:80/TCP ClusterIP =")
	if got := strings.Join(r.warnings(), "\n"); !strings.Contains(got, "pod ns/p: HostPort 0.0.0.0:31000/TCP is that of service ns/a") ||
		!strings.Contains(got, "service ns/a: nodePort 31000 lies outside of node-port-range 30000-30099") {
		t.Errorf("warnings: %s", got)
	}
	state.Delete(r.tables.DB, r.tables.Services, s)
	r.becomes(other, lost)
	if got := r.warnings(); len(got) != 0 {
		t.Errorf("warnings are left: %q", got)
	}
}

func TestHealthChecksCountReadyEndpointsOfThisNode(t *testing.T) {
	r := start(t, config())
	s := svc("a", func(s *state.Service) {
		s.Type, s.ExternalLocal, s.HealthCheckNodePort, s.LoadBalancerIPs = "LoadBalancer", true, 32001, []netip.Addr{ip("192.0.2.9")}
	}, "10.96.0.1")
	state.Insert(r.tables.DB, r.tables.Services, s)
	check := func(want ...state.HealthCheck) {
		t.Helper()
		var got []state.HealthCheck
		for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
			if got = state.Rows(r.tables.DB.ReadTxn(), r.tables.HealthChecks); slices.Equal(got, want) {
				return
			}
		}
		t.Fatalf("got %v, want %v", got, want)
	}
	check(state.HealthCheck{Namespace: "ns", Name: "a", Port: 32001})
	state.Insert(r.tables.DB, r.tables.Slices, slice("a-1", "a", http8080, ready("10.0.1.1"), ready("10.0.1.2"), elsewhere("10.0.2.1"), terminating("10.0.1.3", true)))
	check(state.HealthCheck{Namespace: "ns", Name: "a", Port: 32001, Endpoints: 2})
	state.Insert(r.tables.DB, r.tables.Slices, slice("a-1", "a", http8080, terminating("10.0.1.3", true), elsewhere("10.0.2.1")))
	check(state.HealthCheck{Namespace: "ns", Name: "a", Port: 32001})
	state.Delete(r.tables.DB, r.tables.Services, s)
	check()
}

// A number goes with the frontends: over a restart, and when a port is renamed.
func TestNumbersFollowFrontends(t *testing.T) {
	cfg := config()
	cfg.Numbers = NewNumbers(map[uint32]model.ServicePort{7: {Frontends: []model.Frontend{{FrontendKey: model.FrontendKey{Addr: ip("10.96.0.5"), L4: http}}}}, 9: {}})
	r := start(t, cfg)
	w := r.tables.DB.WriteTxn(r.tables.Services)
	for _, a := range []string{"10.96.0.4", "10.96.0.5", "10.96.0.6"} {
		state.Put(w, r.tables.Services, svc("s"+a, nil, a))
	}
	w.Commit()
	line := func(a, port string) string { return fmt.Sprintf("ns/s%s %s: %s:80/TCP ClusterIP =", a, port, a) }
	r.becomes(line("10.96.0.4", "http"), line("10.96.0.5", "http"), line("10.96.0.6", "http"))
	if got := r.id("10.96.0.5:80/TCP"); got != 7 {
		t.Errorf("the known frontend has number %d, want 7", got)
	}
	before := r.id("10.96.0.6:80/TCP")
	if before == 7 || before == 9 || before == r.id("10.96.0.4:80/TCP") {
		t.Errorf("number %d is taken", before)
	}
	state.Insert(r.tables.DB, r.tables.Services, svc("s10.96.0.6", func(s *state.Service) { s.Ports[0].Name = "web" }, "10.96.0.6"))
	r.becomes(line("10.96.0.4", "http"), line("10.96.0.5", "http"), line("10.96.0.6", "web"))
	if got := r.id("10.96.0.6:80/TCP"); got != before {
		t.Errorf("a renamed port has number %d, had %d", got, before)
	}
	// One that comes as another goes gets a number of its own.
	w = r.tables.DB.WriteTxn(r.tables.Services)
	state.Remove(w, r.tables.Services, svc("s10.96.0.4", nil))
	state.Put(w, r.tables.Services, svc("s10.96.0.8", nil, "10.96.0.8"))
	w.Commit()
	r.becomes(line("10.96.0.5", "http"), line("10.96.0.6", "web"), line("10.96.0.8", "http"))
	if got := r.id("10.96.0.8:80/TCP"); got <= before {
		t.Errorf("number %d was another's a moment ago", got)
	}
}

// Whatever the order of events, the outcome is that of the final objects; numbers aside, which depend on history.
func TestEventOrderDoesNotMatter(t *testing.T) {
	var services []state.Service
	var eps []state.EndpointSlice
	for i := range 12 {
		n := fmt.Sprintf("s%d", i)
		services = append(services, svc(n, func(s *state.Service) {
			s.Created = int64(i % 3)
			s.ExternalIPs = []netip.Addr{ip(fmt.Sprintf("192.0.2.%d", i%5))} // contested
		}, fmt.Sprintf("10.96.0.%d", i+1)))
		for j := range 3 {
			eps = append(eps, slice(fmt.Sprintf("%s-%d", n, j), n, http8080, ready(fmt.Sprintf("10.0.%d.%d", j, i+1)), unready("10.0.9.9")))
		}
	}
	pods := []state.Pod{
		{Namespace: "ns", Name: "p1", Created: 1, IPs: []netip.Addr{ip("10.0.1.5")}, Ports: []state.PodPort{{L4: http8080.L4, HostPort: 80}}},
		{Namespace: "ns", Name: "p2", Created: 2, IPs: []netip.Addr{ip("10.0.1.6")}, Ports: []state.PodPort{{L4: http8080.L4, HostPort: 80}}},
	}
	var first, warned []string
	for seed := range uint64(12) {
		rng := rand.New(rand.NewPCG(seed, 3))
		r := start(t, config())
		db := r.tables.DB
		var events []func()
		for _, s := range services {
			events = append(events, func() { state.Insert(db, r.tables.Services, s) })
			other := s
			other.ExternalIPs, other.Ports = []netip.Addr{ip("192.0.2.4")}, []state.ServicePortSpec{{Name: "x", L4: model.L4{Proto: 17, Port: 80}}}
			events = append(events, func() { state.Insert(db, r.tables.Services, other); state.Insert(db, r.tables.Services, s) })
		}
		for _, e := range eps {
			events = append(events, func() { state.Insert(db, r.tables.Slices, e) })
			stray := e
			stray.Service = "s0"
			events = append(events, func() { state.Insert(db, r.tables.Slices, stray); state.Insert(db, r.tables.Slices, e) })
		}
		for _, p := range pods {
			events = append(events, func() { state.Insert(db, r.tables.Pods, p) })
		}
		gone := svc("gone", func(s *state.Service) { s.ExternalIPs = []netip.Addr{ip("192.0.2.1")} }, "10.96.9.9")
		events = append(events, func() { state.Insert(db, r.tables.Services, gone) })
		rng.Shuffle(len(events), func(i, j int) { events[i], events[j] = events[j], events[i] })
		for _, e := range events {
			e()
			if rng.IntN(4) == 0 {
				time.Sleep(time.Duration(rng.IntN(3)) * time.Millisecond)
			}
		}
		state.Delete(db, r.tables.Services, gone)
		if seed == 0 {
			time.Sleep(300 * time.Millisecond)
			first, warned = r.lines(), r.warnings()
			if len(first) != 13 || len(warned) != 8 || !strings.Contains(strings.Join(first, "\n"), "10.0.1.5:8080 local") {
				t.Fatalf("%d service ports, %d warnings:\n%s\n%s", len(first), len(warned), strings.Join(first, "\n"), strings.Join(warned, "\n"))
			}
			continue
		}
		r.becomes(first...)
		if got := r.warnings(); !reflect.DeepEqual(got, warned) {
			t.Fatalf("seed %d: warnings are %q, want %q", seed, got, warned)
		}
		ids := map[uint32]bool{}
		for _, row := range r.rows() {
			ids[row.ID] = true
		}
		if len(ids) != len(first) || ids[0] {
			t.Errorf("seed %d: numbers are not one each: %v", seed, ids)
		}
	}
}

func TestNothingIsWrittenBeforeTheInputsAreComplete(t *testing.T) {
	tables, err := state.New()
	if err != nil {
		t.Fatal(err)
	}
	defer tables.Stop()
	w := tables.DB.WriteTxn(tables.Slices)
	done := tables.Slices.RegisterInitializer(w, "test")
	w.Commit()
	stage := New(tables, config())
	ctx, cancel := context.WithCancel(t.Context())
	stopped := make(chan error)
	go func() { stopped <- stage.Run(ctx) }()
	defer func() { cancel(); <-stopped }()
	state.Insert(tables.DB, tables.Services, svc("a", nil, "10.96.0.1"))
	time.Sleep(50 * time.Millisecond)
	if n := tables.ServicePorts.NumObjects(tables.DB.ReadTxn()); n != 0 {
		t.Fatalf("%d rows were written early", n)
	}
	w = tables.DB.WriteTxn(tables.Slices)
	done(w)
	w.Commit()
	running{t, tables}.becomes("ns/a http: 10.96.0.1:80/TCP ClusterIP =")
	if ok, _ := tables.ServicePorts.Initialized(tables.DB.ReadTxn()); !ok {
		t.Error("the output is not announced as complete")
	}
}

// An address that is a node's stays the node's, but for the ports of the service.
func TestAddressesOfNodesAreTold(t *testing.T) {
	r := start(t, config())
	state.Insert(r.tables.DB, r.tables.Services, svc("a", func(s *state.Service) { s.ExternalIPs = []netip.Addr{ip("172.18.0.2"), ip("172.18.0.3")} }, "10.96.0.1"))
	state.Insert(r.tables.DB, r.tables.Nodes, model.Node{Name: "n2", Addrs: []netip.Addr{ip("172.18.0.2")}})
	r.becomes("ns/a http: 10.96.0.1:80/TCP ClusterIP, 172.18.0.2:80/TCP ExternalIPs out node, 172.18.0.3:80/TCP ExternalIPs out =")
	state.Insert(r.tables.DB, r.tables.Nodes, model.Node{Name: "n3", Addrs: []netip.Addr{ip("172.18.0.3")}})
	state.Delete(r.tables.DB, r.tables.Nodes, model.Node{Name: "n2"})
	r.becomes("ns/a http: 10.96.0.1:80/TCP ClusterIP, 172.18.0.2:80/TCP ExternalIPs out, 172.18.0.3:80/TCP ExternalIPs out node =")
}

func TestRowsFollowTheNode(t *testing.T) {
	r := start(t, config())
	state.Insert(r.tables.DB, r.tables.Services, svc("a", nil, "10.96.0.1"))
	near, far := ready("172.18.0.1"), ready("10.0.2.1")
	near.Hints, far.Hints = &state.Hints{Zones: []string{"z1"}}, &state.Hints{Zones: []string{"z2"}}
	state.Insert(r.tables.DB, r.tables.Slices, slice("a-1", "a", http8080, near, far))
	r.becomes("ns/a http: 10.96.0.1:80/TCP ClusterIP = 10.0.2.1:8080 cluster, 172.18.0.1:8080 cluster")
	state.Insert(r.tables.DB, r.tables.Local, model.Node{Name: "n1", Zone: "z1", Addrs: []netip.Addr{ip("172.18.0.1")}})
	r.becomes("ns/a http: 10.96.0.1:80/TCP ClusterIP = 10.0.2.1:8080, 172.18.0.1:8080 cluster host")
}

// A service that only some nodes serve comes and goes with the labels of this one, and is served while they are not known.
func TestSomeNodesServeSomeServices(t *testing.T) {
	cfg := config()
	cfg.Selects = func(selector string, labels map[string]string) bool { return labels["pool"] == selector }
	r := start(t, cfg)
	state.Insert(r.tables.DB, r.tables.Services, svc("a", nil, "10.96.0.1"))
	state.Insert(r.tables.DB, r.tables.Services, svc("edge", func(s *state.Service) {
		s.Nodes, s.HealthCheckNodePort = "edge", 32000
	}, "10.96.0.2"))
	everywhere, edge := "ns/a http: 10.96.0.1:80/TCP ClusterIP =", "ns/edge http: 10.96.0.2:80/TCP ClusterIP ="
	r.becomes(everywhere, edge)
	local := func(pool string) {
		state.Insert(r.tables.DB, r.tables.Local, model.Node{Name: "n1", Labels: map[string]string{"pool": pool}})
	}
	local("core")
	r.becomes(everywhere)
	if n := r.tables.HealthChecks.NumObjects(r.tables.DB.ReadTxn()); n != 0 {
		t.Errorf("%d health checks of a service that is not served", n)
	}
	local("edge")
	r.becomes(everywhere, edge)
	state.Insert(r.tables.DB, r.tables.Services, svc("edge", func(s *state.Service) { s.Nodes = "core" }, "10.96.0.2"))
	r.becomes(everywhere)
}
