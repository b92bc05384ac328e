// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/lash-net/lash/internal/datapath"
	"github.com/lash-net/lash/internal/datapath/netdev"
	"github.com/lash-net/lash/internal/k8s"
	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/reconcile"
	"github.com/lash-net/lash/internal/state"
)

// waitUntilReady returns when pods can be served: those of before are restored, every row that is known is in the
// kernel, and the services are too.
func (a *agent) waitUntilReady(ctx context.Context, endpoints *reconcile.Loop[netip.Addr, model.LocalAddr], ipcache *reconcile.Loop[netip.Prefix, model.IPCacheEntry], devices *reconcile.Loop[int, model.Device]) error {
	select {
	case <-a.eps.Restored():
	case <-ctx.Done():
		return ctx.Err()
	}
	if err := errors.Join(endpoints.Sync(ctx), ipcache.Sync(ctx), devices.Sync(ctx)); err != nil {
		return err
	}
	return a.waitForServices(ctx)
}

// servicesPatience is how long an agent waits for what the API server says of services before it is ready with those of
// before. An API server that is away must not keep pods from starting.
const servicesPatience = 10 * time.Second

// waitForServices returns when the kernel has the services that the API server has: from then on no backend is chosen that
// was removed while no agent ran.
func (a *agent) waitForServices(ctx context.Context) error {
	if a.services == nil {
		return nil
	}
	complete, done := a.tables.ServicePorts.Initialized(a.tables.DB.ReadTxn())
	if !complete {
		var patience <-chan time.Time
		if !a.noServices {
			patience = time.After(servicesPatience)
		}
		a.phase.Store(&phase{waiting: "services have not been read from the API server yet", dp: a.dp})
		select {
		case <-done:
		case <-patience:
			a.log.Warn("services are those of before: the API server has not told them yet", "waited", servicesPatience)
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if err := a.services.Sync(ctx); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		a.log.Warn("services are not all served", "error", err) // the loop tries again and says so in the status
	}
	return nil
}

// sweep gives back the memory of connections that have expired.
func (a *agent) sweep(ctx context.Context) error {
	health := reconcile.Health{Name: "connection-sweep"}
	return a.dp.RunSweep(ctx, func(s datapath.Swept, err error) {
		if err != nil {
			health.Errors++
			health.Message, health.LastError = err.Error(), time.Now()
		} else {
			health.Errors, health.Message, health.LastSuccess = 0, "", time.Now()
			health.Rows = s.Connections
		}
		a.tables.Report(health)
	})
}

// followKernel acts on what others change in the kernel: routes and neighbours make decisions be made again, devices
// and addresses may come and go.
func (a *agent) followKernel(ctx context.Context, w *netdev.Watcher, base netdev.Base, devices *reconcile.Loop[int, model.Device], routes, serviceRoutes *reconcile.Loop[netip.Prefix, model.Route]) error {
	for {
		var c netdev.Change
		select {
		case <-ctx.Done():
			return nil
		case c = <-w.Changes():
		}
		if c.Links || c.Addrs || c.Lost {
			if err := a.refreshDevices(ctx, base, devices); err != nil {
				var restart errRestart
				if errors.As(err, &restart) {
					return err
				}
				a.log.Warn("change of devices not applied, will be with the next", "error", err)
			}
		}
		if c.Routes || c.Links || c.Lost {
			routes.Refresh()
		}
		if c.ServiceRoutes || c.Links || c.Addrs || c.Lost {
			serviceRoutes.Refresh()
		}
		if c == (netdev.Change{ServiceRoutes: true}) {
			continue // no decision depends on them
		}
		if err := a.dp.Raise("netlink"); err != nil {
			a.log.Error("decisions of connections were not invalidated", "why", "netlink", "error", err)
		}
	}
}

// refreshDevices makes rows and programs equal to the devices there are now.
func (a *agent) refreshDevices(ctx context.Context, base netdev.Base, devices *reconcile.Loop[int, model.Device]) error {
	n, _ := a.local(a.tables.DB.ReadTxn())
	before := state.Rows(a.tables.DB.ReadTxn(), a.tables.Devices)
	old := a.detection.Load()
	found, err := a.detect(n)
	if err != nil {
		return err
	}
	network := a.network.Load()
	now, err := a.host.EnsureBase(netdev.BaseConfig{Router4: network.Router4, Router6: network.Router6, MTU: found.MTU})
	if err != nil {
		return err
	}
	if len(now.Changes) > 0 {
		a.log.Warn("the node's own devices were changed by someone else and are mended", "changes", strings.Join(now.Changes, "; "))
	}
	was, _ := old.DirectRouting()
	is, _ := found.DirectRouting()
	switch {
	case now.HostIfindex != base.HostIfindex || now.HostMAC != base.HostMAC:
		return errRestart("device " + netdev.HostDevice + " was replaced")
	case was.Ifindex != is.Ifindex:
		return errRestart(fmt.Sprintf("the direct routing device changed from %q to %q", was.Name, is.Name))
	}
	if found.MTU != network.MTU {
		changed := *network
		changed.MTU, changed.RouteMTU = found.MTU, a.routeMTU(found.MTU)
		if _, err := a.updateLocal(func(n model.Node) model.Node { n.RouteMTU = changed.RouteMTU; return n }); err != nil {
			return err
		}
		a.network.Store(&changed)
		a.log.Info("mtu of new pods changed", "from", network.MTU, "to", found.MTU, "reason", found.MTUReason)
		if a.phase.Load().ready {
			if err := a.installation().WriteConf(); err != nil {
				return err
			}
		}
	}
	if err := a.mendTunnel(); err != nil {
		return err
	}
	if err := devices.Sync(ctx); err != nil {
		return err
	}
	var errs []error
	for _, d := range found.Devices {
		errs = append(errs, a.dp.AttachDevice(d.Ifindex, d.Name))
	}
	for _, d := range before {
		if !slices.ContainsFunc(found.Devices, func(x model.Device) bool { return x.Ifindex == d.Ifindex }) {
			a.log.Info("device is no longer used", "device", d.Name, "ifindex", d.Ifindex)
			errs = append(errs, a.dp.DetachDevice(d.Ifindex, d.Name))
		}
	}
	return errors.Join(append(errs, a.accelerate())...)
}

// apiHealth is what the last heartbeat found.
type apiHealth struct {
	version string
	err     error
	since   time.Time // of the error
}

// heartbeat asks the API server for its version now and then.
func (a *agent) heartbeat() *state.Task {
	return &state.Task{
		Name:     "k8s-heartbeat",
		Interval: 15 * time.Second,
		Do: func(ctx context.Context) error {
			ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
			defer cancel()
			version, err := a.api.Version(ctx)
			if err != nil {
				h := apiHealth{err: err, since: time.Now()}
				if prev := a.kubernetes.Load(); prev != nil && prev.err != nil {
					h.since = prev.since
				}
				a.kubernetes.Store(&h)
				return fmt.Errorf("API server %s: %w", a.api.Host, err)
			}
			a.kubernetes.Store(&apiHealth{version: version})
			return nil
		},
	}
}

// markNode removes the taint that keeps pods off the node and says that its network is available, as often as
// someone sets them otherwise.
func (a *agent) markNode() *state.Task {
	s := k8s.NodeState{RemoveTaint: a.cfg.AgentNotReadyTaintKey, Reason: "LashIsUp", Message: "Lash is running on this node"}
	return &state.Task{
		Name:   "mark-node-ready",
		Inputs: []state.Input{state.From(a.tables.NodeObjects.ToTable()), state.From(a.tables.Local.ToTable())},
		Do: func(ctx context.Context) error {
			txn := a.tables.DB.ReadTxn()
			own, _, ok := a.tables.NodeObjects.Get(txn, state.NodeObjectBySource(model.SourceKubernetes, a.name))
			if !ok || own.NetworkOK && !slices.Contains(own.Taints, s.RemoveTaint) {
				return nil
			}
			if err := a.api.MarkNodeReady(ctx, a.name, s); err != nil {
				return err
			}
			a.log.Info("node is marked ready", "node", a.name, "taintRemoved", slices.Contains(own.Taints, s.RemoveTaint))
			return nil
		},
	}
}

// cgroupRoot is the directory the socket programs are attached to: the configured one, else the mounted cgroup2
// hierarchy with the widest view.
func cgroupRoot(configured string) (string, error) {
	if configured != "" {
		return configured, nil
	}
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return "", fmt.Errorf("find the cgroup hierarchy: %w; set cgroup-root", err)
	}
	defer f.Close()
	path := widestCgroup2(f)
	if path == "" {
		return "", errors.New("no cgroup2 hierarchy is mounted: mount one and set cgroup-root")
	}
	return path, nil
}

// widestCgroup2 is the mount point of the cgroup2 hierarchy with the widest view, of the lines of mountinfo(5). A root
// like /../.. shows a hierarchy from inside a cgroup namespace, and /kubepods/... a part of it; the shortest is the widest.
func widestCgroup2(mountinfo io.Reader) string {
	best, bestRoot := "", ""
	for lines := bufio.NewScanner(mountinfo); lines.Scan(); {
		before, after, ok := strings.Cut(lines.Text(), " - ")
		fields := strings.Fields(before)
		if !ok || len(fields) < 5 || !strings.HasPrefix(after, "cgroup2 ") {
			continue
		}
		if root := fields[3]; best == "" || len(root) < len(bestRoot) {
			best, bestRoot = fields[4], root
		}
	}
	return best
}
