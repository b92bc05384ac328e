// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/lash-net/lash/sandbox/testbed"
)

// oldSpelling says what testbed.Modes says in the words of older charts.
var oldSpelling = map[string]string{"vxlan": "tunnel=vxlan", "native": "tunnel=disabled"}

const (
	switches = 5               // times there and back
	silence  = 2 * time.Second // that a connection may have when the mode changes

	flowInterval = 10 * time.Millisecond // between messages
)

// modeChecks are what differs between the modes.
func (w *world) modeChecks(mode string) []check {
	network := map[string]string{"vxlan": "Network: Tunnel [vxlan]", "native": "Network: Native"}[mode]
	var list []check
	for _, n := range w.c.Nodes {
		list = append(list, check{"lash status on " + n + ": " + network, func(ctx context.Context) error {
			out, err := w.lashOn(ctx, n, "status")
			if err == nil && !strings.Contains(out, network) {
				err = fmt.Errorf("status says:\n%s", out)
			}
			return err
		}}, check{"devices, routes and rows of mode " + mode + " on " + n, func(ctx context.Context) error { return w.inMode(ctx, n, mode) }})
	}
	for _, f := range families {
		list = append(list, w.onTheWire(mode, f))
	}
	return append(list, w.golden(mode)...)
}

// lashOn runs lash in the agent's pod of a node.
func (w *world) lashOn(ctx context.Context, node string, args ...string) (string, error) {
	name, err := w.c.Kubectl(ctx, "-n", "kube-system", "get", "pods", "-l", "k8s-app=lash", "--field-selector=spec.nodeName="+node+",status.phase=Running", "-o", "jsonpath={.items[0].metadata.name}")
	if err != nil {
		return "", err
	}
	return w.c.Kubectl(ctx, append([]string{"-n", "kube-system", "exec", name, "-c", "lash-agent", "--", "lash"}, args...)...)
}

// ciliumNodes are pod CIDRs and routers by node.
func (w *world) ciliumNodes(ctx context.Context) (cidrs map[string][]netip.Prefix, routers map[string][]netip.Addr, announced map[string]string, err error) {
	out, err := w.c.Kubectl(ctx, "get", "ciliumnodes", "-o", "json")
	if err != nil {
		return nil, nil, nil, err
	}
	var list struct {
		Items []struct {
			Metadata struct {
				Name        string
				Annotations map[string]string
			}
			Spec struct {
				Addresses []struct{ Type, IP string }
				IPAM      struct{ PodCIDRs []netip.Prefix }
			}
		}
	}
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		return nil, nil, nil, err
	}
	cidrs, routers, announced = map[string][]netip.Prefix{}, map[string][]netip.Addr{}, map[string]string{}
	for _, n := range list.Items {
		cidrs[n.Metadata.Name] = n.Spec.IPAM.PodCIDRs
		announced[n.Metadata.Name] = n.Metadata.Annotations["lash.io/tunnel"]
		for _, a := range n.Spec.Addresses {
			if ip, err := netip.ParseAddr(a.IP); err == nil && a.Type == "CiliumInternalIP" {
				routers[n.Metadata.Name] = append(routers[n.Metadata.Name], ip)
			}
		}
	}
	return cidrs, routers, announced, nil
}

// inMode compares everything on a node that depends on the mode with what a fresh installation has: devices, routes,
// programs, rows of the ipcache, the announcement, and the routes of pods.
func (w *world) inMode(ctx context.Context, node, mode string) error {
	cidrs, routers, announced, err := w.ciliumNodes(ctx)
	if err != nil {
		return err
	}
	tunnel := mode == "vxlan"
	want := map[bool]string{true: "vxlan:8472"}[tunnel]
	if announced[node] != want {
		return fmt.Errorf("%s announces the tunnel %q, want %q", node, announced[node], want)
	}

	var routes, wantRoutes []string
	for _, flag := range []string{"-4", "-6"} {
		out, err := w.c.Exec(ctx, node, "ip", flag, "route", "show", "proto", "76")
		if err != nil {
			return err
		}
		for line := range strings.Lines(out) {
			line = strings.ReplaceAll(strings.ReplaceAll(line, " metric 1024", ""), " pref medium", "")
			routes = append(routes, strings.Join(strings.Fields(line), " "))
		}
	}
	router := func(v4 bool) string {
		i := slices.IndexFunc(routers[node], func(a netip.Addr) bool { return a.Is4() == v4 })
		if i < 0 {
			return "?"
		}
		return routers[node][i].String()
	}
	for _, r := range routers[node] {
		scope := ""
		if r.Is4() {
			scope = " scope link"
		}
		wantRoutes = append(wantRoutes, r.String()+" dev lash_host"+scope)
	}
	for name, list := range cidrs {
		for _, c := range list {
			v4, line := c.Addr().Is4(), c.String()
			r := router(v4)
			switch own := name == node; {
			case own || tunnel:
				if v4 {
					line += " via " + r
				}
				line += " dev lash_host src " + r
				if !own {
					line += " mtu 1450"
				}
			case v4:
				line += " via " + nodeAddr(name, "v4").String() + " dev eth0"
			default:
				line += " via " + nodeAddr(name, "v6").String() + " dev eth0"
			}
			wantRoutes = append(wantRoutes, line)
		}
	}
	if err := same("routes", routes, wantRoutes); err != nil {
		return err
	}

	links, err := w.c.Exec(ctx, node, "ip", "-d", "link")
	if err != nil {
		return err
	}
	if strings.Contains(links, "lash_vxlan") != tunnel || tunnel && !strings.Contains(links, "vxlan external") {
		return fmt.Errorf("devices are\n%s", links)
	}
	programs, err := w.lashOn(ctx, node, "bpf", "net", "list")
	if err != nil {
		return err
	}
	if strings.Contains(programs, "from_overlay") != tunnel {
		return fmt.Errorf("programs are\n%s", programs)
	}
	cache, err := w.lashOn(ctx, node, "bpf", "ipcache", "list")
	if err != nil {
		return err
	}
	for line := range strings.Lines(cache) {
		remote := strings.Contains(line, "tunnelendpoint=172.18.") || strings.Contains(line, "tunnelendpoint=fd00:172:")
		if strings.Contains(line, "hastunnel") != (remote && tunnel) {
			return fmt.Errorf("row of ipcache: %s", line)
		}
	}
	var tunnels, wantTunnels []string
	out, err := w.lashOn(ctx, node, "bpf", "tunnel", "list")
	if err != nil {
		return err
	}
	for line := range strings.Lines(out) {
		if f := strings.Fields(line); len(f) == 2 && f[0] != "TUNNEL" {
			tunnels = append(tunnels, f[0]+" "+f[1])
		}
	}
	for name, list := range cidrs {
		for _, c := range list {
			if tunnel && name != node {
				wantTunnels = append(wantTunnels, netip.AddrPortFrom(c.Addr(), 0).String()+" "+netip.AddrPortFrom(nodeAddr(name, "v4"), 0).String())
			}
		}
	}
	if err := same("lash bpf tunnel list", tunnels, wantTunnels); err != nil {
		return err
	}

	wantMTU := map[bool]string{true: "mtu 1450", false: "mtu 1500"}[tunnel]
	for _, flag := range []string{"-4", "-6"} {
		out, err := w.in(ctx, w.client[node], "ip", flag, "route", "show", "default")
		if err != nil || !strings.Contains(out, wantMTU) || strings.Count(out, "default") != 1 {
			return fmt.Errorf("routes of pod %s: %q, want %s: %v", w.client[node].name, out, wantMTU, err)
		}
	}
	return nil
}

func same(what string, got, want []string) error {
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		return fmt.Errorf("%s are %q, want %q", what, got, want)
	}
	return nil
}

// checkSwitch passes the cluster to the other mode and back under traffic. It ends in the mode it began with.
func checkSwitch(ctx context.Context, w *world, o Options) (passed, failed int) {
	probes, err := w.startFlows(ctx)
	if err != nil {
		fmt.Fprintf(o.Out, "FAIL switching: %s\n", oneLine(err))
		return 0, 1
	}
	other := map[string]string{"vxlan": "native", "native": "vxlan"}[o.Mode]
	for i := range switches {
		for j, mode := range []string{other, o.Mode} {
			set := testbed.Modes[mode]
			if i%2 == 1 {
				set = oldSpelling[mode]
			}
			if ctx.Err() != nil {
				break
			}
			o.Say("switching to %s (%d of %d)", set, 2*i+j+1, 2*switches)
			began := time.Now()
			err := w.switchTo(ctx, o, set, mode)
			name := fmt.Sprintf("lash upgrade --set %s, time %d: every node is as freshly installed", set, i+1)
			if err != nil {
				failed++
				fmt.Fprintf(o.Out, "FAIL %s: %s\n", name, oneLine(err))
				continue
			}
			passed++
			fmt.Fprintf(o.Out, "ok   %s, after %.0f s\n", name, time.Since(began).Seconds())
		}
	}
	if ctx.Err() != nil {
		for _, p := range probes {
			p.end(ctx, w)
		}
	}
	var verdicts []check
	for _, p := range probes {
		verdicts = append(verdicts, check{fmt.Sprintf("%d changes of mode: %s", 2*switches, p.name), func(ctx context.Context) error { return p.stop(ctx, w, o) }})
	}
	p, f := runChecks(ctx, verdicts, o)
	return passed + p, failed + f
}

// switchTo changes the mode and returns when every node is as freshly installed, or why one is not.
func (w *world) switchTo(ctx context.Context, o Options, set, mode string) error {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	args := []string{"upgrade", "--kubeconfig", w.c.Kubeconfig(false), "--reuse-values", "--set", set}
	if out, err := exec.CommandContext(ctx, o.Lash, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("lash %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	if _, err := w.c.Kubectl(ctx, "-n", "kube-system", "rollout", "status", "ds/lash", "--timeout=120s"); err != nil {
		return err
	}
	for _, n := range w.c.Nodes {
		if err := until(ctx, patience, func(ctx context.Context) error { return w.inMode(ctx, n, mode) }); err != nil {
			return fmt.Errorf("%s: %w", n, err)
		}
	}
	return nil
}

// flow is a toolbox probe that runs in a pod until it is stopped.
type flow struct {
	name, file, pid string
	from            pod
	result          string
}

// startFlows starts connections between all nodes, both families.
func (w *world) startFlows(ctx context.Context) ([]*flow, error) {
	var flows []*flow
	for i, f := range []struct{ from, to, family, proto string }{
		{"n1", "n2", "v4", "tcp"}, {"n2", "n3", "v6", "tcp"}, {"n3", "n1", "v4", "udp"}, {"n1", "n3", "v6", "udp"},
	} {
		port := map[string]uint16{"tcp": 8082, "udp": 8081}[f.proto]
		p := &flow{name: fmt.Sprintf("%s, %s, pod of %s to pod of %s", f.proto, f.family, f.from, f.to), file: "/tmp/flow" + strconv.Itoa(i), from: w.client[f.from]}
		out, err := w.in(ctx, p.from, "sh", "-c", fmt.Sprintf("toolbox probe -interval %s -for 1h %s %s >%s 2>&1 & echo $!", flowInterval, f.proto, netip.AddrPortFrom(w.web[f.to].addrs[f.family], port), p.file))
		if err != nil {
			for _, f := range flows {
				f.end(ctx, w)
			}
			return nil, err
		}
		p.pid = strings.TrimSpace(out)
		flows = append(flows, p)
	}
	return flows, nil
}

// end ends the flow, whatever became of ctx.
func (p *flow) end(ctx context.Context, w *world) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	_, _ = w.in(ctx, p.from, "sh", "-c", fmt.Sprintf("kill %s; rm -f %s", p.pid, p.file))
}

// stop ends the flow and judges it: it lives, and was silent for no longer than it may.
func (p *flow) stop(ctx context.Context, w *world, o Options) error {
	if p.result == "" {
		out, err := w.in(ctx, p.from, "sh", "-c", fmt.Sprintf("kill %s; for i in $(seq 50); do [ -s %s ] && break; sleep 0.1; done; cat %[2]s; rm -f %[2]s", p.pid, p.file))
		if err != nil {
			return err
		}
		p.result = out
		o.Say("%s: %s", p.name, strings.TrimSpace(out))
	}
	var r struct {
		Sent, Lost, Resent, Needless int64
		MaxGapMS                     float64
		Error                        string
	}
	if err := json.Unmarshal([]byte(p.result), &r); err != nil {
		return fmt.Errorf("the probe said %q", p.result)
	}
	// A gap in which nothing was lost is a probe that waited for the CPU.
	silent := time.Duration(r.Lost) * flowInterval
	if r.Resent > r.Needless {
		silent = time.Duration(r.MaxGapMS) * time.Millisecond
	}
	if r.Error != "" || r.Sent == 0 || silent > silence {
		return fmt.Errorf("%d sent, %d lost, %d sent again with need, longest gap %.0f ms, %s", r.Sent, r.Lost, r.Resent-r.Needless, r.MaxGapMS, r.Error)
	}
	return nil
}
