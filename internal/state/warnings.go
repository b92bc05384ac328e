// SPDX-License-Identifier: Apache-2.0

package state

import "github.com/cilium/statedb"

// Warning is something a person should know and can mend: a peer that cannot be routed to, a CIDR that lies outside.
type Warning struct {
	Key  string // what it is about: "route/10.0.1.0/24"
	Text string
}

var warningByKey = byString("key", func(r Warning) string { return r.Key })

// WarningByKey finds what is said about one thing.
func WarningByKey(key string) statedb.Query[Warning] { return warningByKey.Query(key) }

func newWarnings(db *statedb.DB) (statedb.RWTable[Warning], error) {
	return statedb.NewTableAny(db, "warnings",
		func() []string { return []string{"Key", "Text"} },
		func(r Warning) []string { return []string{r.Key, r.Text} },
		warningByKey)
}
