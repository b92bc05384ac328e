// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"os"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

// compiled is what a compiler makes of "search the hash if the packet is longer
// than 40 bytes, then index the array": its jumps are offsets.
func compiled() asm.Instructions {
	lookup := func(name string) asm.Instructions {
		return asm.Instructions{
			asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, -4),
			asm.LoadMapPtr(asm.R1, 0).WithReference(name),
			asm.FnMapLookupElem.Call(),
		}
	}
	skip := asm.JGT.Imm(asm.R6, 40, "")
	skip.Offset = 1
	over := asm.Ja.Label("")
	over.Offset = 5 // a map's address takes two
	head := asm.Instructions{
		asm.LoadMem(asm.R6, asm.R1, 0, asm.Word).WithSymbol("test"), // skb->len
		asm.StoreImm(asm.RFP, -4, 0, asm.Word),
		skip, over,
	}
	return slices.Concat(head, lookup("hash"), lookup("array"), asm.Instructions{asm.Mov.Imm(asm.R0, 7), asm.Return()})
}

func TestMarksFollowTheLookupsOfAPacket(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: loads programs")
	}
	maps := map[string]*ebpf.MapSpec{
		"hash":  {Name: "hash", Type: ebpf.Hash, KeySize: 4, ValueSize: 4, MaxEntries: 1},
		"array": {Name: "array", Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1},
	}
	ins := compiled()
	sites := lookupSites(ins, maps)
	if want := []site{{"hash", true}, {"array", false}}; !slices.Equal(sites, want) {
		t.Fatalf("sites %v, want %v", sites, want)
	}
	marks, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer marks.Close()
	marked, err := mark(ins, marks.FD())
	if err != nil {
		t.Fatal(err)
	}
	coll, err := ebpf.NewCollection(&ebpf.CollectionSpec{Maps: maps, Programs: map[string]*ebpf.ProgramSpec{
		"test": {Name: "test", Type: ebpf.SchedCLS, License: "GPL", Instructions: marked},
	}})
	if err != nil {
		t.Fatalf("%+v\n%v", err, marked)
	}
	defer coll.Close()
	for _, c := range []struct {
		length int
		want   []byte
	}{{36, []byte{0, 0, 0, 0, 1, 0, 0, 0}}, {60, []byte{1, 0, 0, 0, 1, 0, 0, 0}}} {
		if err := marks.Put(uint32(0), make([]byte, 8)); err != nil {
			t.Fatal(err)
		}
		packet := make([]byte, c.length)
		packet[12], packet[13] = unix.ETH_P_IP>>8, unix.ETH_P_IP&0xff
		if v, err := coll.Programs["test"].Run(&ebpf.RunOptions{Data: packet}); err != nil || v != 7 {
			t.Fatalf("run: %d, %v", v, err)
		}
		got := make([]byte, 8)
		if err := marks.Lookup(uint32(0), &got); err != nil || !slices.Equal(got, c.want) {
			t.Errorf("%d bytes: marks %v, want %v (%v)", c.length, got, c.want, err)
		}
	}
}

func TestAJumpIntoAnAddressIsRefused(t *testing.T) {
	ins := compiled()
	ins[3].Offset = 3 // into the second half of the map's address
	if _, err := mark(ins, 0); err == nil {
		t.Error("no error")
	}
}
