// SPDX-License-Identifier: Apache-2.0

package state

import (
	"maps"
	"net/netip"
	"slices"

	"github.com/cilium/statedb"

	"github.com/lash-net/lash/internal/model"
)

// NodeObject is a Node or a CiliumNode of the API server, its addresses parsed.
type NodeObject struct {
	Source    string // model.SourceKubernetes or model.SourceCustomResource
	Name      string
	UID       string
	OwnerUID  string         // CiliumNode: of the Node it belongs to
	Addrs     []netip.Addr   // InternalIPs in the object's order
	Routers   []netip.Addr   // CiliumInternalIPs
	Health    []netip.Addr   // CiliumNode: of its health endpoint
	PodCIDRs  []netip.Prefix // in the object's order
	Tunnel    string         // CiliumNode: v2.TunnelAnnotation
	Error     string         // CiliumNode: why the operator could not give pod CIDRs
	Taints    []string       // Node: keys
	NetworkOK bool           // Node: condition NetworkUnavailable is False
	Leaving   bool           // Node: it is being deleted, or the autoscaler is about to
	Zone      string         // Node: label topology.kubernetes.io/zone

	Labels map[string]string // Node: of this node only

	NonMasquerade []netip.Prefix // Node: annotation, destinations to which its pods keep their addresses
}

// NodeObjectKey is the key of a row of NodeObjects.
func NodeObjectKey(source, name string) string { return source + "/" + name }

var nodeObjectByKey = byString("key", func(r NodeObject) string { return NodeObjectKey(r.Source, r.Name) })

// NodeObjectBySource finds a node object by NodeObjectKey.
func NodeObjectBySource(source, name string) statedb.Query[NodeObject] {
	return nodeObjectByKey.Query(NodeObjectKey(source, name))
}

func newNodeObjects(db *statedb.DB) (statedb.RWTable[NodeObject], error) {
	return statedb.NewTableAny(db, "node-objects",
		func() []string {
			return []string{"Source", "Name", "Addresses", "Routers", "Health", "PodCIDRs", "Tunnel", "Error"}
		},
		func(r NodeObject) []string {
			return []string{r.Source, r.Name, joined(r.Addrs), joined(r.Routers), joined(r.Health), joined(r.PodCIDRs), r.Tunnel, r.Error}
		}, nodeObjectByKey)
}

// Equal reports whether nothing that a reader could see differs.
func (r NodeObject) Equal(o NodeObject) bool {
	return r.Source == o.Source && r.Name == o.Name && r.UID == o.UID && r.OwnerUID == o.OwnerUID && r.Tunnel == o.Tunnel && r.Error == o.Error && r.NetworkOK == o.NetworkOK && r.Leaving == o.Leaving && r.Zone == o.Zone &&
		slices.Equal(r.Addrs, o.Addrs) && slices.Equal(r.Routers, o.Routers) && slices.Equal(r.Health, o.Health) && slices.Equal(r.PodCIDRs, o.PodCIDRs) && slices.Equal(r.Taints, o.Taints) &&
		slices.Equal(r.NonMasquerade, o.NonMasquerade) && maps.Equal(r.Labels, o.Labels)
}

// Node is a row of the merged nodes.
type Node = model.Node

var nodeByName = byString("name", func(r Node) string { return r.Name })

// NodeByName finds a node by its name.
func NodeByName(name string) statedb.Query[Node] { return nodeByName.Query(name) }

func newNodes(db *statedb.DB) (statedb.RWTable[Node], error) { return newNodeTable(db, "nodes") }

func newLocal(db *statedb.DB) (statedb.RWTable[Node], error) { return newNodeTable(db, "local-node") }

func newNodeTable(db *statedb.DB, name string) (statedb.RWTable[Node], error) {
	return statedb.NewTableAny(db, name,
		func() []string {
			return []string{"Name", "Addresses", "PodCIDRs", "Routers", "Health", "Tunnel", "Local", "Source"}
		},
		func(r Node) []string {
			local := ""
			if r.Local {
				local = "yes"
			}
			return []string{r.Name, joined(r.Addrs), joined(r.PodCIDRs), joined(r.Routers), joined(r.Health), r.Tunnel, local, r.Source}
		}, nodeByName)
}

// EqualNode compares nodes.
func EqualNode(a, b Node) bool {
	return a.Name == b.Name && a.Local == b.Local && a.Source == b.Source && a.Tunnel == b.Tunnel && a.RouteMTU == b.RouteMTU && a.Zone == b.Zone &&
		slices.Equal(a.Addrs, b.Addrs) && slices.Equal(a.PodCIDRs, b.PodCIDRs) && slices.Equal(a.Routers, b.Routers) &&
		slices.Equal(a.Health, b.Health) && maps.Equal(a.Labels, b.Labels)
}
