// SPDX-License-Identifier: Apache-2.0

package monitor

import (
	"fmt"
	"net"
	"strconv"
	"strings"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
)

// dissector decodes the headers of frames. It is used by one goroutine at a time.
type dissector struct {
	eth     layers.Ethernet
	vlan    layers.Dot1Q
	arp     layers.ARP
	ip4     layers.IPv4
	ip6     layers.IPv6
	icmp4   layers.ICMPv4
	icmp6   layers.ICMPv6
	tcp     layers.TCP
	udp     layers.UDP
	sctp    layers.SCTP
	parser  *gopacket.DecodingLayerParser
	decoded []gopacket.LayerType
}

func newDissector() *dissector {
	d := &dissector{}
	d.parser = gopacket.NewDecodingLayerParser(layers.LayerTypeEthernet,
		&d.eth, &d.vlan, &d.arp, &d.ip4, &d.ip6, &d.icmp4, &d.icmp6, &d.tcp, &d.udp, &d.sctp)
	d.parser.IgnoreUnsupported = true
	return d
}

// decode tells how far it came by d.decoded; what a frame has beyond that is not told.
func (d *dissector) decode(frame []byte) { _ = d.parser.DecodeLayers(frame, &d.decoded) }

func (d *dissector) layer(t gopacket.LayerType) gopacket.Layer {
	switch t {
	case layers.LayerTypeEthernet:
		return &d.eth
	case layers.LayerTypeDot1Q:
		return &d.vlan
	case layers.LayerTypeARP:
		return &d.arp
	case layers.LayerTypeIPv4:
		return &d.ip4
	case layers.LayerTypeIPv6:
		return &d.ip6
	case layers.LayerTypeICMPv4:
		return &d.icmp4
	case layers.LayerTypeICMPv6:
		return &d.icmp6
	case layers.LayerTypeTCP:
		return &d.tcp
	case layers.LayerTypeUDP:
		return &d.udp
	case layers.LayerTypeSCTP:
		return &d.sctp
	}
	return nil
}

// lines is one line a header.
func (d *dissector) lines(frame []byte) []string {
	d.decode(frame)
	var lines []string
	for _, t := range d.decoded {
		if l := d.layer(t); l != nil {
			lines = append(lines, gopacket.LayerString(l))
		}
	}
	if d.parser.Truncated {
		lines = append(lines, "  Packet has been truncated")
	}
	return lines
}

// summary is "10.0.1.5:40000 -> 10.0.2.7:80 tcp SYN", "10.0.1.5 -> 10.0.2.7 icmp EchoRequest", or what else is known.
func (d *dissector) summary(frame []byte) string {
	d.decode(frame)
	var src, dst net.IP
	var srcPort, dstPort int
	what := ""
	for _, t := range d.decoded {
		switch t {
		case layers.LayerTypeIPv4:
			src, dst = d.ip4.SrcIP, d.ip4.DstIP
		case layers.LayerTypeIPv6:
			src, dst = d.ip6.SrcIP, d.ip6.DstIP
		case layers.LayerTypeICMPv4:
			what = "icmp " + d.icmp4.TypeCode.String()
		case layers.LayerTypeICMPv6:
			what = "icmp " + d.icmp6.TypeCode.String()
		case layers.LayerTypeTCP:
			what, srcPort, dstPort = strings.TrimSpace("tcp "+d.tcpFlags()), int(d.tcp.SrcPort), int(d.tcp.DstPort)
		case layers.LayerTypeUDP:
			what, srcPort, dstPort = "udp", int(d.udp.SrcPort), int(d.udp.DstPort)
		case layers.LayerTypeSCTP:
			what, srcPort, dstPort = "sctp", int(d.sctp.SrcPort), int(d.sctp.DstPort)
		}
	}
	switch {
	case srcPort != 0 || dstPort != 0:
		return fmt.Sprintf("%s -> %s %s", net.JoinHostPort(src.String(), strconv.Itoa(srcPort)), net.JoinHostPort(dst.String(), strconv.Itoa(dstPort)), what)
	case src != nil:
		return strings.TrimSpace(fmt.Sprintf("%s -> %s %s", src, dst, what))
	case len(d.decoded) > 0:
		return fmt.Sprintf("%s -> %s %s", d.eth.SrcMAC, d.eth.DstMAC, d.eth.EthernetType)
	}
	return "[unknown]"
}

func (d *dissector) tcpFlags() string {
	var flags []string
	for _, f := range []struct {
		set  bool
		name string
	}{{d.tcp.SYN, "SYN"}, {d.tcp.ACK, "ACK"}, {d.tcp.RST, "RST"}, {d.tcp.FIN, "FIN"}} {
		if f.set {
			flags = append(flags, f.name)
		}
	}
	return strings.Join(flags, ", ")
}

// ends are the two ends of a layer.
type ends struct {
	Src string `json:"src"`
	Dst string `json:"dst"`
}

// headers is a frame in JSON.
type headers struct {
	Ethernet string `json:"ethernet,omitempty"`
	IPv4     string `json:"ipv4,omitempty"`
	IPv6     string `json:"ipv6,omitempty"`
	TCP      string `json:"tcp,omitempty"`
	UDP      string `json:"udp,omitempty"`
	SCTP     string `json:"sctp,omitempty"`
	ICMPv4   string `json:"icmpv4,omitempty"`
	ICMPv6   string `json:"icmpv6,omitempty"`
	L2       *ends  `json:"l2,omitempty"`
	L3       *ends  `json:"l3,omitempty"`
	L4       *ends  `json:"l4,omitempty"`
}

func flowEnds(f gopacket.Flow) *ends {
	src, dst := f.Endpoints()
	return &ends{src.String(), dst.String()}
}

func (d *dissector) headers(frame []byte) *headers {
	if len(frame) == 0 {
		return nil
	}
	d.decode(frame)
	h := &headers{}
	for _, t := range d.decoded {
		switch t {
		case layers.LayerTypeEthernet:
			h.Ethernet, h.L2 = gopacket.LayerString(&d.eth), flowEnds(d.eth.LinkFlow())
		case layers.LayerTypeIPv4:
			h.IPv4, h.L3 = gopacket.LayerString(&d.ip4), flowEnds(d.ip4.NetworkFlow())
		case layers.LayerTypeIPv6:
			h.IPv6, h.L3 = gopacket.LayerString(&d.ip6), flowEnds(d.ip6.NetworkFlow())
		case layers.LayerTypeTCP:
			h.TCP, h.L4 = gopacket.LayerString(&d.tcp), flowEnds(d.tcp.TransportFlow())
		case layers.LayerTypeUDP:
			h.UDP, h.L4 = gopacket.LayerString(&d.udp), flowEnds(d.udp.TransportFlow())
		case layers.LayerTypeSCTP:
			h.SCTP, h.L4 = gopacket.LayerString(&d.sctp), flowEnds(d.sctp.TransportFlow())
		case layers.LayerTypeICMPv4:
			h.ICMPv4 = gopacket.LayerString(&d.icmp4)
		case layers.LayerTypeICMPv6:
			h.ICMPv6 = gopacket.LayerString(&d.icmp6)
		}
	}
	return h
}

// Summary is a frame in a line: "10.0.1.5:40000 -> 10.0.2.7:80 tcp SYN".
func Summary(frame []byte) string { return newDissector().summary(frame) }
