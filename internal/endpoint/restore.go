// SPDX-License-Identifier: Apache-2.0

package endpoint

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/lash-net/lash/internal/cni"
	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/state"
)

// restore fills the table from checkpoints and from what the kernel has of them, finishes deletions that were queued,
// and removes pods' devices that nobody knows. Forwarding goes on meanwhile: programs and rows are pinned, and what is
// attached and written here is there already.
//
// Only what makes everything impossible is an error: an endpoint that cannot be restored is logged and taken away.
func (e *Endpoints) restore(ctx context.Context) error {
	saved, unreadable := e.checkpoints.read()
	if unreadable != nil {
		e.cfg.Log.Error("some endpoints cannot be restored: their pods keep running, recreate them", "error", unreadable)
	}
	links, err := e.cfg.Inventory.PodLinks(ctx)
	if err != nil {
		return fmt.Errorf("restore endpoints: %w", err)
	}
	var kept, gone []model.Endpoint
	for _, ep := range saved {
		if err := e.adopt(ep, links); err != nil {
			e.cfg.Log.Info("endpoint not restored", "endpoint", ep.ID, "pod", ep.PodName(), "interface", ep.IfName, "reason", err)
			gone = append(gone, ep)
			continue
		}
		if err := e.cfg.Programs.AttachPod(ep.Ifindex, ep.IfName); err != nil {
			e.cfg.Log.Error("endpoint without new programs: recreate its pod", "endpoint", ep.ID, "pod", ep.PodName(), "error", err)
			ep.State = model.EndpointDisconnected
		}
		kept = append(kept, ep)
	}
	for i := range kept {
		e.reroute(ctx, &kept[i])
	}
	e.fill(kept)
	for _, ep := range gone {
		if isHealth(ep) { // after the pods, which have precedence, and before requests are answered
			e.reserveHealth(ep)
		}
		if err := e.forget(ctx, ep, links); err != nil {
			e.cfg.Log.Warn("remains of an endpoint", "endpoint", ep.ID, "interface", ep.IfName, "error", err)
		}
	}
	if unreadable == nil {
		e.removeUnknown(ctx, kept, links)
	}
	e.finishDeletions(ctx)
	e.cfg.Log.Info("endpoints restored", "endpoints", len(kept), "gone", len(gone))
	return nil
}

// adopt takes the endpoint's number and addresses, or says why the endpoint is no more.
func (e *Endpoints) adopt(ep model.Endpoint, links map[string]int) error {
	ifindex, ok := links[ep.IfName]
	switch {
	case isHealth(ep):
		return errors.New("it ended with its agent")
	case !ok:
		return errors.New("its device is gone")
	case ifindex != ep.Ifindex:
		return fmt.Errorf("its device has interface number %d, not %d: another one", ifindex, ep.Ifindex)
	case !e.reserveID(ep.ID):
		return errors.New("its number is taken")
	}
	for i, addr := range ep.Addrs() {
		if err := e.cfg.Addresses.Reserve(addr, owner(ep)); err != nil {
			e.cfg.Addresses.Release(ep.Addrs()[:i]...)
			e.releaseID(ep.ID)
			return err
		}
	}
	return nil
}

// reroute gives the pod the route MTU of the node's present network, which is another after a change between tunnel and
// native routing. A pod that keeps its old one still works: the path tells it, packet by packet.
func (e *Endpoints) reroute(ctx context.Context, ep *model.Endpoint) {
	network, err := e.cfg.Network()
	if err != nil || ep.Network.MTU != network.MTU || ep.Network.RouteMTU == network.RouteMTU || ep.State != model.EndpointReady {
		return
	}
	changed := ep.Network
	changed.RouteMTU = network.RouteMTU
	netns, err := os.Open(ep.NetnsPath)
	if err == nil {
		err = e.cfg.Devices.RoutePod(ctx, netns, *ep, changed)
		netns.Close()
	}
	if err == nil {
		next := *ep
		next.Network = changed
		err = e.checkpoints.write(next)
	}
	if err != nil {
		e.cfg.Log.Warn("pod keeps the route MTU it had", "endpoint", ep.ID, "pod", ep.PodName(), "mtu", ep.Network.RouteMTU, "error", err)
		return
	}
	ep.Network = changed
}

// forget removes what an endpoint that was not adopted has left. Its number and addresses are not its own any more.
func (e *Endpoints) forget(ctx context.Context, ep model.Endpoint, links map[string]int) error {
	var problems []error
	if _, ok := links[ep.IfName]; ok {
		problems = append(problems, e.cfg.Devices.DeletePod(ctx, ep.IfName))
	}
	problems = append(problems, e.cfg.Programs.DetachPod(ep.Ifindex, ep.IfName), e.checkpoints.remove(ep.ID))
	return errors.Join(problems...)
}

// fill writes all rows in one transaction, together with the mark that the table is complete: rows of departed pods may
// be deleted from the maps from then on.
func (e *Endpoints) fill(kept []model.Endpoint) {
	tables := e.cfg.Tables
	state.Insert(tables.DB, tables.Endpoints, kept...)
	txn := tables.DB.WriteTxn(tables.Endpoints)
	e.complete(txn)
	txn.Commit()
}

// removeUnknown removes devices that carry our mark and belong to no endpoint: of an ADD that was interrupted. Not to be
// called while a checkpoint is unreadable, since its pod may be running.
func (e *Endpoints) removeUnknown(ctx context.Context, kept []model.Endpoint, links map[string]int) {
	known := map[string]bool{}
	for _, ep := range kept {
		known[ep.IfName] = true
	}
	for ifname, ifindex := range links {
		if known[ifname] {
			continue
		}
		err := errors.Join(e.cfg.Devices.DeletePod(ctx, ifname), e.cfg.Programs.DetachPod(ifindex, ifname))
		e.cfg.Log.Info("device of an unfinished ADD removed", "interface", ifname, "ifindex", ifindex, "error", err)
	}
}

// finishDeletions does the DELs that came while no agent ran. It comes after the socket is open, see cni.Deletion.
func (e *Endpoints) finishDeletions(ctx context.Context) {
	queued, err := cni.QueuedDeletions(e.cfg.Deletions)
	if err != nil {
		e.cfg.Log.Error("some queued deletions cannot be read", "error", err)
	}
	for _, d := range queued {
		if err := e.Delete(ctx, d.ContainerID, d.IfName); err != nil {
			e.cfg.Log.Warn("queued deletion", "container", d.ContainerID, "error", err)
		}
	}
}
