// SPDX-License-Identifier: Apache-2.0

package packet

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/lash-net/lash/bpf"
)

// The fuzzers feed what the mutator makes of the tables' packets to one hook each, as they are or with their
// addresses and checksums made such that they come further. Seeds run as ordinary tests.
func FuzzFromContainer(f *testing.F) { fuzz(f, "from_container", ifA) }
func FuzzFromNetdev(f *testing.F)    { fuzz(f, "from_netdev", ifEth0) }
func FuzzFromHost(f *testing.F)      { fuzz(f, "from_host", ifHost) }
func FuzzToNetdev(f *testing.F)      { fuzz(f, "to_netdev", ifEth0) }
func FuzzFromOverlay(f *testing.F)   { fuzz(f, "from_overlay", ifOverlay) }

// Bits of the fuzzer's mode byte.
const (
	modeMend   = 1 << iota // make the checksums right
	modeSource             // from somebody who may send here
	modeTarget             // the destination is chosen by the bits above
	modeSummed             // the device has summed the packet
	modeShift  = iota
)

func fuzz(f *testing.F, program string, ifindex uint32) {
	config := "bpf"
	switch program {
	case "from_overlay":
		config = "tunnel"
	case "from_netdev", "to_netdev":
		config = "dsr by geneve" // what other nodes tell is read, too
	}
	p := theNode(f).load(f, config)
	for _, s := range seeds() {
		for _, mode := range []byte{0, modeMend | modeSource | modeTarget | 1<<modeShift, modeMend | modeSource | modeTarget | 6<<modeShift} {
			f.Add(s, mode, uint16(0))
		}
	}
	f.Add(frame(packet{src: families[0].a, dst: families[0].far, l4: "tcp", sport: 1, dport: 2, flags: "A", size: 3000}), byte(modeMend), uint16(1400))
	f.Fuzz(func(t *testing.T, raw []byte, mode byte, gso uint16) {
		if len(raw) < 14+20 || len(raw) > 3000 || gso > 0 && len(raw) < 100 {
			return
		}
		in := input{program: program, ifindex: ifindex, frame: steer(append([]byte(nil), raw...), program, mode), gso: uint32(gso), mark: 0x80000001}
		in.summed = p.sums && mode&modeSummed != 0 && read(in.frame) != nil && gso == 0 && !silent(in)
		p.forget(t)
		known := p.converse(t, in)
		p.try(t, in, known)
	})
}

// steer makes a frame one that the hook's slow path reads on: by its addresses and checksums.
func steer(b []byte, program string, mode byte) []byte {
	h := read(b)
	if h == nil {
		return b
	}
	fam := families[0]
	src, dst := b[26:30], b[30:34]
	if h.v6 {
		fam = families[1]
		src, dst = b[22:38], b[38:54]
	}
	if mode&modeSource != 0 {
		copy(src, map[string]netip.Addr{"from_container": fam.a, "to_netdev": fam.a, "from_netdev": fam.outside, "from_host": fam.node, "from_overlay": fam.far}[program].AsSlice())
	}
	if mode&modeTarget != 0 {
		to := []netip.Addr{fam.a, fam.b, fam.node, fam.far, fam.cold, fam.narrow, fam.outside, fam.nowhere}
		copy(dst, to[mode>>modeShift%8].AsSlice())
	}
	if mode&modeMend != 0 {
		mend(b)
	}
	return b
}

// converse lets what the packet may answer or report about happen first: a masqueraded connection with the
// packet's ports. It returns the records there are.
func (p *programs) converse(t *testing.T, in input) map[bpf.ConnKey]bpf.Conn {
	if h := read(in.frame); h != nil && in.program == "from_netdev" && !h.later && (h.proto == protoUDP || h.proto == protoTCP) && h.dport >= 30000 && h.dport < 40000 {
		fam := families[0]
		if h.v6 {
			fam = families[1]
		}
		if h.src == fam.outside && h.dst == fam.node {
			l4 := map[uint8]string{protoUDP: "udp", protoTCP: "tcp"}[h.proto]
			out, err := p.run(fromA(frame(packet{src: fam.a, dst: fam.outside, l4: l4, sport: 1000, dport: h.sport})))
			if err != nil {
				t.Fatal(err)
			}
			// The packet answers the port that was chosen.
			binary.BigEndian.PutUint16(in.frame[h.l4+2:], read(out.frame).sport)
			mend(in.frame)
		}
	}
	var discard outcome
	p.count(t, &discard)
	return p.conns(t)
}

// try runs a packet twice, by the slow path and by the fast one if it has left a record, and judges both.
func (p *programs) try(t *testing.T, in input, known map[bpf.ConnKey]bpf.Conn) {
	first := p.tryOnce(t, in)
	if first == nil {
		return
	}
	inner, outer, _ := peeled(in, *first) // judged already
	if err := judgeRecords(inner, outer, known, p.conns(t)); err != nil {
		t.Fatalf("%v\nin  %x\nout %x", err, in.frame, first.frame)
	}
	if err := p.judgeTranslations(); err != nil {
		t.Fatalf("%v\nin  %x\nout %x", err, in.frame, first.frame)
	}
	again := p.tryOnce(t, in)
	if again == nil || again.verdict != first.verdict || again.action != first.action || again.ifindex != first.ifindex || again.mark != first.mark || !same(again.frame, first.frame) {
		t.Fatalf("the second time another outcome\nin     %x\nfirst  %+v\nsecond %+v", in.frame, *first, again)
	}
}

func (p *programs) tryOnce(t *testing.T, in input) *outcome {
	out, err := p.run(in)
	if errors.Is(err, unix.EINVAL) && read(in.frame) == nil {
		return nil // the kernel makes no packet of it
	}
	if err != nil {
		t.Fatalf("%v\nin %x", err, in.frame)
	}
	p.count(t, &out)
	in, _ = takenOut(in, out)
	if err := judge(in, out); err != nil {
		t.Fatalf("%v\nin  %x\nout %x\n%+v", err, in.frame, out.frame, out)
	}
	return &out
}

// judgeRecords compares the records that a packet left with the key that the reference parser finds.
func judgeRecords(in input, out outcome, before, after map[bpf.ConnKey]bpf.Conn) error {
	var made []bpf.ConnKey
	for k := range after {
		if _, ok := before[k]; !ok {
			made = append(made, k)
		}
	}
	h := read(in.frame)
	switch {
	case len(made) == 0:
		if h != nil && !h.later && out.verdict == verdictRedirect && len(before) == 0 && !isAnswer(in, out) {
			return fmt.Errorf("forwarded without a record")
		}
		return nil
	case len(made) > 1:
		return fmt.Errorf("%d records of one packet", len(made))
	case h == nil:
		return fmt.Errorf("a record of a packet that is none: %+v", made[0])
	case h.later:
		return fmt.Errorf("a record of a fragment without ports")
	}
	src, dst := netip.AddrPortFrom(h.src, h.sport), netip.AddrPortFrom(h.dst, h.dport)
	k := made[0]
	initiator, other := side(k.Lo, k.LoPort), side(k.Hi, k.HiPort)
	if after[k].Flags&bpf.ConnInitiatorHi != 0 {
		initiator, other = other, initiator
	}
	if k.Proto != h.proto || initiator != src || other != dst {
		return fmt.Errorf("protocol %d from %s to %s is on record as %d from %s to %s", h.proto, src, dst, k.Proto, initiator, other)
	}
	return nil
}

// judgeTranslations wants every row of lash_nat to lead from the node's address to a masqueraded record that has it.
func (p *programs) judgeTranslations() error {
	var translated, owner bpf.ConnKey
	it := p.dp.Map("lash_nat").Iterate()
	for it.Next(&translated, &owner) {
		var c bpf.Conn
		if err := p.dp.Map("lash_conn").Lookup(&owner, &c); err != nil {
			return fmt.Errorf("a translation without its record: %w", err)
		}
		if a := c.NATAddr.Addr(); c.Flags&bpf.ConnNAT == 0 || a != families[0].node && a != families[1].node || translated.Lo != c.NATAddr && translated.Hi != c.NATAddr {
			return fmt.Errorf("%+v is translated to %+v", owner, translated)
		}
	}
	return it.Err()
}

// side is an address as the packet has it: IPv6 may carry mapped ones.
func side(a bpf.Addr, port bpf.BE16) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr(), port.Host())
}
