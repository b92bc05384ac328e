// SPDX-License-Identifier: Apache-2.0

package explain

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"

	"github.com/lash-net/lash/api/agent"
	"github.com/lash-net/lash/internal/datapath"
	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/state"
	"github.com/lash-net/lash/internal/testutil"
)

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

// testTables are those of node n1 of two.
func testTables(t *testing.T) *state.Tables {
	t.Helper()
	tables, err := state.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tables.Stop() })
	state.Insert(tables.DB, tables.Nodes,
		model.Node{Name: "n1", Local: true, Addrs: []netip.Addr{addr("172.18.0.11"), addr("fd18::11")}, Routers: []netip.Addr{addr("10.0.1.1")}, PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.0.1.0/24")}},
		model.Node{Name: "n2", Addrs: []netip.Addr{addr("172.18.0.12"), addr("fd18::12")}, Health: []netip.Addr{addr("10.0.2.9")}, PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.0.2.0/24")}})
	state.Insert(tables.DB, tables.Endpoints,
		model.Endpoint{ID: 1, Namespace: "d", Pod: "a", Ifindex: 7, IPv4: addr("10.0.1.5"), IPv6: addr("fd00:1::5"), State: model.EndpointReady},
		model.Endpoint{ID: 2, Namespace: "d", Pod: "old", Ifindex: 8, IPv4: addr("10.0.1.6"), State: model.EndpointDisconnected})
	state.Insert(tables.DB, tables.CiliumEndpoints,
		state.CiliumEndpoint{Namespace: "d", Name: "far", Node: addr("172.18.0.12"), IPv4: addr("10.0.2.5")},
		state.CiliumEndpoint{Namespace: "d", Name: "lost", Node: addr("172.18.0.99"), IPv4: addr("10.0.9.5")})
	state.Insert(tables.DB, tables.Pods, state.Pod{Namespace: "d", Name: "hostpod", HostNetwork: true}, state.Pod{Namespace: "d", Name: "early", Phase: "Pending"})
	port := func(name string, proto uint8, port uint16) state.ServicePortSpec {
		return state.ServicePortSpec{Name: name, L4: model.L4{Proto: proto, Port: port}}
	}
	state.Insert(tables.DB, tables.Services,
		state.Service{Namespace: "d", Name: "web", ClusterIPs: []netip.Addr{addr("10.96.0.5")}, Ports: []state.ServicePortSpec{port("http", model.ProtoTCP, 80)}},
		state.Service{Namespace: "d", Name: "dns", ClusterIPs: []netip.Addr{addr("10.96.0.10")}, Ports: []state.ServicePortSpec{port("u", model.ProtoUDP, 53), port("t", model.ProtoTCP, 53)}},
		state.Service{Namespace: "d", Name: "headless", Ports: []state.ServicePortSpec{port("p", model.ProtoTCP, 1)}},
		state.Service{Namespace: "d", Name: "empty"})
	state.Insert(tables.DB, tables.Slices, state.EndpointSlice{Namespace: "d", Name: "headless-1", Service: "headless", Endpoints: []state.SliceEndpoint{{Addr: addr("10.0.2.5")}, {Addr: addr("10.0.1.5")}}})
	return tables
}

func TestNamesAreFound(t *testing.T) {
	n := namesOf(testTables(t))
	for name, want := range map[string]struct {
		kind, node string
		addr       string
	}{
		"d/a":                   {agent.FromPod, "n1", "10.0.1.5"},
		"pod/d/far":             {agent.FromPod, "n2", "10.0.2.5"},
		"d/lost":                {agent.FromPod, "", "10.0.9.5"},
		"d/hostpod":             {agent.FromHost, "n1", "172.18.0.11"},
		"n2":                    {agent.FromHost, "n2", "172.18.0.12"},
		"node/n1":               {agent.FromHost, "n1", "172.18.0.11"},
		"svc/d/web":             {"service", "", "10.96.0.5"},
		"web.d.svc":             {"service", "", "10.96.0.5"},
		"web.d.svc.cluster.net": {"service", "", "10.96.0.5"},
		"10.0.2.5":              {agent.FromPod, "n2", "10.0.2.5"},
		"10.0.1.5":              {agent.FromPod, "n1", "10.0.1.5"},
		"10.0.1.1":              {agent.FromHost, "n1", "10.0.1.1"},
		"10.0.2.9":              {agent.FromPod, "n2", "10.0.2.9"},
		"10.0.2.77":             {"address", "n2", "10.0.2.77"},
		"::ffff:192.0.2.1":      {"address", "", "192.0.2.1"},
		"[fd18::12]":            {agent.FromHost, "n2", "fd18::12"},
	} {
		p, err := n.resolve(name)
		if err != nil || p.kind != want.kind || p.node != want.node || p.addrs[0] != addr(want.addr) {
			t.Errorf("%s: %+v, %v; want %+v", name, p, err, want)
		}
	}
	for name, want := range map[string]string{
		"d/nobody": "no such pod", "d/old": "no such pod", "d/early": "phase Pending", "n9": "'lash node list'", "svc/d/nothing": "there is none",
		"svc/d/empty": "no cluster IP and no endpoint", "a/b/c": "begins with pod/",
	} {
		if _, err := n.resolve(name); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", name, err, want)
		}
	}
}

func TestEndsAreNamed(t *testing.T) {
	tables := testTables(t)
	state.Insert(tables.DB, tables.Services, state.Service{Namespace: "d", Name: "front", ClusterIPs: []netip.Addr{addr("10.96.0.7")},
		ExternalIPs: []netip.Addr{addr("198.18.0.7")}, LoadBalancerIPs: []netip.Addr{addr("198.18.0.8")}})
	n := namesOf(tables)
	for a, want := range map[string]string{
		"10.96.0.7": "service d/front", "198.18.0.7": "service d/front", "198.18.0.8": "service d/front", "198.18.0.9": "",
		"10.0.2.5": "pod d/far", "10.0.1.1": "router address of node n1", "10.0.2.77": "no pod, in the pod CIDR of node n2",
	} {
		if e := n.end(addr(a)); e.Object != want {
			t.Errorf("%s is %q, want %q", a, e.Object, want)
		}
	}
}

func TestWhatIsLeftOutIsCompleted(t *testing.T) {
	n := namesOf(testTables(t))
	for _, tc := range []struct {
		req   agent.ExplainRequest
		proto string
		port  uint16
		err   string
	}{
		{agent.ExplainRequest{Dst: "d/a"}, icmp, 0, ""},
		{agent.ExplainRequest{Dst: "d/a", Port: 80}, tcp, 80, ""},
		{agent.ExplainRequest{Dst: "svc/d/web"}, tcp, 80, ""},
		{agent.ExplainRequest{Dst: "svc/d/web", Proto: icmp}, icmp, 0, ""},
		{agent.ExplainRequest{Dst: "svc/d/dns", Proto: "UDP"}, udp, 53, ""},
		{agent.ExplainRequest{Dst: "svc/d/dns"}, "", 0, "has the ports 53/udp, 53/tcp"},
		{agent.ExplainRequest{Dst: "d/a", Proto: "gre"}, "", 0, "must be tcp"},
		{agent.ExplainRequest{Dst: "d/a", Proto: tcp}, "", 0, "needs a port"},
		{agent.ExplainRequest{Dst: "d/a", Proto: icmp, Port: 1}, "", 0, "has no port"},
		{agent.ExplainRequest{Dst: "d/a", Family: 5}, "", 0, "must be 4 or 6"},
		{agent.ExplainRequest{Dst: "d/a", Size: 1 << 20}, "", 0, "must be 0 to"},
	} {
		dst, err := n.resolve(tc.req.Dst)
		if err != nil {
			t.Fatal(err)
		}
		req := tc.req
		err = complete(&req, dst)
		if tc.err != "" {
			if err == nil || !strings.Contains(err.Error(), tc.err) {
				t.Errorf("%+v: %v, want %q", tc.req, err, tc.err)
			}
			continue
		}
		if err != nil || req.Proto != tc.proto || req.Port != tc.port || req.TTL != 64 || req.SourcePort < 49152 || !req.Fresh {
			t.Errorf("%+v: %+v, %v", tc.req, req, err)
		}
	}
	known := agent.ExplainRequest{SourcePort: 5}
	if err := complete(&known, party{}); err != nil || known.Fresh {
		t.Errorf("a given source port means the connection that is known: %+v, %v", known, err)
	}
}

func TestWayBeginsWhereTheSenderIs(t *testing.T) {
	n := namesOf(testTables(t))
	for _, tc := range []struct{ src, dst, from, node, err string }{
		{"d/a", "d/far", agent.FromPod, "n1", ""},
		{"d/far", "d/a", agent.FromPod, "n2", ""},
		{"n2", "d/a", agent.FromHost, "n2", ""},
		{"192.0.2.1", "d/a", agent.FromNetwork, "n1", ""},
		{"192.0.2.1", "10.0.2.77", agent.FromNetwork, "n2", ""},
		{"192.0.2.1", "192.0.2.2", "", "", "--at"},
		{"d/lost", "d/a", "", "", "on a node that this agent does not know"},
		{"d/a", "2001:db8::1", agent.FromPod, "n1", ""},
		{"d/far", "2001:db8::1", "", "", "no address family in common"},
	} {
		src, err := n.resolve(tc.src)
		if err != nil {
			t.Fatal(err)
		}
		dst, err := n.resolve(tc.dst)
		if err != nil {
			t.Fatal(err)
		}
		hop, node, err := n.first(agent.ExplainRequest{Proto: icmp, TTL: 64}, src, dst)
		if tc.err != "" {
			if err == nil || !strings.Contains(err.Error(), tc.err) {
				t.Errorf("%s -> %s: %v, want %q", tc.src, tc.dst, err, tc.err)
			}
			continue
		}
		if err != nil || hop.From != tc.from || node != tc.node {
			t.Errorf("%s -> %s: from %s at %s, %v", tc.src, tc.dst, hop.From, node, err)
		}
	}
}

// Who it is that sent a spoofed packet, its device says.
func TestEventsDeviceNamesTheSender(t *testing.T) {
	n := namesOf(testTables(t))
	req := agent.ExplainRequest{Device: "7"}
	p := n.seenAt(&req, party{kind: "address", addrs: []netip.Addr{addr("10.0.1.77")}})
	if p.kind != agent.FromPod || p.node != "n1" || req.SourceIP != addr("10.0.1.77") {
		t.Errorf("%+v, %+v", p, req)
	}
	req = agent.ExplainRequest{Device: "99"}
	if p := n.seenAt(&req, party{kind: "address"}); p.kind != "address" || req.SourceIP.IsValid() {
		t.Errorf("%+v, %+v", p, req)
	}
}

type deafPeers struct{}

func (deafPeers) Hop(context.Context, model.Node, agent.ExplainHop) (agent.ExplainHopAnswer, error) {
	return agent.ExplainHopAnswer{}, errors.New("connection refused")
}

func TestAgentsThatCannotAnswerAreNamed(t *testing.T) {
	e := &Explainer{Tables: testTables(t), Datapath: func() *datapath.Datapath { return nil }, Peers: deafPeers{}}
	if _, err := e.Explain(t.Context(), agent.ExplainRequest{Src: "d/a", Dst: "d/far"}); err == nil || !strings.Contains(err.Error(), "not loaded yet") {
		t.Errorf("without a datapath: %v", err)
	}
	if _, err := e.Explain(t.Context(), agent.ExplainRequest{Src: "d/far", Dst: "d/a"}); err == nil || !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("with a deaf first node: %v", err)
	}
}

func TestOnlyNodesMayAsk(t *testing.T) {
	n := namesOf(testTables(t))
	for remote, want := range map[string]string{
		"172.18.0.12:1023": "", "[fd18::12]:600": "", "[::ffff:172.18.0.12]:600": "",
		"172.18.0.12:1024": "below 1024",         // a masqueraded pod
		"10.0.2.5:1000":    "no node of the",     // root in a pod
		"192.0.2.1:1000":   "no node of the",     // a stranger
		"nonsense":         "missing port in ad", // no address at all
	} {
		err := n.mayAsk(remote)
		if (want == "") != (err == nil) || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", remote, err, want)
		}
	}
}

// An agent's question comes from a privileged port, also while others hold some.
func TestAgentsAskFromPrivilegedPorts(t *testing.T) {
	ns := testutil.Netns(t)
	testutil.In(t, ns, "ip", "link", "set", "lo", "up")
	tables := testTables(t)
	state.Insert(tables.DB, tables.Nodes, model.Node{Name: "self", Addrs: []netip.Addr{addr("127.0.0.1")}})
	e := &Explainer{Tables: tables, Datapath: func() *datapath.Datapath { return nil }}
	testutil.Inside(t, ns, func() {
		taken, err := net.Listen("tcp", "0.0.0.0:1023")
		if err != nil {
			t.Error(err)
			return
		}
		defer taken.Close()
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Error(err)
			return
		}
		srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path != PathHop {
				http.NotFound(w, r)
				return
			}
			e.ServeHTTP(w, r)
		})}
		go srv.Serve(l)
		defer srv.Close()
		at := l.Addr().(*net.TCPAddr)
		// The socket must be made on this thread: dial as Remote does, and speak over it.
		c, err := dialPrivileged(t.Context(), "tcp", at.String())
		if err != nil {
			t.Error(err)
			return
		}
		defer c.Close()
		if p := c.LocalAddr().(*net.TCPAddr).Port; p >= privileged || p == 1023 {
			t.Errorf("asks from port %d", p)
		}
	})
	// What the answer to a node is, by the handler itself.
	for remote, code := range map[string]int{"127.0.0.1:1000": http.StatusUnprocessableEntity, "127.0.0.1:40000": http.StatusForbidden} {
		w, r := httptest.NewRecorder(), httptest.NewRequest(http.MethodPost, PathHop, strings.NewReader(`{"from":"pod"}`))
		r.RemoteAddr = remote
		e.ServeHTTP(w, r)
		var said agent.Error
		if err := json.Unmarshal(w.Body.Bytes(), &said); err != nil || w.Code != code || said.Error == "" {
			t.Errorf("from %s: %d %s", remote, w.Code, w.Body)
		}
	}
}

func TestFramesAreWhatWasAskedFor(t *testing.T) {
	for _, p := range []agent.ExplainPacket{
		{Src: addr("10.0.1.5"), Dst: addr("10.0.2.7"), Proto: tcp, SourcePort: 40000, Port: 80, TTL: 7},
		{Src: addr("fd00::1"), Dst: addr("fd00::2"), Proto: udp, SourcePort: 40000, Port: 53, TTL: 64, Size: 100},
		{Src: addr("10.0.1.5"), Dst: addr("10.0.2.7"), Proto: icmp, SourcePort: 9, TTL: 64},
		{Src: addr("fd00::1"), Dst: addr("fd00::2"), Proto: icmp, SourcePort: 9, TTL: 64},
		{Src: addr("10.0.1.5"), Dst: addr("10.0.2.7"), Proto: sctp, SourcePort: 5, Port: 6, TTL: 64},
	} {
		frame, err := build(p, model.MAC{2}, model.MAC{4}, true)
		if err != nil {
			t.Fatal(err)
		}
		h, err := parse(frame)
		if err != nil {
			t.Errorf("%+v: %v", p, err)
			continue
		}
		if h.src != netip.AddrPortFrom(p.Src, p.SourcePort) || h.dst != netip.AddrPortFrom(p.Dst, p.Port) || h.ttl != p.TTL || h.name != p.Proto || h.smac != (model.MAC{2}) || h.dmac != (model.MAC{4}) {
			t.Errorf("%+v became %+v", p, h)
		}
		after, err := parse(forwarded(frame))
		if err != nil || after.ttl != p.TTL-1 {
			t.Errorf("forwarded: TTL %d, %v", after.ttl, err)
		}
		if got := strings.Join(changes(h, after), ";"); !strings.HasPrefix(got, "TTL ") || strings.Contains(got, ";") {
			t.Errorf("changes are %q", got)
		}
		if p.Src.Is4() && checksum(forwarded(frame)[ethLen:ethLen+20]) != 0xffff {
			t.Error("the forwarded header's checksum is wrong")
		}
	}
	if _, err := build(agent.ExplainPacket{Src: addr("10.0.1.5"), Dst: addr("fd00::1"), Proto: icmp}, model.MAC{}, model.MAC{}, true); err == nil {
		t.Error("two families in one packet")
	}
}

func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i < len(b); i += 2 {
		sum += uint32(b[i])<<8 | uint32(b[i+1])
	}
	return uint16(sum + sum>>16)
}
