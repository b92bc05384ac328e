// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	api "github.com/lash-net/lash/api/agent"
	"github.com/lash-net/lash/internal/datapath"
	"github.com/lash-net/lash/internal/node"
	"github.com/lash-net/lash/internal/server"
	"github.com/lash-net/lash/internal/version"
)

// chooseHostRouting decides between BPF and legacy host routing and says why.
func (a *agent) chooseHostRouting() {
	features := datapath.Probe()
	in := node.HostRoutingInput{
		Legacy: a.cfg.EnableHostLegacyRouting, KubeProxyReplacement: a.cfg.KubeProxyReplacement, BPFMasquerade: a.cfg.EnableBPFMasquerade,
		IPv4Masquerade: a.cfg.EnableIPv4 && a.cfg.EnableIPv4Masquerade, IPv6Masquerade: a.cfg.EnableIPv6 && a.cfg.EnableIPv6Masquerade,
		RoutingMode: a.cfg.RoutingMode, Kernel: kernelRelease(),
		SetBy: func(key string) string { return a.cfg.Source(key).String() },
	}
	if !features.RedirectPeer {
		in.MissingHelpers = append(in.MissingHelpers, "bpf_redirect_peer")
	}
	if !features.RedirectNeigh {
		in.MissingHelpers = append(in.MissingHelpers, "bpf_redirect_neigh")
	}
	a.routing = node.ChooseHostRouting(in)
	for _, line := range a.routing.Log {
		a.log.Info(line, "subsys", "daemon")
	}
}

// facts is what status needs besides tables.
func (a *agent) facts() server.Facts {
	p := a.phase.Load()
	f := server.Facts{
		Node: a.name, Cluster: a.cfg.ClusterName, StartedAt: a.started, Ready: p.ready, NotReady: p.waiting,
		Version: api.Version{Version: version.Version, Commit: version.Commit, Go: runtime.Version(), Arch: runtime.GOARCH, Kernel: kernelRelease()},

		Kubernetes: a.kubernetesFact(), KubernetesAPIs: slices.Sorted(slices.Values(a.kinds)),
		KubeProxyReplacement: a.cfg.KubeProxyReplacement, SocketLB: a.attached.Load(), SocketLBHostOnly: a.cfg.LBSockHostNSOnly,
		LB:             a.lbFact(),
		CNIConfigFile:  "not written yet: the agent is not ready",
		IPAM:           a.ipamFact(),
		Routing:        api.Routing{Network: a.networkRouting(), Host: "Legacy", Reason: a.routing.Reason},
		IPv4Masquerade: a.cfg.EnableIPv4 && a.nodeCfg.MasqueradeIP4, IPv6Masquerade: a.cfg.EnableIPv6 && a.nodeCfg.MasqueradeIP6,
		MasqueradeMode: a.masqueradeMode(), ClockSource: "jiffies", HealthDaemon: a.healthFact(), ProbeInterval: a.prober.Interval(),
	}
	if a.routing.BPF {
		f.Routing = api.Routing{Network: a.networkRouting(), Host: "BPF"}
	}
	for _, r := range a.routing.Requirements {
		f.Why = append(f.Why, api.Requirement(r))
	}
	if conf := a.cniConf.Load(); conf != nil {
		f.CNIConfigFile = "successfully wrote CNI configuration file to " + *conf
	}
	for _, x := range a.excluded() {
		f.MasqueradeExcluded = append(f.MasqueradeExcluded, x.String())
	}
	if d := a.detection.Load(); d != nil {
		f.MTU = api.MTU{Device: d.MTU, Route: a.routeMTU(d.MTU), Reason: d.MTUReason}
		if a.cfg.Tunnel() {
			f.MTU.Reason += fmt.Sprintf("; the tunnel takes %d", a.cfg.TunnelOverhead())
		}
	}
	if p.dp != nil {
		f.Monitor = a.monitorFact(p.dp)
		f.Sockmap = sockmapFact(p.dp)
		f.AttachMode = "Legacy TC"
		if p.dp.Features().TCX {
			f.AttachMode = "TCX"
		}
		for _, m := range p.dp.Maps() {
			f.BPFMaps = append(f.BPFMaps, api.BPFMap{Name: m.Name, Size: m.Size, Entries: -1, Memory: m.Memory, Pinned: m.Pinned, Type: m.Type})
		}
	}
	return f
}

// networkRouting is the word for how packets travel between nodes.
func (a *agent) networkRouting() string {
	switch a.cfg.RoutingMode {
	case "tunnel":
		return "Tunnel [" + a.cfg.TunnelProtocol + "]"
	case "hybrid":
		return "Hybrid [" + a.cfg.TunnelProtocol + "]"
	}
	return "Native"
}

func (a *agent) kubernetesFact() api.Component {
	h := a.kubernetes.Load()
	switch {
	case h == nil:
		return api.Component{State: api.StateWarning, Message: "not asked yet"}
	case h.err != nil:
		return api.Component{State: api.StateFailure, Message: fmt.Sprintf("no answer for %s, running on what is known: %v", time.Since(h.since).Round(time.Second), h.err)}
	}
	for c := range a.tables.Controllers.All(a.tables.DB.ReadTxn()) {
		if strings.HasPrefix(c.Name, "k8s-reflector ") && c.Errors > 0 {
			return api.Component{State: api.StateFailure, Message: "running on what is known: " + c.Message}
		}
	}
	return api.Component{State: api.StateOk, Message: h.version}
}

func (a *agent) ipamFact() api.IPAM {
	out := api.IPAM{Mode: a.cfg.IPAM}
	for _, u := range a.ipam.Usage() {
		out.Pools = append(out.Pools, api.Pool(u))
	}
	for _, al := range a.ipam.Allocations() {
		out.Allocations = append(out.Allocations, api.Allocation{Addr: al.Addr, Owner: al.Owner})
	}
	if _, err := a.ipam.Ready(); err != nil {
		out.Message = err.Error()
	}
	return out
}

func kernelRelease() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return "unknown"
	}
	return unix.ByteSliceToString(u.Release[:])
}

// dumper lets the server use the datapath once it is open.
type dumper struct{ a *agent }

func (d dumper) Dump(name string) ([]string, [][]string, error) {
	dp := d.a.phase.Load().dp
	if dp == nil {
		return nil, nil, errors.New("the datapath is not loaded yet: " + d.a.phase.Load().waiting)
	}
	if name == "nat-top" {
		return d.a.dumpSourcePorts(dp)
	}
	return dp.Dump(name)
}

// Prefilter and ChangePrefilter are the datapath's, once it is open.
func (d dumper) Prefilter() ([]netip.Prefix, error) {
	if dp := d.a.phase.Load().dp; dp != nil {
		return dp.Prefilter()
	}
	return nil, errors.New("the datapath is not loaded yet: " + d.a.phase.Load().waiting)
}

func (d dumper) ChangePrefilter(add, remove []netip.Prefix) error {
	dp := d.a.phase.Load().dp
	if dp == nil {
		return errors.New("the datapath is not loaded yet: " + d.a.phase.Load().waiting)
	}
	if err := dp.ChangePrefilter(add, remove); err != nil {
		return err
	}
	d.a.log.Info("prefilter changed", "added", add, "removed", remove)
	return nil
}
