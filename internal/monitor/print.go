// SPDX-License-Identifier: Apache-2.0

package monitor

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"strconv"

	"github.com/lash-net/lash/bpf"
)

// Verbosity of a Printer.
type Verbosity int

const (
	Brief     Verbosity = iota // a line a packet; no debugging
	Verbose                    // and debugging
	Dissected                  // and every packet's headers
	JSON                       // one object a line
)

const separator = "------------------------------------------------------------------------------"

// Printer writes messages to a person or, as JSON, to a program. It is used by one goroutine at a time.
type Printer struct {
	Verbosity Verbosity
	Hex       bool                // packets as bytes, not as headers
	Numeric   bool                // identities as numbers
	Link      func(uint32) string // name of a device of this node
	out       io.Writer
	dissector *dissector
}

// NewPrinter writes to out, which is best buffered.
func NewPrinter(out io.Writer) *Printer {
	return &Printer{out: out, dissector: newDissector(), Link: func(i uint32) string { return strconv.Itoa(int(i)) }}
}

// Lost says that events were lost: by the ring, on a CPU, or by the stream to this reader.
func (p *Printer) Lost(cpu int, n uint32) {
	switch {
	case p.Verbosity == JSON:
		by := cpuText(cpu)
		if cpu == NoCPU {
			by = ""
		}
		p.json(struct {
			CPU  string `json:"cpu,omitempty"`
			Type string `json:"type"`
			Lost uint32 `json:"lost"`
		}{by, "lost", n})
	case cpu == NoCPU:
		p.printf("Lost %d events: this reader was too slow\n", n)
	default:
		p.printf("%s Lost %d events\n", cpuText(cpu), n)
	}
}

// Print writes one message that cpu sent.
func (p *Printer) Print(cpu int, m Message) {
	if p.Verbosity == JSON {
		p.printJSON(cpu, m)
		return
	}
	switch m := m.(type) {
	case Trace:
		p.trace(cpu, m)
	case Drop:
		p.drop(cpu, m)
	case Debug:
		if p.Verbosity >= Verbose {
			p.printf("%s MARK %#x FROM %d DEBUG: %s\n", cpuText(cpu), m.Head.Hash, m.Head.Source, m.Text())
		}
	case Capture:
		if p.Verbosity >= Verbose {
			p.packet(m.Packet, func() {
				p.printf("%s MARK %#x FROM %d DEBUG: %d bytes, %s\n", cpuText(cpu), m.Head.Hash, m.Head.Source, m.Cap.LenOrig, m.Text())
			})
		}
	case Verdict:
		p.printf("Policy verdict log: flow %#x local EP ID %d, remote ID %s, proto %d, %s, action %s, auth: %s, match %s, %s\n",
			m.Head.Hash, m.Head.Source, p.identity(m.RemoteIdentity), m.Proto, m.direction(), m.action(), m.auth(), m.match(), p.dissector.summary(m.Packet))
	case Agent:
		p.printf(">> %s: %s\n", m.Kind, m.Text)
	}
}

func (p *Printer) trace(cpu int, m Trace) {
	if p.Verbosity < Dissected {
		p.printf("%s flow %#x , identity %s->%s state %s ifindex %s orig-ip %s: %s\n", m.summary(), m.Head.Hash,
			p.identity(m.SrcIdentity), p.identity(m.DstIdentity), m.State(), p.link(m.Ifindex), m.OrigIP, p.dissector.summary(m.Packet))
		return
	}
	p.packet(m.Packet, func() {
		p.printf("%s MARK %#x FROM %d %s: %d bytes (%d captured), state %s", cpuText(cpu), m.Head.Hash, m.Head.Source, m.Point(), m.Cap.LenOrig, m.Cap.LenCap, m.State())
		if m.Ifindex != 0 {
			p.printf(", interface %s", p.link(m.Ifindex))
		}
		p.printf(", ")
		if m.SrcIdentity != 0 || m.DstIdentity != 0 {
			p.printf(", identity %s->%s", p.identity(m.SrcIdentity), p.identity(m.DstIdentity))
		}
		p.printf(", orig-ip %s", m.OrigIP)
		if m.DstID != 0 {
			p.printf(", to endpoint %d", m.DstID)
		}
		p.printf("\n")
	})
}

// summary is the arrow of the short line.
func (m Trace) summary() string {
	switch m.Head.Subtype {
	case bpf.TraceToEndpoint:
		return fmt.Sprintf("-> endpoint %d", m.DstID)
	case bpf.TraceFromEndpoint:
		return fmt.Sprintf("<- endpoint %d", m.Head.Source)
	case bpf.TraceToHost:
		return "-> host from"
	}
	point := m.Point()
	if len(point) > 5 && point[:5] == "from-" {
		return "<- " + point[5:]
	}
	if len(point) > 3 && point[:3] == "to-" {
		return "-> " + point[3:]
	}
	return "unknown trace"
}

func (p *Printer) drop(cpu int, m Drop) {
	if p.Verbosity < Dissected {
		p.printf("xx drop (%s) flow %#x to endpoint %d, ifindex %s, file %s:%d, , identity %s->%s: %s\n", m.Reason(), m.Head.Hash, m.DstID,
			p.link(m.Ifindex), bpf.FileName(m.File), m.Line, p.identity(m.SrcIdentity), p.identity(m.DstIdentity), p.dissector.summary(m.Packet))
		return
	}
	p.packet(m.Packet, func() {
		p.printf("%s MARK %#x FROM %d DROP: %d bytes, reason %s, file %s:%d", cpuText(cpu), m.Head.Hash, m.Head.Source, m.Cap.LenOrig, m.Reason(), bpf.FileName(m.File), m.Line)
		if m.SrcIdentity != 0 || m.DstIdentity != 0 {
			p.printf(", identity %s->%s", p.identity(m.SrcIdentity), p.identity(m.DstIdentity))
		}
		if m.DstID != 0 {
			p.printf(", to endpoint %d", m.DstID)
		}
		p.printf("\n")
	})
}

// packet writes the block of one packet: its headers or bytes, and the line about it.
func (p *Printer) packet(frame []byte, line func()) {
	if p.Verbosity < Dissected {
		line()
		return
	}
	p.printf("%s\n", separator)
	if p.Hex {
		p.printf("%s", hex.Dump(frame))
	} else {
		for _, l := range p.dissector.lines(frame) {
			p.printf("%s\n", l)
		}
	}
	line()
}

func (m Verdict) direction() string {
	if m.Ingress() {
		return "ingress"
	}
	return "egress"
}

func (m Verdict) action() string {
	switch v := m.VerdictNotify.Verdict; {
	case v < 0:
		return "deny"
	case v > 0:
		return "redirect"
	case m.Flags&bpf.VerdictAudited != 0:
		return "audit"
	}
	return "allow"
}

var matchNames = [...]string{"none", "L3-Only", "L3-L4", "L4-Only", "all", "L3-Proto", "Proto-Only"}

func (m Verdict) match() string { return name(matchNames[:], m.Flags>>3&7) }

var authNames = [...]string{"disabled", "spire", "test-always-fail"}

func (m Verdict) auth() string { return name(authNames[:], m.AuthType) }

func (p *Printer) identity(n uint32) string {
	if p.Numeric {
		return strconv.Itoa(int(n))
	}
	return identity(n)
}

func (p *Printer) link(ifindex uint32) string {
	if ifindex == 0 || p.Numeric {
		return strconv.Itoa(int(ifindex))
	}
	return p.Link(ifindex)
}

func cpuText(cpu int) string { return fmt.Sprintf("CPU %02d:", cpu) }

// A line that cannot be written is the caller's buffer's error, which it sees when it flushes.
func (p *Printer) printf(format string, args ...any) { fmt.Fprintf(p.out, format, args...) }

func (p *Printer) json(v any) {
	b, err := json.Marshal(v)
	if err != nil {
		b, _ = json.Marshal(map[string]string{"type": "error", "message": err.Error()})
	}
	p.printf("%s\n", b)
}

type jsonTrace struct {
	CPU       string   `json:"cpu"`
	Type      string   `json:"type"`
	Mark      string   `json:"mark"`
	Ifindex   string   `json:"ifindex"`
	State     string   `json:"state"`
	Point     string   `json:"observationPoint"`
	Summary   string   `json:"traceSummary"`
	Source    uint16   `json:"source"`
	Bytes     uint32   `json:"bytes"`
	SrcLabel  uint32   `json:"srcLabel"`
	DstLabel  uint32   `json:"dstLabel"`
	DstID     uint16   `json:"dstID"`
	OrigIP    string   `json:"origIP"`
	Dissected *headers `json:"summary,omitempty"`
}

type jsonDrop struct {
	CPU       string   `json:"cpu"`
	Type      string   `json:"type"`
	Mark      string   `json:"mark"`
	Reason    string   `json:"reason"`
	Source    uint16   `json:"source"`
	Bytes     uint32   `json:"bytes"`
	SrcLabel  uint32   `json:"srcLabel"`
	DstLabel  uint32   `json:"dstLabel"`
	DstID     uint32   `json:"dstID"`
	Line      uint16   `json:"Line"`
	File      string   `json:"File"`
	ExtError  int8     `json:"ExtError"`
	Ifindex   uint32   `json:"Ifindex"`
	Dissected *headers `json:"summary,omitempty"`
}

type jsonVerdict struct {
	CPU       string `json:"cpu"`
	Type      string `json:"type"`
	Mark      string `json:"mark"`
	Source    uint16 `json:"source"`
	Bytes     uint32 `json:"bytes"`
	Remote    uint32 `json:"remoteLabel"`
	Verdict   int32  `json:"verdict"`
	Direction string `json:"direction"`
	Action    string `json:"action"`
	Match     string `json:"matchType"`
	DstPort   uint16 `json:"dstPort"`
	Proto     uint8  `json:"proto"`
	Cookie    uint32 `json:"cookie"`
	Summary   string `json:"summary"`
}

type jsonDebug struct {
	CPU     string `json:"cpu"`
	Type    string `json:"type"`
	Mark    string `json:"mark,omitempty"`
	Source  uint16 `json:"source"`
	Bytes   uint32 `json:"bytes,omitempty"`
	Message string `json:"message"`
	Summary string `json:"summary,omitempty"`
}

func (p *Printer) printJSON(cpu int, m Message) {
	on := cpuText(cpu)
	mark := func(h bpf.Message) string { return fmt.Sprintf("%#x", h.Hash) }
	switch m := m.(type) {
	case Trace:
		p.json(jsonTrace{on, TypeTrace, mark(m.Head), p.link(m.Ifindex), m.State(), m.Point(), m.summary(), m.Head.Source, m.Cap.LenOrig,
			m.SrcIdentity, m.DstIdentity, m.DstID, m.OrigIP.String(), p.dissector.headers(m.Packet)})
	case Drop:
		p.json(jsonDrop{on, TypeDrop, mark(m.Head), m.Reason(), m.Head.Source, m.Cap.LenOrig, m.SrcIdentity, m.DstIdentity, m.DstID,
			m.Line, bpf.FileName(m.File), m.ExtError, m.Ifindex, p.dissector.headers(m.Packet)})
	case Verdict:
		p.json(jsonVerdict{on, TypeVerdict, mark(m.Head), m.Head.Source, m.Cap.LenOrig, m.RemoteIdentity, m.VerdictNotify.Verdict,
			m.direction(), m.action(), m.match(), m.DstPort, m.Proto, m.Cookie, p.dissector.summary(m.Packet)})
	case Debug:
		p.json(jsonDebug{CPU: on, Type: TypeDebug, Mark: mark(m.Head), Source: m.Head.Source, Message: m.Text()})
	case Capture:
		p.json(jsonDebug{on, TypeCapture, mark(m.Head), m.Head.Source, m.Cap.LenOrig, m.Text(), p.dissector.summary(m.Packet)})
	case Agent:
		p.json(struct {
			Type    string          `json:"type"`
			Subtype string          `json:"subtype"`
			Message json.RawMessage `json:"message"`
		}{TypeAgent, m.Kind, m.Text})
	}
}
