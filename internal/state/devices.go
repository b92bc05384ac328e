// SPDX-License-Identifier: Apache-2.0

package state

import (
	"slices"
	"strconv"

	"github.com/cilium/statedb"
	"github.com/cilium/statedb/index"

	"github.com/lash-net/lash/internal/model"
)

// Device is a device that programs are attached to.
type Device = model.Device

var deviceByIndex = statedb.Index[Device, int]{
	Name:       "ifindex",
	FromObject: func(r Device) index.KeySet { return index.NewKeySet(index.Int(r.Ifindex)) },
	FromKey:    index.Int,
	FromString: index.IntString,
	Unique:     true,
}

// DeviceByIndex finds a device by its interface index.
func DeviceByIndex(ifindex int) statedb.Query[Device] { return deviceByIndex.Query(ifindex) }

// SplitDevice is the row as a loop's key and value.
func SplitDevice(r Device) (int, model.Device) { return r.Ifindex, r }

// EqualDevice compares devices.
func EqualDevice(a, b Device) bool {
	return a.Ifindex == b.Ifindex && a.Name == b.Name && a.MAC == b.MAC && a.MTU == b.MTU && a.IPv4 == b.IPv4 && a.IPv6 == b.IPv6 &&
		a.DirectRouting == b.DirectRouting && a.Reason == b.Reason && slices.Equal(a.Addrs, b.Addrs)
}

func newDevices(db *statedb.DB) (statedb.RWTable[Device], error) {
	return statedb.NewTableAny(db, "devices",
		func() []string {
			return []string{"Ifindex", "Name", "MAC", "MTU", "IPv4", "IPv6", "Addresses", "DirectRouting", "Reason"}
		},
		func(r Device) []string {
			return []string{strconv.Itoa(r.Ifindex), r.Name, r.MAC.String(), strconv.Itoa(r.MTU), addr(r.IPv4), addr(r.IPv6),
				joined(r.Addrs), strconv.FormatBool(r.DirectRouting), r.Reason}
		}, deviceByIndex)
}
