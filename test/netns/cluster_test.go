// SPDX-License-Identifier: Apache-2.0

// Package netns tests the datapath with real traffic: nodes, pods and an outside host
// are network namespaces, the programs are the real ones, Kubernetes is absent.
package netns

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lash-net/lash/internal/datapath"
	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/testutil"
)

// A worker runs functions on one thread that lives in a network namespace of its own,
// with a bpffs that nobody else sees.
type worker struct {
	ns    *os.File
	calls chan func()
}

func newWorker(t *testing.T) *worker {
	t.Helper()
	w := &worker{ns: testutil.Netns(t), calls: make(chan func())}
	started := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with its namespaces
		started <- func() error {
			if err := unix.Setns(int(w.ns.Fd()), unix.CLONE_NEWNET); err != nil {
				return err
			}
			if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
				return err
			}
			if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
				return err
			}
			return unix.Mount("bpf", "/sys/fs/bpf", "bpf", 0, "")
		}()
		for f := range w.calls {
			f()
		}
	}()
	if err := <-started; err != nil {
		t.Fatalf("worker: %v", err)
	}
	t.Cleanup(func() { close(w.calls) })
	return w
}

func (w *worker) do(t *testing.T, what string, f func() error) {
	t.Helper()
	if err := <-w.begin(f); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

func (w *worker) begin(f func() error) <-chan error {
	done := make(chan error, 1)
	w.calls <- func() { done <- f() }
	return done
}

type pod struct {
	ns       *os.File
	ip4, ip6 netip.Addr
	name     string
	ifindex  int
	mac      model.MAC
	nodeMAC  model.MAC // of the host side
	identity model.Identity
}

type node struct {
	*worker
	n        int
	ip4, ip6 netip.Addr
	dp       *datapath.Datapath
	cluster  *cluster
	pods     []*pod
}

type cluster struct {
	sw, outside *os.File
	nodes       []*node
}

type options struct {
	legacy, noTCX bool
	tunnel        string // "": native routing; else the tunnel's kind
	underlay6     bool   // the tunnel's outer packets are IPv6
	dsr           bool   // backends' nodes answer clients outside
	dsrGeneve     bool   // with dsr: the frontend is told in Geneve, and the network drops IP options
	xdp, spread   bool   // XDP on the nodes' devices; it spreads packets over the CPUs
	podsPerNode   int
	fewPorts      bool   // masquerading has four source ports
	netfilter     bool   // not BPF masquerades
	allPorts      bool   // masquerading has those that the agent gives it, and connections are remembered for long
	shared        bool   // masquerading uses sharedPorts, and connections are forgotten soon
	connMax       uint32 // rows of lash_conn; 0: 65536
	sockHostOnly  bool   // pods' sockets are not translated
	dropNoBackend bool   // services without backends drop instead of refusing
}

// tunnelPorts are the tunnels' usual ports.
var tunnelPorts = map[string]uint16{"vxlan": 8472, "geneve": 6081}

// routeMTU is what a pod's route leaves room for.
func (o options) routeMTU() int {
	switch {
	case o.tunnel == "":
		return 1500
	case o.underlay6:
		return 1430
	}
	return 1450
}

func addr(format string, args ...any) netip.Addr {
	return netip.MustParseAddr(fmt.Sprintf(format, args...))
}

const (
	outside4 = "172.18.0.200"
	outside6 = "fd18::200"
)

// newCluster makes two nodes and a host outside, all on one bridge.
func newCluster(t *testing.T, o options) *cluster {
	t.Helper()
	testutil.NeedRoot(t)
	c := &cluster{sw: testutil.Netns(t), outside: testutil.Netns(t)}
	ip(t, c.sw, "link add br0 type bridge mcast_snooping 0", "link set br0 up")
	c.plug(t, c.outside, "out", outside4, outside6)
	for n := 1; n <= 2; n++ {
		nd := &node{worker: newWorker(t), cluster: c, n: n, ip4: addr("172.18.0.1%d", n), ip6: addr("fd18::1%d", n)}
		c.plug(t, nd.ns, fmt.Sprintf("n%d", n), nd.ip4.String(), nd.ip6.String())
		c.nodes = append(c.nodes, nd)
	}
	if o.xdp {
		c.forXDP(t)
	}
	if o.dsrGeneve {
		c.dropOptions(t)
	}
	var loading []<-chan error
	for _, nd := range c.nodes {
		nd.wire(t, c, o)
		loading = append(loading, nd.begin(func() error { return nd.open(c, o) })) // the kernel takes a second to verify the programs
	}
	for _, loaded := range loading {
		if err := <-loaded; err != nil {
			t.Fatalf("datapath: %v", err)
		}
	}
	for _, nd := range c.nodes {
		for i := range o.podsPerNode {
			nd.addPod(t, i+10, o.routeMTU())
		}
	}
	if o.xdp {
		for _, nd := range c.nodes {
			for _, p := range nd.pods {
				summed(t, p.ns)
			}
		}
	}
	return c
}

// dropOptions has the network drop what nodes tell each other in IP options.
func (c *cluster) dropOptions(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath("nft"); err != nil {
		t.Skip("nft (package nftables) is not installed")
	}
	rules := "table netdev options {\n"
	for n := range c.nodes {
		rules += fmt.Sprintf("chain from_%[1]s { type filter hook ingress device %[1]s priority 0; ip hdrlength > 5 drop; ip6 nexthdr ipv6-opts drop; }\n", fmt.Sprint("n", n+1))
	}
	testutil.In(t, c.sw, "nft", rules+"}")
}

// plug connects a namespace to the bridge by eth0.
func (c *cluster) plug(t *testing.T, ns *os.File, name, ip4, ip6 string) {
	t.Helper()
	ip(t, ns, "link set lo up")
	ip(t, c.sw, fmt.Sprintf("link add %s type veth peer name eth0 netns %s", name, testutil.NetnsPath(ns)), "link set "+name+" master br0 up")
	ip(t, ns, "addr add "+ip4+"/16 dev eth0", "addr add "+ip6+"/64 dev eth0 nodad", "link set eth0 up")
}

func ip(t *testing.T, ns *os.File, commands ...string) {
	t.Helper()
	for _, c := range commands {
		testutil.In(t, ns, append([]string{"ip"}, strings.Fields(c)...)...)
	}
}

func (nd *node) cidr4() netip.Prefix { return netip.MustParsePrefix(fmt.Sprintf("10.0.%d.0/24", nd.n)) }
func (nd *node) cidr6() netip.Prefix {
	return netip.MustParsePrefix(fmt.Sprintf("fd00:0:0:%d::/64", nd.n))
}
func (nd *node) router4() netip.Addr { return addr("10.0.%d.1", nd.n) }
func (nd *node) router6() netip.Addr { return addr("fd00:0:0:%d::1", nd.n) }

func (nd *node) wire(t *testing.T, c *cluster, o options) {
	t.Helper()
	ip(t, nd.ns,
		"link add lash_host type veth peer name lash_net", "link set lash_host arp off", "link set lash_net arp off",
		"link set lash_net up", "link set lash_host up",
		fmt.Sprintf("addr add %s/32 dev lash_host", nd.router4()), fmt.Sprintf("addr add %s/128 dev lash_host nodad", nd.router6()),
		fmt.Sprintf("route add %s dev lash_host", nd.router4()),
		fmt.Sprintf("route add %s via %s dev lash_host src %s", nd.cidr4(), nd.router4(), nd.router4()),
		fmt.Sprintf("route add %s dev lash_host src %s", nd.cidr6(), nd.router6()))
	if o.tunnel != "" {
		ip(t, nd.ns, "link add lash_tunnel type "+o.tunnel+" external "+map[string]string{"vxlan": "dstport 8472 nolearning udp6zerocsumrx", "geneve": "udp6zerocsumrx"}[o.tunnel],
			"link set lash_tunnel mtu 1500 up")
	}
	for _, other := range c.nodes {
		switch {
		case other == nd:
		case o.tunnel != "":
			ip(t, nd.ns, fmt.Sprintf("route add %s via %s dev lash_host src %s mtu %d", other.cidr4(), nd.router4(), nd.router4(), o.routeMTU()),
				fmt.Sprintf("route add %s dev lash_host src %s mtu %d", other.cidr6(), nd.router6(), o.routeMTU()))
		default:
			ip(t, nd.ns, fmt.Sprintf("route add %s via %s dev eth0", other.cidr4(), other.ip4), fmt.Sprintf("route add %s via %s dev eth0", other.cidr6(), other.ip6))
		}
	}
	testutil.In(t, nd.ns, "sh", "-c", "for k in net/ipv4/ip_forward net/ipv6/conf/all/forwarding net/ipv4/conf/all/rp_filter; do echo 1 > /proc/sys/$k; done")
}

func linkOf(name string) (int, model.MAC, error) {
	l, err := net.InterfaceByName(name)
	if err != nil {
		return 0, model.MAC{}, err
	}
	return l.Index, model.MAC(l.HardwareAddr), nil
}

func (nd *node) open(c *cluster, o options) error {
	host, hostMAC, err := linkOf("lash_host")
	if err != nil {
		return err
	}
	eth0, ethMAC, err := linkOf("eth0")
	if err != nil {
		return err
	}
	overlay := 0
	if o.tunnel != "" {
		if overlay, _, err = linkOf("lash_tunnel"); err != nil {
			return err
		}
	}
	var snatMin, snatMax uint16
	if o.fewPorts {
		snatMin, snatMax = 30000, 30003
	}
	var snatFarMin, snatFarMax uint16
	var anyLifetime time.Duration
	if o.allPorts {
		snatFarMin, snatFarMax, anyLifetime = 32768, 65535, time.Hour // besides 1024 to 29999
	}
	if o.shared {
		middle := (sharedFirst + sharedLast) / 2
		snatMin, snatMax, snatFarMin, snatFarMax, anyLifetime = sharedFirst, uint16(middle), uint16(middle+1), sharedLast, sharedLifetime
	}
	nd.dp, err = datapath.Open(datapath.Config{
		SNATMin: snatMin, SNATMax: snatMax, NodeAddrs: []netip.Addr{nd.ip4, nd.ip6},
		OverlayIfindex: overlay, TunnelPort: tunnelPorts[o.tunnel], TunnelGeneve: o.tunnel == "geneve", TunnelMTU: o.routeMTU(), DSR: o.dsr, DSRGeneve: o.dsrGeneve, DSRPort: 6081,
		Root: "/sys/fs/bpf/lash", HostIfindex: host, HostMAC: hostMAC, DirectIfindex: eth0,
		Routers: []netip.Addr{nd.router4(), nd.router6()}, PodCIDRs: []netip.Prefix{nd.cidr4(), nd.cidr6()},
		NativeCIDRs: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/16"), netip.MustParsePrefix("fd00::/48")},
		HostRouting: !o.legacy, Masquerade4: !o.netfilter, Masquerade6: !o.netfilter, SNATFarMin: snatFarMin, SNATFarMax: snatFarMax, AnyLifetime: anyLifetime, ConnMax: cmp.Or(o.connMax, 65536), ServiceMax: 1024,
		NoTCX: o.noTCX, XDP: o.xdp, XDPSpread: o.spread, DropNoBackend: o.dropNoBackend, SockHostOnly: o.sockHostOnly,
	}, slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	ctx := context.Background()
	for _, a := range []netip.Addr{nd.ip4, nd.ip6, nd.router4(), nd.router6()} {
		if err := nd.dp.Endpoints().Put(ctx, a, model.LocalAddr{Host: true, Identity: model.IdentityHost}); err != nil {
			return err
		}
	}
	for _, a := range []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()} {
		if err := nd.dp.IPCache().Put(ctx, netip.PrefixFrom(a, 0), model.IPCacheEntry{Identity: model.World(a, true)}); err != nil {
			return err
		}
	}
	for _, other := range c.nodes {
		id := model.IdentityRemoteNode
		if other == nd {
			id = model.IdentityHost
		}
		for _, a := range []netip.Addr{other.ip4, other.ip6} {
			if err := nd.dp.IPCache().Put(ctx, netip.PrefixFrom(a, a.BitLen()), model.IPCacheEntry{Identity: id, Peer: other != nd}); err != nil {
				return err
			}
		}
		if other == nd || o.tunnel == "" {
			continue
		}
		node := other.ip4
		if o.underlay6 {
			node = other.ip6
		}
		for _, p := range []netip.Prefix{other.cidr4(), other.cidr6()} {
			if err := nd.dp.IPCache().Put(ctx, p, model.IPCacheEntry{Identity: model.World(p.Addr(), true), Node: node, Tunnel: true}); err != nil {
				return err
			}
		}
	}
	if overlay != 0 {
		if err := nd.dp.AttachOverlay(overlay, "lash_tunnel"); err != nil {
			return err
		}
	}
	if err := nd.dp.Devices().Put(ctx, eth0, model.Device{Ifindex: eth0, MAC: ethMAC, MTU: 1500, IPv4: nd.ip4, IPv6: nd.ip6}); err != nil {
		return err
	}
	if err := nd.dp.AttachDevice(eth0, "eth0"); err != nil {
		return err
	}
	keep := map[int]string{}
	if o.xdp {
		keep[eth0] = "eth0"
		if err := nd.dp.AttachXDP(eth0, "eth0"); err != nil {
			return err
		}
	}
	if err := nd.dp.KeepXDP(keep); err != nil {
		return err
	}
	return nd.dp.AttachHost(host, "lash_host")
}

// identity is a number of its own for each pod.
func (nd *node) identity(last int) model.Identity { return model.Identity(1000*nd.n + last) }

func (nd *node) addPod(t *testing.T, last, mtu int) *pod {
	t.Helper()
	p := &pod{ns: testutil.Netns(t), ip4: addr("10.0.%d.%d", nd.n, last), ip6: addr("fd00:0:0:%d::%x", nd.n, last), name: fmt.Sprintf("lxc%d", last)}
	ip(t, nd.ns, fmt.Sprintf("link add %s type veth peer name eth0 netns %s", p.name, testutil.NetnsPath(p.ns)), "link set "+p.name+" up")
	ip(t, p.ns, "link set lo up", fmt.Sprintf("addr add %s/32 dev eth0", p.ip4), fmt.Sprintf("addr add %s/128 dev eth0 nodad", p.ip6), "link set eth0 up",
		fmt.Sprintf("route add %s dev eth0 scope link", nd.router4()), fmt.Sprintf("route add default via %s dev eth0 mtu %d", nd.router4(), mtu),
		fmt.Sprintf("route add %s dev eth0", nd.router6()), fmt.Sprintf("route add default via %s dev eth0 mtu %d", nd.router6(), mtu))
	// Not from sysfs: that shows the namespace of who mounted it.
	_, after, _ := strings.Cut(testutil.In(t, p.ns, "ip", "-o", "link", "show", "eth0"), "link/ether ")
	mac, err := model.ParseMAC(strings.Fields(after)[0])
	if err != nil {
		t.Fatal(err)
	}
	nd.do(t, "pod", func() error {
		ifindex, nodeMAC, err := linkOf(p.name)
		if err != nil {
			return err
		}
		p.ifindex, p.mac, p.nodeMAC, p.identity = ifindex, mac, nodeMAC, nd.identity(last)
		row := model.LocalAddr{EndpointID: uint16(last), Ifindex: ifindex, Identity: nd.identity(last), MAC: mac, NodeMAC: nodeMAC}
		for _, a := range []netip.Addr{p.ip4, p.ip6} {
			if err := nd.dp.Endpoints().Put(context.Background(), a, row); err != nil {
				return err
			}
		}
		return nd.dp.AttachPod(ifindex, p.name)
	})
	nd.pods = append(nd.pods, p)
	return p
}

// dump is what the node says of itself, for a failed test.
func (nd *node) dump(t *testing.T) {
	t.Helper()
	for _, kind := range []string{"metrics", "ct", "nat", "net"} {
		nd.do(t, kind, func() error {
			columns, rows, err := nd.dp.Dump(kind)
			t.Logf("node %d, %s: %v", nd.n, kind, columns)
			for _, r := range rows {
				t.Log(strings.Join(r, "  "))
			}
			return err
		})
	}
}

// try runs a command in a namespace and tells whether it succeeded.
func try(ns *os.File, command ...string) (string, error) {
	out, err := exec.Command("nsenter", append([]string{"--net=" + testutil.NetnsPath(ns)}, command...)...).CombinedOutput()
	return string(out), err
}
