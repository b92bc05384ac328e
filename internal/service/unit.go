// SPDX-License-Identifier: Apache-2.0

package service

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/state"
)

// Config is what the stage needs to know of the configuration.
type Config struct {
	Node       string // this node's name
	IPv4, IPv6 bool
	DSR        map[uint8]bool // protocols for which clients outside are answered directly where a service does not choose
	Maglev     bool           // the algorithm where a service does not choose
	Topology   bool           // follow topology hints
	Affinity   bool           // follow session affinity
	// OutsideClusterIP lets packets from outside reach ClusterIPs.
	OutsideClusterIP bool
	AllRanges        bool // source ranges are those of all addresses for clients outside, not of load balancers' only
	// Selects reports whether a node's labels meet a selector; nil: nobody is selective.
	Selects func(selector string, labels map[string]string) bool
	// NodePortFirst and NodePortLast bound what the API server gives to NodePorts: HostPorts there are not served.
	NodePortFirst, NodePortLast uint16
	Numbers                     *Numbers
}

func (c Config) enabled(ipv6 bool) bool { return ipv6 && c.IPv6 || !ipv6 && c.IPv4 }

// self is what the stage needs to know of its node.
type self struct {
	zone   string
	labels map[string]string   // nil: not known yet
	addrs  map[netip.Addr]bool // the node's own
	nodes  map[netip.Addr]bool // of all nodes
}

// has reports whether a frontend's address is a node's.
func (s self) has(a netip.Addr) bool {
	return a.IsUnspecified() || a.IsLoopback() || s.addrs[a] || s.nodes[a]
}

// name is a service port's: what it is the same by while everything else of it changes.
type name struct {
	owner string // "namespace/name" of a service, "pod namespace/name" of a pod
	port  string
	proto uint8
	ipv6  bool
}

func (n name) compare(o name) int {
	return cmp.Or(cmp.Compare(n.owner, o.owner), cmp.Compare(n.port, o.port), cmp.Compare(n.proto, o.proto), order(n.ipv6)-order(o.ipv6))
}

// order of false is before true.
func order(b bool) int {
	if b {
		return 1
	}
	return 0
}

// claim is a service port as its object wants it, before anybody else's claims to its frontends are considered.
type claim struct {
	name name
	rank rank
	port model.ServicePort // without number
}

// rank decides who gets a frontend that several claim: services before pods, what stays before what terminates, then the
// older, then the first by name.
type rank struct {
	pod, terminating bool
	created          int64
}

func (c *claim) before(o *claim) bool {
	a, b := c.rank, o.rank
	return cmp.Or(order(a.pod)-order(b.pod), order(a.terminating)-order(b.terminating), cmp.Compare(a.created, b.created), c.name.compare(o.name)) < 0
}

// ofService are the service ports of a service, and how many of its endpoints on this node are ready. A service without
// cluster IP is headless, or has none yet: it is not translated.
func ofService(cfg Config, node self, svc state.Service, eps []state.EndpointSlice) (claims []*claim, local int, warnings []state.Warning) {
	if svc.Type == "ExternalName" || !serves(cfg, node, svc) {
		return nil, 0, nil
	}
	for _, p := range svc.Ports {
		if p.NodePort != 0 && (svc.Only == "" || svc.Only == model.TypeNodePort) && (p.NodePort < cfg.NodePortFirst || p.NodePort > cfg.NodePortLast) && len(svc.ClusterIPs) > 0 {
			warnings = append(warnings, warn("service "+svc.Key(), "nodePort %d lies outside of node-port-range %d-%d, so that connections of this node may use it too: make the range that of the API server", p.NodePort, cfg.NodePortFirst, cfg.NodePortLast))
		}
	}
	if len(svc.ClusterIPs) > 0 {
		warnings = append(warnings, unserved(svc, eps)...)
	}
	ready := map[netip.Addr]struct{}{}
	for i, ip := range svc.ClusterIPs {
		ipv6 := ip.Is6()
		if !cfg.enabled(ipv6) || slices.ContainsFunc(svc.ClusterIPs[:i], func(a netip.Addr) bool { return a.Is6() == ipv6 }) {
			continue
		}
		for _, p := range svc.Ports {
			c := &claim{name: name{svc.Key(), p.Name, p.Proto, ipv6}, rank: rank{created: svc.Created}, port: model.ServicePort{
				Namespace: svc.Namespace, Name: svc.Name, Port: p.Name, Proto: p.Proto, IPv6: ipv6,
			}}
			if cfg.Affinity {
				c.port.Affinity = uint32(svc.SessionAffinitySec)
			}
			if len(svc.LoadBalancerIPs) > 0 || cfg.AllRanges {
				for _, r := range svc.SourceRanges {
					if r.Addr().Is6() == ipv6 {
						c.port.Ranges = append(c.port.Ranges, r)
					}
				}
				slices.SortFunc(c.port.Ranges, netip.Prefix.Compare)
				c.port.Ranges = slices.Compact(c.port.Ranges)
			}
			c.port.Frontends = frontends(cfg, node, svc, p, ip, len(c.port.Ranges) > 0 || svc.RangesBroken && !svc.RangesDeny)
			c.port.Backends = backends(cfg, node, svc, p, ipv6, eps)
			for _, b := range c.port.Backends {
				if b.Local && !b.Terminating {
					ready[b.Addr] = struct{}{}
				}
			}
			claims = append(claims, c)
		}
	}
	return claims, len(ready), warnings
}

// serves reports whether the service is this node's to serve. While the node's labels are not known, every service is.
func serves(cfg Config, node self, svc state.Service) bool {
	return svc.Nodes == "" || node.labels == nil || cfg.Selects == nil || cfg.Selects(svc.Nodes, node.labels)
}

// unserved is what a service and its slices ask for in vain, because the two do not fit together.
func unserved(svc state.Service, eps []state.EndpointSlice) (warnings []state.Warning) {
	for field, addrs := range map[string][]netip.Addr{"spec.externalIPs": svc.ExternalIPs, "status.loadBalancer.ingress": svc.LoadBalancerIPs} {
		for _, a := range addrs {
			if !slices.ContainsFunc(svc.ClusterIPs, func(ip netip.Addr) bool { return ip.Is6() == a.Is6() }) {
				warnings = append(warnings, warn(aboutService+svc.Key(), "%s: %s is not served, the service has no cluster IP of that family: set spec.ipFamilyPolicy: RequireDualStack", field, a))
			}
		}
	}
	for _, slice := range eps {
		if slice.Derived { // it will follow the service
			continue
		}
		for i, p := range slice.Ports {
			fits := func(sp state.ServicePortSpec) bool { return sp.Name == p.Name && sp.Proto == p.Proto }
			if slices.ContainsFunc(svc.Ports, fits) {
				continue
			}
			var has []string
			for _, sp := range svc.Ports {
				has = append(has, portName(sp.Name, sp.Proto))
			}
			warnings = append(warnings, warn(aboutSlice+slice.Key(), "ports[%d]: service %s has no port %s, but %s: name and protocol must be those of a port of the service", i, svc.Key(), portName(p.Name, p.Proto), strings.Join(has, ", ")))
		}
	}
	return warnings
}

// portName names a port of a service or slice for a person.
func portName(name string, proto uint8) string {
	return fmt.Sprintf("%q/%s", name, model.ProtoName(proto))
}

// frontends are those of one port in the family of its cluster IP, sorted.
func frontends(cfg Config, node self, svc state.Service, p state.ServicePortSpec, clusterIP netip.Addr, ranges bool) []model.Frontend {
	// Backends' nodes believe only in frontends that they have themselves, and not all have those of a selective service.
	dsr := svc.Nodes == "" && (svc.Mode == "dsr" || svc.Mode == "" && cfg.DSR[p.Proto])
	maglev := svc.Algorithm == "maglev" || svc.Algorithm == "" && cfg.Maglev
	outside := model.Frontend{Outside: true, LocalOut: svc.ExternalLocal, DSR: dsr, Maglev: maglev}
	var out []model.Frontend
	add := func(f model.Frontend, addr netip.Addr, port uint16, kind string) {
		f.FrontendKey, f.Type, f.Node = model.FrontendKey{Addr: addr, L4: model.L4{Proto: p.Proto, Port: port}}, kind, node.has(addr)
		if !slices.ContainsFunc(out, func(o model.Frontend) bool { return o.FrontendKey == f.FrontendKey }) {
			out = append(out, f)
		}
	}
	if cfg.AllRanges {
		outside.Ranges, outside.Deny = ranges, ranges && svc.RangesDeny
	}
	served := func(kind string) bool { return svc.Only == "" || svc.Only == kind }
	if served(model.TypeClusterIP) {
		add(model.Frontend{Ranges: cfg.OutsideClusterIP && outside.Ranges, Deny: cfg.OutsideClusterIP && outside.Deny, LocalIn: svc.InternalLocal, Outside: cfg.OutsideClusterIP, LocalOut: cfg.OutsideClusterIP && svc.InternalLocal, Maglev: cfg.OutsideClusterIP && maglev && svc.ExternalLocal == svc.InternalLocal},
			clusterIP, p.Port, model.TypeClusterIP)
	}
	same := func(a netip.Addr) bool { return a.Is6() == clusterIP.Is6() }
	for _, a := range svc.LoadBalancerIPs {
		if same(a) && served(model.TypeLoadBalancer) {
			f := outside
			f.Ranges, f.Deny = ranges, ranges && svc.RangesDeny
			add(f, a, p.Port, model.TypeLoadBalancer)
		}
	}
	for _, a := range svc.ExternalIPs {
		if same(a) {
			add(outside, a, p.Port, model.TypeExternalIPs)
		}
	}
	if p.NodePort != 0 && served(model.TypeNodePort) {
		add(outside, everywhere(clusterIP.Is6()), p.NodePort, model.TypeNodePort)
	}
	slices.SortFunc(out, func(a, b model.Frontend) int { return a.FrontendKey.Compare(b.FrontendKey) })
	return out
}

// everywhere is the unspecified address: every address of the node.
func everywhere(ipv6 bool) netip.Addr {
	if ipv6 {
		return netip.IPv6Unspecified()
	}
	return netip.IPv4Unspecified()
}

// backends are all endpoints of one port, sorted. The sets that serve are those of kube-proxy: ready ones, or, if there is
// none, those that serve while they terminate (KEP-1669); for the cluster those that the topology hints give to this
// node. Slices name a port as the service does; their port numbers are resolved target ports.
func backends(cfg Config, node self, svc state.Service, port state.ServicePortSpec, ipv6 bool, eps []state.EndpointSlice) []model.Backend {
	type endpoint struct {
		model.Backend
		ready, last, here bool // last: serves while it terminates
		hints             *state.Hints
	}
	var all []endpoint
	for _, slice := range eps {
		if slice.IPv6 != ipv6 {
			continue
		}
		for _, sp := range slice.Ports {
			if sp.Name != port.Name || sp.Proto != port.Proto || sp.Port == 0 {
				continue
			}
			for _, ep := range slice.Endpoints {
				all = append(all, endpoint{
					Backend: model.Backend{Addr: ep.Addr, Port: sp.Port, Host: node.addrs[ep.Addr], Terminating: ep.Terminating},
					ready:   ep.Ready || svc.PublishNotReady && !ep.Terminating, last: ep.Serving && ep.Terminating,
					here: ep.Node != "" && ep.Node == cfg.Node, hints: ep.Hints,
				})
			}
		}
	}
	// An endpoint may be in two slices for a moment; it is what the better of the two says.
	slices.SortStableFunc(all, func(a, b endpoint) int {
		good := func(e endpoint) int {
			switch {
			case e.ready:
				return 0
			case e.last:
				return 1
			}
			return 2
		}
		return cmp.Or(a.Backend.Compare(b.Backend), good(a)-good(b))
	})
	all = slices.CompactFunc(all, func(a, b endpoint) bool { return a.Backend.Compare(b.Backend) == 0 })

	// Hints are followed if every ready endpoint has them and some name this node, or else its zone.
	nodes, zones, forNode, forZone := cfg.Topology, cfg.Topology && node.zone != "", false, false
	for _, e := range all {
		if !e.ready {
			continue
		}
		h := e.hints
		if h == nil {
			h = &state.Hints{}
		}
		nodes, zones = nodes && len(h.Nodes) > 0, zones && len(h.Zones) > 0
		forNode, forZone = forNode || slices.Contains(h.Nodes, cfg.Node), forZone || slices.Contains(h.Zones, node.zone)
	}
	hinted := func(e endpoint) bool {
		switch {
		case nodes && forNode:
			return slices.Contains(e.hints.Nodes, cfg.Node)
		case zones && forZone:
			return slices.Contains(e.hints.Zones, node.zone)
		}
		return true
	}
	useLocal := svc.InternalLocal || svc.ExternalLocal
	var cluster, local bool // some are ready
	for _, e := range all {
		cluster, local = cluster || e.ready && hinted(e), local || e.ready && e.here
	}
	out := make([]model.Backend, len(all))
	for i, e := range all {
		b := e.Backend
		b.Cluster = cluster && e.ready && hinted(e) || !cluster && e.last
		b.Local = useLocal && e.here && (local && e.ready || !local && e.last)
		out[i] = b
	}
	return out
}

// ofPod are the HostPorts of a pod of this node.
func ofPod(cfg Config, node self, pod state.Pod) (claims []*claim, warnings []state.Warning) {
	if pod.HostNetwork || pod.Ended() {
		return nil, nil
	}
	for _, p := range pod.Ports {
		if p.HostPort == 0 {
			continue
		}
		if p.HostPort >= cfg.NodePortFirst && p.HostPort <= cfg.NodePortLast {
			warnings = append(warnings, warn("pod "+pod.Key(), "hostPort %d lies in node-port-range %d-%d and is not served: choose a port outside of it", p.HostPort, cfg.NodePortFirst, cfg.NodePortLast))
			continue
		}
		for i, ip := range pod.IPs {
			if !cfg.enabled(ip.Is6()) || slices.ContainsFunc(pod.IPs[:i], func(a netip.Addr) bool { return a.Is6() == ip.Is6() }) {
				continue
			}
			at := everywhere(ip.Is6())
			if p.HostIP.IsValid() {
				if p.HostIP.Is6() != ip.Is6() {
					continue
				}
				at = p.HostIP
			}
			claims = append(claims, &claim{
				name: name{"pod " + pod.Key(), fmt.Sprintf("%s:%d", at, p.HostPort), p.Proto, ip.Is6()},
				rank: rank{pod: true, terminating: pod.Terminating, created: pod.Created},
				port: model.ServicePort{
					Namespace: pod.Namespace, Name: pod.Name, Port: p.Name, Proto: p.Proto, IPv6: ip.Is6(),
					Frontends: []model.Frontend{{
						FrontendKey: model.FrontendKey{Addr: at, L4: model.L4{Proto: p.Proto, Port: p.HostPort}}, Type: model.TypeHostPort,
						Outside: true, LocalIn: true, LocalOut: true, Node: node.has(at),
					}},
					Backends: []model.Backend{{Addr: ip, Port: p.Port, Local: true, Host: node.addrs[ip]}},
				},
			})
		}
	}
	return claims, warnings
}

// warn is a row of warnings about an object: "service ns/name", "endpointslice ns/name" or "pod ns/name".
func warn(about, format string, args ...any) state.Warning {
	text := about + ": " + fmt.Sprintf(format, args...)
	return state.Warning{Key: warningPrefix + text, Text: text}
}

const (
	warningPrefix = "services/"
	aboutService  = "service "
	aboutSlice    = "endpointslice "
)

// Subject is the kind of the object that a warning is about, its "namespace/name", and what it says. ok: it is about a
// service or a slice.
func Subject(w state.Warning) (kind, key, text string, ok bool) {
	if !strings.HasPrefix(w.Key, warningPrefix) {
		return "", "", "", false
	}
	for prefix, kind := range map[string]string{aboutService: "Service", aboutSlice: "EndpointSlice"} {
		if rest, found := strings.CutPrefix(w.Text, prefix); found {
			key, text, ok := strings.Cut(rest, ": ")
			return kind, key, text, ok
		}
	}
	return "", "", "", false
}
