// SPDX-License-Identifier: Apache-2.0

package netns

import (
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/lash-net/lash/internal/datapath/netdev"
	"github.com/lash-net/lash/internal/model"
	stage "github.com/lash-net/lash/internal/node"
	"github.com/lash-net/lash/internal/testutil"
)

// Where not BPF masquerades, the node's netfilter does, in both families and both routing modes: outside one sees the
// node, other pods and nodes see the pod, and services go on as before. What somebody removes of the rules comes back,
// and they go when they are no longer wanted.
func TestNetfilterMasquerades(t *testing.T) {
	for _, tunnel := range []string{"", "vxlan"} {
		t.Run("tunnel="+tunnel, func(t *testing.T) {
			c := newCluster(t, options{podsPerNode: 1, legacy: true, netfilter: true, tunnel: tunnel})
			n := c.nodes[0]
			host, err := netdev.OpenHostAt(testutil.NetnsPath(n.ns))
			if err != nil {
				t.Fatal(err)
			}
			defer host.Close()
			cfg := stage.Config{Tunnel: tunnel}
			var nodes []model.Node
			for _, nd := range c.nodes {
				nodes = append(nodes, model.Node{Addrs: []netip.Addr{nd.ip4, nd.ip6}, PodCIDRs: []netip.Prefix{nd.cidr4(), nd.cidr6()}})
			}
			apply := func(want bool, on bool) {
				t.Helper()
				for _, ipv6 := range []bool{false, true} {
					var m *netdev.Masquerade
					if on {
						pods, except := stage.Masqueraded(cfg, nodes[0], nodes, nil, ipv6)
						m = &netdev.Masquerade{Pods: pods, Except: except, FirstPort: 32768, LastPort: 65535}
					}
					if changed, err := host.SetMasquerade(ipv6, m, false); err != nil || changed != want {
						t.Fatalf("ipv6=%v: changed %v, want %v; %v", ipv6, changed, want, err)
					}
				}
			}
			apply(true, true)
			apply(false, true)
			for _, break_ := range []string{
				"delete table %s lash", "flush chain %s lash LASH_POST_nat", "flush set %s lash except", "delete element %s lash pods { POD }", "flush chain %[1]s lash LASH_POST_nat; delete chain %[1]s lash LASH_POST_nat",
			} {
				for family, pods := range map[string]string{"ip": "10.0.1.0/24", "ip6": "fd00:0:0:1::/64"} {
					testutil.In(t, n.ns, "nft", strings.ReplaceAll(fmt.Sprintf(break_, family), "POD", pods))
				}
				apply(true, true)
				apply(false, true)
			}

			p, far := n.pods[0], c.nodes[1].pods[0]
			other := c.nodes[1]
			seesPod := []netip.Addr{p.ip4, p.ip6}
			seesNode := []netip.Addr{n.ip4, n.ip6}
			atNode := seesPod
			if tunnel != "" {
				atNode = seesNode
			}
			for _, tc := range []struct {
				name string
				to   *os.File
				dst  []netip.Addr
				seen []netip.Addr
			}{
				{"outside", c.outside, []netip.Addr{addr(outside4), addr(outside6)}, seesNode},
				{"pod elsewhere", far.ns, []netip.Addr{far.ip4, far.ip6}, seesPod},
				{"node elsewhere", other.ns, []netip.Addr{other.ip4, other.ip6}, atNode},
			} {
				for i, dst := range tc.dst {
					if out, err := try(p.ns, "ping", "-n", "-c", "1", "-W", "2", dst.String()); err != nil {
						t.Errorf("%s: ping %s: %v\n%s", tc.name, dst, err, out)
					}
					seen, err := exchange(p.ns, serve(t, tc.to, dst), 1<<20)
					if err != nil {
						t.Errorf("%s: %v", tc.name, err)
						n.dump(t)
						continue
					}
					at := netip.MustParseAddrPort(seen)
					if at.Addr().Unmap() != tc.seen[i] {
						t.Errorf("%s saw %s, want %s", tc.name, at, tc.seen[i])
					}
					if slices.Contains(seesNode, at.Addr().Unmap()) && at.Port() < 32768 {
						t.Errorf("%s saw port %d, which may be a service's connection's", tc.name, at.Port())
					}
				}
			}
			apply(true, false)
			apply(false, false)
			if out := testutil.In(t, n.ns, "nft", "list", "tables"); strings.Contains(out, "lash") {
				t.Errorf("left behind:\n%s", out)
			}
		})
	}
}
