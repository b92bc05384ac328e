// SPDX-License-Identifier: Apache-2.0

package model

import (
	"fmt"
	"net/netip"
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

// Scopes of a frontend.
const (
	ScopeExternal uint8 = 0
	ScopeInternal uint8 = 1
)

// Frontend is the key of a service row: an address that is translated to backends.
type Frontend struct {
	Addr netip.Addr
	L4
	Scope uint8
}

// String is "10.96.0.1:443/TCP".
func (f Frontend) String() string {
	return fmt.Sprintf("%s/%s", netip.AddrPortFrom(f.Addr, f.Port), ProtoName(f.Proto))
}

// Compare orders frontends by address, port, protocol and scope.
func (f Frontend) Compare(o Frontend) int {
	if c := f.Addr.Compare(o.Addr); c != 0 {
		return c
	}
	if c := int(f.Port) - int(o.Port); c != 0 {
		return c
	}
	if c := int(f.Proto) - int(o.Proto); c != 0 {
		return c
	}
	return int(f.Scope) - int(o.Scope)
}

// States of a backend.
const (
	BackendActive      = "active"
	BackendTerminating = "terminating"
)

// Backend is one address a frontend is translated to.
type Backend struct {
	Addr  netip.Addr
	Port  uint16
	Proto uint8
	State string // BackendActive or BackendTerminating
}

// String is "10.244.1.9:8080/TCP (active)".
func (b Backend) String() string {
	return fmt.Sprintf("%s/%s (%s)", netip.AddrPortFrom(b.Addr, b.Port), ProtoName(b.Proto), b.State)
}

// Compare orders backends by address, port and protocol.
func (b Backend) Compare(o Backend) int {
	if c := b.Addr.Compare(o.Addr); c != 0 {
		return c
	}
	if c := int(b.Port) - int(o.Port); c != 0 {
		return c
	}
	return int(b.Proto) - int(o.Proto)
}

// TypeClusterIP is the type of a frontend on a service's cluster IP.
const TypeClusterIP = "ClusterIP"

// FrontendEntry is what a frontend is translated to.
type FrontendEntry struct {
	ID        uint32 // stable while the frontend exists, also across agent restarts
	Type      string // TypeClusterIP
	Namespace string
	Name      string
	PortName  string
	Backends  []Backend // sorted
}

// Equal reports whether two entries are the same, backends in order included.
func (e FrontendEntry) Equal(o FrontendEntry) bool {
	if e.ID != o.ID || e.Type != o.Type || e.Namespace != o.Namespace || e.Name != o.Name || e.PortName != o.PortName || len(e.Backends) != len(o.Backends) {
		return false
	}
	for i := range e.Backends {
		if e.Backends[i] != o.Backends[i] {
			return false
		}
	}
	return true
}
