// SPDX-License-Identifier: Apache-2.0

package packet

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"testing"

	"github.com/lash-net/lash/bpf"
	"github.com/lash-net/lash/internal/datapath"
	"github.com/lash-net/lash/internal/testutil"
)

// outerSize is what the tunnel puts before a frame: Ethernet, IPv4, UDP, VXLAN or Geneve without options.
const outerSize = 14 + 20 + 8 + 8

// encapsulated is the frame as the other node sends it to this one.
func encapsulated(inner []byte, change func(outer []byte)) []byte {
	f := families[0]
	out := frame(packet{src: f.peer, dst: f.node, l4: "udp", sport: 50000, dport: 8472, size: 8 + len(inner)})
	binary.BigEndian.PutUint32(out[42:], 0x08000000)
	binary.BigEndian.PutUint32(out[46:], 1001<<8)
	out[40], out[41] = 0, 0
	copy(out[outerSize:], inner)
	if change != nil {
		change(out)
		mend(out)
	}
	return out
}

// takenOut: from_netdev has taken the packet out of the tunnel. It is then as if the tunnel's device had handed what was
// in it to from_overlay.
func takenOut(in input, out outcome) (input, bool) {
	taken := in.program == "from_netdev" && len(out.frame) == len(in.frame)-outerSize
	if taken {
		in.program, in.ifindex, in.frame = "from_overlay", ifOverlay, in.frame[outerSize:]
	}
	return in, taken
}

// takesOut: the kernel can uncover a packet of that family.
func takesOut(t testing.TB, v6 bool) bool { return !v6 || testutil.KernelAtLeast(t, 6, 3) }

// What other nodes encapsulate is taken out where it arrives, if a decision holds for it; the tunnel's device gets
// everything else, as it was.
func TestEncapsulated(t *testing.T) {
	into := func(f family, why ...uint32) want {
		if !takesOut(t, f.v6) {
			return pass()
		}
		return peer(ifA, why...)
	}
	known := func(f family, inner packet, steps ...step) []step {
		first := packet{src: inner.dst, dst: inner.src, l4: inner.l4, sport: inner.dport, dport: inner.sport, flags: "S"}
		return append([]step{{at: fromA, pkt: first, want: tunnel(bpf.SlowNew)}}, steps...)
	}
	runTests(t, []test{
		{name: "to a pod", config: "known node", steps: func(f family) []step {
			reply := packet{src: f.far, dst: f.a, l4: "tcp", sport: 80, dport: 1000, flags: "SA"}
			more, small := reply, reply
			more.flags, more.size = "A", 1300
			small.l4, small.size, small.sport = "udp", 12, 53
			return append(known(f, reply,
				step{at: netdev, raw: encapsulated(frame(reply), nil), want: into(f, bpf.SlowNot)},
				step{at: netdev, raw: encapsulated(frame(more), nil), want: into(f, bpf.SlowNot)},
				step{at: netdev, raw: encapsulated(frame(more), func(b []byte) { b[15] = 2 }), want: into(f, bpf.SlowNot)},    // it could have told of congestion
				step{at: netdev, raw: encapsulated(frame(more), func(b []byte) { b[46] = 0xff }), want: into(f, bpf.SlowNot)}, // the identity counts where something is decided
				step{do: raise},
				step{at: netdev, raw: encapsulated(frame(more), nil), want: pass()},
			), known(f, small, step{at: netdev, raw: encapsulated(frame(small), nil), want: into(f, bpf.SlowNot)})...)
		}},
		{name: "an answer of a service's backend", config: "known node", steps: func(f family) []step {
			svc := servicePort{id: 1, backends: []netip.AddrPort{at(f.far, portTarget)}}
			return []step{
				{do: func(t *testing.T, p *programs) { svc.put(t, p, f) }},
				{at: fromA, pkt: packet{src: f.a, dst: vip(f), l4: "tcp", sport: 1000, dport: portVIP, flags: "S"}, want: tunnel(bpf.SlowNew)},
				{at: netdev, raw: encapsulated(frame(packet{src: f.far, dst: f.a, l4: "tcp", sport: portTarget, dport: 1000, flags: "SA"}), nil), want: into(f, bpf.SlowNot),
					check: func(t *testing.T, in, out []byte) {
						if h := read(out); takesOut(t, f.v6) && (h.src != vip(f) || h.sport != portVIP) {
							t.Errorf("the answer comes from %s, port %d", h.src, h.sport)
						}
					}},
			}
		}},
		{name: "for the device", config: "known node", steps: func(f family) []step {
			reply := packet{src: f.far, dst: f.a, l4: "tcp", sport: 80, dport: 1000, flags: "SA"}
			stranger, last, opens, echo, bits := reply, reply, reply, reply, reply
			stranger.dport, last.ttl, opens.flags, echo.l4 = 1001, 1, "S", "echo"
			bits.fragment = &fragment{id: 1, more: true}
			steps := known(f, reply)
			for _, raw := range [][]byte{
				encapsulated(frame(stranger), nil),
				encapsulated(frame(last), nil),
				encapsulated(frame(echo), nil),
				encapsulated(frame(bits), nil),
				encapsulated(arp(families[0].far, families[0].a), nil),
				encapsulated(frame(reply), nil)[:outerSize+14+20+19], // cut off
				encapsulated(frame(reply), nil)[:outerSize],
				encapsulated(frame(reply), func(b []byte) { b[29] = 13 }),                                     // another node
				encapsulated(frame(reply), func(b []byte) { b[15] = 3 }),                                      // congestion was met
				encapsulated(frame(reply), func(b []byte) { b[40] = 1 }),                                      // a checksum
				encapsulated(frame(reply), func(b []byte) { b[42] = 0 }),                                      // no VNI
				encapsulated(frame(reply), func(b []byte) { b[42] = 0x88 }),                                   // other extensions'
				encapsulated(frame(reply), func(b []byte) { b[49] = 1 }),                                      // bits
				encapsulated(frame(reply), func(b []byte) { binary.BigEndian.PutUint32(b[42:], 0x00006558) }), // Geneve
				encapsulated(frame(reply), func(b []byte) { b[37]++ }),                                        // another port
				encapsulated(frame(reply), func(b []byte) { binary.BigEndian.PutUint16(b[20:], 0x2000) }),     // a fragment
				encapsulated(frame(reply), func(b []byte) { b[outerSize+12], b[outerSize+13] = 0x81, 0 }),     // a tag
				encapsulated(frame(reply), func(b []byte) { b[outerSize+12], b[outerSize+13] = 0x88, 0xcc }),  // something else than IP
			} {
				steps = append(steps, step{at: netdev, raw: raw, want: pass()})
			}
			other := func(b []byte) input {
				in := netdev(b)
				in.frame = addressed(b, mac(ifOther))
				return in
			}
			return append(steps,
				step{at: other, raw: encapsulated(frame(reply), nil), want: pass()}, // to another MAC address
				step{at: netdev, raw: encapsulated(frame(reply), nil), want: into(f, bpf.SlowNot)},
				step{do: func(t *testing.T, p *programs) {
					p.change(t, func(_ *bpf.ConnKey, c *bpf.Conn) { c.Reply.Action = bpf.ActionHost })
				}},
				step{at: netdev, raw: encapsulated(frame(reply), nil), want: pass()}) // up the stack anyway
		}},
		{name: "Geneve", config: "geneve", steps: func(f family) []step {
			reply := packet{src: f.far, dst: f.a, l4: "udp", sport: 53, dport: 1000}
			geneve := func(head uint32) []byte {
				return encapsulated(frame(reply), func(b []byte) { binary.BigEndian.PutUint32(b[42:], head) })
			}
			return known(f, reply,
				step{at: netdev, raw: geneve(0x00006558), want: into(f, bpf.SlowNot)},
				step{at: netdev, raw: geneve(0x01006558), want: pass()}, // an option
				step{at: netdev, raw: geneve(0x00406558), want: pass()}, // that matters
				step{at: netdev, raw: geneve(0x08000000), want: pass()})
		}},
		{name: "legacy host routing", config: "known node, legacy", steps: func(f family) []step {
			reply := packet{src: f.far, dst: f.a, l4: "tcp", sport: 80, dport: 1000, flags: "SA"}
			return known(f, reply, step{at: netdev, raw: encapsulated(frame(reply), nil), want: pass()})
		}},
	})
}

// Every bit of the outer headers either is as it must be, or means nothing to who takes them off.
func TestChangedEncapsulation(t *testing.T) {
	free := map[int]byte{
		15: 0xff,                                                                       // TOS, of which no single bit is congestion
		16: 0xff, 17: 0xff, 18: 0xff, 19: 0xff, 20: 0xc0, 22: 0xff, 24: 0xff, 25: 0xff, // length, identification, DF, TTL, checksum
		34: 0xff, 35: 0xff, 38: 0xff, 39: 0xff, // source port, length
		46: 0xff, 47: 0xff, 48: 0xff, // VNI
	}
	for at := 6; at < 12; at++ {
		free[at] = 0xff // the source's MAC address
	}
	inEachFamily(t, "known node", func(t *testing.T, f family, p *programs) {
		if !takesOut(t, f.v6) {
			t.Skip("this kernel leaves IPv6 in IPv4 to the tunnel's device")
		}
		p.must(t, fromA(frame(packet{src: f.a, dst: f.far, l4: "tcp", sport: 1000, dport: 80, flags: "S"})), tunnel(bpf.SlowNew))
		whole := netdev(encapsulated(frame(packet{src: f.far, dst: f.a, l4: "tcp", sport: 80, dport: 1000, flags: "A"}), nil)).frame
		for at := range outerSize {
			for bit := range 8 {
				in := input{program: "from_netdev", ifindex: ifEth0, frame: slices.Clone(whole), mark: 0x80000001}
				in.frame[at] ^= 1 << bit
				out, err := p.run(in)
				if err != nil {
					t.Fatal(err)
				}
				p.count(t, &out)
				as, taken := takenOut(in, out)
				if want := free[at]&(1<<bit) != 0; taken != want {
					t.Errorf("byte %d, bit %d changed: taken out %v, want %v", at, bit, taken, want)
				}
				if err := judge(as, out); err != nil {
					t.Errorf("byte %d, bit %d changed: %v", at, bit, err)
				}
			}
		}
	})
}

func init() {
	for name, more := range map[string]func(*datapath.Config){
		"geneve":             func(c *datapath.Config) { c.TunnelGeneve = true },
		"known node, legacy": func(c *datapath.Config) { c.HostRouting = false },
	} {
		configs[name] = func(c *datapath.Config) {
			configs["known node"](c)
			more(c)
		}
	}
}

// tunnelled is a frame of another node's pod as it arrives.
func tunnelled(f []byte) input { return netdev(encapsulated(f, nil)) }
