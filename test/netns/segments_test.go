// SPDX-License-Identifier: Apache-2.0

package netns

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Datagrams that a pod hands over many in one (UDP_SEGMENT, as senders of QUIC do) arrive one by one, from the tunnel too,
// where no device on the way has split them.
func TestSegmentedDatagramsArrive(t *testing.T) {
	const size, segments = 1200, 10
	for _, tunnel := range []string{"", "vxlan"} {
		t.Run("tunnel "+tunnel, func(t *testing.T) {
			c := newCluster(t, options{podsPerNode: 1, tunnel: tunnel})
			a, far := c.nodes[0].pods[0], c.nodes[1].pods[0]
			for _, dst := range []netip.Addr{far.ip4, far.ip6} {
				at := net.UDPAddrFromAddrPort(netip.AddrPortFrom(dst, 7100))
				var server, client *net.UDPConn
				for ns, open := range map[*pod]func() error{
					far: func() (err error) { server, err = net.ListenUDP("udp", at); return err },
					a:   func() (err error) { client, err = net.DialUDP("udp", nil, at); return err },
				} {
					if err := inNS(ns.ns, open); err != nil {
						t.Fatal(err)
					}
				}
				defer server.Close()
				defer client.Close()
				for _, u := range []*net.UDPConn{server, client} {
					u.SetDeadline(time.Now().Add(5 * time.Second))
				}
				b := make([]byte, 2*size)
				for range 3 { // then the connection is known, both ways
					if _, err := client.Write(b[:1]); err != nil {
						t.Fatal(err)
					}
					_, who, err := server.ReadFromUDP(b)
					if err != nil {
						t.Fatal(err)
					}
					if _, err := server.WriteToUDP(b[:1], who); err != nil {
						t.Fatal(err)
					}
					if _, err := client.Read(b); err != nil {
						t.Fatal(err)
					}
				}
				raw, err := client.SyscallConn()
				if err != nil {
					t.Fatal(err)
				}
				var refused error
				if err := raw.Control(func(fd uintptr) { refused = unix.SetsockoptInt(int(fd), unix.SOL_UDP, unix.UDP_SEGMENT, size) }); err != nil || refused != nil {
					t.Fatal(err, refused)
				}
				if _, err := client.Write(make([]byte, size*segments)); err != nil {
					t.Fatal(err)
				}
				for i := range segments {
					if n, err := server.Read(b); err != nil || n != size {
						t.Fatalf("to %s: datagram %d of %d: %d bytes, want %d: %v", dst, i+1, segments, n, size, err)
					}
				}
			}
		})
	}
}
