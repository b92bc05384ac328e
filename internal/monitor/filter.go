// SPDX-License-Identifier: Apache-2.0

package monitor

import (
	"fmt"
	"slices"
	"strings"
)

// Filter selects messages. What is empty selects all.
type Filter struct {
	Types   []string
	From    []uint16 // endpoints
	To      []uint16
	Related []uint16 // at either end
}

// Check says which type is unknown.
func (f Filter) Check() error {
	for _, t := range f.Types {
		if !slices.Contains(Types, t) {
			return fmt.Errorf("--type %s: there are %s", t, strings.Join(Types, ", "))
		}
	}
	return nil
}

// Match tells whether a message is selected. One that is about no endpoint is not, if endpoints are named.
func (f Filter) Match(m Message) bool {
	if len(f.Types) > 0 && !slices.Contains(f.Types, m.Type()) {
		return false
	}
	if len(f.From)+len(f.To)+len(f.Related) == 0 {
		return true
	}
	src, dst := m.Endpoints()
	return slices.Contains(f.From, src) || dst != 0 && slices.Contains(f.To, dst) ||
		slices.Contains(f.Related, src) || dst != 0 && slices.Contains(f.Related, dst)
}
