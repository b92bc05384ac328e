// SPDX-License-Identifier: Apache-2.0

package netns

import (
	"fmt"
	"net/netip"
	"os"
	"testing"

	"github.com/lash-net/lash/bpf"
)

// leadToHost routes services' addresses to lash_host, as the agent does.
func (nd *node) leadToHost(t *testing.T, o options) {
	t.Helper()
	ip(t, nd.ns, fmt.Sprintf("route add %s via %s dev lash_host src %s mtu %d table local metric 1", vip4, nd.router4(), nd.ip4, o.routeMTU()),
		fmt.Sprintf("route add %s dev lash_host src %s mtu %d table local metric 1", vip6, nd.ip6, o.routeMTU()))
}

func TestHostClientBPFHostRouting(t *testing.T) { testHostClient(t, options{podsPerNode: 1}) }
func TestHostClientLegacyHostRouting(t *testing.T) {
	testHostClient(t, options{podsPerNode: 1, legacy: true})
}
func TestHostClientVXLAN(t *testing.T) { testHostClient(t, options{podsPerNode: 1, tunnel: "vxlan"}) }
func TestHostClientVXLANLegacyHostRouting(t *testing.T) {
	testHostClient(t, options{podsPerNode: 1, tunnel: "vxlan", legacy: true})
}

// testHostClient reaches services from a node whose sockets no program translates: rp_filter is strict, and there is no
// default route.
func testHostClient(t *testing.T, o options) {
	c := newCluster(t, o)
	n1, n2 := c.nodes[0], c.nodes[1]
	n1.leadToHost(t, o)
	near, far := n1.pods[0], n2.pods[0]
	for _, v6 := range []bool{false, true} {
		of := func(ip4, ip6 netip.Addr) netip.Addr {
			if v6 {
				return ip6
			}
			return ip4
		}
		node, router, vip := of(n1.ip4, n1.ip6), of(n1.router4(), n1.router6()), vipOf(v6)
		name := fmt.Sprintf(", IPv%d", map[bool]int{false: 4, true: 6}[v6])
		remote := node
		if o.tunnel != "" {
			remote = router // the network between the nodes knows no pods, and the tunnel leads back to this one's
		}
		for _, be := range []struct {
			name string
			addr netip.Addr
			ns   *os.File
			seen netip.Addr // the client, as the backend sees it
		}{
			{"a pod of the node", of(near.ip4, near.ip6), near.ns, router},
			{"a pod of another node", of(far.ip4, far.ip6), far.ns, remote},
			{"the node itself", node, n1.ns, vip},
			{"another node", of(n2.ip4, n2.ip6), n2.ns, node},
			{"a machine outside", of(addr(outside4), addr(outside6)), c.outside, node},
		} {
			serve(t, be.ns, be.addr)
			t.Run("to "+be.name+name, func(t *testing.T) {
				c.balance(t, bpf.FrontendOutside, be.addr)
				for range 3 {
					seen, err := exchange(n1.ns, netip.AddrPortFrom(vip, vipPort), 1<<20)
					if err != nil {
						t.Errorf("exchange: %v", err)
					} else if ap, err := netip.ParseAddrPort(seen); err != nil || ap.Addr().Unmap() != be.seen {
						t.Errorf("server saw %s, want %s", seen, be.seen)
					}
				}
				if t.Failed() {
					n1.dump(t)
				}
			})
		}
		c.balance(t, bpf.FrontendOutside)
		for what, port := range map[string]uint16{"without backends": vipPort, "port that nobody serves": 81} {
			t.Run(what+name, func(t *testing.T) {
				if err := refused(n1.ns, netip.AddrPortFrom(vip, port)); err != nil {
					t.Error(err)
					n1.dump(t)
				}
			})
		}
		for what, flags := range map[string][]string{"ping": nil, "ping in fragments": {"-s", "4000"}, "ping from another address": {"-I", router.String()}} {
			t.Run(what+name, func(t *testing.T) {
				if out, err := try(n1.ns, append([]string{"ping", "-n", "-c", "3", "-i", "0.2", "-W", "2", vip.String()}, flags...)...); err != nil {
					t.Errorf("%v\n%s", err, out)
					n1.dump(t)
				}
			})
		}
	}
}
