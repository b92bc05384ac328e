// SPDX-License-Identifier: Apache-2.0

package state

import "github.com/cilium/statedb"

// BadObject is a Kubernetes object, or a part of it, that could not be used.
type BadObject struct {
	Kind, Name string // "Service", "namespace/name"
	UID        string
	Field      string // "spec.podCIDRs[1]"
	Problem    string
}

// Key is "Kind namespace/name".
func (r BadObject) Key() string { return r.Kind + " " + r.Name }

var badObjectByKey = byString("object", BadObject.Key)

// BadObjectByKey finds a row by "Kind namespace/name".
func BadObjectByKey(key string) statedb.Query[BadObject] { return badObjectByKey.Query(key) }

func newBadObjects(db *statedb.DB) (statedb.RWTable[BadObject], error) {
	return statedb.NewTableAny(db, "bad-objects",
		func() []string { return []string{"Kind", "Name", "Field", "Problem"} },
		func(r BadObject) []string { return []string{r.Kind, r.Name, r.Field, r.Problem} }, badObjectByKey)
}
