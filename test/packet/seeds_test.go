// SPDX-License-Identifier: Apache-2.0

package packet

import "net/netip"

// seeds are one frame of each kind that the tables have, in both families.
func seeds() (out [][]byte) {
	record := []byte{7, 7, 4, 0, 0, 0, 0, 0}
	pad := []byte{0, 1, 4, 0, 0, 0, 0}
	for _, f := range families {
		for _, p := range []packet{
			{l4: "tcp", sport: 1000, dport: 80, flags: "S"}, {l4: "tcp", sport: 1000, dport: 80, flags: "R"}, {l4: "udp", sport: 1000, dport: 53},
			{l4: "udp", sport: 1000, dport: 53, uncounted: true}, {l4: "sctp", sport: 1, dport: 2}, {l4: "echo", sport: 7}, {l4: "answer", dport: 7}, {l4: "gre"},
			{l4: "udp", sport: 1000, dport: 30001}, {l4: "tcp", sport: 80, dport: 30001, flags: "SA"},
			{l4: "udp", sport: 1, dport: 2, ttl: 1}, {l4: "udp", sport: 1, dport: 2, size: 1600}, {l4: "udp", sport: 1, dport: 2, size: 1450},
			{l4: "udp", sport: 1, dport: 2, fragment: &fragment{1, 0, true}}, {l4: "udp", sport: 1, dport: 2, fragment: &fragment{1, 16, false}},
			{l4: "udp", sport: 1, dport: 2, options: record, extensions: []extension{{protoHopByHop, pad}, {protoDestOpts, pad}}},
			{l4: "tcp", sport: 1, dport: 2, options: record, extensions: []extension{{protoRouting, pad}, {protoAH, make([]byte, 7)}}},
			{l4: "error", quoted: frame(packet{src: f.node, dst: f.outside, l4: "udp", sport: 30000, dport: 53})},
			{l4: "error", icmp: 3, quoted: frame(packet{src: f.outside, dst: f.a, l4: "tcp", sport: 80, dport: 1000})},
		} {
			p.src, p.dst = f.a, f.outside
			out = append(out, frame(p))
		}
		for _, to := range []netip.Addr{f.a, f.node} {
			told := option(vip(f), portVIP)
			told.src, told.dst, told.l4, told.sport, told.dport, told.flags = f.outside, to, "tcp", 1000, portTarget, "S"
			out = append(out, frame(told), wrapped(f.peer, packet{src: f.outside, dst: to, l4: "udp", sport: 1000, dport: portTarget}, vip(f), portVIP))
		}
	}
	out = append(out, arp(families[0].a, families[0].router))
	for _, icmpType := range []uint8{133, 135, 136, 137, 143} {
		out = append(out, discovery(icmpType, families[1].a, families[1].b, families[1].router))
	}
	return out
}
