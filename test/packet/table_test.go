// SPDX-License-Identifier: Apache-2.0

package packet

import (
	"bytes"
	"testing"

	"github.com/lash-net/lash/bpf"
)

// restored wants the packet to go to an address and port.
func restored(f family, port uint16) func(*testing.T, []byte, []byte) {
	return func(t *testing.T, _, out []byte) {
		if h := read(out); h.dst != f.a || !h.later && h.dport != port {
			t.Errorf("to %s port %d, want %s port %d", h.dst, h.dport, f.a, port)
		}
	}
}

func onlyFor(v6 bool, f family, steps []step) []step {
	if f.v6 != v6 {
		return nil
	}
	return steps
}

func TestForwarding(t *testing.T) {
	runTests(t, []test{
		{name: "pod to pod on the node", steps: func(f family) []step {
			p := packet{src: f.a, dst: f.b, l4: "udp", sport: 1000, dport: 53}
			return []step{
				{at: fromA, pkt: p, want: peer(ifB, bpf.SlowNew)},
				{at: fromA, pkt: p, want: peer(ifB, bpf.SlowNot)},
				{at: fromB, reply: true, want: peer(ifA, bpf.SlowNot)},
			}
		}},
		{name: "a pod to itself by its own address", steps: func(f family) []step {
			return []step{{at: fromA, pkt: packet{src: f.a, dst: f.a, l4: "udp", sport: 1000, dport: 1000}, want: peer(ifA, bpf.SlowNew)}}
		}},
		{name: "pod to a pod elsewhere", steps: func(f family) []step {
			p := packet{src: f.a, dst: f.far, l4: "tcp", sport: 1000, dport: 80, flags: "S"}
			return []step{
				{at: fromA, pkt: p, want: egress(bpf.SlowNew)},
				{at: netdev, reply: true, want: peer(ifA, bpf.SlowNot)},
				{at: fromA, pkt: p, want: egress(bpf.SlowNot)},
			}
		}},
		{name: "from a pod elsewhere", steps: func(f family) []step {
			p := packet{src: f.far, dst: f.a, l4: "tcp", sport: 1000, dport: 80, flags: "S"}
			return []step{
				{at: netdev, pkt: p, want: peer(ifA, bpf.SlowNew)},
				{at: fromA, reply: true, want: egress(bpf.SlowNot)},
				{at: netdev, pkt: p, want: peer(ifA, bpf.SlowNot)},
			}
		}},
		{name: "protocol without ports", steps: func(f family) []step {
			return []step{
				{at: fromA, pkt: packet{src: f.a, dst: f.b, l4: "gre"}, want: peer(ifB, bpf.SlowNew)},
				{at: fromB, pkt: packet{src: f.b, dst: f.a, l4: "gre"}, want: peer(ifA, bpf.SlowNot)},
				{at: fromA, pkt: packet{src: f.a, dst: f.far, l4: "sctp", sport: 5, dport: 6}, want: egress(bpf.SlowNew)},
			}
		}},
		{name: "echo", steps: func(f family) []step {
			p := packet{src: f.a, dst: f.far, l4: "echo", sport: 77}
			return []step{
				{at: fromA, pkt: p, want: egress(bpf.SlowNew)},
				{at: netdev, reply: true, want: peer(ifA, bpf.SlowNot)},
				{at: fromA, pkt: p, want: egress(bpf.SlowNot)},
			}
		}},
		{name: "unknown neighbour", steps: func(f family) []step {
			p := packet{src: f.a, dst: f.cold, l4: "udp", sport: 1000, dport: 53}
			return []step{
				{at: fromA, pkt: p, want: neighbour(bpf.SlowNeighbour)},
				{at: fromA, pkt: p, want: neighbour(bpf.SlowNeighbour)},
				{at: netdev, reply: true, want: peer(ifA, bpf.SlowUndecided)},
			}
		}},
		{name: "route due for another look", steps: func(f family) []step {
			p := packet{src: f.a, dst: f.far, l4: "udp", sport: 1000, dport: 53}
			return []step{
				{at: fromA, pkt: p, want: egress(bpf.SlowNew)},
				{do: later},
				{at: fromA, pkt: p, want: neighbour(bpf.SlowDeadline)}, // which has the neighbour checked
				{at: fromA, pkt: p, want: egress(bpf.SlowNot)},
			}
		}},
		{name: "something changed", steps: func(f family) []step {
			p := packet{src: f.a, dst: f.b, l4: "udp", sport: 1000, dport: 53}
			return []step{
				{at: fromA, pkt: p, want: peer(ifB, bpf.SlowNew)},
				{do: raise},
				{at: fromA, pkt: p, want: peer(ifB, bpf.SlowEpoch)},
				{at: fromA, pkt: p, want: peer(ifB, bpf.SlowNot)},
				{do: raise},
				{at: fromB, reply: true, want: peer(ifA, bpf.SlowEpoch)},
			}
		}},
		{name: "record that has expired", steps: func(f family) []step {
			p := packet{src: f.a, dst: f.b, l4: "udp", sport: 1000, dport: 53}
			return []step{
				{at: fromA, pkt: p, want: peer(ifB, bpf.SlowNew)},
				{do: expire},
				{at: fromA, pkt: p, want: peer(ifB, bpf.SlowDeadline)},
				{at: fromA, pkt: p, want: peer(ifB, bpf.SlowNot)},
			}
		}},
		{name: "packet of a connection that arrives elsewhere", steps: func(f family) []step {
			return []step{
				{at: netdev, pkt: packet{src: f.far, dst: f.a, l4: "udp", sport: 1, dport: 2}, want: peer(ifA, bpf.SlowNew)},
				{at: fromB, pkt: packet{src: f.a, dst: f.far, l4: "udp", sport: 2, dport: 1}, want: dropped(bpf.DropInvalidSource)},
				{at: local, pkt: packet{src: f.far, dst: f.a, l4: "udp", sport: 1, dport: 2}, want: peer(ifA, bpf.SlowElsewhere)},
			}
		}},
		{name: "connection closed by RST and opened again", steps: func(f family) []step {
			tcp := func(flags string) packet {
				return packet{src: f.a, dst: f.b, l4: "tcp", sport: 1000, dport: 80, flags: flags}
			}
			return []step{
				{at: fromA, pkt: tcp("S"), want: peer(ifB, bpf.SlowNew)},
				{at: fromA, pkt: tcp("R"), want: peer(ifB, bpf.SlowNot)},
				{at: fromA, pkt: tcp("A"), want: peer(ifB, bpf.SlowNot)},
				{at: fromA, pkt: tcp("S"), want: peer(ifB, bpf.SlowReopened)},
				{at: fromA, pkt: tcp("S"), want: peer(ifB, bpf.SlowNot)},
			}
		}},
		{name: "connection that goes on after an RST that was another's", steps: func(f family) []step {
			a := func(flags string) packet {
				return packet{src: f.a, dst: f.b, l4: "tcp", sport: 1000, dport: 80, flags: flags}
			}
			b := func(flags string) packet {
				return packet{src: f.b, dst: f.a, l4: "tcp", sport: 80, dport: 1000, flags: flags}
			}
			pause := func(t *testing.T, p *programs) {
				second := p.ticksASecond(t)
				p.change(t, func(_ *bpf.ConnKey, c *bpf.Conn) { c.Expires -= 2 * second })
			}
			return []step{
				{at: fromA, pkt: a("S"), want: peer(ifB, bpf.SlowNew)},
				{at: fromB, pkt: b("SA"), want: peer(ifA, bpf.SlowNot)},
				{at: fromB, pkt: b("R"), want: peer(ifA, bpf.SlowNot)},
				{do: pause},
				{at: fromA, pkt: a("A"), want: peer(ifB, bpf.SlowNot)}, // it may not know yet
				{do: closed(true)},
				{at: fromB, pkt: b("A"), want: peer(ifA, bpf.SlowNot)}, // sent before
				{do: closed(true)},
				{do: pause},
				{at: fromB, pkt: b("A"), want: peer(ifA, bpf.SlowNot)},
				{do: closed(false)},
				{at: fromA, pkt: a("R"), want: peer(ifB, bpf.SlowNot)},
				{do: pause},
				{at: fromB, pkt: b("A"), want: peer(ifA, bpf.SlowNot)},
				{do: closed(true)},
				{do: pause},
				{at: fromA, pkt: a("A"), want: peer(ifB, bpf.SlowNot)},
				{do: closed(false)},
			}
		}},
		{name: "connection closed by both sides and opened by the other", steps: func(f family) []step {
			a := func(flags string) packet {
				return packet{src: f.a, dst: f.b, l4: "tcp", sport: 1000, dport: 80, flags: flags}
			}
			b := func(flags string) packet {
				return packet{src: f.b, dst: f.a, l4: "tcp", sport: 80, dport: 1000, flags: flags}
			}
			return []step{
				{at: fromA, pkt: a("S"), want: peer(ifB, bpf.SlowNew)},
				{at: fromB, pkt: b("SA"), want: peer(ifA, bpf.SlowNot)},
				{at: fromA, pkt: a("FA"), want: peer(ifB, bpf.SlowNot)},
				{at: fromA, pkt: a("S"), want: peer(ifB, bpf.SlowNot)}, // half closed is not closed
				{at: fromB, pkt: b("FA"), want: peer(ifA, bpf.SlowNot)},
				{at: fromB, pkt: b("SA"), want: peer(ifA, bpf.SlowNot)},
				{at: fromB, pkt: b("S"), want: peer(ifA, bpf.SlowReopened)},
				{do: func(t *testing.T, p *programs) {
					for k, c := range p.conns(t) {
						initiator := k.Lo
						if c.Flags&bpf.ConnInitiatorHi != 0 {
							initiator = k.Hi
						}
						if initiator != bpf.AddrFrom(f.b) || c.State != 0 {
							t.Errorf("initiator %s, state %d; want %s and a fresh one", initiator.Addr(), c.State, f.b)
						}
					}
				}},
			}
		}},
		{name: "to its node", steps: func(f family) []step {
			p := packet{src: f.a, dst: f.node, l4: "tcp", sport: 1000, dport: 10250, flags: "S"}
			return []step{
				{at: fromA, pkt: p, want: host(bpf.SlowNew)},
				{at: fromA, pkt: p, want: host(bpf.SlowNot)},
				{at: local, reply: true, want: peer(ifA, bpf.SlowNot)},
			}
		}},
		{name: "from its node", steps: func(f family) []step {
			p := packet{src: f.router, dst: f.a, l4: "tcp", sport: 1000, dport: 80, flags: "S"}
			return []step{
				{at: local, pkt: p, want: peer(ifA, bpf.SlowNew)},
				{at: fromA, reply: true, want: host(bpf.SlowNot)},
				{at: local, pkt: p, want: peer(ifA, bpf.SlowNot)},
			}
		}},
		{name: "to another node", steps: func(f family) []step {
			return []step{{at: fromA, pkt: packet{src: f.a, dst: f.peer, l4: "udp", sport: 1, dport: 2}, want: egress(bpf.SlowNew)}}
		}},
		{name: "by a device that is not Lash's", steps: func(f family) []step {
			p := packet{src: f.a, dst: f.other, l4: "udp", sport: 1000, dport: 53}
			return []step{
				{at: fromA, pkt: p, want: host(bpf.SlowUnrouted)},
				{at: fromA, pkt: p, want: host(bpf.SlowNot)},
			}
		}},
		{name: "no route", steps: func(f family) []step {
			p := packet{src: f.a, dst: f.nowhere, l4: "udp", sport: 1000, dport: 53}
			return []step{
				{at: fromA, pkt: p, want: host(bpf.SlowUnrouted)},
				{do: later},
				{at: fromA, pkt: p, want: host(bpf.SlowUnrouted)},
			}
		}},
		{name: "to an address of the pod CIDR that nobody has", steps: func(f family) []step {
			p := packet{src: f.a, dst: f.gone, l4: "udp", sport: 1000, dport: 53}
			return []step{
				{at: fromA, pkt: p, want: dropped(bpf.DropUnroutable)},
				{at: fromA, pkt: p, want: dropped(bpf.DropUnroutable)},
				{at: local, pkt: packet{src: f.router, dst: f.gone, l4: "udp", sport: 1, dport: 2}, want: dropped(bpf.DropUnroutable)},
				{at: local, pkt: packet{src: f.router, dst: f.router, l4: "udp", sport: 1, dport: 2}, want: dropped(bpf.DropUnroutable)},
				{at: netdev, pkt: packet{src: f.far, dst: f.gone, l4: "udp", sport: 1, dport: 2}, want: pass()},
			}
		}},
		{name: "TTL 1", steps: func(f family) []step {
			p := func(ttl uint8, dst string) packet {
				to := f.b
				switch dst {
				case "far":
					to = f.far
				case "cold":
					to = f.cold
				case "node":
					to = f.node
				}
				return packet{src: f.a, dst: to, l4: "udp", sport: 1000, dport: 53, ttl: ttl}
			}
			return []step{
				{at: fromA, pkt: p(1, "b"), want: host(bpf.SlowTTL)},
				{at: fromA, pkt: p(2, "b"), want: peer(ifB, bpf.SlowNot)},
				{at: fromA, pkt: p(1, "b"), want: host(bpf.SlowTTL)},
				{at: fromA, pkt: p(1, "far"), want: host(bpf.SlowTTL)},
				{at: fromA, pkt: p(1, "cold"), want: host(bpf.SlowTTL)},
				{at: fromA, pkt: p(1, "node"), want: host(bpf.SlowNew)}, // there is no hop to the node itself
				{at: netdev, pkt: packet{src: f.far, dst: f.a, l4: "udp", sport: 1, dport: 2, ttl: 1}, want: pass(bpf.SlowTTL)},
				{at: netdev, pkt: packet{src: f.far, dst: f.a, l4: "udp", sport: 1, dport: 2, ttl: 2}, want: peer(ifA, bpf.SlowNot)},
				{at: netdev, pkt: packet{src: f.far, dst: f.a, l4: "udp", sport: 1, dport: 2, ttl: 1}, want: pass(bpf.SlowTTL)},
				{at: local, pkt: packet{src: f.router, dst: f.a, l4: "udp", sport: 1, dport: 2, ttl: 1}, want: peer(ifA, bpf.SlowNew)},
			}
		}},
		{name: "too big", steps: func(f family) []step {
			p := func(size int, sport uint16) packet {
				return packet{src: f.a, dst: f.narrow, l4: "udp", sport: sport, dport: 53, size: size}
			}
			return []step{
				{at: fromA, pkt: p(1400, 1000), want: host(bpf.SlowMTU)},
				{at: fromA, pkt: p(100, 1000), want: egress(bpf.SlowNot)},
				{at: fromA, pkt: p(1400, 1000), want: host(bpf.SlowMTU)},
				{at: fromA, pkt: packet{src: f.a, dst: f.far, l4: "udp", sport: 1, dport: 2, size: 1600}, want: host(bpf.SlowMTU)},
				{at: fromA, pkt: packet{src: f.a, dst: f.b, l4: "udp", sport: 1, dport: 2, size: 1600}, want: peer(ifB, bpf.SlowNew)},
			}
		}},
		{name: "GSO", steps: func(f family) []step {
			tcp := packet{src: f.a, dst: f.narrow, l4: "tcp", sport: 1000, dport: 80, flags: "A", size: 2600}
			udp := packet{src: f.a, dst: f.narrow, l4: "udp", sport: 1000, dport: 80, size: 2600}
			head := uint32(20)
			if f.v6 {
				head = 40
			}
			return []step{
				{at: fromA, pkt: tcp, gso: 1400 - head - 20, want: egress(bpf.SlowNew)},
				{at: fromA, pkt: tcp, gso: 1400 - head - 20, want: egress(bpf.SlowNot)},
				{at: fromA, pkt: tcp, gso: 1400 - head - 20 + 1, want: host(bpf.SlowMTU)},
				{at: fromA, pkt: udp, gso: 1400 - head - 8, want: egress(bpf.SlowNew)},
				{at: fromA, pkt: udp, gso: 1400 - head - 8 + 1, want: host(bpf.SlowMTU)},
			}
		}},
		{name: "fragments", steps: func(f family) []step {
			p := func(off uint16, more bool, id uint32, size int) packet {
				return packet{src: f.a, dst: f.b, l4: "udp", sport: 1000, dport: 53, size: size, fragment: &fragment{id, off, more}}
			}
			return []step{
				{at: fromA, pkt: p(8, false, 1, 32), want: dropped(bpf.DropNoFragment)},
				{at: fromA, pkt: p(0, true, 1, 32), want: peer(ifB, bpf.SlowFragment)},
				{at: fromA, pkt: p(16, false, 1, 32), want: peer(ifB, bpf.SlowFragment)},
				{at: fromA, pkt: p(16, false, 2, 32), want: dropped(bpf.DropNoFragment)},
				{at: fromA, pkt: packet{src: f.a, dst: f.b, l4: "udp", sport: 1000, dport: 53}, want: peer(ifB, bpf.SlowNot)}, // the same connection
				{at: netdev, pkt: packet{src: f.far, dst: f.a, l4: "udp", sport: 1, dport: 2, fragment: &fragment{9, 16, false}}, want: dropped(bpf.DropNoFragment)},
				{at: netdev, pkt: packet{src: f.far, dst: f.a, l4: "udp", sport: 1, dport: 2, fragment: &fragment{9, 0, true}}, want: peer(ifA, bpf.SlowFragment)},
				{at: netdev, pkt: packet{src: f.far, dst: f.a, l4: "udp", sport: 1, dport: 2, fragment: &fragment{9, 16, false}}, want: peer(ifA, bpf.SlowFragment)},
				{at: local, pkt: packet{src: f.router, dst: f.a, l4: "udp", sport: 1, dport: 2, fragment: &fragment{9, 16, false}}, want: dropped(bpf.DropNoFragment)},
				{at: local, pkt: packet{src: f.router, dst: f.a, l4: "udp", sport: 1, dport: 2, fragment: &fragment{9, 0, true}}, want: peer(ifA, bpf.SlowFragment)},
			}
		}},
		{name: "IPv4 options", steps: func(f family) []step {
			p := packet{src: f.a, dst: f.b, l4: "tcp", sport: 1000, dport: 80, flags: "S", options: []byte{7, 7, 4, 0, 0, 0, 0, 0}}
			return onlyFor(false, f, []step{
				{at: fromA, pkt: p, want: peer(ifB, bpf.SlowExtension)},
				{at: fromA, pkt: packet{src: f.a, dst: f.b, l4: "tcp", sport: 1000, dport: 80, flags: "S"}, want: peer(ifB, bpf.SlowNot)},
				{at: netdev, pkt: packet{src: f.far, dst: f.a, l4: "echo", sport: 80, options: bytes.Repeat([]byte{1}, 40)}, want: peer(ifA, bpf.SlowExtension)},
			})
		}},
		{name: "extension headers", steps: func(f family) []step {
			pad := make([]byte, 7)
			pad[1] = 1
			ah := make([]byte, 23)
			ah[0] = 4
			p := packet{src: f.a, dst: f.b, l4: "tcp", sport: 1000, dport: 80, flags: "S"}
			with := func(e ...extension) packet { q := p; q.extensions = e; return q }
			hop, dst, routing := extension{protoHopByHop, pad}, extension{protoDestOpts, pad}, extension{protoRouting, pad}
			return onlyFor(true, f, []step{
				{at: fromA, pkt: with(hop), want: peer(ifB, bpf.SlowExtension)},
				{at: fromA, pkt: with(hop, dst, routing, extension{protoAH, ah}), want: peer(ifB, bpf.SlowExtension)},
				{at: fromA, pkt: p, want: peer(ifB, bpf.SlowNot)},
				{at: fromA, pkt: with(dst, dst, dst, dst, dst, dst), want: dropped(bpf.DropIPv6Extension)},
				{at: netdev, pkt: packet{src: f.far, dst: f.a, l4: "echo", sport: 80, extensions: []extension{dst}}, want: peer(ifA, bpf.SlowExtension)},
			})
		}},
	})
}

func TestSourcesAndAnswers(t *testing.T) {
	runTests(t, []test{
		{name: "nobody sends under another's address", steps: func(f family) []step {
			spoof := packet{src: f.b, dst: f.far, l4: "udp", sport: 1, dport: 2}
			return []step{
				{at: fromA, pkt: spoof, want: dropped(bpf.DropInvalidSource)},
				{at: fromA, pkt: packet{src: f.router, dst: f.b, l4: "udp", sport: 1, dport: 2}, want: dropped(bpf.DropInvalidSource)},
				{at: fromB, pkt: spoof, want: egress(bpf.SlowNew)},
				{at: fromA, pkt: spoof, want: dropped(bpf.DropInvalidSource)}, // not by way of the other's connection either
			}
		}},
		{name: "a pod of this node cannot come in from outside", steps: func(f family) []step {
			p := packet{src: f.b, dst: f.a, l4: "udp", sport: 1, dport: 2}
			return []step{
				{at: netdev, pkt: p, want: dropped(bpf.DropInvalidSource)},
				{at: fromB, pkt: p, want: peer(ifA, bpf.SlowNew)},
				{at: netdev, pkt: p, want: dropped(bpf.DropInvalidSource)},
			}
		}},
		{name: "device that Lash does not know", steps: func(f family) []step {
			unknown := func(raw []byte) input {
				return input{program: "from_container", ifindex: ifNone, frame: raw}
			}
			return []step{{at: unknown, pkt: packet{src: f.a, dst: f.b, l4: "udp", sport: 1, dport: 2}, want: dropped(bpf.DropNoEndpoint)}}
		}},
		{name: "ARP", steps: func(f family) []step {
			return onlyFor(false, f, []step{
				{at: fromA, raw: arp(f.a, f.router), want: want{verdict: verdictRedirect, action: bpf.ActionEgress, ifindex: ifA}, check: func(t *testing.T, in, out []byte) {
					pod, gateway := mac(macPod+ifA), mac(ifA)
					want := bytes.Join([][]byte{pod[:], gateway[:], {8, 6, 0, 1, 8, 0, 6, 4, 0, 2}, gateway[:], f.router.AsSlice(), pod[:], f.a.AsSlice()}, nil)
					if !same(out[:len(want)], want) {
						t.Errorf("got  %x\nwant %x", out, want)
					}
				}},
				{at: fromA, raw: arp(f.a, f.b), want: unanswered()},
				{at: fromA, raw: arp(f.a, f.router)[:30], want: unanswered()},
			})
		}},
		{name: "neighbour solicitation", steps: func(f family) []step {
			if !f.v6 {
				return nil
			}
			asked := discovery(135, f.a, addr("ff02::1:ff00:1"), f.router)
			relayed := discovery(135, f.a, addr("ff02::1:ff00:1"), f.router)
			relayed[21] = 254
			mend(relayed)
			return []step{
				{at: fromA, raw: asked, want: want{verdict: verdictRedirect, action: bpf.ActionEgress, ifindex: ifA}, check: func(t *testing.T, in, out []byte) {
					gateway := mac(ifA)
					want := bytes.Join([][]byte{{136, 0}, out[56:58], {0xe0, 0, 0, 0}, f.router.AsSlice(), {2, 1}, gateway[:]}, nil)
					if !same(out[54:], want) {
						t.Errorf("got  %x\nwant %x", out[54:], want)
					}
					if sound, known := l4Sound(out); !sound || !known {
						t.Error("wrong checksum")
					}
				}},
				{at: fromA, raw: relayed, want: unanswered()}, // not from this link
				{at: fromA, raw: discovery(135, f.a, addr("ff02::1:ff00:b"), f.b), want: unanswered()},
				{at: fromA, raw: discovery(133, f.a, addr("ff02::2"), f.b), want: unanswered()},
				{at: fromA, raw: discovery(136, f.a, f.b, f.router), want: unanswered()},
				{at: fromA, raw: discovery(137, f.a, f.b, f.router), want: dropped(bpf.DropICMPv6)},
				{at: fromA, raw: discovery(143, f.a, f.multicast, f.router), want: unanswered()},
			}
		}},
		{name: "to all listeners from the node", steps: func(f family) []step {
			return []step{{at: local, pkt: packet{src: f.router, dst: f.multicast, l4: "udp", sport: 1, dport: 2}, want: unanswered()}}
		}},
	})
}

func TestMasquerading(t *testing.T) {
	protocols := func(do func(name string, p packet) test) (tests []test) {
		for name, p := range map[string]packet{
			"TCP": {l4: "tcp", sport: 1000, dport: 80, flags: "S"}, "UDP": {l4: "udp", sport: 1000, dport: 53}, "UDP without checksum": {l4: "udp", sport: 1000, dport: 53, uncounted: true},
			"echo": {l4: "echo", sport: 77}, "SCTP": {l4: "sctp", sport: 1000, dport: 5000}, "GRE": {l4: "gre"}, "odd length": {l4: "udp", sport: 1000, dport: 53, size: 33},
		} {
			tests = append(tests, do(name, p))
		}
		return tests
	}
	from := func(p packet, f family) packet { p.src, p.dst = f.a, f.outside; return p }
	tests := protocols(func(name string, p packet) test {
		return test{name: name, steps: func(f family) []step {
			p := from(p, f)
			if p.uncounted && f.v6 {
				return nil
			}
			port := p.sport
			if p.l4 == "gre" {
				port = 0
			}
			return []step{
				{at: fromA, pkt: p, want: egress(bpf.SlowNew), check: translated(f)},
				{at: netdev, reply: true, want: peer(ifA, bpf.SlowNot), check: restored(f, port)},
				{at: fromA, pkt: p, want: egress(bpf.SlowNot), check: translated(f)},
				{do: raise},
				{at: netdev, reply: true, want: peer(ifA, bpf.SlowMasquerade), check: restored(f, port)},
				{at: fromA, pkt: p, want: egress(bpf.SlowEpoch), check: translated(f)},
			}
		}}
	})
	tests = append(tests, protocols(func(name string, p packet) test {
		return test{name: "by the stack, " + name, config: "legacy", steps: func(f family) []step {
			p := from(p, f)
			if p.uncounted && f.v6 {
				return nil
			}
			return []step{
				{at: fromA, pkt: p, want: host(bpf.SlowNew)},
				{at: leaving, pkt: p, want: pass(bpf.SlowMasquerade), check: translated(f)},
				{at: netdev, reply: true, want: pass(bpf.SlowMasquerade), check: func(t *testing.T, in, out []byte) {
					if h := read(out); h.dst != f.a {
						t.Errorf("to %s, want %s", h.dst, f.a)
					}
				}},
			}
		}}
	})...)
	udp := func(f family) packet {
		return packet{src: f.a, dst: f.outside, l4: "udp", sport: 1000, dport: 53}
	}
	tests = append(tests, []test{
		{name: "fragments", steps: func(f family) []step {
			p := func(off uint16, more bool) packet {
				q := udp(f)
				q.fragment = &fragment{5, off, more}
				return q
			}
			return []step{
				{at: fromA, pkt: p(0, true), want: egress(bpf.SlowFragment), check: translated(f)},
				{at: fromA, pkt: p(16, false), want: egress(bpf.SlowFragment), check: translated(f)},
			}
		}},
		{name: "off", config: "no masquerading", steps: func(f family) []step {
			return []step{{at: fromA, pkt: udp(f), want: egress(bpf.SlowNew)}, {at: leaving, pkt: udp(f), want: pass()}}
		}},
		{name: "packets that are done pass unread", steps: func(f family) []step {
			return []step{{at: leaving, pkt: packet{src: f.node, dst: f.outside, l4: "udp", sport: 1, dport: 2}, want: pass()}}
		}},
		{name: "not inside the cluster", config: "legacy", steps: func(f family) []step {
			return []step{
				{at: leaving, pkt: packet{src: f.a, dst: f.far, l4: "udp", sport: 1, dport: 2}, want: pass(bpf.SlowNot)},
				{at: leaving, pkt: packet{src: f.a, dst: f.peer, l4: "udp", sport: 1, dport: 2}, want: pass(bpf.SlowNot)},
			}
		}},
		{name: "by a neighbour that is checked", steps: func(f family) []step {
			return []step{
				{at: fromA, pkt: udp(f), want: egress(bpf.SlowNew), check: translated(f)},
				{do: later},
				{at: fromA, pkt: udp(f), want: neighbour(bpf.SlowDeadline), check: translated(f)},
			}
		}},
		{name: "reply with TTL 1", steps: func(f family) []step {
			return []step{
				{at: fromA, pkt: udp(f), want: egress(bpf.SlowNew)},
				{at: func(raw []byte) input {
					if f.v6 {
						raw[21] = 1
					} else {
						raw[22] = 1
					}
					mend(raw)
					return netdev(raw)
				}, reply: true, want: pass(bpf.SlowTTL)},
			}
		}},
		{name: "no free port", config: "one port", steps: func(f family) []step {
			other := udp(f)
			other.sport++
			return []step{
				{at: fromA, pkt: udp(f), want: egress(bpf.SlowNew)},
				{at: fromA, pkt: other, want: dropped(bpf.DropNATExhausted)},
				{do: expire},
				{at: fromA, pkt: other, want: egress(bpf.SlowUndecided)},
			}
		}},
		{name: "a port that went to another connection stays there", config: "one port", steps: func(f family) []step {
			other := udp(f)
			other.sport++
			return []step{
				{at: fromA, pkt: udp(f), want: egress(bpf.SlowNew)},
				{do: expire},
				{at: fromA, pkt: other, want: egress(bpf.SlowNew)},
				{at: fromA, pkt: udp(f), want: dropped(bpf.DropNATExhausted)},
				{at: fromA, pkt: other, want: egress(bpf.SlowNot)},
				{at: netdev, reply: true, want: peer(ifA, bpf.SlowNot), check: restored(f, other.sport)},
			}
		}},
		{name: "SCTP keeps its ports, once", steps: func(f family) []step {
			p := packet{src: f.a, dst: f.outside, l4: "sctp", sport: 1, dport: 2}
			q := p
			q.src = f.b
			return []step{{at: fromA, pkt: p, want: egress(bpf.SlowNew)}, {at: fromB, pkt: q, want: dropped(bpf.DropNATExhausted)}}
		}},
		{name: "late fragment of a forgotten echo", steps: func(f family) []step {
			p := func(off uint16, more bool) packet {
				return packet{src: f.a, dst: f.outside, l4: "echo", sport: 9, fragment: &fragment{5, off, more}}
			}
			return []step{
				{at: fromA, pkt: p(0, true), want: egress(bpf.SlowFragment)},
				{do: func(t *testing.T, p *programs) {
					for k := range p.conns(t) {
						if err := p.dp.Map("lash_conn").Delete(&k); err != nil {
							t.Fatal(err)
						}
					}
				}},
				{at: fromA, pkt: p(16, false), want: dropped(bpf.DropNATProto)},
			}
		}},
		{name: "answers for a pod that is gone", steps: func(f family) []step {
			var out []byte
			gone := func(yes bool) func(*testing.T, *programs) {
				return func(t *testing.T, p *programs) {
					if err := p.endpoint(f.a, ifA, yes); err != nil {
						t.Fatal(err)
					}
				}
			}
			return []step{
				{at: fromA, pkt: udp(f), want: egress(bpf.SlowNew), check: func(_ *testing.T, _, frame []byte) { out = frame }},
				{do: gone(true)},
				{do: raise},
				{at: func([]byte) input {
					return netdev(frame(packet{src: f.peer, dst: f.node, l4: "error", quoted: out}))
				}, raw: []byte{0}, want: dropped(bpf.DropUnroutable)},
				{at: func([]byte) input { return netdev(answer(out)) }, raw: []byte{0}, want: dropped(bpf.DropUnroutable)},
				{do: gone(false)},
			}
		}},
		{name: "echo reply that nobody asked for", steps: func(f family) []step {
			return []step{{at: fromA, pkt: packet{src: f.a, dst: f.outside, l4: "answer", dport: 9}, want: dropped(bpf.DropNATProto)}}
		}},
		{name: "no pod CIDRs", config: "no pod CIDRs", steps: func(f family) []step {
			return []step{
				{at: fromA, pkt: udp(f), want: egress(bpf.SlowNew), check: translated(f)},
				{at: netdev, reply: true, want: peer(ifA, bpf.SlowNot), check: restored(f, 1000)},
				{at: netdev, pkt: packet{src: f.far, dst: f.b, l4: "udp", sport: 1, dport: 2}, want: peer(ifB, bpf.SlowNew)},
				{at: netdev, pkt: packet{src: f.far, dst: f.node, l4: "udp", sport: 1, dport: 2}, want: pass()},
			}
		}},
	}...)
	runTests(t, tests)
}

// ICMP errors about masqueraded packets, from outside and by the pod.
func TestErrorsAboutMasqueradedPackets(t *testing.T) {
	var tests []test
	for name, p := range map[string]packet{
		"TCP": {l4: "tcp", sport: 1000, dport: 80, flags: "S"}, "UDP": {l4: "udp", sport: 1000, dport: 53}, "UDP without checksum": {l4: "udp", sport: 1000, dport: 53, uncounted: true},
		"echo": {l4: "echo", sport: 77}, "odd length": {l4: "udp", sport: 1000, dport: 53, size: 33}, "GRE": {l4: "gre"}, "SCTP": {l4: "sctp", sport: 1000, dport: 5000},
	} {
		sent := func(f family) packet { q := p; q.src, q.dst = f.a, f.outside; return q }
		for _, icmp := range []uint8{0, 11} {
			tests = append(tests, test{name: "from outside, about " + name + map[uint8]string{0: "", 11: ", other type"}[icmp], steps: func(f family) []step {
				if f.v6 && p.uncounted {
					return nil
				}
				if f.v6 && icmp != 0 {
					icmp = 3
				}
				var out []byte
				report := &packet{}
				return []step{
					{at: fromA, pkt: sent(f), want: egress(bpf.SlowNew), check: func(_ *testing.T, _, frame []byte) { out = frame }},
					{at: func([]byte) input {
						*report = packet{src: f.peer, dst: f.node, l4: "error", quoted: out, icmp: icmp}
						return netdev(frame(*report))
					}, raw: []byte{0}, want: peer(ifA, bpf.SlowICMPError), check: func(t *testing.T, in, got []byte) {
						// The pod finds quoted what it sent, but for the TTL and the L4 checksum that left the node.
						in4, quoted := frame(sent(f)), read(got)
						inner := append(append([]byte(nil), in4[:14]...), got[quoted.l4+8:]...)
						if h, w := read(inner), read(in4); h == nil || h.src != w.src || h.dst != w.dst || h.sport != w.sport || h.dport != w.dport || h.proto != w.proto {
							t.Errorf("quotes %+v\nwant %+v", h, w)
						} else if !ipSound(inner) {
							t.Error("the quoted header's checksum is wrong")
						}
						if quoted.dst != f.a {
							t.Errorf("to %s", quoted.dst)
						}
					}},
				}
			}})
		}
		tests = append(tests, test{name: "by the pod, about " + name, steps: func(f family) []step {
			if f.v6 && p.uncounted {
				return nil
			}
			var away, back []byte
			return []step{
				{at: fromA, pkt: sent(f), want: egress(bpf.SlowNew), check: func(_ *testing.T, _, frame []byte) { away = frame }},
				{at: netdev, reply: true, want: peer(ifA, bpf.SlowNot), check: func(_ *testing.T, _, frame []byte) { back = frame }},
				{at: func([]byte) input {
					return fromA(frame(packet{src: f.a, dst: f.outside, l4: "error", quoted: back}))
				}, raw: []byte{0}, want: egress(bpf.SlowICMPError), check: func(t *testing.T, in, got []byte) {
					h := read(got)
					inner := append(append([]byte(nil), got[:14]...), got[h.l4+8:]...)
					q, w := read(inner), read(answer(away))
					if h.src != f.node {
						t.Errorf("from %s", h.src)
					}
					if q == nil || q.src != w.src || q.dst != w.dst || q.sport != w.sport || q.dport != w.dport {
						t.Errorf("quotes %+v\nwant %+v", q, w)
					} else if !ipSound(inner) {
						t.Error("the quoted header's checksum is wrong")
					}
				}},
			}
		}})
	}
	tests = append(tests,
		test{name: "about the node's own", steps: func(f family) []step {
			return []step{{at: netdev, pkt: packet{src: f.peer, dst: f.node, l4: "error", quoted: frame(packet{src: f.node, dst: f.outside, l4: "udp", sport: 1, dport: 2})}, want: pass()}}
		}},
		test{name: "between pods", steps: func(f family) []step {
			return []step{{at: fromA, pkt: packet{src: f.a, dst: f.b, l4: "error", quoted: frame(packet{src: f.b, dst: f.a, l4: "udp", sport: 1, dport: 2})}, want: peer(ifB, bpf.SlowICMPError)}}
		}},
		test{name: "that quotes too little", steps: func(f family) []step {
			p := packet{src: f.a, dst: f.outside, l4: "error", size: 8}
			q := packet{src: f.peer, dst: f.node, l4: "error", size: 8}
			return []step{{at: fromA, pkt: p, want: dropped(bpf.DropCTInvalid)}, {at: netdev, pkt: q, want: pass()}}
		}},
		test{name: "with TTL 1", steps: func(f family) []step {
			var out []byte
			return []step{
				{at: fromA, pkt: packet{src: f.a, dst: f.outside, l4: "udp", sport: 1, dport: 2}, want: egress(bpf.SlowNew), check: func(_ *testing.T, _, frame []byte) { out = frame }},
				{at: func([]byte) input {
					return netdev(frame(packet{src: f.peer, dst: f.node, l4: "error", quoted: out, ttl: 1}))
				}, raw: []byte{0}, want: pass(bpf.SlowTTL)},
			}
		}},
	)
	runTests(t, tests)
}

// A test run's packet has no tunnel metadata: what comes out of a tunnel is test/netns's, but for who may not.
func TestTunnel(t *testing.T) {
	runTests(t, []test{
		{name: "to a pod elsewhere", config: "tunnel", steps: func(f family) []step {
			p := packet{src: f.a, dst: f.far, l4: "tcp", sport: 1000, dport: 80, flags: "S"}
			return []step{
				{at: fromA, pkt: p, want: tunnel(bpf.SlowNew)},
				{at: fromA, pkt: p, want: tunnel(bpf.SlowNot)},
				{do: raise},
				{at: fromA, pkt: p, want: tunnel(bpf.SlowEpoch)},
				{at: local, pkt: packet{src: f.router, dst: f.far, l4: "udp", sport: 1, dport: 2}, want: tunnel(bpf.SlowNew)},
				{at: local, pkt: packet{src: f.router, dst: f.far, l4: "udp", sport: 1, dport: 2}, want: tunnel(bpf.SlowNot)},
			}
		}},
		{name: "to another node, masqueraded", config: "tunnel", steps: func(f family) []step {
			return []step{{at: fromA, pkt: packet{src: f.a, dst: f.peer, l4: "udp", sport: 1, dport: 2}, want: egress(bpf.SlowNew), check: translated(f)}}
		}},
		{name: "encapsulated, or nearly", config: "known node", steps: func(f family) []step {
			p := packet{src: f.peer, dst: f.node, l4: "udp", sport: 1000, dport: 8472}
			first, later, longer, other, pods := p, p, p, p, p
			first.fragment, later.fragment = &fragment{id: 1, more: true}, &fragment{id: 1, offset: 16}
			longer.options, other.l4, pods.dst = []byte{1, 1, 1, 1}, "tcp", f.a
			return []step{
				{at: netdev, pkt: p, want: pass()},
				{at: netdev, pkt: first, want: pass()},
				{at: netdev, pkt: later, want: pass()},
				{at: netdev, pkt: longer, want: pass()},
				{at: netdev, pkt: other, want: pass()},
				{at: netdev, pkt: pods, want: peer(ifA, bpf.SlowNew)},
			}
		}},
		{name: "not from a tunnel", config: "tunnel", steps: func(f family) []step {
			p := packet{src: f.far, dst: f.a, l4: "udp", sport: 1, dport: 2}
			broken := frame(p)
			broken[14] = broken[14]&15 | 0x50
			other := frame(p)
			other[12], other[13] = 0x88, 0xcc
			return []step{
				{at: overlay, pkt: p, want: dropped(bpf.DropTunnelKey)},
				{at: fromA, pkt: packet{src: f.a, dst: f.far, l4: "udp", sport: 2, dport: 1}, want: tunnel(bpf.SlowNew)},
				{at: overlay, pkt: p, want: dropped(bpf.DropTunnelKey)}, // nor as the answer
				{at: overlay, raw: broken, want: dropped(bpf.DropInvalid)},
				{at: overlay, raw: other, want: dropped(bpf.DropUnsupportedL3)},
			}
		}},
	})
}
