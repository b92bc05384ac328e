// SPDX-License-Identifier: Apache-2.0

package config

import (
	"fmt"
	"slices"
	"strings"
)

// tcpFlags are the names of TCP's flags, from the lowest bit.
var tcpFlags = []string{"fin", "syn", "rst", "psh", "ack", "urg", "ece", "cwr"}

// TCPFlags turns names into the header's byte; "all" stands for every flag, "none" for none.
func TCPFlags(names []string) (bits uint8, err error) {
	for _, n := range names {
		switch i := slices.Index(tcpFlags, strings.ToLower(n)); {
		case strings.EqualFold(n, "all"):
			bits = 0xff
		case strings.EqualFold(n, "none"):
		case i < 0:
			return 0, fmt.Errorf("%q is no TCP flag: there are %s, and all", n, strings.Join(tcpFlags, ", "))
		default:
			bits |= 1 << i
		}
	}
	return bits, nil
}

// TCPFlagNames is the inverse of TCPFlags.
func TCPFlagNames(bits uint8) []string {
	var names []string
	for i, n := range tcpFlags {
		if bits>>i&1 != 0 {
			names = append(names, n)
		}
	}
	return names
}
