// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"

	"github.com/lash-net/lash/bpf"
)

// programsWrite says of each map whether programs write it. A dry run reads the live map where they do not, and has one of
// its own where they do: that is what makes it change nothing. lash_runtime is written by the clock program only; a dry
// run's own copy switches events on.
var programsWrite = map[string]bool{
	"lash_backends": false, "lash_devices": false, "lash_endpoints": false, "lash_ifaces": false, "lash_ipcache": false, "lash_services": false,
	"lash_maglev": false, "lash_members": false, "lash_ports": false, "lash_source_ranges": false, "lash_ipmasq": false,
	"lash_prefilter": false, "lash_xdp_cpus": false, "lash_xdp_devices": false,

	"lash_conn": true, "lash_counts": true, "lash_drops": true, "lash_events": true, "lash_events_lost": true, "lash_frags": true,
	"lash_nat": true, "lash_snat_full": true, "lash_snat_ports": true, "lash_runtime": true, "lash_scratch": true, "lash_sock_rev": true,
	"lash_affinity": true, "lash_sock_pin": true, "lash_local_netns": false, "lash_local_pairs": true, "lash_local_socks": true,
}

// hookOf is by which rows of lash_counts a program counts.
var hookOf = map[string]uint32{
	"from_container": bpf.HookPod, "from_netdev": bpf.HookNetdev, "to_netdev": bpf.HookNetdevOut, "from_host": bpf.HookHost, "from_overlay": bpf.HookOverlay, "xdp_entry": bpf.HookXDP,
}

// Rows of a dry run's own maps: one packet's, and what stands in the way of its source port when it is masqueraded.
const (
	dryRows   = 1 << 16
	dryEvents = 1 << 16 // bytes
)

// dryPrograms are this node's programs on devices once more. They are attached to nothing.
type dryPrograms struct {
	maps        map[string]*ebpf.Map // their own; the others are the live ones
	collections []*ebpf.Collection
	programs    map[string]*ebpf.Program
	constants   map[string][]byte // .rodata by program
	ring        *ringbuf.Reader
	proved      map[ebpf.ProgramID]ProgramFacts // attached programs that are the same
}

// dryObjects are those whose programs the kernel can test-run; it cannot run the sockets'.
var dryObjects = []string{"host", "netdev", "overlay", "pod", xdpObject}

func (d *Datapath) openDryRun() (_ *dryPrograms, err error) {
	constants, err := d.constants()
	if err != nil {
		return nil, err
	}
	p := &dryPrograms{maps: map[string]*ebpf.Map{}, programs: map[string]*ebpf.Program{}, constants: map[string][]byte{}, proved: map[ebpf.ProgramID]ProgramFacts{}}
	defer func() {
		if err != nil {
			p.close()
		}
	}()
	for _, object := range dryObjects {
		if object == xdpObject && d.xdp != nil {
			continue
		}
		coll, err := loadObject(object, constants, func(name string, spec *ebpf.MapSpec) (*ebpf.Map, error) {
			written, known := programsWrite[name]
			switch {
			case !known:
				return nil, fmt.Errorf("map %s is not listed as read or written by programs", name)
			case !written:
				return d.maps[name], nil
			case p.maps[name] != nil:
				return p.maps[name], nil
			}
			switch name {
			case "lash_conn", "lash_nat":
				spec.MaxEntries = min(spec.MaxEntries, dryRows)
			case "lash_frags":
				spec.MaxEntries = 64
			case "lash_events":
				spec.MaxEntries = dryEvents
			}
			m, err := newMap(name, spec)
			p.maps[name] = m
			return m, err
		})
		if err != nil {
			return nil, err
		}
		p.collections = append(p.collections, coll)
		for name, prog := range coll.Programs {
			p.programs[name] = prog
			if p.constants[name], err = coll.Maps[rodata].LookupBytes(uint32(0)); err != nil {
				return nil, fmt.Errorf("constants of object %s: %w", object, err)
			}
		}
	}
	p.ring, err = ringbuf.NewReader(p.maps["lash_events"])
	return p, err
}

func (p *dryPrograms) close() {
	if p.ring != nil {
		p.ring.Close()
	}
	for _, c := range p.collections {
		c.Close()
	}
	for _, m := range p.maps {
		m.Close()
	}
}

func (d *Datapath) closeDryRun() {
	d.dryMu.Lock()
	defer d.dryMu.Unlock()
	if d.dry != nil {
		d.dry.close()
		d.dry = nil
	}
}

// DryRun is one packet's way through this node's programs, as they would decide now. It sends nothing and changes no
// live map. Close ends it; another waits until then.
type DryRun struct {
	d     *Datapath
	p     *dryPrograms
	fresh bool
}

// DryRun begins one. The first loads the programs, which takes as long as the agent's start took to load them. fresh:
// what is remembered of the packet's connection is not looked at.
func (d *Datapath) DryRun(fresh bool) (_ *DryRun, err error) {
	d.dryMu.Lock()
	defer func() {
		if err != nil {
			d.dryMu.Unlock()
		}
	}()
	if d.dry == nil {
		if d.dry, err = d.openDryRun(); err != nil {
			return nil, fmt.Errorf("load the programs for a dry run: %w", err)
		}
	}
	r := &DryRun{d: d, p: d.dry, fresh: fresh}
	for _, name := range []string{"lash_conn", "lash_nat", "lash_frags"} {
		if err := empty(r.p.maps[name]); err != nil {
			return nil, fmt.Errorf("empty the dry run's %s: %w", name, err)
		}
	}
	return r, nil
}

// Close ends the dry run.
func (r *DryRun) Close() { r.d.dryMu.Unlock() }

func empty(m *ebpf.Map) error {
	for {
		k, err := m.NextKeyBytes(nil)
		if err != nil || k == nil {
			return err
		}
		if err := m.Delete(k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return err
		}
	}
}

// TunnelKey is what comes with a packet out of the tunnel.
type TunnelKey struct {
	Sender netip.Addr
	VNI    uint32
}

// DryPacket is a packet at a program.
type DryPacket struct {
	Program string
	Ifindex int // of the device it is at
	Frame   []byte
	Mark    uint32
	Tunnel  *TunnelKey // at from_overlay

	Src, Dst netip.AddrPort // as the programs see the frame's; of an echo, its identifier is the requester's port
	Proto    uint8
}

// DryOutcome is what a program made of it.
type DryOutcome struct {
	Verdict int32  // of tc: VerdictOK, VerdictDrop, VerdictRedirect, VerdictNext
	Action  uint8  // enum conn_action of a redirect
	Ifindex int    // where that leads
	Mark    uint32 // of the packet
	Frame   []byte // as rewritten
	Slow    []int  // enum slow_reason, as it counts the packet
	Events  [][]byte

	Known *bpf.Conn // the connection's record before; nil: there was none
	Conn  *bpf.Conn // and after
	Orig  bool      // the packet is its initiator's
	// NATOwner: the record was found by its masqueraded tuple.
	NATOwner *bpf.ConnKey
	Now      uint32 // ticks
	Hz       uint32
	Program  ProgramFacts
}

// Verdicts of tc programs.
const (
	VerdictNext     = -1
	VerdictOK       = 0
	VerdictDrop     = 2
	VerdictRedirect = 7
)

// xdpDrop is the action of an XDP program that drops.
const xdpDrop = 1

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

// Run tries the packet at the program that is attached to its device. Programs of one dry run remember what those before
// did. It must be called in the node's network namespace.
func (r *DryRun) Run(in DryPacket) (*DryOutcome, error) {
	out := &DryOutcome{}
	var err error
	if out.Program, err = r.d.attachedTwin(r.p, in.Program, in.Ifindex); err != nil {
		return nil, err
	}
	key, fromHi := bpf.ConnKeyOf(in.Src, in.Dst, in.Proto)
	if err := r.remember(key, out); err != nil {
		return nil, err
	}
	if err := r.prepare(in.Program); err != nil {
		return nil, err
	}
	prog, done, err := r.entry(in)
	if err != nil {
		return nil, err
	}
	defer done()
	if in.Program == xdpHooks[0].program {
		// Each packet is worth an event, so the program passes what it does not drop. Where it came from is nothing to it.
		opts := ebpf.RunOptions{Data: in.Frame, DataOut: make([]byte, len(in.Frame)+256)}
		action, err := prog.Run(&opts)
		if err != nil {
			return nil, fmt.Errorf("dry run of %s: %w", in.Program, err)
		}
		out.Frame = opts.DataOut
		if action == xdpDrop {
			out.Verdict = VerdictDrop
		}
		return out, r.collect(in.Program, key, fromHi, out)
	}
	var after skbuff
	opts := ebpf.RunOptions{Data: in.Frame, DataOut: make([]byte, len(in.Frame)+256), Context: skbuff{Ifindex: uint32(in.Ifindex), Mark: in.Mark}, ContextOut: &after}
	verdict, err := prog.Run(&opts)
	if err != nil {
		return nil, fmt.Errorf("dry run of %s: %w", in.Program, err)
	}
	out.Verdict, out.Action, out.Ifindex, out.Mark, out.Frame = int32(verdict), uint8(after.CB[1]), int(after.CB[0]), after.Mark, opts.DataOut
	return out, r.collect(in.Program, key, fromHi, out)
}

// remember copies what the live maps have of the packet's connection, unless an earlier program of the dry run has made
// up its mind about it.
func (r *DryRun) remember(key bpf.ConnKey, out *DryOutcome) error {
	for _, port := range []bpf.BE16{key.LoPort, key.HiPort} {
		if err := r.p.maps["lash_snat_ports"].Put(uint32(port.Host()), r.d.snat.when(port.Host())); err != nil {
			return err
		}
	}
	owner := key
	if raw, err := lookupRaw(r.p.maps["lash_nat"], &key); err != nil {
		return err
	} else if raw == nil {
		if raw, err = lookupRaw(r.d.maps["lash_nat"], &key); err != nil {
			return err
		}
		if raw != nil {
			if err := r.p.maps["lash_nat"].Put(&key, raw); err != nil {
				return err
			}
		}
	}
	if err := r.p.maps["lash_nat"].Lookup(&key, &owner); err == nil {
		out.NATOwner = &owner
	} else if !errors.Is(err, ebpf.ErrKeyNotExist) {
		return err
	}
	known, err := lookupRaw(r.p.maps["lash_conn"], &owner)
	if err != nil {
		return err
	}
	// Without the owner's record a masqueraded answer would find nobody, however fresh.
	if known == nil && (!r.fresh || out.NATOwner != nil) {
		if known, err = lookupRaw(r.d.maps["lash_conn"], &owner); err != nil {
			return err
		}
		if known != nil {
			if err := r.p.maps["lash_conn"].Put(&owner, known); err != nil {
				return err
			}
		}
	}
	if known != nil {
		c := bpf.ConnFrom(known)
		out.Known = &c
		if r.fresh && out.NATOwner == nil {
			out.Known = nil
		}
	}
	return r.rivals(key)
}

// rivals copies the masqueraded connections to either end of the packet's: a new one must find a source port beside them.
func (r *DryRun) rivals(key bpf.ConnKey) error {
	type end struct {
		a    bpf.Addr
		port bpf.BE16
	}
	lo, hi := end{key.Lo, key.LoPort}, end{key.Hi, key.HiPort}
	var k, owner bpf.ConnKey
	it := r.d.maps["lash_nat"].Iterate()
	for it.Next(&k, &owner) {
		a, b := end{k.Lo, k.LoPort}, end{k.Hi, k.HiPort}
		if k.Proto != key.Proto || a != lo && a != hi && b != lo && b != hi {
			continue
		}
		c, err := lookupRaw(r.d.maps["lash_conn"], &owner)
		if err != nil {
			return err
		}
		if owner == key && r.fresh {
			continue
		}
		// What programs of this dry run have made of them stays.
		for name, row := range map[string]struct {
			key   any
			value any
		}{"lash_nat": {&k, &owner}, "lash_conn": {&owner, c}} {
			if name == "lash_conn" && c == nil {
				continue
			}
			if err := r.p.maps[name].Update(row.key, row.value, ebpf.UpdateNoExist); err != nil && !errors.Is(err, ebpf.ErrKeyExist) {
				return fmt.Errorf("copy of %s: %w", name, err)
			}
		}
	}
	if err := it.Err(); err != nil && !errors.Is(err, ebpf.ErrIterationAborted) { // rows that come and go meanwhile are none of this packet's
		return fmt.Errorf("read lash_nat: %w", err)
	}
	return nil
}

func lookupRaw(m *ebpf.Map, key any) ([]byte, error) { return m.LookupBytes(key) }

// prepare makes the programs tell everything, empties their counters and reads the clock.
func (r *DryRun) prepare(program string) error {
	var rt bpf.Runtime
	if err := r.d.maps["lash_runtime"].Lookup(uint32(0), &rt); err != nil {
		return fmt.Errorf("read lash_runtime: %w", err)
	}
	rt.Events = bpf.EventsDrop | bpf.EventsTrace | bpf.EventsDebug | bpf.EventsVerdict
	rt.Report, rt.Aggregation, rt.Interval = bpf.ReportFirst|bpf.ReportEvery|bpf.ReportFlags, bpf.AggregateNone, 0
	if err := r.p.maps["lash_runtime"].Put(uint32(0), &rt); err != nil {
		return fmt.Errorf("dry run's lash_runtime: %w", err)
	}
	zero := make([]bpf.Count, ebpf.MustPossibleCPU())
	for row := range uint32(bpf.CountRows) {
		if err := r.p.maps["lash_counts"].Put(hookOf[program]*bpf.CountRows+row, zero); err != nil {
			return fmt.Errorf("dry run's lash_counts: %w", err)
		}
	}
	_, err := r.events()
	return err
}

// entry is what to run: the program, or what gives it a packet that came out of the tunnel.
func (r *DryRun) entry(in DryPacket) (*ebpf.Program, func(), error) {
	prog := r.p.programs[in.Program]
	if prog == nil {
		return nil, nil, fmt.Errorf("no program %s", in.Program)
	}
	if in.Tunnel == nil {
		return prog, func() {}, nil
	}
	return outOfTunnel(prog, *in.Tunnel)
}

func (r *DryRun) events() (all [][]byte, err error) {
	r.p.ring.SetDeadline(time.Now())
	for {
		rec, err := r.p.ring.Read()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return all, nil
		}
		if err != nil {
			return nil, fmt.Errorf("events of the dry run: %w", err)
		}
		head := int(unsafe.Sizeof(bpf.EventHead{}))
		if len(rec.RawSample) < head {
			continue
		}
		n := int(binary.NativeEndian.Uint16(rec.RawSample[unsafe.Offsetof(bpf.EventHead{}.Len):]))
		if head+n <= len(rec.RawSample) {
			all = append(all, rec.RawSample[head:head+n])
		}
	}
}

// collect reads what the programs left in their own maps.
func (r *DryRun) collect(program string, key bpf.ConnKey, fromHi bool, out *DryOutcome) (err error) {
	if out.Events, err = r.events(); err != nil {
		return err
	}
	for row := range uint32(bpf.CountRows) {
		var perCPU []bpf.Count
		if err := r.p.maps["lash_counts"].Lookup(hookOf[program]*bpf.CountRows+row, &perCPU); err != nil {
			return fmt.Errorf("dry run's lash_counts: %w", err)
		}
		if sum(perCPU).Packets > 0 {
			out.Slow = append(out.Slow, int(row))
		}
	}
	owner := key
	if out.NATOwner != nil {
		owner = *out.NATOwner
	}
	raw, err := lookupRaw(r.p.maps["lash_conn"], &owner)
	if err != nil {
		return err
	}
	if raw != nil {
		c := bpf.ConnFrom(raw)
		out.Conn = &c
		out.Orig = out.NATOwner == nil && fromHi == (c.Flags&bpf.ConnInitiatorHi != 0)
	}
	if _, err := r.p.programs["clock"].Run(&ebpf.RunOptions{Data: make([]byte, 14)}); err != nil {
		return fmt.Errorf("clock: %w", err)
	}
	var rt bpf.Runtime
	if err := r.p.maps["lash_runtime"].Lookup(uint32(0), &rt); err != nil {
		return err
	}
	out.Now = uint32(rt.Ticks)
	out.Hz, err = ticksPerSecond()
	return err
}

// SlowText is a reason of lash_counts as `lash bpf metrics list` has it.
func SlowText(reason int) string { return slowNames[reason] }
