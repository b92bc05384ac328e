// SPDX-License-Identifier: Apache-2.0

package config

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/lash-net/lash/internal/model"
)

var (
	clusterNameRE = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,30}[a-z0-9])?$`)
	ifNameRE      = regexp.MustCompile(`^[^\s/:+]{1,15}\+?$`)
	labelValueRE  = regexp.MustCompile(`^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$`)
	taintKeyRE    = regexp.MustCompile(`^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$`)
)

// maxBlockBits bounds the addresses of one node to 65536, the number of endpoints a node can tell apart.
const maxBlockBits = 16

// check verifies what no single value can: ranges, and keys against each other. It adds notes for what is legal but
// suspicious.
func (c *Config) check() []error {
	var errs []error
	bad := func(key, format string, args ...any) {
		v, _ := c.Get(key)
		errs = append(errs, &Error{key, v, c.sources[key], fmt.Sprintf(format, args...)})
	}
	inRange := func(key string, v, low, high int) {
		if v < low || v > high {
			bad(key, "must be from %d to %d", low, high)
		}
	}

	if !c.EnableIPv4 && !c.EnableIPv6 {
		bad("enable-ipv4", "IPv4 and IPv6 are both off: set enable-ipv4 or enable-ipv6 to true")
	}
	c.checkFamily("ipv4-native-routing-cidr", c.IPv4NativeRoutingCIDR, false, c.EnableIPv4, bad)
	c.checkFamily("ipv6-native-routing-cidr", c.IPv6NativeRoutingCIDR, true, c.EnableIPv6, bad)

	if c.EnableIPMasqAgent && !c.EnableBPFMasquerade {
		bad("enable-ip-masq-agent", "needs masquerading in BPF: set enable-bpf-masquerade to true, or this to false")
	}
	c.checkTunnel(bad)
	if c.MTU != 0 {
		low := 576
		if c.EnableIPv6 {
			low = 1280
		}
		why := ""
		if c.Tunnel() {
			low += c.TunnelOverhead()
			why = fmt.Sprintf(", of which the tunnel takes %d", c.TunnelOverhead())
		}
		if c.MTU < low || c.MTU > 65535 {
			bad("mtu", "must be 0 (detect) or from %d to 65535%s", low, why)
		}
	}
	for _, d := range c.Devices {
		if !ifNameRE.MatchString(d) {
			bad("devices", "%q is not the name of a network device: write names of at most 15 characters, like eth0,bond+", d)
		}
	}
	if d := c.DirectRoutingDevice; d != "" {
		if !ifNameRE.MatchString(d) || strings.HasSuffix(d, "+") {
			bad("direct-routing-device", "must be the name of one network device, like eth0")
		} else if len(c.Devices) > 0 && !matchesDevice(c.Devices, d) {
			bad("direct-routing-device", "is not among devices=%q: add it there", strings.Join(c.Devices, ","))
		}
	}

	inRange("bpf-lb-map-max", c.BPFLBMapMax, 256, 1<<24)
	c.checkServices(bad)
	inRange("bpf-ct-max", c.BPFCTMax, 1024, 1<<24)
	inRange("cluster-id", c.ClusterID, 0, 255)
	inRange("agent-health-port", c.AgentHealthPort, 1, 65535)
	if p := c.AgentHealthPort; p >= int(c.NodePortRange.First) && p <= int(c.NodePortRange.Last) {
		bad("agent-health-port", "lies in node-port-range %d-%d: choose a port outside of it", c.NodePortRange.First, c.NodePortRange.Last)
	}
	inRange("cluster-health-port", c.ClusterHealthPort, 1, 65535)
	if p := c.ClusterHealthPort; p >= int(c.NodePortRange.First) && p <= int(c.NodePortRange.Last) {
		bad("cluster-health-port", "lies in node-port-range %d-%d: choose a port outside of it", c.NodePortRange.First, c.NodePortRange.Last)
	}
	if _, err := netip.ParseAddrPort(c.OperatorAPIServeAddr); err != nil {
		bad("operator-api-serve-addr", "must be ADDRESS:PORT, like 127.0.0.1:9234")
	}
	if !clusterNameRE.MatchString(c.ClusterName) {
		c.checkLongClusterName(bad)
	}
	if c.ClusterID != 0 && c.ClusterName == "default" {
		bad("cluster-name", "must be set to a name of its own when cluster-id is not 0")
	}
	if !taintKeyRE.MatchString(c.AgentNotReadyTaintKey) {
		bad("agent-not-ready-taint-key", "must be a taint key, like node.cilium.io/agent-not-ready")
	}
	for key, path := range map[string]string{
		"cni-conf-dir": c.CNIConfDir, "cni-bin-dir": c.CNIBinDir, "state-dir": c.StateDir,
		"ip-masq-agent-config-path": c.IPMasqAgentConfigPath, "socket-path": c.SocketPath, "cni-socket-path": c.CNISocketPath, "bpf-root": c.BPFRoot,
	} {
		if !filepath.IsAbs(path) || filepath.Clean(path) != path || path == "/" {
			bad(key, "must be an absolute path without . or .. parts")
		}
	}
	if c.SocketPath == c.CNISocketPath {
		bad("cni-socket-path", "is the same as socket-path: choose another file")
	}
	for _, key := range []string{"socket-path", "cni-socket-path"} {
		if v, _ := c.Get(key); len(v) > 107 {
			bad(key, "is longer than the 107 bytes a socket's path may have: shorten it")
		}
	}
	if c.CgroupRoot != "" && !filepath.IsAbs(c.CgroupRoot) {
		bad("cgroup-root", "must be empty (detect) or an absolute path, like /sys/fs/cgroup")
	}
	for _, d := range c.DebugVerbose {
		if !slices.Contains([]string{"datapath", "flow", "kvstore", "envoy", "policy", "none"}, d) {
			bad("debug-verbose", "must be datapath or empty")
		}
	}
	if _, err := TCPFlags(c.MonitorFlags); err != nil {
		bad("monitor-aggregation-flags", "%v", err)
	}
	if d := c.MonitorInterval; d < 100*time.Millisecond || d > time.Hour {
		bad("monitor-aggregation-interval", "must be from 100ms to 1h")
	}
	if d := c.NodesGCInterval; d != 0 && d < time.Second {
		bad("nodes-gc-interval", "must be 0s (never) or at least 1s")
	}
	for key, d := range map[string]time.Duration{"identity-heartbeat-timeout": c.IdentityHeartbeatTimeout, "cilium-endpoint-gc-interval": c.CiliumEndpointGCInterval} {
		if d != 0 && d < time.Second {
			bad(key, "must be 0s (never) or at least 1s")
		}
	}
	if c.IdentityGCInterval < time.Second {
		bad("identity-gc-interval", "must be at least 1s, the time agents have to object")
	}
	if _, err := model.ParseLabelFilter(c.Labels); err != nil {
		bad("labels", "%v", err)
	}
	if d := c.UnmanagedPodWatcherPeriod; d != 0 && d < time.Second {
		bad("unmanaged-pod-watcher-interval", "must be 0s (never) or at least 1s")
	}
	if c.IPAM == "cluster-pool" {
		c.checkPools(bad)
	}
	slices.SortFunc(errs, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	return errs
}

func (c *Config) checkFamily(key string, p netip.Prefix, ipv6, enabled bool, bad func(string, string, ...any)) {
	switch {
	case !p.IsValid():
	case p.Addr().Is6() != ipv6:
		bad(key, "must be an %s CIDR", family(ipv6))
	case !enabled:
		c.notes = append(c.notes, fmt.Sprintf("%s=%q (%s) has no effect: %s is off", key, p, c.sources[key], family(ipv6)))
	}
}

func (c *Config) checkTunnel(bad func(string, string, ...any)) {
	if c.TunnelPort < 0 || c.TunnelPort > 65535 {
		bad("tunnel-port", "must be 0 (8472 for vxlan, 6081 for geneve) or from 1 to 65535")
		return
	}
	if p := c.TunnelUDPPort(); c.Tunnel() && p >= c.NodePortRange.First && p <= c.NodePortRange.Last {
		bad("tunnel-port", "lies in node-port-range %d-%d: choose a port outside of it", c.NodePortRange.First, c.NodePortRange.Last)
	}
	if ipv6 := c.UnderlayIPv6(); ipv6 && !c.EnableIPv6 || !ipv6 && !c.EnableIPv4 {
		bad("underlay-protocol", "%s is off: set enable-%s to true, or underlay-protocol to auto", family(ipv6), strings.ToLower(family(ipv6)))
	}
	if c.RoutingMode == "hybrid" && !c.AutoDirectNodeRoutes {
		bad("routing-mode", "hybrid routes to nodes on the same link, and auto-direct-node-routes is false: set it to true, or routing-mode to tunnel")
	}
}

// checkLongClusterName accepts names of up to 63 characters with a note: the field's charts once allowed them, and
// users have such names (a kind cluster's, for one).
func (c *Config) checkLongClusterName(bad func(string, string, ...any)) {
	n := c.ClusterName
	if len(n) > 32 && len(n) <= 63 && clusterNameRE.MatchString(n[:32]) && clusterNameRE.MatchString(n[31:]) && c.ClusterID == 0 {
		c.notes = append(c.notes, fmt.Sprintf("cluster-name=%q (%s) is longer than the 32 characters connected clusters may have", n, c.sources["cluster-name"]))
		return
	}
	bad("cluster-name", "must be at most 32 lower-case letters, digits and dashes, starting and ending with a letter or digit")
}

func (c *Config) checkPools(bad func(string, string, ...any)) {
	for _, f := range []struct {
		ipv6, enabled    bool
		cidrKey, maskKey string
		cidrs            []netip.Prefix
		mask             int
		native           netip.Prefix
	}{
		{false, c.EnableIPv4, "cluster-pool-ipv4-cidr", "cluster-pool-ipv4-mask-size", c.ClusterPoolIPv4CIDR, c.ClusterPoolIPv4MaskSize, c.IPv4NativeRoutingCIDR},
		{true, c.EnableIPv6, "cluster-pool-ipv6-cidr", "cluster-pool-ipv6-mask-size", c.ClusterPoolIPv6CIDR, c.ClusterPoolIPv6MaskSize, c.IPv6NativeRoutingCIDR},
	} {
		if !f.enabled {
			continue
		}
		bits := 32
		if f.ipv6 {
			bits = 128
		}
		if len(f.cidrs) == 0 {
			bad(f.cidrKey, "is empty: give at least one %s CIDR for pods", family(f.ipv6))
			continue
		}
		if f.mask < bits-maxBlockBits || f.mask > bits-2 {
			bad(f.maskKey, "must be from %d to %d", bits-maxBlockBits, bits-2)
			continue
		}
		for i, p := range f.cidrs {
			switch {
			case p.Addr().Is6() != f.ipv6:
				bad(f.cidrKey, "%s is not an %s CIDR", p, family(f.ipv6))
				continue
			case p.Bits() > f.mask:
				bad(f.cidrKey, "%s is smaller than the /%d a node gets: enlarge it or raise %s", p, f.mask, f.maskKey)
			case p.Addr().IsLoopback() || p.Addr().IsMulticast() || p.Addr().IsLinkLocalUnicast():
				bad(f.cidrKey, "%s is loopback, link-local or multicast: choose a private range, like 10.0.0.0/8 or fd00::/104", p)
			}
			for _, q := range f.cidrs[:i] {
				if p.Overlaps(q) {
					bad(f.cidrKey, "%s and %s overlap: remove one of them", q, p)
				}
			}
			if n := f.native; n.IsValid() && n.Addr().Is6() == f.ipv6 && !(n.Overlaps(p) && n.Bits() <= p.Bits()) {
				c.notes = append(c.notes, fmt.Sprintf(
					"%s does not contain the pool %s: packets to pods outside of it are masqueraded like packets to the outside", n, p))
			}
		}
	}
}

func matchesDevice(patterns []string, name string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool {
		prefix, wild := strings.CutSuffix(p, "+")
		return p == name || wild && strings.HasPrefix(name, prefix)
	})
}

func family(ipv6 bool) string {
	if ipv6 {
		return "IPv6"
	}
	return "IPv4"
}
