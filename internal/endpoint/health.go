// SPDX-License-Identifier: Apache-2.0

package endpoint

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"

	"github.com/lash-net/lash/internal/model"
)

// HealthIfName is the host side of the health endpoint's devices, as the field's users know it.
const HealthIfName = "lxc_health"

const (
	healthContainer = "health" // no runtime's: theirs are 64 hexadecimal digits
	healthOwner     = "health" // of addresses
)

func isHealth(ep model.Endpoint) bool { return ep.ContainerID == healthContainer }

// AddHealth attaches netns as the node's health endpoint, with the addresses of the one before if there was one.
// Repeated, it returns the endpoint that is there if it is intact, and makes it anew otherwise. To be called after
// Restored.
func (e *Endpoints) AddHealth(ctx context.Context, netns *os.File) (model.Endpoint, error) {
	const ifname = "eth0"
	defer e.lock(healthContainer, ifname)()
	network, err := e.cfg.Network()
	if err != nil {
		return model.Endpoint{}, err
	}
	if ep, ok := e.find(healthContainer, ifname); ok {
		if ep.State == model.EndpointReady && ep.Network == network && e.check(ctx, ep, netns) == nil {
			return ep, nil
		}
		if err := e.remove(ctx, ep); err != nil {
			return ep, fmt.Errorf("remove the health endpoint of before: %w", err)
		}
		e.reserveHealth(ep)
	}
	ep := model.Endpoint{
		ContainerID: healthContainer, ContainerIfName: ifname, IfName: HealthIfName, Network: network,
		Identity: model.IdentityHealth, State: model.EndpointCreating, CreatedAt: time.Now().UTC(),
	}
	if ep.ID, err = e.takeID(); err != nil {
		return ep, err
	}
	if ep, err = e.create(ctx, ep, netns); err != nil {
		back, cancel := context.WithTimeout(context.WithoutCancel(ctx), rollbackTimeout)
		defer cancel()
		if undo := e.remove(back, ep); undo != nil {
			err = errors.Join(err, fmt.Errorf("take back: %w", undo))
		} else {
			e.reserveHealth(ep)
		}
		return ep, fmt.Errorf("health endpoint: %w", err)
	}
	e.cfg.Log.Info("health endpoint created", "endpoint", ep.ID, "interface", ep.IfName, "ifindex", ep.Ifindex, "ipv4", ep.IPv4, "ipv6", ep.IPv6)
	return ep, nil
}

// RemoveHealth takes away the health endpoint and gives back its addresses; that there is none is no error.
func (e *Endpoints) RemoveHealth(ctx context.Context) error {
	const ifname = "eth0"
	defer e.lock(healthContainer, ifname)()
	if ep, ok := e.find(healthContainer, ifname); ok {
		if err := e.remove(ctx, ep); err != nil {
			return fmt.Errorf("remove the health endpoint: %w", err)
		}
	}
	e.cfg.Addresses.Release(e.takeHealthAddrs()...)
	return nil
}

// reserveHealth keeps the addresses of a health endpoint that is gone for the next: other nodes need not learn new ones
// because this one's agent was restarted. With other pod CIDRs or families, which show by the routers, they are not its own.
func (e *Endpoints) reserveHealth(gone model.Endpoint) {
	network, err := e.cfg.Network()
	if err != nil || network.Router4 != gone.Network.Router4 || network.Router6 != gone.Network.Router6 {
		return
	}
	addrs := gone.Addrs()
	for i, addr := range addrs {
		if err := e.cfg.Addresses.Reserve(addr, healthOwner); err != nil {
			e.cfg.Log.Info("the health endpoint gets another address", "address", addr, "reason", err)
			e.cfg.Addresses.Release(addrs[:i]...)
			return
		}
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.health = addrs
}

// takeHealthAddrs returns what reserveHealth has kept, once.
func (e *Endpoints) takeHealthAddrs() []netip.Addr {
	e.mu.Lock()
	defer e.mu.Unlock()
	kept := e.health
	e.health = nil
	return kept
}

// allocate gives an endpoint its addresses.
func (e *Endpoints) allocate(ep model.Endpoint) (v4, v6 netip.Addr, err error) {
	if isHealth(ep) {
		kept := e.takeHealthAddrs()
		for _, addr := range kept {
			if addr.Is4() {
				v4 = addr
			} else {
				v6 = addr
			}
		}
		if len(kept) > 0 {
			return v4, v6, nil
		}
	}
	return e.cfg.Addresses.Allocate(owner(ep))
}
