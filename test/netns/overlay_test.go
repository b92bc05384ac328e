// SPDX-License-Identifier: Apache-2.0

package netns

import (
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"golang.org/x/sys/unix"

	"github.com/lash-net/lash/internal/model"
)

// capture collects the frames that a device of a namespace sends and receives, until stop is called.
func capture(t *testing.T, ns *os.File, device string) (stop func() []gopacket.Packet) {
	t.Helper()
	var fd int
	err := inNS(ns, func() error {
		dev, err := net.InterfaceByName(device)
		if err != nil {
			return err
		}
		all := int(uint16(unix.ETH_P_ALL)<<8 | uint16(unix.ETH_P_ALL)>>8)
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, all); err != nil {
			return err
		}
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100_000}); err != nil {
			return err
		}
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: uint16(all), Ifindex: dev.Index})
	})
	if err != nil {
		t.Fatalf("capture on %s: %v", device, err)
	}
	var packets []gopacket.Packet
	stopping, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 64<<10)
		for {
			n, _, err := unix.Recvfrom(fd, buf, 0)
			if err == nil {
				packets = append(packets, gopacket.NewPacket(slices.Clone(buf[:n]), layers.LayerTypeEthernet, gopacket.Default))
				continue
			}
			select {
			case <-stopping:
				return
			default:
			}
		}
	}()
	return sync.OnceValue(func() []gopacket.Packet {
		time.Sleep(100 * time.Millisecond) // what was sent before has arrived
		close(stopping)
		<-done
		unix.Close(fd)
		return packets
	})
}

// echo is an ICMP echo request or reply of either family, as it lies in a frame.
type echo struct {
	eth      *layers.Ethernet
	src, dst netip.Addr
	ttl      uint8
	reply    bool
}

// echoIn finds the innermost echo of a packet.
func echoIn(p gopacket.Packet) (e echo, ok bool) {
	for _, l := range p.Layers() {
		switch l := l.(type) {
		case *layers.Ethernet:
			e = echo{eth: l}
		case *layers.IPv4:
			e.src, _ = netip.AddrFromSlice(l.SrcIP)
			e.dst, _ = netip.AddrFromSlice(l.DstIP)
			e.ttl = l.TTL
		case *layers.IPv6:
			e.src, _ = netip.AddrFromSlice(l.SrcIP)
			e.dst, _ = netip.AddrFromSlice(l.DstIP)
			e.ttl = l.HopLimit
		case *layers.ICMPv4:
			e.reply = l.TypeCode.Type() == layers.ICMPv4TypeEchoReply
			ok = e.reply || l.TypeCode.Type() == layers.ICMPv4TypeEchoRequest
		case *layers.ICMPv6:
			e.reply = l.TypeCode.Type() == layers.ICMPv6TypeEchoReply
			ok = e.reply || l.TypeCode.Type() == layers.ICMPv6TypeEchoRequest
		}
	}
	return e, ok
}

func macOf(m model.MAC) string { return net.HardwareAddr(m[:]).String() }

// On the wire: the VNI is the sender's identity in either direction, the inner frame is as the pod made it; at delivery:
// one hop less, and the MAC addresses of the receiving pod.
func TestVXLANOnTheWire(t *testing.T) {
	c := newCluster(t, options{podsPerNode: 2, tunnel: "vxlan"})
	n1, n2 := c.nodes[0], c.nodes[1]
	a, b, far := n1.pods[0], n1.pods[1], n2.pods[0]
	for _, dst := range []netip.Addr{far.ip4, far.ip6} {
		wire, device, inside := capture(t, n2.ns, "eth0"), capture(t, n2.ns, "lash_tunnel"), capture(t, far.ns, "eth0")
		if out, err := try(a.ns, "ping", "-n", "-c", "1", "-W", "2", dst.String()); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		seen := map[bool]int{}
		for _, p := range wire() {
			if e, ok := echoIn(p); ok {
				t.Errorf("an echo from %s to %s went without a tunnel", e.src, e.dst)
			}
			udp, ok := p.Layer(layers.LayerTypeUDP).(*layers.UDP)
			if !ok {
				continue
			}
			outer := p.Layer(layers.LayerTypeIPv4).(*layers.IPv4)
			inner := gopacket.NewPacket(udp.Payload, layers.LayerTypeVXLAN, gopacket.Default)
			e, ok := echoIn(inner)
			if !ok {
				continue
			}
			vx := inner.Layer(layers.LayerTypeVXLAN).(*layers.VXLAN)
			from, to := a, n1
			if e.reply {
				from, to = far, n2
			}
			seen[e.reply]++
			if vx.VNI != uint32(from.identity) || udp.DstPort != 8472 || outer.SrcIP.String() != to.ip4.String() {
				t.Errorf("reply %v: VNI %d of %s to port %d, want %d of %s to 8472", e.reply, vx.VNI, outer.SrcIP, udp.DstPort, from.identity, to.ip4)
			}
			if e.eth.SrcMAC.String() != macOf(from.mac) || e.eth.DstMAC.String() != macOf(from.nodeMAC) || e.ttl != 64 {
				t.Errorf("reply %v: inner frame is %s > %s with TTL %d, want %s > %s with 64", e.reply, e.eth.SrcMAC, e.eth.DstMAC, e.ttl, macOf(from.mac), macOf(from.nodeMAC))
			}
		}
		if seen[false] != 1 || seen[true] != 1 {
			t.Errorf("%d requests and %d replies on the wire, want one each", seen[false], seen[true])
		}
		frames := 0
		for _, p := range device() {
			if e, ok := echoIn(p); ok {
				frames++
				from := map[bool]*pod{false: a, true: far}[e.reply]
				if e.eth.SrcMAC.String() != macOf(from.mac) || e.eth.DstMAC.String() != macOf(from.nodeMAC) {
					t.Errorf("reply %v: on the tunnel device the frame is %s > %s", e.reply, e.eth.SrcMAC, e.eth.DstMAC)
				}
			}
		}
		if frames != 2 {
			t.Errorf("%d echoes on the tunnel device, want 2", frames)
		}
		delivered := false
		for _, p := range inside() {
			if e, ok := echoIn(p); ok && !e.reply {
				delivered = true
				if e.ttl != 63 || e.eth.DstMAC.String() != macOf(far.mac) || e.eth.SrcMAC.String() != macOf(far.nodeMAC) {
					t.Errorf("delivered %s > %s with TTL %d, want %s > %s with 63", e.eth.SrcMAC, e.eth.DstMAC, e.ttl, macOf(far.nodeMAC), macOf(far.mac))
				}
			}
		}
		if !delivered {
			t.Error("no request was delivered")
		}
	}
	// Between pods of one node nothing is to be seen outside.
	wire := capture(t, n1.ns, "eth0")
	for _, dst := range []netip.Addr{b.ip4, b.ip6} {
		if out, err := try(a.ns, "ping", "-n", "-c", "1", "-W", "2", dst.String()); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	for _, p := range wire() {
		if e, ok := echoIn(p); ok {
			t.Errorf("same-node traffic on eth0: %s > %s", e.src, e.dst)
		}
	}
}

// Whatever families the nodes have, there is one world on the wire.
func TestTheWorldHasOneNumberOnTheWire(t *testing.T) {
	c := newCluster(t, options{podsPerNode: 1, tunnel: "vxlan"})
	n1, n2 := c.nodes[0], c.nodes[1]
	a, far := n1.pods[0], n2.pods[0]
	for _, fam := range []struct{ from, to netip.Addr }{{a.ip4, far.ip4}, {a.ip6, far.ip6}} {
		world := model.World(fam.from, true)
		n1.do(t, "identity", func() error {
			return n1.dp.Endpoints().Put(t.Context(), fam.from, model.LocalAddr{EndpointID: 10, Ifindex: a.ifindex, Identity: world, MAC: a.mac, NodeMAC: a.nodeMAC})
		})
		wire := capture(t, n2.ns, "eth0")
		if out, err := try(a.ns, "ping", "-n", "-c", "1", "-W", "2", fam.to.String()); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		requests := 0
		for _, p := range wire() {
			udp, ok := p.Layer(layers.LayerTypeUDP).(*layers.UDP)
			if !ok {
				continue
			}
			inner := gopacket.NewPacket(udp.Payload, layers.LayerTypeVXLAN, gopacket.Default)
			if e, ok := echoIn(inner); ok && !e.reply {
				requests++
				if vni := inner.Layer(layers.LayerTypeVXLAN).(*layers.VXLAN).VNI; vni != uint32(model.IdentityWorld) {
					t.Errorf("VNI of %s is %d", world, vni)
				}
			}
		}
		if requests != 1 {
			t.Errorf("%d requests of %s", requests, fam.from)
		}
	}
}

// encapsulated builds a VXLAN packet's UDP payload; inner may be cut short.
func encapsulated(vni uint32, src, dst netip.Addr, ttl uint8, cut int) []byte {
	buf := gopacket.NewSerializeBuffer()
	opts := gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}
	eth := &layers.Ethernet{SrcMAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}, DstMAC: net.HardwareAddr{2, 0, 0, 0, 0, 2}, EthernetType: layers.EthernetTypeIPv4}
	udp := &layers.UDP{SrcPort: 1234, DstPort: 4321}
	vx := &layers.VXLAN{ValidIDFlag: true, VNI: vni}
	var ip gopacket.SerializableLayer
	if src.Is4() {
		l := &layers.IPv4{Version: 4, TTL: ttl, Protocol: layers.IPProtocolUDP, SrcIP: src.AsSlice(), DstIP: dst.AsSlice()}
		udp.SetNetworkLayerForChecksum(l)
		ip = l
	} else {
		eth.EthernetType = layers.EthernetTypeIPv6
		l := &layers.IPv6{Version: 6, HopLimit: ttl, NextHeader: layers.IPProtocolUDP, SrcIP: src.AsSlice(), DstIP: dst.AsSlice()}
		udp.SetNetworkLayerForChecksum(l)
		ip = l
	}
	if err := gopacket.SerializeLayers(buf, opts, vx, eth, ip, udp, gopacket.Payload("hello")); err != nil {
		panic(err)
	}
	length := 8 + 14 + 20 + 8 + len("hello") // without the padding of short frames
	if src.Is6() {
		length += 20
	}
	return buf.Bytes()[:length-cut]
}

func sendUDP(t *testing.T, ns *os.File, to netip.AddrPort, payload []byte) {
	t.Helper()
	if err := inNS(ns, func() error {
		c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(to))
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write(payload)
		return err
	}); err != nil {
		t.Fatal(err)
	}
}

// Whoever is no node, and whatever a node would not send, is dropped and named.
func TestVXLANDropsForgedPackets(t *testing.T) {
	c := newCluster(t, options{podsPerNode: 1, tunnel: "vxlan"})
	n1, n2 := c.nodes[0], c.nodes[1]
	a, far := n1.pods[0], n2.pods[0]
	at := netip.AddrPortFrom(n1.ip4, 8472)
	// An established connection between the two pods must not let a stranger in, either.
	if _, err := exchange(far.ns, serve(t, a.ns, a.ip4), 1000); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name, reason string
		from         *os.File
		payload      func(src, dst, self, nobody netip.Addr) []byte
	}{
		{"from an address that is no node", "Unknown sender", c.outside, func(src, dst, _, _ netip.Addr) []byte { return encapsulated(uint32(far.identity), src, dst, 64, 0) }},
		{"identity 0", "Invalid identity", n2.ns, func(src, dst, _, _ netip.Addr) []byte { return encapsulated(0, src, dst, 64, 0) }},
		{"identity beyond all", "Invalid identity", n2.ns, func(src, dst, _, _ netip.Addr) []byte { return encapsulated(1<<16, src, dst, 64, 0) }},
		{"a pod of the receiving node as source", "Invalid source ip", n2.ns, func(_, dst, self, _ netip.Addr) []byte { return encapsulated(2010, self, dst, 64, 0) }},
		{"a pod that nobody has", "Stale or unroutable IP", n2.ns, func(src, _, _, nobody netip.Addr) []byte { return encapsulated(2010, src, nobody, 64, 0) }},
		{"inner UDP header cut", "CT: Truncated or invalid header", n2.ns, func(src, dst, _, _ netip.Addr) []byte { return encapsulated(2010, src, dst, 64, 10) }},
		// A VXLAN or inner IP header that is cut does not get this far: the kernel drops it (rx_length_errors of the device).
	} {
		for _, v6 := range []bool{false, true} {
			src, dst, self, nobody := far.ip4, a.ip4, n1.router4(), addr("10.0.1.99")
			if v6 {
				src, dst, self, nobody = far.ip6, a.ip6, n1.router6(), addr("fd00:0:0:1::99")
			}
			before := dropped(t, n1, tc.reason)
			sendUDP(t, tc.from, at, tc.payload(src, dst, self, nobody))
			deadline := time.Now().Add(2 * time.Second)
			for dropped(t, n1, tc.reason) <= before && time.Now().Before(deadline) {
				time.Sleep(10 * time.Millisecond)
			}
			if got := dropped(t, n1, tc.reason) - before; got != 1 {
				t.Errorf("%s (IPv6 %v): %d drops for %q, want 1", tc.name, v6, got, tc.reason)
				n1.dump(t)
			}
		}
	}
}

// An established connection's packets that come from a node which is not the peer's are not taken for its own.
func TestVXLANFollowsThePeersNode(t *testing.T) {
	c := newCluster(t, options{podsPerNode: 1, tunnel: "vxlan"})
	n1, n2 := c.nodes[0], c.nodes[1]
	a, far := n1.pods[0], n2.pods[0]
	at := serve(t, a.ns, a.ip4)
	if _, err := exchange(far.ns, at, 1000); err != nil {
		t.Fatal(err)
	}
	before := dropped(t, n1, "Unknown sender")
	// The very tuple of the datagrams just exchanged, from outside.
	var port uint16
	n1.do(t, "connections", func() error {
		_, rows, err := n1.dp.Dump("ct")
		for _, r := range rows {
			if r[0] == "UDP" && strings.HasPrefix(r[1], far.ip4.String()) {
				port = netip.MustParseAddrPort(r[1]).Port()
			}
		}
		return err
	})
	if port == 0 {
		n1.dump(t)
		t.Fatal("no record of the datagrams")
	}
	buf := gopacket.NewSerializeBuffer()
	ip4 := &layers.IPv4{Version: 4, TTL: 64, Protocol: layers.IPProtocolUDP, SrcIP: far.ip4.AsSlice(), DstIP: a.ip4.AsSlice()}
	udp := &layers.UDP{SrcPort: layers.UDPPort(port), DstPort: 7000}
	udp.SetNetworkLayerForChecksum(ip4)
	err := gopacket.SerializeLayers(buf, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, &layers.VXLAN{ValidIDFlag: true, VNI: uint32(far.identity)},
		&layers.Ethernet{SrcMAC: far.mac[:], DstMAC: far.nodeMAC[:], EthernetType: layers.EthernetTypeIPv4}, ip4, udp, gopacket.Payload("forged"))
	if err != nil {
		t.Fatal(err)
	}
	sendUDP(t, c.outside, netip.AddrPortFrom(n1.ip4, 8472), buf.Bytes())
	deadline := time.Now().Add(2 * time.Second)
	for dropped(t, n1, "Unknown sender") <= before && time.Now().Before(deadline) {
		time.Sleep(10 * time.Millisecond)
	}
	if dropped(t, n1, "Unknown sender") != before+1 {
		n1.dump(t)
		t.Error("a forged packet of an established connection was let in")
	}
}
