// SPDX-License-Identifier: Apache-2.0

package packet

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/lash-net/lash/bpf"
)

var hookOf = map[string]uint8{
	"from_container": bpf.HookPod, "from_netdev": bpf.HookNetdev, "from_host": bpf.HookHost, "to_netdev": bpf.HookNetdevOut, "from_overlay": bpf.HookOverlay, "xdp_entry": bpf.HookXDP,
}

// verdicts are those a program may return.
var verdicts = map[string][]int32{
	"from_container": {verdictRedirect, verdictDrop},
	"from_netdev":    {verdictRedirect, verdictDrop, verdictOK},
	"from_host":      {verdictRedirect, verdictDrop},
	"to_netdev":      {verdictDrop, verdictOK},
	"from_overlay":   {verdictRedirect, verdictDrop},
	"xdp_entry":      {verdictRedirect, verdictDrop, verdictOK},
}

// judge tells what is wrong with an outcome whatever the packet was. It needs no
// expectations, so that tables and fuzzers share it.
func judge(in input, out outcome) error {
	if !slices.Contains(verdicts[in.program], out.verdict) {
		return fmt.Errorf("verdict %d", out.verdict)
	}
	in, out, err := peeled(in, out)
	if err != nil {
		return err
	}
	if grown := len(out.frame) - len(in.frame); grown != 0 && !(in.serving && (grown == 8 || grown == 24)) {
		return fmt.Errorf("%d bytes became %d", len(in.frame), len(out.frame))
	}
	if err := judgeCounters(in, out); err != nil {
		return err
	}
	if out.verdict == verdictDrop {
		return nil
	}
	if in.program == "xdp_entry" && out.verdict == verdictOK {
		if !same(in.frame, out.frame) {
			return fmt.Errorf("passed on to from_netdev, but not as it was")
		}
		return nil
	}
	if out.verdict == verdictRedirect && isAnswer(in, out) {
		return judgeAnswer(in, out)
	}
	if sound, known := l4Sound(in.frame); known && sound {
		if sound, _ := l4Sound(out.frame); !sound {
			return fmt.Errorf("the L4 checksum is wrong now")
		}
	}
	if ipSound(in.frame) && !ipSound(out.frame) {
		return fmt.Errorf("the IPv4 header's checksum is wrong now")
	}
	before, after := read(in.frame), read(out.frame)
	if before == nil {
		if !same(in.frame, out.frame) {
			return fmt.Errorf("a packet that is none was changed")
		}
		return nil
	}
	if after == nil {
		return fmt.Errorf("the packet cannot be read any more")
	}
	if err := judgeRedirect(in, out, before, after); err != nil {
		return err
	}
	return judgeAddresses(in, out, before, after)
}

// silent tells whether a packet may vanish without a count: questions that nobody here has an answer to.
func silent(in input) bool {
	switch h := read(in.frame); {
	case in.program == "from_container" && h == nil:
		return be16(in.frame[12:]) == etherARP
	case in.program == "from_container":
		return h.v6 && h.proto == protoICMPv6 && (h.icmpType >= 131 && h.icmpType <= 136 || h.icmpType == 143)
	case in.program == "from_host" && h == nil:
		return be16(in.frame[12:]) != etherIPv4 && be16(in.frame[12:]) != etherIPv6
	case in.program == "from_host":
		return h.dst.IsMulticast()
	}
	return false
}

func judgeCounters(in input, out outcome) error {
	hook := hookOf[in.program]
	var dropped, counted uint64
	for key, n := range out.drops {
		dropped += n
		if key.Dir != hook || bpf.DropName(key.Reason) == fmt.Sprintf("reason %d", key.Reason) || key.Line == 0 || key.File == 0 {
			return fmt.Errorf("counted as drop %+v", key)
		}
	}
	for row, n := range out.counts {
		counted += n
		if uint8(row/bpf.CountRows) != hook {
			return fmt.Errorf("counted in row %d", row)
		}
	}
	switch {
	case out.verdict != verdictDrop && dropped > 0:
		return fmt.Errorf("not dropped, but counted as such: %v", out.drops)
	case out.verdict == verdictDrop && dropped == 0 && silent(in):
		return nil
	case out.verdict == verdictDrop && dropped != 1:
		return fmt.Errorf("dropped, counted %d times", dropped)
	case out.verdict == verdictRedirect && counted == 0 && !isAnswer(in, out):
		return fmt.Errorf("forwarded, not counted")
	}
	return nil
}

// isAnswer: the gateway's own words, sent back to who asked.
func isAnswer(in input, out outcome) bool {
	return in.program == "from_container" && out.action == bpf.ActionEgress && out.ifindex == in.ifindex
}

func judgeAnswer(in input, out outcome) error {
	if got := out.frame[:6]; !same(got, in.frame[6:12]) {
		return fmt.Errorf("the answer goes to %x", got)
	}
	if got, want := out.frame[6:12], mac(byte(in.ifindex)); !same(got, want[:]) {
		return fmt.Errorf("the answer comes from %x", got)
	}
	if sound, known := l4Sound(out.frame); known && !sound {
		return fmt.Errorf("the answer's checksum is wrong")
	}
	if h := read(out.frame); h != nil && (h.icmpType != 136 || h.ttl != 255 || h.src != families[1].router || h.dst != read(in.frame).src) {
		return fmt.Errorf("no neighbour advertisement: %+v", *h)
	}
	return nil
}

// judgeRedirect: where it goes, under which hardware addresses, with which TTL and mark.
func judgeRedirect(in input, out outcome, before, after *header) error {
	dst, src := out.frame[:6], out.frame[6:12]
	is := func(got []byte, last byte) bool { m := mac(last); return same(got, m[:]) }
	hop := in.program != "from_host" // whose packets come from the node itself, but those to services are forwarded
	marked, either := false, false
	if out.verdict == verdictOK {
		hop = false
		if in.program != "from_netdev" && in.program != "to_netdev" && !same(dst, in.frame[:6]) {
			return fmt.Errorf("passed on, with other hardware addresses")
		}
		// What is masqueraded where it leaves is finished; what a backend of the node answers, and errors about the translated, is not.
		if in.program == "to_netdev" {
			ours := after.src == families[0].node || after.src == families[1].node
			marked = ours && before.src != after.src
			either = ours && (before.icmpError || after.sport != before.sport)
		}
	} else {
		switch out.action {
		case bpf.ActionPeer:
			if out.ifindex != ifA && out.ifindex != ifB {
				return fmt.Errorf("into the pod behind device %d", out.ifindex)
			}
			if !is(dst, macPod+byte(out.ifindex)) || !is(src, byte(out.ifindex)) {
				return fmt.Errorf("into pod %d as %x from %x", out.ifindex, dst, src)
			}
			if pod := map[uint32][2]netip.Addr{ifA: {families[0].a, families[1].a}, ifB: {families[0].b, families[1].b}}[out.ifindex]; after.dst != pod[0] && after.dst != pod[1] {
				return fmt.Errorf("a packet to %s went into pod %d", after.dst, out.ifindex)
			}
		case bpf.ActionEgress:
			if out.ifindex != ifEth0 || !is(dst, macNext) || !is(src, ifEth0) {
				return fmt.Errorf("out of device %d as %x from %x", out.ifindex, dst, src)
			}
			marked, hop = true, true
		case bpf.ActionNeigh:
			if out.ifindex != ifEth0 {
				return fmt.Errorf("out of device %d by its neighbours", out.ifindex)
			}
			marked, hop = true, !out.wrapped
		case bpf.ActionTunnel:
			hop = false // the receiving node's business
			if out.ifindex != ifOverlay || !same(dst, in.frame[:6]) || !same(src, in.frame[6:12]) {
				return fmt.Errorf("into the tunnel at device %d as %x from %x", out.ifindex, dst, src)
			}
			marked = true
		case bpf.ActionHost:
			hop = false
			if out.ifindex != ifHost || !is(dst, ifHost) || !is(src, ifHost) {
				return fmt.Errorf("up the stack from device %d as %x from %x", out.ifindex, dst, src)
			}
		default:
			return fmt.Errorf("redirected, action %d", out.action)
		}
	}
	ttl := before.ttl
	if hop {
		ttl--
		if before.ttl <= 1 {
			return fmt.Errorf("forwarded, with TTL %d", before.ttl)
		}
	}
	if after.ttl != ttl {
		return fmt.Errorf("TTL %d became %d, want %d", before.ttl, after.ttl, ttl)
	}
	mark, done := in.mark, in.mark&^0x0f00|0x0300
	if marked && in.program != "xdp_entry" { // a frame has no mark
		mark = done
	}
	if out.mark != mark && !(either && out.mark == done) && !(either && out.mark == in.mark) {
		return fmt.Errorf("mark %#x became %#x, want %#x", in.mark, out.mark, mark)
	}
	return nil
}

// judgeAddresses: only masquerading changes addresses and ports, and only there, unless there are services.
func judgeAddresses(in input, out outcome, before, after *header) error {
	f := families[0]
	if before.v6 {
		f = families[1]
	}
	if in.serving {
		if !slices.Contains([]netip.Addr{before.src, f.node, f.peer, f.router, vip(f)}, after.src) {
			return fmt.Errorf("source %s became %s", before.src, after.src)
		}
		if !slices.Contains([]netip.Addr{before.dst, f.node, f.router, f.a, f.b, f.far, f.cold, f.peer, f.outside}, after.dst) {
			return fmt.Errorf("destination %s became %s", before.dst, after.dst)
		}
		return nil
	}
	if after.src != before.src {
		leaves := in.program == "to_netdev" || in.program == "from_container" && (out.action == bpf.ActionEgress || out.action == bpf.ActionNeigh || out.action == bpf.ActionHost && before.icmpError)
		if !leaves || after.src != f.node {
			return fmt.Errorf("source %s became %s", before.src, after.src)
		}
	}
	if after.dst != before.dst {
		if in.program != "from_netdev" || before.dst != f.node || after.dst != f.a && after.dst != f.b {
			return fmt.Errorf("destination %s became %s", before.dst, after.dst)
		}
	}
	if !before.later && !before.icmpError {
		// The node's own give way to masqueraded ones.
		apart := in.program == "to_netdev" && before.src == f.node || in.program == "from_netdev" && before.dst == f.node
		if !apart && (after.src == before.src && after.sport != before.sport || after.dst == before.dst && after.dport != before.dport) {
			return fmt.Errorf("ports %d, %d became %d, %d", before.sport, before.dport, after.sport, after.dport)
		}
		if body := before.l4 + 20; body < len(in.frame) && !same(in.frame[body:], out.frame[body:]) {
			return fmt.Errorf("the payload was changed")
		}
	}
	return nil
}

// translated wants the packet to come from the node and from a masquerading port.
func translated(f family) func(*testing.T, []byte, []byte) {
	return func(t *testing.T, in, out []byte) {
		was, h := read(in), read(out)
		if h.src != f.node || h.dst != was.dst {
			t.Errorf("from %s to %s, want from %s to %s", h.src, h.dst, f.node, was.dst)
		}
		if !h.later && h.proto != protoSCTP && h.sport != 0 && (h.sport < 30000 || h.sport > 39999) {
			t.Errorf("source port %d", h.sport)
		}
	}
}
