// SPDX-License-Identifier: Apache-2.0

package packet

import (
	"net/netip"
	"testing"

	"github.com/lash-net/lash/bpf"
)

// A service port of the tests: its number, and where its backends are.
type servicePort struct {
	id       uint32
	backends []netip.AddrPort // local ones first
	local    uint32
	flags    uint32
	affinity uint32
	ranges   []netip.Prefix
}

// Addresses of services, and ports on the node.
const (
	portVIP    = 80
	portNode   = 30080
	portTarget = 8080
)

func vip(f family) netip.Addr {
	if f.v6 {
		return addr("fd00:96::10")
	}
	return addr("10.96.0.10")
}

func unspecified(f family) netip.Addr {
	if f.v6 {
		return netip.IPv6Unspecified()
	}
	return netip.IPv4Unspecified()
}

func proto(l4 string) uint8 {
	switch l4 {
	case "tcp":
		return protoTCP
	case "udp":
		return protoUDP
	case "sctp":
		return protoSCTP
	}
	return 0
}

// serve writes a service with the VIP's port and the NodePort as frontends, for TCP, UDP and SCTP.
func serve(f family, s servicePort) func(*testing.T, *programs) {
	return func(t *testing.T, p *programs) { s.put(t, p, f) }
}

func (s servicePort) put(t testing.TB, p *programs, f family) {
	put := func(m string, k, v any) {
		t.Helper()
		if err := p.dp.Map(m).Put(k, v); err != nil {
			t.Fatalf("%s: %v", m, err)
		}
	}
	p.unserve(t)
	p.serving = true
	put("lash_endpoints", bpf.AddrFrom(f.node), bpf.Endpoint{Identity: bpf.IdentityHost, Flags: bpf.EndpointHost | bpf.EndpointNodePort})
	row := bpf.Service{ID: s.id, Count: uint32(len(s.backends)), First: 1, Local: s.local, Flags: s.flags, Affinity: s.affinity}
	for i, b := range s.backends {
		put("lash_backends", bpf.BackendKey{Service: s.id, Slot: uint32(i + 1)}, bpf.Backend{Addr: bpf.AddrFrom(b.Addr()), Port: bpf.ToBE16(b.Port())})
		put("lash_members", bpf.MemberKey{Service: s.id, Addr: bpf.AddrFrom(b.Addr()), Port: bpf.ToBE16(b.Port())}, uint32(bpf.MemberActive))
	}
	for _, r := range s.ranges {
		put("lash_source_ranges", bpf.SourceRangeKey{Prefixlen: 32 + bpf.IPCacheKeyFrom(r).Prefixlen, Service: s.id, Addr: bpf.AddrFrom(r.Addr())}, uint32(1))
	}
	for _, l4 := range []string{"tcp", "udp", "sctp"} {
		put("lash_services", bpf.ServiceKey{Addr: bpf.AddrFrom(vip(f)), Port: bpf.ToBE16(portVIP), Proto: proto(l4)}, row)
		put("lash_services", bpf.ServiceKey{Addr: bpf.AddrFrom(unspecified(f)), Port: bpf.ToBE16(portNode), Proto: proto(l4)}, row)
	}
	put("lash_services", bpf.ServiceKey{Addr: bpf.AddrFrom(vip(f))}, bpf.Service{Flags: bpf.FrontendAddress | s.flags&bpf.FrontendOutside})
	put("lash_ports", uint32(portNode), uint8(bpf.PortFrontend|bpf.PortNode))
	put("lash_ports", uint32(portVIP), uint8(bpf.PortFrontend))
	put("lash_ports", uint32(portTarget), uint8(bpf.PortBackend))
	put("lash_ports", uint32(0), uint8(bpf.PortBackend))
}

// unserve takes all services away.
func (p *programs) unserve(t testing.TB) {
	t.Helper()
	if !p.serving {
		return
	}
	p.serving = false
	p.clear(t, "lash_services", "lash_backends", "lash_members", "lash_affinity", "lash_source_ranges")
	for _, port := range []uint32{0, portVIP, portNode, portTarget} {
		if err := p.dp.Map("lash_ports").Put(port, uint8(0)); err != nil {
			t.Fatal(err)
		}
	}
}

// clear empties maps.
func (p *programs) clear(t testing.TB, maps ...string) {
	t.Helper()
	for _, name := range maps {
		m := p.dp.Map(name)
		var keys [][]byte
		for k, err := m.NextKeyBytes(nil); k != nil; k, err = m.NextKeyBytes(k) {
			if err != nil {
				t.Fatal(err)
			}
			keys = append(keys, k)
		}
		for _, k := range keys {
			if err := m.Delete(k); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// ends wants the packet to go from one address and port to another. Port 0 of a source: any masquerading port.
func ends(src netip.Addr, sport uint16, dst netip.Addr, dport uint16) func(*testing.T, []byte, []byte) {
	return func(t *testing.T, _, out []byte) {
		t.Helper()
		h := read(out)
		if h.src != src || h.dst != dst {
			t.Errorf("from %s to %s, want from %s to %s", h.src, h.dst, src, dst)
		}
		if h.later {
			return
		}
		if sport == 0 && h.proto != protoICMP && h.proto != protoICMPv6 && (h.sport < 30000 || h.sport > 39999) || sport != 0 && h.sport != sport {
			t.Errorf("source port %d, want %d", h.sport, sport)
		}
		if h.dport != dport {
			t.Errorf("destination port %d, want %d", h.dport, dport)
		}
	}
}

func at(a netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(a, port) }

func TestServicesFromPods(t *testing.T) {
	var tests []test
	for _, l4 := range []string{"tcp", "udp"} {
		syn := ""
		if l4 == "tcp" {
			syn = "S"
		}
		tests = append(tests,
			test{name: l4 + " to a backend on the node", steps: func(f family) []step {
				p := packet{src: f.a, dst: vip(f), l4: l4, sport: 1000, dport: portVIP, flags: syn}
				return []step{
					{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.b, portTarget)}})},
					{at: fromA, pkt: p, want: peer(ifB, bpf.SlowNew), check: ends(f.a, 1000, f.b, portTarget)},
					{at: fromB, reply: true, want: peer(ifA, bpf.SlowNot), check: ends(vip(f), portVIP, f.a, 1000)},
					{at: fromA, pkt: p, want: peer(ifB, bpf.SlowNot), check: ends(f.a, 1000, f.b, portTarget)},
					{do: raise},
					{at: fromB, pkt: packet{src: f.b, dst: f.a, l4: l4, sport: portTarget, dport: 1000, flags: "A"}, want: peer(ifA, bpf.SlowEpoch), check: ends(vip(f), portVIP, f.a, 1000)},
					{at: fromA, pkt: p, want: peer(ifB, bpf.SlowNot), check: ends(f.a, 1000, f.b, portTarget)},
				}
			}},
			test{name: l4 + " to a backend elsewhere", steps: func(f family) []step {
				p := packet{src: f.a, dst: vip(f), l4: l4, sport: 1000, dport: portVIP, flags: syn}
				return []step{
					{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.far, portTarget)}})},
					{at: fromA, pkt: p, want: egress(bpf.SlowNew), check: ends(f.a, 1000, f.far, portTarget)},
					{at: netdev, reply: true, want: peer(ifA, bpf.SlowNot), check: ends(vip(f), portVIP, f.a, 1000)},
					{at: fromA, pkt: p, want: egress(bpf.SlowNot), check: ends(f.a, 1000, f.far, portTarget)},
				}
			}},
			test{name: l4 + " to a backend outside of the cluster", steps: func(f family) []step {
				p := packet{src: f.a, dst: vip(f), l4: l4, sport: 1000, dport: portVIP, flags: syn}
				return []step{
					{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.outside, portTarget)}})},
					{at: fromA, pkt: p, want: egress(bpf.SlowNew), check: ends(f.node, 0, f.outside, portTarget)},
					{at: netdev, reply: true, want: peer(ifA, bpf.SlowNot), check: ends(vip(f), portVIP, f.a, 1000)},
					{at: fromA, pkt: p, want: egress(bpf.SlowNot), check: ends(f.node, 0, f.outside, portTarget)},
				}
			}},
			test{name: l4 + " by the tunnel", config: "tunnel", steps: func(f family) []step {
				p := packet{src: f.a, dst: vip(f), l4: l4, sport: 1000, dport: portVIP, flags: syn}
				return []step{
					{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.far, portTarget)}})},
					{at: fromA, pkt: p, want: tunnel(bpf.SlowNew), check: ends(f.a, 1000, f.far, portTarget)},
					{at: fromA, pkt: p, want: tunnel(bpf.SlowNot), check: ends(f.a, 1000, f.far, portTarget)},
				}
			}},
			test{name: l4 + " to a backend on the node, legacy", config: "legacy", steps: func(f family) []step {
				p := packet{src: f.a, dst: vip(f), l4: l4, sport: 1000, dport: portVIP, flags: syn}
				return []step{
					{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.far, portTarget)}})},
					{at: fromA, pkt: p, want: egress(bpf.SlowNew), check: ends(f.a, 1000, f.far, portTarget)},
					{at: netdev, reply: true, want: peer(ifA, bpf.SlowNot), check: ends(vip(f), portVIP, f.a, 1000)},
				}
			}},
			test{name: l4 + " to itself", steps: func(f family) []step {
				p := packet{src: f.a, dst: vip(f), l4: l4, sport: 1000, dport: portVIP, flags: syn}
				return []step{
					{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.a, portTarget)}})},
					{at: fromA, pkt: p, want: peer(ifA, bpf.SlowNew), check: ends(f.router, 0, f.a, portTarget)},
					{at: fromA, reply: true, want: peer(ifA, bpf.SlowNot), check: ends(vip(f), portVIP, f.a, 1000)},
				}
			}},
			test{name: l4 + " to the node as backend", steps: func(f family) []step {
				p := packet{src: f.a, dst: vip(f), l4: l4, sport: 1000, dport: portVIP, flags: syn}
				return []step{
					{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.node, portTarget)}})},
					{at: fromA, pkt: p, want: host(bpf.SlowNew), check: ends(f.a, 1000, f.node, portTarget)},
					{at: local, reply: true, want: peer(ifA, bpf.SlowNot), check: ends(vip(f), portVIP, f.a, 1000)},
				}
			}},
			test{name: l4 + " without backends", steps: func(f family) []step {
				p := packet{src: f.a, dst: vip(f), l4: l4, sport: 1000, dport: portVIP, flags: syn}
				return []step{
					{do: serve(f, servicePort{id: 1})},
					{at: fromA, pkt: p, want: host(bpf.SlowNew), check: ends(f.a, 1000, f.router, 0)},
					{at: local, pkt: packet{src: f.router, dst: f.a, l4: l4, sport: 0, dport: 1000, flags: "RA"}, want: peer(ifA, bpf.SlowNot), check: ends(vip(f), portVIP, f.a, 1000)},
				}
			}},
		)
	}
	tests = append(tests,
		test{name: "without backends, configured to drop", config: "drop", steps: func(f family) []step {
			return []step{
				{do: serve(f, servicePort{id: 1})},
				{at: fromA, pkt: packet{src: f.a, dst: vip(f), l4: "tcp", sport: 1000, dport: portVIP, flags: "S"}, want: dropped(bpf.DropNoService)},
				{at: fromA, pkt: packet{src: f.a, dst: vip(f), l4: "echo", sport: 1}, want: host(bpf.SlowNew)},
			}
		}},
		test{name: "without backends, and no address to refuse from", config: "without routers", steps: func(f family) []step {
			return []step{
				{do: serve(f, servicePort{id: 1})},
				{at: fromA, pkt: packet{src: f.a, dst: vip(f), l4: "tcp", sport: 1000, dport: portVIP, flags: "S"}, want: dropped(bpf.DropNoService)},
			}
		}},
		test{name: "kube-proxy serves them", config: "kube-proxy", steps: func(f family) []step {
			return []step{
				{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.b, portTarget)}, flags: bpf.FrontendOutside})},
				{at: fromA, pkt: packet{src: f.a, dst: vip(f), l4: "tcp", sport: 1000, dport: portVIP, flags: "S"}, want: egress(bpf.SlowNew)},
				{at: netdev, pkt: packet{src: f.outside, dst: f.node, l4: "tcp", sport: 1000, dport: portNode, flags: "S"}, want: pass()},
			}
		}},
		test{name: "a port that nobody serves", steps: func(f family) []step {
			return []step{
				{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.b, portTarget)}})},
				{at: fromA, pkt: packet{src: f.a, dst: vip(f), l4: "tcp", sport: 1000, dport: 81, flags: "S"}, want: host(bpf.SlowNew), check: ends(f.a, 1000, f.router, 0)},
			}
		}},
		test{name: "ping", steps: func(f family) []step {
			return []step{
				{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.b, portTarget)}})},
				{at: fromA, pkt: packet{src: f.a, dst: vip(f), l4: "echo", sport: 77}, want: host(bpf.SlowNew), check: ends(f.a, 77, f.router, 0)},
				{at: local, reply: true, want: peer(ifA, bpf.SlowNot), check: ends(vip(f), 0, f.a, 77)},
			}
		}},
		test{name: "a connection that nobody knows is reset", steps: func(f family) []step {
			return []step{
				{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.b, portTarget)}})},
				{at: fromA, pkt: packet{src: f.a, dst: vip(f), l4: "tcp", sport: 1000, dport: portVIP, flags: "A"}, want: host(bpf.SlowNew), check: ends(f.a, 1000, f.router, 0)},
			}
		}},
		test{name: "the same ports towards the service and its backend", steps: func(f family) []step {
			return []step{
				{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.b, portTarget)}})},
				{at: fromA, pkt: packet{src: f.a, dst: f.b, l4: "udp", sport: 1000, dport: portTarget}, want: peer(ifB, bpf.SlowNew)},
				{at: fromA, pkt: packet{src: f.a, dst: vip(f), l4: "udp", sport: 1000, dport: portVIP}, want: peer(ifB, bpf.SlowNew), check: ends(f.a, 0, f.b, portTarget)},
				{at: fromB, reply: true, want: peer(ifA, bpf.SlowNot), check: ends(vip(f), portVIP, f.a, 1000)},
				{at: fromB, pkt: packet{src: f.b, dst: f.a, l4: "udp", sport: portTarget, dport: 1000}, want: peer(ifA, bpf.SlowNot), check: ends(f.b, portTarget, f.a, 1000)},
			}
		}},
		test{name: "the ports of a connection to the backend that is closed", steps: func(f family) []step {
			direct := func(flags string) packet {
				return packet{src: f.a, dst: f.b, l4: "tcp", sport: 1000, dport: portTarget, flags: flags}
			}
			return []step{
				{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.b, portTarget)}})},
				{at: fromA, pkt: direct("S"), want: peer(ifB, bpf.SlowNew)},
				{at: fromA, pkt: direct("R"), want: peer(ifB, bpf.SlowNot)},
				// What comes back must lead to the service's connection, not to what is left of the other.
				{at: fromA, pkt: packet{src: f.a, dst: vip(f), l4: "tcp", sport: 1000, dport: portVIP, flags: "S"}, want: peer(ifB, bpf.SlowNew), check: ends(f.a, 0, f.b, portTarget)},
				{at: fromB, reply: true, want: peer(ifA, bpf.SlowNot), check: ends(vip(f), portVIP, f.a, 1000)},
			}
		}},
		test{name: "the ports of a connection to the backend that has expired", steps: func(f family) []step {
			return []step{
				{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.b, portTarget)}})},
				{at: fromA, pkt: packet{src: f.a, dst: f.b, l4: "udp", sport: 1000, dport: portTarget}, want: peer(ifB, bpf.SlowNew)},
				{do: expire},
				{at: fromA, pkt: packet{src: f.a, dst: vip(f), l4: "udp", sport: 1000, dport: portVIP}, want: peer(ifB, bpf.SlowNew), check: ends(f.a, 1000, f.b, portTarget)},
				{at: fromB, reply: true, want: peer(ifA, bpf.SlowNot), check: ends(vip(f), portVIP, f.a, 1000)},
			}
		}},
		test{name: "closed and opened again it may get another backend", steps: func(f family) []step {
			tcp := func(flags string) packet {
				return packet{src: f.a, dst: vip(f), l4: "tcp", sport: 1000, dport: portVIP, flags: flags}
			}
			return []step{
				{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.b, portTarget)}})},
				{at: fromA, pkt: tcp("S"), want: peer(ifB, bpf.SlowNew)},
				{at: fromA, pkt: tcp("R"), want: peer(ifB, bpf.SlowNot)},
				{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.far, portTarget)}})},
				{at: fromA, pkt: tcp("S"), want: egress(bpf.SlowReopened), check: ends(f.a, 1000, f.far, portTarget)},
				{do: func(t *testing.T, p *programs) {
					if n := p.rows(t, "lash_nat"); n != 1 {
						t.Errorf("%d translations, want the new one", n)
					}
				}},
			}
		}},
		test{name: "error of a backend", steps: func(f family) []step {
			return []step{
				{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.b, portTarget)}})},
				{at: fromA, pkt: packet{src: f.a, dst: vip(f), l4: "udp", sport: 1000, dport: portVIP}, want: peer(ifB, bpf.SlowNew)},
				{at: fromB, pkt: packet{src: f.b, dst: f.a, l4: "error", quoted: frame(packet{src: f.a, dst: f.b, l4: "udp", sport: 1000, dport: portTarget})},
					want: peer(ifA, bpf.SlowICMPError), check: quotes(vip(f), f.a, 1000, vip(f), portVIP)},
			}
		}},
	)
	runTests(t, tests)
}

func TestServicesFromOutside(t *testing.T) {
	var tests []test
	for _, l4 := range []string{"tcp", "udp"} {
		syn := ""
		if l4 == "tcp" {
			syn = "S"
		}
		for _, config := range []string{"bpf", "legacy"} {
			name := func(s string) string { return l4 + " " + s + ", " + config }
			tests = append(tests,
				test{name: name("to a backend on the node"), config: config, steps: func(f family) []step {
					p := packet{src: f.outside, dst: f.node, l4: l4, sport: 1000, dport: portNode, flags: syn}
					return []step{
						{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.b, portTarget)}, flags: bpf.FrontendOutside})},
						{at: netdev, pkt: p, want: peer(ifB, bpf.SlowNew), check: ends(f.outside, 1000, f.b, portTarget)},
						{at: fromB, reply: true, want: egress(bpf.SlowNot), check: ends(f.node, portNode, f.outside, 1000)},
						{at: netdev, pkt: p, want: peer(ifB, bpf.SlowNot), check: ends(f.outside, 1000, f.b, portTarget)},
						{do: raise},
						{at: fromB, pkt: packet{src: f.b, dst: f.outside, l4: l4, sport: portTarget, dport: 1000, flags: "A"}, want: egress(bpf.SlowEpoch), check: ends(f.node, portNode, f.outside, 1000)},
						{at: netdev, pkt: p, want: peer(ifB, bpf.SlowNot), check: ends(f.outside, 1000, f.b, portTarget)},
					}
				}},
				test{name: name("to a backend elsewhere"), config: config, steps: func(f family) []step {
					p := packet{src: f.outside, dst: f.node, l4: l4, sport: 1000, dport: portNode, flags: syn}
					return []step{
						{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.far, portTarget)}, flags: bpf.FrontendOutside})},
						{at: netdev, pkt: p, want: egress(bpf.SlowNew), check: ends(f.node, 0, f.far, portTarget)},
						{at: netdev, reply: true, want: neighbour(bpf.SlowUndecided), check: ends(f.node, portNode, f.outside, 1000)},
						{at: netdev, pkt: p, want: egress(bpf.SlowNot), check: ends(f.node, 0, f.far, portTarget)},
					}
				}},
				test{name: name("to the node as backend"), config: config, steps: func(f family) []step {
					p := packet{src: f.outside, dst: f.node, l4: l4, sport: 1000, dport: portNode, flags: syn}
					return []step{
						{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.node, portTarget)}, flags: bpf.FrontendOutside})},
						{at: netdev, pkt: p, want: pass(bpf.SlowNew), check: ends(f.outside, 1000, f.node, portTarget)},
						{at: leaving, reply: true, want: pass(bpf.SlowNot), check: ends(f.node, portNode, f.outside, 1000)},
						{at: netdev, pkt: p, want: pass(bpf.SlowNot), check: ends(f.outside, 1000, f.node, portTarget)},
					}
				}},
				test{name: name("without backends"), config: config, steps: func(f family) []step {
					p := packet{src: f.outside, dst: f.node, l4: l4, sport: 1000, dport: portNode, flags: syn}
					return []step{
						{do: serve(f, servicePort{id: 1, flags: bpf.FrontendOutside})},
						{at: netdev, pkt: p, want: pass(bpf.SlowRefused), check: ends(f.outside, 1000, f.router, 0)},
						{at: leaving, pkt: packet{src: f.router, dst: f.outside, l4: l4, sport: 0, dport: 1000, flags: "RA"}, want: pass(bpf.SlowNot), check: ends(f.node, portNode, f.outside, 1000)},
					}
				}},
			)
		}
		tests = append(tests,
			test{name: l4 + " by the tunnel", config: "tunnel", steps: func(f family) []step {
				p := packet{src: f.outside, dst: f.node, l4: l4, sport: 1000, dport: portNode, flags: syn}
				return []step{
					{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.far, portTarget)}, flags: bpf.FrontendOutside})},
					{at: netdev, pkt: p, want: tunnel(bpf.SlowNew), check: ends(f.router, 0, f.far, portTarget)},
					{at: netdev, pkt: p, want: tunnel(bpf.SlowNot), check: ends(f.router, 0, f.far, portTarget)},
				}
			}},
			test{name: l4 + " for this node's backends only", steps: func(f family) []step {
				p := packet{src: f.outside, dst: f.node, l4: l4, sport: 1000, dport: portNode, flags: syn}
				all := []netip.AddrPort{at(f.b, portTarget), at(f.far, portTarget), at(f.cold, portTarget), at(f.narrow, portTarget)}
				return []step{
					{do: serve(f, servicePort{id: 1, backends: all, local: 1, flags: bpf.FrontendOutside | bpf.FrontendLocalOut})},
					{at: netdev, pkt: p, want: peer(ifB, bpf.SlowNew)},
					{do: serve(f, servicePort{id: 1, backends: all[1:], local: 0, flags: bpf.FrontendOutside | bpf.FrontendLocalOut})},
					{at: netdev, pkt: packet{src: f.outside, dst: f.node, l4: l4, sport: 1001, dport: portNode, flags: syn}, want: dropped(bpf.DropNoService)},
				}
			}},
			test{name: l4 + " from sources that may not", steps: func(f family) []step {
				other := addr("198.51.100.0")
				if f.v6 {
					other = addr("2001:db8:1::")
				}
				bits := f.outside.BitLen() - 8
				denied := servicePort{id: 1, backends: []netip.AddrPort{at(f.b, portTarget)}, flags: bpf.FrontendOutside | bpf.FrontendRanges | bpf.FrontendDeny, ranges: []netip.Prefix{netip.PrefixFrom(other, bits)}}
				return []step{
					{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.b, portTarget)}, flags: bpf.FrontendOutside | bpf.FrontendRanges, ranges: []netip.Prefix{netip.PrefixFrom(other, bits)}})},
					{at: netdev, pkt: packet{src: f.outside, dst: f.node, l4: l4, sport: 1000, dport: portNode, flags: syn}, want: dropped(bpf.DropSourceRange)},
					{at: netdev, pkt: packet{src: other.Next(), dst: f.node, l4: l4, sport: 1000, dport: portNode, flags: syn}, want: peer(ifB, bpf.SlowNew)},
					{do: serve(f, denied)},
					{at: netdev, pkt: packet{src: f.outside, dst: f.node, l4: l4, sport: 1001, dport: portNode, flags: syn}, want: peer(ifB, bpf.SlowNew)},
					{at: netdev, pkt: packet{src: other.Next(), dst: f.node, l4: l4, sport: 1001, dport: portNode, flags: syn}, want: dropped(bpf.DropSourceRange)},
				}
			}},
		)
	}
	tests = append(tests,
		test{name: "a ClusterIP is not reached from outside", steps: func(f family) []step {
			return []step{
				{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.b, portTarget)}})},
				{at: netdev, pkt: packet{src: f.outside, dst: vip(f), l4: "tcp", sport: 1000, dport: portVIP, flags: "S"}, want: dropped(bpf.DropClusterIP)},
			}
		}},
		test{name: "a load balancer's address", steps: func(f family) []step {
			return []step{
				{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.b, portTarget)}, flags: bpf.FrontendOutside})},
				{at: netdev, pkt: packet{src: f.outside, dst: vip(f), l4: "tcp", sport: 1000, dport: portVIP, flags: "S"}, want: peer(ifB, bpf.SlowNew)},
				{at: fromB, reply: true, want: egress(bpf.SlowNot), check: ends(vip(f), portVIP, f.outside, 1000)},
				{at: netdev, pkt: packet{src: f.outside, dst: vip(f), l4: "tcp", sport: 1000, dport: 81, flags: "S"}, want: pass(bpf.SlowRefused), check: ends(f.outside, 1000, f.router, 0)},
				{at: netdev, pkt: packet{src: f.outside, dst: vip(f), l4: "echo", sport: 5}, want: pass(bpf.SlowEcho), check: ends(f.outside, 5, f.router, 0)},
				{at: leaving, reply: true, want: pass(bpf.SlowNot), check: ends(vip(f), 0, f.outside, 5)},
			}
		}},
		test{name: "a client with affinity keeps its backend", steps: func(f family) []step {
			steps := []step{{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.b, portTarget), at(f.a, portTarget)}, flags: bpf.FrontendOutside, affinity: 100})}}
			first := uint32(0)
			for i := range uint16(12) {
				steps = append(steps, step{do: func(t *testing.T, p *programs) {
					out, err := p.run(netdev(frame(packet{src: f.outside, dst: f.node, l4: "tcp", sport: 2000 + i, dport: portNode, flags: "S"})))
					if err != nil {
						t.Fatal(err)
					}
					p.count(t, &out)
					if first == 0 {
						first = out.ifindex
					}
					if out.action != bpf.ActionPeer || out.ifindex != first {
						t.Errorf("connection %d went to device %d by action %d, the first to %d", i, out.ifindex, out.action, first)
					}
				}})
			}
			return steps
		}},
		test{name: "TTL 1", steps: func(f family) []step {
			p := packet{src: f.outside, dst: f.node, l4: "udp", sport: 1000, dport: portNode, ttl: 1}
			return []step{
				{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.b, portTarget)}, flags: bpf.FrontendOutside})},
				{at: netdev, pkt: p, want: dropped(bpf.DropTTL)},
				{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.far, portTarget)}, flags: bpf.FrontendOutside})},
				{do: func(t *testing.T, pr *programs) { pr.forget(t) }},
				{at: netdev, pkt: p, want: dropped(bpf.DropTTL)},
			}
		}},
		test{name: "errors about what was sent to a backend elsewhere, and about its answers", steps: func(f family) []step {
			var nat uint16
			return []step{
				{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.far, portTarget)}, flags: bpf.FrontendOutside})},
				{at: netdev, pkt: packet{src: f.outside, dst: f.node, l4: "udp", sport: 1000, dport: portNode}, want: egress(bpf.SlowNew), check: func(_ *testing.T, _, out []byte) { nat = read(out).sport }},
				{do: func(t *testing.T, p *programs) {
					for _, e := range []struct {
						pkt   packet
						check func(*testing.T, []byte, []byte)
					}{
						{packet{src: f.far, dst: f.node, l4: "error", quoted: frame(packet{src: f.node, dst: f.far, l4: "udp", sport: nat, dport: portTarget})}, quotes(f.node, f.outside, 1000, f.node, portNode)},
						{packet{src: f.outside, dst: f.node, l4: "error", quoted: frame(packet{src: f.node, dst: f.outside, l4: "udp", sport: portNode, dport: 1000})}, quotes(f.node, f.far, portTarget, f.node, nat)},
					} {
						p.step(t, step{at: netdev, pkt: e.pkt, want: neighbour(bpf.SlowICMPError), check: e.check}, nil)
					}
				}},
			}
		}},
		test{name: "answers and errors that go nowhere", steps: func(f family) []step {
			var nat uint16
			about := func(t *testing.T, p *programs, from netip.Addr, ttl uint8, want want) {
				t.Helper()
				p.step(t, step{at: netdev, pkt: packet{src: from, dst: f.node, ttl: ttl, l4: "error", quoted: frame(packet{src: f.node, dst: f.far, l4: "udp", sport: nat, dport: portTarget})}, want: want}, nil)
			}
			return []step{
				{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.far, portTarget)}, flags: bpf.FrontendOutside})},
				{at: netdev, pkt: packet{src: f.nowhere, dst: f.node, l4: "udp", sport: 1000, dport: portNode}, want: egress(bpf.SlowNew), check: func(_ *testing.T, _, out []byte) { nat = read(out).sport }},
				{at: netdev, reply: true, want: dropped(bpf.DropUnroutable)},
				{do: func(t *testing.T, p *programs) {
					about(t, p, f.far, 1, dropped(bpf.DropTTL))
					about(t, p, f.far, 64, dropped(bpf.DropUnroutable))
				}},
			}
		}},
		test{name: "fragments", steps: func(f family) []step {
			p := func(off uint16, more bool) packet {
				return packet{src: f.outside, dst: f.node, l4: "udp", sport: 1000, dport: portNode, fragment: &fragment{3, off, more}}
			}
			return []step{
				{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.b, portTarget)}, flags: bpf.FrontendOutside})},
				{at: netdev, pkt: p(0, true), want: peer(ifB, bpf.SlowFragment), check: ends(f.outside, 1000, f.b, portTarget)},
				{at: netdev, pkt: p(16, false), want: peer(ifB, bpf.SlowFragment), check: ends(f.outside, 1000, f.b, portTarget)},
			}
		}},
		test{name: "the node's own traffic", steps: func(f family) []step {
			return []step{
				{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.b, portTarget)}, flags: bpf.FrontendOutside})},
				{at: netdev, pkt: packet{src: f.outside, dst: f.node, l4: "tcp", sport: 1000, dport: 22, flags: "S"}, want: pass()},
				{at: leaving, pkt: packet{src: f.node, dst: f.outside, l4: "tcp", sport: portTarget, dport: 1000, flags: "SA"}, want: pass()},
				{do: func(t *testing.T, p *programs) {
					if n := p.rows(t, "lash_conn"); n != 0 {
						t.Errorf("%d connections of the node's own are tracked", n)
					}
				}},
			}
		}},
	)
	runTests(t, tests)
}

// rows counts the rows of a map.
func (p *programs) rows(t *testing.T, name string) (n int) {
	t.Helper()
	var k, v []byte
	it := p.dp.Map(name).Iterate()
	for it.Next(&k, &v) {
		n++
	}
	if err := it.Err(); err != nil {
		t.Fatal(err)
	}
	return n
}

// quotes wants an ICMP error to one end about a packet from that end to another.
func quotes(from, to netip.Addr, port uint16, about netip.Addr, aboutPort uint16) func(*testing.T, []byte, []byte) {
	return func(t *testing.T, _, out []byte) {
		t.Helper()
		h := read(out)
		if h.src != from || h.dst != to {
			t.Errorf("error from %s to %s, want from %s to %s", h.src, h.dst, from, to)
		}
		q := read(append(append([]byte(nil), out[:14]...), out[h.l4+8:]...))
		if q == nil {
			t.Fatal("the quoted packet cannot be read")
		}
		if q.src != to || q.sport != port || q.dst != about || q.dport != aboutPort {
			t.Errorf("about %s port %d to %s port %d, want %s port %d to %s port %d", q.src, q.sport, q.dst, q.dport, to, port, about, aboutPort)
		}
	}
}
