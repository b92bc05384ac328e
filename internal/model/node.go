// SPDX-License-Identifier: Apache-2.0

package model

import "net/netip"

// Where a node row came from, as the node list shows it.
const (
	SourceLocal          = "local"
	SourceCustomResource = "custom-resource" // CiliumNode
	SourceKubernetes     = "k8s"             // core/v1 Node
)

// Node is a node of the cluster.
type Node struct {
	Name     string
	Addrs    []netip.Addr      // InternalIPs, IPv4 first
	PodCIDRs []netip.Prefix    // IPv4 first
	Routers  []netip.Addr      // CiliumInternalIPs, IPv4 first
	Health   []netip.Addr      // of its health endpoint, IPv4 first; empty: it has none
	Tunnel   string            // protocol and port by which it takes encapsulated packets, "vxlan:8472"; empty: it takes none
	Zone     string            // known of the local node only
	Labels   map[string]string // known of the local node only; nil: not yet
	RouteMTU int               // of routes through the tunnel, bytes; known of the local node only
	Local    bool
	Source   string
}

// IPv4 is the node's first IPv4 address, invalid if it has none.
func (n Node) IPv4() netip.Addr { return firstAddr(n.Addrs, true) }

// IPv6 is the node's first IPv6 address, invalid if it has none.
func (n Node) IPv6() netip.Addr { return firstAddr(n.Addrs, false) }

// AddrFor is the node's first address of the family of a, invalid if it has none.
func (n Node) AddrFor(a netip.Addr) netip.Addr { return firstAddr(n.Addrs, a.Is4()) }

func firstAddr(addrs []netip.Addr, v4 bool) netip.Addr {
	for _, a := range addrs {
		if a.Is4() == v4 {
			return a
		}
	}
	return netip.Addr{}
}

// IPCacheEntry says who is behind a prefix, keyed by netip.Prefix.
type IPCacheEntry struct {
	Identity Identity
	Node     netip.Addr // address of the node that has the prefix; invalid for this node and for the world
	Tunnel   bool       // packets to the prefix are encapsulated to Node
	Peer     bool       // an address of another node itself: it may send encapsulated packets
	Source   string
}

// Scopes of a route.
const (
	ScopeGlobal = "global"
	ScopeLink   = "link"
)

// Route is a wanted row of the main routing table, keyed by its destination netip.Prefix. Every such route carries
// Lash's own protocol number.
type Route struct {
	Via   netip.Addr // invalid: directly on Dev
	Dev   string     // device name
	Src   netip.Addr // preferred source; invalid: the kernel chooses
	MTU   int        // 0: the device's
	Scope string     // ScopeGlobal or ScopeLink
}

// Device is a network device of the node that Lash attaches programs to.
type Device struct {
	Ifindex       int
	Name          string
	MAC           MAC
	MTU           int
	IPv4, IPv6    netip.Addr     // masquerade addresses
	Addrs         []netip.Prefix // every address with its prefix length
	DirectRouting bool           // nodes reach each other through it
	Reason        string         // why it was selected, for status
}

// Controller is the health of one loop, shown in "Controller Status".
type Controller struct {
	Name        string
	Rows        int   // rows the loop keeps
	Failing     int   // rows that failed last time
	LastSuccess int64 // Unix nanoseconds, 0: never
	LastError   int64
	Errors      uint64 // consecutive failed passes
	Message     string // the last error; "no error" if the last pass had none
}
