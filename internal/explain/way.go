// SPDX-License-Identifier: Apache-2.0

package explain

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"strconv"
	"strings"

	"github.com/lash-net/lash/api/agent"
	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/state"
)

// Peers are the agents of other nodes.
type Peers interface {
	Hop(ctx context.Context, node model.Node, hop agent.ExplainHop) (agent.ExplainHopAnswer, error)
}

// mostHops is how many nodes a packet may pass.
const mostHops = 8

// Explain tells what becomes of the packet that req describes, on all nodes it passes.
func (e *Explainer) Explain(ctx context.Context, req agent.ExplainRequest) (agent.Explanation, error) {
	n := namesOf(e.Tables)
	src, err := n.resolve(req.Src)
	if err != nil {
		return agent.Explanation{}, fmt.Errorf("source: %w", err)
	}
	if req.Device != "" {
		src = n.seenAt(&req, src)
	}
	dst, err := n.resolve(req.Dst)
	if err != nil {
		return agent.Explanation{}, fmt.Errorf("destination: %w", err)
	}
	if err := complete(&req, dst); err != nil {
		return agent.Explanation{}, err
	}
	sources, err := alternatives(src, src.kind == "service", req.All)
	if err != nil {
		return agent.Explanation{}, fmt.Errorf("source: %w", err)
	}
	targets, err := alternatives(dst, len(dst.addrs) == 0, req.All)
	if err != nil {
		return agent.Explanation{}, fmt.Errorf("destination: %w", err)
	}
	var out agent.Explanation
	for _, from := range sources {
		for _, to := range targets {
			first, node, err := n.first(req, from, to)
			if err != nil {
				return out, err
			}
			for backend := 0; ; backend++ {
				first.Backend = backend
				way, backends, err := e.way(ctx, n, node, first)
				if err != nil {
					return out, err
				}
				out.Ways = append(out.Ways, way)
				if !req.All || backend+1 >= backends {
					break
				}
			}
		}
	}
	return out, nil
}

// seenAt is who sent what was seen at a device of this node: the pod behind it, whatever address it used, or somebody out
// in the network. Of another device's packets, the source address says it.
func (n names) seenAt(req *agent.ExplainRequest, src party) party {
	ifindex, err := strconv.Atoi(req.Device)
	if err != nil {
		dev, err := net.InterfaceByName(req.Device)
		if err != nil {
			return src
		}
		ifindex = dev.Index
	}
	if ep, ok := n.behind(ifindex); ok {
		if !slices.Contains(ep.Addrs(), src.addrs[0]) {
			req.SourceIP = src.addrs[0]
		}
		return party{kind: agent.FromPod, what: n.endpoint(ep), node: n.local(), addrs: ep.Addrs()}
	}
	if _, _, ok := n.t.Devices.Get(n.txn, state.DeviceByIndex(ifindex)); ok && src.node != n.local() {
		req.Node = n.local()
		return party{kind: "address", what: src.what, addrs: src.addrs, given: true}
	}
	return src
}

// alternatives are the endpoints of a service, the first or all of them, where these are meant, else the party itself.
func alternatives(p party, endpoints, all bool) ([]party, error) {
	if !endpoints {
		return []party{p}, nil
	}
	if len(p.ends) == 0 {
		return nil, fmt.Errorf("%s has no endpoint: 'kubectl get endpointslices' shows them", p.what)
	}
	if !all {
		return p.ends[:1], nil
	}
	return p.ends, nil
}

// mostSize is of a packet's payload, bytes.
const mostSize = 3400

// complete fills in what the person left out, and refuses what has no meaning.
func complete(req *agent.ExplainRequest, dst party) error {
	req.Proto = strings.ToLower(req.Proto)
	if req.Port == 0 && req.Proto != icmp && len(dst.ports) > 0 {
		var fits []state.ServicePortSpec
		var all []string
		for _, p := range dst.ports {
			all = append(all, fmt.Sprintf("%d/%s", p.Port, strings.ToLower(model.ProtoName(p.Proto))))
			if req.Proto == "" || number(req.Proto, false) == p.Proto {
				fits = append(fits, p)
			}
		}
		if len(fits) != 1 {
			return fmt.Errorf("destination: %s has the ports %s: append one, like :%s", dst.what, strings.Join(all, ", "), all[0])
		}
		req.Port, req.Proto = fits[0].Port, strings.ToLower(model.ProtoName(fits[0].Proto))
	}
	if req.Proto == "" {
		req.Proto = icmp
		if req.Port != 0 {
			req.Proto = tcp
		}
	}
	switch {
	case !slices.Contains([]string{tcp, udp, sctp, icmp}, req.Proto):
		return fmt.Errorf("protocol %q: must be tcp, udp, sctp or icmp", req.Proto)
	case req.Proto == icmp && req.Port != 0:
		return errors.New("destination: icmp has no port")
	case req.Proto != icmp && req.Port == 0:
		return fmt.Errorf("destination: %s needs a port, like :80/%s", req.Proto, req.Proto)
	case req.Family != 0 && req.Family != 4 && req.Family != 6:
		return fmt.Errorf("family %d: must be 4 or 6", req.Family)
	case req.Size < 0 || req.Size > mostSize:
		return fmt.Errorf("size %d: must be 0 to %d bytes: the kernel test-runs packets of less than a page", req.Size, mostSize)
	}
	if req.TTL == 0 {
		req.TTL = 64
	}
	if req.SourcePort == 0 { // of ephemeral ports; a connection that exists is explained only if it is meant
		req.SourcePort, req.Fresh = uint16(49152+rand.IntN(16384)), true
	}
	return nil
}

// first is where the way of a packet begins: the hop, and the node to ask for it.
func (n names) first(req agent.ExplainRequest, src, dst party) (hop agent.ExplainHop, node string, err error) {
	v4, err := family(req, src, dst)
	if err != nil {
		return hop, "", err
	}
	p := agent.ExplainPacket{Dst: dst.of(v4), Proto: req.Proto, SourcePort: req.SourcePort, Port: req.Port, TTL: req.TTL, Size: req.Size}
	hop = agent.ExplainHop{Packet: &p, Fresh: req.Fresh}
	switch src.kind {
	case agent.FromPod:
		hop.From, p.Pod, p.Src = agent.FromPod, src.of(v4), req.SourceIP.Unmap()
		if req.SourceIP.IsValid() && p.Src.Is4() != v4 {
			return hop, "", fmt.Errorf("source address %s: must be of the destination's family", req.SourceIP)
		}
		node = src.node
		if node == "" {
			return hop, "", fmt.Errorf("%s is on a node that this agent does not know: 'lash node list' shows those it does", src.what)
		}
		return hop, node, nil
	case agent.FromHost:
		if hop.From = agent.FromHost; src.given {
			p.Src = src.of(v4)
		}
		return hop, src.node, nil
	}
	hop.From, p.Src = agent.FromNetwork, src.of(v4)
	node = req.Node
	if node == "" {
		node = dst.node
	}
	if node == "" {
		return hop, "", fmt.Errorf("neither %s nor %s is of the cluster: say with --at at which node the packet arrives", src.what, dst.what)
	}
	return hop, node, nil
}

// family is true for IPv4.
func family(req agent.ExplainRequest, src, dst party) (bool, error) {
	has := func(v4 bool) bool { return src.of(v4).IsValid() && dst.of(v4).IsValid() }
	if req.Family != 0 {
		if !has(req.Family == 4) {
			return false, fmt.Errorf("IPv%d: %s and %s do not both have an address of it", req.Family, src.what, dst.what)
		}
		return req.Family == 4, nil
	}
	for _, v4 := range []bool{true, false} {
		if has(v4) {
			return v4, nil
		}
	}
	return false, fmt.Errorf("%s and %s have no address family in common", src.what, dst.what)
}

// way asks one node after the other.
func (e *Explainer) way(ctx context.Context, n names, node string, hop agent.ExplainHop) (way agent.ExplainedWay, backends int, err error) {
	p := *hop.Packet
	way.Dst = n.end(p.Dst)
	if p.Src.IsValid() {
		way.Src = n.end(p.Src)
	} else {
		way.Src = n.end(p.Pod)
	}
	last := ""
	for hops := 0; ; hops++ {
		if hops == mostHops {
			return way, backends, errors.New("the packet goes in circles between nodes")
		}
		answer, err := e.ask(ctx, n, node, hop)
		if err != nil {
			if last == "" {
				return way, backends, err
			}
			way.Verdict = agent.ExplainVerdict{Outcome: agent.OutcomeUnknown, Node: node, Reason: err.Error(),
				Text:   fmt.Sprintf("goes on to node %s, whose agent could not be asked: %v", node, err),
				Remedy: "see 'lash health status': agents ask each other at the port of health probes"}
			return way, backends, nil
		}
		if last == "" {
			backends = answer.Backends
			if !way.Src.Addr.IsValid() {
				way.Src = n.end(answer.Src)
			}
		}
		way.Steps = append(way.Steps, answer.Steps...)
		if answer.Verdict != nil {
			way.Verdict = *answer.Verdict
			return way, backends, nil
		}
		if answer.Next == nil {
			return way, backends, fmt.Errorf("node %s answers with neither a verdict nor a next node: is its agent of another version?", node)
		}
		last, node, hop = node, answer.NextNode, *answer.Next
	}
}

func (e *Explainer) ask(ctx context.Context, n names, name string, hop agent.ExplainHop) (agent.ExplainHopAnswer, error) {
	if name == n.local() {
		return e.Hop(ctx, hop)
	}
	node, _, ok := n.t.Nodes.Get(n.txn, state.NodeByName(name))
	if !ok {
		return agent.ExplainHopAnswer{}, fmt.Errorf("no node %q: 'lash node list' shows those there are", name)
	}
	return e.Peers.Hop(ctx, node, hop)
}
