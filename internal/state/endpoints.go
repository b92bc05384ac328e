// SPDX-License-Identifier: Apache-2.0

package state

import (
	"maps"
	"strconv"

	"github.com/cilium/statedb"
	"github.com/cilium/statedb/index"

	"github.com/lash-net/lash/internal/model"
)

// Endpoint is a pod's network life on this node.
type Endpoint = model.Endpoint

var (
	endpointByID = statedb.Index[Endpoint, uint16]{
		Name:       "id",
		FromObject: func(r Endpoint) index.KeySet { return index.NewKeySet(index.Uint16(r.ID)) },
		FromKey:    index.Uint16,
		FromString: index.Uint16String,
		Unique:     true,
	}
	endpointByContainer = nonUnique(byString("container", func(r Endpoint) string { return r.ContainerID }))
	endpointByPod       = nonUnique(byString("pod", func(r Endpoint) string { return r.PodName() }))
)

// EndpointByID finds an endpoint by its number.
func EndpointByID(id uint16) statedb.Query[Endpoint] { return endpointByID.Query(id) }

// EndpointByContainer finds the endpoints of a sandbox container.
func EndpointByContainer(id string) statedb.Query[Endpoint] { return endpointByContainer.Query(id) }

// EndpointByPod finds the endpoints of "namespace/pod"; during a restart of its sandbox a pod may have two.
func EndpointByPod(name string) statedb.Query[Endpoint] { return endpointByPod.Query(name) }

// EqualEndpoint compares endpoints.
func EqualEndpoint(a, b Endpoint) bool {
	la, lb := a.Labels, b.Labels
	if !maps.Equal(la, lb) || !a.CreatedAt.Equal(b.CreatedAt) {
		return false
	}
	return a.ID == b.ID && a.ContainerID == b.ContainerID && a.Namespace == b.Namespace && a.Pod == b.Pod && a.UID == b.UID &&
		a.NetnsPath == b.NetnsPath && a.ContainerIfName == b.ContainerIfName && a.IfName == b.IfName && a.Ifindex == b.Ifindex &&
		a.PeerIfindex == b.PeerIfindex && a.MAC == b.MAC && a.NodeMAC == b.NodeMAC && a.IPv4 == b.IPv4 && a.IPv6 == b.IPv6 &&
		a.Network == b.Network && a.Identity == b.Identity && a.State == b.State
}

func newEndpoints(db *statedb.DB) (statedb.RWTable[Endpoint], error) {
	return statedb.NewTableAny(db, "endpoints",
		func() []string {
			return []string{"ID", "Pod", "Container", "Identity", "IPv4", "IPv6", "Interface", "Ifindex", "State", "Labels"}
		},
		func(r Endpoint) []string {
			return []string{strconv.Itoa(int(r.ID)), r.PodName(), r.ContainerID, r.Identity.String(), addr(r.IPv4), addr(r.IPv6),
				r.IfName, strconv.Itoa(r.Ifindex), r.State, labels(r.Labels)}
		}, endpointByID, endpointByContainer, endpointByPod)
}

func nonUnique[Row, Key any](ix statedb.Index[Row, Key]) statedb.Index[Row, Key] {
	ix.Unique = false
	return ix
}
