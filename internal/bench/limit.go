// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
)

// The kernel's limit: programs that know in advance where everything goes and
// do nothing but send it there. What Lash costs is what it adds to these.

// onlyIP lets everything but IPv4 and IPv6 pass on. It expects the context in R6.
func onlyIP() asm.Instructions {
	const protocolOffset = 16 // struct __sk_buff
	return asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.LoadMem(asm.R2, asm.R6, protocolOffset, asm.Word),
		asm.JEq.Imm(asm.R2, 0x0008, "ip"), // ETH_P_IP, network order
		asm.JEq.Imm(asm.R2, 0xdd86, "ip"), // ETH_P_IPV6
		asm.Mov.Imm(asm.R0, -1),           // TCX_NEXT
		asm.Return(),
	}
}

// intoPod redirects into the namespace behind the device.
func intoPod(ifindex int) asm.Instructions {
	return append(onlyIP(),
		asm.Mov.Imm(asm.R1, int32(ifindex)).WithSymbol("ip"),
		asm.Mov.Imm(asm.R2, 0),
		asm.FnRedirectPeer.Call(),
		asm.Return())
}

// outOf writes both hardware addresses and redirects out of the device.
func outOf(ifindex int, destination, source net.HardwareAddr) asm.Instructions {
	const dataOffset, dataEndOffset = 76, 80 // struct __sk_buff
	macs := append(append([]byte{}, destination...), source...)
	ins := append(onlyIP(),
		asm.LoadMem(asm.R2, asm.R6, dataOffset, asm.Word).WithSymbol("ip"),
		asm.LoadMem(asm.R3, asm.R6, dataEndOffset, asm.Word),
		asm.Mov.Reg(asm.R4, asm.R2),
		asm.Add.Imm(asm.R4, 14),
		asm.JGT.Reg(asm.R4, asm.R3, "redirect"))
	for i := 0; i < len(macs); i += 4 {
		ins = append(ins, asm.StoreImm(asm.R2, int16(i), int64(int32(binary.NativeEndian.Uint32(macs[i:]))), asm.Word))
	}
	return append(ins,
		asm.Mov.Imm(asm.R1, int32(ifindex)).WithSymbol("redirect"),
		asm.Mov.Imm(asm.R2, 0),
		asm.FnRedirect.Call(),
		asm.Return())
}

// intoTunnel has the device encapsulate to a node.
func intoTunnel(ifindex int, node netip.Addr) asm.Instructions {
	const zeroChecksum = 1 << 1 // BPF_F_ZERO_CSUM_TX
	to := node.As4()
	words := []uint32{1000, binary.BigEndian.Uint32(to[:]), 0, 0, 0, 64 << 8, 0} // struct bpf_tunnel_key to its tunnel_label
	ins := append(onlyIP(), asm.Mov.Reg(asm.R2, asm.R10).WithSymbol("ip"))
	for i, w := range words {
		ins = append(ins, asm.StoreImm(asm.R10, int16(4*(i-len(words))), int64(w), asm.Word))
	}
	return append(ins,
		asm.Add.Imm(asm.R2, int32(-4*len(words))),
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.Mov.Imm(asm.R3, int32(4*len(words))),
		asm.Mov.Imm(asm.R4, zeroChecksum),
		asm.FnSkbSetTunnelKey.Call(),
		asm.Mov.Imm(asm.R1, int32(ifindex)),
		asm.Mov.Imm(asm.R2, 0),
		asm.FnRedirect.Call(),
		asm.Return())
}

// attachIngress loads the instructions and attaches them to a device of ns.
func attachIngress(t *Topology, ns *Netns, ifindex int, name string, ins asm.Instructions) error {
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: name, Type: ebpf.SchedCLS, Instructions: ins, License: "Dual BSD/GPL"})
	if err != nil {
		return fmt.Errorf("load %s: %w", name, err)
	}
	t.Defer(func() { p.Close() })
	return ns.Do(func() error {
		l, err := link.AttachTCX(link.TCXOptions{Interface: ifindex, Program: p, Attach: ebpf.AttachTCXIngress})
		if err != nil {
			return fmt.Errorf("attach %s to device %d of %s: %w (tcx needs kernel 6.6)", name, ifindex, ns.Name, err)
		}
		t.Defer(func() { l.Close() })
		return nil
	})
}

// limitSame is redirect_peer both ways between two pods of a node.
func limitSame(t *Topology) (Pair, error) {
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
	from, to := a.host.Attrs().Index, b.host.Attrs().Index
	return Pair{Client: a.Netns, Server: b.Netns, Server4: b.addr4, Server6: b.addr6}, errors.Join(
		attachIngress(t, n.Netns, from, "limit_peer", intoPod(to)),
		attachIngress(t, n.Netns, to, "limit_peer", intoPod(from)))
}

// limitAcross is fixed hardware addresses out, redirect_peer in.
func limitAcross(t *Topology) (Pair, error) {
	n, m, a, b, err := podsAcross(t)
	if err != nil {
		return Pair{}, err
	}
	pair := Pair{Client: a.Netns, Server: b.Netns, Server4: b.addr4, Server6: b.addr6}
	for _, way := range []struct {
		from, to *Node
		pod      *pod
	}{{n, m, a}, {m, n, b}} {
		eth0, err := way.from.Link("eth0")
		if err != nil {
			return pair, err
		}
		far, err := way.to.Link("eth0")
		if err != nil {
			return pair, err
		}
		out := outOf(eth0.Attrs().Index, far.Attrs().HardwareAddr, eth0.Attrs().HardwareAddr)
		if err := errors.Join(
			attachIngress(t, way.from.Netns, way.pod.host.Attrs().Index, "limit_out", out),
			attachIngress(t, way.from.Netns, eth0.Attrs().Index, "limit_in", intoPod(way.pod.host.Attrs().Index))); err != nil {
			return pair, err
		}
	}
	return pair, nil
}

// limitVXLAN is a fixed node to encapsulate to, redirect_peer in.
func limitVXLAN(t *Topology) (Pair, error) {
	n, m, err := t.Nodes()
	if err != nil {
		return Pair{}, err
	}
	var pods []*pod
	for _, way := range []struct{ from, to *Node }{{n, m}, {m, n}} {
		p, err := t.wirePod(way.from)
		if err != nil {
			return Pair{}, err
		}
		pods = append(pods, p)
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MTU = "vxlan", 1500
		if err := way.from.nl.LinkAdd(&netlink.Vxlan{LinkAttrs: attrs, FlowBased: true, Port: tunnelPort, UDPCSum: true}); err != nil {
			return Pair{}, fmt.Errorf("vxlan in %s: %w", way.from.Name, err)
		}
		device, err := way.from.Link(attrs.Name)
		if err != nil {
			return Pair{}, err
		}
		index := device.Attrs().Index
		if err := errors.Join(
			way.from.SetUp(attrs.Name),
			p.nl.LinkSetMTU(p.eth0, tunnelMTU),
			attachIngress(t, way.from.Netns, p.host.Attrs().Index, "limit_encap", intoTunnel(index, way.to.Addr4)),
			attachIngress(t, way.from.Netns, index, "limit_decap", intoPod(p.host.Attrs().Index))); err != nil {
			return Pair{}, err
		}
	}
	return Pair{Client: pods[0].Netns, Server: pods[1].Netns, Server4: pods[1].addr4, Server6: pods[1].addr6}, nil
}
