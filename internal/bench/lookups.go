// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/lash-net/lash/bpf"
)

// Lookups is which maps one packet of an established connection was looked up in,
// counted by a copy of the attached program that marks each call it makes.
type Lookups struct {
	Program string   `json:"program"`
	Case    string   `json:"case"`
	Search  []string `json:"search"` // hash and longest-prefix maps, one entry a call
	Index   []string `json:"index"`  // arrays: an addition, inlined by the kernel
	Verdict string   `json:"verdict"`
}

func printLookups(w io.Writer, all []Lookups) error {
	if len(all) == 0 {
		return nil
	}
	fmt.Fprintf(w, "\nMap lookups of one packet of an established connection (gate: one search)\n")
	t := tabwriter.NewWriter(w, 2, 0, 2, ' ', 0)
	fmt.Fprintln(t, "  program\tcase\tsearched\tindexed\tverdict")
	for _, l := range all {
		fmt.Fprintf(t, "  %s\t%s\t%d: %s\t%s\t%s\n", l.Program, l.Case, len(l.Search), dash(strings.Join(l.Search, " ")), dash(strings.Join(l.Index, " ")), l.Verdict)
	}
	return t.Flush()
}

// lookups measures established connections within a node and between nodes.
func (c *lashCluster) lookups() ([]Lookups, error) {
	var all []Lookups
	for _, family := range []int{4, 6} {
		for _, where := range []struct {
			name string
			to   *lashPod
		}{{SameNode, c.pods[1]}, {AcrossNode, c.pods[2]}} {
			from, to := c.pods[0], where.to
			source, target := from.addr4, to.addr4
			if family == 6 {
				source, target = from.addr6, to.addr6
			}
			flow, err := openFlow(from.Netns, to.Netns, source, target)
			if err != nil {
				return all, fmt.Errorf("connection %s: %w", where.name, err)
			}
			hops := []hop{{c.n, "pod", "from_container", from.device}}
			if to == c.pods[2] {
				hops = append(hops, hop{c.m, "netdev", "from_netdev", "eth0"})
			}
			for _, h := range hops {
				l, err := h.count(flow)
				if err != nil {
					flow.close()
					return all, fmt.Errorf("lookups of %s: %w", h.program, err)
				}
				l.Case = fmt.Sprintf("%s, IPv%d", where.name, family)
				all = append(all, l)
			}
			flow.close()
		}
	}
	return all, nil
}

// flow is an open TCP connection between two namespaces.
type flow struct {
	ends   [2]socket
	source netip.AddrPort
	target netip.AddrPort
}

func openFlow(a, b *Netns, source, target netip.Addr) (*flow, error) {
	f := &flow{ends: [2]socket{-1, -1}}
	var l socket
	var port uint16
	if err := b.Do(func() (err error) { l, port, err = listen(target, "reno"); return err }); err != nil {
		return nil, err
	}
	defer l.close()
	f.target = netip.AddrPortFrom(target, port)
	err := a.Do(func() (err error) {
		if f.ends[0], err = newSocket(source, "reno"); err != nil {
			return err
		}
		return f.ends[0].connect(newRawAddr(f.target))
	})
	if err == nil {
		f.ends[1], err = l.accept()
	}
	if err != nil {
		f.close()
		return nil, err
	}
	name, err := unix.Getsockname(int(f.ends[0]))
	if err != nil {
		f.close()
		return nil, err
	}
	switch n := name.(type) {
	case *unix.SockaddrInet4:
		f.source = netip.AddrPortFrom(source, uint16(n.Port))
	case *unix.SockaddrInet6:
		f.source = netip.AddrPortFrom(source, uint16(n.Port))
	}
	return f, nil
}

// exchange sends a byte each way, so that both directions are decided.
func (f *flow) exchange() error {
	b := []byte{byteWork}
	for _, i := range []int{0, 1} {
		if _, err := f.ends[i].send(b); err != nil {
			return err
		}
		if n, err := f.ends[1-i].receive(b); err != nil || n != 1 {
			return fmt.Errorf("received %d bytes: %w", n, err)
		}
	}
	return nil
}

func (f *flow) close() {
	for _, s := range f.ends {
		if s >= 0 {
			s.close()
		}
	}
}

// packet is a data segment of the connection's client, as it arrives at a device.
func (f *flow) packet(device net.HardwareAddr) []byte {
	const ttl, payload = 64, 4
	frame := make([]byte, 12, 128)
	copy(frame, device)
	tcp := make([]byte, 20+payload)
	binary.BigEndian.PutUint16(tcp[0:], f.source.Port())
	binary.BigEndian.PutUint16(tcp[2:], f.target.Port())
	tcp[12], tcp[13] = 5<<4, 0x18 // PSH, ACK
	binary.BigEndian.PutUint16(tcp[14:], 512)
	if f.source.Addr().Is4() {
		frame = binary.BigEndian.AppendUint16(frame, unix.ETH_P_IP)
		ip := make([]byte, 20)
		ip[0], ip[8], ip[9] = 0x45, ttl, unix.IPPROTO_TCP
		binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)+len(tcp)))
		copy(ip[12:], f.source.Addr().AsSlice())
		copy(ip[16:], f.target.Addr().AsSlice())
		return append(append(frame, ip...), tcp...)
	}
	frame = binary.BigEndian.AppendUint16(frame, unix.ETH_P_IPV6)
	ip := make([]byte, 40)
	ip[0], ip[6], ip[7] = 0x60, unix.IPPROTO_TCP, ttl
	binary.BigEndian.PutUint16(ip[4:], uint16(len(tcp)))
	copy(ip[8:], f.source.Addr().AsSlice())
	copy(ip[24:], f.target.Addr().AsSlice())
	return append(append(frame, ip...), tcp...)
}

// hop is a program where the connection's packets meet it.
type hop struct {
	node            *lashNode
	object, program string
	device          string
}

// count runs the marked copy on a packet of the connection. A first run may find
// a route due for another look; the second one is what every packet meets.
func (h hop) count(f *flow) (Lookups, error) {
	l := Lookups{Program: h.program}
	copied, sites, marks, err := h.markedCopy()
	if err != nil {
		return l, err
	}
	defer copied.Close()
	defer marks.Close()
	device, err := h.node.Link(h.device)
	if err != nil {
		return l, err
	}
	context := make([]byte, 192) // struct __sk_buff
	binary.NativeEndian.PutUint32(context[40:], uint32(device.Attrs().Index))
	if err := f.exchange(); err != nil {
		return l, err
	}
	var verdict uint32
	for range 2 {
		if err := marks.Put(uint32(0), make([]byte, marks.ValueSize())); err != nil {
			return l, err
		}
		if err := h.node.Do(func() (err error) {
			verdict, err = copied.Run(&ebpf.RunOptions{Data: f.packet(device.Attrs().HardwareAddr), Context: context})
			return err
		}); err != nil {
			return l, fmt.Errorf("run: %w", err)
		}
	}
	const redirected = 7 // TC_ACT_REDIRECT
	if verdict != redirected {
		return l, fmt.Errorf("the packet's verdict is %d, want %d: it is not one of an established connection", verdict, redirected)
	}
	seen := make([]byte, marks.ValueSize())
	if err := marks.Lookup(uint32(0), &seen); err != nil {
		return l, err
	}
	for i, s := range sites {
		switch {
		case seen[4*i] == 0:
		case s.search:
			l.Search = append(l.Search, s.name)
		default:
			l.Index = append(l.Index, s.name)
		}
	}
	l.Verdict = pass
	if len(l.Search) != 1 {
		l.Verdict = miss
	}
	return l, nil
}

// site is one call of the map lookup helper.
type site struct {
	name   string // of the map
	search bool   // a hash or a trie
}

// markedCopy loads the program again, on the maps and constants of the attached
// one, with a store before each lookup that marks its site.
func (h hop) markedCopy() (p *ebpf.Program, sites []site, marks *ebpf.Map, err error) {
	pinned, err := link.LoadPinnedLink(filepath.Join(bpfRoot, "lash-"+h.node.Name, "links", h.device+"-"+h.program), nil)
	if err != nil {
		return nil, nil, nil, fmt.Errorf("attached program: %w", err)
	}
	defer pinned.Close()
	live, constants, err := liveMaps(pinned)
	defer func() {
		for _, m := range live {
			m.Close()
		}
	}()
	if err != nil {
		return nil, nil, nil, err
	}
	spec, err := bpf.Load(h.object)
	if err != nil {
		return nil, nil, nil, err
	}
	program := spec.Programs[h.program]
	spec.Programs = map[string]*ebpf.ProgramSpec{h.program: program}
	used := map[string]bool{}
	for _, ins := range program.Instructions {
		if ins.IsLoadFromMap() {
			used[ins.Reference()] = true
		}
	}
	// The library drops branches that the constants rule out: it must see them too.
	for _, v := range spec.Variables {
		if v.SectionName == ".rodata" && int(v.Offset)+len(v.Value) <= len(constants) {
			v.Value = slices.Clone(constants[v.Offset:][:len(v.Value)])
		}
	}
	shared := map[string]*ebpf.Map{}
	for name, m := range spec.Maps {
		switch {
		case name == ".rodata": // from the variables
		case !used[name]:
			delete(spec.Maps, name)
		case live[name] != nil:
			shared[name] = live[name]
			m.MaxEntries = live[name].MaxEntries()
		}
	}
	sites = lookupSites(program.Instructions, spec.Maps)
	marks, err = ebpf.NewMap(&ebpf.MapSpec{Name: "marks", Type: ebpf.Array, KeySize: 4, ValueSize: uint32(4 * len(sites)), MaxEntries: 1})
	if err != nil {
		return nil, nil, nil, fmt.Errorf("map of marks: %w", err)
	}
	if program.Instructions, err = mark(program.Instructions, marks.FD()); err != nil {
		marks.Close()
		return nil, nil, nil, err
	}
	coll, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: shared})
	if err != nil {
		marks.Close()
		return nil, nil, nil, fmt.Errorf("load the marked copy: %w", err)
	}
	defer coll.Close()
	return coll.DetachProgram(h.program), sites, marks, nil
}

// liveMaps opens the maps of an attached program by name, and its constants.
func liveMaps(l link.Link) (maps map[string]*ebpf.Map, constants []byte, err error) {
	info, err := l.Info()
	if err != nil {
		return nil, nil, err
	}
	p, err := ebpf.NewProgramFromID(info.Program)
	if err != nil {
		return nil, nil, err
	}
	defer p.Close()
	of, err := p.Info()
	if err != nil {
		return nil, nil, err
	}
	ids, _ := of.MapIDs()
	maps = map[string]*ebpf.Map{}
	for _, id := range ids {
		m, err := ebpf.NewMapFromID(id)
		if err != nil {
			return maps, nil, err
		}
		mi, err := m.Info()
		if err != nil {
			m.Close()
			return maps, nil, err
		}
		maps[mi.Name] = m
		if strings.HasSuffix(mi.Name, "rodata") {
			constants = make([]byte, m.ValueSize())
			if err := m.Lookup(uint32(0), &constants); err != nil {
				return maps, nil, fmt.Errorf("constants: %w", err)
			}
		}
	}
	if constants == nil {
		return maps, nil, errors.New("the attached program has no constants")
	}
	return maps, constants, nil
}

func isLookup(ins asm.Instruction) bool {
	return ins.IsBuiltinCall() && ins.Constant == int64(asm.FnMapLookupElem)
}

// lookupSites names the map of each lookup: the last one loaded into the first
// argument before the call.
func lookupSites(ins asm.Instructions, maps map[string]*ebpf.MapSpec) []site {
	var sites []site
	name := ""
	for _, i := range ins {
		if i.IsLoadFromMap() && i.Dst == asm.R1 {
			name = i.Reference()
		}
		if isLookup(i) {
			s := site{name: name, search: true}
			if m := maps[name]; m != nil {
				s.search = !slices.Contains([]ebpf.MapType{ebpf.Array, ebpf.PerCPUArray}, m.Type)
			}
			sites = append(sites, s)
		}
	}
	return sites
}

// mark puts a store to the map's value before each lookup. The call overwrites
// R0 anyway, so R0 is free there. Jumps, which are offsets in compiled code,
// become labels first: the instructions between move apart.
func mark(ins asm.Instructions, fd int) (asm.Instructions, error) {
	ins = slices.Clone(ins)
	at := map[int]int{} // index by raw offset
	var offsets []int
	for it := ins.Iterate(); it.Next(); {
		at[int(it.Offset)] = it.Index
		offsets = append(offsets, int(it.Offset))
	}
	for i := range ins {
		op := ins[i].OpCode
		if !op.Class().IsJump() || op.JumpOp() == asm.Call || op.JumpOp() == asm.Exit || ins[i].Reference() != "" {
			continue
		}
		if op.JumpOp() == asm.Ja && op.Class() == asm.Jump32Class {
			return nil, fmt.Errorf("instruction %d: long jumps are not known here", i)
		}
		target, ok := at[offsets[i]+1+int(ins[i].Offset)]
		if !ok {
			return nil, fmt.Errorf("instruction %d jumps into the middle of another", i)
		}
		label := ins[target].Symbol()
		if label == "" {
			label = fmt.Sprintf("at_%d", target)
			ins[target] = ins[target].WithSymbol(label)
		}
		ins[i] = ins[i].WithReference(label)
		ins[i].Offset = -1
	}
	out := make(asm.Instructions, 0, len(ins)+100)
	sites := 0
	for _, i := range ins {
		if isLookup(i) {
			out = append(out,
				asm.LoadMapValue(asm.R0, fd, uint32(4*sites)).WithSymbol(i.Symbol()),
				asm.StoreImm(asm.R0, 0, 1, asm.Word))
			i = i.WithSymbol("")
			sites++
		}
		out = append(out, i)
	}
	return out, nil
}
