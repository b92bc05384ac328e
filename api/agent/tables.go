// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"net/netip"
	"time"

	"github.com/lash-net/lash/internal/model"
)

// Error is the body of every answer that is not 200.
type Error struct {
	Error string `json:"error"`
}

// Version is the agent's version.
type Version struct {
	Version string `json:"version"`
	Commit  string `json:"commit"`
	Go      string `json:"go"`
	Arch    string `json:"arch"`
	Kernel  string `json:"kernel"`
}

// IP is one row of `lash ip list`.
type IP struct {
	Prefix   netip.Prefix   `json:"prefix"`
	Identity model.Identity `json:"identity"`
	Labels   []string       `json:"labels"` // reserved:host, k8s:app=...
	Node     netip.Addr     `json:"node,omitzero"`
	Source   string         `json:"source"`
}

// Identity is one row of `lash identity list`.
type Identity struct {
	ID     model.Identity `json:"id"`
	Labels []string       `json:"labels"` // reserved:host, k8s:app=...
}

// Service is one row of `lash service list`: a frontend. Frontends of one port of a service have the number in common.
type Service struct {
	ID           uint32         `json:"id"`
	Frontend     string         `json:"frontend"` // 10.96.0.1:443/TCP
	Type         string         `json:"type"`
	Namespace    string         `json:"namespace"`
	Name         string         `json:"name"` // of the service; of a HostPort, of the pod
	PortName     string         `json:"portName,omitempty"`
	Affinity     uint32         `json:"sessionAffinitySeconds,omitempty"`
	Flags        []string       `json:"flags,omitempty"` // non-routable, external-local ...
	SourceRanges []netip.Prefix `json:"sourceRanges,omitempty"`
	Backends     []Backend      `json:"backends"`
}

// Backend is an endpoint of a service that has connections.
type Backend struct {
	Addr   netip.Addr `json:"addr"`
	Port   uint16     `json:"port"`
	Proto  uint8      `json:"proto"`
	State  string     `json:"state"`  // active, terminating
	Active bool       `json:"active"` // gets new connections
	Local  bool       `json:"local"`  // of this node, where that matters
}

// Table is a table ready to be printed, rows sorted.
type Table struct {
	Name    string     `json:"name"`
	Columns []string   `json:"columns"`
	Rows    [][]string `json:"rows"`
}

// TableInfo is one row of the list of tables.
type TableInfo struct {
	Name     string `json:"name"`
	Rows     int    `json:"rows"`
	Complete bool   `json:"complete"`
}

// Option is one row of `lash config`.
type Option struct {
	Name  string `json:"name"`
	Value string `json:"value"`
	Takes string `json:"takes"` // what the value may be, for a person
}

// PrefilterChange is what `lash prefilter update` and `lash prefilter delete` ask for.
type PrefilterChange struct {
	Add    []netip.Prefix `json:"add,omitempty"`
	Remove []netip.Prefix `json:"remove,omitempty"`
}

// EndpointChange is one row of `lash endpoint log`.
type EndpointChange struct {
	Time    time.Time `json:"time"`
	Status  string    `json:"status"` // OK, Failure
	State   string    `json:"state"`
	Message string    `json:"message"`
}
