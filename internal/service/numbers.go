// SPDX-License-Identifier: Apache-2.0

package service

import (
	"maps"
	"slices"

	"github.com/lash-net/lash/internal/model"
)

// Numbers gives service ports their numbers. A number follows its frontends: a port that was renamed, or that a restart
// of the agent forgot, has the number that its frontends have, and so its connections go on.
type Numbers struct {
	byName   map[name]uint32
	released map[model.FrontendKey]uint32 // numbers that were of these frontends and are nobody's
	used     map[uint32]struct{}
	last     uint32
}

// NewNumbers returns numbers that are known already: those a previous run left in the kernel.
func NewNumbers(known map[uint32]model.ServicePort) *Numbers {
	n := &Numbers{byName: map[name]uint32{}, released: map[model.FrontendKey]uint32{}, used: map[uint32]struct{}{}}
	for id, s := range known {
		if id == 0 {
			continue
		}
		n.used[id] = struct{}{}
		for _, f := range s.Frontends {
			n.released[f.FrontendKey] = id
		}
		n.last = max(n.last, id)
	}
	return n
}

// settle takes the numbers of service ports that are gone and gives one to each that came. What came takes the number
// that was its frontends', if one of them has one and nobody else took it.
func (n *Numbers) settle(gone, came map[name][]model.Frontend) {
	for who, fs := range gone {
		id, ok := n.byName[who]
		if !ok {
			continue
		}
		delete(n.byName, who)
		for _, f := range fs {
			n.released[f.FrontendKey] = id
		}
	}
	taken := map[uint32]bool{}
	order := slices.SortedFunc(maps.Keys(came), name.compare)
	for _, who := range order {
		for _, f := range came[who] {
			if id, ok := n.released[f.FrontendKey]; ok && !taken[id] {
				n.byName[who], taken[id] = id, true
				break
			}
		}
	}
	for _, who := range order {
		if _, has := n.byName[who]; !has {
			n.byName[who] = n.free()
		}
	}
	for _, id := range n.released {
		if !taken[id] {
			delete(n.used, id)
		}
	}
	clear(n.released)
}

// free is a number that nobody has. Numbers are used again only after all others, when nothing in the kernel remembers
// whose they were.
func (n *Numbers) free() uint32 {
	for {
		n.last++
		if _, used := n.used[n.last]; n.last != 0 && !used {
			n.used[n.last] = struct{}{}
			return n.last
		}
	}
}
