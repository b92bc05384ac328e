// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/lash-net/lash/internal/config"
)

// facts is what an installation wants to know of a cluster.
type facts struct {
	apiServer string   // URL in the kubeconfig
	endpoints []string // address:port of the service default/kubernetes
	cluster   string   // name in the kubeconfig
	nodes     []corev1.Node
}

func (k *cluster) facts(ctx context.Context) (*facts, error) {
	f := &facts{apiServer: k.rest.Host}
	nodes, err := k.clientset.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, fmt.Errorf("list nodes: %w", err)
	}
	f.nodes = nodes.Items
	slices, err := k.clientset.DiscoveryV1().EndpointSlices("default").List(ctx, metav1.ListOptions{LabelSelector: "kubernetes.io/service-name=kubernetes"})
	if err == nil {
		for _, s := range slices.Items {
			for _, e := range s.Endpoints {
				for _, p := range s.Ports {
					if p.Port != nil && len(e.Addresses) > 0 {
						f.endpoints = append(f.endpoints, net.JoinHostPort(e.Addresses[0], fmt.Sprint(*p.Port)))
					}
				}
			}
		}
	}
	if raw, err := k.flags.ToRawKubeConfigLoader().RawConfig(); err == nil {
		name := raw.CurrentContext
		if *k.flags.Context != "" {
			name = *k.flags.Context
		}
		if c := raw.Contexts[name]; c != nil {
			f.cluster = c.Cluster
		}
	}
	return f, nil
}

// detect fills in what the user left open, in values, from what is known of the cluster, and says so. set reports whether
// the user has set a value.
func detect(f *facts, values map[string]any) (said, warnings []string, err error) {
	set := func(path string) bool { _, ok := lookupValue(values, path); return ok }
	fill := func(path string, v any, why string) {
		setValue(values, path, v)
		said = append(said, fmt.Sprintf("%s=%v  (%s)", path, v, why))
	}

	kpr, isSet := lookupValue(values, "kubeProxyReplacement")
	if (!isSet || kpr == true) && !set("k8sServiceHost") {
		host, port, why, err := apiServer(f)
		if err != nil {
			return nil, nil, err
		}
		fill("k8sServiceHost", host, why)
		if !set("k8sServicePort") {
			fill("k8sServicePort", port, why)
		}
	}
	if host, ok := lookupValue(values, "k8sServiceHost"); ok && loopback(fmt.Sprint(host)) {
		return nil, nil, fmt.Errorf("k8sServiceHost=%v: this is each machine's own address, no node finds the API server there: give an address nodes reach", host)
	}
	if name := strings.ToLower(f.cluster); name != "" && !set("cluster.name") {
		if _, err := config.FromMap("", map[string]string{"cluster-name": name}); err == nil && len(name) <= 32 {
			fill("cluster.name", name, "name in the kubeconfig")
		}
	}

	v4, v6 := families(f.nodes)
	if v6 && !set("ipv6.enabled") {
		fill("ipv6.enabled", true, "all nodes have IPv6 addresses")
	}
	if !v4 && v6 && !set("ipv4.enabled") {
		fill("ipv4.enabled", false, "nodes have no IPv4 addresses")
	}
	if len(f.nodes) == 1 && !set("operator.replicas") {
		fill("operator.replicas", 1, "the cluster has one node")
	}
	return said, append(warnings, poolWarnings(f.nodes, values)...), nil
}

// apiServer chooses the address under which nodes reach the API server.
func apiServer(f *facts) (host string, port int, why string, err error) {
	u, err := url.Parse(f.apiServer)
	if err != nil || u.Hostname() == "" {
		return "", 0, "", fmt.Errorf("server %q in the kubeconfig: must be a URL, like https://192.0.2.1:6443", f.apiServer)
	}
	if !loopback(u.Hostname()) {
		port = 443
		if u.Port() != "" {
			fmt.Sscan(u.Port(), &port)
		}
		return u.Hostname(), port, "server in the kubeconfig", nil
	}
	for _, e := range f.endpoints {
		h, p, err := net.SplitHostPort(e)
		if err == nil && !loopback(h) {
			fmt.Sscan(p, &port)
			return h, port, "endpoint of the service kubernetes; the kubeconfig's " + u.Hostname() + " is good on this machine only", nil
		}
	}
	return "", 0, "", fmt.Errorf("the kubeconfig reaches the API server at %s, an address that is good on this machine only, and the service kubernetes has no other: give the address nodes use with --set k8sServiceHost=ADDRESS --set k8sServicePort=PORT", u.Host)
}

func loopback(host string) bool {
	if host == "localhost" {
		return true
	}
	a, err := netip.ParseAddr(host)
	return err == nil && (a.IsLoopback() || a.IsUnspecified())
}

// families reports which address families every node has.
func families(nodes []corev1.Node) (v4, v6 bool) {
	v4, v6 = len(nodes) > 0, len(nodes) > 0
	for _, n := range nodes {
		has := map[bool]bool{}
		for _, a := range n.Status.Addresses {
			if ip, err := netip.ParseAddr(a.Address); err == nil && a.Type == corev1.NodeInternalIP {
				has[ip.Is6()] = true
			}
		}
		v4, v6 = v4 && has[false], v6 && has[true]
	}
	return v4, v6
}

// poolWarnings names nodes whose addresses lie in the pools for pods: the operator keeps clear of the addresses, but
// whatever else lives on that network is not known to it.
func poolWarnings(nodes []corev1.Node, values map[string]any) []string {
	if mode, ok := lookupValue(values, "ipam.mode"); ok && mode != "cluster-pool" {
		return nil
	}
	var out []string
	for path, def := range map[string]string{
		"ipam.operator.clusterPoolIPv4PodCIDRList": "10.0.0.0/8",
		"ipam.operator.clusterPoolIPv6PodCIDRList": "fd00::/104",
	} {
		pools := []any{def}
		if v, ok := lookupValue(values, path); ok {
			pools, _ = v.([]any)
		}
		for _, pool := range pools {
			p, err := netip.ParsePrefix(fmt.Sprint(pool))
			if err != nil {
				continue
			}
			var in []string
			for _, n := range nodes {
				for _, a := range n.Status.Addresses {
					if ip, err := netip.ParseAddr(a.Address); err == nil && p.Contains(ip) {
						in = append(in, n.Name+" "+ip.String())
					}
				}
			}
			if len(in) > 0 {
				slices.Sort(in)
				more := ""
				if len(in) > 3 {
					more = fmt.Sprintf(" and %d more", len(in)-3)
				}
				out = append(out, fmt.Sprintf("the pool %s for pods contains addresses of nodes (%s%s): pods get none of these, but machines beside the nodes may become unreachable; choose a pool apart from the nodes' network with --set %s={CIDR}",
					p, strings.Join(in[:min(3, len(in))], ", "), more, path))
			}
		}
	}
	slices.Sort(out)
	return out
}
