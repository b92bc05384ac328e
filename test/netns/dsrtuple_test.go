// SPDX-License-Identifier: Apache-2.0

package netns

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lash-net/lash/bpf"
)

// connectFrom connects from a port that other connections may have, too, and exchanges a byte on whatever it returns.
func connectFrom(ns *os.File, port int, to netip.AddrPort) (c net.Conn, err error) {
	err = inNS(ns, func() error {
		local := &net.TCPAddr{Port: port}
		d := net.Dialer{Timeout: 10 * time.Second, LocalAddr: local, Control: func(_, _ string, raw syscall.RawConn) error {
			return raw.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
		}}
		c, err = d.DialContext(context.Background(), "tcp", to.String())
		return err
	})
	return c, err
}

// echoed: the connection, of serve, answers within a second. The first time it says who asks.
func echoed(c net.Conn) error {
	c.SetDeadline(time.Now().Add(time.Second))
	if _, err := c.Write([]byte("x")); err != nil {
		return err
	}
	buf := make([]byte, 100)
	for {
		n, err := c.Read(buf)
		if err != nil {
			return err
		}
		if buf[n-1] == 'x' {
			return nil
		}
	}
}

func TestClientUsesOnePortForTwoFrontendsDSR(t *testing.T) {
	testClientUsesOnePort(t, options{podsPerNode: 1, dsr: true})
}
func TestClientUsesOnePortForTwoFrontendsDSRVXLAN(t *testing.T) {
	testClientUsesOnePort(t, options{podsPerNode: 1, dsr: true, tunnel: "vxlan"})
}
func TestClientUsesOnePortForTwoFrontendsDSRXDP(t *testing.T) {
	testClientUsesOnePort(t, options{podsPerNode: 1, dsr: true, xdp: true})
}

// testClientUsesOnePort: a client asks two frontends from one port, as it may, and one backend serves both by DSR, which
// sees one and the same tuple. The connection that was there first must not notice, and the other one is served, too.
func testClientUsesOnePort(t *testing.T, o options) {
	c := newCluster(t, o)
	n1, n2 := c.nodes[0], c.nodes[1]
	ip(t, c.outside, "route add "+vip4+" via "+n1.ip4.String(), "route add "+vip6+" via "+n1.ip6.String())
	far := n2.pods[0]
	port := 41000
	for _, v6 := range []bool{false, true} {
		of := func(ip4, ip6 netip.Addr) netip.Addr {
			if v6 {
				return ip6
			}
			return ip4
		}
		backend := of(far.ip4, far.ip6)
		serve(t, far.ns, backend)
		c.balance(t, bpf.FrontendOutside|bpf.FrontendDSR, backend)
		vip := netip.AddrPortFrom(vipOf(v6), vipPort)
		fars, near := netip.AddrPortFrom(of(n1.ip4, n1.ip6), nodePort), netip.AddrPortFrom(of(n2.ip4, n2.ip6), nodePort)
		for _, way := range []struct {
			name          string
			first, second netip.AddrPort
		}{
			{"two frontends of a node, the backend elsewhere", vip, fars},
			{"a frontend of the backend's node, then one of another", near, fars},
			{"a frontend of another node, then one of the backend's", fars, near},
		} {
			port++
			t.Run(fmt.Sprintf("%s, IPv%d", way.name, map[bool]int{false: 4, true: 6}[v6]), func(t *testing.T) {
				a, err := connectFrom(c.outside, port, way.first)
				if err != nil {
					t.Fatal(err)
				}
				defer a.Close()
				if err := echoed(a); err != nil {
					t.Fatal(err)
				}
				b, err := connectFrom(c.outside, port, way.second)
				if err != nil {
					t.Fatalf("the second: %v", err)
				}
				defer b.Close()
				if err := echoed(b); err != nil {
					t.Errorf("the second: %v", err)
				}
				if err := echoed(a); err != nil {
					t.Errorf("the first, when the second was there: %v", err)
				}
				if err := echoed(b); err != nil {
					t.Errorf("the second again: %v", err)
				}
				if t.Failed() {
					n2.dump(t)
				}
			})
		}
	}
}
