// SPDX-License-Identifier: Apache-2.0

package node

import (
	"net/netip"
	"slices"

	"github.com/lash-net/lash/internal/model"
)

// Masqueraded is for netfilter what the programs know from the ipcache: of one family, the sources that lose their address
// when they leave the cluster, and the destinations that see it nevertheless. In tunnel mode nodes are outside: the network
// between them does not know pods.
func Masqueraded(cfg Config, local model.Node, nodes []model.Node, exceptions []netip.Prefix, ipv6 bool) (pods, except []netip.Prefix) {
	add := func(to *[]netip.Prefix, prefixes ...netip.Prefix) {
		for _, p := range prefixes {
			if p.IsValid() && p.Addr().Is6() == ipv6 {
				*to = append(*to, p)
			}
		}
	}
	add(&pods, local.PodCIDRs...)
	add(&except, cfg.NativeCIDR4, cfg.NativeCIDR6)
	add(&except, exceptions...)
	for _, n := range nodes {
		add(&except, n.PodCIDRs...)
		for _, a := range n.Addrs {
			if cfg.Tunnel == "" {
				add(&except, netip.PrefixFrom(a, a.BitLen()))
			}
		}
	}
	for _, list := range []*[]netip.Prefix{&pods, &except} {
		slices.SortFunc(*list, netip.Prefix.Compare)
		*list = slices.Compact(*list)
	}
	return pods, except
}
