// SPDX-License-Identifier: Apache-2.0

package state

import (
	"strconv"
	"strings"
	"time"

	"github.com/cilium/statedb"
	"github.com/cilium/statedb/index"

	"github.com/lash-net/lash/internal/model"
)

// Identity is a CiliumIdentity: a number of the cluster and the labels behind it.
type Identity struct {
	ID      model.Identity
	Labels  model.Labels
	Created int64 // Unix seconds
	Unused  bool  // the operator has found no user and will delete it
}

var (
	identityByID = statedb.Index[Identity, uint32]{
		Name:       "id",
		FromObject: func(r Identity) index.KeySet { return index.NewKeySet(index.Uint32(uint32(r.ID))) },
		FromKey:    index.Uint32,
		FromString: index.Uint32String,
		Unique:     true,
	}
	identityByLabels = nonUnique(byString("labels", func(r Identity) string { return string(r.Labels) }))
)

// IdentityByID finds an identity by its number.
func IdentityByID(id model.Identity) statedb.Query[Identity] { return identityByID.Query(uint32(id)) }

// IdentitiesByLabels finds the identities of the labels: one, or after a race several.
func IdentitiesByLabels(l model.Labels) statedb.Query[Identity] {
	return identityByLabels.Query(string(l))
}

// IdentityOf is the identity that the labels have. Of several, which only a race can have made, all nodes take the one
// that was there first, and of those of the same second the smallest number.
func (t *Tables) IdentityOf(txn statedb.ReadTxn, l model.Labels) (best Identity, ok bool) {
	for r := range t.Identities.List(txn, IdentitiesByLabels(l)) {
		if !ok || r.Created < best.Created || r.Created == best.Created && r.ID < best.ID {
			best, ok = r, true
		}
	}
	return best, ok
}

func newIdentities(db *statedb.DB) (statedb.RWTable[Identity], error) {
	return statedb.NewTableAny(db, "identities",
		func() []string { return []string{"ID", "Labels", "Created", "Unused"} },
		func(r Identity) []string {
			return []string{strconv.Itoa(int(r.ID)), strings.Join(r.Labels.List(), ","), time.Unix(r.Created, 0).UTC().Format(time.RFC3339), strconv.FormatBool(r.Unused)}
		}, identityByID, identityByLabels)
}

// PodIdentity says which labels of a pod of this node make its identity, and its number.
type PodIdentity struct {
	Namespace, Name, UID string
	Mirror               bool // a static pod's image in the API: its endpoint has another UID
	Labels               model.Labels
	Identity             model.Identity // IdentityUnknown: the labels have no number yet
}

// Key is "namespace/name".
func (r PodIdentity) Key() string { return r.Namespace + "/" + r.Name }

// Is reports whether the endpoint is of this pod, not of one before it with the same name.
func (r PodIdentity) Is(ep Endpoint) bool { return ep.UID == "" || ep.UID == r.UID || r.Mirror }

var (
	podIdentityByName   = byString("name", PodIdentity.Key)
	podIdentityByLabels = nonUnique(byString("labels", func(r PodIdentity) string { return string(r.Labels) }))
)

// PodIdentitiesByLabels finds the pods of this node with the labels.
func PodIdentitiesByLabels(l model.Labels) statedb.Query[PodIdentity] {
	return podIdentityByLabels.Query(string(l))
}

// PodIdentityByName finds the identity of pod "namespace/name".
func PodIdentityByName(name string) statedb.Query[PodIdentity] { return podIdentityByName.Query(name) }

func newPodIdentities(db *statedb.DB) (statedb.RWTable[PodIdentity], error) {
	return statedb.NewTableAny(db, "pod-identities",
		func() []string { return []string{"Pod", "Identity", "Labels"} },
		func(r PodIdentity) []string {
			return []string{r.Key(), r.Identity.String(), strings.Join(r.Labels.List(), ",")}
		}, podIdentityByName, podIdentityByLabels)
}
