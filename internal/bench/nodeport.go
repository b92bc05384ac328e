// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/lash-net/lash/bpf"
	"github.com/lash-net/lash/internal/datapath/netdev"
)

const nodePort = 30080

// lashNodePort is a host outside and a process of one node, by a NodePort of another: what lies between this and node to
// node is the hop, which goes in and out by the same device, and the translation there.
func lashNodePort(m mode) func(*Topology) (Pair, error) {
	return func(t *Topology) (Pair, error) {
		c, err := t.lash(m)
		if err != nil {
			return Pair{}, err
		}
		client, err := t.Node()
		if err != nil {
			return Pair{}, err
		}
		if m.xdp {
			if err := client.sum(); err != nil {
				return Pair{}, err
			}
		}
		pair := Pair{Client: client.Netns, Server: c.m.Netns, Server4: c.m.Addr4, Server6: c.m.Addr6}
		pair.Frontend = c.n.nodePort
		return pair, nil
	}
}

// nodePort leads clients of the node's NodePort to the server.
func (n *lashNode) nodePort(server netip.AddrPort) (netip.AddrPort, error) {
	node, any, id := n.Addr4, netip.IPv4Unspecified(), uint32(1)
	if server.Addr().Is6() {
		node, any, id = n.Addr6, netip.IPv6Unspecified(), 2
	}
	dp := n.datapath
	errs := []error{
		dp.Map("lash_endpoints").Put(bpf.AddrFrom(node), &bpf.Endpoint{Identity: bpf.IdentityHost, Flags: bpf.EndpointHost | bpf.EndpointNodePort}),
		dp.Map("lash_ports").Put(uint32(nodePort), uint8(bpf.PortFrontend|bpf.PortNode)),
		dp.Map("lash_backends").Put(&bpf.BackendKey{Service: id, Slot: 1}, &bpf.Backend{Addr: bpf.AddrFrom(server.Addr()), Port: bpf.ToBE16(server.Port())}),
	}
	for _, proto := range []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
		errs = append(errs, dp.Map("lash_services").Put(
			&bpf.ServiceKey{Addr: bpf.AddrFrom(any), Port: bpf.ToBE16(nodePort), Proto: proto}, &bpf.Service{ID: id, First: 1, Count: 1, Flags: bpf.FrontendOutside}))
	}
	return netip.AddrPortFrom(node, nodePort), errors.Join(errs...)
}

// wire makes a node's cable such that XDP can send on it: the switch's end takes frames, as a veth device with a program
// does, and merges none, and the node sends no packet whose checksum is still to be made.
func (t *Topology) wire(n *Node) error {
	pass, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "bench_pass", Type: ebpf.XDP, License: "Dual BSD/GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 2), asm.Return()}}) // XDP_PASS
	if err != nil {
		return fmt.Errorf("load bench_pass: %w", err)
	}
	t.Defer(func() { pass.Close() })
	port := fmt.Sprintf("port%d", n.Index)
	dev, err := t.sw.Link(port)
	if err != nil {
		return err
	}
	return errors.Join(n.sum(), t.sw.Do(func() error {
		l, err := link.AttachXDP(link.XDPOptions{Program: pass, Interface: dev.Attrs().Index, Flags: link.XDPDriverMode})
		if err != nil {
			return fmt.Errorf("attach bench_pass to %s: %w", port, err)
		}
		t.Defer(func() { l.Close() })
		_, err = netdev.Ethtool(port, unix.ETHTOOL_SGRO, 0)
		return err
	}))
}

// sum makes a node write the checksums of what it sends: a frame has no note that one is missing.
func (n *Node) sum() error {
	return n.Do(func() error { _, err := netdev.Ethtool("eth0", unix.ETHTOOL_STXCSUM, 0); return err })
}
