// SPDX-License-Identifier: Apache-2.0

package netns

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/lash-net/lash/api/agent"
	"github.com/lash-net/lash/bpf"
	"github.com/lash-net/lash/internal/datapath"
	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/state"
)

func entryOf(way agent.ExplainedWay, name string) (agent.ExplainEntry, bool) {
	for _, s := range way.Steps {
		for _, e := range s.Entries {
			if e.Map == name {
				return e, true
			}
		}
	}
	return agent.ExplainEntry{}, false
}

// A service's frontend becomes a backend at the socket, and goes on as a packet to that one.
func TestExplainTranslatesServices(t *testing.T) {
	o := options{podsPerNode: 2, tunnel: "vxlan"}
	c := newCluster(t, o)
	n1, n2 := c.nodes[0], c.nodes[1]
	e := newExplainers(t, c, o)
	front := model.FrontendKey{Addr: addr("10.96.0.10"), L4: model.L4{Proto: model.ProtoTCP, Port: 80}}
	empty := model.FrontendKey{Addr: addr("10.96.0.11"), L4: model.L4{Proto: model.ProtoTCP, Port: 80}}
	backend := func(a netip.Addr) model.Backend {
		return model.Backend{Addr: a, Port: 7000, Cluster: true}
	}
	n1.do(t, "services", func() error {
		target := n1.dp.ServicePorts()
		if err := target.Put(context.Background(), 8, model.ServicePort{ID: 8, Proto: model.ProtoTCP, Frontends: []model.Frontend{{FrontendKey: empty}}}); err != nil {
			return err
		}
		return target.Put(context.Background(), 7, model.ServicePort{ID: 7, Proto: model.ProtoTCP, Frontends: []model.Frontend{{FrontendKey: front}},
			Backends: []model.Backend{backend(n1.pods[1].ip4), backend(n2.pods[0].ip4)}})
	})
	tables := e.all[0].Tables
	state.Insert(tables.DB, tables.Services, state.Service{Namespace: "d", Name: "web", ClusterIPs: []netip.Addr{front.Addr}, Ports: []state.ServicePortSpec{{L4: front.L4}}})
	var out agent.Explanation
	req := agent.ExplainRequest{Src: n1.podKey(n1.pods[0]), Dst: "web.d.svc", All: true}
	n1.do(t, "explain", func() (err error) {
		out, err = e.all[0].Explain(context.Background(), req)
		return err
	})
	if len(out.Ways) != 2 {
		t.Fatalf("%d ways, want one for each backend", len(out.Ways))
	}
	for i, pod := range []string{n1.podKey(n1.pods[1]), n2.podKey(n2.pods[0])} {
		way := out.Ways[i]
		first, b := way.Steps[0], way.Steps[0].Entries[1]
		if first.Program != "connect4" || way.Steps[0].Entries[0].Object != "service d/web" || b.Object != "pod "+pod || way.Verdict.Pod != pod {
			t.Errorf("way %d: %+v\n%s", i, first, steps(way))
		}
	}
	way := e.explain(t, 0, agent.ExplainRequest{Src: n1.podKey(n1.pods[0]), Dst: empty.Addr.String(), Port: 80})
	if way.Verdict.Outcome != agent.OutcomeRefused || way.Verdict.Remedy == "" {
		t.Errorf("without backends: %+v", way.Verdict)
	}
	// Where kube-proxy translates, the packet is what the socket asked for.
	e.all[0].Sockets = func(bool) bool { return false }
	if way := e.explain(t, 0, agent.ExplainRequest{Src: n1.podKey(n1.pods[0]), Dst: front.Addr.String(), Port: 80}); way.Steps[0].Program != "from_container" {
		t.Errorf("without socket programs: %s", steps(way))
	}
}

// What an answer of explain says of rows and records.
func TestExplainNamesWhatDecides(t *testing.T) {
	o := options{podsPerNode: 2, tunnel: "vxlan"}
	c := newCluster(t, o)
	n1, n2 := c.nodes[0], c.nodes[1]
	e := newExplainers(t, c, o)
	a, far := n1.pods[0], n2.pods[0]
	way := e.explain(t, 1, agent.ExplainRequest{Src: n1.podKey(a), Dst: n2.podKey(far), Port: 7000}) // asked at the other node
	if way.Verdict.Pod != n2.podKey(far) || len(way.Steps) != 2 || way.Steps[0].Node != "n1" || way.Steps[1].Node != "n2" {
		t.Fatalf("%+v\n%s", way.Verdict, steps(way))
	}
	if e, ok := entryOf(way, "lash_ipcache"); !ok || !e.Decides || e.Key != "10.0.2.0/24" || e.Object != "pod "+n2.podKey(far) || !strings.Contains(e.Value, "(node n2), by the tunnel") {
		t.Errorf("ipcache: %+v", e)
	}
	if e, ok := entryOf(way, "lash_endpoints"); !ok || !e.Decides || e.Object != "pod "+n2.podKey(far) {
		t.Errorf("endpoints: %+v", e)
	}
	if r := way.Steps[0].Record; r == nil || !strings.HasPrefix(r.Forth, fmt.Sprintf("by the tunnel to %s, VNI %d", n2.ip4, a.identity)) || r.Back != "into pod "+n1.podKey(a)+", from the tunnel" {
		t.Errorf("record: %+v", r)
	}
	if got := way.Steps[1].Changes; !slices.Contains(got, "TTL 64 -> 63") || !slices.Contains(got, fmt.Sprintf("destination MAC %s -> %s", macOf(a.nodeMAC), macOf(far.mac))) {
		t.Errorf("rewritten: %q", got)
	}
	if !slices.ContainsFunc(way.Steps[0].Points, func(s string) bool { return strings.HasPrefix(s, "to-overlay, new") }) {
		t.Errorf("events: %q", way.Steps[0].Points)
	}
	// An address added in the pod by hand.
	way = e.explain(t, 0, agent.ExplainRequest{Src: n1.podKey(a), SourceIP: addr("10.0.1.77"), Dst: n2.podKey(far)})
	if v := way.Verdict; v.Reason != "Invalid source ip" || v.File != "pod.c" || v.Line == 0 || v.Remedy == "" {
		t.Errorf("spoofed: %+v", v)
	}
	if e, ok := entryOf(way, "lash_ifaces"); !ok || !e.Decides || !strings.Contains(e.Value, "has 10.0.1.10, not 10.0.1.77") {
		t.Errorf("source check: %+v", e)
	}
	// What does not fit through the tunnel does not leave the pod, and what just does reaches the other.
	for size, fits := range map[int]bool{o.routeMTU() - 28: true, o.routeMTU() - 27: false} {
		way = e.explain(t, 0, agent.ExplainRequest{Src: n1.podKey(a), Dst: n2.podKey(far), Size: size})
		out, err := try(a.ns, "ping", "-n", "-c", "1", "-W", "2", "-M", "do", "-s", fmt.Sprint(size), far.ip4.String())
		if (err == nil) != fits || (way.Verdict.Outcome == agent.OutcomeDelivered) != fits || !fits && way.Verdict.Outcome != agent.OutcomeAnswered {
			t.Errorf("%d bytes: explain says %+v, ping %v\n%s", size, way.Verdict, err, out)
		}
	}
	// A node that does not answer.
	e.all[0].Peers = silent{}
	way = e.explain(t, 0, agent.ExplainRequest{Src: n1.podKey(a), Dst: n2.podKey(far)})
	if way.Verdict.Outcome != agent.OutcomeUnknown || way.Verdict.Node != "n2" || len(way.Steps) != 1 {
		t.Errorf("without the other agent: %+v", way.Verdict)
	}
}

type silent struct{}

func (silent) Hop(context.Context, model.Node, agent.ExplainHop) (agent.ExplainHopAnswer, error) {
	return agent.ExplainHopAnswer{}, fmt.Errorf("no answer")
}

// When no source port is left for a masqueraded connection, explain finds none either: it sees those that are taken.
func TestExplainSeesSourcePortsThatAreTaken(t *testing.T) {
	o := options{podsPerNode: 1, fewPorts: true}
	c := newCluster(t, o)
	w := watch(t, c)
	e := newExplainers(t, c, o)
	out := addr(outside4)
	tp := tuple{from: c.podSender(0, c.nodes[0].pods[0]), src: c.nodes[0].pods[0].ip4, dst: out, proto: "udp", port: 7000, ttl: 64}
	for tp.sport = 1; tp.sport < 100; tp.sport++ {
		want := c.expect(e.explain(t, 0, tp.request(true)), o)
		did := w.send(t, []tuple{tp})[0]
		if !slices.Contains(want, did) {
			t.Fatalf("connection %d: explain says %q, it did %q", tp.sport, want, did)
		}
		if strings.Contains(did, "No mapping for NAT masquerade") {
			break
		}
	}
	if tp.sport != 5 {
		t.Errorf("connection %d was the first without a port, want the fifth", tp.sport)
	}
}

// Programs that another configuration attached are not explained by this one's.
func TestExplainRefusesWhatIsNotAttached(t *testing.T) {
	o := options{podsPerNode: 1}
	c := newCluster(t, o)
	n := c.nodes[0]
	e := newExplainers(t, c, o)
	p := n.pods[0]
	ask := func() (err error) {
		n.do(t, "explain", func() error {
			_, err = e.all[0].Explain(context.Background(), agent.ExplainRequest{Src: n.podKey(p), Dst: n.podKey(p)})
			return nil
		})
		return err
	}
	if err := ask(); err != nil {
		t.Fatal(err)
	}
	n.do(t, "another agent", func() error {
		if err := n.dp.Close(); err != nil {
			return err
		}
		return n.open(c, options{legacy: true}) // its pod keeps the program of before
	})
	if err := ask(); err == nil || !strings.Contains(err.Error(), "from_container on lxc10") || !strings.Contains(err.Error(), "other instructions") && !strings.Contains(err.Error(), "other constants") {
		t.Errorf("another configuration's program: %v", err)
	}
	n.do(t, "attach", func() error { return n.dp.AttachPod(p.ifindex, p.name) })
	if err := ask(); err != nil {
		t.Errorf("once it is replaced: %v", err)
	}
	n.do(t, "detach", func() error { return n.dp.DetachPod(p.ifindex, p.name) })
	if err := ask(); err == nil || !strings.Contains(err.Error(), datapath.ErrNotAttached.Error()) {
		t.Errorf("without a program: %v", err)
	}
}

// A service asked for by packets, from outside and from a pod whose socket was not translated.
func TestExplainServicesPerPacketNative(t *testing.T) { explainServices(t, options{podsPerNode: 2}) }
func TestExplainServicesPerPacketVXLAN(t *testing.T) {
	explainServices(t, options{podsPerNode: 2, tunnel: "vxlan"})
}

func explainServices(t *testing.T, o options) {
	c := newCluster(t, o)
	n1, n2 := c.nodes[0], c.nodes[1]
	e := newExplainers(t, c, o)
	e.all[0].Sockets = func(bool) bool { return false }
	n1.leadToHost(t, o)
	near, far := n1.pods[1], n2.pods[0]
	for _, v6 := range []bool{false, true} {
		of := func(p *pod) netip.Addr { return p.ip4 }
		node, outside, every := n1.ip4, outside4, netip.IPv4Unspecified()
		if v6 {
			of = func(p *pod) netip.Addr { return p.ip6 }
			node, outside, every = n1.ip6, outside6, netip.IPv6Unspecified()
		}
		port := func(id uint32, a netip.Addr, port uint16, proto uint8, change func(*model.ServicePort, *model.Frontend), backends ...netip.Addr) {
			t.Helper()
			f := model.Frontend{FrontendKey: model.FrontendKey{Addr: a, L4: model.L4{Proto: proto, Port: port}}, Outside: true}
			s := model.ServicePort{ID: id, Namespace: "d", Name: "web", Port: "http", Proto: proto, IPv6: v6}
			for _, b := range backends {
				s.Backends = append(s.Backends, model.Backend{Addr: b, Port: 7000, Cluster: true})
			}
			if change != nil {
				change(&s, &f)
			}
			s.Frontends = []model.Frontend{f}
			n1.do(t, "service", func() error { return n1.dp.ServicePorts().Put(context.Background(), id, s) })
			tables := e.all[0].Tables
			state.Insert(tables.DB, tables.ServicePorts, s)
		}
		ask := func(src string, a netip.Addr, port uint16, proto string) agent.ExplainedWay {
			t.Helper()
			return e.explain(t, 0, agent.ExplainRequest{Src: src, Dst: a.String(), Port: port, Proto: proto, Node: n1.name()})
		}
		met := func(way agent.ExplainedWay, program, object string, backend *pod) {
			t.Helper()
			front, ok := entryOf(way, "lash_services")
			first := way.Steps[0]
			if program == "from_host" { // after the stack, which sends the packet there
				first = way.Steps[min(1, len(way.Steps)-1)]
			}
			if first.Program != program || !ok || front.Object != object {
				t.Errorf("%s: %+v\n%s", program, front, steps(way))
			}
			if backend == nil {
				return
			}
			row, _ := entryOf(way, "lash_backends")
			name := n1.podKey(backend)
			if backend == far {
				name = n2.podKey(backend)
			}
			if row.Object != "pod "+name || way.Verdict.Pod != name || first.Record == nil || first.Record.Backend != row.Value {
				t.Errorf("%s to %s: %+v, verdict %+v\n%s", program, name, row, way.Verdict, steps(way))
			}
		}
		ends := func(way agent.ExplainedWay, outcome, reason string) {
			t.Helper()
			if way.Verdict.Outcome != outcome || way.Verdict.Reason != reason || way.Verdict.Remedy == "" {
				t.Errorf("%+v, want %s, %s\n%s", way.Verdict, outcome, reason, steps(way))
			}
		}
		n1.do(t, "the node's address", func() error {
			return n1.dp.Map("lash_endpoints").Put(bpf.AddrFrom(node), bpf.Endpoint{Identity: bpf.IdentityHost, Flags: bpf.EndpointHost | bpf.EndpointNodePort})
		})
		port(7, every, nodePort, model.ProtoTCP, nil, of(far))
		met(ask(outside, node, nodePort, "tcp"), "from_netdev", "service d/web, port http", far)
		port(7, every, nodePort, model.ProtoTCP, nil, of(near))
		met(ask(outside, node, nodePort, "tcp"), "from_netdev", "service d/web, port http", near)
		port(7, every, nodePort, model.ProtoTCP, nil)
		way := ask(outside, node, nodePort, "tcp")
		met(way, "from_netdev", "service d/web, port http", nil)
		ends(way, agent.OutcomeRefused, "no backend")
		port(7, every, nodePort, model.ProtoTCP, func(_ *model.ServicePort, f *model.Frontend) { f.LocalOut = true }, of(far))
		ends(ask(outside, node, nodePort, "tcp"), agent.OutcomeDropped, "Service backend not found")
		port(7, every, nodePort, model.ProtoTCP, func(s *model.ServicePort, f *model.Frontend) {
			s.Ranges, f.Ranges = []netip.Prefix{netip.PrefixFrom(of(near), of(near).BitLen())}, true
		}, of(far))
		way = ask(outside, node, nodePort, "tcp")
		if e, ok := entryOf(way, "lash_source_ranges"); !ok || !e.Decides {
			t.Errorf("%+v\n%s", e, steps(way))
		}
		ends(way, agent.OutcomeDropped, "Denied by LB src range check")
		port(7, every, nodePort, model.ProtoTCP, func(s *model.ServicePort, f *model.Frontend) {
			client := netip.MustParseAddr(outside)
			s.Ranges, f.Ranges, f.Deny = []netip.Prefix{netip.PrefixFrom(client, client.BitLen())}, true, true
		}, of(far))
		ends(ask(outside, node, nodePort, "tcp"), agent.OutcomeDropped, "Denied by LB src range check")
		vip := vipOf(v6)
		port(8, vip, 9000, model.ProtoSCTP, nil, of(far))
		met(ask(n1.podKey(n1.pods[0]), vip, 9000, "sctp"), "from_container", "service d/web, port http", far)
		met(ask(n1.name(), vip, 9000, "sctp"), "from_host", "service d/web, port http", far)
		way = ask(n1.name(), vip, 9, "tcp")
		met(way, "from_host", "", nil)
		ends(way, agent.OutcomeRefused, "no backend")
		if way = ask(n1.name(), vip, 0, "icmp"); way.Verdict.Outcome != agent.OutcomeHost || way.Verdict.Node != n1.name() {
			t.Errorf("ping: %+v\n%s", way.Verdict, steps(way))
		}
		port(9, vip, 80, model.ProtoUDP, func(_ *model.ServicePort, f *model.Frontend) { f.Outside = false }, of(near))
		met(ask(n1.podKey(n1.pods[0]), vip, 80, "udp"), "from_container", "service d/web, port http", near)
		met(ask(n1.name(), vip, 80, "udp"), "from_host", "service d/web, port http", near)
		ends(ask(outside, vip, 80, "udp"), agent.OutcomeDropped, "Is a ClusterIP")
		for _, id := range []uint32{7, 8, 9} {
			n1.do(t, "no service", func() error { return n1.dp.ServicePorts().Delete(context.Background(), id) })
		}
	}
}
