// SPDX-License-Identifier: Apache-2.0

package model

import (
	"net/netip"
	"time"
)

// States of an endpoint.
const (
	EndpointCreating     = "creating"
	EndpointReady        = "ready"
	EndpointDisconnected = "disconnected"
	EndpointDeleting     = "deleting"
)

// Endpoint is a pod's network life on this node. Its JSON form is also the checkpoint format under state-dir.
type Endpoint struct {
	ID          uint16 // node-local number, 1 to 65535, shown as ENDPOINT
	ContainerID string
	Namespace   string
	Pod         string
	UID         string

	NetnsPath       string
	ContainerIfName string // "eth0" in the pod
	IfName          string // "lxc" and 12 hex digits on the host
	Ifindex         int    // of IfName, in the host's namespace
	PeerIfindex     int    // of ContainerIfName, in the pod's namespace
	MAC             MAC    // pod side
	NodeMAC         MAC    // host side

	IPv4 netip.Addr // invalid if the family is off
	IPv6 netip.Addr

	Network PodNetwork // as it was when the pod was attached

	Identity  Identity
	Labels    map[string]string
	State     string
	CreatedAt time.Time
}

// PodName is "namespace/pod".
func (e Endpoint) PodName() string { return e.Namespace + "/" + e.Pod }

// Addrs are the addresses the endpoint has, IPv4 first.
func (e Endpoint) Addrs() []netip.Addr {
	addrs := make([]netip.Addr, 0, 2)
	for _, a := range [...]netip.Addr{e.IPv4, e.IPv6} {
		if a.IsValid() {
			addrs = append(addrs, a)
		}
	}
	return addrs
}

// LocalAddr is one address of this node as the datapath's endpoints map has it, keyed by netip.Addr.
type LocalAddr struct {
	EndpointID uint16
	Ifindex    int
	Identity   Identity
	MAC        MAC
	NodeMAC    MAC
	Host       bool // an address of the node itself: the router's or a device's
	NodePort   bool // of which NodePorts are served
}
