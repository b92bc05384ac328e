// SPDX-License-Identifier: Apache-2.0

package packet

import (
	"bytes"
	"net/netip"
	"testing"

	"github.com/lash-net/lash/bpf"
)

// option is how nodes tell each other a frontend.
func option(a netip.Addr, port uint16) packet {
	if a.Is4() {
		b := append([]byte{154, 8, byte(port >> 8), byte(port)}, a.AsSlice()...)
		return packet{options: b}
	}
	return packet{extensions: []extension{{protoDestOpts, append([]byte{2, 27, 20, byte(port >> 8), byte(port), 0, 0}, a.AsSlice()...)}}}
}

func TestDirectServerReturn(t *testing.T) {
	var tests []test
	const flags = bpf.FrontendOutside | bpf.FrontendDSR
	for _, l4 := range []string{"tcp", "udp"} {
		syn := ""
		if l4 == "tcp" {
			syn = "S"
		}
		for _, config := range []string{"dsr", "dsr, legacy"} {
			tests = append(tests,
				test{name: l4 + " sent on, " + config, config: config, steps: func(f family) []step {
					p := packet{src: f.outside, dst: vip(f), l4: l4, sport: 1000, dport: portVIP, flags: syn}
					p2 := p
					p2.flags = "A"
					optioned := func(t *testing.T, in, out []byte) {
						t.Helper()
						ends(f.outside, 1000, f.far, portTarget)(t, in, out)
						o := option(vip(f), portVIP)
						want := o.options
						if f.v6 {
							want = o.extensions[0].body
						}
						if at := bytes.Index(out, want); at != 14+20 && at != 14+40+1 {
							t.Errorf("the option is at %d of %x", at, out)
						}
					}
					plain := func(t *testing.T, in, out []byte) {
						t.Helper()
						ends(f.outside, 1000, f.far, portTarget)(t, in, out)
						if len(in) != len(out) {
							t.Errorf("%d bytes became %d", len(in), len(out))
						}
					}
					steps := []step{
						{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.far, portTarget)}, flags: flags})},
						{at: netdev, pkt: p, want: egress(bpf.SlowNew), check: optioned},
						{at: netdev, pkt: p2, want: egress(bpf.SlowNot), check: plain},
					}
					if l4 == "tcp" { // sent again, because the first was lost
						steps = append(steps, step{at: netdev, pkt: p, want: egress(bpf.SlowReopened), check: optioned})
					} else {
						steps = append(steps, step{do: later}, step{at: netdev, pkt: p, want: neighbour(bpf.SlowDeadline), check: optioned})
					}
					return steps
				}},
				test{name: l4 + " at the backend's node, " + config, config: config, steps: func(f family) []step {
					p := option(vip(f), portVIP)
					p.src, p.dst, p.l4, p.sport, p.dport, p.flags = f.outside, f.a, l4, 1000, portTarget, syn
					return []step{
						{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.a, portTarget)}, flags: flags})},
						{at: netdev, pkt: p, want: peer(ifA, bpf.SlowExtension)},
						{at: fromA, pkt: packet{src: f.a, dst: f.outside, l4: l4, sport: portTarget, dport: 1000, flags: "SA"}, want: egress(bpf.SlowNot), check: ends(vip(f), portVIP, f.outside, 1000)},
						{at: netdev, pkt: packet{src: f.outside, dst: f.a, l4: l4, sport: 1000, dport: portTarget, flags: "A"}, want: peer(ifA, bpf.SlowNot)},
						{do: raise},
						{at: fromA, pkt: packet{src: f.a, dst: f.outside, l4: l4, sport: portTarget, dport: 1000, flags: "A"}, want: egress(bpf.SlowEpoch), check: ends(vip(f), portVIP, f.outside, 1000)},
					}
				}},
			)
		}
	}
	tests = append(tests,
		test{name: "closed by its client and opened again it may get another backend", config: "dsr", steps: func(f family) []step {
			tcp := func(flags string) packet {
				return packet{src: f.outside, dst: vip(f), l4: "tcp", sport: 1000, dport: portVIP, flags: flags}
			}
			to := func(port uint16) step {
				return step{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.far, port)}, flags: flags})}
			}
			return []step{
				to(portTarget),
				{at: netdev, pkt: tcp("S"), want: egress(bpf.SlowNew), check: ends(f.outside, 1000, f.far, portTarget)},
				to(portTarget + 1),
				// The backend's end of it is never seen here. While it lives, it stays where it is.
				{at: netdev, pkt: tcp("S"), want: egress(bpf.SlowReopened), check: ends(f.outside, 1000, f.far, portTarget)},
				{at: netdev, pkt: tcp("FA"), want: egress(bpf.SlowNot), check: ends(f.outside, 1000, f.far, portTarget)},
				{at: netdev, pkt: tcp("A"), want: egress(bpf.SlowNot), check: ends(f.outside, 1000, f.far, portTarget)},
				{at: netdev, pkt: tcp("S"), want: egress(bpf.SlowReopened), check: ends(f.outside, 1000, f.far, portTarget+1)},
			}
		}},
		test{name: "not answered by the backend's node: by way of this node, the third time", config: "dsr", steps: func(f family) []step {
			tcp := func(flags string) packet {
				return packet{src: f.outside, dst: vip(f), l4: "tcp", sport: 1000, dport: portVIP, flags: flags}
			}
			return []step{
				{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.far, portTarget)}, flags: flags})},
				{at: netdev, pkt: tcp("S"), want: egress(bpf.SlowNew), check: ends(f.outside, 1000, f.far, portTarget)},
				{at: netdev, pkt: tcp("S"), want: egress(bpf.SlowReopened), check: ends(f.outside, 1000, f.far, portTarget)},
				{at: netdev, pkt: tcp("S"), want: egress(bpf.SlowReopened), check: ends(f.node, 0, f.far, portTarget)},
				{at: netdev, pkt: tcp("A"), want: egress(bpf.SlowNot), check: ends(f.node, 0, f.far, portTarget)},
			}
		}},
		test{name: "a client's port has a connection by way of another frontend", config: "dsr", steps: func(f family) []step {
			syn := func(frontend netip.Addr, port uint16) packet {
				p := option(frontend, port)
				p.src, p.dst, p.l4, p.sport, p.dport, p.flags = f.outside, f.a, "tcp", 1000, portTarget, "S"
				return p
			}
			answer := packet{src: f.a, dst: f.outside, l4: "tcp", sport: portTarget, dport: 1000, flags: "SA"}
			return []step{
				{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.a, portTarget)}, flags: flags})},
				{at: netdev, pkt: syn(vip(f), portVIP), want: peer(ifA, bpf.SlowExtension)},
				{at: netdev, pkt: syn(f.peer, portNode), want: dropped(bpf.DropTupleTaken)},
				{at: netdev, pkt: syn(vip(f), portVIP), want: peer(ifA, bpf.SlowExtension)},
				{at: fromA, pkt: answer, want: egress(bpf.SlowNot), check: ends(vip(f), portVIP, f.outside, 1000)},
			}
		}},
		test{name: "a client's port has a connection by way of this node", config: "dsr", steps: func(f family) []step {
			p := option(f.peer, portNode)
			p.src, p.dst, p.l4, p.sport, p.dport, p.flags = f.outside, f.a, "tcp", 1000, portTarget, "S"
			return []step{
				{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.a, portTarget)}, flags: flags})},
				{at: netdev, pkt: packet{src: f.outside, dst: vip(f), l4: "tcp", sport: 1000, dport: portVIP, flags: "S"}, want: peer(ifA, bpf.SlowNew)},
				{at: netdev, pkt: p, want: dropped(bpf.DropTupleTaken)},
				{at: fromA, pkt: packet{src: f.a, dst: f.outside, l4: "tcp", sport: portTarget, dport: 1000, flags: "SA"}, want: egress(bpf.SlowNot), check: ends(vip(f), portVIP, f.outside, 1000)},
			}
		}},
		test{name: "what was open without an option answers by the frontend from then on", config: "dsr", steps: func(f family) []step {
			p := option(vip(f), portVIP)
			p.src, p.dst, p.l4, p.sport, p.dport, p.flags = f.outside, f.a, "tcp", 1000, portTarget, "S"
			answer := packet{src: f.a, dst: f.outside, l4: "tcp", sport: portTarget, dport: 1000, flags: "SA"}
			return []step{
				{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.a, portTarget)}, flags: flags})},
				{at: netdev, pkt: packet{src: f.outside, dst: f.a, l4: "tcp", sport: 1000, dport: portTarget, flags: "A"}, want: peer(ifA, bpf.SlowNew)},
				{at: fromA, pkt: answer, want: egress(bpf.SlowNot), check: ends(f.a, portTarget, f.outside, 1000)},
				{at: netdev, pkt: p, want: peer(ifA, bpf.SlowExtension)},
				{at: fromA, pkt: answer, want: egress(bpf.SlowNot), check: ends(vip(f), portVIP, f.outside, 1000)},
			}
		}},
		test{name: "another node's NodePort", config: "dsr", steps: func(f family) []step {
			p := option(f.peer, portNode)
			p.src, p.dst, p.l4, p.sport, p.dport, p.flags = f.outside, f.a, "tcp", 1000, portTarget, "S"
			return []step{
				{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.a, portTarget)}, flags: flags})},
				{at: netdev, pkt: p, want: peer(ifA, bpf.SlowExtension)},
				{at: fromA, pkt: packet{src: f.a, dst: f.outside, l4: "tcp", sport: portTarget, dport: 1000, flags: "SA"}, want: egress(bpf.SlowNot), check: ends(f.peer, portNode, f.outside, 1000)},
			}
		}},
		test{name: "errors of backends", config: "dsr", steps: func(f family) []step {
			told := func(backend netip.Addr) packet {
				p := option(vip(f), portVIP)
				p.src, p.dst, p.l4, p.sport, p.dport = f.outside, backend, "udp", 1000, portTarget
				return p
			}
			unreachable := func(backend netip.Addr) packet {
				return packet{src: backend, dst: f.outside, l4: "error", quoted: frame(packet{src: f.outside, dst: backend, l4: "udp", sport: 1000, dport: portTarget})}
			}
			return []step{
				{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.a, portTarget), at(f.node, portTarget)}, flags: flags})},
				{at: netdev, pkt: told(f.a), want: peer(ifA, bpf.SlowExtension)},
				{at: fromA, pkt: unreachable(f.a), want: egress(bpf.SlowICMPError), check: quotes(vip(f), f.outside, 1000, vip(f), portVIP)},
				{at: netdev, pkt: told(f.node), want: pass(bpf.SlowExtension)},
				{at: leaving, pkt: unreachable(f.node), want: pass(), check: quotes(vip(f), f.outside, 1000, vip(f), portVIP)},
			}
		}},
		test{name: "a process of the node, as the backend", config: "dsr", steps: func(f family) []step {
			syn := func(frontend netip.Addr, port uint16) packet {
				p := option(frontend, port)
				p.src, p.dst, p.l4, p.sport, p.dport, p.flags = f.outside, f.node, "tcp", 1000, portTarget, "S"
				return p
			}
			answer := packet{src: f.node, dst: f.outside, l4: "tcp", sport: portTarget, dport: 1000, flags: "SA"}
			other := answer
			other.dport++
			return []step{
				{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.node, portTarget)}, flags: flags})},
				{at: netdev, pkt: syn(f.peer, portNode), want: pass(bpf.SlowExtension)},
				{at: leaving, pkt: answer, want: pass(bpf.SlowNot), check: ends(f.peer, portNode, f.outside, 1000)},
				{at: leaving, pkt: other, want: pass(), check: ends(f.node, portTarget, f.outside, 1001)},
				{at: netdev, pkt: packet{src: f.outside, dst: f.node, l4: "tcp", sport: 1000, dport: portTarget, flags: "A"}, want: pass(bpf.SlowNot)},
				{at: netdev, pkt: syn(vip(f), portVIP), want: dropped(bpf.DropTupleTaken)},
			}
		}},
		test{name: "a process of the node, asked directly from the port of a connection that is over", config: "dsr", steps: func(f family) []step {
			syn := option(vip(f), portVIP)
			syn.src, syn.dst, syn.l4, syn.sport, syn.dport, syn.flags = f.outside, f.node, "tcp", 1000, portTarget, "S"
			says := func(flags string, as netip.Addr, port uint16) step {
				return step{at: leaving, pkt: packet{src: f.node, dst: f.outside, l4: "tcp", sport: portTarget, dport: 1000, flags: flags}, want: pass(), check: ends(as, port, f.outside, 1000)}
			}
			named := func(flags string) step {
				s := says(flags, vip(f), portVIP)
				s.want = pass(bpf.SlowNot)
				return s
			}
			return []step{
				{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.node, portTarget)}, flags: flags})},
				{at: netdev, pkt: syn, want: pass(bpf.SlowExtension)},
				named("SA"), named("FA"), named("A"),
				says("SA", f.node, portTarget), says("A", f.node, portTarget),
				{at: netdev, pkt: syn, want: pass(bpf.SlowExtension)},
				named("SA"), named("A"),
			}
		}},
		test{name: "a process of the node, that the client has by this node's own frontend", config: "dsr", steps: func(f family) []step {
			p := option(vip(f), portVIP)
			p.src, p.dst, p.l4, p.sport, p.dport, p.flags = f.outside, f.node, "tcp", 1000, portNode, "S"
			return []step{
				{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.a, portTarget)}, flags: flags})},
				{at: netdev, pkt: packet{src: f.outside, dst: f.node, l4: "tcp", sport: 1000, dport: portNode, flags: "S"}, want: peer(ifA, bpf.SlowNew)},
				{at: netdev, pkt: p, want: dropped(bpf.DropTupleTaken)},
			}
		}},
		test{name: "the node's own, with options that tell nothing", config: "dsr", steps: func(f family) []step {
			p := packet{src: f.outside, dst: f.node, l4: "tcp", sport: 1000, dport: portTarget, flags: "S", options: []byte{7, 7, 4, 0, 0, 0, 0, 0}, extensions: []extension{{protoDestOpts, []byte{0, 1, 4, 0, 0, 0, 0}}}}
			return []step{
				{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.node, portTarget)}, flags: flags})},
				{at: netdev, pkt: p, want: pass()},
				{do: func(t *testing.T, p *programs) {
					if n := p.rows(t, "lash_conn"); n != 0 {
						t.Errorf("%d connections of the node's own are tracked", n)
					}
				}},
			}
		}},
		test{name: "a frontend that there is none of", config: "dsr", steps: func(f family) []step {
			p := option(f.outside, portNode)
			p.src, p.dst, p.l4, p.sport, p.dport, p.flags = f.outside, f.a, "tcp", 1000, portTarget, "S"
			return []step{
				{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.a, portTarget)}, flags: flags})},
				{at: netdev, pkt: p, want: dropped(bpf.DropNoService)},
			}
		}},
		test{name: "nobody is believed where it is not in use", steps: func(f family) []step {
			p := option(vip(f), portVIP)
			p.src, p.dst, p.l4, p.sport, p.dport, p.flags = f.outside, f.a, "tcp", 1000, portTarget, "S"
			return []step{
				{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.a, portTarget)}, flags: flags})},
				{at: netdev, pkt: p, want: peer(ifA, bpf.SlowExtension)},
				{at: fromA, pkt: packet{src: f.a, dst: f.outside, l4: "tcp", sport: portTarget, dport: 1000, flags: "SA"}, want: egress(bpf.SlowNot), check: ends(f.a, portTarget, f.outside, 1000)},
			}
		}},
		test{name: "too big for the option: by way of this node", config: "dsr", steps: func(f family) []step {
			size := 1500 - 28
			if f.v6 {
				size -= 20
			}
			p := packet{src: f.outside, dst: vip(f), l4: "udp", sport: 1000, dport: portVIP, size: size}
			return []step{
				{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.far, portTarget)}, flags: flags})},
				{at: netdev, pkt: p, want: egress(bpf.SlowNew), check: ends(f.node, 0, f.far, portTarget)},
			}
		}},
		test{name: "nowhere", steps: func(f family) []step {
			return []step{
				{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.nowhere, portTarget)}, flags: flags})},
				{at: netdev, pkt: packet{src: f.outside, dst: vip(f), l4: "udp", sport: 1000, dport: portVIP}, want: dropped(bpf.DropUnroutable)},
			}
		}},
	)
	runTests(t, tests)
}
