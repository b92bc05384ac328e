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

	"github.com/cilium/statedb"

	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/state"
)

func ip(s string) netip.Addr { return netip.MustParseAddr(s) }

func svc(name string, tweak func(*state.Service), ips ...string) state.Service {
	s := state.Service{Namespace: "ns", Name: name, Type: "ClusterIP",
		Ports: []state.ServicePort{{Name: "http", L4: model.L4{Proto: model.ProtoTCP, Port: 80}}}}
	for _, a := range ips {
		s.ClusterIPs = append(s.ClusterIPs, ip(a))
	}
	if tweak != nil {
		tweak(&s)
	}
	return s
}

func slice(name, service string, port state.SlicePort, eps ...state.SliceEndpoint) state.EndpointSlice {
	return state.EndpointSlice{Namespace: "ns", Name: name, Service: service, Ports: []state.SlicePort{port}, Endpoints: eps,
		IPv6: len(eps) > 0 && eps[0].Addr.Is6()}
}

func ready(a string) state.SliceEndpoint {
	return state.SliceEndpoint{Addr: ip(a), Ready: true, Serving: true, Node: "n1"}
}

var (
	http8080    = state.SlicePort{Name: "http", L4: model.L4{Proto: model.ProtoTCP, Port: 8080}}
	terminating = func(a string, serving bool) state.SliceEndpoint {
		return state.SliceEndpoint{Addr: ip(a), Serving: serving, Terminating: true, Node: "n1"}
	}
	unready = func(a string) state.SliceEndpoint { return state.SliceEndpoint{Addr: ip(a), Node: "n1"} }
)

func TestFrontends(t *testing.T) {
	for _, tc := range []struct {
		name string
		svc  state.Service
		eps  []state.EndpointSlice
		want []string
	}{
		{"ready endpoints of all slices, sorted, once",
			svc("a", nil, "10.96.0.9"),
			[]state.EndpointSlice{slice("a-2", "a", http8080, ready("10.0.2.1"), ready("10.0.1.1")), slice("a-1", "a", http8080, ready("10.0.1.1"), unready("10.0.1.7"))},
			[]string{"10.96.0.9:80/TCP http = 10.0.1.1:8080/TCP (active), 10.0.2.1:8080/TCP (active)"}},
		{"no endpoint leaves a frontend without backends",
			svc("a", nil, "10.96.0.9"), nil, []string{"10.96.0.9:80/TCP http = "}},
		{"dual stack takes each family's slices",
			svc("a", nil, "10.96.0.9", "fd96::9"),
			[]state.EndpointSlice{slice("a-4", "a", http8080, ready("10.0.1.1")), slice("a-6", "a", http8080, ready("fd00::1"))},
			[]string{"10.96.0.9:80/TCP http = 10.0.1.1:8080/TCP (active)", "[fd96::9]:80/TCP http = [fd00::1]:8080/TCP (active)"}},
		{"headless has no frontend", svc("a", nil), []state.EndpointSlice{slice("a-1", "a", http8080, ready("10.0.1.1"))}, nil},
		{"ExternalName has none", svc("a", func(s *state.Service) { s.Type = "ExternalName" }, "10.96.0.9"), nil, nil},
		{"the cluster IP of a LoadBalancer works",
			svc("a", func(s *state.Service) { s.Type = "LoadBalancer" }, "10.96.0.9"),
			[]state.EndpointSlice{slice("a-1", "a", http8080, ready("10.0.1.1"))},
			[]string{"10.96.0.9:80/TCP http = 10.0.1.1:8080/TCP (active)"}},
		{"ports are matched by name and protocol",
			svc("dns", func(s *state.Service) {
				s.Ports = []state.ServicePort{{Name: "dns", L4: model.L4{Proto: model.ProtoUDP, Port: 53}}, {Name: "dns-tcp", L4: model.L4{Proto: model.ProtoTCP, Port: 53}}}
			}, "10.96.0.10"),
			[]state.EndpointSlice{{Namespace: "ns", Name: "dns-1", Service: "dns",
				Ports: []state.SlicePort{{Name: "dns-tcp", L4: model.L4{Proto: model.ProtoTCP, Port: 5301}}, {Name: "dns", L4: model.L4{Proto: model.ProtoUDP, Port: 5300}},
					{Name: "dns", L4: model.L4{Proto: model.ProtoTCP, Port: 1}}, {Name: "dns", L4: model.L4{Proto: model.ProtoUDP}}},
				Endpoints: []state.SliceEndpoint{ready("10.0.1.1")}}},
			[]string{"10.96.0.10:53/TCP dns-tcp = 10.0.1.1:5301/TCP (active)", "10.96.0.10:53/UDP dns = 10.0.1.1:5300/UDP (active)"}},
		{"an unnamed port matches an unnamed one only",
			svc("a", func(s *state.Service) { s.Ports[0].Name = "" }, "10.96.0.9"),
			[]state.EndpointSlice{slice("a-1", "a", http8080, ready("10.0.1.1")), slice("a-2", "a", state.SlicePort{L4: http8080.L4}, ready("10.0.1.2"))},
			[]string{"10.96.0.9:80/TCP  = 10.0.1.2:8080/TCP (active)"}},
		{"terminating endpoints that serve are used when none is ready",
			svc("a", nil, "10.96.0.9"),
			[]state.EndpointSlice{slice("a-1", "a", http8080, terminating("10.0.1.1", true), terminating("10.0.1.2", false), unready("10.0.1.3"))},
			[]string{"10.96.0.9:80/TCP http = 10.0.1.1:8080/TCP (terminating)"}},
		{"and not when one is",
			svc("a", nil, "10.96.0.9"),
			[]state.EndpointSlice{slice("a-1", "a", http8080, terminating("10.0.1.1", true), ready("10.0.1.2"))},
			[]string{"10.96.0.9:80/TCP http = 10.0.1.2:8080/TCP (active)"}},
		{"publishNotReadyAddresses",
			svc("a", func(s *state.Service) { s.PublishNotReady = true }, "10.96.0.9"),
			[]state.EndpointSlice{slice("a-1", "a", http8080, unready("10.0.1.3"))},
			[]string{"10.96.0.9:80/TCP http = 10.0.1.3:8080/TCP (active)"}},
		{"internalTrafficPolicy Local takes this node's",
			svc("a", func(s *state.Service) { s.InternalLocal = true }, "10.96.0.9"),
			[]state.EndpointSlice{slice("a-1", "a", http8080, ready("10.0.1.3"), state.SliceEndpoint{Addr: ip("10.0.2.3"), Ready: true, Node: "n2"})},
			[]string{"10.96.0.9:80/TCP http = 10.0.1.3:8080/TCP (active)"}},
		{"SCTP is left alone", svc("a", func(s *state.Service) { s.Ports[0].Proto = model.ProtoSCTP }, "10.96.0.9"), nil, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			cfg := Config{Node: "n1", IPv4: true, IPv6: true, Numbers: NewNumbers(nil)}
			var got []string
			for _, r := range Frontends(cfg, []state.Service{tc.svc}, func(string) []state.EndpointSlice { return tc.eps }) {
				var bs []string
				for _, b := range r.Entry.Backends {
					bs = append(bs, b.String())
				}
				got = append(got, fmt.Sprintf("%s %s = %s", r.Key, r.Entry.PortName, strings.Join(bs, ", ")))
			}
			if !slices.Equal(got, tc.want) {
				t.Errorf("got  %q\nwant %q", got, tc.want)
			}
		})
	}
}

func TestNumbersStayWhileFrontendsComeAndGo(t *testing.T) {
	known := map[model.Frontend]model.FrontendEntry{
		{Addr: ip("10.96.0.5"), L4: model.L4{Proto: 6, Port: 80}}: {ID: 7},
		{Addr: ip("10.96.0.6"), L4: model.L4{Proto: 6, Port: 80}}: {ID: 7}, // damaged: a number twice
	}
	cfg := Config{IPv4: true, Numbers: NewNumbers(known)}
	ids := func(ips ...string) []uint32 {
		var services []state.Service
		for _, a := range ips {
			services = append(services, svc(a, nil, a))
		}
		var out []uint32
		for _, r := range Frontends(cfg, services, func(string) []state.EndpointSlice { return nil }) {
			out = append(out, r.Entry.ID)
		}
		return out
	}
	if got, want := ids("10.96.0.4", "10.96.0.5", "10.96.0.6"), []uint32{1, 7, 2}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if got, want := ids("10.96.0.5", "10.96.0.6"), []uint32{7, 2}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if got, want := ids("10.96.0.5", "10.96.0.6", "10.96.0.7"), []uint32{7, 2, 1}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// Any order of events ends with the same frontends as the final objects alone; numbers aside, which depend on history.
func TestEventOrderDoesNotMatter(t *testing.T) {
	var services []state.Service
	var eps []state.EndpointSlice
	for i := range 12 {
		name := fmt.Sprintf("s%d", i)
		services = append(services, svc(name, nil, fmt.Sprintf("10.96.0.%d", i+1)))
		for j := range 3 {
			eps = append(eps, slice(fmt.Sprintf("%s-%d", name, j), name, http8080, ready(fmt.Sprintf("10.0.%d.%d", j, i+1)), unready("10.0.9.9")))
		}
	}
	final := func(seed uint64) []state.Frontend {
		tables, err := state.New()
		if err != nil {
			t.Fatal(err)
		}
		defer tables.Stop()
		stage := Stage(tables, Config{IPv4: true, Numbers: NewNumbers(nil)})
		ctx, cancel := context.WithCancel(t.Context())
		stopped := make(chan error)
		go func() { stopped <- stage.Run(ctx, tables.DB) }()
		defer func() { cancel(); <-stopped }()

		rng := rand.New(rand.NewPCG(seed, 3))
		var events []func()
		for _, s := range services {
			events = append(events, func() { state.Insert(tables.DB, tables.Services, s) })
		}
		for _, e := range eps {
			events = append(events, func() { state.Insert(tables.DB, tables.Slices, e) })
		}
		gone := svc("gone", nil, "10.96.9.9")
		events = append(events, func() { state.Insert(tables.DB, tables.Services, gone) })
		rng.Shuffle(len(events), func(i, j int) { events[i], events[j] = events[j], events[i] })
		for _, e := range events {
			e()
			if rng.IntN(4) == 0 {
				time.Sleep(time.Duration(rng.IntN(3)) * time.Millisecond)
			}
		}
		state.Delete(tables.DB, tables.Services, gone)

		want := Frontends(Config{IPv4: true, Numbers: NewNumbers(nil)}, services, func(key string) []state.EndpointSlice {
			return statedb.Collect(tables.Slices.List(tables.DB.ReadTxn(), state.SlicesByService(key)))
		})
		deadline := time.After(10 * time.Second)
		for {
			seq, changed := tables.Frontends.AllWatch(tables.DB.ReadTxn())
			got := statedb.Collect(seq)
			for i := range got {
				got[i].Entry.ID = 0
			}
			for i := range want {
				want[i].Entry.ID = 0
			}
			if reflect.DeepEqual(got, want) {
				return got
			}
			select {
			case <-changed:
			case <-deadline:
				t.Fatalf("seed %d: got %v\nwant %v", seed, got, want)
			}
		}
	}
	first := final(0)
	if len(first) != 12 || len(first[0].Entry.Backends) != 3 {
		t.Fatalf("got %v", first)
	}
	for seed := uint64(1); seed < 10; seed++ {
		if got := final(seed); !reflect.DeepEqual(got, first) {
			t.Errorf("seed %d differs", seed)
		}
	}
}
