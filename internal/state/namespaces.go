// SPDX-License-Identifier: Apache-2.0

package state

import (
	"maps"

	"github.com/cilium/statedb"
)

// Namespace is a namespace of the API server.
type Namespace struct {
	Name   string
	Labels map[string]string
}

// Equal compares namespaces.
func (r Namespace) Equal(o Namespace) bool { return r.Name == o.Name && maps.Equal(r.Labels, o.Labels) }

var namespaceByName = byString("name", func(r Namespace) string { return r.Name })

// NamespaceByName finds a namespace by its name.
func NamespaceByName(name string) statedb.Query[Namespace] { return namespaceByName.Query(name) }

func newNamespaces(db *statedb.DB) (statedb.RWTable[Namespace], error) {
	return statedb.NewTableAny(db, "namespaces",
		func() []string { return []string{"Name", "Labels"} },
		func(r Namespace) []string { return []string{r.Name, labels(r.Labels)} }, namespaceByName)
}
