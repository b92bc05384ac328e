// SPDX-License-Identifier: Apache-2.0

package packet

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/lash-net/lash/bpf"
	"github.com/lash-net/lash/internal/datapath"
)

// What a packet costs a program: `go test ./test/packet -run '^$' -bench .` The figure, ns/packet, is the median of runs
// that the kernel timed itself, each with its clock and its entry into the program. A machine that is shared does not run
// at one speed: "times" is by how much a packet takes longer than a program that does next to nothing, run beside it.
// times/cold is the same where the caches were used for something else before, as in a stream, whose data passes through
// them between two packets: how much memory, code included, a packet touches. A path is compared with itself before a
// change, or with another path, of the same run; two builds are compared by running their test binaries in turns.

// costPath is a packet whose program is timed. A new connection's source port is another one each time.
type costPath struct {
	name    string
	config  string
	opened  func([]byte) input // where the connection's first packet passes; nil: the packet is it
	first   packet
	timed   func([]byte) input // where the timed packet passes
	reply   bool               // it is the answer to what the first became
	service *servicePort
	told    bool // with an event of it
}

func costPaths(f family) []costPath {
	segment := func(src, dst netip.Addr, dport uint16) packet {
		return packet{src: src, dst: dst, l4: "tcp", sport: 1, dport: dport, flags: "SA"}
	}
	pods, across := segment(f.a, f.b, 80), segment(f.a, f.far, 80)
	out := segment(f.a, f.outside, 80)
	service := &servicePort{id: 1, backends: []netip.AddrPort{at(f.b, portTarget)}, local: 1}
	remote := &servicePort{id: 1, backends: []netip.AddrPort{at(f.peer, portTarget)}, flags: bpf.FrontendOutside}
	client := segment(f.outside, f.node, portNode)
	return []costPath{
		{name: "pod to pod", opened: fromA, first: pods, timed: fromA},
		{name: "pod to pod, told", opened: fromA, first: pods, timed: fromA, told: true},
		{name: "pod to pod, answer", opened: fromA, first: pods, timed: fromB, reply: true},
		{name: "pod to node", opened: fromA, first: across, timed: fromA},
		{name: "pod to node, told", opened: fromA, first: across, timed: fromA, told: true},
		{name: "node to pod", opened: fromA, first: across, timed: netdev, reply: true},
		{name: "pod to tunnel", config: "tunnel", opened: fromA, first: across, timed: fromA},
		{name: "host to pod", opened: local, first: segment(f.node, f.b, 80), timed: local},
		{name: "pod to service", opened: fromA, first: segment(f.a, vip(f), portVIP), timed: fromA, service: service},
		{name: "pod to service, answer", opened: fromA, first: segment(f.a, vip(f), portVIP), timed: fromB, reply: true, service: service},
		{name: "host to service", opened: local, first: segment(f.node, vip(f), portVIP), timed: local, service: service},
		{name: "host to service, answer", opened: local, first: segment(f.node, vip(f), portVIP), timed: fromB, reply: true, service: service},
		{name: "masqueraded", opened: fromA, first: out, timed: fromA},
		{name: "masqueraded, answer", opened: fromA, first: out, timed: netdev, reply: true},
		{name: "NodePort", opened: netdev, first: client, timed: netdev, service: remote},
		{name: "NodePort, answer", opened: netdev, first: client, timed: netdev, reply: true, service: remote},
		{name: "node's own, in", config: "known node", opened: netdev, first: segment(f.peer, f.node, 4240), timed: netdev},
		{name: "node's own, out", config: "known node", opened: leaving, first: segment(f.node, f.peer, 4240), timed: leaving},
		{name: "encapsulated", config: "known node", opened: netdev, first: packet{src: f.peer, dst: f.node, l4: "udp", sport: 4242, dport: 8472}, timed: netdev},
		{name: "tunnel to pod", config: "known node", opened: fromA, first: across, timed: tunnelled, reply: true},
		{name: "new pod to pod", first: pods, timed: fromA},
		{name: "new pod to node", first: across, timed: fromA},
		{name: "new node to pod", first: segment(f.far, f.a, 80), timed: netdev},
		{name: "new pod to tunnel", config: "tunnel", first: across, timed: fromA},
		{name: "new pod to service", first: segment(f.a, vip(f), portVIP), timed: fromA, service: service},
		{name: "new masqueraded", first: out, timed: fromA},
		{name: "new NodePort", first: client, timed: netdev, service: remote},
	}
}

func BenchmarkPacket(b *testing.B) {
	n := theNode(b)
	for _, f := range families {
		for _, path := range costPaths(f) {
			b.Run(path.name+"/"+f.name, func(b *testing.B) {
				if path.config == "" {
					path.config = "bpf"
				}
				p := n.load(b, path.config)
				p.forget(b)
				p.unserve(b)
				if path.service != nil {
					path.service.put(b, p, f)
				}
				raw := frame(path.first)
				in := path.timed(raw)
				fresh := path.opened == nil
				if fresh {
					in.frame = syn(in.frame)
				} else {
					out, err := p.run(path.opened(syn(raw)))
					if err != nil {
						b.Fatal(err)
					}
					p.establish(b)
					if path.reply {
						raw = answer(out.frame)
					}
					in = path.timed(raw)
				}
				empty := func() {}
				if path.told {
					empty = p.tell(b)
				}
				var hot, cold cost
				l4 := read(in.frame).l4
				b.ResetTimer()
				for i := 0; b.Loop(); i++ {
					if fresh {
						if i%3000 == 2999 { // of 4096
							b.StopTimer()
							p.forget(b)
							b.StartTimer()
						}
						binary.BigEndian.PutUint16(in.frame[l4:], uint16(1024+i%60000))
					}
					if i%100 == 99 {
						b.StopTimer()
						empty()
						b.StartTimer()
					}
					c := &hot
					if i%8 == 7 {
						c = &cold
					}
					ns, err := p.timed(in, c == &cold)
					if err != nil {
						b.Fatal(err)
					}
					nothing, err := p.timed(input{program: "clock", frame: in.frame}, c == &cold)
					if err != nil {
						b.Fatal(err)
					}
					c.add(ns, nothing)
				}
				b.ReportMetric(hot.median(), "ns/packet")
				b.ReportMetric(hot.times(), "times")
				b.ReportMetric(cold.times(), "times/cold")
				b.ReportMetric(0, "ns/op") // the call's, which nobody asked for
			})
		}
	}
}

// cost is what runs of a packet took, each with one of a program beside it that does next to nothing.
type cost struct {
	took, nothing []uint32
}

func (c *cost) add(took, nothing uint32) {
	c.took, c.nothing = append(c.took, took), append(c.nothing, nothing)
}

func (c *cost) median() float64 {
	took := slices.Sorted(slices.Values(c.took))
	return float64(took[len(took)/2])
}

// times is the ratio of the two. What was interrupted is left out.
func (c *cost) times() float64 {
	if len(c.took) == 0 {
		return 0
	}
	most, took, nothing := 3*uint32(c.median()), 0.0, 0.0
	for i, ns := range c.took {
		if ns < most && c.nothing[i] < most {
			took, nothing = took+float64(ns), nothing+float64(c.nothing[i])
		}
	}
	return took / nothing
}

// tell has every packet told about until the benchmark ends, and returns what empties the ring.
func (p *programs) tell(b *testing.B) func() {
	ring, err := p.dp.OpenEvents()
	if err != nil {
		b.Fatal(err)
	}
	if err := p.dp.SetMonitoring(datapath.Monitoring{Traces: true, Aggregation: bpf.AggregateLow}); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := errors.Join(p.dp.SetMonitoring(datapath.Monitoring{}), ring.Close()); err != nil {
			b.Error(err)
		}
	})
	return func() {
		for ring.Unread() > 0 {
			if _, err := ring.Read(); err != nil {
				b.Fatal(err)
			}
		}
	}
}

// establish makes every connection one that was answered.
func (p *programs) establish(b *testing.B) {
	var keys []bpf.ConnKey
	var key bpf.ConnKey
	var c bpf.Conn
	for i := p.dp.Map("lash_conn").Iterate(); i.Next(&key, &c); {
		keys = append(keys, key)
	}
	for _, key := range keys {
		if err := p.dp.Map("lash_conn").Lookup(key, &c); err != nil {
			b.Fatal(err)
		}
		c.State |= bpf.StateReplied
		if err := p.dp.Map("lash_conn").Put(key, &c); err != nil {
			b.Fatal(err)
		}
	}
}

// syn is a frame as its connection's first.
func syn(frame []byte) []byte {
	out := slices.Clone(frame)
	if h := read(out); h.proto == protoTCP {
		out[h.l4+13] = 0x02
		mend(out)
	}
	return out
}

// wiper is more than the caches of one CPU hold.
var wiper [2 << 20]byte

// timed runs a packet once. How long that took, by the kernel. wipe: with other things in the caches.
func (p *programs) timed(in input, wipe bool) (ns uint32, err error) {
	ctx := skbuff{Ifindex: in.ifindex}
	attr := struct { // union bpf_attr of BPF_PROG_TEST_RUN
		fd, verdict, sizeIn, sizeOut uint32
		dataIn, dataOut              uint64
		repeat, duration             uint32
		contextIn, contextOut        uint32
		context, contextResult       uint64
		flags, cpu, batch, pad       uint32
	}{
		fd: uint32(p.dp.Program(in.program).FD()), repeat: 1, sizeIn: uint32(len(in.frame)), contextIn: uint32(unsafe.Sizeof(ctx)),
		dataIn: uint64(uintptr(unsafe.Pointer(&in.frame[0]))), context: uint64(uintptr(unsafe.Pointer(&ctx))),
	}
	err = p.do(func() error {
		for i := 0; wipe && i < len(wiper); i += 64 {
			wiper[i]++
		}
		if _, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_TEST_RUN, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr)); errno != 0 {
			return fmt.Errorf("run %s: %w", in.program, errno)
		}
		return nil
	})
	runtime.KeepAlive(in.frame)
	return attr.duration, err
}
