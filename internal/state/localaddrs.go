// SPDX-License-Identifier: Apache-2.0

package state

import (
	"net/netip"
	"strconv"

	"github.com/cilium/statedb"
	"github.com/cilium/statedb/index"

	"github.com/lash-net/lash/internal/model"
)

// LocalAddr is one address of this node: an endpoint's or the node's own.
type LocalAddr struct {
	Addr netip.Addr
	model.LocalAddr
}

// Split is the row as a loop's key and value.
func (r LocalAddr) Split() (netip.Addr, model.LocalAddr) { return r.Addr, r.LocalAddr }

func newLocalAddrs(db *statedb.DB) (statedb.RWTable[LocalAddr], error) {
	return statedb.NewTableAny(db, "local-addresses",
		func() []string {
			return []string{"Address", "Endpoint", "Ifindex", "Identity", "MAC", "NodeMAC", "Host"}
		},
		func(r LocalAddr) []string {
			return []string{r.Addr.String(), strconv.Itoa(int(r.EndpointID)), strconv.Itoa(r.Ifindex), r.Identity.String(),
				r.MAC.String(), r.NodeMAC.String(), strconv.FormatBool(r.Host)}
		},
		statedb.Index[LocalAddr, netip.Addr]{
			Name:       "address",
			FromObject: func(r LocalAddr) index.KeySet { return index.NewKeySet(index.NetIPAddr(r.Addr)) },
			FromKey:    index.NetIPAddr,
			FromString: index.NetIPAddrString,
			Unique:     true,
		})
}
