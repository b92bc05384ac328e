// SPDX-License-Identifier: Apache-2.0

package netns

import (
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"testing"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"golang.org/x/sys/unix"

	"github.com/lash-net/lash/internal/testutil"
)

// tagged is a datagram to a pod elsewhere in a frame of VLAN 5 to the gateway.
func tagged(t *testing.T, gateway string, src, dst netip.Addr) []byte {
	t.Helper()
	mac, err := net.ParseMAC(gateway)
	if err != nil {
		t.Fatal(err)
	}
	var network interface {
		gopacket.NetworkLayer
		gopacket.SerializableLayer
	} = &layers.IPv4{Version: 4, TTL: 64, Protocol: layers.IPProtocolUDP, SrcIP: src.AsSlice(), DstIP: dst.AsSlice()}
	ethertype := layers.EthernetTypeIPv4
	if src.Is6() {
		network, ethertype = &layers.IPv6{Version: 6, HopLimit: 64, NextHeader: layers.IPProtocolUDP, SrcIP: src.AsSlice(), DstIP: dst.AsSlice()}, layers.EthernetTypeIPv6
	}
	udp := &layers.UDP{SrcPort: 1000, DstPort: 7000}
	udp.SetNetworkLayerForChecksum(network)
	b := gopacket.NewSerializeBuffer()
	if err := gopacket.SerializeLayers(b, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true},
		&layers.Ethernet{SrcMAC: mac, DstMAC: mac, EthernetType: layers.EthernetTypeDot1Q}, &layers.Dot1Q{VLANIdentifier: 5, Type: ethertype},
		network, udp, gopacket.Payload("hello")); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// A pod that tags its frames stays in the network that the node has given it: the kernel takes the tag off before the
// program sees the packet and would put it on again at the device it leaves by.
func TestTaggedFramesOfPodsDoNotLeave(t *testing.T) {
	if _, err := exec.LookPath("nft"); err != nil {
		t.Skip("needs nft (package nftables): it counts tagged frames")
	}
	c := newCluster(t, options{podsPerNode: 2})
	n := c.nodes[0]
	a, near, far := n.pods[0], n.pods[1], c.nodes[1].pods[0]
	_, gateway, _ := strings.Cut(testutil.In(t, n.ns, "ip", "-o", "link", "show", a.name), "link/ether ")
	gateway = strings.Fields(gateway)[0]
	if out, err := try(c.sw, "nft", `
add table netdev seen
add counter netdev seen tagged
add chain netdev seen in { type filter hook ingress device n1 priority 0; }
add rule netdev seen in vlan id 5 counter name tagged`); err != nil {
		t.Skipf("this kernel cannot count tagged frames: %v\n%s", err, out)
	}
	for _, pair := range [][2]netip.Addr{{a.ip4, far.ip4}, {a.ip6, far.ip6}, {a.ip4, near.ip4}, {a.ip6, near.ip6}} {
		// The connection is there: the fast path, too, must see the tag.
		if _, err := exchange(a.ns, serve(t, map[bool]*pod{true: near, false: far}[pair[1] == near.ip4 || pair[1] == near.ip6].ns, pair[1]), 100); err != nil {
			t.Fatal(err)
		}
		before := dropped(t, n, "VLAN traffic disallowed by VLAN filter")
		if err := inNS(a.ns, func() error {
			eth0, err := net.InterfaceByName("eth0")
			if err != nil {
				return err
			}
			s, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)
			if err != nil {
				return err
			}
			defer unix.Close(s)
			for range 2 {
				if err := unix.Sendto(s, tagged(t, gateway, pair[0], pair[1]), 0, &unix.SockaddrLinklayer{Ifindex: eth0.Index}); err != nil {
					return err
				}
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		if got := dropped(t, n, "VLAN traffic disallowed by VLAN filter") - before; got != 2 {
			t.Errorf("%d drops of 2 tagged packets to %s are counted", got, pair[1])
		}
	}
	if counters := testutil.In(t, c.sw, "nft", "list counters table netdev seen"); !strings.Contains(counters, "packets 0 ") {
		t.Errorf("tagged frames left the node: %s", counters)
	}
}
