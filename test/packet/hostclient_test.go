// SPDX-License-Identifier: Apache-2.0

package packet

import (
	"net/netip"
	"testing"

	"github.com/lash-net/lash/bpf"
)

// The node itself as a client of services, where no program has translated its socket: what it sends to a service's
// address comes out of lash_host.
func TestServicesFromTheNode(t *testing.T) {
	var tests []test
	for _, l4 := range []string{"tcp", "udp", "sctp"} {
		// SCTP keeps its ports.
		syn, target, own := "", uint16(portTarget), uint16(0)
		switch l4 {
		case "tcp":
			syn = "S"
		case "sctp":
			target, own = portVIP, 1000
		}
		open := func(f family) packet {
			return packet{src: f.node, dst: vip(f), l4: l4, sport: 1000, dport: portVIP, flags: syn}
		}
		to := func(f family, b netip.Addr) func(*testing.T, *programs) {
			return serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(b, target)}})
		}
		for _, config := range []string{"bpf", "legacy"} {
			name := func(s string) string { return l4 + " " + s + ", " + config }
			tests = append(tests,
				test{name: name("to a backend on the node"), config: config, steps: func(f family) []step {
					return []step{
						{do: to(f, f.b)},
						{at: local, pkt: open(f), want: peer(ifB, bpf.SlowNew), check: ends(f.router, own, f.b, target)},
						{at: fromB, reply: true, want: host(bpf.SlowUndecided), check: ends(vip(f), portVIP, f.node, 1000)},
						{at: local, pkt: open(f), want: peer(ifB, bpf.SlowNot), check: ends(f.router, own, f.b, target)},
						{at: fromB, reply: true, want: host(bpf.SlowNot), check: ends(vip(f), portVIP, f.node, 1000)},
						{do: raise},
						{at: local, pkt: open(f), want: peer(ifB, bpf.SlowEpoch), check: ends(f.router, own, f.b, target)},
					}
				}},
				test{name: name("to a backend elsewhere"), config: config, steps: func(f family) []step {
					return []step{
						{do: to(f, f.far)},
						{at: local, pkt: open(f), want: egress(bpf.SlowNew), check: ends(f.node, own, f.far, target)},
						{at: netdev, reply: true, want: host(bpf.SlowUndecided), check: ends(vip(f), portVIP, f.node, 1000)},
						{at: local, pkt: open(f), want: egress(bpf.SlowNot), check: ends(f.node, own, f.far, target)},
						{at: netdev, reply: true, want: host(bpf.SlowNot), check: ends(vip(f), portVIP, f.node, 1000)},
						{do: later},
						{at: local, pkt: open(f), want: neighbour(bpf.SlowDeadline), check: ends(f.node, own, f.far, target)},
						{at: local, pkt: open(f), want: egress(bpf.SlowNot), check: ends(f.node, own, f.far, target)},
					}
				}},
				test{name: name("to another node, or outside of the cluster"), config: config, steps: func(f family) []step {
					more := open(f)
					more.sport++
					port := own
					if port != 0 {
						port++
					}
					return []step{
						{do: to(f, f.peer)},
						{at: local, pkt: open(f), want: egress(bpf.SlowNew), check: ends(f.node, own, f.peer, target)},
						{at: netdev, reply: true, want: host(bpf.SlowUndecided), check: ends(vip(f), portVIP, f.node, 1000)},
						{do: to(f, f.outside)},
						{at: local, pkt: more, want: egress(bpf.SlowNew), check: ends(f.node, port, f.outside, target)},
					}
				}},
				test{name: name("to the node itself"), config: config, steps: func(f family) []step {
					return []step{
						{do: to(f, f.node)},
						{at: local, pkt: open(f), want: host(bpf.SlowNew), check: ends(vip(f), own, f.node, target)},
						{at: local, reply: true, want: host(bpf.SlowUndecided), check: ends(vip(f), portVIP, f.node, 1000)},
						{at: local, pkt: open(f), want: host(bpf.SlowNot), check: ends(vip(f), own, f.node, target)},
						{at: local, reply: true, want: host(bpf.SlowNot), check: ends(vip(f), portVIP, f.node, 1000)},
					}
				}},
			)
		}
		tests = append(tests,
			test{name: l4 + " by the tunnel", config: "tunnel", steps: func(f family) []step {
				return []step{
					{do: to(f, f.far)},
					{at: local, pkt: open(f), want: tunnel(bpf.SlowNew), check: ends(f.router, own, f.far, target)},
					{at: local, pkt: open(f), want: tunnel(bpf.SlowNot), check: ends(f.router, own, f.far, target)},
				}
			}},
			test{name: l4 + " to a backend whose neighbour is unknown", steps: func(f family) []step {
				return []step{
					{do: to(f, f.cold)},
					{at: local, pkt: open(f), want: neighbour(bpf.SlowNeighbour), check: ends(f.node, own, f.cold, target)},
					{at: netdev, reply: true, want: host(bpf.SlowUndecided), check: ends(vip(f), portVIP, f.node, 1000)},
				}
			}},
			test{name: l4 + " to backends to which there is no way", steps: func(f family) []step {
				return []step{
					{do: to(f, f.nowhere)},
					{at: local, pkt: open(f), want: dropped(bpf.DropUnroutable)},
					{do: to(f, f.other)},
					{at: local, pkt: open(f), want: dropped(bpf.DropUnroutable)},
				}
			}},
			test{name: l4 + " without backends", steps: func(f family) []step {
				steps := []step{
					{do: serve(f, servicePort{id: 1})},
					{at: local, pkt: open(f), want: host(bpf.SlowRefused)},
				}
				if l4 != "sctp" {
					steps = append(steps, step{at: local, reply: true, want: host(bpf.SlowRefused), check: ends(vip(f), portVIP, f.node, 1000)})
				}
				return steps
			}},
			test{name: l4 + " to a port that nobody serves", steps: func(f family) []step {
				p := open(f)
				p.dport = 81
				return []step{
					{do: to(f, f.b)},
					{at: local, pkt: p, want: host(bpf.SlowRefused)},
				}
			}},
			test{name: l4 + " without backends, configured to drop", config: "drop", steps: func(f family) []step {
				return []step{
					{do: serve(f, servicePort{id: 1})},
					{at: local, pkt: open(f), want: dropped(bpf.DropNoService)},
				}
			}},
			test{name: l4 + ", while kube-proxy serves", config: "kube-proxy", steps: func(f family) []step {
				return []step{{do: to(f, f.b)}, {at: local, pkt: open(f), want: dropped(bpf.DropUnroutable)}}
			}},
			test{name: l4 + ", its last hop", steps: func(f family) []step {
				p := open(f)
				p.ttl = 1
				return []step{
					{do: to(f, f.far)}, {at: local, pkt: p, want: dropped(bpf.DropTTL)},
					{do: func(t *testing.T, pr *programs) { pr.forget(t) }},
					{do: to(f, f.b)}, {at: local, pkt: p, want: peer(ifB, bpf.SlowNew)}, // the node is no hop
				}
			}},
		)
	}
	udp := func(f family) packet {
		return packet{src: f.node, dst: vip(f), l4: "udp", sport: 1000, dport: portVIP}
	}
	tests = append(tests,
		test{name: "ping", steps: func(f family) []step {
			p := packet{src: f.node, dst: vip(f), l4: "echo", sport: 77}
			return []step{
				{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.b, portTarget)}})},
				{at: local, pkt: p, want: host(bpf.SlowEcho), check: ends(vip(f), 0, f.router, 0)},
				{at: local, reply: true, want: host(bpf.SlowEcho), check: ends(vip(f), 0, f.node, 77)},
				{at: local, pkt: p, want: host(bpf.SlowNot), check: ends(vip(f), 0, f.router, 0)},
				{at: local, reply: true, want: host(bpf.SlowNot), check: ends(vip(f), 0, f.node, 77)},
			}
		}},
		test{name: "two addresses of the node from one port", steps: func(f family) []step {
			p := packet{src: f.node, dst: vip(f), l4: "tcp", sport: 1000, dport: 81, flags: "S"}
			q := p
			q.src = f.router
			return []step{
				{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.b, portTarget)}})},
				{at: local, pkt: p, want: host(bpf.SlowRefused), check: ends(vip(f), 0, f.router, 0)},
				{at: local, reply: true, want: host(bpf.SlowRefused), check: ends(vip(f), 81, f.node, 1000)},
				{at: local, pkt: q, want: host(bpf.SlowRefused), check: ends(vip(f), 0, f.router, 0)},
				{at: local, reply: true, want: host(bpf.SlowRefused), check: ends(vip(f), 81, f.router, 1000)},
			}
		}},
		test{name: "a service, and its backend itself, from the same ports", steps: func(f family) []step {
			direct := packet{src: f.router, dst: f.b, l4: "udp", sport: 1000, dport: portTarget}
			p := udp(f)
			p.src = f.router
			return []step{
				{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.b, portTarget)}})},
				{at: local, pkt: direct, want: peer(ifB, bpf.SlowNew)},
				{at: local, pkt: p, want: peer(ifB, bpf.SlowNew), check: ends(f.router, 0, f.b, portTarget)},
				{at: fromB, reply: true, want: host(bpf.SlowUndecided), check: ends(vip(f), portVIP, f.router, 1000)},
				{at: fromB, pkt: packet{src: f.b, dst: f.router, l4: "udp", sport: portTarget, dport: 1000}, want: host(bpf.SlowNot), check: ends(f.b, portTarget, f.router, 1000)},
			}
		}},
		test{name: "fragments", steps: func(f family) []step {
			piece := func(off uint16, more bool) packet {
				p := udp(f)
				p.fragment = &fragment{9, off, more}
				return p
			}
			lone := piece(16, false)
			lone.fragment.id = 10
			return []step{
				{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.b, portTarget)}})},
				{at: local, pkt: piece(0, true), want: peer(ifB, bpf.SlowFragment), check: ends(f.router, 0, f.b, portTarget)},
				{at: local, pkt: piece(16, false), want: peer(ifB, bpf.SlowFragment), check: ends(f.router, 0, f.b, 0)},
				{at: local, pkt: lone, want: dropped(bpf.DropNoFragment)},
			}
		}},
		test{name: "errors of the stack about what it refuses, and about nothing", steps: func(f family) []step {
			var nat uint16
			return []step{
				{do: serve(f, servicePort{id: 1})},
				{at: local, pkt: udp(f), want: host(bpf.SlowRefused), check: func(_ *testing.T, _, out []byte) { nat = read(out).sport }},
				{do: func(t *testing.T, p *programs) {
					about := func(port uint16) packet {
						return packet{src: f.router, dst: vip(f), l4: "error", quoted: frame(packet{src: vip(f), dst: f.router, l4: "udp", sport: port})}
					}
					p.step(t, step{at: local, pkt: about(nat), want: host(bpf.SlowICMPError), check: quotes(vip(f), f.node, 1000, vip(f), portVIP)}, nil)
					p.step(t, step{at: local, pkt: about(1), want: dropped(bpf.DropUnroutable)}, nil)
				}},
			}
		}},
		test{name: "what the node forwards comes from outside", steps: func(f family) []step {
			p := packet{src: f.outside, dst: vip(f), l4: "tcp", sport: 1000, dport: portVIP, flags: "S"}
			return []step{
				{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.b, portTarget)}})},
				{at: local, pkt: p, want: dropped(bpf.DropClusterIP)},
				{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.b, portTarget)}, flags: bpf.FrontendOutside})},
				{at: local, pkt: p, want: peer(ifB, bpf.SlowNew), check: ends(f.router, 0, f.b, portTarget)},
			}
		}},
		test{name: "a connection that nobody knows is reset", steps: func(f family) []step {
			return []step{
				{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.b, portTarget)}})},
				{at: local, pkt: packet{src: f.node, dst: vip(f), l4: "tcp", sport: 1000, dport: portVIP, flags: "A"}, want: host(bpf.SlowRefused), check: ends(vip(f), 0, f.router, 0)},
			}
		}},
	)
	runTests(t, tests)
}
