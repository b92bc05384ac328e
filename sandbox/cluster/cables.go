// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/lash-net/lash/sandbox/plan"
)

// SumChecksums makes the underlay's senders write checksums into their packets, as a cable needs it: a frame has no note
// that one is missing. Until undo is called.
func (c *Cluster) SumChecksums(ctx context.Context) (undo func() error, err error) {
	set := func(ctx context.Context, to string) error {
		var errs []error
		for _, host := range append([]string{plan.Outside, plan.ControlPlane}, c.Nodes...) {
			errs = append(errs, inNetns(ctx, c.netns(host), "ethtool", "-K", "eth0", "tx", to))
		}
		return errors.Join(errs...)
	}
	undo = func() error { return set(context.WithoutCancel(ctx), "on") }
	if err := set(ctx, "off"); err != nil {
		return nil, errors.Join(err, undo())
	}
	return undo, nil
}

// Cable makes the link between a node and the bridge one on which XDP can send, as between two machines: its far end has a
// program, which passes everything, and merges no packets, for what is merged has no checksum. Senders must write theirs
// (SumChecksums). Until undo is called, or this program ends.
func (c *Cluster) Cable(ctx context.Context, node string) (undo func() error, err error) {
	if err := c.HasNode(node); err != nil {
		return nil, err
	}
	sw := c.netns(plan.Switch)
	pass, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "cable", Type: ebpf.XDP, License: "Apache-2.0", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 2), asm.Return()}})
	if err != nil {
		return nil, fmt.Errorf("cable of %s: %w", node, err)
	}
	defer pass.Close() // the link keeps it
	var l link.Link
	if err := within(c.netnsPath(plan.Switch), func() error {
		dev, err := net.InterfaceByName(node)
		if err == nil {
			l, err = link.AttachXDP(link.XDPOptions{Program: pass, Interface: dev.Index, Flags: link.XDPDriverMode})
		}
		return err
	}); err != nil {
		return nil, fmt.Errorf("cable of %s: %w", node, err)
	}
	if err := inNetns(ctx, sw, "ethtool", "-K", node, "gro", "off"); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l.Close, nil
}

// within does something in a network namespace.
func within(netns string, do func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		f, err := os.Open(netns)
		if err == nil {
			err = unix.Setns(int(f.Fd()), unix.CLONE_NEWNET)
			f.Close()
		}
		if err != nil {
			err = fmt.Errorf("enter %s: %w", netns, err)
		} else {
			err = do()
		}
		done <- err
	}()
	return <-done
}
