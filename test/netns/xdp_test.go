// SPDX-License-Identifier: Apache-2.0

package netns

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lash-net/lash/bpf"
	"github.com/lash-net/lash/internal/datapath"
	"github.com/lash-net/lash/internal/datapath/netdev"
	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/testutil"
)

// forXDP makes the nodes' cables such that XDP can send on them.
func (c *cluster) forXDP(t *testing.T) {
	t.Helper()
	if _, err := netlink.GenlFamilyGet("netdev"); err != nil {
		t.Skipf("this kernel does not tell whether the peer of a veth device takes frames (6.3): %v", err)
	}
	for _, nd := range c.nodes {
		wire(t, c.sw, fmt.Sprintf("n%d", nd.n))
		summed(t, nd.ns)
	}
	summed(t, c.outside)
}

// passing is a program of somebody else's, which does nothing.
func passing(t *testing.T) *ebpf.Program {
	t.Helper()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "of_others", Type: ebpf.XDP, License: "GPL", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 2), asm.Return()}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

// wire makes the far end of a veth device one that takes frames, as a veth device with a program does, and that merges
// none: what is merged has no checksum, and a cable merges nothing.
func wire(t *testing.T, ns *os.File, device string) {
	t.Helper()
	pass := passing(t)
	if err := inNS(ns, func() error {
		dev, err := net.InterfaceByName(device)
		if err != nil {
			return err
		}
		l, err := link.AttachXDP(link.XDPOptions{Program: pass, Interface: dev.Index, Flags: link.XDPDriverMode})
		if err == nil {
			t.Cleanup(func() { l.Close() })
		}
		return err
	}); err != nil {
		t.Fatalf("%s: %v", device, err)
	}
	ethtool(t, ns, device, unix.ETHTOOL_SGRO, 0)
}

// summed makes senders by eth0 write their checksums, as a wire needs it: a frame has no note that one is missing.
func summed(t *testing.T, ns *os.File) {
	t.Helper()
	ethtool(t, ns, "eth0", unix.ETHTOOL_STXCSUM, 0)
}

func ethtool(t *testing.T, ns *os.File, device string, command, value uint32) {
	t.Helper()
	if err := inNS(ns, func() error { _, err := netdev.Ethtool(device, command, value); return err }); err != nil {
		t.Fatalf("%s: %v", device, err)
	}
}

func TestServicesXDP(t *testing.T) { testServices(t, options{podsPerNode: 2, xdp: true}) }
func TestServicesXDPSpread(t *testing.T) {
	testServices(t, options{podsPerNode: 2, xdp: true, spread: true})
}
func TestServicesXDPDSR(t *testing.T) { testServices(t, options{podsPerNode: 2, xdp: true, dsr: true}) }
func TestServicesXDPLegacyHostRouting(t *testing.T) {
	testServices(t, options{podsPerNode: 2, xdp: true, legacy: true})
}
func TestServicesXDPVXLAN(t *testing.T) {
	testServices(t, options{podsPerNode: 2, xdp: true, tunnel: "vxlan"})
}

// counted is how many packets a hook of the node has forwarded, for whatever reason, in all and by CPU.
func (nd *node) counted(t *testing.T, hook uint32) (all uint64, byCPU []uint64) {
	t.Helper()
	byCPU = make([]uint64, ebpf.MustPossibleCPU())
	for why := range uint32(bpf.CountRows) {
		var rows []bpf.Count
		if err := nd.dp.Map("lash_counts").Lookup(hook*bpf.CountRows+why, &rows); err != nil {
			t.Fatal(err)
		}
		for cpu, c := range rows {
			byCPU[cpu] += c.Packets
			all += c.Packets
		}
	}
	return all, byCPU
}

// ask sends datagrams of one connection and wants each answered.
func ask(from *os.File, to netip.AddrPort, n int) error {
	return inNS(from, func() error {
		c, err := net.DialTimeout("udp", to.String(), time.Second)
		if err != nil {
			return err
		}
		defer c.Close()
		buf := make([]byte, 100)
		for i := range n {
			c.SetDeadline(time.Now().Add(3 * time.Second))
			if _, err := c.Write(fmt.Appendf(nil, "%d", i)); err != nil {
				return err
			}
			if k, err := c.Read(buf); err != nil || string(buf[:k]) != fmt.Sprint(i) {
				return fmt.Errorf("datagram %d: %q, %v", i, buf[:k], err)
			}
		}
		return nil
	})
}

// What a client outside and a backend elsewhere send each other by way of a node, XDP forwards, not tc; also while there is
// no agent, and after the next one has replaced the program.
func TestXDPForwardsWithoutTheAgent(t *testing.T) {
	o := options{podsPerNode: 1, xdp: true}
	c := newCluster(t, o)
	n := c.nodes[0]
	backends := map[bool]netip.Addr{false: c.nodes[1].pods[0].ip4, true: c.nodes[1].pods[0].ip6}
	for _, b := range backends {
		serve(t, c.nodes[1].pods[0].ns, b)
		c.balance(t, bpf.FrontendOutside, b)
	}
	const datagrams = 500
	forwards := func(what string) {
		t.Helper()
		for v6 := range backends {
			node := n.ip4
			if v6 {
				node = n.ip6
			}
			xdp, _ := n.counted(t, bpf.HookXDP)
			tc, _ := n.counted(t, bpf.HookNetdev)
			if err := ask(c.outside, netip.AddrPortFrom(node, nodePort), datagrams); err != nil {
				n.dump(t)
				c.nodes[1].dump(t)
				t.Fatalf("%s: %v", what, err)
			}
			xdpAfter, _ := n.counted(t, bpf.HookXDP)
			tcAfter, _ := n.counted(t, bpf.HookNetdev)
			// tc has the first of each direction, and one each second.
			if xdp, tc := xdpAfter-xdp, tcAfter-tc; xdp+tc < 2*datagrams || tc > datagrams/5 {
				t.Errorf("%s, to %s: of %d packets XDP forwarded %d and tc %d", what, node, 2*datagrams, xdp, tc)
			}
		}
	}
	forwards("with an agent")
	id := func() (id link.ID, prog ebpf.ProgramID) {
		n.do(t, "link", func() error {
			l, err := link.LoadPinnedLink("/sys/fs/bpf/lash/links/eth0-xdp_entry", nil)
			if err != nil {
				return err
			}
			defer l.Close()
			info, err := l.Info()
			if err == nil {
				id, prog = info.ID, info.Program
			}
			return err
		})
		return id, prog
	}
	linkBefore, progBefore := id()
	kept := map[string]*ebpf.Map{} // only to look at
	for _, name := range []string{"lash_counts"} {
		m, err := n.dp.Map(name).Clone()
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close()
		kept[name] = m
	}
	n.do(t, "end of the agent", n.dp.Close)
	xdp := func() (sum uint64) {
		var rows []bpf.Count
		if err := kept["lash_counts"].Lookup(uint32(bpf.HookXDP*bpf.CountRows), &rows); err != nil {
			t.Fatal(err)
		}
		for _, c := range rows {
			sum += c.Packets
		}
		return sum
	}
	was := xdp()
	if err := ask(c.outside, netip.AddrPortFrom(n.ip4, nodePort), datagrams); err != nil {
		t.Fatalf("without an agent: %v", err)
	}
	if now := xdp(); now-was < 2*datagrams*4/5 {
		t.Errorf("without an agent XDP forwarded %d of %d", now-was, 2*datagrams)
	}
	for _, next := range []string{"the next agent", "an agent with another configuration"} {
		o.dropNoBackend = next != "the next agent"
		n.do(t, next, func() error { return n.open(c, o) })
		// open writes the rows of addresses as they are without NodePorts.
		for _, b := range backends {
			c.balance(t, bpf.FrontendOutside, b)
		}
		if linkAfter, progAfter := id(); linkAfter != linkBefore || (progAfter != progBefore) != o.dropNoBackend {
			t.Errorf("%s: link %d with program %d became link %d with program %d: want the same link, with another program where that is another", next, linkBefore, progBefore, linkAfter, progAfter)
		}
		forwards(next)
		if !o.dropNoBackend {
			n.do(t, "end of the next agent", n.dp.Close)
		}
	}
	o.xdp = false
	n.do(t, "end of that agent", n.dp.Close)
	n.do(t, "an agent without XDP", func() error { return n.open(c, o) })
	if out := testutil.In(t, n.ns, "ip", "link", "show", "eth0"); strings.Contains(out, "xdp") {
		t.Errorf("XDP was switched off, and the program is still there: %s", out)
	}
}

// A connection whose way leads out of another device goes there by XDP if that device takes frames.
func TestXDPRedirectsToAnotherDevice(t *testing.T) {
	c := newCluster(t, options{podsPerNode: 1, xdp: true})
	n := c.nodes[0]
	server := testutil.Netns(t)
	ip(t, server, "link set lo up")
	ip(t, n.ns, "link add eth1 type veth peer name eth0 netns "+testutil.NetnsPath(server), "addr add 172.19.0.1/24 dev eth1", "addr add fd19::1/64 dev eth1 nodad", "link set eth1 up")
	ip(t, server, "addr add 172.19.0.2/24 dev eth0", "addr add fd19::2/64 dev eth0 nodad", "link set eth0 up")
	summed(t, server)
	attach := func() error {
		ifindex, mac, err := linkOf("eth1")
		if err != nil {
			return err
		}
		if err := n.dp.Devices().Put(t.Context(), ifindex, model.Device{Ifindex: ifindex, MAC: mac, MTU: 1500, IPv4: addr("172.19.0.1"), IPv6: addr("fd19::1")}); err != nil {
			return err
		}
		return errors.Join(n.dp.AttachDevice(ifindex, "eth1"), n.dp.AttachXDP(ifindex, "eth1"))
	}
	var refused error
	n.do(t, "eth1", func() error { refused = attach(); return nil })
	if refused == nil || !strings.Contains(refused.Error(), "takes no frames") {
		t.Errorf("a device whose peer takes no frames: %v", refused)
	}
	wire(t, server, "eth0")
	n.do(t, "eth1 again", attach)
	for _, x := range []struct{ node, backend netip.Addr }{{n.ip4, addr("172.19.0.2")}, {n.ip6, addr("fd19::2")}} {
		serve(t, server, x.backend)
		n.do(t, "service", func() error { return n.balance(bpf.FrontendOutside, x.node.Is6(), []netip.Addr{x.backend}) })
		before, _ := n.counted(t, bpf.HookXDP)
		if err := ask(c.outside, netip.AddrPortFrom(x.node, nodePort), 200); err != nil {
			t.Fatal(err)
		}
		if after, _ := n.counted(t, bpf.HookXDP); after-before < 400*4/5 {
			t.Errorf("to %s: XDP forwarded %d of 400 packets", x.backend, after-before)
			n.dump(t)
		}
	}
}

// A device that cannot says why, and what is somebody else's stays.
func TestXDPFallsBackWithItsReason(t *testing.T) {
	c := newCluster(t, options{podsPerNode: 1, xdp: true})
	n := c.nodes[0]
	ip(t, n.ns, "link add br1 type bridge", "link set br1 up", "link add va type veth peer name vb", "link set va up", "link set vb up")
	wire(t, n.ns, "vb")
	pass := passing(t)
	n.do(t, "another's program", func() error {
		dev, _, err := linkOf("va")
		if err != nil {
			return err
		}
		l, err := link.AttachXDP(link.XDPOptions{Program: pass, Interface: dev, Flags: link.XDPDriverMode})
		if err == nil {
			t.Cleanup(func() { l.Close() })
		}
		return err
	})
	for name, want := range map[string]string{"br1": "(bridge) has no native XDP", "va": "the XDP program of_others"} {
		n.do(t, name, func() error {
			dev, _, err := linkOf(name)
			if err != nil {
				return err
			}
			if err := n.dp.AttachXDP(dev, name); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v, want %q", name, err, want)
			}
			return nil
		})
	}
	if out := testutil.In(t, n.ns, "ip", "-d", "link", "show", "va"); !strings.Contains(out, "of_others") {
		t.Errorf("the program of others is gone: %s", out)
	}
	// A device that hides which network a frame is of, until it does not.
	if out, err := try(n.ns, "ip", "link", "add", "link", "eth0", "name", "eth0.5", "type", "vlan", "id", "5"); err != nil {
		t.Skipf("this kernel has no VLAN devices: %s", out)
	}
	eth0 := func() error {
		dev, _, err := linkOf("eth0")
		if err != nil {
			return err
		}
		return n.dp.AttachXDP(dev, "eth0")
	}
	n.do(t, "eth0 with a VLAN device", func() error {
		if err := eth0(); err == nil || !strings.Contains(err.Error(), "ethtool -K eth0 rxvlan off") {
			t.Errorf("a device that strips tags: %v", err)
		}
		return nil
	})
	if out := testutil.In(t, n.ns, "ip", "link", "show", "eth0"); strings.Contains(out, "xdp") {
		t.Errorf("the program is still on a device that hides tags: %s", out)
	}
	testutil.In(t, n.ns, "ip", "link", "del", "eth0.5")
	n.do(t, "eth0 again", eth0)
}

// What XDP passes to the kernel goes to the CPU of its connection, wherever it arrived.
func TestXDPSpreadsPacketsOverCPUs(t *testing.T) {
	if ebpf.MustPossibleCPU() < 2 {
		t.Skip("one CPU")
	}
	c := newCluster(t, options{podsPerNode: 1, xdp: true, spread: true})
	n := c.nodes[0]
	p := n.pods[0]
	ip(t, c.outside, fmt.Sprintf("route add %s via %s", n.cidr4(), n.ip4))
	to := serve(t, p.ns, p.ip4)
	_, before := n.counted(t, bpf.HookNetdev)
	done := make(chan error)
	go func() {
		done <- inNS(c.outside, func() error {
			var one unix.CPUSet
			one.Set(0)
			if err := unix.SchedSetaffinity(0, &one); err != nil {
				return err
			}
			for range 64 {
				u, err := net.Dial("udp", to.String())
				if err != nil {
					return err
				}
				_, err = u.Write([]byte("x"))
				u.Close()
				if err != nil {
					return err
				}
			}
			return nil
		})
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if err := ask(c.outside, to, 10); err != nil { // by now they have arrived
		t.Fatal(err)
	}
	_, after := n.counted(t, bpf.HookNetdev)
	used := 0
	for cpu := range after {
		if after[cpu] > before[cpu] {
			used++
		}
	}
	if used < 2 {
		t.Errorf("64 connections were handled by %d CPUs: %v, before %v", used, after, before)
	}
}

// What the prefilter has is dropped in both families, counted, and dropped while there is no agent; the next agent knows it.
func TestXDPPrefilterOutlivesTheAgent(t *testing.T) {
	o := options{podsPerNode: 1, xdp: true}
	c := newCluster(t, o)
	n := c.nodes[0]
	pings := func(want bool) {
		t.Helper()
		for _, a := range []netip.Addr{n.ip4, n.ip6} {
			if out, err := try(c.outside, "ping", "-n", "-c", "1", "-W", "1", a.String()); (err == nil) != want {
				t.Errorf("ping of %s: %v, want it to be answered: %v\n%s", a, err, want, out)
			}
		}
	}
	filter := []netip.Prefix{netip.MustParsePrefix("172.18.0.128/25"), netip.MustParsePrefix("fd18::200/120")}
	pings(true)
	if err := n.dp.ChangePrefilter(filter, nil); err != nil {
		t.Fatal(err)
	}
	pings(false)
	var dropped uint64
	var k bpf.DropKey
	var perCPU []bpf.Count
	for it := n.dp.Map("lash_drops").Iterate(); it.Next(&k, &perCPU); {
		if k.Reason == bpf.DropDenylist && k.Dir == bpf.HookXDP {
			for _, c := range perCPU {
				dropped += c.Packets
			}
		}
	}
	if dropped < 2 {
		t.Errorf("%d drops are counted, want both families'", dropped)
	}
	for source, want := range map[string]int32{"172.18.0.200": datapath.VerdictDrop, "172.18.0.100": datapath.VerdictOK} {
		n.do(t, "dry run", func() error {
			run, err := n.dp.DryRun(false)
			if err != nil {
				return err
			}
			defer run.Close()
			eth0, mac, err := linkOf("eth0")
			if err != nil {
				return err
			}
			out, err := run.Run(datapath.DryPacket{Program: "xdp_entry", Ifindex: eth0, Frame: datagram(&pod{nodeMAC: mac}, netip.MustParseAddr(source), n.ip4),
				Src: netip.AddrPortFrom(netip.MustParseAddr(source), 0), Dst: netip.AddrPortFrom(n.ip4, 0), Proto: unix.IPPROTO_UDP})
			if err == nil && (out.Verdict != want || (len(out.Events) > 0) != (want == datapath.VerdictDrop)) {
				t.Errorf("a packet from %s, tried: verdict %d with %d events, want %d", source, out.Verdict, len(out.Events), want)
			}
			return err
		})
	}
	n.do(t, "end of the agent", n.dp.Close)
	pings(false)
	n.do(t, "the next agent", func() error { return n.open(c, o) })
	pings(false)
	if now, err := n.dp.Prefilter(); err != nil || !slices.Equal(now, filter) {
		t.Errorf("the next agent finds %v, %v", now, err)
	}
	if err := n.dp.ChangePrefilter(nil, filter); err != nil {
		t.Fatal(err)
	}
	pings(true)
	if err := n.dp.ChangePrefilter(nil, filter[:1]); err == nil || !strings.Contains(err.Error(), "is not in the prefilter") {
		t.Errorf("removed twice: %v", err)
	}
}
