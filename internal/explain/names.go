// SPDX-License-Identifier: Apache-2.0

package explain

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/cilium/statedb"

	"github.com/lash-net/lash/api/agent"
	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/state"
)

// names is a snapshot of the tables that say what is behind an address.
type names struct {
	t   *state.Tables
	txn statedb.ReadTxn
}

func namesOf(t *state.Tables) names { return names{t, t.DB.ReadTxn()} }

// local is this node's name.
func (n names) local() string {
	for r := range n.t.Nodes.All(n.txn) {
		if r.Local {
			return r.Name
		}
	}
	for r := range n.t.Local.All(n.txn) {
		return r.Name
	}
	return ""
}

// nodeAt is the node that has an address itself.
func (n names) nodeAt(a netip.Addr) (model.Node, bool) {
	return n.node(func(r model.Node) bool { return slices.Contains(r.Addrs, a) })
}

// nodeOf is the node whose pod CIDR has an address.
func (n names) nodeOf(a netip.Addr) (model.Node, bool) {
	return n.node(func(r model.Node) bool {
		return slices.ContainsFunc(r.PodCIDRs, func(p netip.Prefix) bool { return p.Contains(a) })
	})
}

func (n names) node(is func(model.Node) bool) (model.Node, bool) {
	for r := range n.t.Nodes.All(n.txn) {
		if is(r) {
			return r, true
		}
	}
	return model.Node{}, false
}

// end says what is behind an address.
func (n names) end(a netip.Addr) agent.ExplainedEnd {
	e := agent.ExplainedEnd{Addr: a}
	for ep := range n.t.Endpoints.All(n.txn) {
		if slices.Contains(ep.Addrs(), a) && ep.State != model.EndpointDisconnected {
			e.Object, e.Node = n.endpoint(ep), n.local()
			return e
		}
	}
	for r := range n.t.Nodes.All(n.txn) {
		switch {
		case slices.Contains(r.Addrs, a):
			e.Object = "node " + r.Name
		case slices.Contains(r.Routers, a):
			e.Object = "router address of node " + r.Name
		case slices.Contains(r.Health, a):
			e.Object = "health endpoint of node " + r.Name
		default:
			continue
		}
		e.Node = r.Name
		return e
	}
	for r := range n.t.CiliumEndpoints.All(n.txn) {
		if r.IPv4 == a || r.IPv6 == a {
			e.Object = "pod " + r.Key()
			if node, ok := n.nodeAt(r.Node); ok {
				e.Node = node.Name
			}
			return e
		}
	}
	for r := range n.t.Services.All(n.txn) {
		if slices.Contains(r.ClusterIPs, a) || slices.Contains(r.ExternalIPs, a) || slices.Contains(r.LoadBalancerIPs, a) {
			e.Object = "service " + r.Key()
			return e
		}
	}
	if node, ok := n.nodeOf(a); ok {
		e.Object, e.Node = "no pod, in the pod CIDR of node "+node.Name, node.Name
	}
	return e
}

func (n names) endpoint(ep model.Endpoint) string {
	if ep.Pod == "" {
		return "health endpoint of node " + n.local()
	}
	return "pod " + ep.PodName()
}

// behind is the pod whose host-side device has this number.
func (n names) behind(ifindex int) (model.Endpoint, bool) {
	for ep := range n.t.Endpoints.All(n.txn) {
		if ep.Ifindex == ifindex && ep.State != model.EndpointDisconnected {
			return ep, true
		}
	}
	return model.Endpoint{}, false
}

// identity is "identity 2001 (k8s:app=web)": without the labels that every pod has of its namespace and cluster.
func (n names) identity(id uint32) string {
	if fixed := model.Identity(id).FixedLabels(); fixed != nil {
		return fmt.Sprintf("identity %d (%s)", id, strings.Join(fixed, " "))
	}
	if r, _, ok := n.t.Identities.Get(n.txn, state.IdentityByID(model.Identity(id))); ok {
		own := slices.DeleteFunc(r.Labels.List(), func(l string) bool {
			return strings.HasPrefix(l, "k8s:io.cilium.") || strings.HasPrefix(l, "k8s:io.kubernetes.")
		})
		if len(own) == 0 {
			own = []string{"no labels of its own"}
		}
		return fmt.Sprintf("identity %d (%s)", id, strings.Join(own, " "))
	}
	return fmt.Sprintf("identity %d", id)
}

// party is what a name stands for.
type party struct {
	kind  string // pod, host, service or address
	what  string // as an error says it
	node  string // of a pod and of a host
	addrs []netip.Addr
	ports []state.ServicePortSpec // of a service
	given bool                    // by its address
	ends  []party                 // of a service without an address, or as a source: its endpoints
}

// resolve finds what a person means.
func (n names) resolve(s string) (party, error) {
	if a, err := netip.ParseAddr(strings.Trim(s, "[]")); err == nil {
		return n.address(a.Unmap().WithZone("")), nil
	}
	if name, ns, ok := serviceName(s); ok {
		return n.service(ns + "/" + name)
	}
	kind, rest, ok := strings.Cut(s, "/")
	if ok {
		switch {
		case kind == "node":
			return n.nodeNamed(rest)
		case (kind == "svc" || kind == "service") && strings.Contains(rest, "/"):
			return n.service(rest)
		case (kind == "pod" || kind == "pods") && strings.Contains(rest, "/"):
			return n.pod(rest)
		case strings.Contains(rest, "/"):
			return party{}, fmt.Errorf("%s: a name begins with pod/, svc/ or node/", s)
		}
		return n.pod(s)
	}
	return n.nodeNamed(s)
}

// serviceName reads NAME.NAMESPACE.svc and what follows it.
func serviceName(s string) (name, namespace string, ok bool) {
	parts := strings.Split(strings.TrimSuffix(s, "."), ".")
	if len(parts) < 3 || parts[2] != "svc" || strings.Contains(s, "/") {
		return "", "", false
	}
	return parts[0], parts[1], true
}

func (n names) nodeNamed(name string) (party, error) {
	if r, _, ok := n.t.Nodes.Get(n.txn, state.NodeByName(name)); ok {
		return party{kind: agent.FromHost, what: "node " + name, node: r.Name, addrs: r.Addrs}, nil
	}
	return party{}, fmt.Errorf("%s: no node has this name ('lash node list' shows them); a pod is NAMESPACE/NAME, a service svc/NAMESPACE/NAME", name)
}

func (n names) pod(key string) (party, error) {
	p := party{kind: agent.FromPod, what: "pod " + key}
	for ep := range n.t.Endpoints.List(n.txn, state.EndpointByPod(key)) {
		if ep.State != model.EndpointDisconnected {
			p.node, p.addrs = n.local(), ep.Addrs()
			return p, nil
		}
	}
	if r, _, ok := n.t.CiliumEndpoints.Get(n.txn, state.CiliumEndpointByName(key)); ok {
		for _, a := range []netip.Addr{r.IPv4, r.IPv6} {
			if a.IsValid() {
				p.addrs = append(p.addrs, a)
			}
		}
		if node, ok := n.nodeAt(r.Node); ok {
			p.node = node.Name
		}
		return p, nil
	}
	if r, _, ok := n.t.Pods.Get(n.txn, state.PodByName(key)); ok {
		if r.HostNetwork {
			return n.nodeNamed(n.local()) // its packets are the node's own
		}
		return p, fmt.Errorf("%s has no network yet (phase %s)", p.what, r.Phase)
	}
	return p, fmt.Errorf("%s: no such pod has an address of Lash's; one in the host's network is its node: node/NAME", p.what)
}

func (n names) service(key string) (party, error) {
	r, _, ok := n.t.Services.Get(n.txn, state.ServiceByName(key))
	if !ok {
		return party{}, fmt.Errorf("service %s: there is none of this name", key)
	}
	p := party{kind: "service", what: "service " + key, addrs: r.ClusterIPs, ports: r.Ports}
	for slice := range n.t.Slices.List(n.txn, state.SlicesByService(key)) {
		for _, ep := range slice.Endpoints {
			p.ends = append(p.ends, n.address(ep.Addr))
		}
	}
	slices.SortStableFunc(p.ends, func(a, b party) int { return a.addrs[0].Compare(b.addrs[0]) })
	if len(p.addrs) == 0 && len(p.ends) == 0 {
		return p, fmt.Errorf("%s has no cluster IP and no endpoint", p.what)
	}
	return p, nil
}

func (n names) address(a netip.Addr) party {
	p := party{kind: "address", what: a.String(), addrs: []netip.Addr{a}, given: true}
	switch e := n.end(a); {
	case strings.HasPrefix(e.Object, "pod "), strings.HasPrefix(e.Object, "health endpoint"):
		p.kind, p.node = agent.FromPod, e.Node
	case strings.HasPrefix(e.Object, "node "), strings.HasPrefix(e.Object, "router address"):
		p.kind, p.node = agent.FromHost, e.Node
	case e.Node != "":
		p.node = e.Node
	}
	return p
}

// of is the party's address of a family, invalid if it has none.
func (p party) of(v4 bool) netip.Addr {
	for _, a := range p.addrs {
		if a.Is4() == v4 {
			return a
		}
	}
	return netip.Addr{}
}
