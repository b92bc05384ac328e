// SPDX-License-Identifier: Apache-2.0

package packet

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"testing"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"

	"github.com/lash-net/lash/bpf"
)

// portDSR is where nodes take Geneve that tells frontends.
const portDSR = 6081

// wrapSize is what such Geneve puts behind the Ethernet header: IP, UDP, Geneve, and an option with an address and a port.
func wrapSize(v6 bool) int {
	if v6 {
		return 40 + 8 + 8 + 24
	}
	return 20 + 8 + 8 + 12
}

// wrapped is a packet to its backend as a node sends it on, with the frontend that was asked.
func wrapped(node netip.Addr, inner packet, frontend netip.Addr, port uint16) []byte {
	in := frame(inner)
	option := append(append([]byte{0x01, 0x4b, 0x81, byte(frontend.BitLen()/32 + 1)}, frontend.AsSlice()...), byte(port>>8), byte(port), 0, 0)
	proto := []byte{0x08, 0}
	if inner.src.Is6() {
		proto = []byte{0x86, 0xdd}
	}
	geneve := append(append([]byte{byte(len(option) / 4), 0x40}, proto...), 0, 0, 2, 0)
	payload := append(append(geneve, option...), in[14:]...)
	out := frame(packet{src: node, dst: inner.dst, l4: "udp", sport: 50000, dport: portDSR, size: len(payload)})
	at := len(out) - len(payload)
	copy(out[at:], payload)
	out[at-2], out[at-1] = 0, 0 // UDP's checksum
	return out
}

// peeled takes what was wrapped on one side of a program, and not on the other, out of there, so that both can be
// compared. The outer headers are judged here.
func peeled(in input, out outcome) (input, outcome, error) {
	h := read(in.frame)
	if h == nil || in.program != "from_netdev" {
		return in, out, nil
	}
	size := wrapSize(h.v6)
	peel := func(frame []byte) []byte { return append(append([]byte(nil), frame[:14]...), frame[14+size:]...) }
	switch len(out.frame) - len(in.frame) {
	case size:
		outer := read(out.frame)
		if outer == nil || !ipSound(out.frame) || outer.ttl != 63 || outer.proto != protoUDP || outer.dport != portDSR {
			return in, out, fmt.Errorf("wrapped in %+v", outer)
		}
		out.frame, out.wrapped = peel(out.frame), true
		if inner := read(out.frame); inner == nil || inner.dst != outer.dst {
			return in, out, fmt.Errorf("wrapped for %s is a packet for %+v", outer.dst, inner)
		}
	case -size:
		in.frame = peel(in.frame)
	}
	return in, out, nil
}

// A frontend is told in Geneve where the network passes no IP options.
func TestDirectServerReturnByGeneve(t *testing.T) {
	const flags = bpf.FrontendOutside | bpf.FrontendDSR
	var tests []test
	for _, l4 := range []string{"tcp", "udp"} {
		syn := ""
		if l4 == "tcp" {
			syn = "S"
		}
		for _, config := range []string{"dsr by geneve", "dsr by geneve, legacy"} {
			tests = append(tests,
				test{name: l4 + " sent on, " + config, config: config, steps: func(f family) []step {
					p := packet{src: f.outside, dst: vip(f), l4: l4, sport: 1000, dport: portVIP, flags: syn}
					p2 := p
					p2.flags = "A"
					told := tells(f, f.node, vip(f), portVIP)
					steps := []step{
						{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.far, portTarget)}, flags: flags})},
						{at: netdev, pkt: p, want: neighbour(bpf.SlowNew), check: told},
						{at: netdev, pkt: p2, want: egress(bpf.SlowNot), check: ends(f.outside, 1000, f.far, portTarget)},
					}
					if l4 == "tcp" { // sent again, because the first was lost; then by way of this node
						return append(steps, step{at: netdev, pkt: p, want: neighbour(bpf.SlowReopened), check: told})
					}
					return append(steps, step{do: later}, step{at: netdev, pkt: p, want: neighbour(bpf.SlowDeadline), check: told})
				}},
				test{name: l4 + " at the backend's node, " + config, config: config, steps: func(f family) []step {
					p := packet{src: f.outside, dst: f.a, l4: l4, sport: 1000, dport: portTarget, flags: syn}
					ack := p
					ack.flags = "A"
					return []step{
						{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.a, portTarget)}, flags: flags})},
						{at: netdev, raw: wrapped(f.peer, p, vip(f), portVIP), want: peer(ifA, bpf.SlowExtension), check: ends(f.outside, 1000, f.a, portTarget)},
						{at: fromA, pkt: packet{src: f.a, dst: f.outside, l4: l4, sport: portTarget, dport: 1000, flags: "SA"}, want: egress(bpf.SlowNot), check: ends(vip(f), portVIP, f.outside, 1000)},
						{at: netdev, pkt: ack, want: peer(ifA, bpf.SlowNot)},
						{at: netdev, raw: wrapped(f.peer, p, vip(f), portVIP), want: peer(ifA, bpf.SlowExtension)},
					}
				}},
			)
		}
		tests = append(tests,
			test{name: l4 + " at a node that tells by IP options", config: "dsr", steps: func(f family) []step {
				p := packet{src: f.outside, dst: f.a, l4: l4, sport: 1000, dport: portTarget, flags: syn}
				return []step{
					{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.a, portTarget)}, flags: flags})},
					{at: netdev, raw: wrapped(f.peer, p, f.peer, portNode), want: peer(ifA, bpf.SlowExtension)},
					{at: fromA, pkt: packet{src: f.a, dst: f.outside, l4: l4, sport: portTarget, dport: 1000, flags: "SA"}, want: egress(bpf.SlowNot), check: ends(f.peer, portNode, f.outside, 1000)},
				}
			}},
		)
	}
	tests = append(tests,
		test{name: "into the tunnel by an IP option", config: "dsr by geneve, tunnel", steps: func(f family) []step {
			return []step{
				{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.far, portTarget)}, flags: flags})},
				{at: netdev, pkt: packet{src: f.outside, dst: vip(f), l4: "tcp", sport: 1000, dport: portVIP, flags: "S"}, want: tunnel(bpf.SlowNew), check: func(t *testing.T, in, out []byte) {
					if h := read(out); !h.options && h.l4 == 54 || len(out) == len(in) {
						t.Errorf("%d bytes became %d", len(in), len(out))
					}
				}},
			}
		}},
		test{name: "out of another device than that by whose address nodes know each other", config: "dsr by geneve, other device", steps: func(f family) []step {
			return []step{
				{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.far, portTarget)}, flags: flags})},
				{at: netdev, pkt: packet{src: f.outside, dst: vip(f), l4: "tcp", sport: 1000, dport: portVIP, flags: "S"}, want: neighbour(bpf.SlowNew), check: tells(f, f.peer, vip(f), portVIP)},
			}
		}},
		test{name: "too big for Geneve: by way of this node", config: "dsr by geneve", steps: func(f family) []step {
			p := packet{src: f.outside, dst: vip(f), l4: "udp", sport: 1000, dport: portVIP, size: 1500 - wrapSize(f.v6) - 27}
			if f.v6 {
				p.size -= 20
			}
			fits := p
			fits.size--
			fits.sport++
			return []step{
				{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.far, portTarget)}, flags: flags})},
				{at: netdev, pkt: p, want: egress(bpf.SlowNew), check: ends(f.node, 0, f.far, portTarget)},
				{at: netdev, pkt: fits, want: neighbour(bpf.SlowNew)},
			}
		}},
		test{name: "not from a node", config: "dsr by geneve", steps: func(f family) []step {
			p := packet{src: f.outside, dst: f.a, l4: "udp", sport: 1000, dport: portTarget}
			return []step{
				{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.a, portTarget)}, flags: flags})},
				{at: netdev, raw: wrapped(f.outside, p, vip(f), portVIP), want: dropped(bpf.DropUnknownSender)},
			}
		}},
		test{name: "for one pod, with a packet for another", config: "dsr by geneve", steps: func(f family) []step {
			raw := wrapped(f.peer, packet{src: f.outside, dst: f.a, l4: "udp", sport: 1000, dport: portTarget}, vip(f), portVIP)
			other := wrapped(f.peer, packet{src: f.outside, dst: f.b, l4: "udp", sport: 1000, dport: portTarget}, vip(f), portVIP)
			copy(raw[14+wrapSize(f.v6):], other[14+wrapSize(f.v6):])
			return []step{
				{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.a, portTarget)}, flags: flags})},
				{at: netdev, raw: raw, want: dropped(bpf.DropInvalid)},
			}
		}},
		test{name: "a packet that is none", config: "dsr by geneve", steps: func(f family) []step {
			raw := wrapped(f.peer, packet{src: f.outside, dst: f.a, l4: "udp", sport: 1000, dport: portTarget}, vip(f), portVIP)
			raw[14+wrapSize(f.v6)] = 0
			return []step{
				{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.a, portTarget)}, flags: flags})},
				{at: netdev, raw: raw, want: dropped(bpf.DropInvalid)},
			}
		}},
		test{name: "a frontend that there is none of", config: "dsr by geneve", steps: func(f family) []step {
			return []step{
				{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.a, portTarget)}, flags: flags})},
				{at: netdev, raw: wrapped(f.peer, packet{src: f.outside, dst: f.a, l4: "tcp", sport: 1000, dport: portTarget, flags: "S"}, f.outside, 81), want: dropped(bpf.DropNoService)},
			}
		}},
		test{name: "a pod's own Geneve", config: "dsr by geneve", steps: func(f family) []step {
			steps := []step{{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.a, portTarget)}, flags: flags})}}
			inner := packet{src: f.outside, dst: f.a, l4: "udp", sport: 1000, dport: portTarget}
			geneve := 14 + 20 + 8
			if f.v6 {
				geneve += 20
			}
			for i, change := range []func(geneve []byte){
				func(g []byte) { g[0] = 0 },                // no options
				func(g []byte) { g[0] |= 0x40 },            // another version
				func(g []byte) { g[2], g[3] = 0x65, 0x58 }, // a frame
				func(g []byte) { g[9]++ },                  // of another class
				func(g []byte) { g[10]++ },                 // type
				func(g []byte) { g[11]++ },                 // length
			} {
				raw := wrapped(f.peer, inner, vip(f), portVIP)
				change(raw[geneve:])
				why := uint32(bpf.SlowNew)
				if i > 0 {
					why = bpf.SlowNot
				}
				steps = append(steps, step{at: netdev, raw: raw, want: peer(ifA, why), check: func(t *testing.T, in, out []byte) {
					if len(in) != len(out) {
						t.Errorf("%d bytes became %d", len(in), len(out))
					}
				}})
			}
			return append(steps, step{at: netdev, raw: frame(packet{src: f.peer, dst: f.a, l4: "udp", sport: 50001, dport: portDSR, size: 10}), want: peer(ifA, bpf.SlowNew)})
		}},
		test{name: "where it is not in use", config: "bpf", steps: func(f family) []step {
			return []step{
				{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.a, portTarget)}, flags: flags})},
				{at: netdev, raw: wrapped(f.peer, packet{src: f.outside, dst: f.a, l4: "udp", sport: 1000, dport: portTarget}, vip(f), portVIP), want: peer(ifA, bpf.SlowNew), check: ends(f.peer, 50000, f.a, portDSR)},
			}
		}},
	)
	runTests(t, tests)
}

// tells wants a packet of a client outside to the backend elsewhere, in Geneve from that address of the node, as another reads it.
func tells(f family, node, frontend netip.Addr, port uint16) func(*testing.T, []byte, []byte) {
	return func(t *testing.T, in, out []byte) {
		t.Helper()
		p := gopacket.NewPacket(out, layers.LayerTypeEthernet, gopacket.Default)
		if e := p.ErrorLayer(); e != nil {
			t.Fatalf("%v\n%s", e.Error(), p.Dump())
		}
		g, ok := p.Layer(layers.LayerTypeGeneve).(*layers.Geneve)
		if !ok || len(g.Options) != 1 {
			t.Fatalf("no Geneve with an option:\n%s", p.Dump())
		}
		want := binary.BigEndian.AppendUint16(frontend.AsSlice(), port)
		if o := g.Options[0]; o.Class != 0x14b || o.Type != 0x81 || !same(o.Data[:len(want)], want) || !g.CriticalOption || g.VNI != 2 {
			t.Errorf("Geneve %+v, option %+v", *g, *o)
		}
		ends(node, 1000|0xc000, f.far, portDSR)(t, in, out)
		inner := append(append([]byte(nil), out[:14]...), out[14+wrapSize(f.v6):]...)
		ends(f.outside, 1000, f.far, portTarget)(t, in, inner)
		if read(inner).ttl != 64 || len(inner) != len(in) {
			t.Errorf("TTL %d, %d bytes became %d", read(inner).ttl, len(in), len(inner))
		}
	}
}
