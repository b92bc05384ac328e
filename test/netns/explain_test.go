// SPDX-License-Identifier: Apache-2.0

package netns

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/lash-net/lash/api/agent"
	"github.com/lash-net/lash/internal/datapath"
	"github.com/lash-net/lash/internal/explain"
	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/state"
)

// explainers are those of a cluster's nodes. They ask each other without a network.
type explainers struct {
	c   *cluster
	all []*explain.Explainer
}

func (nd *node) name() string { return fmt.Sprintf("n%d", nd.n) }
func (nd *node) podKey(p *pod) string {
	return fmt.Sprintf("d/%s-%s", nd.name(), strings.TrimPrefix(p.name, "lxc"))
}

// newExplainers fills each node's tables as the API server would.
func newExplainers(t *testing.T, c *cluster, o options) *explainers {
	t.Helper()
	e := &explainers{c: c}
	for _, nd := range c.nodes {
		tables, err := state.New()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { tables.Stop() })
		for _, other := range c.nodes {
			row := model.Node{Name: other.name(), Addrs: []netip.Addr{other.ip4, other.ip6}, PodCIDRs: []netip.Prefix{other.cidr4(), other.cidr6()}, Routers: []netip.Addr{other.router4(), other.router6()}, Local: other == nd}
			state.Insert(tables.DB, tables.Nodes, row)
			for _, p := range other.pods {
				ns, name, _ := strings.Cut(other.podKey(p), "/")
				if other == nd {
					state.Insert(tables.DB, tables.Endpoints, model.Endpoint{ID: uint16(p.ifindex), Namespace: ns, Pod: name, IfName: p.name, Ifindex: p.ifindex, IPv4: p.ip4, IPv6: p.ip6, MAC: p.mac, NodeMAC: p.nodeMAC, Network: model.PodNetwork{RouteMTU: o.routeMTU()}, Identity: p.identity, State: model.EndpointReady})
				}
				state.Insert(tables.DB, tables.CiliumEndpoints, state.CiliumEndpoint{Namespace: ns, Name: name, Node: other.ip4, IPv4: p.ip4, IPv6: p.ip6, Identity: p.identity})
			}
		}
		e.all = append(e.all, &explain.Explainer{Tables: tables, Datapath: func() *datapath.Datapath { return nd.dp }, Sockets: func(bool) bool { return true }, Peers: e})
	}
	return e
}

// Hop implements explain.Peers.
func (e *explainers) Hop(ctx context.Context, node model.Node, hop agent.ExplainHop) (answer agent.ExplainHopAnswer, err error) {
	for i, nd := range e.c.nodes {
		if nd.name() == node.Name {
			done := make(chan struct{})
			nd.calls <- func() { defer close(done); answer, err = e.all[i].Hop(ctx, hop) }
			<-done
			return answer, err
		}
	}
	return answer, fmt.Errorf("no node %s", node.Name)
}

// explain asks a node's agent.
func (e *explainers) explain(t *testing.T, node int, req agent.ExplainRequest) agent.ExplainedWay {
	t.Helper()
	var out agent.Explanation
	e.c.nodes[node].do(t, fmt.Sprintf("explain %+v", req), func() (err error) {
		out, err = e.all[node].Explain(context.Background(), req)
		return err
	})
	if len(out.Ways) != 1 {
		t.Fatalf("explain %+v: %d ways", req, len(out.Ways))
	}
	return out.Ways[0]
}

func TestExplainAgreesNative(t *testing.T) { testExplain(t, options{podsPerNode: 3}, 1000) }
func TestExplainAgreesVXLAN(t *testing.T) {
	testExplain(t, options{podsPerNode: 3, tunnel: "vxlan"}, 1000)
}
func TestExplainAgreesLegacyHostRouting(t *testing.T) {
	testExplain(t, options{podsPerNode: 3, legacy: true}, 300)
}
func TestExplainAgreesVXLANLegacyHostRouting(t *testing.T) {
	testExplain(t, options{podsPerNode: 3, tunnel: "vxlan", legacy: true}, 300)
}
func TestExplainAgreesVXLANOverIPv6(t *testing.T) {
	testExplain(t, options{podsPerNode: 3, tunnel: "vxlan", underlay6: true}, 300)
}
func TestExplainAgreesClsact(t *testing.T) {
	testExplain(t, options{podsPerNode: 3, noTCX: true}, 300)
}

// testExplain compares what explain says with what the real packet does: for the cases of testTraffic and for random
// tuples, each as a new connection and then again as one that is known. No explanation changes any map.
func testExplain(t *testing.T, o options, n int) {
	if testing.Short() { // on an emulated machine
		n = 120
	}
	c := newCluster(t, o)
	w := watch(t, c)
	e := newExplainers(t, c, o)
	rng := rand.New(rand.NewPCG(uint64(n), 3))
	tuples := connectivity(c, o)
	for len(tuples) < n {
		tuples = append(tuples, random(c, rng))
	}
	for i := range tuples {
		tuples[i].sport = uint16(20000 + i)
	}
	count, wrong := map[string]int{}, 0
	const batch = 100
	for from := 0; from < len(tuples); from += batch {
		part := tuples[from:min(from+batch, len(tuples))]
		for _, known := range []bool{false, true} {
			said := make([]agent.ExplainedWay, len(part))
			before := hashes(t, c)
			for i, tp := range part {
				said[i] = e.explain(t, tp.from.node, tp.request(!known))
			}
			for i, after := range hashes(t, c) {
				if after != before[i] {
					t.Fatalf("explaining changed %s", after.name)
				}
			}
			for i, did := range w.send(t, part) {
				if may := c.expect(said[i], o); !slices.Contains(may, did) {
					if wrong++; wrong <= 10 {
						t.Errorf("%s, known %v:\n explain: %s\n real:    %s\n%s", part[i], known, strings.Join(may, ", or "), did, steps(said[i]))
					}
				}
				count[said[i].Verdict.Outcome]++
				if known && slices.ContainsFunc(said[i].Steps, func(s agent.ExplainStep) bool {
					return slices.Contains(s.Why, "Fast path: the record's decision holds")
				}) {
					count["fast path"]++
				}
			}
		}
	}
	t.Logf("%d tuples, each new and known: %v, %d wrong", len(tuples), count, wrong)
	for _, outcome := range []string{agent.OutcomeDelivered, agent.OutcomeHost, agent.OutcomeSent, agent.OutcomeDropped, agent.OutcomeAnswered, "fast path"} {
		if count[outcome] == 0 {
			t.Errorf("no tuple was %s: the test tests less than it says", outcome)
		}
	}
}

// expect is what must be seen of a packet of which explain says this. It is one thing, but where a packet waits for a neighbour
// that nobody is: the stack may say so, or be silent.
func (c *cluster) expect(way agent.ExplainedWay, o options) []string {
	sent := func(device, node, packet string) string {
		src, _, _ := strings.Cut(packet, " -> ")
		if ap, err := netip.ParseAddrPort(src); err == nil {
			src = ap.Addr().String()
		}
		return fmt.Sprintf("sent by %s on %s from %s", device, node, src)
	}
	switch v := way.Verdict; v.Outcome {
	case agent.OutcomeDelivered:
		return []string{"delivered to " + v.Pod}
	case agent.OutcomeHost:
		return []string{"host " + v.Node}
	case agent.OutcomeSent:
		if v.Reason == agent.ReasonNeighbour && (v.NextHop == nobody4 || v.NextHop == nobody6) {
			return []string{"nowhere", "answered"}
		}
		return []string{sent(v.Device, v.Node, v.Packet)}
	case agent.OutcomeDropped:
		if v.File != "" {
			return []string{fmt.Sprintf("dropped on %s: %s (%s:%d)", v.Node, v.Reason, v.File, v.Line)}
		}
		// By a stack, in silence: it was seen last on the wire from the node before, if there is one.
		last := len(way.Steps) - 1
		for last >= 0 && way.Steps[last].Node == v.Node {
			last--
		}
		if last < 0 {
			return []string{"nowhere"}
		}
		before, arrival := way.Steps[last].Node, way.Steps[last+1]
		if arrival.Program == "from_overlay" {
			for _, nd := range c.nodes {
				if outer := nd.ip4; nd.name() == before {
					if o.underlay6 {
						outer = nd.ip6
					}
					return []string{sent("eth0", before, outer.String())}
				}
			}
		}
		return []string{sent("eth0", before, arrival.Packet)}
	case agent.OutcomeAnswered:
		return []string{"answered"}
	default:
		return []string{v.Outcome + " " + v.Text}
	}
}

func steps(way agent.ExplainedWay) string {
	var b strings.Builder
	for _, s := range way.Steps {
		fmt.Fprintf(&b, "   %s %s %s %v: %s\n", s.Node, s.Program, s.Device, s.Why, s.Result)
	}
	fmt.Fprintf(&b, "   %s\n", way.Verdict.Text)
	return b.String()
}

// sender is who sends a tuple's packet.
type sender struct {
	node int      // whose agent is asked: the sender's, or where a packet from outside arrives
	ns   *os.File // where the packet is sent
	pod  *pod     // nil: the host, or outside
	host bool
	key  string
}

type tuple struct {
	from        sender
	src, dst    netip.Addr // src: under which the packet is sent
	proto       string
	port, sport uint16
	ttl         uint8
	spoofed     bool
}

func (tp tuple) String() string {
	return fmt.Sprintf("%s (%s) -> %s %s:%d ttl %d sport %d", tp.from.key, tp.src, tp.dst, tp.proto, tp.port, tp.ttl, tp.sport)
}

func (tp tuple) request(fresh bool) agent.ExplainRequest {
	req := agent.ExplainRequest{Src: tp.from.key, Dst: tp.dst.String(), Proto: tp.proto, Port: tp.port, SourcePort: tp.sport, TTL: tp.ttl, Fresh: fresh, Size: len(marker) + 8}
	if tp.from.pod == nil {
		req.Src, req.Node = tp.src.String(), fmt.Sprintf("n%d", tp.from.node+1)
	}
	if tp.spoofed {
		req.SourceIP = tp.src
	}
	return req
}

func (c *cluster) podSender(node int, p *pod) sender {
	return sender{node: node, ns: p.ns, pod: p, key: c.nodes[node].podKey(p)}
}

func pick[T any](rng *rand.Rand, all ...T) T { return all[rng.IntN(len(all))] }

// connectivity are the cases of testTraffic, in every protocol.
func connectivity(c *cluster, o options) (all []tuple) {
	n1, n2 := c.nodes[0], c.nodes[1]
	a, b, far := n1.pods[0], n1.pods[1], n2.pods[0]
	out4, out6 := addr(outside4), addr(outside6)
	host4, host6 := n1.ip4, n1.ip6 // as which a node speaks to pods of others
	if o.tunnel != "" {
		host4, host6 = n1.router4(), n1.router6()
	}
	for _, tc := range []struct {
		from       sender
		src4, src6 netip.Addr
		dst4, dst6 netip.Addr
	}{
		{c.podSender(0, a), a.ip4, a.ip6, b.ip4, b.ip6},
		{c.podSender(0, a), a.ip4, a.ip6, far.ip4, far.ip6},
		{c.podSender(0, a), a.ip4, a.ip6, n1.ip4, n1.ip6},
		{c.podSender(0, a), a.ip4, a.ip6, n2.ip4, n2.ip6},
		{sender{ns: n1.ns, host: true, key: "n1"}, n1.router4(), n1.router6(), b.ip4, b.ip6},
		{sender{ns: n1.ns, host: true, key: "n1"}, host4, host6, far.ip4, far.ip6},
		{c.podSender(0, b), b.ip4, b.ip6, out4, out6},
		{sender{node: 1, ns: c.outside, key: "outside"}, out4, out6, far.ip4, far.ip6},
	} {
		for _, proto := range []string{"tcp", "udp", "icmp"} {
			port := uint16(7000)
			if proto == "icmp" {
				port = 0
			}
			all = append(all, tuple{from: tc.from, src: tc.src4, dst: tc.dst4, proto: proto, port: port, ttl: 64},
				tuple{from: tc.from, src: tc.src6, dst: tc.dst6, proto: proto, port: port, ttl: 64})
		}
	}
	return all
}

// random is any of what may come along: also what should not.
func random(c *cluster, rng *rand.Rand) tuple {
	v4 := rng.IntN(2) == 0
	of := func(a, b netip.Addr) netip.Addr {
		if v4 {
			return a
		}
		return b
	}
	node := rng.IntN(2)
	nd, other := c.nodes[node], c.nodes[1-node]
	mine, theirs := pick(rng, nd.pods...), pick(rng, other.pods...)
	tp := tuple{proto: pick(rng, "tcp", "udp", "icmp"), ttl: pick[uint8](rng, 64, 64, 64, 1, 2)}
	if tp.proto != "icmp" {
		tp.port = pick(rng, 7000, 53, 4240, uint16(1+rng.IntN(65534)))
	}
	switch rng.IntN(10) {
	case 0, 1:
		tp.from, tp.src = sender{node: node, ns: c.outside, key: "outside"}, of(addr(outside4), addr(outside6))
		tp.dst = of(pick(rng, mine.ip4, nd.ip4, nd.router4(), addr("10.0.%d.99", nd.n)), pick(rng, mine.ip6, nd.ip6, nd.router6(), addr("fd00:0:0:%d::99", nd.n)))
		return tp
	case 2:
		tp.from = sender{node: node, ns: nd.ns, host: true, key: nd.name()}
		tp.src = of(pick(rng, nd.ip4, nd.router4()), pick(rng, nd.ip6, nd.router6()))
		tp.dst = of(pick(rng, mine.ip4, theirs.ip4, other.ip4, addr(outside4)), pick(rng, mine.ip6, theirs.ip6, other.ip6, addr(outside6)))
		return tp
	}
	tp.from, tp.src = c.podSender(node, mine), of(mine.ip4, mine.ip6)
	switch rng.IntN(8) {
	case 0: // nobody sends under another's address
		tp.spoofed = true
		tp.src = of(pick(rng, addr("10.0.%d.77", nd.n), theirs.ip4, nd.ip4, addr("192.0.2.9")), pick(rng, addr("fd00:0:0:%d::77", nd.n), theirs.ip6, nd.ip6, addr("2001:db8::9")))
	}
	tp.dst = of(
		pick(rng, pick(rng, nd.pods...).ip4, theirs.ip4, nd.ip4, other.ip4, nd.router4(), other.router4(), addr(outside4), addr("10.0.%d.99", nd.n), addr("10.0.%d.99", other.n), addr("10.0.9.9"), addr("192.0.2.%d", 1+rng.IntN(200)), nobody4),
		pick(rng, pick(rng, nd.pods...).ip6, theirs.ip6, nd.ip6, other.ip6, nd.router6(), other.router6(), addr(outside6), addr("fd00:0:0:%d::99", nd.n), addr("fd00:0:0:%d::99", other.n), addr("fd00:0:0:9::9"), addr("2001:db8::%x", 1+rng.IntN(200)), nobody6))
	return tp
}

// settle is how long packets that were sent may still be on their way, waiting for neighbours included.
const settle = 500 * time.Millisecond

// Addresses of the nodes' network that nobody answers for.
var nobody4, nobody6 = addr("172.18.0.99"), addr("fd18::99")
