// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/lash-net/lash/bpf"
)

// maglev makes tables by the algorithm of that name (Eisenbud et al., NSDI 2016): each backend has a permutation of the
// table's entries, made of nothing but its own address, and backends take turns in claiming the next entry of theirs that
// is free. The same backends give the same table on every node, in whatever order, and one that goes moves little but
// its own entries.
type maglev struct {
	size uint32 // a prime
	seed []byte
}

// newMaglev prepares tables of a size.
func newMaglev(size uint32, seed []byte) *maglev {
	return &maglev{size: size, seed: seed}
}

// permutation begins at offset and goes on by skip: since the size is a prime, it meets every entry.
type permutation struct{ next, skip uint64 }

func (m *maglev) permutation(b bpf.Backend) permutation {
	buf := append(append([]byte(nil), m.seed...), b.Addr[:]...)
	buf = binary.BigEndian.AppendUint16(buf, b.Port.Host())
	sum := sha256.Sum256(append(buf, b.Proto))
	size := uint64(m.size)
	return permutation{binary.BigEndian.Uint64(sum[:]) % size, binary.BigEndian.Uint64(sum[8:])%(size-1) + 1}
}

// table says for each entry which of the backends has it, by the backend's place in the list, which must be sorted.
func (m *maglev) table(backends []bpf.Backend) []uint32 {
	const free = ^uint32(0)
	out := make([]uint32, m.size)
	for i := range out {
		out[i] = free
	}
	if len(backends) == 0 {
		return out
	}
	perms := make([]permutation, len(backends))
	for i, b := range backends {
		perms[i] = m.permutation(b)
	}
	for taken := uint32(0); ; {
		for i := range perms {
			p := &perms[i]
			for out[p.next] != free {
				p.step(m.size)
			}
			out[p.next] = uint32(i)
			p.step(m.size)
			if taken++; taken == m.size {
				return out
			}
		}
	}
}

func (p *permutation) step(size uint32) {
	if p.next += p.skip; p.next >= uint64(size) {
		p.next -= uint64(size)
	}
}

// sum tells tables apart: it is of the backends in their slots, the seed and the size.
func (m *maglev) sum(first uint32, slots []bpf.Backend) uint32 {
	h := crc32.NewIEEE()
	h.Write(m.seed)
	b := binary.BigEndian.AppendUint32(nil, m.size)
	b = binary.BigEndian.AppendUint32(b, first)
	for _, s := range slots {
		b = append(b, s.Addr[:]...)
		b = binary.BigEndian.AppendUint16(b, s.Port.Host())
		b = append(b, s.Proto)
	}
	h.Write(b)
	return h.Sum32()
}

// write puts the table of a service port into the kernel: of the backends in slots from first, whose order in the list
// sorted gives.
func (m *maglev) write(outer *ebpf.Map, id, first uint32, slots []bpf.Backend, sorted []int) error {
	if len(slots) == 0 {
		return remove(outer, id)
	}
	backends := make([]bpf.Backend, len(sorted))
	for i, slot := range sorted {
		backends[i] = slots[slot]
	}
	values := m.table(backends)
	for i, b := range values {
		values[i] = first + uint32(sorted[b])
	}
	values = append(values, m.sum(first, slots))

	// A table there is is written in place: to put another into the outer map, the kernel waits for every program that may
	// still read the first. Each entry leads to a slot at any time.
	inner, err := m.open(outer, id)
	if err != nil {
		return err
	}
	if inner != nil {
		defer inner.Close()
		return m.fill(inner, values)
	}
	inner, err = ebpf.NewMap(&ebpf.MapSpec{
		Name: "lash_maglev_tbl", Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: m.size + 1, Flags: unix.BPF_F_INNER_MAP | unix.BPF_F_MMAPABLE,
	})
	if err != nil {
		return fmt.Errorf("make a Maglev table: %w", err)
	}
	defer inner.Close()
	if err := m.fill(inner, values); err != nil {
		return err
	}
	return outer.Put(id, inner)
}

// entryStride is what an entry of an array takes, whatever its size.
const entryStride = 8

// fill writes all entries by the table's memory: by system calls it would take a hundred times as long. The sum is last.
func (m *maglev) fill(inner *ebpf.Map, values []uint32) error {
	memory, err := inner.Memory()
	if err != nil {
		return fmt.Errorf("map a Maglev table: %w", err)
	}
	buf := make([]byte, entryStride*len(values))
	for i, v := range values {
		binary.NativeEndian.PutUint32(buf[entryStride*i:], v)
	}
	if _, err := memory.WriteAt(buf, 0); err != nil {
		return fmt.Errorf("fill a Maglev table: %w", err)
	}
	return nil
}

// open returns the table of a service port if there is one of the right size, else nil.
func (m *maglev) open(outer *ebpf.Map, id uint32) (*ebpf.Map, error) {
	var inner *ebpf.Map
	if err := outer.Lookup(id, &inner); errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	if inner.MaxEntries() != m.size+1 {
		return nil, inner.Close()
	}
	return inner, nil
}

// matches reports whether the kernel's table of the service port is that of the backends in slots from first.
func (m *maglev) matches(outer *ebpf.Map, id, first uint32, slots []bpf.Backend) (bool, error) {
	inner, err := m.open(outer, id)
	if err != nil {
		return false, err
	}
	if inner == nil {
		return len(slots) == 0, nil
	}
	defer inner.Close()
	var sum uint32
	if err := inner.Lookup(m.size, &sum); err != nil {
		return false, err
	}
	return len(slots) > 0 && sum == m.sum(first, slots), nil
}
