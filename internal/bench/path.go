// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// Groups of paths that share a baseline.
const (
	SameNode   = "same node"
	AcrossNode = "between nodes"
	HostToHost = "host to host"
	Overlay    = "VXLAN"
	Legacy     = "legacy"
	Events     = "events" // told to a listener; compared with Lash without one
	WithinPod  = "within a pod"
	Services   = "services"             // translated at the socket; compared with Lash asked for the backend itself
	PerPacket  = "services, per packet" // translated in each packet; compared with the same
	NodePort   = "NodePort"             // a client outside, by way of a node, to a process of another node
	Many       = "10,000 services"      // with ten backends each; compared with ten services
)

// Path is one way for traffic to go, set up beside the others.
type Path struct {
	Name    string // unique
	Group   string
	Against string   // the path it is compared with; empty: it is a baseline
	Gated   bool     // the gates of its group apply
	Extra   bool     // only when asked for by name, or by "all"
	Kinds   []string // of traffic; nil: all but Flood
	Setup   func(*Topology) (Pair, error)
}

// carries tells whether traffic of that kind is measured on the path.
func (p Path) carries(kind string) bool {
	if p.Kinds == nil {
		return kind != Flood
	}
	return slices.Contains(p.Kinds, kind)
}

// Baselines.
const (
	Direct = "direct" // a veth pair between two namespaces of a node
	Bare   = "bare"   // process to process between two nodes
)

// Paths is every path there is, in the order of the report.
func Paths() []Path {
	return []Path{
		{Name: Direct, Group: SameNode, Setup: direct},
		{Name: "limit-same", Group: SameNode, Against: Direct, Setup: limitSame},
		{Name: "lash-same", Group: SameNode, Against: Direct, Gated: true, Setup: lashSame},
		{Name: "routed-same", Group: SameNode, Against: Direct, Extra: true, Setup: routedSame},
		{Name: Bare, Group: AcrossNode, Kinds: Kinds, Setup: bareNodes},
		{Name: "limit-across", Group: AcrossNode, Against: Bare, Setup: limitAcross},
		{Name: "lash-across", Group: AcrossNode, Against: Bare, Gated: true, Setup: lashAcross(native)},
		{Name: "routed-across", Group: AcrossNode, Against: Bare, Extra: true, Setup: routedAcross},
		{Name: "lash-host", Group: HostToHost, Against: Bare, Gated: true, Setup: lashHost},
		{Name: "limit-vxlan", Group: Overlay, Against: Bare, Setup: limitVXLAN},
		{Name: "lash-vxlan", Group: Overlay, Against: Bare, Gated: true, Setup: lashAcross(mode{tunnel: true})},
		{Name: "lash-legacy", Group: Legacy, Against: Bare, Setup: lashAcross(mode{legacy: true})},
		{Name: "loopback", Group: WithinPod, Setup: withinPod},
		{Name: "lash-sockmap", Group: WithinPod, Against: "loopback", Gated: true, Setup: lashSockmap},
		{Name: "lash-hooks", Group: Services, Against: "lash-same", Setup: lashHooks(native)},
		{Name: "lash-service", Group: Services, Against: "lash-same", Gated: true, Setup: lashService(native)},
		{Name: "lash-packets", Group: PerPacket, Against: "lash-same", Gated: true, Kinds: []string{RR, CRR}, Setup: lashPackets(native)},
		{Name: "lash-service-10k", Group: Many, Against: "lash-service", Gated: true, Kinds: []string{RR, CRR}, Setup: lashService(mode{services: manyServices})},
		{Name: "lash-packets-10k", Group: Many, Against: "lash-packets", Gated: true, Kinds: []string{RR, CRR}, Setup: lashPackets(mode{services: manyServices})},
		{Name: "lash-nodeport", Group: NodePort, Against: Bare, Gated: true, Kinds: []string{RR, Flood}, Setup: lashNodePort(native)},
		{Name: "lash-nodeport-xdp", Group: NodePort, Against: Bare, Kinds: []string{RR, Flood}, Setup: lashNodePort(mode{xdp: true})},
		{Name: "lash-events", Group: Events, Against: "lash-across", Gated: true, Setup: lashEvents},
	}
}

// Select returns the named paths and the baselines they need. "all" names every
// path; no name means all but the extra ones.
func Select(names []string) ([]Path, error) {
	all := Paths()
	wanted := map[string]bool{}
	for _, name := range names {
		i := slices.IndexFunc(all, func(p Path) bool { return p.Name == name })
		if name == "all" {
			return all, nil
		}
		if i < 0 {
			var known []string
			for _, p := range all {
				known = append(known, p.Name)
			}
			return nil, fmt.Errorf("no path %q; there are %s", name, strings.Join(known, ", "))
		}
		for ; i >= 0; i = slices.IndexFunc(all, func(p Path) bool { return p.Name == all[i].Against }) {
			wanted[all[i].Name] = true
		}
	}
	return slices.DeleteFunc(all, func(p Path) bool {
		return len(names) == 0 && p.Extra || len(names) > 0 && !wanted[p.Name]
	}), nil
}

// direct is a veth pair between two namespaces: the least that two pods of one
// node can be apart.
func direct(t *Topology) (Pair, error) {
	a, err := t.netns("lb-direct1")
	if err != nil {
		return Pair{}, err
	}
	b, err := t.netns("lb-direct2")
	if err != nil {
		return Pair{}, err
	}
	pair := Pair{Client: a, Server: b, Server4: netip.MustParseAddr("10.76.0.2"), Server6: netip.MustParseAddr("fd00:76::2")}
	return pair, errors.Join(
		Veth(a, "eth0", b, "eth0"),
		a.AddAddr("eth0", netip.MustParsePrefix("10.76.0.1/24")), a.AddAddr("eth0", netip.MustParsePrefix("fd00:76::1/120")),
		b.AddAddr("eth0", netip.PrefixFrom(pair.Server4, 24)), b.AddAddr("eth0", netip.PrefixFrom(pair.Server6, 120)))
}

// bareNodes is process to process over the switch.
func bareNodes(t *Topology) (Pair, error) {
	a, b, err := t.Nodes()
	if err != nil {
		return Pair{}, err
	}
	return Pair{Client: a.Netns, Server: b.Netns, Server4: b.Addr4, Server6: b.Addr6}, nil
}

// forwardTo makes a node a router for its wired pods.
func forwardTo(n *Node, pods ...*pod) error {
	errs := []error{n.Sysctl("ipv4/ip_forward", "1"), n.Sysctl("ipv6/conf/all/forwarding", "1")}
	for _, p := range pods {
		dev, mac := p.host.Attrs().Name, p.eth0.Attrs().HardwareAddr
		errs = append(errs,
			n.AddRoute(netip.PrefixFrom(p.addr4, 32), netip.Addr{}, dev), n.AddRoute(netip.PrefixFrom(p.addr6, 128), netip.Addr{}, dev),
			n.AddNeigh(p.addr4, dev, mac), n.AddNeigh(p.addr6, dev, mac))
	}
	return errors.Join(errs...)
}

// routedSame is what the kernel alone does between pods of a node.
func routedSame(t *Topology) (Pair, error) {
	n, err := t.Node()
	if err != nil {
		return Pair{}, err
	}
	a, err := t.wirePod(n)
	if err != nil {
		return Pair{}, err
	}
	b, err := t.wirePod(n)
	if err != nil {
		return Pair{}, err
	}
	return Pair{Client: a.Netns, Server: b.Netns, Server4: b.addr4, Server6: b.addr6}, forwardTo(n, a, b)
}

// podsAcross is a pod on each of two nodes that route to each other's pods.
func podsAcross(t *Topology) (n, m *Node, a, b *pod, err error) {
	if n, m, err = t.Nodes(); err != nil {
		return
	}
	if a, err = t.wirePod(n); err != nil {
		return
	}
	if b, err = t.wirePod(m); err != nil {
		return
	}
	err = routeBetween(n, m)
	return
}

// routeBetween gives two nodes routes to each other's pod networks.
func routeBetween(n, m *Node) error {
	n4, n6 := n.Prefixes()
	m4, m6 := m.Prefixes()
	if err := errors.Join(
		n.AddRoute(m4, m.Addr4, "eth0"), n.AddRoute(m6, m.Addr6, "eth0"),
		m.AddRoute(n4, n.Addr4, "eth0"), m.AddRoute(n6, n.Addr6, "eth0")); err != nil {
		return fmt.Errorf("routes between nodes: %w", err)
	}
	return nil
}

// routedAcross is what the kernel alone does between pods of two nodes.
func routedAcross(t *Topology) (Pair, error) {
	n, m, a, b, err := podsAcross(t)
	if err != nil {
		return Pair{}, err
	}
	return Pair{Client: a.Netns, Server: b.Netns, Server4: b.addr4, Server6: b.addr6}, errors.Join(forwardTo(n, a), forwardTo(m, b))
}
