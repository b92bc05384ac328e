// SPDX-License-Identifier: Apache-2.0

package state

import (
	"maps"
	"net/netip"
	"slices"
	"strconv"

	"github.com/cilium/statedb"

	"github.com/lash-net/lash/internal/model"
)

// Pod is a pod of this node as the API server has it.
type Pod struct {
	Namespace, Name, UID string
	HostNetwork          bool
	Phase                string
	IPs                  []netip.Addr
	Labels               map[string]string
	ServiceAccount       string
	Running              bool // a container of it runs
	Terminating          bool
	Controlled           bool // a controller makes a new one if it is deleted
	Mirror               bool // a static pod's image in the API
	Sockmap              bool // connections within it may do without packets
	Ports                []PodPort
	Created              int64 // Unix seconds
}

// PodPort is a port of a container that has a name or a HostPort.
type PodPort struct {
	Name string
	model.L4
	HostPort uint16     // 0: none
	HostIP   netip.Addr // of the HostPort; invalid: every address of the node
}

// Ended reports whether no container of the pod will run any more: its addresses are free.
func (r Pod) Ended() bool { return r.Phase == "Succeeded" || r.Phase == "Failed" }

// Key is "namespace/name".
func (r Pod) Key() string { return r.Namespace + "/" + r.Name }

// Equal compares pods.
func (r Pod) Equal(o Pod) bool {
	return r.Namespace == o.Namespace && r.Name == o.Name && r.UID == o.UID && r.HostNetwork == o.HostNetwork && r.Phase == o.Phase &&
		r.ServiceAccount == o.ServiceAccount && r.Running == o.Running && r.Terminating == o.Terminating && r.Mirror == o.Mirror && r.Created == o.Created && r.Controlled == o.Controlled && r.Sockmap == o.Sockmap &&
		slices.Equal(r.IPs, o.IPs) && slices.Equal(r.Ports, o.Ports) && maps.Equal(r.Labels, o.Labels)
}

var podByName = byString("name", Pod.Key)

// PodByName finds a pod by "namespace/name".
func PodByName(name string) statedb.Query[Pod] { return podByName.Query(name) }

func newPods(db *statedb.DB) (statedb.RWTable[Pod], error) {
	return statedb.NewTableAny(db, "pods",
		func() []string { return []string{"Name", "UID", "Phase", "IPs", "HostNetwork", "Labels"} },
		func(r Pod) []string {
			return []string{r.Key(), r.UID, r.Phase, joined(r.IPs), strconv.FormatBool(r.HostNetwork), labels(r.Labels)}
		}, podByName)
}
