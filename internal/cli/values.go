// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"helm.sh/helm/v3/pkg/chart"

	"github.com/lash-net/lash/internal/config"
)

// absentValues are values of features this version does not have, or cannot be without; with off they are accepted and dropped. A path that
// names a map stands for everything below it.
var absentValues = map[string]string{
	"hubble": "enabled=false", "envoy": "enabled=false", "l7Proxy": "false", "hostFirewall": "enabled=false", "encryption": "enabled=false",
	"egressGateway": "enabled=false", "bandwidthManager": "enabled=false", "l2announcements": "enabled=false", "bgpControlPlane": "enabled=false",
	"gatewayAPI": "enabled=false", "ingressController": "enabled=false", "clustermesh": "", "dnsProxy": "", "prometheus": "enabled=false",
	"localRedirectPolicies": "enabled=false", "localRedirectPolicy": "false", "ciliumEndpointSlice": "enabled=false",
	"endpointRoutes": "enabled=false", "enableIPv4BIGTCP": "false",
	"enableIPv6BIGTCP": "false", "policyAuditMode": "false", "policyEnforcementMode": "never",
	"loadBalancer.l7": "", "identityAllocationMode": "crd",
	"bpf.tproxy": "false", "bpf.distributedLRU": "enabled=false", "cni.chainingMode": "none", "cni.customConf": "false",
	"nodePort.enableHealthCheck": "true", "nodePort.enableHealthCheckLoadBalancerIP": "false", "loadBalancer.standalone": "false", "nat46x64Gateway": "enabled=false",
	"enableMasqueradeRouteSource": "false", "egressMasqueradeInterfaces": "",
	"operator.prometheus": "enabled=false", "enableK8sNetworkPolicy": "false",
}

// idleValues are values whose purpose does not arise here, and the keys of the configuration they are written as, which say why.
var idleValues = map[string]string{
	"nodePort.enabled": "enable-node-port", "externalIPs.enabled": "enable-external-ips", "hostPort.enabled": "enable-host-port", "hostServices.enabled": "enable-host-reachable-services",
	"nodePort.autoProtectPortRange": "enable-auto-protect-node-port-range", "sctp.enabled": "enable-sctp",
	"bpf.lbModeAnnotation": "bpf-lb-mode-annotation", "bpf.lbAlgorithmAnnotation": "bpf-lb-algorithm-annotation", "bpf.disableExternalIPMitigation": "disable-external-ip-mitigation",
	"socketLB.enabled": "bpf-lb-sock", "socketLB.terminatePodConnections": "bpf-lb-sock-terminate-pod-connections", "socketLB.tracing": "trace-sock", "enableNoServiceEndpointsRoutable": "enable-no-service-endpoints-routable",
	"bpf.ctAnyMax": "bpf-ct-global-any-max", "bpf.natMax": "bpf-nat-global-max", "bpf.neighMax": "bpf-neigh-global-max", "bpf.policyMapMax": "bpf-policy-map-max",
	"bpf.mapDynamicSizeRatio": "bpf-map-dynamic-size-ratio", "bpf.preallocateMaps": "preallocate-bpf-maps", "fragmentTracking": "enable-ipv4-fragment-tracking",
	"enableXTSocketFallback": "enable-xt-socket-fallback", "installNoConntrackIptablesRules": "install-no-conntrack-iptables-rules", "loadBalancer.dsrL4Translate": "bpf-lb-dsr-l4-xlate",
	"defaultLBServiceIPAM": "default-lb-service-ipam",
}

// movedValues are old paths of values and the present ones.
var movedValues = map[string]string{
	"nativeRoutingCIDR":                    "ipv4NativeRoutingCIDR",
	"ipam.operator.clusterPoolIPv4PodCIDR": "ipam.operator.clusterPoolIPv4PodCIDRList",
	"ipam.operator.clusterPoolIPv6PodCIDR": "ipam.operator.clusterPoolIPv6PodCIDRList",
	"bpf.ctTcpMax":                         "bpf.ctMax",
	"bpf.hostRouting":                      "bpf.hostLegacyRouting",
	"tunnel":                               "routingMode",
}

// translateValues turns old spellings in values into present ones, in place, and says what became of each. It refuses
// values the chart does not know, with the nearest it does, and those of features this version lacks.
func translateValues(values map[string]any, known valuePaths) (said []string, err error) {
	var errs []error
	for _, path := range leaves(values, "", known) {
		v, _ := lookupValue(values, path)
		text := fmt.Sprint(v)
		if key, ok := idleValues[path]; ok {
			removeValue(values, path)
			said = append(said, fmt.Sprintf("%s=%s has no effect: %s", path, text, config.NoEffect(key)))
			continue
		}
		if top, off, ok := absentValue(path); ok {
			if off != "" && (top+"."+off == path+"="+text || top+"="+off == path+"="+text) || isOff(v) && !strings.HasSuffix(off, "true") {
				removeValue(values, path)
				continue
			}
			errs = append(errs, fmt.Errorf("%s=%s: not supported by this version: leave it out", path, text))
			continue
		}
		now, value := path, v
		if to, ok := movedValues[path]; ok {
			now = to
		}
		switch {
		case path == "tunnel" && text == "disabled":
			value = "native"
		case path == "tunnel" && (text == "vxlan" || text == "geneve"):
			value = "tunnel"
			if other, ok := lookupValue(values, "tunnelProtocol"); ok && fmt.Sprint(other) != text {
				errs = append(errs, fmt.Errorf("tunnel=%s: is the old spelling of routingMode and tunnelProtocol, which is set too, to another value: remove one of the two", text))
				continue
			}
			setValue(values, "tunnelProtocol", text)
			said = append(said, fmt.Sprintf("tunnel=%s is an old spelling: it became tunnelProtocol=%[1]s", text))
		case path == "tunnel":
			errs = append(errs, fmt.Errorf("tunnel=%s: must be disabled, vxlan or geneve; its present names are routingMode and tunnelProtocol", text))
			continue
		case path == "bpf.hostRouting" && (text == "true" || text == "false"):
			value = text == "false" // on meant not legacy
		case path == "kubeProxyReplacement":
			switch text {
			case "strict", "probe", "partial", "true":
				value = true
			case "disabled", "false":
				value = false
			}
		case strings.HasSuffix(now, "PodCIDRList"):
			if s, ok := v.(string); ok {
				value = anySlice(strings.FieldsFunc(s, func(r rune) bool { return r == ',' || r == ' ' }))
			}
		}
		if now != path {
			if other, ok := lookupValue(values, now); ok && fmt.Sprint(other) != fmt.Sprint(value) {
				errs = append(errs, fmt.Errorf("%s=%s: is the old spelling of %s, which is set too, to another value: remove one of the two", path, text, now))
				continue
			}
			removeValue(values, path)
		}
		if !known.has(now) {
			msg := fmt.Sprintf("%s=%s: unknown value", path, text)
			if near := known.nearest(path); near != "" {
				msg += fmt.Sprintf(": did you mean %s?", near)
			} else {
				msg += ": 'lash install --show-values' shows those there are"
			}
			errs = append(errs, errors.New(msg))
			continue
		}
		setValue(values, now, value)
		if now != path || fmt.Sprint(value) != text {
			said = append(said, fmt.Sprintf("%s=%s is an old spelling: it became %s=%v", path, text, now, value))
		}
	}
	return said, errors.Join(errs...)
}

func isOff(v any) bool { return v == nil || v == false || v == "" || fmt.Sprint(v) == "false" }

func absentValue(path string) (top, off string, ok bool) {
	for p := path; ; {
		if off, ok := absentValues[p]; ok {
			return p, off, true
		}
		i := strings.LastIndexByte(p, '.')
		if i < 0 {
			return "", "", false
		}
		p = p[:i]
	}
}

// valuePaths are the dotted paths of all values of the chart; true marks those below which anything may stand.
type valuePaths map[string]bool

// knownValues reads the paths from the chart's schema.
func knownValues(c *chart.Chart) (valuePaths, error) {
	type node struct {
		Properties           map[string]json.RawMessage `json:"properties"`
		AdditionalProperties json.RawMessage            `json:"additionalProperties"`
		Type                 any                        `json:"type"`
	}
	out := valuePaths{}
	var walk func(prefix string, raw json.RawMessage) error
	walk = func(prefix string, raw json.RawMessage) error {
		var n node
		if err := json.Unmarshal(raw, &n); err != nil {
			return fmt.Errorf("values.schema.json, %s: %w", prefix, err)
		}
		if len(n.Properties) == 0 {
			out[prefix] = n.Type == "object"
			return nil
		}
		for key, sub := range n.Properties {
			path := key
			if prefix != "" {
				path = prefix + "." + key
			}
			if err := walk(path, sub); err != nil {
				return err
			}
		}
		return nil
	}
	if err := walk("", c.Schema); err != nil {
		return nil, err
	}
	return out, nil
}

func (k valuePaths) has(path string) bool {
	if _, ok := k[path]; ok {
		return true
	}
	return k.open(path)
}

// open reports whether path lies below one where anything may stand.
func (k valuePaths) open(path string) bool {
	for i := strings.LastIndexByte(path, '.'); i > 0; i = strings.LastIndexByte(path[:i], '.') {
		if k[path[:i]] {
			return true
		}
	}
	return false
}

// nearest returns the path a user most likely meant: the same last part elsewhere, or a similar path.
func (k valuePaths) nearest(path string) string {
	all := slices.Sorted(maps.Keys(k))
	last := path[strings.LastIndexByte(path, '.')+1:]
	for _, p := range all {
		if last != "enabled" && strings.EqualFold(p[strings.LastIndexByte(p, '.')+1:], last) {
			return p
		}
	}
	if near := config.Nearest(path, all); near != "" {
		return near
	}
	for _, p := range all {
		if config.Nearest(last, []string{p[strings.LastIndexByte(p, '.')+1:]}) != "" && last != "enabled" {
			return p
		}
	}
	return ""
}

// leaves returns the sorted paths at which values hold something that is no map, and those of maps the chart takes whole.
func leaves(values map[string]any, prefix string, known valuePaths) []string {
	var out []string
	for _, key := range slices.Sorted(maps.Keys(values)) {
		path := key
		if prefix != "" {
			path = prefix + "." + key
		}
		if sub, ok := values[key].(map[string]any); ok && !known[path] && len(sub) > 0 {
			out = append(out, leaves(sub, path, known)...)
			continue
		}
		out = append(out, path)
	}
	return out
}

func lookupValue(values map[string]any, path string) (any, bool) {
	keys := strings.Split(path, ".")
	for _, key := range keys[:len(keys)-1] {
		sub, ok := values[key].(map[string]any)
		if !ok {
			return nil, false
		}
		values = sub
	}
	v, ok := values[keys[len(keys)-1]]
	return v, ok
}

func setValue(values map[string]any, path string, v any) {
	keys := strings.Split(path, ".")
	for _, key := range keys[:len(keys)-1] {
		sub, ok := values[key].(map[string]any)
		if !ok {
			sub = map[string]any{}
			values[key] = sub
		}
		values = sub
	}
	values[keys[len(keys)-1]] = v
}

// removeValue removes path and the maps it leaves empty.
func removeValue(values map[string]any, path string) {
	key, rest, nested := strings.Cut(path, ".")
	if !nested {
		delete(values, key)
		return
	}
	sub, ok := values[key].(map[string]any)
	if !ok {
		return
	}
	removeValue(sub, rest)
	if len(sub) == 0 {
		delete(values, key)
	}
}

func anySlice(in []string) []any {
	out := make([]any, len(in))
	for i, s := range in {
		out[i] = s
	}
	return out
}
