// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"net/netip"
	"time"

	"github.com/lash-net/lash/internal/model"
)

// States of a Component.
const (
	StateOk       = "Ok"
	StateEnabled  = "Enabled"
	StateDisabled = "Disabled"
	StateFailure  = "Failure"
	StateWarning  = "Warning"
)

// Component is one line of the status: a state word and what follows it.
type Component struct {
	State   string `json:"state"`
	Message string `json:"message,omitempty"`
}

// Status is everything `lash status` prints, in the order of its lines.
type Status struct {
	Node      string    `json:"node"`
	Cluster   string    `json:"cluster"`
	StartedAt time.Time `json:"startedAt"`
	Now       time.Time `json:"now"` // the agent's clock, to print "14s ago"
	Ready     bool      `json:"ready"`
	NotReady  string    `json:"notReady,omitempty"` // what the agent waits for

	KVStore              Component            `json:"kvstore"`
	Kubernetes           Component            `json:"kubernetes"`               // Ok  1.34 (v1.34.4) [linux/amd64]
	KubernetesAPIs       []string             `json:"kubernetesAPIs,omitempty"` // watched and synced: "core/v1::Service", printed as a JSON list
	KubeProxyReplacement KubeProxyReplacement `json:"kubeProxyReplacement"`
	HostFirewall         Component            `json:"hostFirewall"`
	SRv6                 Component            `json:"srv6"`
	CNIChaining          string               `json:"cniChaining"` // none
	CNIConfigFile        string               `json:"cniConfigFile"`
	Lash                 Component            `json:"lash"` // Ok  1.0.0 (v1.0.0-abcdef0)
	NodeMonitor          Component            `json:"nodeMonitor"`
	Monitor              NodeMonitor          `json:"monitor"`
	HealthDaemon         Component            `json:"healthDaemon"` // "Lash health daemon:"
	IPAM                 IPAM                 `json:"ipam"`
	IPv4BigTCP           Component            `json:"ipv4BigTCP"`
	IPv6BigTCP           Component            `json:"ipv6BigTCP"`
	BandwidthManager     Component            `json:"bandwidthManager"`
	Routing              Routing              `json:"routing"`    // both "Host Routing:" and "Routing:" lines
	AttachMode           string               `json:"attachMode"` // TCX or Legacy TC
	DeviceMode           string               `json:"deviceMode"` // veth
	Masquerading         Masquerading         `json:"masquerading"`
	ClockSource          string               `json:"clockSource"` // ktime
	Controllers          []Controller         `json:"controllers,omitempty"`
	Proxy                Component            `json:"proxy"`
	IdentityRange        IdentityRange        `json:"identityRange"`
	Hubble               Component            `json:"hubble"`
	BPFMaps              []BPFMap             `json:"bpfMaps,omitempty"`
	Sockmap              Sockmap              `json:"sockmap"`
	Encryption           Component            `json:"encryption"`
	ClusterHealth        ClusterHealth        `json:"clusterHealth"`

	ManagedPods ManagedPods `json:"managedPods"`
	Devices     []Device    `json:"devices,omitempty"`  // verbose: what was selected and why
	MTU         MTU         `json:"mtu"`                // verbose
	Warnings    []string    `json:"warnings,omitempty"` // things a person should know: unreachable peers, CIDRs outside
	Objects     []BadObject `json:"badObjects,omitempty"`

	Why []Requirement `json:"why,omitempty"` // with ?why only
}

// KubeProxyReplacement is the line "True   [eth0  172.18.0.11 (Direct Routing)]" and its verbose details.
type KubeProxyReplacement struct {
	Mode             string            `json:"mode"` // True or False
	Devices          []Device          `json:"devices,omitempty"`
	SocketLB         string            `json:"socketLB"`         // Enabled, Disabled
	SocketLBTracing  string            `json:"socketLBTracing"`  // Disabled
	SocketLBCoverage string            `json:"socketLBCoverage"` // Full, Hostns-only
	LBMode           string            `json:"lbMode"`           // SNAT, DSR, Hybrid
	DSRDispatch      string            `json:"dsrDispatch,omitempty"`
	BackendSelection string            `json:"backendSelection"` // Random, Maglev (Table Size: 16381)
	SessionAffinity  string            `json:"sessionAffinity"`
	NAT46            string            `json:"nat46"`
	XDPAcceleration  string            `json:"xdpAcceleration"`          // Native, Best-Effort, Disabled
	NotAccelerated   map[string]string `json:"notAccelerated,omitempty"` // why devices have no XDP though it is on, by name
	Services         []ServiceFeature  `json:"services"`                 // ClusterIP, NodePort, LoadBalancer, externalIPs, HostPort in this order
	Annotations      []string          `json:"annotations,omitempty"`
}

// Sockmap is what connections within pods exchanged without packets, in pods that ask for it.
type Sockmap struct {
	Pods     int    `json:"pods"` // of this node that ask for it
	Messages uint64 `json:"messages"`
	Bytes    uint64 `json:"bytes"`
	Bulk     uint64 `json:"bulk"`             // directions of connections that carried too much for it and went on by packets
	Reason   string `json:"reason,omitempty"` // why it cannot be done here
}

// ServiceFeature is one kind of service frontend.
type ServiceFeature struct {
	Name  string `json:"name"`
	State string `json:"state"` // Enabled, Disabled
	Note  string `json:"note,omitempty"`
}

// IPAM is "IPv4: 4/254 allocated from 10.244.1.0/24, IPv6: ...".
type IPAM struct {
	Mode        string       `json:"mode"`
	Pools       []Pool       `json:"pools,omitempty"` // IPv4 before IPv6
	Allocations []Allocation `json:"allocations,omitempty"`
	Message     string       `json:"message,omitempty"` // why there is no pool yet
}

// Pool is one family's addresses.
type Pool struct {
	Family    string         `json:"family"` // IPv4 or IPv6
	Allocated uint64         `json:"allocated"`
	Total     uint64         `json:"total"` // saturates at the largest uint64
	CIDRs     []netip.Prefix `json:"cidrs"`
}

// Allocation is one allocated address; verbose prints "  10.244.1.70 (router)".
type Allocation struct {
	Addr  netip.Addr `json:"addr"`
	Owner string     `json:"owner"` // router, or namespace/pod
}

// Routing is how packets travel between nodes and between a pod and its node.
type Routing struct {
	Network string `json:"network"` // Native
	Host    string `json:"host"`    // BPF or Legacy
	Reason  string `json:"reason,omitempty"`
}

// Masquerading is "BPF   [eth0]   10.244.0.0/16  [IPv4: Enabled, IPv6: Disabled]".
type Masquerading struct {
	Mode     string   `json:"mode"` // BPF or Disabled
	Devices  []string `json:"devices,omitempty"`
	Excluded []string `json:"excluded,omitempty"` // destinations that keep the pod's address, IPv4 first
	IPv4     bool     `json:"ipv4"`
	IPv6     bool     `json:"ipv6"`
}

// Controller is one loop of the agent.
type Controller struct {
	Name        string     `json:"name"`
	LastSuccess *time.Time `json:"lastSuccess,omitempty"` // nil: never
	LastError   *time.Time `json:"lastError,omitempty"`
	Count       uint64     `json:"count"`   // consecutive failures
	Message     string     `json:"message"` // "no error" if Count is 0
}

// Healthy reports whether the last pass of the loop had no error.
func (c Controller) Healthy() bool { return c.Count == 0 }

// NodeMonitor is the ring of events: "Listening for events on 2 CPUs with 64x4096 of shared memory".
type NodeMonitor struct {
	CPUs      int      `json:"cpus"`     // 0: the datapath is not loaded yet
	Pages     int      `json:"pages"`    // of the ring, for each CPU
	PageSize  int      `json:"pageSize"` // bytes
	Listeners int      `json:"listeners"`
	Seen      uint64   `json:"seen"`          // events read
	Lost      uint64   `json:"lost"`          // events the ring had no room for
	Missed    uint64   `json:"missed"`        // events listeners were too slow for
	Unknown   uint64   `json:"unknown"`       // records that are no events
	Off       []string `json:"off,omitempty"` // kinds of events that are switched off
}

// IdentityRange is "min 256, max 65535".
type IdentityRange struct {
	Min uint32 `json:"min"`
	Max uint32 `json:"max"`
}

// BPFMap is one row of the table of maps.
type BPFMap struct {
	Name    string `json:"name"`
	Size    uint32 `json:"size"`           // max entries
	Entries int    `json:"entries"`        // -1: not counted
	Memory  uint64 `json:"memory"`         // bytes as the kernel accounts them, 0: unknown
	Pinned  string `json:"pinned"`         // path
	Type    string `json:"type,omitempty"` // Hash, LPMTrie ...
}

// ClusterHealth is "3/3 reachable   (timestamp)"; State is Disabled while nodes do not probe each other.
type ClusterHealth struct {
	State     string             `json:"state"`
	Cluster   string             `json:"cluster,omitempty"`
	Reachable int                `json:"reachable"`
	Total     int                `json:"total"`
	At        time.Time          `json:"at,omitzero"`         // of the latest probe
	Interval  time.Duration      `json:"intervalNanoseconds"` // between two probes of a node
	Nodes     []model.NodeHealth `json:"nodes,omitempty"`     // by name; in the status, without ?nodes, only the first that fail
}

// ManagedPods counts the pods of this node that need a network from Lash.
type ManagedPods struct {
	Managed   int      `json:"managed"`
	Total     int      `json:"total"`
	Unmanaged []string `json:"unmanaged,omitempty"` // namespace/pod of pods that ran before the agent
}

// Device is one device that programs are attached to.
type Device struct {
	Name          string         `json:"name"`
	Ifindex       int            `json:"ifindex"`
	MTU           int            `json:"mtu"`
	Addrs         []netip.Prefix `json:"addrs,omitempty"`
	IPv4          netip.Addr     `json:"ipv4,omitzero"` // masquerade address
	IPv6          netip.Addr     `json:"ipv6,omitzero"`
	DirectRouting bool           `json:"directRouting"`
	Reason        string         `json:"reason"` // why it was selected
}

// MTU explains the MTU that pods get.
type MTU struct {
	Device int    `json:"device"` // of pods' and lash_host's devices
	Route  int    `json:"route"`  // of routes to other nodes' pods
	Reason string `json:"reason"`
}

// BadObject is a Kubernetes object that could not be used, and what to do about it.
type BadObject struct {
	Kind  string `json:"kind"`
	Name  string `json:"name"` // namespace/name
	Field string `json:"field"`
	Error string `json:"error"`
}

// Requirement is one row of `lash status --why`: a condition of BPF host routing.
type Requirement struct {
	Requirement string `json:"requirement"`
	Met         bool   `json:"met"`
	Found       string `json:"found"`
	Needed      string `json:"needed"`
	SetBy       string `json:"setBy"` // default, ConfigMap lash-config, flag, kernel
	Change      string `json:"change"`
}
