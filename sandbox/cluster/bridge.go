// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/lash-net/lash/sandbox/plan"
)

// syncCNI makes the pod network of --cni bridge what it should be for the nodes there are: the
// distribution's bridge plugin on every node, routes to the other nodes' pods, masquerading of what
// leaves the cluster. It may be called at any time and as often as wanted.
func (c *Cluster) syncCNI(ctx context.Context) error {
	if c.CNI != "bridge" {
		return nil
	}
	if err := c.waitRegistered(ctx, c.Nodes...); err != nil {
		return err
	}
	cidrs, err := c.podCIDRs(ctx)
	if err != nil {
		return err
	}
	return each(c.Nodes, func(n string) error {
		if !c.init(n).Alive() {
			return nil
		}
		return c.bridgeNode(ctx, n, cidrs)
	})
}

func (c *Cluster) podCIDRs(ctx context.Context) (map[string][]netip.Prefix, error) {
	out, err := c.Kubectl(ctx, "get", "nodes", "-o", `jsonpath={range .items[*]}{.metadata.name}{range .spec.podCIDRs[*]}{" "}{@}{end}{"\n"}{end}`)
	if err != nil {
		return nil, err
	}
	cidrs := map[string][]netip.Prefix{}
	for line := range strings.Lines(out) {
		f := strings.Fields(line)
		for i := 1; i < len(f); i++ {
			p, err := netip.ParsePrefix(f[i])
			if err != nil {
				return nil, err
			}
			cidrs[f[0]] = append(cidrs[f[0]], p)
		}
	}
	return cidrs, nil
}

func (c *Cluster) bridgeNode(ctx context.Context, name string, cidrs map[string][]netip.Prefix) error {
	for _, p := range []string{"bridge", "host-local", "portmap"} {
		to := filepath.Join(c.nodeDir(name), "opt/cni/bin", p)
		if _, err := os.Stat(to); err == nil {
			continue
		}
		if err := copyFile("/usr/lib/cni/"+p, to, 0o755); err != nil {
			return err
		}
	}
	var script strings.Builder
	script.WriteString("set -e\nip route flush proto 77; ip -6 route flush proto 77\n")
	for other, list := range cidrs {
		i, err := plan.NodeIndex(other)
		if err != nil || other == name {
			continue
		}
		v4, v6 := plan.NodeAddrs(i)
		for _, p := range list {
			via := v4
			if p.Addr().Is6() {
				via = v6
			}
			fmt.Fprintf(&script, "ip route replace %s via %s proto 77\n", p, via)
		}
	}
	for cmd, pods := range map[string]netip.Prefix{"iptables": plan.Pods4, "ip6tables": plan.Pods6} {
		rule := fmt.Sprintf("POSTROUTING -s %s ! -d %s -j MASQUERADE", pods, pods)
		fmt.Fprintf(&script, "%s -w -t nat -C %s 2>/dev/null || %s -w -t nat -A %s\n", cmd, rule, cmd, rule)
	}
	if _, err := c.Exec(ctx, name, "sh", "-c", script.String()); err != nil {
		return fmt.Errorf("bridge network of %s: %w", name, err)
	}
	var ranges []any
	for _, p := range cidrs[name] {
		ranges = append(ranges, []any{map[string]string{"subnet": p.String()}})
	}
	conf, err := json.MarshalIndent(map[string]any{
		"cniVersion": "0.4.0", "name": "sandbox-bridge",
		"plugins": []any{
			map[string]any{"type": "bridge", "bridge": "cni0", "isGateway": true, "isDefaultGateway": true, "hairpinMode": true,
				"ipMasq": false, "mtu": 1500, "ipam": map[string]any{"type": "host-local", "ranges": ranges}},
			map[string]any{"type": "portmap", "capabilities": map[string]bool{"portMappings": true}, "snat": true},
		},
	}, "", " ")
	if err != nil {
		return err
	}
	// containerd looks at the directory when a file is renamed in it, not when one is created
	f := filepath.Join(c.nodeDir(name), "etc/cni/net.d/10-bridge.conflist")
	if err := os.WriteFile(f+".new", conf, 0o644); err != nil {
		return err
	}
	return os.Rename(f+".new", f)
}

// WaitNodesReady returns when all nodes are Ready.
func (c *Cluster) WaitNodesReady(ctx context.Context, limit time.Duration) error {
	return poll(ctx, limit, "nodes Ready", func() (bool, error) {
		out, err := c.Kubectl(ctx, "get", "nodes", "-o", `jsonpath={range .items[*]}{.metadata.name}={.status.conditions[?(@.type=="Ready")].status}{"\n"}{end}`)
		if err != nil {
			return false, err
		}
		for _, n := range c.Nodes {
			if !strings.Contains("\n"+out, "\n"+n+"=True\n") {
				return false, fmt.Errorf("node %s is not Ready", n)
			}
		}
		return true, nil
	})
}
