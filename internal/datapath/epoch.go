// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"fmt"
	"net/netip"
	"sync"
	"time"

	"github.com/lash-net/lash/bpf"
	"github.com/lash-net/lash/internal/model"
)

// lateRaise is how long decisions may be followed that would be no other today but for whom they are about. A way that
// comes from the routing table is looked up again as often.
const lateRaise = time.Second

// epochs decides when a change of the ipcache makes decisions be made again. In a large cluster pods come and go all the
// time, on nodes to which the way is the same before and after: raising the epoch at once for each would make every
// packet of every connection slow.
type epochs struct {
	mu     sync.Mutex
	urgent bool        // a change since the last raise has changed a way, or who somebody is
	late   *time.Timer // the raise that is due for changes that are not urgent; nil: none is
}

// changed takes note of a change of what an address is: from before to after; nil is that nothing is known of it. What
// another node has is forwarded alike, whether it is known to be a pod or not (then it is the world, by the row around
// it); what is outside is masqueraded.
func (e *epochs) changed(p netip.Prefix, before, after *bpf.IPCacheEntry) {
	same := p.IsSingleIP() && before != nil && after != nil && before.Node == after.Node && before.Flags == after.Flags &&
		(before.Identity == after.Identity || before.Node != bpf.Addr{} && (model.Identity(before.Identity).World() || model.Identity(after.Identity).World()))
	if !same {
		e.mu.Lock()
		e.urgent = true
		e.mu.Unlock()
	}
}

// RaiseForIPCache is Raise after changes of the ipcache: at once if one of them changed the way to an address, or the
// identity of somebody who was known; else, once for all changes until then, within a second.
func (d *Datapath) RaiseForIPCache() error {
	e := &d.epochs
	e.mu.Lock()
	urgent := e.urgent
	if !urgent && e.late == nil {
		e.late = time.AfterFunc(lateRaise, func() {
			if err := d.Raise("ipcache, some time ago"); err != nil {
				d.log.Error("decisions of connections were not invalidated", "error", err)
			}
		})
	}
	e.mu.Unlock()
	if urgent {
		return d.Raise("ipcache")
	}
	return nil
}

// Raise makes every connection's decisions be made again on its next packet: call it
// after any change to endpoints, devices, routes or neighbours.
func (d *Datapath) Raise(why string) error {
	d.epochs.settle()
	var epoch uint32
	err := d.changeRuntime(func(rt *bpf.Runtime) {
		if rt.Epoch++; rt.Epoch == 0 { // 0 means "nothing decided"
			rt.Epoch = 1
		}
		epoch = rt.Epoch
	})
	if err != nil {
		return fmt.Errorf("raise epoch: %w", err)
	}
	d.log.Debug("epoch raised", "epoch", epoch, "why", why)
	return nil
}

// settle forgets what is due: a raise that follows is good for all changes so far. It reports whether anything was due.
func (e *epochs) settle() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	due := e.urgent || e.late != nil
	e.urgent = false
	if e.late != nil {
		e.late.Stop()
		e.late = nil
	}
	return due
}
