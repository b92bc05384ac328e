// SPDX-License-Identifier: Apache-2.0

package packet

import (
	"context"
	"encoding/binary"
	"net/netip"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/lash-net/lash/bpf"
)

// inEachFamily runs a test with programs of a configuration that know of no connection, and leaves them so.
func inEachFamily(t *testing.T, config string, test func(t *testing.T, f family, p *programs)) {
	n := theNode(t)
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			p := n.load(t, config)
			p.forget(t)
			defer p.forget(t)
			test(t, f, p)
		})
	}
}

// A node's own connection has the tuple of a masqueraded one: it gets another, and answers to either reach who asked.
func TestTheNodesSocketsAndMasqueradingShareNoTuple(t *testing.T) {
	inEachFamily(t, "bpf", func(t *testing.T, f family, p *programs) {
		for _, l4 := range []string{"udp", "tcp", "echo"} {
			t.Run(l4, func(t *testing.T) {
				p.forget(t)
				pod := packet{src: f.a, dst: f.outside, l4: l4, sport: 1000, flags: "S"}
				if l4 != "echo" {
					pod.dport = 53
				}
				masqueraded := p.must(t, fromA(frame(pod)), egress(bpf.SlowNew))
				port := read(masqueraded).sport
				if l4 == "echo" {
					port = binary.BigEndian.Uint16(masqueraded[read(masqueraded).l4+4:])
				}

				own := pod
				own.src, own.sport = f.node, port
				if l4 == "tcp" { // in the middle of its connection, which was there before the pod's
					later := own
					later.flags = "A"
					if out := p.must(t, leaving(frame(later)), pass()); !same(out, frame(later)) {
						t.Errorf("the node's connection goes on from another port: %x", out)
					}
				}
				moved := p.must(t, leaving(frame(own)), want{verdict: verdictOK, counted: []uint32{bpf.SlowMasquerade}})
				if h := read(moved); h.src != f.node || same(moved, frame(own)) {
					t.Fatalf("the node's packet left by the pod's tuple: %x", moved)
				}
				again := p.must(t, leaving(frame(own)), want{verdict: verdictOK, counted: []uint32{bpf.SlowMasquerade}})
				if !same(moved, again) {
					t.Errorf("the node's second packet left by another port\n%x\n%x", moved, again)
				}

				back := p.must(t, netdev(answer(moved)), want{verdict: verdictOK, counted: []uint32{bpf.SlowMasquerade}})
				if wanted := answer(frame(own)); !same(back[14:], wanted[14:]) {
					t.Errorf("the node's answer is\n%x, want\n%x", back, wanted)
				}
				back = p.must(t, netdev(answer(masqueraded)), peer(ifA, bpf.SlowNot))
				if h, wanted := read(back), read(answer(frame(pod))); h.dst != f.a || h.dport != wanted.dport {
					t.Errorf("the pod's answer went to %s port %d", h.dst, h.dport)
				}

				// The pod's connection ends; the node's keeps the port it has.
				for k, c := range p.conns(t) {
					if k.Kind == bpf.KeyTuple {
						c.Expires = c.Created - 1
						if err := p.dp.Map("lash_conn").Put(&k, &c); err != nil {
							t.Fatal(err)
						}
					}
				}
				if again := p.must(t, leaving(frame(own)), want{verdict: verdictOK, counted: []uint32{bpf.SlowMasquerade}}); !same(moved, again) {
					t.Errorf("the node's port changed when the pod's connection ended")
				}
				// Another connection of the node from that port, to somewhere else, is nobody's business.
				own.dport++
				own.dst = f.peer
				p.must(t, leaving(frame(own)), pass())
			})
		}
	})
}

// A tuple whose connection has expired is the node's from its first packet on: the answer, too, is for the node's socket.
// Somebody's who found it alive a moment before, it is not yet.
func TestTheNodeTakesOverTheTuplesOfExpiredConnections(t *testing.T) {
	inEachFamily(t, "bpf", func(t *testing.T, f family, p *programs) {
		for _, l4 := range []string{"udp", "tcp"} {
			t.Run(l4, func(t *testing.T) {
				second := p.ticksASecond(t)
				pod := packet{src: f.a, dst: f.outside, l4: l4, sport: 1000, dport: 53, flags: "S"}
				node := func(port uint16) packet {
					own := pod
					own.src, own.sport = f.node, port
					return own
				}
				moved := want{verdict: verdictOK, counted: []uint32{bpf.SlowMasquerade}}
				masqueraded := func() uint16 { return read(p.must(t, fromA(frame(pod)), egress(bpf.SlowNew))).sport }
				// Before, the tuple was a pod's, or that to which another of the node's connections was moved.
				for name, before := range map[string]func() uint16{
					"pod":  masqueraded,
					"node": func() uint16 { return read(p.must(t, leaving(frame(node(masqueraded()))), moved)).sport },
				} {
					p.forget(t)
					own := frame(node(before()))
					expire := func(by uint32) {
						p.change(t, func(_ *bpf.ConnKey, c *bpf.Conn) { c.Expires = c.Created - by })
					}
					expire(second / 2)
					p.must(t, leaving(own), moved)
					expire(2 * second)
					if out := p.must(t, leaving(own), pass()); !same(out, own) {
						t.Errorf("%s: the node's packet was translated: %x", name, out)
					}
					back := answer(own)
					if got := p.must(t, netdev(back), pass()); !same(got[14:], back[14:]) {
						t.Errorf("%s: the node's answer went to %s port %d", name, read(got).dst, read(got).dport)
					}
				}
			})
		}
	})
}

// While it is being found out whether a socket of the node has a port, nobody gets it, and answers are the socket's.
func TestAClaimThatIsNotSureTakesNothing(t *testing.T) {
	inEachFamily(t, "one port", func(t *testing.T, f family, p *programs) {
		first := packet{src: f.a, dst: f.outside, l4: "udp", sport: 1, dport: 53}
		out := p.must(t, fromA(frame(first)), egress(bpf.SlowNew))
		pending := func(is uint8) {
			t.Helper()
			rows := map[bpf.ConnKey]bpf.ConnKey{}
			var k, owner bpf.ConnKey
			for it := p.dp.Map("lash_nat").Iterate(); it.Next(&k, &owner); {
				if owner.Pending == is {
					t.Errorf("row %v: pending %d already", k, is)
				}
				owner.Pending = is
				rows[k] = owner
			}
			if len(rows) != 1 {
				t.Errorf("rows %v", rows)
			}
			for k, owner := range rows {
				if err := p.dp.Map("lash_nat").Put(&k, &owner); err != nil {
					t.Fatal(err)
				}
			}
		}
		pending(1)
		back := answer(out)
		if got := p.must(t, netdev(back), pass()); !same(got[14:], back[14:]) {
			t.Errorf("the answer went to %s port %d", read(got).dst, read(got).dport)
		}
		other, own := first, first
		other.src, own.src, own.sport = f.b, f.node, read(out).sport
		p.must(t, fromB(frame(other)), dropped(bpf.DropNATExhausted))
		p.must(t, leaving(frame(own)), dropped(bpf.DropNATExhausted))
		if _, err := p.dp.Sweep(t.Context()); err != nil {
			t.Fatal(err)
		}
		pending(0)
		p.must(t, netdev(back), peer(ifA, bpf.SlowNot))
	})
}

// What has no port has no tuple to share: the node's goes out although a pod's of the same kind is masqueraded.
func TestTheNodesPacketsWithoutPortsPass(t *testing.T) {
	inEachFamily(t, "one port", func(t *testing.T, f family, p *programs) {
		if _, err := p.run(fromA(frame(packet{src: f.a, dst: f.outside, l4: "gre"}))); err != nil {
			t.Fatal(err)
		}
		p.count(t, &outcome{})
		p.must(t, leaving(frame(packet{src: f.node, dst: f.outside, l4: "gre"})), pass())
		var claimed uint32
		if err := p.dp.Map("lash_snat_ports").Lookup(uint32(0), &claimed); err != nil || claimed != 0 {
			t.Errorf("port 0 is marked as claimed (%d, %v): the node's packets without ports are searched for", claimed, err)
		}
	})
}

// In the tunnel the node's address is its router address, which from_host sees.
func TestTheNodesSocketsKeepOffTranslatedTuplesInTheTunnel(t *testing.T) {
	inEachFamily(t, "one port by the tunnel", func(t *testing.T, f family, p *programs) {
		serve(f, servicePort{id: 7, backends: []netip.AddrPort{netip.AddrPortFrom(f.far, portTarget)}, flags: bpf.FrontendOutside})(t, p)
		defer p.unserve(t)
		out := p.must(t, netdev(frame(packet{src: f.outside, dst: f.node, l4: "tcp", sport: 1000, dport: portNode, flags: "S"})), tunnel(bpf.SlowNew))
		own := packet{src: f.router, dst: f.far, l4: "tcp", sport: read(out).sport, dport: portTarget, flags: "S"}
		p.must(t, local(frame(own)), dropped(bpf.DropNATExhausted))
		own.sport++
		p.must(t, local(frame(own)), tunnel(bpf.SlowNew))
	})
}

// must runs one packet and wants an outcome.
func (p *programs) must(t *testing.T, in input, w want) []byte {
	t.Helper()
	return p.step(t, step{at: func([]byte) input { return in }, raw: in.frame, want: w}, nil)
}

// flows sends one packet of each source port and reads which port it left by; 0: it was dropped.
func (p *programs) flows(t *testing.T, at func([]byte) input, first packet, n int) []uint16 {
	t.Helper()
	raw := frame(first)
	l4 := read(raw).l4
	out := make([]uint16, n)
	p.each(t, at, raw, n, func(i int) { binary.BigEndian.PutUint16(raw[l4:], first.sport+uint16(i)) }, func(i int, verdict uint32, _ skbuff, left []byte) {
		if verdict != verdictDrop {
			out[i] = binary.BigEndian.Uint16(left[l4:])
		}
	})
	return out
}

// each runs n packets on one thread, quickly: change writes the next into raw.
func (p *programs) each(t *testing.T, at func([]byte) input, raw []byte, n int, change func(i int), became func(i int, verdict uint32, ctx skbuff, left []byte)) {
	t.Helper()
	in := at(raw)
	in.frame = raw
	var after skbuff
	opts := ebpf.RunOptions{Data: raw, DataOut: make([]byte, len(raw)+256), Context: skbuff{Ifindex: in.ifindex}, ContextOut: &after}
	err := p.do(func() error {
		for i := range n {
			change(i)
			mend(raw)
			opts.DataOut = opts.DataOut[:cap(opts.DataOut)]
			verdict, err := p.dp.Program(in.program).Run(&opts)
			if err != nil {
				return err
			}
			became(i, verdict, after, opts.DataOut)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// Sixty thousand connections to one destination at a time: each has a port of its own, and each answer reaches who asked.
// Then the ports are used up, which is said of the destination and of who has them, and costs nobody his connection.
func TestSixtyThousandConnectionsToOneDestination(t *testing.T) {
	const each, more = 30000, 3000
	inEachFamily(t, "all ports", func(t *testing.T, f family, p *programs) {
		first := func(src netip.Addr) packet {
			return packet{src: src, dst: f.outside, l4: "udp", sport: 1000, dport: 53}
		}
		pods := []struct {
			at      func([]byte) input
			src     netip.Addr
			ifindex uint32
			ports   []uint16
		}{{fromA, f.a, ifA, nil}, {fromB, f.b, ifB, nil}}
		taken := map[uint16]bool{}
		start := time.Now()
		for i := range pods {
			pod := &pods[i]
			pod.ports = p.flows(t, pod.at, first(pod.src), each)
			for j, port := range pod.ports {
				if port == 0 || taken[port] || port < 1024 || port >= 30000 && port < 32768 {
					p.count(t, &outcome{})
					t.Fatalf("connection %d of %s left by port %d; drops so far %v", j, pod.src, port, p.drops)
				}
				taken[port] = true
			}
		}
		opened := time.Since(start)
		// They live on while this test, on an emulated machine, takes longer than a minute.
		p.change(t, func(_ *bpf.ConnKey, c *bpf.Conn) { c.Expires += 1 << 18 })

		// Every answer, with a payload of its own, reaches the pod and the port that asked, also after the flood.
		checkAll := func() {
			t.Helper()
			raw := addressed(answer(frame(first(f.node))), mac(ifEth0))
			l4 := read(raw).l4
			for _, pod := range pods {
				wrong := 0
				p.each(t, netdev, raw, each, func(j int) {
					binary.BigEndian.PutUint16(raw[l4+2:], pod.ports[j])
					binary.BigEndian.PutUint32(raw[l4+8:], uint32(j))
				}, func(j int, verdict uint32, ctx skbuff, left []byte) {
					h := read(left)
					if int32(verdict) == verdictRedirect && ctx.CB[0] == pod.ifindex && h.dst == pod.src && h.dport == 1000+uint16(j) && binary.BigEndian.Uint32(left[l4+8:]) == uint32(j) {
						return
					}
					if wrong++; wrong < 5 {
						t.Errorf("answer to port %d: verdict %d, device %d, to %s port %d; want device %d, %s port %d", pod.ports[j], verdict, ctx.CB[0], h.dst, h.dport, pod.ifindex, pod.src, 1000+j)
					}
				})
				if wrong > 0 {
					t.Fatalf("%d of %d answers went wrong", wrong, each)
				}
			}
		}
		// A flood of another pod takes what is left, and nothing else.
		start = time.Now()
		rest := p.flows(t, fromB, packet{src: f.b, dst: f.outside, l4: "udp", sport: 40000, dport: 53}, more)
		flooded := time.Since(start)
		got := 0
		for _, port := range rest {
			if port != 0 {
				got++
				if taken[port] {
					t.Fatalf("port %d was taken from a connection that lives", port)
				}
				taken[port] = true
			}
		}
		t.Logf("%d connections opened in %v (%v each), %d of %d ports used in the end; of %d more %d found one, %v each", 2*each, opened.Round(time.Millisecond),
			(opened / (2 * each)).Round(10*time.Nanosecond), len(taken), p.dp.SNATPorts(), more, got, (flooded / more).Round(10*time.Nanosecond))
		if got == more {
			t.Errorf("%d more connections than ports", got)
		}
		checkAll()

		full, err := p.dp.ExhaustedPorts(60)
		if err != nil {
			t.Fatal(err)
		}
		uses, err := p.dp.PortUses(full)
		if err != nil || len(uses) != 1 {
			t.Fatalf("destinations without ports: %v, %v", uses, err)
		}
		u := uses[0]
		if u.To != netip.AddrPortFrom(f.outside, 53) || u.Node != f.node || u.Proto != protoUDP || u.Dropped != uint64(more-got) || u.Ports != len(taken) {
			t.Errorf("told of %+v, want %d dropped and %d ports", u, more-got, len(taken))
		}
		if len(u.Users) != 2 || u.Users[0].Addr != f.b || u.Users[0].Ports != each+got || u.Users[1].Addr != f.a || u.Users[1].Ports != each {
			t.Errorf("users %+v, want %s with %d and %s with %d", u.Users, f.b, each+got, f.a, each)
		}
	})
}

// A pod that opens connections until there is no room for their records takes none from another.
func TestAFloodEvictsNoLiveConnection(t *testing.T) {
	inEachFamily(t, "few connections", func(t *testing.T, f family, p *programs) { // 4096 connections, 2048 translations
		live := p.flows(t, fromA, packet{src: f.a, dst: f.outside, l4: "udp", sport: 1000, dport: 53}, 200)
		flood := p.flows(t, fromB, packet{src: f.b, dst: f.peer, l4: "udp", sport: 1, dport: 54}, 6000)
		for l4, to := range map[string]netip.Addr{"tcp": f.outside, "udp": f.outside} {
			p.flows(t, fromB, packet{src: f.b, dst: to, l4: l4, sport: 1, dport: 55, flags: "S"}, 6000)
		}
		if flood[0] == 0 || flood[5999] != 0 {
			t.Fatalf("the flood's first packet left by port %d, its last by %d: it was to fill the maps", flood[0], flood[5999])
		}
		p.change(t, func(_ *bpf.ConnKey, c *bpf.Conn) { // an emulated machine has taken a minute for this
			c.Expires += 1 << 18
			for _, d := range []*bpf.ConnDir{&c.Orig, &c.Reply} {
				d.Deadline += 1 << 18
				d.Due += 1 << 18
			}
		})
		p.count(t, &outcome{})
		for i, port := range live {
			q := packet{src: f.outside, dst: f.node, l4: "udp", sport: 53, dport: port}
			p.must(t, netdev(frame(q)), peer(ifA, bpf.SlowNot))
			if i == 0 {
				p.must(t, fromA(frame(packet{src: f.a, dst: f.outside, l4: "udp", sport: 1000, dport: 53})), egress(bpf.SlowNot))
			}
		}
	})
}

// What is excepted while a connection is masqueraded changes for the next one only, and back again.
func TestExceptionsFromMasqueradingAreForNewConnections(t *testing.T) {
	inEachFamily(t, "bpf", func(t *testing.T, f family, p *programs) {
		ctx := context.Background()
		all := netip.PrefixFrom(unspecified(f), 0)
		except := netip.PrefixFrom(f.outside, f.outside.BitLen()-8).Masked()
		at := func(sport uint16) input {
			return fromA(frame(packet{src: f.a, dst: f.outside, l4: "tcp", sport: sport, dport: 80, flags: "S"}))
		}
		sees := func(sport uint16, src netip.Addr, why uint32) {
			t.Helper()
			if h := read(p.must(t, at(sport), egress(why))); h.src != src {
				t.Errorf("connection %d: outside sees %s, want %s", sport, h.src, src)
			}
		}
		sees(1, f.node, bpf.SlowNew)
		for _, prefix := range []netip.Prefix{except, all} {
			if err := p.dp.NonMasquerade().Put(ctx, prefix, struct{}{}); err != nil {
				t.Fatal(err)
			}
		}
		sees(2, f.a, bpf.SlowNew)
		sees(1, f.node, bpf.SlowNot)
		if rows, err := p.dp.NonMasquerade().List(ctx); err != nil || len(rows) != 2 {
			t.Fatalf("%v, %v", rows, err)
		}
		if err := p.dp.NonMasquerade().Delete(ctx, except); err != nil {
			t.Fatal(err)
		}
		sees(3, f.a, bpf.SlowNew) // by the other
		if err := p.dp.NonMasquerade().Delete(ctx, all); err != nil {
			t.Fatal(err)
		}
		sees(4, f.node, bpf.SlowNew)
		sees(2, f.a, bpf.SlowNot)
		sees(1, f.node, bpf.SlowNot)

		// In tunnel mode other nodes know pods from the tunnel only, whatever is excepted.
		p = p.load(t, "tunnel")
		p.forget(t)
		if err := p.dp.NonMasquerade().Put(ctx, all, struct{}{}); err != nil {
			t.Fatal(err)
		}
		defer p.dp.NonMasquerade().Delete(ctx, all)
		out := p.must(t, fromA(frame(packet{src: f.a, dst: f.peer, l4: "udp", sport: 1, dport: 53})), egress(bpf.SlowNew))
		if h := read(out); h.src != f.node {
			t.Errorf("the other node sees %s", h.src)
		}
	})
}

// ticksASecond is the kernel's, as the coarse clock has it.
func (p *programs) ticksASecond(t *testing.T) uint32 {
	t.Helper()
	var res unix.Timespec
	if err := unix.ClockGetres(unix.CLOCK_MONOTONIC_COARSE, &res); err != nil {
		t.Fatal(err)
	}
	return uint32(1e9 / res.Nano())
}

// A port of a connection that is closed goes to another one when there is none left, but not while packets of the first
// may be under way, and what it sends afterwards does not get that port.
func TestPortsOfClosedConnectionsAreTakenOver(t *testing.T) {
	inEachFamily(t, "one port", func(t *testing.T, f family, p *programs) {
		tcp := func(sport uint16, flags string) input {
			return fromA(frame(packet{src: f.a, dst: f.outside, l4: "tcp", sport: sport, dport: 80, flags: flags}))
		}
		p.must(t, tcp(1, "S"), egress(bpf.SlowNew))
		p.must(t, tcp(2, "S"), dropped(bpf.DropNATExhausted))
		p.must(t, tcp(1, "R"), egress(bpf.SlowNot))
		again := func() { p.clear(t, "lash_snat_full") } // the next search is a long one
		again()
		p.must(t, tcp(2, "S"), dropped(bpf.DropNATExhausted))
		p.change(t, func(_ *bpf.ConnKey, c *bpf.Conn) {
			if c.Flags&bpf.ConnNAT != 0 {
				c.Expires -= 2 * p.ticksASecond(t)
			}
		})
		again()
		out := p.must(t, tcp(2, "S"), egress(bpf.SlowUndecided))
		if h := read(out); h.sport != 30000 {
			t.Errorf("left by port %d", h.sport)
		}
		p.must(t, tcp(1, "A"), dropped(bpf.DropNATExhausted))
		p.must(t, netdev(answer(out)), peer(ifA, bpf.SlowNot))
		p.must(t, tcp(2, "A"), egress(bpf.SlowNot))
	})
}
