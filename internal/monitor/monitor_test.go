// SPDX-License-Identifier: Apache-2.0

package monitor

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/lash-net/lash/bpf"
)

var update = flag.Bool("update", false, "write the golden files")

// raw is a message as programs send it.
func raw(t testing.TB, message any, packet ...byte) []byte {
	t.Helper()
	b, err := binary.Append(nil, binary.NativeEndian, message)
	if err != nil {
		t.Fatal(err)
	}
	return append(b, packet...)
}

func hwaddr(s string) []byte {
	m, err := net.ParseMAC(s)
	if err != nil {
		panic(err)
	}
	return m
}

// echo is the frame of an ICMP echo of 56 bytes.
func echo(dmac, smac, src, dst string, id uint16, df bool, ttl uint8, ipSum uint16, kind uint8, sum uint16) []byte {
	be := binary.BigEndian
	f := append(hwaddr(dmac), hwaddr(smac)...)
	f = be.AppendUint16(f, 0x0800)
	f = append(f, 0x45, 0)
	f = be.AppendUint16(f, 84)
	f = be.AppendUint16(f, id)
	flags := uint16(0)
	if df {
		flags = 0x4000
	}
	f = be.AppendUint16(f, flags)
	f = append(f, ttl, 1)
	f = be.AppendUint16(f, ipSum)
	f = append(f, netip.MustParseAddr(src).AsSlice()...)
	f = append(f, netip.MustParseAddr(dst).AsSlice()...)
	f = append(f, kind, 0)
	f = be.AppendUint16(f, sum)
	f = be.AppendUint16(f, 278)
	f = be.AppendUint16(f, 0)
	return append(f, make([]byte, 56)...)
}

func trace(point uint8, source uint16, src, dst uint32, dstID uint16, reason uint8, ifindex uint32, orig string, frame []byte) bpf.TraceNotify {
	m := bpf.TraceNotify{
		Head: bpf.Message{Type: bpf.EventTrace, Subtype: point, Source: source}, Cap: bpf.Captured{LenOrig: uint32(len(frame)), LenCap: uint16(len(frame)), Version: 1},
		SrcIdentity: src, DstIdentity: dst, DstID: dstID, Reason: reason, Ifindex: ifindex,
	}
	a := netip.MustParseAddr(orig)
	if a.Is6() {
		m.Flags = bpf.TraceIPv6
	}
	copy(m.OrigIP[:], a.AsSlice())
	return m
}

func debug(kind uint8, source uint16, args ...uint32) bpf.DebugNotify {
	args = append(args, 0, 0, 0)
	return bpf.DebugNotify{Head: bpf.Message{Type: bpf.EventDebug, Subtype: kind, Source: source}, Arg1: args[0], Arg2: args[1], Arg3: args[2]}
}

// ip is an address as a program sends it.
func ip(s string) uint32 {
	b := netip.MustParseAddr(s).AsSlice()
	return binary.NativeEndian.Uint32(b[len(b)-4:])
}

func lookup(source uint16, src string, sport uint32, dst string, dport, proto, egress uint32) []any {
	return []any{debug(bpf.DebugCTLookup41, source, ip(src), ip(dst), sport|dport<<16), debug(bpf.DebugCTLookup42, source, proto<<8|egress)}
}

type sent struct {
	message any
	frame   []byte
}

func print(t *testing.T, set func(*Printer), messages ...any) string {
	t.Helper()
	var out strings.Builder
	p := NewPrinter(&out)
	names := map[uint32]string{4: "cilium_vxlan", 10: "lxcf46963b8bfc3", 8: "lxc7c697c641cac", 2: "eth0", 12: "lxc6cb888bb2750"}
	p.Link = func(i uint32) string { return names[i] }
	set(p)
	for _, m := range messages {
		var data []byte
		switch m := m.(type) {
		case sent:
			data = raw(t, m.message, m.frame...)
		case []byte:
			data = m
		default:
			data = raw(t, m)
		}
		decoded, err := Decode(data)
		if err != nil {
			t.Fatal(err)
		}
		p.Print(1, decoded)
	}
	return out.String()
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	want, err := os.ReadFile(filepath.Join("testdata", name+".golden"))
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), got); d != "" {
		t.Errorf("%s (-want +got):\n%s", name, d)
	}
}

// The seed's terminal, line by line: one ping by way of the overlay, on the source and on the destination. Two accidents of
// its version are left out: its complaint about payloads ("No decoder for layer type Payload"), and two bytes of padding after
// a packet, which it took for payload (86, not 84).
func TestLinesAreTheSeeds(t *testing.T) {
	const a, b = "10.0.2.119", "10.0.0.24"
	const aMAC, aNode, bMAC, bNode = "72:4a:62:7e:62:6e", "ee:7b:eb:76:25:37", "b6:f7:9a:c4:59:73", "36:07:df:de:f9:af"
	at := func(frame []byte, m bpf.TraceNotify) sent { return sent{m, frame} }
	host := func(source uint16, src, dst string, identity, lifetime uint32) []any {
		return append(lookup(source, src, 49017, dst, 8472, 17, 1), debug(bpf.DebugCTMatch, source, lifetime), debug(bpf.DebugCTVerdict, source, bpf.TraceEstablished),
			debug(bpf.DebugIdentity4, source, ip(dst), identity))
	}
	f := echo(aNode, aMAC, a, b, 64237, true, 64, 10541, 8, 5865)
	source := slices.Concat(
		lookup(189, a, 278, b, 0, 1, 1), []any{
			debug(bpf.DebugCTVerdict, 189, bpf.TraceNew), debug(bpf.DebugIdentity4, 189, ip(b), 46188), debug(bpf.DebugCTCreated4, 189, 0, 32359, 0),
			debug(bpf.DebugEncap, 189, 0xac120002, 32359), at(f, trace(bpf.TraceToOverlay, 189, 32359, 46188, 0, bpf.TraceNew, 4, "0.0.0.0", f)),
		},
		host(3386, "172.18.0.3", "172.18.0.2", 6, 342890),
		[]any{debug(bpf.DebugDecap, 0, 46188, 0), debug(bpf.DebugLocalDelivery, 0, 189, 46188)},
		lookup(189, b, 0, a, 278, 1, 0), []any{debug(bpf.DebugCTMatch, 189, 342891), debug(bpf.DebugCTVerdict, 189, bpf.TraceReply)})
	f = echo(aMAC, aNode, b, a, 53736, false, 63, 37682, 0, 7913)
	source = append(source, at(f, trace(bpf.TraceToEndpoint, 189, 46188, 32359, 189, bpf.TraceReply, 10, b, f)))
	golden(t, "seed-source", print(t, func(p *Printer) { p.Verbosity = Dissected }, source...))

	f = echo(bMAC, bNode, a, b, 64237, true, 63, 10797, 8, 5865)
	destination := slices.Concat(
		host(630, "172.18.0.2", "172.18.0.3", 6, 342875),
		[]any{debug(bpf.DebugDecap, 0, 32359, 0), debug(bpf.DebugLocalDelivery, 0, 2546, 32359)},
		lookup(2546, a, 278, b, 0, 1, 0), []any{
			debug(bpf.DebugCTVerdict, 2546, bpf.TraceNew), debug(bpf.DebugCTCreated4, 2546, 0, 32359, 0),
			at(f, trace(bpf.TraceToEndpoint, 2546, 32359, 46188, 2546, bpf.TraceNew, 8, a, f)),
		},
		lookup(2546, b, 0, a, 278, 1, 1), []any{
			debug(bpf.DebugCTMatch, 2546, 342891), debug(bpf.DebugCTVerdict, 2546, bpf.TraceReply), debug(bpf.DebugIdentity4, 2546, ip(a), 32359),
			debug(bpf.DebugEncap, 2546, 0xac120003, 46188),
		})
	f = echo(bNode, bMAC, b, a, 53736, false, 64, 37426, 0, 7913)
	destination = append(destination, at(f, trace(bpf.TraceToOverlay, 2546, 46188, 32359, 0, bpf.TraceReply, 4, "0.0.0.0", f)))
	tail := host(630, "172.18.0.2", "172.18.0.3", 6, 342890)
	destination = append(destination, tail[:len(tail)-1]...)
	golden(t, "seed-destination", print(t, func(p *Printer) { p.Verbosity = Dissected }, destination...))
}

// tcp is the frame of a TCP segment without options.
func tcp(src, dst string, flags uint8) []byte {
	be := binary.BigEndian
	s, d := netip.MustParseAddrPort(src), netip.MustParseAddrPort(dst)
	f := append(hwaddr("ce:cd:02:34:a8:a3"), hwaddr("12:8a:f5:dc:de:7f")...)
	if s.Addr().Is4() {
		f = be.AppendUint16(f, 0x0800)
		f = append(f, 0x45, 0, 0, 40, 0, 1, 0x40, 0, 63, 6, 0, 0)
	} else {
		f = be.AppendUint16(f, 0x86dd)
		f = append(f, 0x60, 0, 0, 0, 0, 20, 6, 63)
	}
	f = append(append(f, s.Addr().AsSlice()...), d.Addr().AsSlice()...)
	f = be.AppendUint16(be.AppendUint16(f, s.Port()), d.Port())
	f = append(f, 0, 0, 0, 1, 0, 0, 0, 2, 5<<4, flags, 0xfa, 0xf0, 0, 0, 0, 0)
	return f
}

// Each kind of message at each verbosity.
func TestShapes(t *testing.T) {
	syn := tcp("10.244.1.235:54590", "10.244.2.251:7000", 2)
	synack := tcp("10.244.2.251:7000", "10.244.1.235:54590", 0x12)
	rst6 := tcp("[fd00::1:a]:7000", "[fd00::2:b]:54590", 0x14)
	ping := echo("12:8a:f5:dc:de:7f", "ce:cd:02:34:a8:a3", "10.244.1.235", "10.244.2.251", 1, true, 63, 0, 8, 0)
	hashed := func(m bpf.TraceNotify, hash uint32) bpf.TraceNotify { m.Head.Hash = hash; return m }
	drop := bpf.DropNotify{
		Head: bpf.Message{Type: bpf.EventDrop, Subtype: bpf.DropPolicy, Source: 1722, Hash: 0x9e8c339d}, Cap: bpf.Captured{LenOrig: 1514, LenCap: uint16(len(syn)), Version: 1},
		SrcIdentity: 8465, DstIdentity: 2, Line: 123, File: bpf.FilePod, Ifindex: 12,
	}
	verdict := bpf.VerdictNotify{
		Head: bpf.Message{Type: bpf.EventVerdict, Source: 1722, Hash: 0x9e8c339d}, Cap: bpf.Captured{LenOrig: 54, LenCap: uint16(len(syn)), Version: 1},
		RemoteIdentity: 28568, DstPort: 7000, Proto: 6, Flags: bpf.VerdictEgress | 2<<3, Cookie: 7,
	}
	denied := verdict
	denied.Verdict, denied.Flags, denied.RemoteIdentity = -int32(bpf.DropPolicy), bpf.VerdictIngress, 1
	capture := bpf.CaptureNotify{Head: bpf.Message{Type: bpf.EventCapture, Subtype: bpf.CaptureSNATPost}, Cap: bpf.Captured{LenOrig: 54, LenCap: uint16(len(syn)), Version: 1}, Arg1: 2}
	created, err := EncodeAgent("Endpoint created", map[string]any{"id": 3596})
	if err != nil {
		t.Fatal(err)
	}
	messages := []any{
		sent{hashed(trace(bpf.TraceToNetwork, 1722, 8465, 28568, 0, bpf.TraceNew, 2, "0.0.0.0", syn), 0x9e8c339d), syn},
		sent{hashed(trace(bpf.TraceToEndpoint, 1722, 28568, 8465, 1722, bpf.TraceReply, 12, "10.244.2.251", synack), 0xe4e39b75), synack},
		sent{trace(bpf.TraceToStack, 1722, 4, 1, 0, bpf.TraceReply, 0, "0.0.0.0", ping), ping},
		sent{trace(bpf.TraceFromEndpoint, 1722, 8465, 6, 0, bpf.TraceUnknown, 0, "::", rst6), rst6},
		sent{trace(bpf.TraceFromOverlay, 0, 28568, 8465, 0, bpf.TraceUnknown, 0, "0.0.0.0", nil), nil},
		sent{drop, syn}, sent{verdict, syn}, sent{denied, syn}, sent{capture, syn},
		debug(bpf.DebugCTLookup61, 10, ip("fd00::1:a"), ip("fd00::2:b"), 1|2<<16), debug(bpf.DebugIdentity6, 10, ip("fd00::2:b"), 5), debug(200, 10, 1, 2),
		created,
	}
	for name, set := range map[string]func(*Printer){
		"brief":     func(p *Printer) {},
		"verbose":   func(p *Printer) { p.Verbosity = Verbose },
		"dissected": func(p *Printer) { p.Verbosity = Dissected },
		"hex":       func(p *Printer) { p.Verbosity, p.Hex, p.Numeric = Dissected, true, true },
		"json":      func(p *Printer) { p.Verbosity = JSON },
	} {
		got := print(t, func(p *Printer) { set(p); p.Lost(1, 5); p.Lost(NoCPU, 3) }, messages...)
		if *update {
			if err := os.WriteFile(filepath.Join("testdata", name+".golden"), []byte(got), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		golden(t, name, got)
		if name == "json" {
			for line := range strings.Lines(got) {
				if !json.Valid([]byte(line)) {
					t.Errorf("no JSON: %s", line)
				}
			}
		}
	}
}

func TestFilter(t *testing.T) {
	out := Trace{TraceNotify: trace(bpf.TraceToNetwork, 5, 1, 2, 0, 0, 0, "0.0.0.0", nil)}
	in := Trace{TraceNotify: trace(bpf.TraceToEndpoint, 7, 1, 2, 7, 0, 0, "0.0.0.0", nil)}
	line := Debug{debug(bpf.DebugCTMatch, 5)}
	for _, tc := range []struct {
		f    Filter
		want []Message
	}{
		{Filter{}, []Message{out, in, line, Agent{}}},
		{Filter{Types: []string{TypeTrace}}, []Message{out, in}},
		{Filter{From: []uint16{5}}, []Message{out, line}},
		{Filter{To: []uint16{7}}, []Message{in}},
		{Filter{Related: []uint16{5, 7}}, []Message{out, in, line}},
		{Filter{Related: []uint16{7}, Types: []string{TypeDebug}}, nil},
	} {
		var got []Message
		for _, m := range []Message{out, in, line, Agent{}} {
			if tc.f.Match(m) {
				got = append(got, m)
			}
		}
		if d := cmp.Diff(len(tc.want), len(got)); d != "" {
			t.Errorf("%+v: %v, want %v", tc.f, got, tc.want)
		}
	}
	if err := (Filter{Types: []string{"drops"}}).Check(); err == nil || !strings.Contains(err.Error(), "drop,") {
		t.Errorf("unknown type: %v", err)
	}
}

func TestFramesAreReadAsWritten(t *testing.T) {
	at := time.Unix(1700000000, 123)
	stream := AppendFrame(AppendFrame(AppendFrame(nil, at, 3, 0, []byte("abc")), at, 1, 9, nil), at, NoCPU, 0, []byte("d"))
	r := NewReader(bytes.NewReader(stream))
	for _, want := range []Event{{at, 3, 0, []byte("abc")}, {at, 1, 9, []byte{}}, {at, NoCPU, 0, []byte("d")}} {
		got, err := r.Next()
		if err != nil || !got.Time.Equal(want.Time) || got.CPU != want.CPU || got.Lost != want.Lost || !bytes.Equal(got.Data, want.Data) {
			t.Errorf("got %+v, %v, want %+v", got, err, want)
		}
	}
	if _, err := r.Next(); !errors.Is(err, io.EOF) {
		t.Errorf("at the end: %v", err)
	}
	if _, err := NewReader(bytes.NewReader(stream[:len(stream)-1])).Next(); err != nil {
		t.Errorf("first of a cut stream: %v", err)
	}
	cut := NewReader(bytes.NewReader(stream[:HeadSize+1]))
	if _, err := cut.Next(); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("cut message: %v", err)
	}
}

// What is sent may be anything: it is printed or refused, and nothing panics.
func FuzzDecode(f *testing.F) {
	frame := tcp("10.244.1.235:54590", "10.244.2.251:7000", 2)
	f.Add(raw(f, trace(bpf.TraceToNetwork, 1, 2, 3, 4, 0, 1, "0.0.0.0", frame), frame...))
	f.Add(raw(f, bpf.DropNotify{Head: bpf.Message{Type: bpf.EventDrop, Subtype: 133}, Cap: bpf.Captured{LenOrig: 1, LenCap: 54, Version: 1}}, frame...))
	f.Add(raw(f, bpf.CaptureNotify{Head: bpf.Message{Type: bpf.EventCapture, Subtype: 10}, Cap: bpf.Captured{LenCap: 60000}}, frame...))
	f.Add(raw(f, bpf.VerdictNotify{Head: bpf.Message{Type: bpf.EventVerdict}, Flags: 0xff}, frame...))
	f.Add(raw(f, debug(bpf.DebugCTLookup41, 1, 2, 3, 4)))
	f.Add([]byte("\x82{\"type\":\"x\",\"message\":{}}"))
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := Decode(data)
		if err != nil {
			return
		}
		for v := Brief; v <= JSON; v++ {
			p := NewPrinter(io.Discard)
			p.Verbosity = v
			p.Print(0, m)
			p.Hex = true
			p.Print(0, m)
		}
		Filter{From: []uint16{1}}.Match(m)
	})
}

func BenchmarkPrint(b *testing.B) {
	frame := tcp("10.244.1.235:54590", "10.244.2.251:7000", 2)
	data := raw(b, trace(bpf.TraceToNetwork, 1, 2, 3, 4, 0, 1, "0.0.0.0", frame), frame...)
	p := NewPrinter(io.Discard)
	for b.Loop() {
		m, err := Decode(data)
		if err != nil {
			b.Fatal(err)
		}
		p.Print(0, m)
	}
}
