// SPDX-License-Identifier: Apache-2.0

package packet

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/google/go-cmp/cmp"

	"github.com/lash-net/lash/bpf"
)

// Actions of XDP programs.
const (
	xdpDrop     = 1
	xdpPass     = 2
	xdpTX       = 3
	xdpRedirect = 4
)

// xdpMD is struct xdp_md of the UAPI, the program's context.
type xdpMD struct{ Data, DataEnd, DataMeta, IngressIfindex, RxQueueIndex, EgressIfindex uint32 }

// takeFrames makes the devices of the calling thread's namespace ones that a test run's frames may come from: a veth device
// has the queue for it while it has a program of its own.
func takeFrames() error {
	pass, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.XDP, License: "GPL", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, xdpPass), asm.Return()}})
	if err != nil {
		return err
	}
	for _, ifindex := range []int{ifEth0, ifOther} { // not closed: they end with the process
		if _, err := link.AttachXDP(link.XDPOptions{Program: pass, Interface: ifindex, Flags: link.XDPDriverMode}); err != nil {
			return fmt.Errorf("device %d: %w", ifindex, err)
		}
	}
	return nil
}

// runXDP tells what became of a frame in the terms of the other programs. A redirect leads to eth0: no other device of
// the node is Lash's.
func (p *programs) runXDP(in input) (out outcome, err error) {
	opts := ebpf.RunOptions{
		Data: in.frame, DataOut: make([]byte, len(in.frame)+256),
		Context: xdpMD{DataEnd: uint32(len(in.frame)), IngressIfindex: in.ifindex},
	}
	var action uint32
	if err := p.do(func() (err error) {
		action, err = p.dp.Program(in.program).Run(&opts)
		return err
	}); err != nil {
		return out, fmt.Errorf("run %s: %w", in.program, err)
	}
	out.frame, out.mark, out.xdp = opts.DataOut, in.mark, action
	switch action {
	case xdpDrop:
		out.verdict = verdictDrop
	case xdpPass:
		out.verdict = verdictOK
	case xdpTX:
		out.verdict, out.action, out.ifindex = verdictRedirect, bpf.ActionEgress, in.ifindex
	case xdpRedirect:
		out.verdict, out.action, out.ifindex = verdictRedirect, bpf.ActionEgress, ifEth0
	default:
		return out, fmt.Errorf("%s returned %d", in.program, action)
	}
	return out, nil
}

// otherWire is a frame at a device of the node that is not the one it leaves by.
func otherWire(f []byte) input {
	return input{program: "xdp_entry", ifindex: ifOther, frame: addressed(f, mac(ifOther))}
}

// taken makes eth0 a device that takes frames from others, and other one of Lash's, or ends it.
func taken(is bool) func(*testing.T, *programs) {
	return func(t *testing.T, p *programs) {
		t.Helper()
		row, devices := p.dp.Map("lash_xdp_devices"), p.dp.Map("lash_devices")
		if !is {
			if err := row.Delete(uint32(ifEth0)); err != nil {
				t.Fatal(err)
			}
			if err := devices.Delete(uint32(ifOther)); err != nil {
				t.Fatal(err)
			}
			return
		}
		if err := p.do(func() error { return row.Put(uint32(ifEth0), uint32(ifEth0)) }); err != nil {
			t.Fatal(err)
		}
		if err := devices.Put(uint32(ifOther), bpf.Device{MAC: bpf.MAC{B: mac(ifOther)}, MTU: 1500}); err != nil {
			t.Fatal(err)
		}
	}
}

// watched makes every packet worth an event, or none.
func watched(is bool) func(*testing.T, *programs) {
	return func(t *testing.T, p *programs) {
		t.Helper()
		var rt bpf.Runtime
		if err := p.dp.Map("lash_runtime").Lookup(uint32(0), &rt); err != nil {
			t.Fatal(err)
		}
		rt.Report = 0
		if is {
			rt.Report = bpf.ReportEvery
		}
		if err := p.dp.Map("lash_runtime").Put(uint32(0), &rt); err != nil {
			t.Fatal(err)
		}
	}
}

// asTC wants xdp_entry to send the packet on as from_netdev does.
func asTC(pkt packet) step {
	return step{do: func(t *testing.T, p *programs) {
		t.Helper()
		if p.agree(t, frame(pkt)).verdict != verdictRedirect {
			t.Error("not sent on")
		}
	}}
}

// agree tries a frame at from_netdev and, with the connections that it found, at xdp_entry: what the latter sends on must be
// what the former sends on, byte by byte, and leave the connection's record in the same way, but for the clock.
func (p *programs) agree(t *testing.T, raw []byte) outcome {
	t.Helper()
	at := func(in input) (outcome, map[bpf.ConnKey]bpf.Conn) {
		in.serving = true
		out, err := p.run(in)
		if err != nil {
			t.Fatalf("%v\nin %x", err, raw)
		}
		p.count(t, &out)
		if err := judge(in, out); err != nil {
			t.Fatalf("%s: %v\nin  %x\nout %x", in.program, err, in.frame, out.frame)
		}
		rows := p.conns(t)
		for k, c := range rows {
			c.Expires, c.Orig.Deadline, c.Reply.Deadline = 0, 0, 0
			rows[k] = c
		}
		return out, rows
	}
	before := p.conns(t)
	tc, byTC := at(netdev(raw))
	p.forget(t)
	for k, c := range before {
		if err := p.dp.Map("lash_conn").Put(&k, &c); err != nil {
			t.Fatal(err)
		}
	}
	p.translations(t, before)
	xdp, byXDP := at(wire(raw))
	if xdp.verdict != verdictRedirect {
		return xdp
	}
	if tc.verdict != xdp.verdict || tc.action != xdp.action || tc.ifindex != xdp.ifindex || !same(tc.frame, xdp.frame) {
		t.Fatalf("in %x\ntc  %d, %d to %d: %x\nxdp %d, %d to %d: %x", raw, tc.verdict, tc.action, tc.ifindex, tc.frame, xdp.verdict, xdp.action, xdp.ifindex, xdp.frame)
	}
	if diff := cmp.Diff(byTC, byXDP); diff != "" {
		t.Fatalf("in %x\nthe record, -tc +xdp:\n%s", raw, diff)
	}
	return xdp
}

// translations writes the rows of lash_nat that services' connections have.
func (p *programs) translations(t *testing.T, conns map[bpf.ConnKey]bpf.Conn) {
	t.Helper()
	for k, c := range conns {
		if c.Flags&bpf.ConnClaimed == 0 {
			continue
		}
		from, to := side(k.Lo, k.LoPort), side(k.Hi, k.HiPort)
		if c.Flags&bpf.ConnInitiatorHi != 0 {
			from, to = to, from
		}
		if c.Flags&bpf.ConnNAT != 0 {
			from = side(c.NATAddr, c.NATPort)
		}
		if c.Flags&bpf.ConnDNAT != 0 {
			to = side(c.ToAddr, c.ToPort)
		}
		translated, _ := bpf.ConnKeyOf(from, to, k.Proto)
		if err := p.dp.Map("lash_nat").Put(&translated, &k); err != nil {
			t.Fatal(err)
		}
	}
}

func TestXDPFollowsConnections(t *testing.T) {
	var tests []test
	for _, l4 := range []string{"tcp", "udp", "sctp"} {
		syn, nat := "", uint16(0)
		if l4 == "tcp" {
			syn = "S"
		}
		if l4 == "sctp" {
			nat = 1000 // its ports stay
		}
		for _, config := range []string{"bpf", "legacy", "no pod CIDRs"} {
			tests = append(tests, test{name: l4 + " to a backend elsewhere and back, " + config, config: config, steps: func(f family) []step {
				open := packet{src: f.outside, dst: f.node, l4: l4, sport: 1000, dport: portNode, flags: syn}
				target, node := uint16(portTarget), uint16(portNode)
				if l4 == "sctp" {
					target, node = portNode, portNode
				}
				goes := open
				goes.flags, goes.size = "A", 77 // an odd number
				var back []byte
				return []step{
					{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.far, target)}, flags: bpf.FrontendOutside})},
					{at: wire, pkt: open, want: pass()}, // new
					{at: netdev, pkt: open, want: egress(bpf.SlowNew)},
					{at: wire, pkt: goes, want: egress(bpf.SlowNot), check: ends(f.node, nat, f.far, target)},
					{at: wire, reply: true, want: pass()}, // undecided
					{at: netdev, pkt: goes, want: egress(bpf.SlowNot)},
					{at: netdev, reply: true, want: neighbour(bpf.SlowUndecided)},
					{at: wire, pkt: goes, want: egress(bpf.SlowNot), check: func(_ *testing.T, _, out []byte) { back = answer(out) }},
					{do: func(t *testing.T, p *programs) {
						p.step(t, step{at: wire, raw: back, want: egress(bpf.SlowNot), check: ends(f.node, node, f.outside, 1000)}, nil)
					}},
					asTC(goes),
				}
			}})
		}
	}
	tests = append(tests,
		test{name: "DSR", config: "dsr", steps: func(f family) []step {
			p := packet{src: f.outside, dst: vip(f), l4: "tcp", sport: 1000, dport: portVIP, flags: "A"}
			syn, udp := p, p
			syn.flags, udp.l4 = "S", "udp"
			return []step{
				{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.far, portTarget)}, flags: bpf.FrontendOutside | bpf.FrontendDSR})},
				{at: netdev, pkt: syn, want: egress(bpf.SlowNew)},
				{at: wire, pkt: p, want: egress(bpf.SlowNot), check: ends(f.outside, 1000, f.far, portTarget)},
				asTC(p),
				{at: wire, pkt: syn, want: pass()}, // takes the option along, again
				{at: netdev, pkt: udp, want: egress(bpf.SlowNew)},
				{at: wire, pkt: udp, want: egress(bpf.SlowNot), check: ends(f.outside, 1000, f.far, portTarget)},
				{do: later},
				{at: wire, pkt: udp, want: pass()}, // the same
			}
		}},
		test{name: "UDP without a checksum", steps: func(f family) []step {
			if f.v6 {
				return nil
			}
			p := packet{src: f.outside, dst: f.node, l4: "udp", sport: 1000, dport: portNode, uncounted: true}
			return []step{
				{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.far, portTarget)}, flags: bpf.FrontendOutside})},
				{at: netdev, pkt: p, want: egress(bpf.SlowNew)},
				{at: wire, pkt: p, want: egress(bpf.SlowNot), check: func(t *testing.T, _, out []byte) {
					if be16(out[40:]) != 0 {
						t.Errorf("the checksum became %#x", be16(out[40:]))
					}
				}},
			}
		}},
		test{name: "out of another device", steps: func(f family) []step {
			p := packet{src: f.outside, dst: f.node, l4: "udp", sport: 1000, dport: portNode}
			return []step{
				{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.far, portTarget)}, flags: bpf.FrontendOutside})},
				{at: netdev, pkt: p, want: egress(bpf.SlowNew)},
				{at: otherWire, pkt: p, want: pass()}, // which takes none
				{do: taken(true)},
				{at: otherWire, pkt: p, want: egress(bpf.SlowNot), check: ends(f.node, 0, f.far, portTarget)},
				{at: wire, pkt: p, want: egress(bpf.SlowNot)},
				{do: taken(false)},
				{at: otherWire, pkt: p, want: pass()},
			}
		}},
		test{name: "back out of a device that takes no XDP_TX", steps: func(f family) []step {
			p := packet{src: f.outside, dst: f.node, l4: "udp", sport: 1000, dport: portNode}
			row := func(is bool) step {
				return step{do: func(t *testing.T, p *programs) {
					t.Helper()
					if err := p.do(func() error {
						if !is {
							return p.dp.Map("lash_xdp_devices").Delete(uint32(ifEth0 | bpf.XDPBack))
						}
						return p.dp.Map("lash_xdp_devices").Put(uint32(ifEth0|bpf.XDPBack), uint32(ifEth0))
					}); err != nil {
						t.Fatal(err)
					}
				}}
			}
			action := func(want uint32) step {
				return step{do: func(t *testing.T, pr *programs) {
					t.Helper()
					out, err := pr.run(wire(frame(p)))
					if err != nil || out.xdp != want {
						t.Errorf("action %d, %v, want %d", out.xdp, err, want)
					}
					pr.count(t, &out)
				}}
			}
			return []step{
				{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.far, portTarget)}, flags: bpf.FrontendOutside})},
				{at: netdev, pkt: p, want: egress(bpf.SlowNew)},
				action(xdpTX), row(true), action(xdpRedirect), row(false), action(xdpTX),
			}
		}},
		test{name: "what is from_netdev's", steps: func(f family) []step {
			p := packet{src: f.outside, dst: f.node, l4: "tcp", sport: 1000, dport: portNode, flags: "A"}
			with := func(change func(*packet)) packet {
				q := p
				change(&q)
				return q
			}
			syn := with(func(p *packet) { p.flags = "S" })
			mss := 1500 - 40
			if f.v6 {
				mss -= 20
			}
			option, pad := []byte{7, 7, 4, 0, 0, 0, 0, 0}, []extension{{protoDestOpts, []byte{0, 1, 4, 0, 0, 0, 0}}}
			steps := []step{
				{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.far, portTarget)}, flags: bpf.FrontendOutside})},
				{at: netdev, pkt: syn, want: egress(bpf.SlowNew)},
				{at: wire, pkt: p, want: egress(bpf.SlowNot)},
				{at: wire, pkt: with(func(p *packet) { p.size = mss }), want: egress(bpf.SlowNot)},
			}
			for _, q := range []packet{
				syn, with(func(p *packet) { p.flags = "FA" }), with(func(p *packet) { p.flags = "R" }),
				with(func(p *packet) { p.ttl = 1 }), with(func(p *packet) { p.size = mss + 1 }),
				with(func(p *packet) { p.options, p.extensions = option, pad }), with(func(p *packet) { p.fragment = &fragment{1, 0, true} }),
				with(func(p *packet) { p.fragment = &fragment{1, 16, false} }),
				with(func(p *packet) { p.sport++ }), with(func(p *packet) { p.dport = 22 }), with(func(p *packet) { p.dst = f.a }),
				with(func(p *packet) { p.l4 = "echo" }), with(func(p *packet) { p.l4 = "gre" }),
				{src: f.outside, dst: f.node, l4: "error", quoted: frame(packet{src: f.node, dst: f.far, l4: "tcp", sport: 30000, dport: portTarget})},
			} {
				steps = append(steps, step{at: wire, pkt: q, want: pass()})
			}
			return append(steps,
				step{at: func(b []byte) input { in := wire(b); in.frame = addressed(b, mac(macRouter)); return in }, pkt: p, want: pass()}, // for somebody else
				step{at: func(b []byte) input { in := wire(b); in.frame[12], in.frame[13] = 0x81, 0; return in }, pkt: p, want: pass()},    // of a VLAN
				step{at: func(b []byte) input { in := wire(b); in.frame = in.frame[:14+20+12]; return in }, pkt: p, want: pass()},          // cut off
				step{do: watched(true)}, step{at: wire, pkt: p, want: pass()}, step{do: watched(false)}, step{at: wire, pkt: p, want: egress(bpf.SlowNot)}, // to be told about
				step{do: later}, step{at: wire, pkt: p, want: pass()}, // its route is due
				step{at: netdev, pkt: p, want: neighbour(bpf.SlowDeadline)}, step{at: wire, pkt: p, want: egress(bpf.SlowNot)},
				step{do: raise}, step{at: wire, pkt: p, want: pass()}, // something changed
				step{at: netdev, pkt: p, want: egress(bpf.SlowEpoch)}, step{at: wire, pkt: p, want: egress(bpf.SlowNot)},
				step{do: func(t *testing.T, p *programs) { p.forget(t) }}, step{at: wire, pkt: p, want: pass()}, // its backend is gone
			)
		}},
		test{name: "what is for this node's pods, or goes by the tunnel", config: "tunnel", steps: func(f family) []step {
			p := packet{src: f.outside, dst: f.node, l4: "udp", sport: 1000, dport: portNode}
			q := packet{src: f.outside, dst: f.node, l4: "udp", sport: 1001, dport: portNode}
			return []step{
				{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.far, portTarget)}, flags: bpf.FrontendOutside})},
				{at: netdev, pkt: p, want: tunnel(bpf.SlowNew)},
				{at: wire, pkt: p, want: pass()},
				{do: serve(f, servicePort{id: 1, backends: []netip.AddrPort{at(f.b, portTarget)}, flags: bpf.FrontendOutside})},
				{at: netdev, pkt: q, want: peer(ifB, bpf.SlowNew)},
				{at: wire, pkt: q, want: pass()},
			}
		}},
	)
	runTests(t, tests)
}

func TestXDPPrefilter(t *testing.T) {
	filter := func(prefixes ...netip.Prefix) step {
		return step{do: func(t *testing.T, p *programs) {
			t.Helper()
			p.clear(t, "lash_prefilter")
			for _, x := range prefixes {
				if err := p.dp.Map("lash_prefilter").Put(bpf.IPCacheKeyFrom(x), uint32(1)); err != nil {
					t.Fatal(err)
				}
			}
		}}
	}
	runTests(t, []test{{name: "sources", steps: func(f family) []step {
		bits := f.outside.BitLen()
		everything := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		if f.v6 {
			everything = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		}
		p := packet{src: f.outside, dst: f.node, l4: "udp", sport: 1000, dport: portNode}
		answers := packet{src: f.node, dst: f.outside, l4: "udp", sport: 1000, dport: portNode}
		steps := []step{
			{at: wire, pkt: p, want: pass()},
			filter(netip.PrefixFrom(f.outside, bits-8).Masked()),
			{at: wire, pkt: answers, want: pass()}, // by their source only
		}
		for _, q := range []packet{
			p, {src: f.outside, dst: f.a, l4: "tcp", flags: "S", sport: 1, dport: 2}, {src: f.outside, dst: f.node, l4: "echo"}, {src: f.outside, dst: f.node, l4: "gre"},
			{src: f.outside, dst: f.node, l4: "udp", sport: 1, dport: 2, fragment: &fragment{1, 16, false}},
		} {
			steps = append(steps, step{at: wire, pkt: q, want: dropped(bpf.DropDenylist)})
		}
		return append(steps,
			filter(everything), step{at: wire, pkt: p, want: dropped(bpf.DropDenylist)},
			step{at: wire, raw: arp(families[0].outside, families[0].node), want: pass()},
			filter(netip.PrefixFrom(f.outside.Next(), bits)), step{at: wire, pkt: p, want: pass()}, filter())
	}}})
}

// Bits of the mode byte of FuzzXDPEntry.
const (
	xdpMend    = 1 << iota // make the checksums right
	xdpService             // ask for the service
	xdpAnswer              // be the answer of the service's backend
)

// FuzzXDPEntry feeds what the mutator makes of the tables' packets, as they are, or such that they belong to a service's
// connection, to from_netdev and to xdp_entry, which must agree.
func FuzzXDPEntry(f *testing.F) {
	p := theNode(f).load(f, "bpf")
	for _, s := range seeds() {
		for _, mode := range []byte{0, xdpMend | xdpService, xdpMend | xdpAnswer} {
			f.Add(s, mode)
		}
	}
	f.Fuzz(func(t *testing.T, raw []byte, mode byte) {
		if len(raw) < 14+20 || len(raw) > 3000 {
			return
		}
		b := append([]byte(nil), raw...)
		h := read(b)
		p.forget(t)
		for _, fam := range families {
			if h == nil || h.v6 != fam.v6 {
				continue
			}
			serve(fam, servicePort{id: 1, backends: []netip.AddrPort{at(fam.far, portTarget)}, flags: bpf.FrontendOutside})(t, p)
			defer p.unserve(t)
			b = p.belong(t, b, h, fam, mode)
		}
		if mode&xdpMend != 0 && h != nil {
			mend(b)
		}
		if h == nil { // the kernel may make no packet of it for tc
			out, err := p.run(wire(b))
			if err != nil || out.verdict != verdictOK || !same(out.frame, wire(b).frame) {
				t.Fatalf("%v, verdict %d\nin  %x\nout %x", err, out.verdict, b, out.frame)
			}
			return
		}
		p.agree(t, b) // which may open a connection
		p.agree(t, b)
	})
}

// belong makes the frame one of a connection of the service's client, which is opened first, or of its backend.
func (p *programs) belong(t *testing.T, b []byte, h *header, f family, mode byte) []byte {
	l4 := map[uint8]string{protoTCP: "tcp", protoUDP: "udp"}[h.proto]
	if mode&(xdpService|xdpAnswer) == 0 || l4 == "" || h.later {
		return b
	}
	out, err := p.run(netdev(frame(packet{src: f.outside, dst: f.node, l4: l4, sport: 1000, dport: portNode, flags: "S"})))
	if err != nil {
		t.Fatal(err)
	}
	src, dst := at(f.outside, 1000), at(f.node, portNode)
	if mode&xdpAnswer != 0 {
		nat := read(out.frame)
		first := frame(packet{src: f.far, dst: f.node, l4: l4, sport: portTarget, dport: nat.sport, flags: "SA"})
		if _, err := p.run(netdev(first)); err != nil { // decides the answers' way
			t.Fatal(err)
		}
		src, dst = at(f.far, portTarget), at(f.node, nat.sport)
	}
	var discard outcome
	p.count(t, &discard)
	size, from := 4, 26
	if f.v6 {
		size, from = 16, 22
	}
	copy(b[from:], src.Addr().AsSlice())
	copy(b[from+size:], dst.Addr().AsSlice())
	binary.BigEndian.PutUint16(b[h.l4:], src.Port())
	binary.BigEndian.PutUint16(b[h.l4+2:], dst.Port())
	return b
}
