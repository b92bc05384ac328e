// SPDX-License-Identifier: Apache-2.0

package service

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/state"
)

func ip(s string) netip.Addr { return netip.MustParseAddr(s) }

var http = model.L4{Proto: model.ProtoTCP, Port: 80}

func svc(name string, tweak func(*state.Service), ips ...string) state.Service {
	s := state.Service{Namespace: "ns", Name: name, Type: "ClusterIP", Ports: []state.ServicePortSpec{{Name: "http", L4: http}}}
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

var http8080 = state.SlicePort{Name: "http", L4: model.L4{Proto: model.ProtoTCP, Port: 8080}}

func ready(a string) state.SliceEndpoint {
	return state.SliceEndpoint{Addr: ip(a), Ready: true, Serving: true, Node: "n1"}
}

func elsewhere(a string) state.SliceEndpoint {
	e := ready(a)
	e.Node = "n2"
	return e
}

func terminating(a string, serving bool) state.SliceEndpoint {
	return state.SliceEndpoint{Addr: ip(a), Serving: serving, Terminating: true, Node: "n1"}
}

func unready(a string) state.SliceEndpoint { return state.SliceEndpoint{Addr: ip(a), Node: "n1"} }

func hinted(e state.SliceEndpoint, zones, nodes string) state.SliceEndpoint {
	e.Hints = &state.Hints{Zones: strings.Fields(zones), Nodes: strings.Fields(nodes)}
	return e
}

// line is a service port as one line of text: owner, port, frontends with their flags, backends with theirs.
func line(s model.ServicePort) string {
	flags := func(set map[string]bool, order ...string) (out string) {
		for _, f := range order {
			if set[f] {
				out += " " + f
			}
		}
		return out
	}
	var fs, bs []string
	for _, f := range s.Frontends {
		fs = append(fs, f.FrontendKey.String()+" "+f.Type+flags(map[string]bool{
			"out": f.Outside, "local-out": f.LocalOut, "local-in": f.LocalIn, "ranges": f.Ranges, "deny": f.Deny, "maglev": f.Maglev, "dsr": f.DSR, "node": f.Node,
		}, "out", "local-out", "local-in", "ranges", "deny", "maglev", "dsr", "node"))
	}
	for _, b := range s.Backends {
		bs = append(bs, netip.AddrPortFrom(b.Addr, b.Port).String()+flags(map[string]bool{
			"cluster": b.Cluster, "local": b.Local, "host": b.Host, "terminating": b.Terminating,
		}, "cluster", "local", "host", "terminating"))
	}
	out := fmt.Sprintf("%s/%s %s: %s = %s", s.Namespace, s.Name, s.Port, strings.Join(fs, ", "), strings.Join(bs, ", "))
	if s.Affinity != 0 {
		out += fmt.Sprintf(" affinity %d", s.Affinity)
	}
	if len(s.Ranges) > 0 {
		out += fmt.Sprintf(" from %v", s.Ranges)
	}
	return strings.TrimSpace(out)
}

func TestServicePorts(t *testing.T) {
	front := "ns/a http: 10.96.0.9:80/TCP ClusterIP = "
	everything := func(s *state.Service) {
		s.Type, s.ExternalIPs, s.LoadBalancerIPs, s.Ports[0].NodePort = "LoadBalancer", []netip.Addr{ip("192.0.2.1"), ip("2001:db8::1")}, []netip.Addr{ip("192.0.2.9")}, 30080
	}
	with := func(tweaks ...func(*state.Service)) func(*state.Service) {
		return func(s *state.Service) {
			for _, f := range tweaks {
				f(s)
			}
		}
	}
	external := func(s *state.Service) { s.ExternalLocal = true }
	internal := func(s *state.Service) { s.InternalLocal = true }
	one := []state.EndpointSlice{slice("a-1", "a", http8080, ready("10.0.1.1"))}
	two := []state.EndpointSlice{slice("a-1", "a", http8080, ready("10.0.1.1"), elsewhere("10.0.2.1"))}
	for _, tc := range []struct {
		name string
		svc  state.Service
		eps  []state.EndpointSlice
		want []string
	}{
		{"ready endpoints of all slices, sorted, once",
			svc("a", nil, "10.96.0.9"),
			[]state.EndpointSlice{slice("a-2", "a", http8080, ready("10.0.2.1"), ready("10.0.1.1")), slice("a-1", "a", http8080, unready("10.0.1.1"), unready("10.0.1.7"))},
			[]string{front + "10.0.1.1:8080 cluster, 10.0.1.7:8080, 10.0.2.1:8080 cluster"}},
		{"no endpoint leaves a frontend without backends", svc("a", nil, "10.96.0.9"), nil, []string{"ns/a http: 10.96.0.9:80/TCP ClusterIP ="}},
		{"dual stack takes each family's slices",
			svc("a", nil, "10.96.0.9", "fd96::9"),
			[]state.EndpointSlice{slice("a-4", "a", http8080, ready("10.0.1.1")), slice("a-6", "a", http8080, ready("fd00::1"))},
			[]string{front + "10.0.1.1:8080 cluster", "ns/a http: [fd96::9]:80/TCP ClusterIP = [fd00::1]:8080 cluster"}},
		{"headless has no frontend", svc("a", everything), one, nil},
		{"ExternalName has none", svc("a", func(s *state.Service) { s.Type = "ExternalName" }, "10.96.0.9"), nil, nil},
		{"all kinds of frontends share the backends, in the family of the cluster IP",
			svc("a", everything, "10.96.0.9"), one,
			[]string{"ns/a http: 0.0.0.0:30080/TCP NodePort out node, 10.96.0.9:80/TCP ClusterIP, 192.0.2.1:80/TCP ExternalIPs out, 192.0.2.9:80/TCP LoadBalancer out = 10.0.1.1:8080 cluster"}},
		{"an address twice is one frontend",
			svc("a", with(everything, func(s *state.Service) { s.ExternalIPs = s.LoadBalancerIPs }), "10.96.0.9"), one,
			[]string{"ns/a http: 0.0.0.0:30080/TCP NodePort out node, 10.96.0.9:80/TCP ClusterIP, 192.0.2.9:80/TCP LoadBalancer out = 10.0.1.1:8080 cluster"}},
		{"externalTrafficPolicy Local: this node's, for what comes from outside",
			svc("a", with(everything, external), "10.96.0.9"), two,
			[]string{"ns/a http: 0.0.0.0:30080/TCP NodePort out local-out node, 10.96.0.9:80/TCP ClusterIP, 192.0.2.1:80/TCP ExternalIPs out local-out, 192.0.2.9:80/TCP LoadBalancer out local-out = 10.0.1.1:8080 cluster local, 10.0.2.1:8080 cluster"}},
		{"internalTrafficPolicy Local: this node's, for the cluster IP",
			svc("a", with(everything, internal), "10.96.0.9"), two,
			[]string{"ns/a http: 0.0.0.0:30080/TCP NodePort out node, 10.96.0.9:80/TCP ClusterIP local-in, 192.0.2.1:80/TCP ExternalIPs out, 192.0.2.9:80/TCP LoadBalancer out = 10.0.1.1:8080 cluster local, 10.0.2.1:8080 cluster"}},
		{"Local takes what terminates here if nothing is ready here",
			svc("a", with(external), "10.96.0.9"),
			[]state.EndpointSlice{slice("a-1", "a", http8080, terminating("10.0.1.1", true), terminating("10.0.1.2", false), elsewhere("10.0.2.1"))},
			[]string{front + "10.0.1.1:8080 local terminating, 10.0.1.2:8080 terminating, 10.0.2.1:8080 cluster"}},
		{"source ranges are the load balancer's, in its family",
			svc("a", with(everything, func(s *state.Service) {
				s.SourceRanges = []netip.Prefix{netip.MustParsePrefix("10.9.0.0/16"), netip.MustParsePrefix("2001:db8::/32")}
			}), "10.96.0.9"), one,
			[]string{"ns/a http: 0.0.0.0:30080/TCP NodePort out node, 10.96.0.9:80/TCP ClusterIP, 192.0.2.1:80/TCP ExternalIPs out, 192.0.2.9:80/TCP LoadBalancer out ranges = 10.0.1.1:8080 cluster from [10.9.0.0/16]"}},
		{"ranges that cannot be read let nobody in",
			svc("a", func(s *state.Service) { s.LoadBalancerIPs, s.RangesBroken = []netip.Addr{ip("192.0.2.9")}, true }, "10.96.0.9"), nil,
			[]string{"ns/a http: 10.96.0.9:80/TCP ClusterIP, 192.0.2.9:80/TCP LoadBalancer out ranges ="}},
		{"source ranges that are kept out",
			svc("a", func(s *state.Service) {
				s.LoadBalancerIPs, s.RangesDeny, s.SourceRanges = []netip.Addr{ip("192.0.2.9")}, true, []netip.Prefix{netip.MustParsePrefix("10.9.0.0/16")}
			}, "10.96.0.9"), nil,
			[]string{"ns/a http: 10.96.0.9:80/TCP ClusterIP, 192.0.2.9:80/TCP LoadBalancer out ranges deny =  from [10.9.0.0/16]"}},
		{"of those that are kept out, ranges that cannot be read keep nobody out",
			svc("a", func(s *state.Service) {
				s.LoadBalancerIPs, s.RangesDeny, s.RangesBroken = []netip.Addr{ip("192.0.2.9")}, true, true
			}, "10.96.0.9"), nil,
			[]string{"ns/a http: 10.96.0.9:80/TCP ClusterIP, 192.0.2.9:80/TCP LoadBalancer out ="}},
		{"by annotation: the load balancer's address alone",
			svc("a", with(everything, func(s *state.Service) { s.Only, s.ExternalIPs = "LoadBalancer", nil }), "10.96.0.9"), one,
			[]string{"ns/a http: 192.0.2.9:80/TCP LoadBalancer out = 10.0.1.1:8080 cluster"}},
		{"by annotation: the NodePort alone, and addresses that are no type's",
			svc("a", with(everything, func(s *state.Service) { s.Only = "NodePort" }), "10.96.0.9"), one,
			[]string{"ns/a http: 0.0.0.0:30080/TCP NodePort out node, 192.0.2.1:80/TCP ExternalIPs out = 10.0.1.1:8080 cluster"}},
		{"by annotation: the cluster IP alone",
			svc("a", with(everything, func(s *state.Service) { s.Only, s.ExternalIPs = "ClusterIP", nil }), "10.96.0.9"), one,
			[]string{front + "10.0.1.1:8080 cluster"}},
		{"by annotation: DSR and Maglev",
			svc("a", func(s *state.Service) {
				s.ExternalIPs, s.Mode, s.Algorithm = []netip.Addr{ip("192.0.2.1")}, "dsr", "maglev"
			}, "10.96.0.9"), nil,
			[]string{"ns/a http: 10.96.0.9:80/TCP ClusterIP, 192.0.2.1:80/TCP ExternalIPs out maglev dsr ="}},
		{"session affinity", svc("a", func(s *state.Service) { s.SessionAffinitySec = 30 }, "10.96.0.9"), nil, []string{"ns/a http: 10.96.0.9:80/TCP ClusterIP =  affinity 30"}},
		{"ports are matched by name and protocol",
			svc("dns", func(s *state.Service) {
				s.Ports = []state.ServicePortSpec{{Name: "dns", L4: model.L4{Proto: model.ProtoUDP, Port: 53}}, {Name: "dns-tcp", L4: model.L4{Proto: model.ProtoTCP, Port: 53}}}
			}, "10.96.0.10"),
			[]state.EndpointSlice{{Namespace: "ns", Name: "dns-1", Service: "dns",
				Ports: []state.SlicePort{{Name: "dns-tcp", L4: model.L4{Proto: model.ProtoTCP, Port: 5301}}, {Name: "dns", L4: model.L4{Proto: model.ProtoUDP, Port: 5300}},
					{Name: "dns", L4: model.L4{Proto: model.ProtoTCP, Port: 1}}, {Name: "dns", L4: model.L4{Proto: model.ProtoUDP}}},
				Endpoints: []state.SliceEndpoint{ready("10.0.1.1")}}},
			[]string{"ns/dns dns-tcp: 10.96.0.10:53/TCP ClusterIP = 10.0.1.1:5301 cluster", "ns/dns dns: 10.96.0.10:53/UDP ClusterIP = 10.0.1.1:5300 cluster"}},
		{"an unnamed port matches an unnamed one only",
			svc("a", func(s *state.Service) { s.Ports[0].Name = "" }, "10.96.0.9"),
			[]state.EndpointSlice{slice("a-1", "a", http8080, ready("10.0.1.1")), slice("a-2", "a", state.SlicePort{L4: http8080.L4}, ready("10.0.1.2"))},
			[]string{"ns/a : 10.96.0.9:80/TCP ClusterIP = 10.0.1.2:8080 cluster"}},
		{"a named target port may be another number in each slice",
			svc("a", nil, "10.96.0.9"),
			[]state.EndpointSlice{slice("a-1", "a", http8080, ready("10.0.1.1")), slice("a-2", "a", state.SlicePort{Name: "http", L4: model.L4{Proto: 6, Port: 9090}}, ready("10.0.1.2"))},
			[]string{front + "10.0.1.1:8080 cluster, 10.0.1.2:9090 cluster"}},
		{"terminating endpoints that serve are used when none is ready",
			svc("a", nil, "10.96.0.9"),
			[]state.EndpointSlice{slice("a-1", "a", http8080, terminating("10.0.1.1", true), terminating("10.0.1.2", false), unready("10.0.1.3"))},
			[]string{front + "10.0.1.1:8080 cluster terminating, 10.0.1.2:8080 terminating, 10.0.1.3:8080"}},
		{"and keep what they have when one is",
			svc("a", nil, "10.96.0.9"),
			[]state.EndpointSlice{slice("a-1", "a", http8080, terminating("10.0.1.1", true), ready("10.0.1.2"))},
			[]string{front + "10.0.1.1:8080 terminating, 10.0.1.2:8080 cluster"}},
		{"publishNotReadyAddresses",
			svc("a", func(s *state.Service) { s.PublishNotReady = true }, "10.96.0.9"),
			[]state.EndpointSlice{slice("a-1", "a", http8080, unready("10.0.1.3"))}, []string{front + "10.0.1.3:8080 cluster"}},
		{"hints for this zone",
			svc("a", nil, "10.96.0.9"),
			[]state.EndpointSlice{slice("a-1", "a", http8080, hinted(ready("10.0.1.1"), "z1 z2", ""), hinted(ready("10.0.1.2"), "z2", ""))},
			[]string{front + "10.0.1.1:8080 cluster, 10.0.1.2:8080"}},
		{"hints for this node come before those for its zone",
			svc("a", nil, "10.96.0.9"),
			[]state.EndpointSlice{slice("a-1", "a", http8080, hinted(ready("10.0.1.1"), "z1", "n2"), hinted(ready("10.0.1.2"), "z1", "n1"))},
			[]string{front + "10.0.1.1:8080, 10.0.1.2:8080 cluster"}},
		{"hints for other nodes fall back to those for the zone",
			svc("a", nil, "10.96.0.9"),
			[]state.EndpointSlice{slice("a-1", "a", http8080, hinted(ready("10.0.1.1"), "z2", "n2"), hinted(ready("10.0.1.2"), "z1", "n3"))},
			[]string{front + "10.0.1.1:8080, 10.0.1.2:8080 cluster"}},
		{"hints are ignored when a ready endpoint has none",
			svc("a", nil, "10.96.0.9"),
			[]state.EndpointSlice{slice("a-1", "a", http8080, hinted(ready("10.0.1.1"), "z2", ""), ready("10.0.1.2"), hinted(unready("10.0.1.3"), "z1", ""))},
			[]string{front + "10.0.1.1:8080 cluster, 10.0.1.2:8080 cluster, 10.0.1.3:8080"}},
		{"and when none is for this zone",
			svc("a", nil, "10.96.0.9"),
			[]state.EndpointSlice{slice("a-1", "a", http8080, hinted(ready("10.0.1.1"), "z2", ""))},
			[]string{front + "10.0.1.1:8080 cluster"}},
		{"hints do not matter to Local",
			svc("a", external, "10.96.0.9"),
			[]state.EndpointSlice{slice("a-1", "a", http8080, hinted(ready("10.0.1.1"), "z2", ""), hinted(elsewhere("10.0.2.1"), "z1", ""))},
			[]string{front + "10.0.1.1:8080 local, 10.0.2.1:8080 cluster"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			claims, _, _ := ofService(config(), self{zone: "z1"}, tc.svc, tc.eps)
			var got []string
			for _, c := range claims {
				got = append(got, line(c.port))
			}
			slices.Sort(got)
			if !slices.Equal(got, tc.want) {
				t.Errorf("got  %q\nwant %q", got, tc.want)
			}
		})
	}
}

func TestConfigurationOfServicePorts(t *testing.T) {
	s := svc("a", func(s *state.Service) { s.Type, s.Ports[0].NodePort = "NodePort", 30080 }, "10.96.0.9")
	for name, tc := range map[string]struct {
		tweak func(*Config, *state.Service)
		want  string
	}{
		"hybrid: DSR of TCP": {func(c *Config, _ *state.Service) { c.DSR = map[uint8]bool{6: true} }, "0.0.0.0:30080/TCP NodePort out dsr node, 10.96.0.9:80/TCP ClusterIP"},
		"no DSR of what some nodes serve": {func(c *Config, s *state.Service) {
			c.DSR, s.Mode, s.Nodes = map[uint8]bool{6: true}, "dsr", "pool=edge"
		}, "0.0.0.0:30080/TCP NodePort out node, 10.96.0.9:80/TCP ClusterIP"},
		"a service that wants SNAT":   {func(c *Config, s *state.Service) { c.DSR, s.Mode = map[uint8]bool{6: true}, "snat" }, "0.0.0.0:30080/TCP NodePort out node, 10.96.0.9:80/TCP ClusterIP"},
		"Maglev":                      {func(c *Config, _ *state.Service) { c.Maglev = true }, "0.0.0.0:30080/TCP NodePort out maglev node, 10.96.0.9:80/TCP ClusterIP"},
		"a service that wants random": {func(c *Config, s *state.Service) { c.Maglev, s.Algorithm = true, "random" }, "0.0.0.0:30080/TCP NodePort out node, 10.96.0.9:80/TCP ClusterIP"},
		"cluster IPs from outside":    {func(c *Config, s *state.Service) { c.OutsideClusterIP, c.Maglev = true, true }, "0.0.0.0:30080/TCP NodePort out maglev node, 10.96.0.9:80/TCP ClusterIP out maglev"},
		"source ranges of everything that is served outside": {func(c *Config, s *state.Service) {
			c.AllRanges, s.ExternalIPs, s.SourceRanges = true, []netip.Addr{ip("192.0.2.1")}, []netip.Prefix{netip.MustParsePrefix("10.9.0.0/16")}
		}, "0.0.0.0:30080/TCP NodePort out ranges node, 10.96.0.9:80/TCP ClusterIP, 192.0.2.1:80/TCP ExternalIPs out ranges =  from [10.9.0.0/16]"},
		"and of cluster IPs, where they are": {func(c *Config, s *state.Service) {
			c.AllRanges, c.OutsideClusterIP, s.RangesDeny, s.SourceRanges = true, true, true, []netip.Prefix{netip.MustParsePrefix("10.9.0.0/16")}
		}, "0.0.0.0:30080/TCP NodePort out ranges deny node, 10.96.0.9:80/TCP ClusterIP out ranges deny =  from [10.9.0.0/16]"},
		"with Local, the Maglev table is that of the others": {func(c *Config, s *state.Service) { c.OutsideClusterIP, c.Maglev, s.ExternalLocal = true, true, true },
			"0.0.0.0:30080/TCP NodePort out local-out maglev node, 10.96.0.9:80/TCP ClusterIP out"},
	} {
		cfg, s := config(), s
		tc.tweak(&cfg, &s)
		claims, _, _ := ofService(cfg, self{}, s, nil)
		want := tc.want
		if !strings.Contains(want, " =") {
			want += " ="
		}
		if got := line(claims[0].port); got != "ns/a http: "+want {
			t.Errorf("%s: got %q", name, got)
		}
	}
}

func TestHostPorts(t *testing.T) {
	pod := state.Pod{Namespace: "ns", Name: "p", IPs: []netip.Addr{ip("10.0.1.5"), ip("fd00::5")}, Phase: "Running"}
	with := func(f func(*state.Pod), ports ...state.PodPort) state.Pod {
		p := pod
		p.Ports = ports
		if f != nil {
			f(&p)
		}
		return p
	}
	port := func(host uint16, hostIP string) state.PodPort {
		p := state.PodPort{Name: "web", L4: model.L4{Proto: 6, Port: 8080}, HostPort: host}
		if hostIP != "" {
			p.HostIP = ip(hostIP)
		}
		return p
	}
	flags := " HostPort out local-out local-in node = "
	for name, tc := range map[string]struct {
		pod   state.Pod
		want  []string
		warns int
	}{
		"on every address of both families": {with(nil, port(80, "")), []string{
			"ns/p web: 0.0.0.0:80/TCP" + flags + "10.0.1.5:8080 local", "ns/p web: [::]:80/TCP" + flags + "[fd00::5]:8080 local"}, 0},
		"on one address":          {with(nil, port(80, "127.0.0.1")), []string{"ns/p web: 127.0.0.1:80/TCP" + flags + "10.0.1.5:8080 local"}, 0},
		"a port without HostPort": {with(nil, port(0, "")), nil, 0},
		"in the NodePort range":   {with(nil, port(30080, "")), nil, 1},
		"host network":            {with(func(p *state.Pod) { p.HostNetwork = true }, port(80, "")), nil, 0},
		"a pod that has ended":    {with(func(p *state.Pod) { p.Phase = "Succeeded" }, port(80, "")), nil, 0},
		"a pod without address":   {with(func(p *state.Pod) { p.IPs = nil }, port(80, "")), nil, 0},
	} {
		claims, warnings := ofPod(config(), self{}, tc.pod)
		var got []string
		for _, c := range claims {
			got = append(got, line(c.port))
		}
		slices.Sort(got)
		if !slices.Equal(got, tc.want) || len(warnings) != tc.warns {
			t.Errorf("%s: got %q, %q", name, got, warnings)
		}
	}
}
