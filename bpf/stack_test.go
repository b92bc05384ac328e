// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf/asm"
)

// What a kernel allows a chain of calls, and how kernels before 6.8 count one frame.
const (
	stackLimit  = 512
	stackRounds = 32
)

// frame is one function of a program: bytes of stack, and whom it calls.
type frame struct {
	bytes int
	calls []string
}

// frames reads each function's use of the stack from its instructions: offsets from the frame pointer, and copies of the
// frame pointer that an immediate is added to.
func frames(program string, insns asm.Instructions) map[string]*frame {
	out := map[string]*frame{}
	name := program
	var copied asm.Register
	for i, ins := range insns {
		if i == 0 || (ins.Symbol() != "" && !strings.HasPrefix(ins.Symbol(), "LBB")) {
			if ins.Symbol() != "" {
				name = ins.Symbol()
			}
			out[name] = &frame{}
			copied = asm.RFP
		}
		f := out[name]
		lowest := 0
		class := ins.OpCode.Class()
		switch {
		case class.IsStore() && ins.Dst == asm.RFP, class.IsLoad() && ins.Src == asm.RFP && ins.OpCode.Mode() != asm.ImmMode:
			lowest = int(ins.Offset)
		case ins.OpCode == asm.Add.Op(asm.ImmSource) && ins.Dst == copied && copied != asm.RFP:
			lowest = int(ins.Constant)
		}
		f.bytes = max(f.bytes, -lowest)
		if ins.OpCode == asm.Mov.Op(asm.RegSource) && ins.Src == asm.RFP {
			copied = ins.Dst
		} else {
			copied = asm.RFP
		}
		if ins.IsFunctionCall() && !slices.Contains(f.calls, ins.Reference()) {
			f.calls = append(f.calls, ins.Reference())
		}
	}
	return out
}

// deepest is the call chain from function name that takes most stack.
func deepest(fs map[string]*frame, name string) (total int, chain []string) {
	f := fs[name]
	if f == nil {
		return 0, []string{name + "?"}
	}
	for _, callee := range f.calls {
		if n, c := deepest(fs, callee); n > total {
			total, chain = n, c
		}
	}
	rounded := (max(f.bytes, 1) + stackRounds - 1) / stackRounds * stackRounds
	return total + rounded, append([]string{fmt.Sprintf("%s %d", name, rounded)}, chain...)
}

// Every program's deepest chain of calls fits the stack as the oldest supported kernel counts it.
func TestCallChainsFitTheStack(t *testing.T) {
	for object := range Programs {
		spec, err := Load(object)
		if err != nil {
			t.Fatal(err)
		}
		for name, p := range spec.Programs {
			total, chain := deepest(frames(name, p.Instructions), name)
			t.Logf("%3d %s", total, strings.Join(chain, " > "))
			if total > stackLimit {
				t.Errorf("%s: %d bytes of stack, %d allowed: %s", name, total, stackLimit, strings.Join(chain, " > "))
			}
		}
	}
}
