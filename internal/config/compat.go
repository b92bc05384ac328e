// SPDX-License-Identifier: Apache-2.0

package config

import (
	"fmt"
	"slices"
	"strings"
)

// renamed maps old names of keys to their present ones; the value is taken over unless values below translates it.
var renamed = map[string]string{
	"native-routing-cidr":         "ipv4-native-routing-cidr",
	"masquerade":                  "enable-ipv4-masquerade",
	"device":                      "devices",
	"node-port-mode":              "bpf-lb-mode",
	"node-port-algorithm":         "bpf-lb-algorithm",
	"node-port-acceleration":      "bpf-lb-acceleration",
	"bpf-ct-global-tcp-max":       "bpf-ct-max",
	"bpf-lb-service-map-max":      "bpf-lb-map-max",
	"monitor-aggregation-level":   "monitor-aggregation",
	"kube-proxy-replacement-mode": "kube-proxy-replacement",
	"cni-log-file":                "",
}

// values maps old values, by present key, to present ones.
var values = map[string]map[string]string{
	"kube-proxy-replacement": {"strict": "true", "probe": "true", "partial": "true", "disabled": "false"},
	"bpf-lb-acceleration":    {"none": "disabled"},
	"ipam":                   {"cluster-pool-v2beta": "cluster-pool", "hostscope-legacy": "kubernetes"},
	"monitor-aggregation":    {"disabled": "none", "lowest": "low", "max": "maximum"},
}

// tunnel maps the values of the old key tunnel, which named mode and protocol at once.
var tunnel = map[string][]setting{
	"disabled": {{key: "routing-mode", value: "native"}},
	"vxlan":    {{key: "routing-mode", value: "tunnel"}, {key: "tunnel-protocol", value: "vxlan"}},
	"geneve":   {{key: "routing-mode", value: "tunnel"}, {key: "tunnel-protocol", value: "geneve"}},
}

// emptyIsDefault lists keys that the field's charts write without a value.
var emptyIsDefault = []string{"bpf-lb-mode", "bpf-lb-algorithm", "bpf-lb-acceleration", "bpf-lb-dsr-dispatch", "bpf-lb-maglev-table-size", "bpf-lb-maglev-hash-seed", "service-no-backend-response", "tunnel-protocol", "tunnel-port", "underlay-protocol"}

// absent lists keys of features this version does not have, or cannot be without, with the values that say so. They are
// accepted then, so that an existing ConfigMap can be used; any other value is refused.
var absent = map[string][]string{
	"enable-endpoint-routes":              {"false"},
	"egress-masquerade-interfaces":        {""},
	"enable-wireguard":                    {"false"},
	"enable-ipsec":                        {"false"},
	"encrypt-node":                        {"false"},
	"enable-host-firewall":                {"false"},
	"enable-hubble":                       {"false"},
	"enable-l7-proxy":                     {"false"},
	"enable-bandwidth-manager":            {"false"},
	"enable-bbr":                          {"false"},
	"enable-ipv4-big-tcp":                 {"false"},
	"enable-ipv6-big-tcp":                 {"false"},
	"enable-local-redirect-policy":        {"false"},
	"enable-egress-gateway":               {"false"},
	"enable-l2-announcements":             {"false"},
	"enable-bgp-control-plane":            {"false"},
	"enable-gateway-api":                  {"false"},
	"enable-ingress-controller":           {"false"},
	"enable-cilium-endpoint-slice":        {"false"},
	"enable-srv6":                         {"false"},
	"enable-k8s-networkpolicy":            {"false"},
	"enable-policy":                       {"never"},
	"policy-audit-mode":                   {"false"},
	"identity-allocation-mode":            {"crd"},
	"cni-chaining-mode":                   {"", "none"},
	"custom-cni-conf":                     {"false"},
	"enable-health-check-nodeport":        {"true"},
	"enable-health-check-loadbalancer-ip": {"false"},
	"enable-internal-traffic-policy":      {"true"},
	"enable-k8s-terminating-endpoint":     {"true"},
	"enable-svc-source-range-check":       {"true"},
	"enable-masquerade-to-route-source":   {"false"},
	"enable-nat46x64-gateway":             {"false"},
	"bpf-lb-only":                         {"false"},
	"bpf-lb-rss-ipv4-src-cidr":            {""},
	"bpf-lb-rss-ipv6-src-cidr":            {""},
	"bpf-distributed-lru":                 {"false"},
	"prometheus-serve-addr":               {""},
	"operator-prometheus-serve-addr":      {""},
	"hubble-metrics":                      {""},
}

// meaningless lists keys whose purpose does not arise here, with the reason. They are accepted with a note.
var meaningless = map[string]string{
	"bpf-ct-global-any-max":                 "one map holds the connections of every protocol: see bpf-ct-max",
	"bpf-nat-global-max":                    "translations are kept in the connection's own record: see bpf-ct-max",
	"bpf-neigh-global-max":                  "the kernel's own neighbour table is used",
	"bpf-map-dynamic-size-ratio":            "maps have the sizes that are configured: see bpf-ct-max and bpf-lb-map-max",
	"bpf-policy-map-max":                    "network policy is not part of this version",
	"preallocate-bpf-maps":                  "maps are allocated as their kind requires",
	"enable-node-port":                      "it is part of kube-proxy-replacement",
	"enable-xdp-prefilter":                  "'lash prefilter' works wherever there is XDP: see bpf-lb-acceleration",
	"enable-host-reachable-services":        "it is part of kube-proxy-replacement",
	"enable-host-port":                      "it is part of kube-proxy-replacement",
	"enable-external-ips":                   "it is part of kube-proxy-replacement",
	"enable-xt-socket-fallback":             "there is no proxy to fall back for",
	"install-iptables-rules":                "no iptables rules are installed",
	"sidecar-istio-proxy-image":             "there is no proxy",
	"enable-auto-protect-node-port-range":   "masquerading always keeps out of node-port-range",
	"bpf-lb-mode-annotation":                "services' annotations are always followed",
	"bpf-lb-algorithm-annotation":           "services' annotations are always followed",
	"bpf-lb-service-backend-map-max":        "backends have four times the rows of bpf-lb-map-max",
	"bpf-lb-affinity-map-max":               "it has the rows of bpf-lb-map-max",
	"bpf-lb-source-range-map-max":           "it has the rows of bpf-lb-map-max",
	"bpf-lb-maglev-map-max":                 "it has the rows of bpf-lb-map-max",
	"bpf-lb-sock":                           "it is part of kube-proxy-replacement: see bpf-lb-sock-hostns-only",
	"bpf-lb-sock-terminate-pod-connections": "sockets of backends that are gone are always ended, pods' too",
	"trace-sock":                            "what sockets do causes no events: 'lash bpf socket list' shows those that asked for a service",
	"bpf-sock-rev-map-max":                  "it has the rows that its kind of map needs",
	"bpf-lb-dsr-l4-xlate":                   "it is of dispatch by IPIP only",
	"bpf-fragments-map-max":                 "it has 8192 rows",
	"enable-ipv4-fragment-tracking":         "fragments are always followed",
	"enable-ipv6-fragment-tracking":         "fragments are always followed",
	"enable-sctp":                           "SCTP is always served",
	"enable-no-service-endpoints-routable":  "services without backends keep their routes: see service-no-backend-response",
	"disable-external-ip-mitigation":        "external addresses are served inside of the cluster too, as Kubernetes wants it: who may set them is for the API server to decide",
	"install-no-conntrack-iptables-rules":   "with BPF host routing the kernel does not track pods' connections",
	"nat-map-stats-entries":                 "'lash bpf nat list --top' counts when it is asked",
	"nat-map-stats-interval":                "'lash bpf nat list --top' counts when it is asked",
	"enable-lb-ipam":                        "addresses of LoadBalancers are served, whoever gives them",
	"default-lb-service-ipam":               "addresses of LoadBalancers are served, whoever gives them",
	"bpf-lb-rev-nat-map-max":                "translations back are kept in the connection's own record",
	"identity-gc-rate-interval":             "the operator deletes as fast as the API server lets it",
	"identity-gc-rate-limit":                "the operator deletes as fast as the API server lets it",
	"set-cilium-node-taints":                "the node keeps the taint it was created with until the agent is ready",
	"remove-cilium-node-taints":             "the agent always removes the taint when it is ready",
	"write-cni-conf-when-ready":             "the CNI configuration is always written when the agent is ready: see cni-conf-dir",
}

// NoEffect says why a key has no effect; empty: it has one, or there is no such key.
func NoEffect(key string) string { return meaningless[key] }

// translate turns an old spelling into the present ones. It returns none for a setting that has no effect.
func translate(s setting) (out []setting, notes []string, err error) {
	text := strings.ToLower(strings.TrimSpace(s.value))
	if why, ok := meaningless[s.key]; ok {
		return nil, []string{fmt.Sprintf("%s=%q (%s) has no effect: %s", s.key, s.value, s.source, why)}, nil
	}
	if off, ok := absent[s.key]; ok {
		if slices.Contains(off, strings.TrimSpace(s.value)) {
			return nil, nil, nil
		}
		return nil, nil, &Error{s.key, s.value, s.source, fmt.Sprintf("not supported by this version: remove it or set it to %s", quoted(off))}
	}
	if text == "" && slices.Contains(emptyIsDefault, s.key) {
		return nil, nil, nil
	}
	now := s
	if key, ok := renamed[s.key]; ok {
		if key == "" {
			return nil, []string{fmt.Sprintf("%s=%q (%s) has no effect", s.key, s.value, s.source)}, nil
		}
		now.key = key
	}
	if v, ok := values[now.key][text]; ok {
		now.value = v
	}
	out = []setting{now}
	if s.key == "tunnel" {
		if out = slices.Clone(tunnel[text]); out == nil {
			return nil, nil, &Error{s.key, s.value, s.source, "must be disabled, vxlan or geneve; its present names are routing-mode and tunnel-protocol"}
		}
		for i := range out {
			out[i].source = s.source
		}
	}
	for _, o := range out {
		if o.key != s.key || o.value != s.value {
			notes = append(notes, fmt.Sprintf("%s=%q (%s) is an old spelling: it became %s=%q", s.key, s.value, s.source, o.key, o.value))
		}
	}
	return out, notes, nil
}

func quoted(values []string) string {
	var q []string
	for _, v := range values {
		q = append(q, fmt.Sprintf("%q", v))
	}
	return anyOf(q)
}
