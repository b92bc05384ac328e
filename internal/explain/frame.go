// SPDX-License-Identifier: Apache-2.0

package explain

import (
	"fmt"
	"net"
	"net/netip"
	"strings"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"

	"github.com/lash-net/lash/api/agent"
	"github.com/lash-net/lash/internal/model"
)

// Protocols by the names that a person gives them.
const (
	tcp  = "tcp"
	udp  = "udp"
	sctp = "sctp"
	icmp = "icmp"
)

const ethLen = 14

// number is the protocol's in the IP header.
func number(proto string, v6 bool) uint8 {
	switch proto {
	case tcp:
		return model.ProtoTCP
	case udp:
		return model.ProtoUDP
	case sctp:
		return model.ProtoSCTP
	}
	if v6 {
		return uint8(layers.IPProtocolICMPv6)
	}
	return uint8(layers.IPProtocolICMPv4)
}

// build makes the frame. opens: of TCP, the first packet of a connection, not one of its data.
func build(p agent.ExplainPacket, smac, dmac model.MAC, opens bool) ([]byte, error) {
	eth := &layers.Ethernet{SrcMAC: smac[:], DstMAC: dmac[:], EthernetType: layers.EthernetTypeIPv4}
	var ip gopacket.NetworkLayer
	all := []gopacket.SerializableLayer{eth}
	v6 := p.Dst.Is6()
	if p.Size < 0 || p.Size > mostSize {
		return nil, fmt.Errorf("a payload of %d bytes: must be 0 to %d", p.Size, mostSize)
	}
	if v6 != p.Src.Is6() {
		return nil, fmt.Errorf("from %s to %s: both ends must be of one address family", p.Src, p.Dst)
	}
	proto := layers.IPProtocol(number(p.Proto, v6))
	if v6 {
		eth.EthernetType = layers.EthernetTypeIPv6
		l := &layers.IPv6{Version: 6, HopLimit: p.TTL, NextHeader: proto, SrcIP: p.Src.AsSlice(), DstIP: p.Dst.AsSlice()}
		ip, all = l, append(all, l)
	} else {
		l := &layers.IPv4{Version: 4, TTL: p.TTL, Protocol: proto, SrcIP: p.Src.AsSlice(), DstIP: p.Dst.AsSlice(), Flags: layers.IPv4DontFragment}
		ip, all = l, append(all, l)
	}
	switch p.Proto {
	case tcp:
		l := &layers.TCP{SrcPort: layers.TCPPort(p.SourcePort), DstPort: layers.TCPPort(p.Port), SYN: opens, ACK: !opens, Seq: 1, Window: 65535}
		l.SetNetworkLayerForChecksum(ip)
		all = append(all, l)
	case udp:
		l := &layers.UDP{SrcPort: layers.UDPPort(p.SourcePort), DstPort: layers.UDPPort(p.Port)}
		l.SetNetworkLayerForChecksum(ip)
		all = append(all, l)
	case sctp:
		all = append(all, &layers.SCTP{SrcPort: layers.SCTPPort(p.SourcePort), DstPort: layers.SCTPPort(p.Port)})
	default:
		if v6 {
			l := &layers.ICMPv6{TypeCode: layers.CreateICMPv6TypeCode(layers.ICMPv6TypeEchoRequest, 0)}
			l.SetNetworkLayerForChecksum(ip)
			all = append(all, l, &layers.ICMPv6Echo{Identifier: p.SourcePort, SeqNumber: 1})
		} else {
			all = append(all, &layers.ICMPv4{TypeCode: layers.CreateICMPv4TypeCode(layers.ICMPv4TypeEchoRequest, 0), Id: p.SourcePort, Seq: 1})
		}
	}
	all = append(all, gopacket.Payload(make([]byte, p.Size)))
	buf := gopacket.NewSerializeBuffer()
	if err := gopacket.SerializeLayers(buf, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, all...); err != nil {
		return nil, fmt.Errorf("make the packet: %w", err)
	}
	frame := buf.Bytes()
	// The serializer pads what is shorter than Ethernet's least; veth pairs do not.
	return frame[:min(len(frame), l3Len(frame)+ethLen)], nil
}

func l3Len(frame []byte) int {
	switch {
	case len(frame) < ethLen+6:
		return 0
	case frame[12] == 0x86:
		return 40 + int(frame[ethLen+4])<<8 + int(frame[ethLen+5])
	}
	return int(frame[ethLen+2])<<8 + int(frame[ethLen+3])
}

// header is what a decision depends on of a frame.
type header struct {
	smac, dmac model.MAC
	v6         bool
	src, dst   netip.AddrPort // ports as the programs have them: of an echo, the identifier at the requester
	proto      uint8
	ttl        uint8
	name       string // of the protocol, as a person gives it
}

func parse(frame []byte) (h header, err error) {
	p := gopacket.NewPacket(frame, layers.LayerTypeEthernet, gopacket.NoCopy)
	var src, dst netip.Addr
	var sport, dport uint16
	for _, l := range p.Layers() {
		switch l := l.(type) {
		case *layers.Ethernet:
			h.smac, h.dmac = model.MAC(l.SrcMAC), model.MAC(l.DstMAC)
		case *layers.IPv4:
			src, _ = netip.AddrFromSlice(l.SrcIP)
			dst, _ = netip.AddrFromSlice(l.DstIP)
			h.proto, h.ttl = uint8(l.Protocol), l.TTL
		case *layers.IPv6:
			src, _ = netip.AddrFromSlice(l.SrcIP)
			dst, _ = netip.AddrFromSlice(l.DstIP)
			h.proto, h.ttl, h.v6 = uint8(l.NextHeader), l.HopLimit, true
		case *layers.TCP:
			sport, dport, h.name = uint16(l.SrcPort), uint16(l.DstPort), tcp
		case *layers.UDP:
			sport, dport, h.name = uint16(l.SrcPort), uint16(l.DstPort), udp
		case *layers.SCTP:
			sport, dport, h.name = uint16(l.SrcPort), uint16(l.DstPort), sctp
		case *layers.ICMPv4:
			h.name = icmp
			if l.TypeCode.Type() == layers.ICMPv4TypeEchoReply {
				dport = l.Id
			} else {
				sport = l.Id
			}
		case *layers.ICMPv6Echo:
			if h.name = icmp; frame[ethLen+40] == layers.ICMPv6TypeEchoReply {
				dport = l.Identifier
			} else {
				sport = l.Identifier
			}
		}
	}
	if !src.IsValid() || h.name == "" {
		return h, fmt.Errorf("not a frame with a TCP, UDP, SCTP or ICMP echo packet")
	}
	h.src, h.dst = netip.AddrPortFrom(src, sport), netip.AddrPortFrom(dst, dport)
	return h, nil
}

// changes says what a program rewrote.
func changes(before, after header) (out []string) {
	add := func(what string, a, b any) {
		if a != b {
			out = append(out, fmt.Sprintf("%s %v -> %v", what, a, b))
		}
	}
	end := func(a netip.AddrPort) string { return strings.TrimSuffix(a.String(), ":0") }
	add("source", end(before.src), end(after.src))
	add("destination", end(before.dst), end(after.dst))
	add("TTL", before.ttl, after.ttl)
	add("source MAC", mac(before.smac), mac(after.smac))
	add("destination MAC", mac(before.dmac), mac(after.dmac))
	return out
}

func mac(m model.MAC) string { return net.HardwareAddr(m[:]).String() }

// setMACs writes a frame's Ethernet addresses.
func setMACs(frame []byte, smac, dmac model.MAC) {
	copy(frame[0:6], dmac[:])
	copy(frame[6:12], smac[:])
}

// forwarded is the frame after the stack has forwarded it.
func forwarded(frame []byte) []byte {
	out := append([]byte{}, frame...)
	if out[12] == 0x86 {
		out[ethLen+7]--
		return out
	}
	out[ethLen+8]--
	sum := uint32(out[ethLen+10])<<8 + uint32(out[ethLen+11]) + 0x100
	sum += sum >> 16
	out[ethLen+10], out[ethLen+11] = byte(sum>>8), byte(sum)
	return out
}
