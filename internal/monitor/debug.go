// SPDX-License-Identifier: Apache-2.0

package monitor

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/lash-net/lash/bpf"
)

var verdictNames = [...]string{bpf.TraceNew: "New", bpf.TraceEstablished: "Established", bpf.TraceReply: "Reply", bpf.TraceRelated: "Related"}

// Text is the line of debugging.
func (m Debug) Text() string {
	revnat := func(arg uint32) uint16 { return bpf.BE16(arg).Host() }
	switch m.Head.Subtype {
	case bpf.DebugLocalDelivery:
		return fmt.Sprintf("Attempting local delivery for container id %d from seclabel %d", m.Arg1, m.Arg2)
	case bpf.DebugEncap:
		// The number reads as the address does from left to right.
		return fmt.Sprintf("Encapsulating to node %d (%#[1]x) from seclabel %d", m.Arg1, m.Arg2)
	case bpf.DebugDecap:
		return fmt.Sprintf("Tunnel decap: id=%d flowlabel=%x", m.Arg1, m.Arg2)
	case bpf.DebugCTLookup41:
		return fmt.Sprintf("Conntrack lookup 1/2: src=%s:%d dst=%s:%d", ip4(m.Arg1), m.Arg3&0xffff, ip4(m.Arg2), m.Arg3>>16)
	case bpf.DebugCTLookup61:
		return fmt.Sprintf("Conntrack lookup 1/2: src=[::%s]:%d dst=[::%s]:%d", ip6(m.Arg1), m.Arg3&0xffff, ip6(m.Arg2), m.Arg3>>16)
	case bpf.DebugCTLookup42, bpf.DebugCTLookup62:
		return fmt.Sprintf("Conntrack lookup 2/2: nexthdr=%d flags=%d", m.Arg1>>8, m.Arg1&0xff)
	case bpf.DebugCTMatch:
		return fmt.Sprintf("CT entry found lifetime=%d, revnat=%d", m.Arg1, revnat(m.Arg2))
	case bpf.DebugCTVerdict:
		return fmt.Sprintf("CT verdict: %s, revnat=%d", name(verdictNames[:], uint8(m.Arg1)), revnat(m.Arg2))
	case bpf.DebugCTCreated4:
		return fmt.Sprintf("Conntrack create: proxy-port=%d revnat=%d src-identity=%d lb=%s", m.Arg1>>16, revnat(m.Arg1&0xffff), m.Arg2, ip4(m.Arg3))
	case bpf.DebugCTCreated6:
		return fmt.Sprintf("Conntrack create: proxy-port=%d revnat=%d src-identity=%d", m.Arg1>>16, revnat(m.Arg1&0xffff), m.Arg2)
	case bpf.DebugNoIdentity4:
		return fmt.Sprintf("Failed to map addr=%s to identity", ip4(m.Arg1))
	case bpf.DebugNoIdentity6:
		return fmt.Sprintf("Failed to map addr.p4=[::%s] to identity", ip6(m.Arg1))
	case bpf.DebugIdentity4:
		return fmt.Sprintf("Successfully mapped addr=%s to identity=%d", ip4(m.Arg1), m.Arg2)
	case bpf.DebugIdentity6:
		return fmt.Sprintf("Successfully mapped addr.p4=[::%s] to identity=%d", ip6(m.Arg1), m.Arg2)
	}
	return fmt.Sprintf("Unknown message type=%d arg1=%d arg2=%d", m.Head.Subtype, m.Arg1, m.Arg2)
}

// Text says what the capture shows.
func (m Capture) Text() string {
	switch m.Head.Subtype {
	case bpf.CaptureSNATPre:
		return fmt.Sprintf("Packet going into snat engine on ifindex %d", m.Arg1)
	case bpf.CaptureSNATPost:
		return fmt.Sprintf("Packet coming from snat engine on ifindex %d", m.Arg1)
	}
	return fmt.Sprintf("Unknown message type=%d arg1=%d", m.Head.Subtype, m.Arg1)
}

// ip4 is an address that a program sent as it stands in the packet.
func ip4(arg uint32) netip.Addr {
	return netip.AddrFrom4([4]byte(binary.NativeEndian.AppendUint32(nil, arg)))
}

// ip6 is the last four bytes of an address.
func ip6(arg uint32) string {
	b := binary.NativeEndian.AppendUint32(nil, arg)
	return fmt.Sprintf("%x:%x", binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:]))
}
