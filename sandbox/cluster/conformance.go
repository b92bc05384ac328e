// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"encoding/json"
	"net/netip"
	"path/filepath"

	"github.com/lash-net/lash/sandbox/build"
	"github.com/lash-net/lash/sandbox/deps"
	"github.com/lash-net/lash/sandbox/image"
	"github.com/lash-net/lash/sandbox/plan"
)

// ConformanceKit is what running the Kubernetes e2e suite takes: programs, and archives of the images that its pods run.
type ConformanceKit struct {
	E2E, Ginkgo, Kubectl string
	Archives             []string
}

// PrepareConformance makes the kit, besides what Prepare makes. It is slow once.
func (c *Cluster) PrepareConformance(ctx context.Context) (ConformanceKit, error) {
	k := ConformanceKit{E2E: c.cache.Bin(build.E2E), Ginkgo: c.cache.Bin("ginkgo"), Kubectl: c.cache.Bin("kubectl")}
	if _, err := c.Prepare(ctx); err != nil {
		return k, err
	}
	if err := deps.Conformance.Ensure(ctx, c.Say); err != nil {
		return k, err
	}
	if err := c.cache.Ensure(ctx, build.Conformance, c.Say); err != nil {
		return k, err
	}
	archives, err := image.EnsureE2E(filepath.Join(CacheDir, "images"), c.cache.Bin, c.Say)
	k.Archives = archives
	return k, err
}

// RouteToPods gives the control plane's machine routes to the pods of every node: the API server proxies to pods, as
// it does where it runs on a node or in a network that knows the pods' addresses.
func (c *Cluster) RouteToPods(ctx context.Context) error {
	cidrs, err := c.podCIDRs(ctx)
	if c.CNI == "none" {
		cidrs, err = c.ciliumCIDRs(ctx)
	}
	if err != nil {
		return err
	}
	var routes []string
	for node, list := range cidrs {
		i, err := plan.NodeIndex(node)
		if err != nil {
			return err
		}
		v4, v6 := plan.NodeAddrs(i)
		for _, p := range list {
			via := v4
			if p.Addr().Is6() {
				via = v6
			}
			routes = append(routes, "route replace "+p.String()+" via "+via.String())
		}
	}
	return ip(ctx, c.netns(plan.ControlPlane), routes...)
}

// ciliumCIDRs are the ranges of pods that each node was given, as CiliumNode objects say.
func (c *Cluster) ciliumCIDRs(ctx context.Context) (map[string][]netip.Prefix, error) {
	out, err := c.Kubectl(ctx, "get", "ciliumnodes", "-o", "json")
	if err != nil {
		return nil, err
	}
	var list struct {
		Items []struct {
			Metadata struct{ Name string }
			Spec     struct {
				IPAM struct{ PodCIDRs []netip.Prefix }
			}
		}
	}
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		return nil, err
	}
	cidrs := map[string][]netip.Prefix{}
	for _, n := range list.Items {
		cidrs[n.Metadata.Name] = n.Spec.IPAM.PodCIDRs
	}
	return cidrs, nil
}
