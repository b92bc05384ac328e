// SPDX-License-Identifier: Apache-2.0

package state

import (
	"net/netip"
	"strconv"

	"github.com/cilium/statedb"
	"github.com/cilium/statedb/index"

	"github.com/lash-net/lash/internal/model"
)

// CiliumEndpoint is what the API server has of a pod of any node: who it is and where. A cluster has ten thousands, so
// it is no more than that.
type CiliumEndpoint struct {
	Namespace, Name string
	UID, PodUID     string
	Created         int64      // Unix seconds
	Node            netip.Addr // of the pod; invalid: the object does not say
	IPv4, IPv6      netip.Addr
	Identity        model.Identity
	EndpointID      uint16 // 0: its node has no endpoint for it
	State           string
}

// Key is "namespace/name".
func (r CiliumEndpoint) Key() string { return r.Namespace + "/" + r.Name }

// PublishedEndpoint is what the cluster is told of a pod of this node by its CiliumEndpoint, keyed by "namespace/name".
type PublishedEndpoint struct {
	CiliumEndpoint // but for UID and Created, which the API server gives
	Labels         model.Labels
	ContainerID    string
	Ports          []PodPort
}

// Same compares what the other nodes act on. Labels follow from the identity, ports from the pod.
func (r PublishedEndpoint) Same(o PublishedEndpoint) bool {
	a, b := r.CiliumEndpoint, o.CiliumEndpoint
	a.UID, a.Created, b.UID, b.Created = "", 0, "", 0
	return a == b
}

// before reports whether r's claim to an address is older or weaker than o's: while an address passes from one pod to
// another, the new one's counts.
func (r CiliumEndpoint) before(o CiliumEndpoint) bool {
	switch {
	case (r.EndpointID == 0) != (o.EndpointID == 0):
		return r.EndpointID == 0
	case r.Created != o.Created:
		return r.Created < o.Created
	}
	return r.Key() < o.Key()
}

// Prefixes are the addresses that the row says something of: none while the pod has no identity.
func (r CiliumEndpoint) Prefixes() []netip.Prefix {
	if r.Identity == model.IdentityUnknown {
		return nil
	}
	out := make([]netip.Prefix, 0, 2)
	for _, a := range [...]netip.Addr{r.IPv4, r.IPv6} {
		if a.IsValid() {
			out = append(out, netip.PrefixFrom(a, a.BitLen()))
		}
	}
	return out
}

var (
	ciliumEndpointByName   = byString("name", CiliumEndpoint.Key)
	ciliumEndpointByPrefix = statedb.Index[CiliumEndpoint, netip.Prefix]{
		Name: "prefix",
		FromObject: func(r CiliumEndpoint) index.KeySet {
			return index.NewKeySet(keys(r.Prefixes())...)
		},
		FromKey: prefixKey,
	}
)

func keys(prefixes []netip.Prefix) []index.Key {
	out := make([]index.Key, len(prefixes))
	for i, p := range prefixes {
		out[i] = prefixKey(p)
	}
	return out
}

// CiliumEndpointByName finds the CiliumEndpoint of pod "namespace/name".
func CiliumEndpointByName(name string) statedb.Query[CiliumEndpoint] {
	return ciliumEndpointByName.Query(name)
}

func newCiliumEndpoints(db *statedb.DB) (statedb.RWTable[CiliumEndpoint], error) {
	return statedb.NewTableAny(db, "cilium-endpoints",
		func() []string { return []string{"Pod", "Identity", "IPv4", "IPv6", "Node", "ID", "State"} },
		func(r CiliumEndpoint) []string {
			return []string{r.Key(), r.Identity.String(), addr(r.IPv4), addr(r.IPv6), addr(r.Node), strconv.Itoa(int(r.EndpointID)), r.State}
		}, ciliumEndpointByName, ciliumEndpointByPrefix)
}
