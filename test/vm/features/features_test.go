// SPDX-License-Identifier: Apache-2.0

// Package features checks what the kernels that Lash promises to run on have,
// in the words of its own use: hooks, redirects and file systems. A kernel
// without one of them would make the other layers fail in less obvious ways.
package features

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// inNewNetns moves the test's thread into a fresh network namespace; the thread
// is never handed back, so it ends with the test's goroutine.
func inNewNetns(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces and loads programs")
	}
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatalf("new network namespace: %v", err)
	}
}

// vethPair makes a@b, both up, in the current namespace.
func vethPair(t *testing.T) (a, b netlink.Link) {
	t.Helper()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "a"
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "b"}); err != nil {
		t.Fatalf("add veth: %v", err)
	}
	links := [2]netlink.Link{}
	for i, name := range []string{"a", "b"} {
		l, err := netlink.LinkByName(name)
		if err != nil {
			t.Fatalf("find %s: %v", name, err)
		}
		if err := netlink.LinkSetUp(l); err != nil {
			t.Fatalf("set %s up: %v", name, err)
		}
		links[i] = l
	}
	return links[0], links[1]
}

// program returns TC_ACT_OK after a call of the helper, whose arguments are
// ifindex 1 and flags 0, as redirect, redirect_peer and redirect_neigh take them.
func program(t *testing.T, helper asm.BuiltinFunc) *ebpf.Program {
	t.Helper()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "probe", Type: ebpf.SchedCLS, License: "Dual BSD/GPL",
		Instructions: asm.Instructions{
			asm.Mov.Imm(asm.R1, 1), asm.Mov.Imm(asm.R2, 0), asm.Mov.Imm(asm.R3, 0), asm.Mov.Imm(asm.R4, 0),
			helper.Call(), asm.Mov.Imm(asm.R0, 0), asm.Return(),
		},
	})
	if err != nil {
		t.Fatalf("load a program that calls %s: %v", helper, err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

func TestRedirectHelpersLoad(t *testing.T) {
	inNewNetns(t)
	for _, helper := range []asm.BuiltinFunc{asm.FnRedirect, asm.FnRedirectPeer, asm.FnRedirectNeigh} {
		program(t, helper)
	}
}

func TestTCXAttachesWhereTheKernelHasIt(t *testing.T) {
	inNewNetns(t)
	a, _ := vethPair(t)
	l, err := link.AttachTCX(link.TCXOptions{
		Interface: a.Attrs().Index, Program: program(t, asm.FnRedirectPeer), Attach: ebpf.AttachTCXIngress,
	})
	if err == nil {
		defer l.Close()
	}
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		t.Fatal(err)
	}
	release := unix.ByteSliceToString(uts.Release[:])
	old := len(release) > 4 && release[:4] == "6.1."
	switch {
	case old && err == nil:
		t.Errorf("kernel %s attaches to tcx, which came with 6.6: the fallback is not tested here", release)
	case old && !errors.Is(err, ebpf.ErrNotSupported) && !errors.Is(err, unix.EINVAL):
		t.Errorf("kernel %s: %v, want not supported", release, err)
	case !old && err != nil:
		t.Errorf("kernel %s: %v", release, err)
	default:
		t.Logf("kernel %s: tcx %v", release, err == nil)
	}
}

func TestClsactAttaches(t *testing.T) {
	inNewNetns(t)
	a, _ := vethPair(t)
	qdisc := &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: a.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
	}}
	if err := netlink.QdiscAdd(qdisc); err != nil {
		t.Fatalf("add clsact: %v", err)
	}
	filter := &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: a.Attrs().Index, Parent: netlink.HANDLE_MIN_INGRESS, Handle: 1, Protocol: unix.ETH_P_ALL, Priority: 1,
		},
		Fd: program(t, asm.FnRedirectNeigh).FD(), Name: "probe", DirectAction: true,
	}
	if err := netlink.FilterAdd(filter); err != nil {
		t.Fatalf("add filter: %v", err)
	}
	filters, err := netlink.FilterList(a, netlink.HANDLE_MIN_INGRESS)
	if err != nil || len(filters) != 1 {
		t.Errorf("listed %d filters, %v; want the one", len(filters), err)
	}
}

func TestProgramsAndMapsPin(t *testing.T) {
	inNewNetns(t)
	var fs unix.Statfs_t
	if err := unix.Statfs("/sys/fs/bpf", &fs); err != nil || fs.Type != unix.BPF_FS_MAGIC {
		t.Skipf("no bpffs at /sys/fs/bpf (type %#x, %v)", fs.Type, err)
	}
	p := program(t, asm.FnRedirect)
	pin := fmt.Sprintf("/sys/fs/bpf/lash-probe-%d", os.Getpid())
	if err := p.Pin(pin); err != nil {
		t.Fatalf("pin: %v", err)
	}
	defer p.Unpin()
	again, err := ebpf.LoadPinnedProgram(pin, nil)
	if err != nil {
		t.Fatalf("load the pinned program: %v", err)
	}
	again.Close()
}
