// SPDX-License-Identifier: Apache-2.0

package netns

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"golang.org/x/sys/unix"
)

// Flows of a storm: datagrams from 32768 source ports to stormPorts ports of the other side, a share of them for each CPU.
const (
	stormSources = 1 << 15
	stormPorts   = 8
	stormFirst   = 7000
)

// generator makes packets on a pod's device as fast as the kernel takes them: each is a copy of a datagram with a port
// pair of its own, handed to the device's ingress as if the pod had sent it. No socket and no pod's stack is in between.
type generator struct {
	frame   []byte
	program *ebpf.Program
	device  int
	ns      *os.File
	cpus    int
}

// newGenerator makes the device take copies of the frame. How it is reached otherwise stays as it is.
func newGenerator(t *testing.T, nd *node, p *pod, frame []byte) *generator {
	t.Helper()
	g := &generator{frame: frame, device: p.ifindex, ns: nd.ns, cpus: min(runtime.NumCPU(), 2)}
	counters, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.PerCPUArray, KeySize: 4, ValueSize: 8, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { counters.Close() })
	starts := make([]uint64, ebpf.MustPossibleCPU())
	for i := range starts {
		starts[i] = uint64(i) * stormSources * stormPorts / uint64(g.cpus)
	}
	if err := counters.Put(uint32(0), starts); err != nil {
		t.Fatal(err)
	}
	const sport, dport, end = 14 + 20, 14 + 20 + 2, 14 + 20 + 8
	// The kernel uses the memory of packets again as they have left it: MAC addresses and IP header are written anew.
	var anew asm.Instructions
	for i := 0; i < sport; i += 2 {
		anew = append(anew, asm.StoreImm(asm.R6, int16(i), int64(binary.NativeEndian.Uint16(frame[i:])), asm.Half))
	}
	g.program, err = ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.XDP, License: "GPL", Instructions: slices.Concat(asm.Instructions{
		asm.LoadMem(asm.R6, asm.R1, 0, asm.Word), // data
		asm.LoadMem(asm.R7, asm.R1, 4, asm.Word), // data_end
		asm.StoreImm(asm.RFP, -4, 0, asm.Word),
		asm.LoadMapPtr(asm.R1, counters.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, -4),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "out"),
		asm.LoadMem(asm.R8, asm.R0, 0, asm.DWord),
		asm.Mov.Reg(asm.R1, asm.R8), asm.Add.Imm(asm.R1, 1),
		asm.StoreMem(asm.R0, 0, asm.R1, asm.DWord),
		asm.Mov.Reg(asm.R1, asm.R6), asm.Add.Imm(asm.R1, end),
		asm.JGT.Reg(asm.R1, asm.R7, "out"),
	}, anew, asm.Instructions{
		asm.Mov.Reg(asm.R1, asm.R8), asm.And.Imm(asm.R1, stormSources-1), asm.Or.Imm(asm.R1, stormSources),
		asm.HostTo(asm.BE, asm.R1, asm.Half),
		asm.StoreMem(asm.R6, sport, asm.R1, asm.Half),
		asm.Mov.Reg(asm.R1, asm.R8), asm.RSh.Imm(asm.R1, 15), asm.And.Imm(asm.R1, stormPorts-1), asm.Add.Imm(asm.R1, stormFirst),
		asm.HostTo(asm.BE, asm.R1, asm.Half),
		asm.StoreMem(asm.R6, dport, asm.R1, asm.Half),
		asm.Mov.Imm(asm.R0, 2).WithSymbol("out"), asm.Return(), // XDP_PASS
	})})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.program.Close() })
	// A veth device has the receive queue that such packets come from only while it has a program of its own.
	pass, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.XDP, License: "GPL", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 2), asm.Return()}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { pass.Close() })
	nd.do(t, "queue", func() error {
		l, err := link.AttachXDP(link.XDPOptions{Program: pass, Interface: p.ifindex, Flags: link.XDPDriverMode})
		if err == nil {
			t.Cleanup(func() { l.Close() })
		}
		return err
	})
	return g
}

// Packets come at the pace of a network, which asks no scheduler: before whoever reads events, or shares the machine. The
// connection beside the storm goes before it, so that there is one.
const (
	stormPriority = 1
	pingPriority  = 2
)

// send makes n packets of new flows, on all CPUs at once, and returns how long it took.
func (g *generator) send(t *testing.T, n int) time.Duration {
	t.Helper()
	const liveFrames = 1 << 1 // BPF_F_TEST_XDP_LIVE_FRAMES
	type xdpMD struct{ Data, DataEnd, DataMeta, IngressIfindex, RxQueueIndex, EgressIfindex uint32 }
	var wg sync.WaitGroup
	errs := make([]error, g.cpus)
	start := time.Now()
	for cpu := range g.cpus {
		wg.Go(func() {
			errs[cpu] = inNS(g.ns, func() error {
				var set unix.CPUSet
				set.Set(cpu)
				attr := unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_FIFO, Priority: stormPriority}
				if err := errors.Join(unix.SchedSetaffinity(0, &set), unix.SchedSetAttr(0, &attr, 0)); err != nil {
					return err
				}
				_, err := g.program.Run(&ebpf.RunOptions{
					Data: g.frame, Repeat: uint32(n / g.cpus), Flags: liveFrames, BatchSize: 64,
					Context: xdpMD{DataEnd: uint32(len(g.frame)), IngressIfindex: uint32(g.device)},
				})
				return err
			})
		})
	}
	wg.Wait()
	took := time.Since(start)
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	return took
}

// datagram is a frame as the pod sends it.
func datagram(p *pod, src, dst netip.Addr) []byte {
	buf, ip := gopacket.NewSerializeBuffer(), &layers.IPv4{Version: 4, TTL: 64, Protocol: layers.IPProtocolUDP, SrcIP: src.AsSlice(), DstIP: dst.AsSlice()}
	udp := &layers.UDP{}
	udp.SetNetworkLayerForChecksum(ip)
	err := gopacket.SerializeLayers(buf, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true},
		&layers.Ethernet{SrcMAC: p.mac[:], DstMAC: p.nodeMAC[:], EthernetType: layers.EthernetTypeIPv4},
		ip, udp, gopacket.Payload(make([]byte, 32)))
	if err != nil {
		panic(err)
	}
	frame := buf.Bytes()
	binary.BigEndian.PutUint16(frame[14+20+6:], 0) // whose ports change has no checksum
	return frame
}

// sink takes datagrams on the ports of a storm and answers nothing, not even that a port is closed.
func sink(t *testing.T, ns *os.File, a netip.Addr) {
	t.Helper()
	err := inNS(ns, func() error {
		for port := range stormPorts {
			c, err := net.ListenPacket("udp", netip.AddrPortFrom(a, uint16(stormFirst+port)).String())
			if err != nil {
				return err
			}
			t.Cleanup(func() { c.Close() })
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// pinging pings from one pod to another, which is a connection beside the storm. What it returns waits for the end and
// tells what was lost.
func pinging(t *testing.T, from *pod, to netip.Addr) (end func() string) {
	t.Helper()
	lines := make(chan string, 1)
	go func() {
		out, err := try(from.ns, "chrt", "-f", strconv.Itoa(pingPriority), "ping", "-n", "-q", "-c", strconv.Itoa(stormPings), "-i", "0.01", "-W", "5", to.String())
		if err == nil && strings.Contains(out, fmt.Sprintf("%d received", stormPings)) {
			out = ""
		}
		lines <- out
	}()
	return func() string { return <-lines }
}

const (
	stormPings = 150
	pingEvents = 2 // the first packet of each direction
)

// received is how many datagrams and pings have reached what is above IP in a namespace.
func received(t *testing.T, ns *os.File) (n uint64) {
	t.Helper()
	out, err := try(ns, "cat", "/proc/net/snmp")
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	_, values, _ := strings.Cut(out, "\nIp: ") // the second line, after that of the names
	if n, err = strconv.ParseUint(strings.Fields(values)[8], 10, 64); err != nil {
		t.Fatal(err)
	}
	return n
}

// Every event is either seen or counted as lost, and what is lost are events, not packets: all of the storm's arrive, and
// all of a connection beside it. Each packet is the first of its flow, and told.
func TestEventStorm(t *testing.T) {
	const calm, most = 10_000, 200_000
	for _, tc := range []struct {
		name string
		to   string // "other node", "same node", or "nowhere": dropped at once
		late bool
	}{
		{"to another node", "other node", false},
		{"to another node, reader late", "other node", true},
		{"to a pod beside", "same node", false},
		{"dropped at the hook", "nowhere", false},
		{"dropped at the hook, reader late", "nowhere", true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := newCluster(t, options{podsPerNode: 3, connMax: 2 * (calm + most)})
			near, far := c.nodes[0], c.nodes[1]
			a, b, src := near.pods[0], far.pods[0], near.pods[0].ip4
			switch tc.to {
			case "same node":
				b = near.pods[1]
			case "nowhere":
				src = netip.MustParseAddr("192.0.2.1") // the pod's is another
			}
			sink(t, b.ns, b.ip4)
			for _, p := range []*pod{a, near.pods[2]} { // neighbours
				if out, err := try(p.ns, "ping", "-n", "-c", "1", "-W", "2", b.ip4.String()); err != nil {
					t.Fatalf("%v\n%s", err, out)
				}
			}
			g := newGenerator(t, near, a, datagram(a, src, b.ip4))
			unheard := g.send(t, calm)
			storm := min(most, int(3*calm/unheard.Seconds())) &^ 1 // a slow machine is not kept for longer than some seconds

			let := make(chan struct{})
			if !tc.late {
				close(let)
			}
			m := everything
			m.Interval = 0 // a connection's later packets are not told
			l := near.listenHeld(t, m, let)
			arrived, drops := received(t, b.ns), dropped(t, near, "Invalid source ip")
			end := pinging(t, near.pods[2], far.pods[2].ip4)
			took := g.send(t, storm)
			if lost := end(); lost != "" {
				t.Errorf("a connection beside: %s", lost)
			}
			if tc.late {
				close(let)
			}
			l.settle(t)
			s := l.hub.Stats()
			rate := func(n int, d time.Duration) string { return fmt.Sprintf("%.0f", float64(n)/d.Seconds()) }
			t.Logf("%d packets of new flows, %s a second on %d CPUs (%s when nobody listens): %d events seen, %d lost", storm, rate(storm, took), g.cpus, rate(calm, unheard), s.Seen, s.Lost)
			if got := received(t, b.ns) - arrived; tc.to != "nowhere" && got != uint64(storm) {
				t.Errorf("%d packets sent, %d arrived", storm, got)
			}
			if got := dropped(t, near, "Invalid source ip") - drops; tc.to == "nowhere" && got != storm {
				t.Errorf("%d packets sent, %d dropped", storm, got)
			}
			if s.Seen+s.Lost != uint64(storm+pingEvents) || tc.late && s.Lost == 0 {
				t.Errorf("%d packets to tell about, %d seen and %d lost are %d", storm+pingEvents, s.Seen, s.Lost, s.Seen+s.Lost)
			}
			if uint64(len(l.got)) != s.Seen || l.lost != s.Lost || s.Missed != 0 {
				t.Errorf("the listener was told %d events and %d lost, the hub counts %+v", len(l.got), l.lost, s)
			}
		})
	}
}
