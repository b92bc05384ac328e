// SPDX-License-Identifier: Apache-2.0

package model

import "net/netip"

// PodNetwork is what all pods of a node share.
type PodNetwork struct {
	Router4, Router6 netip.Addr // the node's lash_host addresses; invalid if the family is off
	MTU              int        // of the pods' devices, bytes
	RouteMTU         int        // of the pods' default routes, bytes; 0: they name none
}

// Router is the router address of the family of a, invalid if the family is off.
func (n PodNetwork) Router(a netip.Addr) netip.Addr {
	if a.Is4() {
		return n.Router4
	}
	return n.Router6
}
