// SPDX-License-Identifier: Apache-2.0

package config

import (
	"encoding/base64"
	"net/netip"
	"slices"
	"strings"
)

// maglevSizes are primes, as the algorithm needs them.
var maglevSizes = []int{251, 509, 1021, 2039, 4093, 8191, 16381, 32749, 65521, 131071}

const maglevSeedLen = 12

// MaglevSeed is the seed of Maglev tables.
func (c *Config) MaglevSeed() []byte {
	seed, _ := base64.StdEncoding.DecodeString(c.LBMaglevHashSeed) // checked when it was loaded
	return seed
}

// DSRProblem says why backends' nodes cannot be told as configured which frontend was asked; empty: they can.
func (c *Config) DSRProblem() string {
	switch c.LBDSRDispatch {
	case "geneve":
		if c.TunnelProtocol != "geneve" {
			return "geneve needs tunnel-protocol geneve, in any routing mode: set it, or opt, an IP option"
		}
	case "ipip":
		return "ipip is for load balancers outside of the cluster, whose nodes share no option with its own; they are not served: " +
			"set opt, an IP option, or geneve where the network drops those"
	}
	return ""
}

func (c *Config) checkServices(bad func(string, string, ...any)) {
	if !slices.Contains(maglevSizes, c.LBMaglevTableSize) {
		bad("bpf-lb-maglev-table-size", "must be one of 251, 509, 1021, 2039, 4093, 8191, 16381, 32749, 65521, 131071")
	}
	if seed, err := base64.StdEncoding.DecodeString(c.LBMaglevHashSeed); err != nil || len(seed) != maglevSeedLen {
		bad("bpf-lb-maglev-hash-seed", "must be %d bytes in base64: make one with 'head -c%d /dev/urandom | base64 -w0'", maglevSeedLen, maglevSeedLen)
	}
	if why := c.DSRProblem(); why != "" && c.LBMode != "snat" {
		bad("bpf-lb-dsr-dispatch", "%s", why)
	} else if why != "" {
		c.notes = append(c.notes, "bpf-lb-dsr-dispatch: "+c.LBDSRDispatch+" has no effect: bpf-lb-mode is snat; services that ask for dsr by their annotation use opt")
	}
	switch xdp := c.LBAcceleration != "disabled"; {
	case !xdp && c.LBXDPSpread:
		bad("bpf-lb-xdp-spread", "there is no XDP: set bpf-lb-acceleration to best-effort or native, or bpf-lb-xdp-spread to false")
	case xdp && !c.KubeProxyReplacement:
		c.notes = append(c.notes, "bpf-lb-acceleration: kube-proxy-replacement is off, so XDP serves no services; it only filters (lash prefilter)")
	}
	if !labelValueRE.MatchString(c.K8sServiceProxyName) {
		bad("k8s-service-proxy-name", "must be empty or the value of a label: at most 63 letters, digits, dashes, dots and underscores, with a letter or digit at both ends")
	}
	if s := c.KPRHealthzBindAddr; s != "" {
		if a, err := netip.ParseAddrPort(s); err != nil || a.Port() == 0 {
			bad("kube-proxy-replacement-healthz-bind-address", "must be empty (none) or ADDRESS:PORT, like 0.0.0.0:10256")
		}
	}
	for _, p := range c.NodePortAddresses {
		if p.Addr().Is6() && !c.EnableIPv6 || p.Addr().Is4() && !c.EnableIPv4 {
			c.notes = append(c.notes, "nodeport-addresses: "+p.String()+" has no effect: "+strings.TrimSpace(family(p.Addr().Is6()))+" is off")
		}
	}
}
