// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/link"
)

// Features are what Lash uses of a kernel where it is there. Each is probed; versions
// are never compared.
type Features struct {
	RedirectPeer  bool // bpf_redirect_peer (5.10)
	RedirectNeigh bool // bpf_redirect_neigh (5.10)
	TCX           bool // tcx links (6.6); else clsact
	SetRetval     bool // bpf_set_retval in connect hooks (5.18)
}

// HostRouting tells whether BPF host routing can work here.
func (f Features) HostRouting() bool { return f.RedirectPeer && f.RedirectNeigh }

// Probe asks the kernel.
func Probe() Features {
	has := func(t ebpf.ProgramType, f asm.BuiltinFunc) bool { return features.HaveProgramHelper(t, f) == nil }
	return Features{
		RedirectPeer:  has(ebpf.SchedCLS, asm.FnRedirectPeer),
		RedirectNeigh: has(ebpf.SchedCLS, asm.FnRedirectNeigh),
		TCX:           haveTCX(),
		SetRetval:     has(ebpf.CGroupSockAddr, asm.FnSetRetval),
	}
}

// haveTCX attaches a program that does nothing to a device that does not exist: a kernel
// without tcx says that it does not know the attach type, one with it that there is no
// such device.
func haveTCX() bool {
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.SchedCLS, License: "MIT", AttachType: ebpf.AttachTCXIngress,
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
	})
	if err != nil {
		return false
	}
	defer prog.Close()
	l, err := link.AttachTCX(link.TCXOptions{Interface: 0x7fffffff, Program: prog, Attach: ebpf.AttachTCXIngress})
	if err == nil {
		l.Close()
		return true
	}
	return isNoDevice(err)
}
