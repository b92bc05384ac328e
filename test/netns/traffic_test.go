// SPDX-License-Identifier: Apache-2.0

package netns

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lash-net/lash/internal/testutil"
)

// inNS runs f on a thread in the namespace.
func inNS(ns *os.File, f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- err
			return
		}
		done <- f()
	}()
	return <-done
}

// serve echoes on TCP and UDP in a namespace; the TCP answer is the peer's address as
// the server sees it, a newline, and then what it was sent.
func serve(t *testing.T, ns *os.File, a netip.Addr) netip.AddrPort {
	t.Helper()
	var at netip.AddrPort
	err := inNS(ns, func() error {
		l, err := net.Listen("tcp", netip.AddrPortFrom(a, 7000).String())
		if err != nil {
			return err
		}
		u, err := net.ListenPacket("udp", netip.AddrPortFrom(a, 7000).String())
		if err != nil {
			l.Close()
			return err
		}
		t.Cleanup(func() { l.Close(); u.Close() })
		at = netip.AddrPortFrom(a, 7000)
		go func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					defer conn.Close()
					fmt.Fprintln(conn, conn.RemoteAddr())
					buf := make([]byte, 64<<10)
					for {
						n, err := conn.Read(buf)
						if err != nil {
							return
						}
						if _, err := conn.Write(buf[:n]); err != nil {
							return
						}
					}
				}()
			}
		}()
		go func() {
			buf := make([]byte, 64<<10)
			for {
				n, from, err := u.ReadFrom(buf)
				if err != nil {
					return
				}
				u.WriteTo(buf[:n], from)
			}
		}()
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return at
}

// exchange sends size bytes by TCP and as many small datagrams by UDP as fit a second
// try, and wants all of them back. It returns the client's address as the server saw it.
func exchange(ns *os.File, at netip.AddrPort, size int) (seen string, err error) {
	err = inNS(ns, func() error {
		d := net.Dialer{Timeout: 3 * time.Second}
		c, err := d.Dial("tcp", at.String())
		if err != nil {
			return err
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(10 * time.Second))
		line := make([]byte, 128)
		n := 0
		for !strings.Contains(string(line[:n]), "\n") {
			k, err := c.Read(line[n:])
			if err != nil {
				return err
			}
			n += k
		}
		seen = strings.TrimSpace(string(line[:n]))
		go c.Write(make([]byte, size))
		for got := 0; got < size; {
			buf := make([]byte, 64<<10)
			k, err := c.Read(buf)
			if err != nil {
				return fmt.Errorf("after %d of %d bytes: %w", got, size, err)
			}
			got += k
		}
		u, err := d.Dial("udp", at.String())
		if err != nil {
			return err
		}
		defer u.Close()
		u.SetDeadline(time.Now().Add(3 * time.Second))
		for _, size := range []int{10, 1400, 4000} { // the last one in fragments
			if _, err := u.Write(make([]byte, size)); err != nil {
				return err
			}
			buf := make([]byte, 64<<10)
			if n, err := u.Read(buf); err != nil || n != size {
				return fmt.Errorf("udp of %d bytes: %d back, %v", size, n, err)
			}
		}
		return nil
	})
	return seen, err
}

func TestTrafficBPFHostRouting(t *testing.T) { testTraffic(t, options{podsPerNode: 2}) }
func TestTrafficLegacyHostRouting(t *testing.T) {
	testTraffic(t, options{podsPerNode: 2, legacy: true})
}
func TestTrafficClsact(t *testing.T) { testTraffic(t, options{podsPerNode: 2, noTCX: true}) }

func TestTrafficVXLAN(t *testing.T) { testTraffic(t, options{podsPerNode: 2, tunnel: "vxlan"}) }
func TestTrafficVXLANLegacyHostRouting(t *testing.T) {
	testTraffic(t, options{podsPerNode: 2, tunnel: "vxlan", legacy: true})
}
func TestTrafficVXLANOverIPv6(t *testing.T) {
	testTraffic(t, options{podsPerNode: 2, tunnel: "vxlan", underlay6: true})
}

func TestTrafficGeneve(t *testing.T) {
	needGeneve(t)
	testTraffic(t, options{podsPerNode: 2, tunnel: "geneve"})
}

func needGeneve(t *testing.T) {
	t.Helper()
	ns := testutil.Netns(t)
	if out, err := try(ns, "ip", "link", "add", "probe", "type", "geneve", "external"); err != nil {
		t.Skipf("this kernel has no geneve: %s", out)
	}
	ip(t, ns, "link del probe")
}

func testTraffic(t *testing.T, o options) {
	c := newCluster(t, o)
	a, b, far := c.nodes[0].pods[0], c.nodes[0].pods[1], c.nodes[1].pods[0]
	cases := []struct {
		name         string
		from, to     *os.File
		dst4, dst6   netip.Addr
		seen4, seen6 netip.Addr
	}{
		{"pod to pod, same node", a.ns, b.ns, b.ip4, b.ip6, a.ip4, a.ip6},
		{"pod to pod, between nodes", a.ns, far.ns, far.ip4, far.ip6, a.ip4, a.ip6},
		{"pod to its node", a.ns, c.nodes[0].ns, c.nodes[0].ip4, c.nodes[0].ip6, a.ip4, a.ip6},
		{"pod to another node", a.ns, c.nodes[1].ns, c.nodes[1].ip4, c.nodes[1].ip6, a.ip4, a.ip6},
		{"node to its pod", c.nodes[0].ns, b.ns, b.ip4, b.ip6, c.nodes[0].router4(), c.nodes[0].router6()},
		{"node to a pod elsewhere", c.nodes[0].ns, far.ns, far.ip4, far.ip6, c.nodes[0].ip4, c.nodes[0].ip6},
		{"pod to outside, masqueraded", b.ns, c.outside, addr(outside4), addr(outside6), c.nodes[0].ip4, c.nodes[0].ip6},
	}
	if o.tunnel != "" {
		// The network does not know pods: another node sees the node, and a node uses its router address.
		cases[3].seen4, cases[3].seen6 = c.nodes[0].ip4, c.nodes[0].ip6
		cases[5].seen4, cases[5].seen6 = c.nodes[0].router4(), c.nodes[0].router6()
	}
	served := map[netip.Addr]netip.AddrPort{}
	for _, tc := range cases {
		for _, fam := range []struct{ dst, seen netip.Addr }{{tc.dst4, tc.seen4}, {tc.dst6, tc.seen6}} {
			name := tc.name + ", IPv4"
			if fam.dst.Is6() {
				name = tc.name + ", IPv6"
			}
			t.Run(name, func(t *testing.T) {
				if out, err := try(tc.from, "ping", "-n", "-c", "2", "-i", "0.2", "-W", "2", fam.dst.String()); err != nil {
					t.Errorf("ping: %v\n%s", err, out)
				}
				at, ok := served[fam.dst]
				if !ok {
					at = serve(t, tc.to, fam.dst)
				}
				seen, err := exchange(tc.from, at, 4<<20)
				if err != nil {
					t.Errorf("exchange: %v", err)
				} else if ap, err := netip.ParseAddrPort(seen); err != nil || ap.Addr().Unmap() != fam.seen {
					t.Errorf("server saw %s, want %s", seen, fam.seen)
				}
				if t.Failed() {
					for _, n := range c.nodes {
						n.dump(t)
					}
				}
			})
		}
	}
}
