// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
)

const rodata = ".rodata"

// ProgramFacts are of a program attached to a device.
type ProgramFacts struct {
	ID  uint32
	Tag string
}

// ErrNotAttached: packets pass the device without meeting the program.
var ErrNotAttached = errors.New("not attached")

// attachedTwin proves that the dry run's program is the one attached to the device: the same instructions (the kernel's tag),
// the same constants, and where it only reads, the same maps.
func (d *Datapath) attachedTwin(p *dryPrograms, program string, ifindex int) (facts ProgramFacts, err error) {
	name := fmt.Sprintf("device %d", ifindex)
	if dev, err := net.InterfaceByIndex(ifindex); err == nil {
		name = dev.Name
	}
	live, err := d.attachedProgram(program, ifindex)
	if err != nil {
		return facts, fmt.Errorf("%s on %s: %w", program, name, err)
	}
	defer live.Close()
	info, err := live.Info()
	if err != nil {
		return facts, fmt.Errorf("%s on %s: %w", program, name, err)
	}
	id, _ := info.ID()
	if facts, ok := p.proved[id]; ok { // neither of the two changes
		return facts, nil
	}
	facts = ProgramFacts{uint32(id), info.Tag}
	differ := func(what string) error {
		return fmt.Errorf("%s on %s (id %d, tag %s) has other %s than this agent's: it was attached by an agent of another version or configuration. An agent replaces such programs when it starts: see its log, and try again", program, name, id, info.Tag, what)
	}
	twin, err := p.programs[program].Info()
	if err != nil {
		return facts, err
	}
	if twin.Tag != info.Tag {
		return facts, differ("instructions")
	}
	ids, _ := info.MapIDs()
	own, _ := twin.MapIDs()
	for name, m := range d.maps {
		if programsWrite[name] {
			continue
		}
		shared, err := m.Info()
		if err != nil {
			return facts, fmt.Errorf("map %s: %w", name, err)
		}
		if id, _ := shared.ID(); slices.Contains(own, id) && !slices.Contains(ids, id) {
			return facts, differ("rows of " + name)
		}
	}
	for _, id := range ids {
		value, err := constantsIn(id)
		if err != nil {
			return facts, fmt.Errorf("constants of %s: %w", program, err)
		}
		if value != nil && !bytes.Equal(value, p.constants[program]) {
			return facts, differ("constants")
		}
	}
	p.proved[id] = facts
	return facts, nil
}

// constantsIn is what a map holds if it is that of a program's constants.
func constantsIn(id ebpf.MapID) ([]byte, error) {
	m, err := ebpf.NewMapFromID(id)
	if err != nil {
		return nil, err
	}
	defer m.Close()
	info, err := m.Info()
	if err != nil || info.Name != rodata {
		return nil, err
	}
	return m.LookupBytes(uint32(0))
}

// attachedProgram is the program of that name on the device.
func (d *Datapath) attachedProgram(program string, ifindex int) (*ebpf.Program, error) {
	ids, err := d.attachedIDs(program, ifindex)
	if err != nil {
		return nil, err
	}
	for _, id := range ids {
		p, err := ebpf.NewProgramFromID(id)
		if err != nil {
			continue // gone meanwhile
		}
		if info, err := p.Info(); err == nil && info.Name == program {
			return p, nil
		}
		p.Close()
	}
	return nil, ErrNotAttached
}

func (d *Datapath) attachedIDs(program string, ifindex int) (ids []ebpf.ProgramID, err error) {
	for _, h := range slices.Concat(podHooks, deviceHooks, hostHooks, tunnelHooks, xdpHooks) {
		if h.program != program {
			continue
		}
		if h.attach == ebpf.AttachXDP {
			dev, err := netlink.LinkByIndex(ifindex)
			if err == nil && dev.Attrs().Xdp != nil {
				ids = append(ids, ebpf.ProgramID(dev.Attrs().Xdp.ProgId))
			}
			return ids, err
		}
		if d.features.TCX {
			res, err := link.QueryPrograms(link.QueryOptions{Target: ifindex, Attach: h.attach})
			if err != nil {
				return nil, fmt.Errorf("programs of the device: %w", err)
			}
			for _, p := range res.Programs {
				ids = append(ids, p.ID)
			}
			return ids, nil
		}
		dev, err := netlink.LinkByIndex(ifindex)
		if err != nil {
			return nil, err
		}
		filters, err := netlink.FilterList(dev, d.filter(ifindex, h).Parent)
		if err != nil {
			return nil, fmt.Errorf("filters of the device: %w", err)
		}
		for _, f := range filters {
			if b, ok := f.(*netlink.BpfFilter); ok && b.Priority == clsactPriority {
				ids = append(ids, ebpf.ProgramID(b.Id))
			}
		}
		return ids, nil
	}
	return nil, fmt.Errorf("no program %s is attached to devices", program)
}

// Offsets in struct bpf_tunnel_key of the UAPI, bytes.
const (
	tunnelKeyID    = 0
	tunnelKeyLocal = 28
	tunnelKeySize  = 44
)

// outOfTunnel is a program that gives the packet the metadata of one that the tunnel's device has decapsulated, which a
// test run cannot, and goes on with prog.
func outOfTunnel(prog *ebpf.Program, key TunnelKey) (*ebpf.Program, func(), error) {
	next, err := ebpf.NewMap(&ebpf.MapSpec{Name: "dry_tail", Type: ebpf.ProgramArray, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	if err != nil {
		return nil, nil, err
	}
	if err := next.Put(uint32(0), uint32(prog.FD())); err != nil {
		next.Close()
		return nil, nil, fmt.Errorf("program after the tunnel: %w", err)
	}
	// The kernel keeps both ends of a packet to be encapsulated: seen from prog, which reads the metadata of one that
	// was, its own end is the other.
	const at = -tunnelKeySize - 4 // on the stack, aligned
	insns := asm.Instructions{asm.Mov.Reg(asm.R6, asm.R1)}
	word := func(offset int16, v uint32) {
		insns = append(insns, asm.StoreImm(asm.RFP, at+offset, int64(int32(v)), asm.Word))
	}
	for i := int16(0); i < tunnelKeySize; i += 4 {
		word(i, 0)
	}
	word(tunnelKeyID, key.VNI)
	flags := int32(0)
	if a := key.Sender.Unmap(); a.Is4() {
		b := a.As4()
		word(tunnelKeyLocal, binary.BigEndian.Uint32(b[:])) // in host order
	} else {
		b := a.As16()
		for i := range int16(4) {
			word(tunnelKeyLocal+4*i, binary.NativeEndian.Uint32(b[4*i:]))
		}
		flags = 1 // BPF_F_TUNINFO_IPV6
	}
	insns = append(insns,
		asm.Mov.Reg(asm.R1, asm.R6), asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, at), asm.Mov.Imm(asm.R3, tunnelKeySize), asm.Mov.Imm(asm.R4, flags),
		asm.FnSkbSetTunnelKey.Call(),
		asm.Mov.Reg(asm.R1, asm.R6), asm.LoadMapPtr(asm.R2, next.FD()), asm.Mov.Imm(asm.R3, 0), asm.FnTailCall.Call(),
		asm.Mov.Imm(asm.R0, VerdictDrop), asm.Return())
	entry, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "dry_tunnel", Type: ebpf.SchedCLS, License: "Dual BSD/GPL", Instructions: insns})
	if err != nil {
		next.Close()
		return nil, nil, fmt.Errorf("program before the tunnel's: %w", err)
	}
	return entry, func() { entry.Close(); next.Close() }, nil
}
