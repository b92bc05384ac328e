// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/lash-net/lash/bpf"
	"github.com/lash-net/lash/internal/datapath"
	"github.com/lash-net/lash/internal/datapath/netdev"
	"github.com/lash-net/lash/internal/events"
	"github.com/lash-net/lash/internal/model"
)

// bpfRoot is a bpffs of this process's own mount namespace (see EnterMounts).
const bpfRoot = "/sys/fs/bpf"

// strangers is how many other nodes the ipcache knows beside the two of the
// bench, so that its longest-prefix lookups have something to search.
const strangers = 250

// mode is how a cluster of Lash's is configured.
type mode struct {
	tunnel bool // VXLAN between nodes
	legacy bool // host routing by the stack
	xdp    bool // XDP on the nodes' devices

	services int // other services than the measured one; 0: a few
}

var native = mode{}

const (
	tunnelPort = 8472
	tunnelMTU  = 1450
)

// lashNode is a node with Lash's datapath as its agent would leave it: the same
// devices, routes, rows and programs, without Kubernetes.
type lashNode struct {
	*Node
	mode     mode
	host     *netdev.Host
	datapath *datapath.Datapath
	network  model.PodNetwork
}

// lashCluster is two such nodes: n with two pods, m with one.
type lashCluster struct {
	n, m *lashNode
	pods []*lashPod

	group *os.File // of the socket programs; nil: they are not attached
}

type lashPod struct {
	*Netns
	addr4, addr6 netip.Addr
	device       string // host side
}

// lash sets the cluster up once for all of the mode's paths.
func (t *Topology) lash(m mode) (*lashCluster, error) {
	if c := t.clusters[m]; c != nil {
		return c, nil
	}
	a, b, err := t.Nodes()
	if err != nil {
		return nil, err
	}
	c := &lashCluster{}
	if c.n, err = t.lashNode(m, a, b); err != nil {
		return nil, fmt.Errorf("node 1: %w", err)
	}
	if c.m, err = t.lashNode(m, b, a); err != nil {
		return nil, fmt.Errorf("node 2: %w", err)
	}
	for _, n := range []*lashNode{c.n, c.n, c.m} {
		p, err := t.lashPod(n)
		if err != nil {
			return nil, fmt.Errorf("pod: %w", err)
		}
		c.pods = append(c.pods, p)
	}
	t.clusters[m] = c
	return c, nil
}

func (t *Topology) lashNode(m mode, node, peer *Node) (*lashNode, error) {
	ctx := context.Background()
	host, err := netdev.OpenHostAt(node.Path())
	if err != nil {
		return nil, err
	}
	t.Defer(func() { host.Close() })
	r4, r6 := node.Routers()
	p4, p6 := node.Prefixes()
	n := &lashNode{Node: node, mode: m, host: host, network: model.PodNetwork{Router4: r4, Router6: r6, MTU: 1500}}
	base, err := host.EnsureBase(netdev.BaseConfig{Router4: r4, Router6: r6, MTU: n.network.MTU})
	if err != nil {
		return nil, err
	}
	eth0, err := node.Link("eth0")
	if err != nil {
		return nil, err
	}
	index := eth0.Attrs().Index
	tunnel := 0
	if m.tunnel {
		n.network.RouteMTU = tunnelMTU
		made, err := host.EnsureTunnel(netdev.TunnelConfig{Protocol: netdev.VXLAN, Port: tunnelPort, MTU: n.network.MTU})
		if err != nil {
			return nil, err
		}
		tunnel = made.Ifindex
	}
	root := filepath.Join(bpfRoot, "lash-"+node.Name)
	t.Defer(func() { os.RemoveAll(root) }) // unpins the links, which detaches
	n.datapath, err = datapath.Open(datapath.Config{
		Root: root, HostIfindex: base.HostIfindex, HostMAC: base.HostMAC, DirectIfindex: index,
		Routers: []netip.Addr{r4, r6}, PodCIDRs: []netip.Prefix{p4, p6}, NodeAddrs: []netip.Addr{node.Addr4, node.Addr6},
		NativeCIDRs:    []netip.Prefix{netip.MustParsePrefix("10.76.0.0/16"), netip.MustParsePrefix("fd00:76::/32")},
		ServiceMax:     uint32(max(65536, 4*m.services)),
		OverlayIfindex: tunnel, TunnelPort: tunnelPort, HostRouting: !m.legacy, Masquerade4: true, Masquerade6: true,
		XDP: m.xdp,
	}, slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})))
	if err != nil {
		return nil, err
	}
	t.Defer(func() { n.datapath.Close() })
	for _, a := range []netip.Addr{node.Addr4, node.Addr6, r4, r6} {
		if err := n.datapath.Endpoints().Put(ctx, a, model.LocalAddr{Identity: model.IdentityHost, Host: true}); err != nil {
			return nil, err
		}
	}
	if err := n.putIPCache(ctx, peer); err != nil {
		return nil, err
	}
	device := model.Device{Ifindex: index, Name: "eth0", MTU: eth0.Attrs().MTU, IPv4: node.Addr4, IPv6: node.Addr6, DirectRouting: true}
	copy(device.MAC[:], eth0.Attrs().HardwareAddr)
	if err := n.datapath.Devices().Put(ctx, index, device); err != nil {
		return nil, err
	}
	if err := n.putRoutes(ctx, peer); err != nil {
		return nil, err
	}
	err = node.Do(func() error {
		if tunnel != 0 {
			if err := n.datapath.AttachOverlay(tunnel, netdev.VXLANDevice); err != nil {
				return err
			}
		}
		return errors.Join(n.datapath.AttachDevice(index, "eth0"), n.datapath.AttachHost(base.HostIfindex, netdev.HostDevice))
	})
	if err != nil {
		return nil, err
	}
	if m.xdp {
		if err := t.wire(node); err != nil {
			return nil, err
		}
		if err := node.Do(func() error { return n.datapath.AttachXDP(index, "eth0") }); err != nil {
			return nil, fmt.Errorf("XDP on eth0: %w", err)
		}
	}
	return n, n.datapath.Raise("node set up")
}

// listener makes what reads the events of a node, as its agent does for a monitor at the aggregation that is usual, and
// throws them away. listen begins it and returns what ends it.
func (t *Topology) listener(dp *datapath.Datapath) (listen func() (func(), error), err error) {
	ring, err := dp.OpenEvents()
	if err != nil {
		return nil, err
	}
	told := make(chan error, 1)
	hub := events.New(ring, func(on bool) error {
		if !on {
			return dp.SetMonitoring(datapath.Monitoring{})
		}
		err := dp.SetMonitoring(datapath.Monitoring{
			Drops: true, Traces: true, Verdicts: true, Aggregation: bpf.AggregateMedium, Interval: 5 * time.Second, Flags: 0x07, // FIN, SYN, RST
		})
		told <- err
		return err
	}, slog.New(slog.NewTextHandler(os.Stderr, nil)))
	ctx, stop := context.WithCancel(context.Background())
	var parts sync.WaitGroup
	parts.Go(func() { _ = hub.Run(ctx) })
	t.Defer(func() {
		stop()
		parts.Wait()
		ring.Close()
	})
	return func() (func(), error) {
		ctx, stop := context.WithCancel(ctx)
		var listening sync.WaitGroup
		listening.Go(func() { _ = hub.Listen(ctx, func([]byte) error { return nil }) })
		end := func() {
			stop()
			listening.Wait()
		}
		if err := <-told; err != nil {
			end()
			return nil, err
		}
		return end, nil
	}, nil
}

// putIPCache writes what the agent would: nodes, their pods' networks, the world.
func (n *lashNode) putIPCache(ctx context.Context, peer *Node) error {
	rows := map[netip.Prefix]model.IPCacheEntry{
		netip.PrefixFrom(netip.IPv4Unspecified(), 0): {Identity: model.IdentityWorld},
		netip.PrefixFrom(netip.IPv6Unspecified(), 0): {Identity: model.IdentityWorld},
	}
	one := func(a netip.Addr, id model.Identity) {
		rows[netip.PrefixFrom(a, a.BitLen())] = model.IPCacheEntry{Identity: id, Peer: id == model.IdentityRemoteNode}
	}
	one(n.Addr4, model.IdentityHost)
	one(n.Addr6, model.IdentityHost)
	one(peer.Addr4, model.IdentityRemoteNode)
	one(peer.Addr6, model.IdentityRemoteNode)
	q4, q6 := peer.Prefixes()
	rows[q4] = model.IPCacheEntry{Identity: model.IdentityWorld, Node: peer.Addr4, Tunnel: n.mode.tunnel}
	rows[q6] = model.IPCacheEntry{Identity: model.IdentityWorld, Node: peer.Addr6, Tunnel: n.mode.tunnel}
	if n.mode.tunnel {
		rows[q6] = rows[q4] // the underlay is IPv4
	}
	for i := range strangers {
		there := netip.AddrFrom4([4]byte{192, 168, 77, byte(i)})
		one(there, model.IdentityRemoteNode)
		rows[netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 77, byte(i), 0}), 24)] = model.IPCacheEntry{Identity: model.IdentityWorld, Node: there}
	}
	for prefix, row := range rows {
		if err := n.datapath.IPCache().Put(ctx, prefix, row); err != nil {
			return err
		}
	}
	return nil
}

func (n *lashNode) putRoutes(ctx context.Context, peer *Node) error {
	p4, p6 := n.Prefixes()
	q4, q6 := peer.Prefixes()
	r4, r6 := n.Routers()
	to4, to6 := model.Route{Via: peer.Addr4, Dev: "eth0", Scope: model.ScopeGlobal}, model.Route{Via: peer.Addr6, Dev: "eth0", Scope: model.ScopeGlobal}
	if n.mode.tunnel {
		to4 = model.Route{Via: r4, Dev: netdev.HostDevice, Src: r4, MTU: tunnelMTU, Scope: model.ScopeGlobal}
		to6 = model.Route{Dev: netdev.HostDevice, Src: r6, MTU: tunnelMTU, Scope: model.ScopeLink}
	}
	for _, r := range []struct {
		dst   netip.Prefix
		route model.Route
	}{
		{netip.PrefixFrom(r4, 32), model.Route{Dev: netdev.HostDevice, Scope: model.ScopeLink}},
		{p4, model.Route{Via: r4, Dev: netdev.HostDevice, Src: r4, Scope: model.ScopeGlobal}},
		{p6, model.Route{Dev: netdev.HostDevice, Src: r6, Scope: model.ScopeLink}},
		{q4, to4},
		{q6, to6},
	} {
		if err := n.host.Routes().Put(ctx, r.dst, r.route); err != nil {
			return err
		}
	}
	return nil
}

// lashPod adds a pod as CNI ADD does: devices, rows, programs, then addresses.
func (t *Topology) lashPod(n *lashNode) (*lashPod, error) {
	ctx := context.Background()
	i, v4, v6 := n.nextPod()
	ns, err := t.netns(fmt.Sprintf("%s-pod%d", n.Name, i))
	if err != nil {
		return nil, err
	}
	ep := model.Endpoint{
		ID: uint16(i), ContainerID: fmt.Sprintf("bench%d", i), Namespace: "bench", Pod: fmt.Sprintf("pod%d", i), NetnsPath: ns.Path(),
		ContainerIfName: "eth0", IfName: fmt.Sprintf("lxc%012x", i), IPv4: v4, IPv6: v6, Identity: 1000,
	}
	if ep, err = n.host.CreatePod(ctx, ns.file, ep, n.network); err != nil {
		return nil, err
	}
	row := model.LocalAddr{EndpointID: ep.ID, Ifindex: ep.Ifindex, Identity: ep.Identity, MAC: ep.MAC, NodeMAC: ep.NodeMAC}
	for _, a := range []netip.Addr{v4, v6} {
		if err := errors.Join(
			n.datapath.Endpoints().Put(ctx, a, row),
			n.datapath.IPCache().Put(ctx, netip.PrefixFrom(a, a.BitLen()), model.IPCacheEntry{Identity: ep.Identity})); err != nil {
			return nil, err
		}
	}
	if err := n.Do(func() error { return n.datapath.AttachPod(ep.Ifindex, ep.IfName) }); err != nil {
		return nil, err
	}
	if err := n.host.StartPod(ctx, ns.file, ep, n.network); err != nil {
		return nil, err
	}
	return &lashPod{ns, v4, v6, ep.IfName}, n.datapath.Raise("pod added")
}

// sweep does the agent's housekeeping between rounds: closed connections go.
func (c *lashCluster) sweep(ctx context.Context) error {
	for _, n := range []*lashNode{c.n, c.m} {
		if _, err := n.datapath.Sweep(ctx); err != nil {
			return fmt.Errorf("sweep %s: %w", n.Name, err)
		}
	}
	return nil
}

func lashSame(t *Topology) (Pair, error) {
	c, err := t.lash(native)
	if err != nil {
		return Pair{}, err
	}
	return c.neighbours(), nil
}

// neighbours are the two pods of the first node.
func (c *lashCluster) neighbours() Pair {
	a, b := c.pods[0], c.pods[1]
	return Pair{Client: a.Netns, Server: b.Netns, Server4: b.addr4, Server6: b.addr6}
}

func lashAcross(m mode) func(*Topology) (Pair, error) {
	return func(t *Topology) (Pair, error) {
		c, err := t.lash(m)
		if err != nil {
			return Pair{}, err
		}
		a, b := c.pods[0], c.pods[2]
		return Pair{Client: a.Netns, Server: b.Netns, Server4: b.addr4, Server6: b.addr6}, nil
	}
}

// lashEvents is the path of lashAcross itself, with listeners while it is measured: two clusters, and be they alike, are not
// equally fast to one or two in a hundred.
func lashEvents(t *Topology) (Pair, error) {
	p, err := lashAcross(native)(t)
	if err != nil {
		return Pair{}, err
	}
	c := t.clusters[native]
	var listen []func() (func(), error)
	for _, n := range []*lashNode{c.n, c.m} {
		l, err := t.listener(n.datapath)
		if err != nil {
			return Pair{}, err
		}
		listen = append(listen, l)
	}
	p.Around = func() (func(), error) {
		var ends []func()
		end := func() {
			for _, f := range ends {
				f()
			}
		}
		for _, l := range listen {
			f, err := l()
			if err != nil {
				end()
				return nil, err
			}
			ends = append(ends, f)
		}
		return end, nil
	}
	return p, nil
}

func lashHost(t *Topology) (Pair, error) {
	c, err := t.lash(native)
	if err != nil {
		return Pair{}, err
	}
	return Pair{Client: c.n.Netns, Server: c.m.Netns, Server4: c.m.Addr4, Server6: c.m.Addr6}, nil
}
