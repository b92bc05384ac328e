// SPDX-License-Identifier: Apache-2.0

package monitor

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"time"

	"github.com/lash-net/lash/bpf"
	"github.com/lash-net/lash/internal/model"
)

// Sizes of the messages, bytes.
var (
	HeadSize    = binary.Size(bpf.EventHead{})
	traceSize   = binary.Size(bpf.TraceNotify{})
	dropSize    = binary.Size(bpf.DropNotify{})
	captureSize = binary.Size(bpf.CaptureNotify{})
	verdictSize = binary.Size(bpf.VerdictNotify{})
	debugSize   = binary.Size(bpf.DebugNotify{})
)

// Event is one frame of the agent's stream: a message, or how many were lost.
type Event struct {
	Time time.Time
	CPU  int // that handled the packet; NoCPU: none did
	Lost uint32
	Data []byte // the message; empty for a loss
}

// NoCPU marks events that are not about packets, and losses that are not the ring's.
const NoCPU = 0xffff

// AppendFrame appends a frame to a batch. Frames are in this machine's byte order: they do not leave it.
func AppendFrame(b []byte, at time.Time, cpu uint16, lost uint32, message []byte) []byte {
	b = binary.NativeEndian.AppendUint64(b, uint64(at.UnixNano()))
	b = binary.NativeEndian.AppendUint16(b, cpu)
	b = binary.NativeEndian.AppendUint16(b, uint16(len(message)))
	b = binary.NativeEndian.AppendUint32(b, lost)
	return append(b, message...)
}

// Reader reads frames from a stream.
type Reader struct {
	in  io.Reader
	buf []byte
}

// NewReader reads frames from in, which is best buffered.
func NewReader(in io.Reader) *Reader { return &Reader{in: in, buf: make([]byte, 1<<16)} }

// Next returns the next frame, whose Data is valid until the one after. io.EOF at the end of the stream.
func (r *Reader) Next() (Event, error) {
	head := r.buf[:HeadSize]
	if _, err := io.ReadFull(r.in, head); err != nil {
		return Event{}, err
	}
	ne := binary.NativeEndian
	e := Event{Time: time.Unix(0, int64(ne.Uint64(head))), CPU: int(ne.Uint16(head[8:])), Lost: ne.Uint32(head[12:])}
	e.Data = r.buf[:ne.Uint16(head[10:])]
	if _, err := io.ReadFull(r.in, e.Data); err != nil {
		return Event{}, fmt.Errorf("message of %d bytes: %w", len(e.Data), io.ErrUnexpectedEOF)
	}
	return e, nil
}

// Message is what every kind of message has in common. Dst is 0 where the message names no endpoint at the other end.
type Message interface {
	Type() string
	Endpoints() (src, dst uint16)
}

// Trace says that a packet passed an observation point.
type Trace struct {
	bpf.TraceNotify
	OrigIP netip.Addr // the source before translation, or 0.0.0.0 (::)
	Packet []byte
}

// Drop says that a packet was dropped, and where in the source.
type Drop struct {
	bpf.DropNotify
	Packet []byte
}

// Capture shows a packet at a point that only debugging asks for.
type Capture struct {
	bpf.CaptureNotify
	Packet []byte
}

// Verdict says what policy decided about a new connection.
type Verdict struct {
	bpf.VerdictNotify
	Packet []byte
}

// Debug is one line of debugging.
type Debug struct{ bpf.DebugNotify }

// Agent is the agent's own event.
type Agent struct {
	Kind string          `json:"type"` // "Endpoint created"
	Text json.RawMessage `json:"message"`
}

// Names of the types, as --type takes them.
const (
	TypeAgent   = "agent"
	TypeCapture = "capture"
	TypeDebug   = "debug"
	TypeDrop    = "drop"
	TypeVerdict = "policy-verdict"
	TypeTrace   = "trace"
)

// Types are all types.
var Types = []string{TypeAgent, TypeCapture, TypeDebug, TypeDrop, TypeVerdict, TypeTrace}

func (Trace) Type() string   { return TypeTrace }
func (Drop) Type() string    { return TypeDrop }
func (Capture) Type() string { return TypeCapture }
func (Verdict) Type() string { return TypeVerdict }
func (Debug) Type() string   { return TypeDebug }
func (Agent) Type() string   { return TypeAgent }

func (m Trace) Endpoints() (src, dst uint16)   { return m.Head.Source, m.DstID }
func (m Drop) Endpoints() (src, dst uint16)    { return m.Head.Source, uint16(m.DstID) }
func (m Capture) Endpoints() (src, dst uint16) { return m.Head.Source, 0 }
func (m Debug) Endpoints() (src, dst uint16)   { return m.Head.Source, 0 }
func (Agent) Endpoints() (src, dst uint16)     { return 0, 0 }

// The endpoint of a verdict is the one whose policy was asked.
func (m Verdict) Endpoints() (src, dst uint16) {
	if m.Ingress() {
		return 0, m.Head.Source
	}
	return m.Head.Source, 0
}

// Ingress tells whether the policy is that of the packet's destination.
func (m Verdict) Ingress() bool { return m.Flags&3 == bpf.VerdictIngress }

// Decode reads a message. Packets are not copied out of data.
func Decode(data []byte) (Message, error) {
	if len(data) == 0 {
		return nil, fmt.Errorf("empty message")
	}
	switch data[0] {
	case bpf.EventTrace:
		var m Trace
		err := m.decode(data)
		return m, err
	case bpf.EventDrop:
		var m Drop
		rest, err := decode(data, &m.DropNotify, dropSize)
		if err == nil && m.Cap.Version > 1 {
			err = fmt.Errorf("drop message of unknown version %d", m.Cap.Version)
		}
		m.Packet = packet(rest, m.Cap)
		return m, err
	case bpf.EventCapture:
		var m Capture
		rest, err := decode(data, &m.CaptureNotify, captureSize)
		m.Packet = packet(rest, m.Cap)
		return m, err
	case bpf.EventVerdict:
		var m Verdict
		rest, err := decode(data, &m.VerdictNotify, verdictSize)
		m.Packet = packet(rest, m.Cap)
		return m, err
	case bpf.EventDebug:
		var m Debug
		_, err := decode(data, &m.DebugNotify, debugSize)
		return m, err
	case bpf.EventAgent:
		var m Agent
		if err := json.Unmarshal(data[1:], &m); err != nil {
			return nil, fmt.Errorf("agent event: %w", err)
		}
		return m, nil
	}
	return nil, fmt.Errorf("message of unknown type %d", data[0])
}

// EncodeAgent is the message of an agent event.
func EncodeAgent(kind string, facts any) ([]byte, error) {
	text, err := json.Marshal(facts)
	if err != nil {
		return nil, err
	}
	b, err := json.Marshal(Agent{kind, text})
	return append([]byte{bpf.EventAgent}, b...), err
}

func decode(data []byte, into any, size int) (rest []byte, err error) {
	if _, err := binary.Decode(data, binary.NativeEndian, into); err != nil {
		return nil, fmt.Errorf("message of type %d: %d bytes, must be at least %d", data[0], len(data), size)
	}
	return data[size:], nil
}

// packet is what of the packet follows its message.
func packet(rest []byte, c bpf.Captured) []byte { return rest[:min(len(rest), int(c.LenCap))] }

func (m *Trace) decode(data []byte) error {
	rest, err := decode(data, &m.TraceNotify, traceSize)
	if err != nil {
		return err
	}
	if m.Cap.Version != 1 {
		return fmt.Errorf("trace message of unknown version %d", m.Cap.Version)
	}
	m.OrigIP = netip.AddrFrom4([4]byte(m.TraceNotify.OrigIP[:4]))
	if m.Flags&bpf.TraceIPv6 != 0 {
		m.OrigIP = netip.AddrFrom16(m.TraceNotify.OrigIP)
	}
	m.Packet = packet(rest, m.Cap)
	return nil
}

// identity is the name of a reserved identity, or the number.
func identity(n uint32) string {
	s := model.Identity(n).String()
	if model.Identity(n).Reserved() {
		return s[len("reserved:"):]
	}
	return s
}

var pointNames = [...]string{
	bpf.TraceToEndpoint: "to-endpoint", bpf.TraceToProxy: "to-proxy", bpf.TraceToHost: "to-host", bpf.TraceToStack: "to-stack",
	bpf.TraceToOverlay: "to-overlay", bpf.TraceFromEndpoint: "from-endpoint", bpf.TraceFromProxy: "from-proxy",
	bpf.TraceFromHost: "from-host", bpf.TraceFromStack: "from-stack", bpf.TraceFromOverlay: "from-overlay",
	bpf.TraceFromNetwork: "from-network", bpf.TraceToNetwork: "to-network", bpf.TraceFromCrypto: "from-crypto", bpf.TraceToCrypto: "to-crypto",
}

// Point is the name of the observation point.
func (m Trace) Point() string { return name(pointNames[:], m.Head.Subtype) }

var reasonNames = [...]string{
	bpf.TraceNew: "new", bpf.TraceEstablished: "established", bpf.TraceReply: "reply", bpf.TraceRelated: "related",
	bpf.TraceReopened: "reopened", bpf.TraceUnknown: "unknown",
}

// State is what the packet is to its connection.
func (m Trace) State() string { return name(reasonNames[:], m.Reason) }

// Reason is the text of the drop reason.
func (m Drop) Reason() string { return bpf.DropName(m.Head.Subtype) }

func name(names []string, n uint8) string {
	if int(n) < len(names) && names[n] != "" {
		return names[n]
	}
	return fmt.Sprint(n)
}
