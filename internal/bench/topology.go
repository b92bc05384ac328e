// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"
)

// Topology is a switch and what the paths connect to it. Close removes all.
type Topology struct {
	sw       *Netns
	all      []*Netns
	nodes    int
	undo     []func()
	clusters map[mode]*lashCluster // of the paths of Lash's that are set up
}

// Node is a network namespace with eth0 on the switch.
type Node struct {
	*Netns
	Index        int
	Addr4, Addr6 netip.Addr
	pods         int
}

// Pair is the two ends between which a path's traffic runs.
type Pair struct {
	Client, Server   *Netns
	Server4, Server6 netip.Addr

	Group    *os.File                                            // control group of both ends' processes; nil: that of the bench
	Frontend func(server netip.AddrPort) (netip.AddrPort, error) // where the client asks for the server; nil: there
	Around   func() (end func(), err error)                      // called before each measurement, and end after it; nil: nothing is
}

// NewTopology makes the switch: a bridge in a namespace of its own, which does nothing with a frame but hand it on. What
// it costs is in every figure between nodes, of both sides of a comparison, and twice where a packet takes two hops.
func NewTopology() (*Topology, error) {
	t := &Topology{clusters: map[mode]*lashCluster{}}
	sw, err := t.netns("lb-switch")
	if err != nil {
		return nil, err
	}
	t.sw = sw
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "br0"
	if err := sw.nl.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
		t.Close()
		return nil, fmt.Errorf("bridge: %w", err)
	}
	err = errors.Join(sw.SetUp("br0"), sw.Sysctl("ipv6/conf/br0/disable_ipv6", "1"))
	for _, hook := range []string{"bridge/bridge-nf-call-iptables", "bridge/bridge-nf-call-ip6tables"} {
		// A switch is no router. Where the kernel has no bridge netfilter, there is nothing to turn off.
		if off := sw.Sysctl(hook, "0"); !errors.Is(off, fs.ErrNotExist) {
			err = errors.Join(err, off)
		}
	}
	if err != nil {
		t.Close()
		return nil, err
	}
	return t, nil
}

// Close takes everything down, last made first.
func (t *Topology) Close() {
	for i := len(t.undo) - 1; i >= 0; i-- {
		t.undo[i]()
	}
	for i := len(t.all) - 1; i >= 0; i-- {
		t.all[i].Close()
	}
	t.undo, t.all = nil, nil
}

// Defer has f called by Close, before what was made earlier goes.
func (t *Topology) Defer(f func()) { t.undo = append(t.undo, f) }

func (t *Topology) netns(name string) (*Netns, error) {
	n, err := NewNetns(name)
	if err != nil {
		return nil, err
	}
	t.all = append(t.all, n)
	return n, nil
}

// Node adds a node with 192.168.76.x/24 and fd76::x/64 on eth0.
func (t *Topology) Node() (*Node, error) {
	t.nodes++
	i := t.nodes
	ns, err := t.netns(fmt.Sprintf("lb-node%d", i))
	if err != nil {
		return nil, err
	}
	n := &Node{
		Netns: ns, Index: i,
		Addr4: netip.AddrFrom4([4]byte{192, 168, 76, byte(i)}),
		Addr6: netip.MustParseAddr(fmt.Sprintf("fd76::%x", i)),
	}
	port := fmt.Sprintf("port%d", i)
	if err := Veth(ns, "eth0", t.sw, port); err != nil {
		return nil, err
	}
	br, err := t.sw.Link("br0")
	if err != nil {
		return nil, err
	}
	l, err := t.sw.Link(port)
	if err != nil {
		return nil, err
	}
	return n, errors.Join(
		t.sw.nl.LinkSetMaster(l, br),
		ns.AddAddr("eth0", netip.PrefixFrom(n.Addr4, 24)),
		ns.AddAddr("eth0", netip.PrefixFrom(n.Addr6, 64)))
}

// Nodes adds two nodes.
func (t *Topology) Nodes() (a, b *Node, err error) {
	if a, err = t.Node(); err != nil {
		return nil, nil, err
	}
	b, err = t.Node()
	return a, b, err
}

// Prefixes are the node's own pod networks: 10.76.x.0/24 and fd00:76:x::/120.
func (n *Node) Prefixes() (v4, v6 netip.Prefix) {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 76, byte(n.Index), 0}), 24),
		netip.PrefixFrom(netip.MustParseAddr(fmt.Sprintf("fd00:76:%x::", n.Index)), 120)
}

// Routers are the first addresses of the pod networks.
func (n *Node) Routers() (v4, v6 netip.Addr) {
	p4, p6 := n.Prefixes()
	return p4.Addr().Next(), p6.Addr().Next()
}

// nextPod hands out the next pod's addresses.
func (n *Node) nextPod() (index int, v4, v6 netip.Addr) {
	n.pods++
	v4, v6 = n.Routers()
	for range n.pods {
		v4, v6 = v4.Next(), v6.Next()
	}
	return n.pods, v4, v6
}

// pod is a namespace with eth0, a route to everything by the gateway and a
// permanent neighbour for it, for paths that wire pods themselves.
type pod struct {
	*Netns
	addr4, addr6 netip.Addr
	host         netlink.Link // host side, in the node
	eth0         netlink.Link
}

// wirePod adds such a pod to a node.
func (t *Topology) wirePod(n *Node) (*pod, error) {
	i, v4, v6 := n.nextPod()
	ns, err := t.netns(fmt.Sprintf("%s-pod%d", n.Name, i))
	if err != nil {
		return nil, err
	}
	p := &pod{Netns: ns, addr4: v4, addr6: v6}
	dev := fmt.Sprintf("lxc%d", i)
	if err := Veth(n.Netns, dev, ns, "eth0"); err != nil {
		return nil, err
	}
	if p.host, err = n.Link(dev); err != nil {
		return nil, err
	}
	if p.eth0, err = ns.Link("eth0"); err != nil {
		return nil, err
	}
	r4, r6 := n.Routers()
	gateway := p.host.Attrs().HardwareAddr
	return p, errors.Join(
		ns.AddAddr("eth0", netip.PrefixFrom(v4, 32)), ns.AddAddr("eth0", netip.PrefixFrom(v6, 128)),
		ns.AddNeigh(r4, "eth0", gateway), ns.AddNeigh(r6, "eth0", gateway),
		ns.AddRoute(netip.PrefixFrom(netip.IPv4Unspecified(), 0), r4, "eth0"),
		ns.AddRoute(netip.PrefixFrom(netip.IPv6Unspecified(), 0), r6, "eth0"))
}

// AddDefaultRoutes routes everything by an address of the switch's subnet that
// nobody has: what a node's default route looks like.
func (n *Node) AddDefaultRoutes() error {
	return errors.Join(
		n.AddRoute(netip.PrefixFrom(netip.IPv4Unspecified(), 0), netip.AddrFrom4([4]byte{192, 168, 76, 254}), "eth0"),
		n.AddRoute(netip.PrefixFrom(netip.IPv6Unspecified(), 0), netip.MustParseAddr("fd76::fe"), "eth0"))
}
