// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/lash-net/lash/bpf"
)

// localObject may fail to load: it needs sockhashes and the kernel's BTF.
const localObject = "sockmap"

var localAttach = map[string]ebpf.AttachType{"local_established": ebpf.AttachCGroupSockOps}

// AttachLocal attaches the programs that let sockets of one pod exchange messages without packets to a cgroup2 directory.
// Only connections made afterwards, in the namespaces that SetLocalNetns names, take part.
func (d *Datapath) AttachLocal(path string) error {
	if d.local != nil {
		return fmt.Errorf("connections within a pod stay with packets: %w", d.local)
	}
	socks := d.maps["lash_local_socks"]
	if err := link.RawAttachProgram(link.RawAttachProgramOptions{
		Target: socks.FD(), Program: d.programs["local_message"], Attach: ebpf.AttachSkMsgVerdict,
	}); err != nil {
		return fmt.Errorf("attach local_message to lash_local_socks: %w", err)
	}
	return d.attachCgroup(path, localAttach)
}

// DetachLocal ends it for connections to come. Those that take part go on: what is on its way between their sockets is
// in no packet.
func (d *Datapath) DetachLocal() error { return d.detachCgroup(localAttach) }

// SetLocalNetns makes the namespaces with these cookies, and no others, the ones whose new connections take part.
func (d *Datapath) SetLocalNetns(cookies map[uint64]bool) error {
	if d.local != nil {
		return nil
	}
	m := d.maps["lash_local_netns"]
	var gone []uint64
	known := map[uint64]bool{}
	if err := list(m, "lash_local_netns", func(cookie uint64, _ uint32) {
		known[cookie] = true
		if !cookies[cookie] {
			gone = append(gone, cookie)
		}
	}); err != nil {
		return err
	}
	for cookie := range cookies {
		if known[cookie] {
			continue
		}
		if err := m.Put(cookie, uint32(1)); err != nil {
			return fmt.Errorf("lash_local_netns: %w", err)
		}
	}
	for _, cookie := range gone {
		if err := remove(m, cookie); err != nil {
			return fmt.Errorf("lash_local_netns: %w", err)
		}
	}
	return nil
}

// LocalCounts is what sockets handed to each other without packets, and how many directions of connections carried too
// much for that and went on by packets.
type LocalCounts struct {
	Messages, Bytes, Bulk uint64
	Netns                 int    // whose new connections take part
	Unable                string // why none can
}

// LocalCounts reads them.
func (d *Datapath) LocalCounts() (LocalCounts, error) {
	var c LocalCounts
	if d.local != nil {
		c.Unable = d.local.Error()
		return c, nil
	}
	if err := list(d.maps["lash_local_netns"], "lash_local_netns", func(uint64, uint32) { c.Netns++ }); err != nil {
		return c, err
	}
	for why, add := range map[uint32]func(bpf.Count){
		bpf.SlowNot:  func(n bpf.Count) { c.Messages += n.Packets; c.Bytes += n.Bytes },
		bpf.SlowBulk: func(n bpf.Count) { c.Bulk += n.Packets },
	} {
		var perCPU []bpf.Count
		if err := d.maps["lash_counts"].Lookup(uint32(bpf.HookLocal)*bpf.CountRows+why, &perCPU); err != nil {
			return c, fmt.Errorf("read lash_counts: %w", err)
		}
		for _, n := range perCPU {
			add(n)
		}
	}
	return c, nil
}
