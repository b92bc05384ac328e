// SPDX-License-Identifier: Apache-2.0

package model

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
)

// IP protocol numbers of services.
const (
	ProtoTCP  uint8 = 6
	ProtoUDP  uint8 = 17
	ProtoSCTP uint8 = 132
)

// ProtoName is "TCP", "UDP", "SCTP" or the decimal number.
func ProtoName(p uint8) string {
	switch p {
	case ProtoTCP:
		return "TCP"
	case ProtoUDP:
		return "UDP"
	case ProtoSCTP:
		return "SCTP"
	}
	return strconv.Itoa(int(p))
}

// L4 is a transport protocol and port.
type L4 struct {
	Proto uint8
	Port  uint16
}

// Types of a frontend, as the field's users know them.
const (
	TypeClusterIP    = "ClusterIP"
	TypeNodePort     = "NodePort"
	TypeLoadBalancer = "LoadBalancer"
	TypeExternalIPs  = "ExternalIPs"
	TypeHostPort     = "HostPort"
)

// FrontendKey is an address and port that is translated to backends. The unspecified address of a family stands for
// every address of the node.
type FrontendKey struct {
	Addr netip.Addr
	L4
}

// String is "10.96.0.1:443/TCP".
func (f FrontendKey) String() string {
	return fmt.Sprintf("%s/%s", netip.AddrPortFrom(f.Addr, f.Port), ProtoName(f.Proto))
}

// Compare orders frontends by address, port and protocol.
func (f FrontendKey) Compare(o FrontendKey) int {
	return cmp.Or(f.Addr.Compare(o.Addr), cmp.Compare(f.Port, o.Port), cmp.Compare(f.Proto, o.Proto))
}

// Frontend is one of the frontends of a service port, and who is served by it.
type Frontend struct {
	FrontendKey
	Type     string
	Outside  bool // for packets from outside the node too
	LocalOut bool // those go to backends of this node only
	LocalIn  bool // connections from inside, too
	Ranges   bool // from outside only for sources in the service port's Ranges
	Deny     bool // with Ranges: only for sources that are not
	Maglev   bool // from outside the backend is chosen by a Maglev table
	DSR      bool // backends of other nodes answer clients outside directly
	Node     bool // the address is a node's, this one's or another's
}

// Flags names what the frontend does beyond translating what comes from inside.
func (f Frontend) Flags() []string {
	var out []string
	for _, flag := range []struct {
		set  bool
		name string
	}{
		{!f.Outside, "non-routable"}, {f.LocalOut, "external-local"}, {f.LocalIn, "internal-local"}, {f.Ranges, "check source-range"},
		{f.Deny, "deny"},
		{f.Maglev, "maglev"}, {f.DSR, "dsr"},
	} {
		if flag.set {
			out = append(out, flag.name)
		}
	}
	return out
}

// Backend is an endpoint of a service port. One that is neither in the cluster's nor in this node's set gets no new
// connections and keeps those it has.
type Backend struct {
	Addr        netip.Addr
	Port        uint16
	Cluster     bool // in the set that serves the cluster
	Local       bool // in the set that serves where only this node's endpoints may
	Host        bool // its address is this node's own
	Terminating bool
}

// Active reports whether it gets new connections.
func (b Backend) Active() bool { return b.Cluster || b.Local }

// State is the word for it that the field's users know.
func (b Backend) State() string {
	switch {
	case b.Terminating:
		return "terminating"
	case b.Active():
		return "active"
	}
	return "not ready"
}

// String is "10.244.1.9:8080 (active)".
func (b Backend) String() string {
	return fmt.Sprintf("%s (%s)", netip.AddrPortFrom(b.Addr, b.Port), b.State())
}

// Compare orders backends by address and port.
func (b Backend) Compare(o Backend) int {
	return cmp.Or(b.Addr.Compare(o.Addr), cmp.Compare(b.Port, o.Port))
}

// ServicePort is one port of a service for one family: frontends that share backends. The HostPorts of a pod are service
// ports of their own.
type ServicePort struct {
	ID        uint32 // stable while one of its frontends exists, also across agent restarts
	Namespace string
	Name      string // of the service, or of the pod
	Port      string // name of the port
	Proto     uint8
	IPv6      bool
	Affinity  uint32 // seconds for which a client keeps its backend; 0: none
	Frontends []Frontend
	Backends  []Backend      // sorted by Compare
	Ranges    []netip.Prefix // sources that frontends with Ranges serve, or keep out
}

// Equal reports whether nothing differs.
func (s ServicePort) Equal(o ServicePort) bool {
	return s.ID == o.ID && s.Namespace == o.Namespace && s.Name == o.Name && s.Port == o.Port && s.Proto == o.Proto && s.IPv6 == o.IPv6 &&
		s.Affinity == o.Affinity && slices.Equal(s.Frontends, o.Frontends) && slices.Equal(s.Backends, o.Backends) && slices.Equal(s.Ranges, o.Ranges)
}
