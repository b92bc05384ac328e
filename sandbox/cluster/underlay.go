// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/lash-net/lash/sandbox/plan"
)

const netnsDir = "/run/netns"

// ip runs commands of ip(8), one a line, in a network namespace.
func ip(ctx context.Context, ns string, lines ...string) error {
	cmd := exec.CommandContext(ctx, "ip", "-n", ns, "-batch", "-")
	cmd.Stdin = strings.NewReader(strings.Join(lines, "\n") + "\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("ip in namespace %s: %w: %s", ns, err, strings.TrimSpace(string(out)))
	}
	return nil
}

// inNetns runs a command in a network namespace and its own view of /sys, as `ip netns exec` does.
func inNetns(ctx context.Context, ns string, argv ...string) error {
	if out, err := exec.CommandContext(ctx, "ip", append([]string{"netns", "exec", ns}, argv...)...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s in namespace %s: %w: %s", argv[0], ns, err, strings.TrimSpace(string(out)))
	}
	return nil
}

func addNetns(ctx context.Context, ns string) error {
	if out, err := exec.CommandContext(ctx, "ip", "netns", "add", ns).CombinedOutput(); err != nil {
		return fmt.Errorf("ip netns add %s: %w: %s", ns, err, strings.TrimSpace(string(out)))
	}
	return nil
}

// deleteNetns removes a namespace's name, also one whose mount is gone after a reboot.
func deleteNetns(ns string) error {
	p := filepath.Join(netnsDir, ns)
	for {
		if err := unix.Unmount(p, unix.MNT_DETACH); err != nil { // EINVAL: not a mount (any more)
			break
		}
	}
	if err := os.Remove(p); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// listNetns lists the namespaces of a sandbox.
func listNetns(sandbox string) []string {
	entries, err := os.ReadDir(netnsDir)
	if err != nil {
		return nil
	}
	var list []string
	for _, e := range entries {
		if s, _, ok := plan.ParseNetns(e.Name()); ok && s == sandbox {
			list = append(list, e.Name())
		}
	}
	return list
}

// underlay makes the bridge that everything hangs on and the machine outside the cluster. The bridge is
// also the default gateway: it forwards to the outside machine's second address and drops the rest.
func (c *Cluster) underlay(ctx context.Context) error {
	sw := c.netns(plan.Switch)
	if err := addNetns(ctx, sw); err != nil {
		return err
	}
	if err := inNetns(ctx, sw, "sh", "-c", `set -e
for f in /proc/sys/net/bridge/bridge-nf-call-*; do [ ! -e "$f" ] || echo 0 > "$f"; done
echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding
for i in all default; do echo 0 > /proc/sys/net/ipv4/conf/$i/send_redirects; echo 0 > /proc/sys/net/ipv4/conf/$i/rp_filter; done`); err != nil {
		return err
	}
	if err := ip(ctx, sw,
		"link set lo up",
		"link add br0 type bridge mcast_snooping 0",
		"addr add "+cidr(plan.Gateway4, plan.Underlay4)+" dev br0",
		"addr add "+cidr(plan.Gateway6, plan.Underlay6)+" dev br0 nodad",
		"link set br0 up",
		"route add blackhole default",
		"route add blackhole ::/0",
		"route add "+plan.Beyond4.String()+" via "+plan.Outside4.String(),
		"route add "+plan.Beyond6.String()+" via "+plan.Outside6.String(),
	); err != nil {
		return err
	}
	if err := c.attach(ctx, plan.ControlPlane, plan.ControlPlane4, plan.ControlPlane6); err != nil {
		return err
	}
	if err := c.attach(ctx, plan.Outside, plan.Outside4, plan.Outside6); err != nil {
		return err
	}
	return ip(ctx, c.netns(plan.Outside),
		"addr add "+plan.Beyond4.String()+" dev lo",
		"addr add "+plan.Beyond6.String()+" dev lo nodad")
}

// attach makes a host: a network namespace with eth0 on the bridge.
func (c *Cluster) attach(ctx context.Context, host string, v4, v6 netip.Addr) error {
	ns := c.netns(host)
	if err := addNetns(ctx, ns); err != nil {
		return err
	}
	if err := ip(ctx, c.netns(plan.Switch),
		"link add "+host+" type veth peer name eth0 netns "+ns,
		"link set "+host+" master br0 up"); err != nil {
		return err
	}
	return ip(ctx, ns,
		"link set lo up",
		"addr add "+cidr(v4, plan.Underlay4)+" dev eth0",
		"addr add "+cidr(v6, plan.Underlay6)+" dev eth0 nodad",
		"link set eth0 up",
		"route add default via "+plan.Gateway4.String(),
		"route add ::/0 via "+plan.Gateway6.String())
}

func cidr(a netip.Addr, p netip.Prefix) string { return netip.PrefixFrom(a, p.Bits()).String() }
