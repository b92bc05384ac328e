// SPDX-License-Identifier: Apache-2.0

package model

import (
	"net/netip"
	"slices"
	"time"
)

// NodeHealth is what this node's probes of a node have found.
type NodeHealth struct {
	Name  string
	Local bool
	Paths []HealthPath // the node's own addresses, then its health endpoint's; IPv4 first in each
}

// HealthPath is one address that is probed in two ways.
type HealthPath struct {
	Addr     netip.Addr
	Endpoint bool // the address is the health endpoint's
	ICMP     ProbeResult
	HTTP     ProbeResult
}

// ProbeResult is the outcome of the last probe of its kind.
type ProbeResult struct {
	At    time.Time     `json:",omitzero"` // when it began; zero: there was none yet
	RTT   time.Duration // nanoseconds until the answer; 0 if it failed
	Error string        `json:",omitempty"` // why there was no answer; empty if there was
	Since time.Time     `json:",omitzero"`  // since when it has been so, answered or failing
}

// Answered reports whether the last probe was.
func (r ProbeResult) Answered() bool { return !r.At.IsZero() && r.Error == "" }

// Failed reports whether the last probe was not answered.
func (r ProbeResult) Failed() bool { return r.Error != "" }

// Answered reports whether both probes were.
func (p HealthPath) Answered() bool { return p.ICMP.Answered() && p.HTTP.Answered() }

// Failed reports whether one of the probes did.
func (p HealthPath) Failed() bool { return p.ICMP.Failed() || p.HTTP.Failed() }

// Reachable reports whether every probe of every address was answered.
func (n NodeHealth) Reachable() bool {
	return len(n.Paths) > 0 && !slices.ContainsFunc(n.Paths, func(p HealthPath) bool { return !p.Answered() })
}

// Failed reports whether a probe of an address was not answered.
func (n NodeHealth) Failed() bool { return slices.ContainsFunc(n.Paths, HealthPath.Failed) }

// Probed is when the last of its probes began, zero if there was none.
func (n NodeHealth) Probed() (last time.Time) {
	for _, p := range n.Paths {
		for _, r := range []ProbeResult{p.ICMP, p.HTTP} {
			if r.At.After(last) {
				last = r.At
			}
		}
	}
	return last
}
