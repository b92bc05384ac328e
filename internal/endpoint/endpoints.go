// SPDX-License-Identifier: Apache-2.0

package endpoint

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/cilium/statedb"

	"github.com/lash-net/lash/internal/cni"
	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/state"
)

// Addresses hands out the node's addresses; ipam.Allocator does.
type Addresses interface {
	Allocate(owner string) (v4, v6 netip.Addr, err error)
	Reserve(addr netip.Addr, owner string) error
	Release(addrs ...netip.Addr)
}

// Devices makes and removes pods' devices; netdev.Host does.
type Devices interface {
	// CreatePod makes the pair, both sides down, and returns the endpoint with numbers and hardware addresses. It
	// replaces a host side of that name which an earlier attempt has left.
	CreatePod(ctx context.Context, netns *os.File, ep model.Endpoint, network model.PodNetwork) (model.Endpoint, error)
	// StartPod sets addresses and routes and takes the pair up.
	StartPod(ctx context.Context, netns *os.File, ep model.Endpoint, network model.PodNetwork) error
	// RoutePod replaces the pod's routes by those of another network of the same routers.
	RoutePod(ctx context.Context, netns *os.File, ep model.Endpoint, network model.PodNetwork) error
	CheckPod(ctx context.Context, netns *os.File, ep model.Endpoint, network model.PodNetwork) error
	// DeletePod removes the pair; that it is gone already is no error.
	DeletePod(ctx context.Context, ifname string) error
}

// Inventory lists the pods' devices that are recognisably ours: interface numbers by name. netdev.Host does.
type Inventory interface {
	PodLinks(ctx context.Context) (map[string]int, error)
}

// Programs attaches the datapath to a pod's device; datapath.Datapath does. DetachPod is called when the device is gone
// already and removes what is pinned for it.
type Programs interface {
	AttachPod(ifindex int, ifname string) error
	DetachPod(ifindex int, ifname string) error
}

// attachChecker may be implemented by Programs; CHECK asks it.
type attachChecker interface {
	Attached(ifindex int, ifname string) error
}

// Rows waits until the datapath's endpoints map agrees with the endpoints table on some addresses; the map's
// reconcile.Loop does.
type Rows interface {
	Sync(ctx context.Context, addrs ...netip.Addr) error
}

// Config is what pods' lives depend on.
type Config struct {
	Tables    *state.Tables
	Addresses Addresses
	Devices   Devices
	Inventory Inventory
	Programs  Programs
	Rows      Rows
	// Network is what new pods get, or why the node cannot take pods yet.
	Network func() (model.PodNetwork, error)
	// Identify gives a new endpoint its identity and labels; nil, and endpoints begin with the identity init.
	Identify func(model.Endpoint) (model.Identity, map[string]string)

	Socket    string // where the plugin finds us
	StateDir  string // checkpoints are in "endpoints" below it
	Deletions string // the plugin's queue
	Log       *slog.Logger
}

// Endpoints are the pods of this node.
type Endpoints struct {
	cfg         Config
	checkpoints checkpoints
	restored    chan struct{} // closed when the table is complete and requests are served
	complete    func(statedb.WriteTxn)

	mu     sync.Mutex
	ids    map[uint16]struct{}
	health []netip.Addr        // of the health endpoint of before, reserved
	last   uint16              // the number given out last: a number rests as long as possible
	locks  map[string]*keyLock // by attachment
}

type keyLock struct {
	mu    sync.Mutex
	users int
}

// New announces that the endpoints table is complete only after Run has restored it.
func New(cfg Config) (*Endpoints, error) {
	store, err := newCheckpoints(cfg.StateDir)
	if err != nil {
		return nil, err
	}
	txn := cfg.Tables.DB.WriteTxn(cfg.Tables.Endpoints)
	defer txn.Commit()
	return &Endpoints{
		cfg: cfg, checkpoints: store, restored: make(chan struct{}),
		complete: cfg.Tables.Endpoints.RegisterInitializer(txn, "endpoint"),
		ids:      map[uint16]struct{}{}, locks: map[string]*keyLock{},
	}, nil
}

// Restored is closed when the endpoints of before the start are in the table.
func (e *Endpoints) Restored() <-chan struct{} { return e.restored }

// hostIfName is the name of the host side: stable, so that a repeated ADD finds it and a DEL needs no memory.
func hostIfName(containerID, ifname string) string {
	if containerID == healthContainer {
		return HealthIfName
	}
	sum := sha256.Sum256([]byte(containerID + "/" + ifname))
	return fmt.Sprintf("lxc%x", sum[:6])
}

// Add attaches a pod. Repeated, it returns the endpoint that is there if it is intact, and makes it anew otherwise.
func (e *Endpoints) Add(ctx context.Context, req *cni.Request, netns *os.File) (model.Endpoint, error) {
	defer e.lock(req.ContainerID, req.IfName)()
	if ep, ok := e.find(req.ContainerID, req.IfName); ok {
		if ep.State == model.EndpointReady && e.check(ctx, ep, netns) == nil {
			return ep, nil
		}
		if err := e.remove(ctx, ep); err != nil {
			return ep, fmt.Errorf("remove what is left of an earlier ADD: %w", err)
		}
	}
	network, err := e.network(req)
	if err != nil {
		return model.Endpoint{}, err
	}
	ep := model.Endpoint{
		ContainerID: req.ContainerID, Namespace: req.Pod.Namespace, Pod: req.Pod.Name, UID: req.Pod.UID,
		NetnsPath: req.Netns, ContainerIfName: req.IfName, IfName: hostIfName(req.ContainerID, req.IfName),
		Network: network, Identity: model.IdentityInit, State: model.EndpointCreating, CreatedAt: time.Now().UTC(),
	}
	if ep.ID, err = e.takeID(); err != nil {
		return ep, err
	}
	if ep, err = e.create(ctx, ep, netns); err != nil {
		// The caller's deadline may be what failed: taking back has its own.
		back, cancel := context.WithTimeout(context.WithoutCancel(ctx), rollbackTimeout)
		defer cancel()
		if undo := e.remove(back, ep); undo != nil {
			err = errors.Join(err, fmt.Errorf("take back: %w", undo))
		}
		return ep, err
	}
	e.cfg.Log.Info("endpoint created", "endpoint", ep.ID, "pod", ep.PodName(), "interface", ep.IfName, "ifindex", ep.Ifindex,
		"ipv4", ep.IPv4, "ipv6", ep.IPv6, "duration", time.Since(ep.CreatedAt))
	return ep, nil
}

// create goes through the steps of an ADD in the only order in which no packet flows too early: devices exist, then
// programs and rows, then the devices are up, then there is a checkpoint. Whatever step fails, remove undoes it.
func (e *Endpoints) create(ctx context.Context, ep model.Endpoint, netns *os.File) (model.Endpoint, error) {
	v4, v6, err := e.allocate(ep)
	if err != nil {
		return ep, err
	}
	ep.IPv4, ep.IPv6 = v4, v6
	if v6.IsValid() && ep.Network.MTU < minMTU6 {
		return ep, cni.Errorf(cni.CodeInvalidConfig, "mtu %d is too small for IPv6", ep.Network.MTU).
			With("use %d or more, or set enable-ipv6 to false", minMTU6)
	}
	if e.cfg.Identify != nil && !isHealth(ep) {
		ep.Identity, ep.Labels = e.cfg.Identify(ep)
	}
	if ep, err = e.cfg.Devices.CreatePod(ctx, netns, ep, ep.Network); err != nil {
		return ep, err
	}
	if err := e.cfg.Programs.AttachPod(ep.Ifindex, ep.IfName); err != nil {
		return ep, fmt.Errorf("attach programs to %s: %w", ep.IfName, err)
	}
	e.write(ep)
	if err := e.cfg.Rows.Sync(ctx, ep.Addrs()...); err != nil {
		return ep, fmt.Errorf("rows of the endpoint in the datapath: %w", err)
	}
	if err := e.cfg.Devices.StartPod(ctx, netns, ep, ep.Network); err != nil {
		return ep, err
	}
	ready := ep
	ready.State = model.EndpointReady
	if err := e.checkpoints.write(ready); err != nil {
		return ep, err
	}
	e.write(ready)
	return ready, nil
}

// Delete detaches a pod. That it is not known is no error: then what its name may have left is removed.
func (e *Endpoints) Delete(ctx context.Context, containerID, ifname string) error {
	defer e.lock(containerID, ifname)()
	ep, known := e.find(containerID, ifname)
	var err error
	if known {
		err = e.remove(ctx, ep)
	} else {
		err = e.cfg.Devices.DeletePod(ctx, hostIfName(containerID, ifname))
	}
	if err != nil {
		return err
	}
	if known {
		e.cfg.Log.Info("endpoint deleted", "endpoint", ep.ID, "pod", ep.PodName(), "interface", ep.IfName)
	}
	return cni.Deletion{ContainerID: containerID, IfName: ifname}.Done(e.cfg.Deletions)
}

// remove takes an endpoint away in the reverse order of create, from whatever step it has reached; the device goes
// first, and with it the packets. While the device cannot be removed, everything else stays, too: its address must not
// go to another pod.
func (e *Endpoints) remove(ctx context.Context, ep model.Endpoint) error {
	ep.State = model.EndpointDeleting
	if err := e.cfg.Devices.DeletePod(ctx, ep.IfName); err != nil {
		e.write(ep)
		return err
	}
	var problems []error
	if ep.Ifindex != 0 {
		if err := e.cfg.Programs.DetachPod(ep.Ifindex, ep.IfName); err != nil {
			problems = append(problems, fmt.Errorf("detach programs from %s: %w", ep.IfName, err))
		}
	}
	state.Delete(e.cfg.Tables.DB, e.cfg.Tables.Endpoints, ep)
	if addrs := ep.Addrs(); len(addrs) > 0 {
		if err := e.cfg.Rows.Sync(ctx, addrs...); err != nil {
			// The loop goes on trying, and the next owner of the address replaces the row.
			e.cfg.Log.Warn("row of a deleted endpoint stays for now", "endpoint", ep.ID, "error", err)
		}
		e.cfg.Addresses.Release(addrs...)
	}
	if err := e.checkpoints.remove(ep.ID); err != nil {
		problems = append(problems, err)
	}
	e.releaseID(ep.ID)
	return errors.Join(problems...)
}

// Check verifies an attachment: what the runtime remembers of it, devices, addresses, routes, programs and rows.
func (e *Endpoints) Check(ctx context.Context, req *cni.Request, netns *os.File) error {
	defer e.lock(req.ContainerID, req.IfName)()
	ep, ok := e.find(req.ContainerID, req.IfName)
	if !ok {
		return cni.Errorf(cni.CodeUnknownContainer, "CNI_CONTAINERID %s has no endpoint with CNI_IFNAME %s on this node", req.ContainerID, req.IfName).
			With("recreate the pod")
	}
	problems := []error{e.check(ctx, ep, netns)}
	for _, ip := range req.PrevResult.IPs {
		prefix, err := netip.ParsePrefix(ip.Address)
		if err != nil || !slices.Contains(ep.Addrs(), prefix.Addr()) {
			problems = append(problems, fmt.Errorf("prevResult: address %s is not of this endpoint (%v)", ip.Address, ep.Addrs()))
		}
	}
	if err := errors.Join(problems...); err != nil {
		return cni.Errorf(cni.CodeCheckFailed, "endpoint %d: %v", ep.ID, err).With("recreate the pod")
	}
	return nil
}

func (e *Endpoints) check(ctx context.Context, ep model.Endpoint, netns *os.File) error {
	problems := []error{e.cfg.Devices.CheckPod(ctx, netns, ep, ep.Network)}
	if checker, ok := e.cfg.Programs.(attachChecker); ok {
		problems = append(problems, checker.Attached(ep.Ifindex, ep.IfName))
	}
	problems = append(problems, e.cfg.Rows.Sync(ctx, ep.Addrs()...))
	return errors.Join(problems...)
}

// GC removes the endpoints that are not among the valid attachments, those excepted that came after it began.
func (e *Endpoints) GC(ctx context.Context, valid []cni.Attachment) error {
	keep := make(map[cni.Attachment]struct{}, len(valid))
	for _, a := range valid {
		keep[a] = struct{}{}
	}
	var problems []error
	for ep := range e.cfg.Tables.Endpoints.All(e.cfg.Tables.DB.ReadTxn()) {
		attachment := cni.Attachment{ContainerID: ep.ContainerID, IfName: ep.ContainerIfName}
		if _, ok := keep[attachment]; ok || ep.State == model.EndpointCreating || isHealth(ep) {
			continue
		}
		if err := e.Delete(ctx, ep.ContainerID, ep.ContainerIfName); err != nil {
			problems = append(problems, fmt.Errorf("endpoint %d of container %s: %w", ep.ID, ep.ContainerID, err))
		}
	}
	return errors.Join(problems...)
}

// Status returns nil if the node can take pods, else the reason why not.
func (e *Endpoints) Status() error {
	select {
	case <-e.restored:
	default:
		return errors.New("the agent has just started and is restoring its endpoints")
	}
	_, err := e.cfg.Network()
	return err
}

// SetIdentity records what a pod's labels have come to; an endpoint that is gone is no error.
func (e *Endpoints) SetIdentity(id uint16, identity model.Identity, labels map[string]string) error {
	tables := e.cfg.Tables
	ep, _, ok := tables.Endpoints.Get(tables.DB.ReadTxn(), state.EndpointByID(id))
	if !ok {
		return nil
	}
	defer e.lock(ep.ContainerID, ep.ContainerIfName)()
	ep, _, ok = tables.Endpoints.Get(tables.DB.ReadTxn(), state.EndpointByID(id))
	if !ok || ep.State != model.EndpointReady {
		return nil
	}
	ep.Identity, ep.Labels = identity, labels
	if err := e.checkpoints.write(ep); err != nil {
		return err
	}
	e.write(ep)
	return nil
}

const (
	minMTU6         = 1280 // RFC 8200, section 5
	rollbackTimeout = 10 * time.Second
)

func (e *Endpoints) network(req *cni.Request) (model.PodNetwork, error) {
	network, err := e.cfg.Network()
	if err != nil {
		return network, cni.Errorf(cni.CodeTryAgainLater, "the node cannot take pods yet: %v", err).With("the runtime tries again by itself")
	}
	if req.MTU > network.MTU {
		return network, cni.Errorf(cni.CodeInvalidConfig, "mtu %d is more than the node's %d", req.MTU, network.MTU).
			With("use at most %d, or leave it out to let the agent choose", network.MTU)
	}
	if req.MTU != 0 {
		network.MTU = req.MTU
	}
	if req.RouteMTU != 0 {
		network.RouteMTU = req.RouteMTU
	}
	if network.RouteMTU > network.MTU {
		return network, cni.Errorf(cni.CodeInvalidConfig, "route-mtu %d is more than the device's %d", network.RouteMTU, network.MTU).
			With("use at most %d, or leave it out", network.MTU)
	}
	return network, nil
}

func owner(ep model.Endpoint) string {
	if isHealth(ep) {
		return healthOwner
	}
	if ep.Pod == "" {
		return ep.ContainerID + "/" + ep.ContainerIfName
	}
	return ep.PodName()
}

func (e *Endpoints) find(containerID, ifname string) (model.Endpoint, bool) {
	tables := e.cfg.Tables
	for ep := range tables.Endpoints.List(tables.DB.ReadTxn(), state.EndpointByContainer(containerID)) {
		if ep.ContainerIfName == ifname {
			return ep, true
		}
	}
	return model.Endpoint{}, false
}

func (e *Endpoints) write(ep model.Endpoint) {
	state.Insert(e.cfg.Tables.DB, e.cfg.Tables.Endpoints, ep)
}

// lock makes the calls for one attachment one after the other and returns the function that unlocks.
func (e *Endpoints) lock(containerID, ifname string) (unlock func()) {
	key := containerID + "/" + ifname
	e.mu.Lock()
	l := e.locks[key]
	if l == nil {
		l = &keyLock{}
		e.locks[key] = l
	}
	l.users++
	e.mu.Unlock()
	l.mu.Lock()
	return func() {
		l.mu.Unlock()
		e.mu.Lock()
		defer e.mu.Unlock()
		if l.users--; l.users == 0 {
			delete(e.locks, key)
		}
	}
}

func (e *Endpoints) takeID() (uint16, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for range 1 << 16 {
		e.last++
		if _, used := e.ids[e.last]; e.last != 0 && !used {
			e.ids[e.last] = struct{}{}
			return e.last, nil
		}
	}
	return 0, errors.New("all 65535 endpoint numbers of this node are in use")
}

// reserveID reports whether the number was free.
func (e *Endpoints) reserveID(id uint16) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if _, used := e.ids[id]; used || id == 0 {
		return false
	}
	e.ids[id] = struct{}{}
	e.last = max(e.last, id)
	return true
}

func (e *Endpoints) releaseID(id uint16) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.ids, id)
}
