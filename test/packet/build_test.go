// SPDX-License-Identifier: Apache-2.0

package packet

import (
	"encoding/binary"
	"net/netip"
	"strings"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"

	"github.com/lash-net/lash/internal/model"
)

// packet is what a test says of a packet; frame fills in the rest. The family is that of src.
type packet struct {
	src, dst     netip.Addr
	l4           string // udp, tcp, sctp, echo, answer, error, or the number of another protocol
	sport, dport uint16 // of echo and answer: sport is the identifier
	flags        string // of TCP: some of S, A, F, R
	ttl          uint8  // 64
	size         int    // of the payload, 32
	uncounted    bool   // UDP without a checksum
	options      []byte // IPv4 options, a multiple of four bytes
	extensions   []extension
	fragment     *fragment
	quoted       []byte // l4 error: the frame that the error is about
	icmp         uint8  // l4 error: type, if not "destination unreachable"
}

type extension struct {
	proto uint8
	body  []byte // without its first byte (next header); a hop-by-hop header of 8 bytes has 7
}

type fragment struct {
	id     uint32
	offset uint16 // bytes
	more   bool
}

func ether(m model.MAC) []byte { return m[:] }

func frame(p packet) []byte {
	if p.ttl == 0 {
		p.ttl = 64
	}
	if p.size == 0 {
		p.size = 32
	}
	v6 := p.src.Is6()
	eth := layers.Ethernet{SrcMAC: ether(mac(0x70)), DstMAC: ether(mac(0x71)), EthernetType: layers.EthernetTypeIPv4}
	var network gopacket.NetworkLayer
	ip4 := layers.IPv4{Version: 4, TTL: p.ttl, Id: 7, SrcIP: p.src.AsSlice(), DstIP: p.dst.AsSlice()}
	ip6 := layers.IPv6{Version: 6, HopLimit: p.ttl, SrcIP: p.src.AsSlice(), DstIP: p.dst.AsSlice()}
	network = &ip4
	if v6 {
		eth.EthernetType, network = layers.EthernetTypeIPv6, &ip6
	}
	payload := make([]byte, p.size)
	for i := range payload {
		payload[i] = byte(i * 7)
	}
	body := []gopacket.SerializableLayer{gopacket.Payload(payload)}
	var proto layers.IPProtocol
	switch p.l4 {
	case "udp":
		udp := &layers.UDP{SrcPort: layers.UDPPort(p.sport), DstPort: layers.UDPPort(p.dport)}
		udp.SetNetworkLayerForChecksum(network)
		proto, body = protoUDP, append([]gopacket.SerializableLayer{udp}, body...)
	case "tcp":
		tcp := &layers.TCP{
			SrcPort: layers.TCPPort(p.sport), DstPort: layers.TCPPort(p.dport), Seq: 1, Window: 1000,
			SYN: strings.Contains(p.flags, "S"), ACK: strings.Contains(p.flags, "A"), FIN: strings.Contains(p.flags, "F"), RST: strings.Contains(p.flags, "R"),
		}
		tcp.SetNetworkLayerForChecksum(network)
		proto, body = protoTCP, append([]gopacket.SerializableLayer{tcp}, body...)
	case "sctp":
		proto, body = protoSCTP, append([]gopacket.SerializableLayer{&layers.SCTP{SrcPort: layers.SCTPPort(p.sport), DstPort: layers.SCTPPort(p.dport)}}, body...)
	case "echo", "answer", "error":
		var icmp []gopacket.SerializableLayer
		proto, icmp = p.control(network, v6)
		if p.quoted != nil {
			body = []gopacket.SerializableLayer{gopacket.Payload(p.quoted[14:])}
		}
		body = append(icmp, body...)
	case "gre":
		proto = 47
	}
	all := gopacket.NewSerializeBuffer()
	serialize := func(l ...gopacket.SerializableLayer) []byte {
		if err := gopacket.SerializeLayers(all, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, l...); err != nil {
			panic(err)
		}
		return append([]byte(nil), all.Bytes()...)
	}
	l4 := serialize(body...)
	if p.uncounted {
		l4[6], l4[7] = 0, 0
	}
	if !v6 {
		ip4.Protocol = proto
		if p.fragment != nil {
			ip4.Id, ip4.FragOffset = uint16(p.fragment.id), p.fragment.offset/8
			if p.fragment.more {
				ip4.Flags = layers.IPv4MoreFragments
			}
			l4 = cut(l4, p.fragment)
		}
		out := serialize(&eth, &ip4, gopacket.Payload(l4))
		return withOptions(out, p.options)
	}
	if p.fragment != nil {
		head := make([]byte, 7)
		off := p.fragment.offset
		if p.fragment.more {
			off |= 1
		}
		binary.BigEndian.PutUint16(head[1:], off)
		binary.BigEndian.PutUint32(head[3:], p.fragment.id)
		p.extensions = append(p.extensions, extension{protoFragment, head})
		l4 = cut(l4, p.fragment)
	}
	next := uint8(proto)
	for i := len(p.extensions) - 1; i >= 0; i-- {
		e := p.extensions[i]
		l4 = append(append([]byte{next}, e.body...), l4...)
		next = e.proto
	}
	ip6.NextHeader = layers.IPProtocol(next)
	return serialize(&eth, &ip6, gopacket.Payload(l4))
}

// cut is the part of an L4 packet that a fragment carries: 16 bytes of it, or what is left.
func cut(l4 []byte, f *fragment) []byte {
	l4 = l4[min(int(f.offset), len(l4)):]
	if f.more {
		l4 = l4[:min(16, len(l4))]
	}
	return l4
}

func withOptions(frame, options []byte) []byte {
	if len(options) == 0 {
		return frame
	}
	out := append(append(append([]byte(nil), frame[:34]...), options...), frame[34:]...)
	out[14] += byte(len(options) / 4)
	binary.BigEndian.PutUint16(out[16:], uint16(len(out)-14))
	mend(out)
	return out
}

// control is the header of an ICMP message.
func (p packet) control(network gopacket.NetworkLayer, v6 bool) (layers.IPProtocol, []gopacket.SerializableLayer) {
	if !v6 {
		h := &layers.ICMPv4{TypeCode: layers.CreateICMPv4TypeCode(8, 0), Id: p.sport, Seq: 1}
		switch {
		case p.l4 == "answer":
			h.TypeCode, h.Id = 0, p.dport
		case p.l4 == "error":
			h.TypeCode, h.Id, h.Seq = layers.CreateICMPv4TypeCode(3, 3), 0, 0
			if p.icmp != 0 {
				h.TypeCode = layers.CreateICMPv4TypeCode(p.icmp, 0)
			}
		}
		return protoICMP, []gopacket.SerializableLayer{h}
	}
	h := &layers.ICMPv6{TypeCode: layers.CreateICMPv6TypeCode(128, 0)}
	h.SetNetworkLayerForChecksum(network)
	rest := make([]byte, 4)
	binary.BigEndian.PutUint16(rest, p.sport)
	switch {
	case p.l4 == "answer":
		h.TypeCode = layers.CreateICMPv6TypeCode(129, 0)
		binary.BigEndian.PutUint16(rest, p.dport)
	case p.l4 == "error":
		h.TypeCode, rest = layers.CreateICMPv6TypeCode(1, 4), make([]byte, 4)
		if p.icmp != 0 {
			h.TypeCode = layers.CreateICMPv6TypeCode(p.icmp, 0)
		}
	}
	return protoICMPv6, []gopacket.SerializableLayer{h, gopacket.Payload(rest)}
}

// arp is a request for target's hardware address.
func arp(sender, target netip.Addr) []byte {
	b := gopacket.NewSerializeBuffer()
	from := ether(mac(macPod + ifA))
	err := gopacket.SerializeLayers(b, gopacket.SerializeOptions{FixLengths: true},
		&layers.Ethernet{SrcMAC: from, DstMAC: []byte{255, 255, 255, 255, 255, 255}, EthernetType: layers.EthernetTypeARP},
		&layers.ARP{
			AddrType: layers.LinkTypeEthernet, Protocol: layers.EthernetTypeIPv4, HwAddressSize: 6, ProtAddressSize: 4, Operation: layers.ARPRequest,
			SourceHwAddress: from, SourceProtAddress: sender.AsSlice(), DstHwAddress: make([]byte, 6), DstProtAddress: target.AsSlice(),
		})
	if err != nil {
		panic(err)
	}
	return append([]byte(nil), b.Bytes()...)
}

// discovery is an ICMPv6 message of the neighbour discovery protocol about target; with the sender's address as option.
func discovery(icmpType uint8, src, dst, target netip.Addr) []byte {
	b := gopacket.NewSerializeBuffer()
	from := ether(mac(macPod + ifA))
	ip := &layers.IPv6{Version: 6, HopLimit: 255, NextHeader: layers.IPProtocolICMPv6, SrcIP: src.AsSlice(), DstIP: dst.AsSlice()}
	icmp := &layers.ICMPv6{TypeCode: layers.CreateICMPv6TypeCode(icmpType, 0)}
	icmp.SetNetworkLayerForChecksum(ip)
	body := append([]byte{0, 0, 0, 0}, target.AsSlice()...)
	body = append(append(body, 1, 1), from...)
	err := gopacket.SerializeLayers(b, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true},
		&layers.Ethernet{SrcMAC: from, DstMAC: []byte{0x33, 0x33, 0xff, 0, 0, 1}, EthernetType: layers.EthernetTypeIPv6}, ip, icmp, gopacket.Payload(body))
	if err != nil {
		panic(err)
	}
	return append([]byte(nil), b.Bytes()...)
}
