// SPDX-License-Identifier: Apache-2.0

package packet

import (
	"encoding/binary"
	"net/netip"
)

// Protocol numbers and Ethernet types.
const (
	protoHopByHop = 0
	protoICMP     = 1
	protoTCP      = 6
	protoUDP      = 17
	protoRouting  = 43
	protoFragment = 44
	protoAH       = 51
	protoICMPv6   = 58
	protoDestOpts = 60
	protoSCTP     = 132

	etherIPv4 = 0x0800
	etherARP  = 0x0806
	etherIPv6 = 0x86dd
)

// header is what the reference parser, written from the RFCs and not from bpf/lib/parse.h, finds in a frame.
type header struct {
	v6           bool
	src, dst     netip.Addr
	sport, dport uint16 // of TCP, UDP, SCTP; of an echo the identifier on the requester's side
	proto        uint8
	ttl          uint8
	l4           int // offset in the frame
	end          int // of the packet as L3 states it, in the frame
	fragment     bool
	later        bool // a fragment without the L4 header
	icmpError    bool
	options      bool // IPv4 options or IPv6 extension headers
	icmpType     uint8
}

// read returns nil for what is no packet or one too short for its headers.
func read(frame []byte) *header {
	if len(frame) < 14 {
		return nil
	}
	l3 := frame[14:]
	h := &header{}
	switch be16(frame[12:]) {
	case etherIPv4:
		if len(l3) < 20 || l3[0]>>4 != 4 || l3[0]&15 < 5 || len(l3) < int(l3[0]&15)*4 {
			return nil
		}
		h.src, _ = netip.AddrFromSlice(l3[12:16])
		h.dst, _ = netip.AddrFromSlice(l3[16:20])
		h.proto, h.ttl = l3[9], l3[8]
		h.l4, h.end = 14+int(l3[0]&15)*4, 14+int(be16(l3[2:]))
		h.options = l3[0]&15 > 5
		frag := be16(l3[6:])
		h.fragment, h.later = frag&0x3fff != 0, frag&0x1fff != 0
	case etherIPv6:
		if len(l3) < 40 || l3[0]>>4 != 6 {
			return nil
		}
		h.v6 = true
		h.src, _ = netip.AddrFromSlice(l3[8:24])
		h.dst, _ = netip.AddrFromSlice(l3[24:40])
		h.proto, h.ttl = l3[6], l3[7]
		h.l4, h.end = 54, 54+int(be16(l3[4:]))
		if !h.extensions(frame) {
			return nil
		}
	default:
		return nil
	}
	if h.later {
		return h
	}
	if !h.transport(frame) {
		return nil
	}
	return h
}

// extensions walks to L4: six headers at most, which is more than anybody sends.
func (h *header) extensions(frame []byte) bool {
	for range 6 {
		size := 0
		switch h.proto {
		case protoHopByHop, protoRouting, protoDestOpts, protoFragment, protoAH:
			if len(frame) < h.l4+8 {
				return false
			}
		default:
			return h.l4 <= len(frame)
		}
		h.options = true
		switch h.proto {
		case protoFragment:
			h.fragment = true
			h.later = be16(frame[h.l4+2:])&0xfff8 != 0
			size = 8
		case protoAH:
			size = (int(frame[h.l4+1]) + 2) * 4
		default:
			size = (int(frame[h.l4+1]) + 1) * 8
		}
		h.proto = frame[h.l4]
		h.l4 += size
		if h.later {
			return true
		}
	}
	return false
}

func (h *header) transport(frame []byte) bool {
	var l4 []byte
	if h.l4 < len(frame) {
		l4 = frame[h.l4:]
	}
	switch {
	case h.proto == protoTCP:
		if len(l4) < 14 || l4[12]>>4 < 5 {
			return false
		}
		h.sport, h.dport = be16(l4), be16(l4[2:])
	case h.proto == protoUDP, h.proto == protoSCTP:
		if len(l4) < 4 {
			return false
		}
		h.sport, h.dport = be16(l4), be16(l4[2:])
	case h.proto == protoICMP && !h.v6, h.proto == protoICMPv6 && h.v6:
		if len(l4) < 8 {
			return false
		}
		h.icmpType = l4[0]
		request, reply, failed := byte(8), byte(0), l4[0] == 3 || l4[0] == 11 || l4[0] == 12
		if h.v6 {
			request, reply, failed = 128, 129, l4[0] < 128
		}
		switch {
		case l4[0] == request:
			h.sport = be16(l4[4:])
		case l4[0] == reply:
			h.dport = be16(l4[4:])
		case failed:
			h.icmpError = true
		}
	}
	return true
}

// sum is the one's complement sum of b, folded to 16 bits.
func sum(start uint32, b []byte) uint32 {
	for ; len(b) > 1; b = b[2:] {
		start += uint32(be16(b))
	}
	if len(b) == 1 {
		start += uint32(b[0]) << 8
	}
	for start > 0xffff {
		start = start&0xffff + start>>16
	}
	return start
}

// ipSound tells whether an IPv4 header's checksum is right; IPv6 has none.
func ipSound(frame []byte) bool {
	h := read(frame)
	return h == nil || h.v6 || sum(0, frame[14:14+int(frame[14]&15)*4]) == 0xffff
}

// l4Sound tells whether the checksum of the whole L4 packet is right, and whether there is one to tell by.
func l4Sound(frame []byte) (sound, known bool) {
	h := read(frame)
	if h == nil || h.fragment || h.end > len(frame) || h.end < h.l4 {
		return false, false
	}
	l4 := frame[h.l4:h.end]
	pseudo := uint32(0)
	switch {
	case h.proto == protoUDP && len(l4) >= 8:
		if be16(l4[6:]) == 0 && !h.v6 {
			return true, true
		}
	case h.proto == protoTCP && len(l4) >= 20, h.proto == protoICMPv6 && h.v6 && len(l4) >= 8:
	case h.proto == protoICMP && !h.v6 && len(l4) >= 8:
		return sum(0, l4) == 0xffff, true
	default:
		return false, false
	}
	pseudo = sum(pseudo, h.src.AsSlice())
	pseudo = sum(pseudo, h.dst.AsSlice())
	pseudo += uint32(len(l4)) + uint32(h.proto)
	return sum(pseudo, l4) == 0xffff, true
}

// mend makes the checksums of a frame right, so that a fuzzed packet is a sound one.
func mend(frame []byte) {
	h := read(frame)
	if h == nil {
		return
	}
	if !h.v6 {
		ip := frame[14 : 14+min(int(frame[14]&15)*4, len(frame)-14)]
		ip[10], ip[11] = 0, 0
		binary.BigEndian.PutUint16(ip[10:], ^uint16(sum(0, ip)))
	}
	if h.fragment || h.end > len(frame) || h.end < h.l4 {
		return
	}
	l4 := frame[h.l4:h.end]
	at := -1
	pseudo := sum(sum(0, h.src.AsSlice()), h.dst.AsSlice()) + uint32(len(l4)) + uint32(h.proto)
	switch {
	case h.proto == protoTCP && len(l4) >= 20:
		at = 16
	case h.proto == protoUDP && len(l4) >= 8:
		if at = 6; be16(l4[6:]) == 0 {
			return // without a checksum it stays
		}
	case h.proto == protoICMP && !h.v6 && len(l4) >= 8:
		at, pseudo = 2, 0
	case h.proto == protoICMPv6 && h.v6 && len(l4) >= 8:
		at = 2
	default:
		return
	}
	l4[at], l4[at+1] = 0, 0
	check := ^uint16(sum(pseudo, l4))
	if check == 0 && h.proto == protoUDP {
		check = 0xffff
	}
	binary.BigEndian.PutUint16(l4[at:], check)
}
