// SPDX-License-Identifier: Apache-2.0

package operator

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"

	v2 "github.com/lash-net/lash/api/v2"
	"github.com/lash-net/lash/internal/config"
	"github.com/lash-net/lash/internal/podcidr"
)

// ciliumNodes is what the pass writes to; *v2.Nodes is one.
type ciliumNodes interface {
	Patch(ctx context.Context, name string, pt types.PatchType, data []byte, subresources ...string) (*v2.CiliumNode, error)
	Delete(ctx context.Context, name string, uid types.UID, version string) error
}

// view is what the pass reads: snapshots of the caches, and one question the caches may answer too late.
type view interface {
	Nodes() []*corev1.Node
	CiliumNodes() []*v2.CiliumNode
	ServiceCIDRs() []netip.Prefix
	NodeIsGone(ctx context.Context, name string) (bool, error)
}

// nodesPass brings every CiliumNode to where it should be. It remembers only what makes the next pass right before the
// caches have caught up with this one, and since when a node is missing.
type nodesPass struct {
	log     *slog.Logger
	view    view
	client  ciliumNodes
	pools   []podcidr.Pool // empty: somebody else assigns pod CIDRs
	grace   time.Duration  // 0: never delete
	now     func() time.Time
	written map[string]*v2.CiliumNode // newer than the cache's
	missing map[types.UID]time.Time
	warned  map[string]bool
}

func newNodesPass(log *slog.Logger, c *config.Config, v view, client ciliumNodes) *nodesPass {
	return &nodesPass{
		log: log, view: v, client: client, pools: poolsOf(c), grace: c.NodesGCInterval, now: time.Now,
		written: map[string]*v2.CiliumNode{}, missing: map[types.UID]time.Time{}, warned: map[string]bool{},
	}
}

func poolsOf(c *config.Config) []podcidr.Pool {
	if c.IPAM != "cluster-pool" {
		return nil
	}
	var pools []podcidr.Pool
	if c.EnableIPv4 {
		pools = append(pools, podcidr.Pool{Family: "IPv4", CIDRs: c.ClusterPoolIPv4CIDR, MaskSize: c.ClusterPoolIPv4MaskSize, CIDRKey: "cluster-pool-ipv4-cidr"})
	}
	if c.EnableIPv6 {
		pools = append(pools, podcidr.Pool{Family: "IPv6", CIDRs: c.ClusterPoolIPv6CIDR, MaskSize: c.ClusterPoolIPv6MaskSize, CIDRKey: "cluster-pool-ipv6-cidr"})
	}
	return pools
}

// run implements pass.
func (p *nodesPass) run(ctx context.Context) (again time.Duration, err error) {
	nodes, ciliumNodes := p.view.Nodes(), p.current()
	var errs []error
	ciliumNodes, again, err = p.collect(ctx, nodes, ciliumNodes)
	errs = append(errs, err)
	if len(p.pools) > 0 {
		errs = append(errs, p.assign(ctx, nodes, ciliumNodes))
	}
	return again, errors.Join(errs...)
}

// current is the cache's CiliumNodes with those replaced that this pass wrote and the cache has not seen yet. Without
// it a CIDR could be given away again in the time between.
func (p *nodesPass) current() []*v2.CiliumNode {
	list := p.view.CiliumNodes()
	seen := map[string]bool{}
	for i, n := range list {
		seen[n.Name] = true
		if w := p.written[n.Name]; w != nil {
			if w.UID == n.UID && older(n.ResourceVersion, w.ResourceVersion) {
				list[i] = w
			} else {
				delete(p.written, n.Name)
			}
		}
	}
	for name := range p.written {
		if !seen[name] {
			delete(p.written, name)
		}
	}
	return list
}

// collect deletes CiliumNodes whose Node has been gone for the time of grace and returns the others.
func (p *nodesPass) collect(ctx context.Context, nodes []*corev1.Node, ciliumNodes []*v2.CiliumNode) (left []*v2.CiliumNode, again time.Duration, err error) {
	exists := map[string]bool{}
	for _, n := range nodes {
		exists[n.Name] = true
	}
	var errs []error
	stillMissing := map[types.UID]time.Time{}
	for _, cn := range ciliumNodes {
		if exists[cn.Name] || p.grace == 0 {
			left = append(left, cn)
			continue
		}
		since, ok := p.missing[cn.UID]
		if !ok {
			since = p.now()
		}
		if wait := p.grace - p.now().Sub(since); wait > 0 {
			stillMissing[cn.UID] = since
			left = append(left, cn)
			if again == 0 || wait < again {
				again = wait
			}
			continue
		}
		gone, err := p.view.NodeIsGone(ctx, cn.Name)
		if err == nil && gone {
			err = p.client.Delete(ctx, cn.Name, cn.UID, "")
		}
		switch {
		case err != nil && !apierrors.IsNotFound(err):
			errs = append(errs, fmt.Errorf("delete CiliumNode %s: %w", cn.Name, err))
			stillMissing[cn.UID] = since
			left = append(left, cn)
		case gone:
			p.log.Info("node removed", "node", cn.Name, "podCIDRs", cn.Spec.IPAM.PodCIDRs)
		default:
			left = append(left, cn)
		}
	}
	p.missing = stillMissing
	return left, again, errors.Join(errs...)
}

func (p *nodesPass) assign(ctx context.Context, nodes []*corev1.Node, ciliumNodes []*v2.CiliumNode) error {
	addrs, services := nodeAddresses(nodes, ciliumNodes), p.view.ServiceCIDRs()
	for _, text := range slices.Concat(podcidr.Overlaps(p.pools, addrs, "node addresses"), podcidr.Overlaps(p.pools, services, "the service range")) {
		if key, _, _ := strings.Cut(text, ":"); !p.warned[key] {
			p.warned[key] = true
			p.log.Warn("pools overlap with other addresses", "detail", text)
		}
	}

	var in []podcidr.Node
	for _, cn := range ciliumNodes {
		in = append(in, podcidr.Node{Name: cn.Name, Created: cn.CreationTimestamp.Time, PodCIDRs: cn.Spec.IPAM.PodCIDRs})
	}
	results := podcidr.Plan(p.pools, in, slices.Concat(addrs, services))

	var errs []error
	for _, cn := range ciliumNodes {
		if err := p.write(ctx, cn, results[cn.Name]); err != nil {
			errs = append(errs, fmt.Errorf("update CiliumNode %s: %w", cn.Name, err))
		}
	}
	return errors.Join(errs...)
}

// write brings one CiliumNode to its result. The patch carries the version it was planned on, so that it fails rather
// than overwrite what somebody else has assigned meanwhile.
func (p *nodesPass) write(ctx context.Context, cn *v2.CiliumNode, r podcidr.Result) error {
	if r.Changed {
		patch := map[string]any{
			"metadata": map[string]any{"resourceVersion": cn.ResourceVersion},
			"spec":     map[string]any{"ipam": map[string]any{"podCIDRs": r.PodCIDRs}},
		}
		if err := p.patch(ctx, cn.Name, patch); err != nil {
			return err
		}
		p.log.Info("pod CIDRs assigned", "node", cn.Name, "podCIDRs", r.PodCIDRs)
	}
	var message string
	if r.Err != nil {
		message = r.Err.Error()
	}
	if message == cn.Status.IPAM.OperatorStatus.Error {
		return nil
	}
	if message != "" {
		p.log.Error("node lacks pod CIDRs", "node", cn.Name, "error", message)
	}
	patch := map[string]any{"status": map[string]any{"ipam": map[string]any{"operator-status": map[string]any{"error": message}}}}
	return p.patch(ctx, cn.Name, patch, "status")
}

func (p *nodesPass) patch(ctx context.Context, name string, patch map[string]any, subresources ...string) error {
	b, err := json.Marshal(patch)
	if err != nil {
		return err
	}
	got, err := p.client.Patch(ctx, name, types.MergePatchType, b, subresources...)
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	p.written[name] = got
	return nil
}

// nodeAddresses returns the addresses of all nodes that are not a router's, as prefixes.
func nodeAddresses(nodes []*corev1.Node, ciliumNodes []*v2.CiliumNode) []netip.Prefix {
	set := map[netip.Prefix]bool{}
	add := func(s string) {
		if a, err := netip.ParseAddr(s); err == nil {
			set[netip.PrefixFrom(a.Unmap(), a.Unmap().BitLen())] = true
		}
	}
	for _, n := range nodes {
		for _, a := range n.Status.Addresses {
			if a.Type == corev1.NodeInternalIP || a.Type == corev1.NodeExternalIP {
				add(a.Address)
			}
		}
	}
	for _, n := range ciliumNodes {
		for _, a := range n.Spec.Addresses {
			if a.Type == v2.InternalIP || a.Type == v2.ExternalIP {
				add(a.IP)
			}
		}
	}
	var out []netip.Prefix
	for p := range set {
		out = append(out, p)
	}
	slices.SortFunc(out, func(a, b netip.Prefix) int { return a.Addr().Compare(b.Addr()) })
	return out
}

// older reports whether resource version a precedes b; the API server counts them up.
func older(a, b string) bool {
	x, err1 := strconv.ParseUint(a, 10, 64)
	y, err2 := strconv.ParseUint(b, 10, 64)
	return err1 == nil && err2 == nil && x < y
}
