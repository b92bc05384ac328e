// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"maps"
	"path/filepath"
	"slices"
)

// MapFacts is one map of the datapath.
type MapFacts struct {
	Name   string
	Type   string
	Size   uint32 // rows it can hold
	Memory uint64 // bytes as the kernel accounts them, 0: unknown
	Pinned string
}

// Maps lists the datapath's maps by name.
func (d *Datapath) Maps() []MapFacts {
	var out []MapFacts
	for _, name := range slices.Sorted(maps.Keys(d.maps)) {
		m := d.maps[name]
		f := MapFacts{Name: name, Type: m.Type().String(), Size: m.MaxEntries(), Pinned: filepath.Join(d.mapDir(), name)}
		if info, err := m.Info(); err == nil {
			f.Memory, _ = info.Memlock()
		}
		out = append(out, f)
	}
	return out
}
