// SPDX-License-Identifier: Apache-2.0

package node

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/state"
)

// Modes of address management.
const (
	IPAMKubernetes  = "kubernetes"
	IPAMClusterPool = "cluster-pool"
)

// Config is what the stages need to know; it does not change while the agent runs.
type Config struct {
	Name       string // this node's
	IPAM       string
	IPv4, IPv6 bool

	AutoDirectRoutes             bool
	Tunnel                       string // protocol and port this node encapsulates by; empty: it does not
	Hybrid                       bool   // it does not to nodes that are on a connected subnet
	UnderlayIPv6                 bool   // the tunnel runs between IPv6 addresses
	SkipUnreachable              bool   // say nothing about peers that are not on a connected subnet
	NativeCIDR4                  netip.Prefix
	NativeCIDR6                  netip.Prefix
	HostDevice                   string         // name of the device with the router addresses
	NodePorts                    bool           // NodePorts are served
	NodePortCIDRs                []netip.Prefix // on these addresses; empty: on all of the devices
	MasqueradeIP4, MasqueradeIP6 bool           // whether packets to outside the native CIDR lose their source
}

// Enabled reports whether the family of a is on.
func (c Config) Enabled(a netip.Addr) bool {
	if a.Is4() {
		return c.IPv4
	}
	return c.IPv6
}

// Local returns what the objects say of this node. Facts that they do not have (yet) are those of prev, which the
// caller has from a checkpoint or from the devices: an API server that is away takes nothing from a node.
func Local(cfg Config, prev model.Node, objects []state.NodeObject) model.Node {
	n := prev
	n.Name, n.Local, n.Source = cfg.Name, true, model.SourceLocal
	for _, o := range objects {
		if o.Name != cfg.Name {
			continue
		}
		if o.Source == model.SourceKubernetes {
			n.Zone, n.Labels = o.Zone, o.Labels
			if a := cfg.addrs(o.Addrs); len(a) > 0 {
				n.Addrs = a
			}
		}
		if o.Source == cidrSource(cfg.IPAM) {
			if p := cfg.prefixes(o.PodCIDRs); len(p) > 0 {
				n.PodCIDRs = p
			}
		}
	}
	return n
}

// Merge returns the nodes of the cluster, sorted by name: this node as it is, and of the others what their Node and
// CiliumNode say together. Once complete, a CiliumNode without a Node is a node that has departed.
func Merge(cfg Config, local []model.Node, objects []state.NodeObject, complete bool) []model.Node {
	type pair struct{ node, cilium *state.NodeObject }
	byName := map[string]pair{}
	for i, o := range objects {
		p := byName[o.Name]
		if o.Source == model.SourceKubernetes {
			p.node = &objects[i]
		} else {
			p.cilium = &objects[i]
		}
		byName[o.Name] = p
	}
	nodes := slices.Clone(local)
	for name, p := range byName {
		if name == cfg.Name || p.node == nil && complete {
			continue
		}
		if p.cilium == nil && !complete {
			continue // whether it takes encapsulated packets is not known yet: what is in the kernel stays
		}
		n := model.Node{Name: name, Source: model.SourceKubernetes}
		if p.node != nil {
			n.Addrs = cfg.addrs(p.node.Addrs)
			if cfg.IPAM == IPAMKubernetes {
				n.PodCIDRs = cfg.prefixes(p.node.PodCIDRs)
			}
		}
		if p.cilium != nil {
			n.Source = model.SourceCustomResource
			n.Routers = cfg.addrs(p.cilium.Routers)
			n.Health = cfg.addrs(p.cilium.Health)
			n.Tunnel = p.cilium.Tunnel
			if len(n.Addrs) == 0 {
				n.Addrs = cfg.addrs(p.cilium.Addrs)
			}
			if len(n.PodCIDRs) == 0 {
				n.PodCIDRs = cfg.prefixes(p.cilium.PodCIDRs)
			}
		}
		nodes = append(nodes, n)
	}
	slices.SortFunc(nodes, func(a, b model.Node) int { return strings.Compare(a.Name, b.Name) })
	return nodes
}

// cidrSource is the kind of object that has a node's pod CIDRs.
func cidrSource(ipam string) string {
	if ipam == IPAMKubernetes {
		return model.SourceKubernetes
	}
	return model.SourceCustomResource
}

// addrs are the addresses of enabled families, IPv4 first, otherwise in their order.
func (c Config) addrs(in []netip.Addr) []netip.Addr {
	var out []netip.Addr
	for _, v4 := range []bool{true, false} {
		for _, a := range in {
			if a.Is4() == v4 && c.Enabled(a) && !slices.Contains(out, a) {
				out = append(out, a)
			}
		}
	}
	return out
}

func (c Config) prefixes(in []netip.Prefix) []netip.Prefix {
	var out []netip.Prefix
	for _, v4 := range []bool{true, false} {
		for _, p := range in {
			if p.Addr().Is4() == v4 && c.Enabled(p.Addr()) && !slices.Contains(out, p) {
				out = append(out, p)
			}
		}
	}
	return out
}
