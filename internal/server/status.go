// SPDX-License-Identifier: Apache-2.0

package server

import (
	"fmt"
	"time"

	"github.com/lash-net/lash/api/agent"
	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/state"
)

// Facts is what the status needs besides tables. The agent gathers them anew for each request.
type Facts struct {
	Node, Cluster string
	StartedAt     time.Time
	Ready         bool
	NotReady      string // what the agent waits for
	Version       agent.Version

	Kubernetes           agent.Component
	KubernetesAPIs       []string
	KubeProxyReplacement bool // configured
	SocketLB             bool // attached
	SocketLBHostOnly     bool // for sockets of the node's network namespace only
	LB                   LoadBalancing
	CNIConfigFile        string
	IPAM                 agent.IPAM
	Routing              agent.Routing
	AttachMode           string
	IPv4Masquerade       bool
	IPv6Masquerade       bool
	MasqueradeExcluded   []string
	MasqueradeMode       string // BPF, BPF (ip-masq-agent), IPTables
	ClockSource          string
	BPFMaps              []agent.BPFMap
	MTU                  agent.MTU
	Monitor              agent.NodeMonitor
	Sockmap              agent.Sockmap
	HealthDaemon         agent.Component
	ProbeInterval        time.Duration
	Why                  []agent.Requirement
}

// LoadBalancing is how services are served, in the words of the status.
type LoadBalancing struct {
	Mode            string // SNAT, DSR, Hybrid
	DSRDispatch     string // empty without DSR
	Algorithm       string // Random, Maglev (Table Size: 16381)
	SessionAffinity bool
	Acceleration    string            // Native, Best-Effort, Disabled
	NotAccelerated  map[string]string // why devices have no XDP though it is on, by name
	NodePortRange   string
	Annotations     []string // of services that are followed
}

func disabled(message string) agent.Component {
	return agent.Component{State: agent.StateDisabled, Message: message}
}

func enabled(b bool) string {
	if b {
		return "Enabled"
	}
	return "Disabled"
}

// Status says what is true of the agent now. Features that this version does not have are Disabled.
func Status(t *state.Tables, f Facts, now time.Time) agent.Status {
	txn := t.DB.ReadTxn()
	s := agent.Status{
		Node: f.Node, Cluster: f.Cluster, StartedAt: f.StartedAt, Now: now, Ready: f.Ready, NotReady: f.NotReady,
		KVStore:          disabled(""),
		Kubernetes:       f.Kubernetes,
		KubernetesAPIs:   f.KubernetesAPIs,
		HostFirewall:     disabled(""),
		SRv6:             disabled(""),
		CNIChaining:      "none",
		CNIConfigFile:    f.CNIConfigFile,
		NodeMonitor:      nodeMonitor(f.Monitor),
		Monitor:          f.Monitor,
		HealthDaemon:     f.HealthDaemon,
		IPAM:             f.IPAM,
		IPv4BigTCP:       disabled(""),
		IPv6BigTCP:       disabled(""),
		BandwidthManager: disabled(""),
		Routing:          f.Routing,
		AttachMode:       f.AttachMode,
		DeviceMode:       "veth",
		ClockSource:      f.ClockSource,
		Proxy:            disabled(""),
		IdentityRange:    agent.IdentityRange{Min: uint32(model.IdentityMin), Max: uint32(model.IdentityMax)},
		Hubble:           disabled(""),
		BPFMaps:          f.BPFMaps,
		Sockmap:          f.Sockmap,
		Encryption:       disabled(""),
		ClusterHealth:    clusterHealth(t, txn, f, unreachableShown),
		MTU:              f.MTU,
	}
	version := f.Version.Version
	if f.Version.Commit != "" {
		version = fmt.Sprintf("%s (v%s-%s)", f.Version.Version, f.Version.Version, f.Version.Commit)
	}
	s.Lash = agent.Component{State: agent.StateOk, Message: version}
	if !f.Ready {
		s.Lash = agent.Component{State: agent.StateFailure, Message: version + "   not ready: " + f.NotReady}
	}

	var names []string
	for d := range t.Devices.All(txn) {
		names = append(names, d.Name)
		s.Devices = append(s.Devices, agent.Device{Name: d.Name, Ifindex: d.Ifindex, MTU: d.MTU, Addrs: d.Addrs, IPv4: d.IPv4, IPv6: d.IPv6,
			DirectRouting: d.DirectRouting, Reason: d.Reason})
	}
	s.Masquerading = agent.Masquerading{Mode: "Disabled"}
	if f.IPv4Masquerade || f.IPv6Masquerade {
		s.Masquerading = agent.Masquerading{Mode: f.MasqueradeMode, Devices: names, Excluded: f.MasqueradeExcluded, IPv4: f.IPv4Masquerade, IPv6: f.IPv6Masquerade}
	}
	s.KubeProxyReplacement = kubeProxyReplacement(f, s.Devices)

	for c := range t.Controllers.All(txn) {
		row := agent.Controller{Name: c.Name, Count: c.Errors, Message: c.Message, LastSuccess: stamp(c.LastSuccess), LastError: stamp(c.LastError)}
		s.Controllers = append(s.Controllers, row)
	}
	for w := range t.Warnings.All(txn) {
		s.Warnings = append(s.Warnings, w.Text)
	}
	for b := range t.BadObjects.All(txn) {
		s.Objects = append(s.Objects, agent.BadObject{Kind: b.Kind, Name: b.Name, Field: b.Field, Error: b.Problem})
	}
	have := map[string]bool{}
	for ep := range t.Endpoints.All(txn) {
		have[ep.PodName()] = true
	}
	for p := range t.Pods.All(txn) {
		if p.HostNetwork || p.Terminating || p.Phase == "Succeeded" || p.Phase == "Failed" || !p.Running && !have[p.Key()] {
			continue
		}
		s.ManagedPods.Total++
		if have[p.Key()] {
			s.ManagedPods.Managed++
		} else {
			s.ManagedPods.Unmanaged = append(s.ManagedPods.Unmanaged, p.Key())
		}
	}
	return s
}

func kubeProxyReplacement(f Facts, devices []agent.Device) agent.KubeProxyReplacement {
	k := agent.KubeProxyReplacement{
		Mode: "False", SocketLB: enabled(f.KubeProxyReplacement && f.SocketLB), SocketLBTracing: "Disabled", BackendSelection: "Random",
		SessionAffinity: "Disabled", NAT46: "Disabled", XDPAcceleration: "Disabled",
	}
	if f.LB.Acceleration != "" {
		k.XDPAcceleration, k.NotAccelerated = f.LB.Acceleration, f.LB.NotAccelerated
	}
	// Each kind of frontend is served at the socket and, for the rest, by the programs on devices.
	on := enabled(f.KubeProxyReplacement && f.SocketLB)
	for _, name := range []string{"ClusterIP", "NodePort", "LoadBalancer", "externalIPs", "HostPort"} {
		k.Services = append(k.Services, agent.ServiceFeature{Name: name, State: on})
	}
	if f.KubeProxyReplacement {
		k.Mode = "True"
		k.Devices = devices
		k.LBMode, k.DSRDispatch, k.BackendSelection, k.SessionAffinity = f.LB.Mode, f.LB.DSRDispatch, f.LB.Algorithm, enabled(f.LB.SessionAffinity)
		k.Annotations = f.LB.Annotations
		if f.LB.NodePortRange != "" && on == agent.StateEnabled {
			k.Services[1].Note = "Range: " + f.LB.NodePortRange
		}
	}
	if f.KubeProxyReplacement && f.SocketLB {
		k.SocketLBCoverage = "Full"
		if f.SocketLBHostOnly {
			k.SocketLBCoverage = "Hostns-only"
		}
	}
	return k
}

func stamp(nanoseconds int64) *time.Time {
	if nanoseconds == 0 {
		return nil
	}
	t := time.Unix(0, nanoseconds).UTC()
	return &t
}
