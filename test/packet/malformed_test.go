// SPDX-License-Identifier: Apache-2.0

package packet

import (
	"testing"

	"github.com/lash-net/lash/bpf"
)

func TestMalformedPackets(t *testing.T) {
	broken := func(p packet, change func([]byte) []byte) []byte { return change(frame(p)) }
	runTests(t, []test{
		{name: "headers", steps: func(f family) []step {
			udp := packet{src: f.a, dst: f.b, l4: "udp", sport: 1, dport: 2}
			tcp := packet{src: f.a, dst: f.b, l4: "tcp", sport: 1, dport: 2, flags: "S"}
			echo := packet{src: f.a, dst: f.b, l4: "echo", sport: 1}
			l3 := 20
			if f.v6 {
				l3 = 40
			}
			upTo := func(n int) func([]byte) []byte {
				return func(b []byte) []byte { return b[:14+l3+n] }
			}
			steps := []step{
				{at: fromA, raw: broken(udp, func(b []byte) []byte { b[14] = b[14]&15 | 0x50; return b }), want: dropped(bpf.DropInvalid)},
				{at: fromA, raw: broken(udp, func(b []byte) []byte { b[12], b[13] = 0x88, 0xcc; return b }), want: dropped(bpf.DropUnsupportedL3)},
				{at: fromA, raw: broken(udp, upTo(7)), want: dropped(bpf.DropCTInvalid)},
				{at: fromA, raw: broken(tcp, upTo(13)), want: dropped(bpf.DropCTInvalid)},
				{at: fromA, raw: broken(tcp, upTo(19)), want: dropped(bpf.DropCTInvalid)},
				{at: fromA, raw: broken(echo, upTo(7)), want: dropped(bpf.DropCTInvalid)},
				{at: fromA, raw: broken(udp, upTo(0)), want: dropped(bpf.DropCTInvalid)},
				{at: fromA, raw: broken(tcp, func(b []byte) []byte { b[14+l3+12] = 0x40; return b }), want: dropped(bpf.DropCTInvalid)},
				{at: local, raw: broken(udp, func(b []byte) []byte { b[14] = b[14]&15 | 0x50; return b }), want: dropped(bpf.DropInvalid)},
				{at: local, raw: broken(udp, upTo(7)), want: dropped(bpf.DropCTInvalid)},
				{at: netdev, raw: broken(udp, func(b []byte) []byte { b[14] = b[14]&15 | 0x50; return b }), want: pass()},
				{at: netdev, raw: broken(udp, upTo(7)), want: pass()},
				{at: leaving, raw: broken(udp, upTo(7)), want: pass()},
				{at: local, raw: broken(udp, func(b []byte) []byte { b[12], b[13] = 0x88, 0xcc; return b }), want: unanswered()},
				{at: netdev, raw: broken(udp, func(b []byte) []byte { b[12], b[13] = 0x88, 0xcc; return b }), want: pass()},
				{at: leaving, raw: broken(udp, func(b []byte) []byte { b[12], b[13] = 0x88, 0xcc; return b }), want: pass()},
			}
			if !f.v6 {
				steps = append(steps,
					step{at: fromA, raw: broken(udp, func(b []byte) []byte { b[14] = 0x44; return b }), want: dropped(bpf.DropInvalid)},
					step{at: fromA, raw: broken(udp, func(b []byte) []byte { b[14] = 0x4f; return b[:50] }), want: dropped(bpf.DropInvalid)},
				)
			}
			return steps
		}},
		{name: "options and extension headers without what follows", steps: func(f family) []step {
			steps := []step{}
			for _, l4 := range []string{"udp", "tcp", "echo", "sctp"} {
				p := packet{src: f.a, dst: f.b, l4: l4, sport: 1, dport: 2, options: []byte{1, 1, 1, 1}, extensions: []extension{{protoDestOpts, []byte{0, 1, 4, 0, 0, 0, 0}}}}
				for _, n := range []int{0, 7} {
					steps = append(steps, step{at: fromA, raw: broken(p, func(b []byte) []byte { return b[:read(b).l4+n] }), want: dropped(bpf.DropCTInvalid)})
				}
			}
			return steps
		}},
		{name: "headers cut short", steps: func(f family) []step {
			if f.v6 {
				return nil
			}
			late := frame(packet{src: f.a, dst: f.b, l4: "udp", sport: 1, dport: 2, fragment: &fragment{1, 16, false}})
			late[14] = 0x4f
			return []step{{at: fromA, raw: late, want: dropped(bpf.DropInvalid)}}
		}},
		{name: "extension header cut short", steps: func(f family) []step {
			p := packet{src: f.a, dst: f.b, l4: "udp", sport: 1, dport: 2, extensions: []extension{{protoDestOpts, []byte{0, 1, 4, 0, 0, 0, 0}}}}
			return onlyFor(true, f, []step{{at: fromA, raw: frame(p)[:60], want: dropped(bpf.DropIPv6Extension)}})
		}},
	})
}

func TestWhatTheNodeLacks(t *testing.T) {
	runTests(t, []test{
		{name: "room for connections", config: "two connections", steps: func(f family) []step {
			p := func(sport uint16) packet { return packet{src: f.a, dst: f.b, l4: "udp", sport: sport, dport: 53} }
			return []step{
				{at: fromA, pkt: p(1), want: peer(ifB, bpf.SlowNew)},
				{at: fromA, pkt: p(2), want: peer(ifB, bpf.SlowNew)},
				{at: fromA, pkt: p(3), want: dropped(bpf.DropCTInsert)},
				{at: netdev, pkt: packet{src: f.far, dst: f.a, l4: "udp", sport: 1, dport: 2}, want: dropped(bpf.DropCTInsert)},
				{at: local, pkt: packet{src: f.router, dst: f.a, l4: "udp", sport: 1, dport: 2}, want: dropped(bpf.DropCTInsert)},
				{at: leaving, pkt: packet{src: f.a, dst: f.outside, l4: "udp", sport: 1, dport: 2}, want: dropped(bpf.DropCTInsert)},
				{at: fromA, pkt: p(1), want: peer(ifB, bpf.SlowNot)},
			}
		}},
		{name: "room for translations", config: "two connections", steps: func(f family) []step { // one translation
			p := func(sport uint16) packet { return packet{src: f.a, dst: f.outside, l4: "udp", sport: sport, dport: 53} }
			return []step{{at: fromA, pkt: p(1), want: egress(bpf.SlowNew)}, {at: fromA, pkt: p(2), want: dropped(bpf.DropCTInsert)}}
		}},
		{name: "a FIB that answers", config: "without lash_host", steps: func(f family) []step {
			return []step{{at: fromA, pkt: packet{src: f.a, dst: f.far, l4: "udp", sport: 1, dport: 2}, want: dropped(bpf.DropFIB)}}
		}},
		{name: "a way into pods without the stack", config: "legacy", steps: func(f family) []step {
			return []step{
				{at: fromA, pkt: packet{src: f.a, dst: f.far, l4: "udp", sport: 1, dport: 2}, want: host(bpf.SlowNew)},
				{at: netdev, pkt: packet{src: f.far, dst: f.a, l4: "udp", sport: 2, dport: 1}, want: pass()},
				{at: local, pkt: packet{src: f.far, dst: f.a, l4: "udp", sport: 2, dport: 1}, want: peer(ifA, bpf.SlowUndecided)},
			}
		}},
	})
}
