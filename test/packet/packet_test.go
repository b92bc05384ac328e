// SPDX-License-Identifier: Apache-2.0

package packet

import (
	"encoding/binary"
	"fmt"
	"maps"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/lash-net/lash/bpf"
	"github.com/lash-net/lash/internal/datapath"
	"github.com/lash-net/lash/internal/model"
)

// want is what must become of a packet.
type want struct {
	verdict int32
	action  uint32
	ifindex uint32
	drop    uint8    // reason
	counted []uint32 // enum slow_reason, of the program's hook
}

func peer(ifindex uint32, why ...uint32) want {
	return want{verdict: verdictRedirect, action: bpf.ActionPeer, ifindex: ifindex, counted: why}
}
func egress(why ...uint32) want {
	return want{verdict: verdictRedirect, action: bpf.ActionEgress, ifindex: ifEth0, counted: why}
}
func neighbour(why ...uint32) want {
	return want{verdict: verdictRedirect, action: bpf.ActionNeigh, ifindex: ifEth0, counted: why}
}
func host(why ...uint32) want {
	return want{verdict: verdictRedirect, action: bpf.ActionHost, ifindex: ifHost, counted: why}
}
func tunnel(why ...uint32) want {
	return want{verdict: verdictRedirect, action: bpf.ActionTunnel, ifindex: ifOverlay, counted: why}
}
func pass(why ...uint32) want   { return want{verdict: verdictOK, counted: why} }
func dropped(reason uint8) want { return want{verdict: verdictDrop, drop: reason} }

// unanswered is a question to which silence is the answer.
func unanswered() want { return want{verdict: verdictDrop} }

// step is one packet at one hook, or something that happens between packets.
type step struct {
	at    func(frame []byte) input
	pkt   packet
	raw   []byte // instead of pkt
	reply bool   // the packet before, turned round, as the other side would answer
	do    func(t *testing.T, p *programs)
	want  want
	check func(t *testing.T, in, out []byte)
	gso   uint32
}

// Hooks with their devices.
func fromA(f []byte) input { return input{program: "from_container", ifindex: ifA, frame: f} }
func fromB(f []byte) input { return input{program: "from_container", ifindex: ifB, frame: f} }
func netdev(f []byte) input {
	return input{program: "from_netdev", ifindex: ifEth0, frame: addressed(f, mac(ifEth0))}
}
func wire(f []byte) input {
	return input{program: "xdp_entry", ifindex: ifEth0, frame: addressed(f, mac(ifEth0))}
}
func leaving(f []byte) input { return input{program: "to_netdev", ifindex: ifEth0, frame: f} }
func overlay(f []byte) input {
	return input{program: "from_overlay", ifindex: ifOverlay, frame: f}
}
func local(f []byte) input { return input{program: "from_host", ifindex: ifHost, frame: f} }

type test struct {
	name   string
	config string // key of configs; "" is "bpf"
	steps  func(f family) []step
}

var configs = map[string]func(*datapath.Config){
	"bpf":    nil,
	"legacy": func(c *datapath.Config) { c.HostRouting = false },
	"no masquerading": func(c *datapath.Config) {
		c.Masquerade4, c.Masquerade6 = false, false
	},
	"no pod CIDRs": func(c *datapath.Config) { c.PodCIDRs = nil },
	"tunnel":       func(c *datapath.Config) { c.OverlayIfindex, c.TunnelPort = ifOverlay, 8472 },
	"known node": func(c *datapath.Config) {
		c.OverlayIfindex, c.TunnelPort, c.NodeAddrs = ifOverlay, 8472, []netip.Addr{families[0].node, families[1].node}
	},
	"drop":            func(c *datapath.Config) { c.DropNoBackend = true },
	"without routers": func(c *datapath.Config) { c.Routers = nil },
	"kube-proxy":      func(c *datapath.Config) { c.NoServices = true },
	"dsr":             func(c *datapath.Config) { c.DSR, c.DSRPort = true, portDSR },
	"dsr, legacy":     func(c *datapath.Config) { c.DSR, c.DSRPort, c.HostRouting = true, portDSR, false },
	"dsr by geneve":   func(c *datapath.Config) { c.DSR, c.DSRGeneve, c.DSRPort = true, true, portDSR },
	"dsr by geneve, other device": func(c *datapath.Config) {
		c.DSR, c.DSRGeneve, c.DSRPort, c.NodeAddrs = true, true, portDSR, []netip.Addr{families[0].peer, families[1].peer}
	},
	"dsr by geneve, legacy": func(c *datapath.Config) {
		c.DSR, c.DSRGeneve, c.DSRPort, c.HostRouting = true, true, portDSR, false
	},
	"dsr by geneve, tunnel": func(c *datapath.Config) {
		c.DSR, c.DSRGeneve, c.DSRPort, c.OverlayIfindex, c.TunnelPort, c.TunnelMTU = true, true, portDSR, ifOverlay, 8472, 1450
	},
	"one port": func(c *datapath.Config) { c.SNATMin, c.SNATMax = 30000, 30000 },
	"all ports": func(c *datapath.Config) {
		c.SNATMin, c.SNATMax, c.SNATFarMin, c.SNATFarMax, c.ConnMax = 1024, 29999, 32768, 65535, 1<<18
	},
	"one port by the tunnel": func(c *datapath.Config) {
		c.SNATMin, c.SNATMax, c.OverlayIfindex, c.TunnelPort = 30000, 30000, ifOverlay, 8472
	},
	"few connections":   func(c *datapath.Config) { c.SNATMin, c.SNATMax = 1024, 39999 },
	"two connections":   func(c *datapath.Config) { c.ConnMax = 2 },
	"without lash_host": func(c *datapath.Config) { c.HostIfindex = 4000 },
}

// addressed is the frame with a destination's MAC address.
func addressed(frame []byte, to model.MAC) []byte {
	out := append([]byte(nil), frame...)
	if len(out) >= len(to) {
		copy(out, to[:])
	}
	return out
}

// answer turns a frame round: both addresses and ports change sides, an echo becomes its reply.
func answer(frame []byte) []byte {
	out := append([]byte(nil), frame...)
	h := read(frame)
	src, dst := h.src.AsSlice(), h.dst.AsSlice()
	at := 26
	if h.v6 {
		at = 22
	}
	copy(out[at:], dst)
	copy(out[at+len(dst):], src)
	switch h.proto {
	case protoTCP, protoUDP, protoSCTP:
		binary.BigEndian.PutUint16(out[h.l4:], h.dport)
		binary.BigEndian.PutUint16(out[h.l4+2:], h.sport)
	case protoICMP:
		out[h.l4] = 0
	case protoICMPv6:
		out[h.l4] = 129
	}
	if h.v6 {
		out[21] = 64
	} else {
		out[22] = 64
	}
	mend(out)
	return out
}

func runTests(t *testing.T, tests []test) {
	n := theNode(t)
	for _, tt := range tests {
		for _, f := range families {
			steps := tt.steps(f)
			if steps == nil {
				continue
			}
			t.Run(tt.name+"/"+f.name, func(t *testing.T) {
				config := tt.config
				if config == "" {
					config = "bpf"
				}
				p := n.load(t, config)
				p.forget(t)
				p.unserve(t)
				var last []byte
				for i, s := range steps {
					if !t.Run(fmt.Sprint(i+1), func(t *testing.T) {
						if s.do == nil {
							unhurried(t, p)
						}
						last = p.step(t, s, last)
					}) {
						break
					}
				}
			})
		}
	}
}

func (p *programs) step(t *testing.T, s step, last []byte) []byte {
	if s.do != nil {
		s.do(t, p)
		return last
	}
	raw := s.raw
	switch {
	case s.reply:
		raw = answer(last)
	case raw == nil:
		raw = frame(s.pkt)
	}
	in := s.at(raw)
	in.gso, in.summed = s.gso, p.sums && read(raw) != nil && in.program != "xdp_entry"
	in.mark, in.serving = 0x80000001, p.serving
	out, err := p.run(in)
	if err != nil {
		t.Fatalf("%v\nin %x", err, in.frame)
	}
	p.count(t, &out)
	in, _ = takenOut(in, out)
	if err := judge(in, out); err != nil {
		t.Errorf("%v\nin  %x\nout %x", err, in.frame, out.frame)
	}
	got := want{verdict: out.verdict, action: out.action, ifindex: out.ifindex}
	if out.verdict != verdictRedirect {
		got.action, got.ifindex = 0, 0
	}
	for key := range out.drops {
		got.drop = key.Reason
	}
	wanted := map[uint32]uint64{}
	for _, why := range s.want.counted {
		wanted[uint32(hookOf[in.program])*bpf.CountRows+why]++
	}
	s.want.counted = nil
	if diff := cmp.Diff(s.want, got, cmp.AllowUnexported(want{})); diff != "" {
		t.Errorf("-want +got:\n%s\nin %x", diff, in.frame)
	}
	if s.want.verdict != verdictDrop && !maps.Equal(wanted, out.counts) {
		t.Errorf("counted %v, want %v (row = hook*%d + reason)", out.counts, wanted, bpf.CountRows)
	}
	if s.check != nil {
		s.check(t, in.frame, out.frame)
	}
	return out.frame
}
