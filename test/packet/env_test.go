// SPDX-License-Identifier: Apache-2.0

// Package packet runs the datapath's programs on single packets (BPF_PROG_TEST_RUN): the
// real objects, maps of the test's own, a network namespace with devices that lead nowhere
// for the FIB to answer about. Nothing is attached and nothing is sent.
package packet

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"runtime"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"

	"github.com/lash-net/lash/bpf"
	"github.com/lash-net/lash/internal/datapath"
	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/testutil"
)

// Devices of the node, by ifindex.
const (
	ifHost    = 11 + iota // lash_host
	ifEth0                // towards the network, Lash's
	ifOther               // towards the network, not Lash's
	ifA                   // pod a
	ifB                   // pod b
	ifNone                // a veth pair that Lash does not know
	ifOverlay             // the tunnel's
)

// mac of what is behind or at a device; the last byte tells which.
func mac(last byte) model.MAC { return model.MAC{2, 0, 0, 0, 0, last} }

const (
	macNext   = 0x80 // the next hop
	macRouter = 0x81 // whoever sends to the node from outside
	macPod    = 0x40 // + ifindex: the pod's side of the device
)

// family is one address family with everything that the tables name.
type family struct {
	name         string
	v6           bool
	a, b         netip.Addr // pods of this node
	gone         netip.Addr // of this node's pod CIDR; nobody has it
	router, node netip.Addr
	far          netip.Addr // a pod of a node whose neighbour entry is there
	cold         netip.Addr // a pod of a node whose neighbour is unknown
	narrow       netip.Addr // a pod behind a route of MTU 1400
	other        netip.Addr // behind a device that is not Lash's
	nowhere      netip.Addr // no route
	outside      netip.Addr // outside of the cluster
	peer         netip.Addr // the other node itself
	multicast    netip.Addr
}

var families = []family{
	{
		name: "IPv4", a: addr("10.0.1.10"), b: addr("10.0.1.11"), gone: addr("10.0.1.99"), router: addr("10.0.1.1"), node: addr("172.18.0.11"),
		far: addr("10.0.2.10"), cold: addr("10.0.3.10"), narrow: addr("10.0.4.10"), other: addr("10.0.5.10"), nowhere: addr("10.0.6.10"),
		outside: addr("192.0.2.7"), peer: addr("172.18.0.12"), multicast: addr("224.0.0.22"),
	},
	{
		name: "IPv6", v6: true, a: addr("fd00:0:0:1::a"), b: addr("fd00:0:0:1::b"), gone: addr("fd00:0:0:1::99"), router: addr("fd00:0:0:1::1"), node: addr("fd18::11"),
		far: addr("fd00:0:0:2::a"), cold: addr("fd00:0:0:3::a"), narrow: addr("fd00:0:0:4::a"), other: addr("fd00:0:0:5::a"), nowhere: addr("fd00:0:0:6::a"),
		outside: addr("2001:db8::7"), peer: addr("fd18::12"), multicast: addr("ff02::16"),
	},
}

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

// node is a network namespace with the devices and routes of a node, and a thread in it.
type node struct {
	calls  chan func()
	loaded map[string]*programs // by name of the configuration
}

// only is the node that all tests share: making one and verifying the programs is most of the work. Namespace,
// programs and maps end with the process.
var only *node

func theNode(t testing.TB) *node {
	t.Helper()
	testutil.NeedRoot(t)
	if only == nil {
		only = newNode(t)
	}
	return only
}

func newNode(t testing.TB) *node {
	t.Helper()
	if err := rlimit.RemoveMemlock(); err != nil {
		t.Log(err)
	}
	ns := testutil.Netns(t)
	n := &node{calls: make(chan func()), loaded: map[string]*programs{}}
	var script strings.Builder
	for ifindex, name := range map[int]string{ifHost: "lash_host", ifEth0: "eth0", ifOther: "other", ifA: "lxc_a", ifB: "lxc_b", ifNone: "lxc_none", ifOverlay: "lash_vxlan"} {
		fmt.Fprintf(&script, "link add %s index %d address %s type veth peer name %s_ index %d\nlink set %s up\nlink set %s_ up\n", name, ifindex, mac(byte(ifindex)), name, ifindex+100, name, name)
	}
	script.WriteString(`link set lo up
addr add 172.18.0.11/16 dev eth0
addr add fd18::11/64 dev eth0 nodad
addr add 10.0.1.1/32 dev lash_host
addr add fd00:0:0:1::1/128 dev lash_host nodad
route add 10.0.1.0/24 dev lash_host
route add fd00:0:0:1::/64 dev lash_host
route add 10.0.5.0/24 dev other
route add fd00:0:0:5::/64 dev other
route add unreachable 10.0.6.0/24
route add unreachable fd00:0:0:6::/64
`)
	for _, hop := range []struct{ to, via4, via6, more string }{
		{"2", "172.18.0.12", "fd18::12", ""}, {"3", "172.18.0.13", "fd18::13", ""}, {"4", "172.18.0.12", "fd18::12", " mtu lock 1400"}, {"", "172.18.0.1", "fd18::1", ""},
	} {
		to4, to6 := "10.0."+hop.to+".0/24", "fd00:0:0:"+hop.to+"::/64"
		if hop.to == "" {
			to4, to6 = "default", "default"
		}
		fmt.Fprintf(&script, "route add %s via %s dev eth0%s\nroute add %s via %s dev eth0%s\n", to4, hop.via4, hop.more, to6, hop.via6, hop.more)
		if hop.to == "3" {
			continue
		}
		for _, via := range []string{hop.via4, hop.via6} {
			fmt.Fprintf(&script, "neigh replace %s lladdr %s dev eth0 nud permanent\n", via, mac(macNext))
		}
	}
	testutil.In(t, ns, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding; ip -batch - <<'X'\n"+script.String()+"X")
	started := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with its namespace
		started <- unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET)
		for f := range n.calls {
			f()
		}
	}()
	if err := <-started; err != nil {
		t.Fatalf("enter the node's namespace: %v", err)
	}
	if err := n.do(takeFrames); err != nil {
		t.Fatalf("XDP on the node's devices: %v", err)
	}
	return n
}

func (n *node) do(f func() error) error {
	done := make(chan error)
	n.calls <- func() { done <- f() }
	return <-done
}

// programs is the datapath, loaded one way, on a node.
type programs struct {
	*node
	dp *datapath.Datapath

	sums    bool                 // the kernel knows checksumComplete
	serving bool                 // a test has made services
	counts  map[uint32]bpf.Count // as last read
	drops   map[bpf.DropKey]bpf.Count
}

// load opens the datapath with one of configs, if nobody has yet, and fills its maps.
func (n *node) load(t testing.TB, config string) *programs {
	t.Helper()
	if n.loaded[config] != nil {
		return n.loaded[config]
	}
	tweak, ok := configs[config]
	if !ok {
		t.Fatalf("no configuration %q", config)
	}
	cfg := datapath.Config{
		HostIfindex: ifHost, HostMAC: mac(ifHost), DirectIfindex: ifEth0,
		Routers: []netip.Addr{families[0].router, families[1].router}, PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.0.1.0/24"), netip.MustParsePrefix("fd00:0:0:1::/64")},
		NativeCIDRs: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/16"), netip.MustParsePrefix("fd00::/48")},
		HostRouting: true, Masquerade4: true, Masquerade6: true, SNATMin: 30000, SNATMax: 39999, ConnMax: 4096, ServiceMax: 16,
	}
	if tweak != nil {
		tweak(&cfg)
	}
	p := &programs{node: n}
	if err := n.do(func() (err error) {
		p.dp, err = datapath.Open(cfg, slog.New(slog.DiscardHandler))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
	put := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range families {
		for _, a := range []netip.Addr{f.node, f.router} {
			put(p.dp.Endpoints().Put(ctx, a, model.LocalAddr{Host: true, Identity: model.IdentityHost}))
		}
		put(p.endpoint(f.a, ifA, false))
		put(p.endpoint(f.b, ifB, false))
		put(p.dp.IPCache().Put(ctx, netip.PrefixFrom(f.node, f.node.BitLen()), model.IPCacheEntry{Identity: model.IdentityHost}))
		put(p.dp.IPCache().Put(ctx, netip.PrefixFrom(f.peer, f.peer.BitLen()), model.IPCacheEntry{Identity: model.IdentityRemoteNode}))
	}
	if cfg.OverlayIfindex != 0 {
		for _, f := range families {
			put(p.dp.IPCache().Put(ctx, netip.PrefixFrom(f.far, f.far.BitLen()), model.IPCacheEntry{Identity: 1001, Node: families[0].peer, Tunnel: true}))
			put(p.dp.IPCache().Put(ctx, netip.PrefixFrom(f.peer, f.peer.BitLen()), model.IPCacheEntry{Identity: model.IdentityRemoteNode, Peer: true}))
		}
	}
	put(p.dp.Devices().Put(ctx, ifEth0, model.Device{Ifindex: ifEth0, MAC: mac(ifEth0), MTU: 1500, IPv4: families[0].node, IPv6: families[1].node}))
	p.probe(t)
	p.counts, p.drops = p.readCounts(t), p.readDrops(t)
	n.loaded[config] = p
	return p
}

// endpoint takes a pod's row away, or puts it back.
func (p *programs) endpoint(a netip.Addr, ifindex int, gone bool) error {
	if gone {
		return p.dp.Endpoints().Delete(context.Background(), a)
	}
	return p.dp.Endpoints().Put(context.Background(), a, model.LocalAddr{
		EndpointID: uint16(ifindex), Ifindex: ifindex, Identity: 1000, MAC: mac(macPod + byte(ifindex)), NodeMAC: mac(byte(ifindex)),
	})
}

// forget empties what the programs themselves write.
func (p *programs) forget(t testing.TB) {
	t.Helper()
	p.clear(t, "lash_conn", "lash_nat", "lash_frags", "lash_snat_full")
}

// skbuff is struct __sk_buff of the UAPI, the program's context.
type skbuff struct {
	Len, PktType, Mark, QueueMapping, Protocol, VLANPresent, VLANTCI, VLANProto uint32
	Priority, IngressIfindex, Ifindex, TCIndex                                  uint32
	CB                                                                          [5]uint32
	Hash, TCClassid, Data, DataEnd, NAPIID                                      uint32
	Family, RemoteIP4, LocalIP4                                                 uint32
	RemoteIP6, LocalIP6                                                         [4]uint32
	RemotePort, LocalPort, DataMeta                                             uint32
	FlowKeys, Tstamp                                                            uint64
	WireLen, GSOSegs                                                            uint32
	SK                                                                          uint64
	GSOSize, TstampType                                                         uint32
	HWTstamp                                                                    uint64
}

// Verdicts of tc programs.
const (
	verdictNext     = -1
	verdictOK       = 0
	verdictDrop     = 2
	verdictRedirect = 7
)

// outcome is what a program made of a packet.
type outcome struct {
	verdict int32
	action  uint32 // enum conn_action of a redirect, as noted in skb->cb
	ifindex uint32 // where to
	mark    uint32
	frame   []byte
	wrapped bool                   // it was in Geneve (peeled)
	xdp     uint32                 // action of an XDP program
	counts  map[uint32]uint64      // rows of lash_counts, by how much
	drops   map[bpf.DropKey]uint64 // rows of lash_drops, by how much
}

// checksumComplete makes the kernel believe that the device has summed the packet, and
// fail the run with EBADMSG if the program's changes left that sum wrong.
const checksumComplete = 1 << 2

// probe finds out whether the kernel knows checksumComplete (6.11).
func (p *programs) probe(t testing.TB) {
	in := fromA(frame(packet{src: families[0].a, dst: families[0].b, l4: "udp"}))
	in.summed = true
	_, err := p.run(in)
	if p.sums = !errors.Is(err, unix.EINVAL); !p.sums {
		t.Log("this kernel cannot tell whether the device's sum of a packet stays right: not tested")
	}
	p.forget(t)
}

// input is one packet at a hook.
type input struct {
	program string
	ifindex uint32 // the device
	frame   []byte
	mark    uint32
	gso     uint32 // size of a segment; 0: one packet
	summed  bool   // checksumComplete
	serving bool   // there are services
}

func (p *programs) run(in input) (out outcome, err error) {
	if in.program == "xdp_entry" {
		return p.runXDP(in)
	}
	ctx := skbuff{Ifindex: in.ifindex, Mark: in.mark, GSOSize: in.gso}
	if in.gso > 0 {
		ctx.GSOSegs = (uint32(len(in.frame)) + in.gso - 1) / in.gso
	}
	var after skbuff
	opts := ebpf.RunOptions{Data: in.frame, DataOut: make([]byte, len(in.frame)+256), Context: ctx, ContextOut: &after}
	if in.summed {
		opts.Flags = checksumComplete
	}
	err = p.do(func() error {
		verdict, err := p.dp.Program(in.program).Run(&opts)
		out.verdict = int32(verdict)
		return err
	})
	if err != nil {
		return out, fmt.Errorf("run %s: %w", in.program, err)
	}
	out.frame, out.mark, out.ifindex, out.action = opts.DataOut, after.Mark, after.CB[0], after.CB[1]
	return out, nil
}

// count sets what the counters grew by since the last look.
func (p *programs) count(t testing.TB, out *outcome) {
	counts, drops := p.readCounts(t), p.readDrops(t)
	out.counts, out.drops = map[uint32]uint64{}, map[bpf.DropKey]uint64{}
	for row, c := range counts {
		if n := c.Packets - p.counts[row].Packets; n > 0 {
			out.counts[row] = n
		}
	}
	for key, c := range drops {
		if n := c.Packets - p.drops[key].Packets; n > 0 {
			out.drops[key] = n
			reached[key] = true
		}
	}
	p.counts, p.drops = counts, drops
}

func total(perCPU []bpf.Count) (c bpf.Count) {
	for _, one := range perCPU {
		c.Packets += one.Packets
		c.Bytes += one.Bytes
	}
	return c
}

func (p *programs) readCounts(t testing.TB) map[uint32]bpf.Count {
	t.Helper()
	rows := map[uint32]bpf.Count{}
	for row := range uint32(bpf.Hooks * bpf.CountRows) {
		var perCPU []bpf.Count
		if err := p.dp.Map("lash_counts").Lookup(row, &perCPU); err != nil {
			t.Fatal(err)
		}
		if c := total(perCPU); c.Packets > 0 {
			rows[row] = c
		}
	}
	return rows
}

func (p *programs) readDrops(t testing.TB) map[bpf.DropKey]bpf.Count {
	t.Helper()
	rows := map[bpf.DropKey]bpf.Count{}
	var k bpf.DropKey
	var perCPU []bpf.Count
	it := p.dp.Map("lash_drops").Iterate()
	for it.Next(&k, &perCPU) {
		rows[k] = total(perCPU)
	}
	if err := it.Err(); err != nil {
		t.Fatal(err)
	}
	return rows
}

// conns is all of lash_conn.
func (p *programs) conns(t testing.TB) map[bpf.ConnKey]bpf.Conn {
	t.Helper()
	rows := map[bpf.ConnKey]bpf.Conn{}
	var k bpf.ConnKey
	var c bpf.Conn
	it := p.dp.Map("lash_conn").Iterate()
	for it.Next(&k, &c) {
		rows[k] = c
	}
	if err := it.Err(); err != nil {
		t.Fatal(err)
	}
	return rows
}

// change rewrites every record, as time or another agent would.
func (p *programs) change(t testing.TB, f func(*bpf.ConnKey, *bpf.Conn)) {
	t.Helper()
	for k, c := range p.conns(t) {
		f(&k, &c)
		if err := p.dp.Map("lash_conn").Put(&k, &c); err != nil {
			t.Fatal(err)
		}
	}
}

func same(a, b []byte) bool { return bytes.Equal(a, b) }

func be16(b []byte) uint16 { return binary.BigEndian.Uint16(b) }
