// SPDX-License-Identifier: Apache-2.0

package k8s

import (
	"maps"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/lash-net/lash/internal/state"
)

// Annotations of a Service that choose how and where it is served, each under the group that the field's users know and
// under Lash's own, which wins.
const (
	annotationMode         = "forwarding-mode"
	annotationAlgorithm    = "lb-algorithm"
	annotationType         = "type"
	annotationRangesPolicy = "src-ranges-policy"
	annotationNode         = "node"
	annotationNodeSelector = "node-selector"
)

var (
	annotationGroups = []string{"service.lash.io/", "service.cilium.io/"}
	annotationNames  = []string{annotationMode, annotationAlgorithm, annotationType, annotationRangesPolicy, annotationNode, annotationNodeSelector}
)

// absentAnnotations are those of features this version does not have: the value that leaves the feature off, and what
// happens instead of it. The others only say how such a feature works, and mean nothing without it.
var (
	absentAnnotations = map[string]struct{ off, instead string }{
		"proxy-delegation":            {"none", "no packet is left to a proxy of the node, backends get all of them"},
		"global":                      {"false", "clusters are not connected, endpoints of this one serve"},
		"global-sync-endpoint-slices": {"false", "clusters are not connected, there are no slices of others"},
		"lb-l7":                       {"disabled", "not requests but connections are balanced"},
	}
	emptyAnnotations = []string{"shared", "affinity", "lb-l7-algorithm"}
)

// ServiceAnnotations are the annotations of a Service that are followed.
func ServiceAnnotations() []string {
	var out []string
	for _, group := range annotationGroups {
		for _, name := range annotationNames {
			out = append(out, group+name)
		}
	}
	slices.Sort(out)
	return out
}

func annotationField(key string) string { return "metadata.annotations[" + key + "]" }

// annotation is the value of an annotation of a service and its key.
func annotation(svc *corev1.Service, name string) (key, value string, ok bool) {
	for _, group := range annotationGroups {
		if v, ok := svc.Annotations[group+name]; ok {
			return group + name, strings.TrimSpace(v), true
		}
	}
	return "", "", false
}

// choice is the value of an annotation of a service, which must be one of those allowed, in whatever case; empty: it has
// none. otherwise says what a wrong one means.
func (p *problems) choice(svc *corev1.Service, name, otherwise string, allowed ...string) string {
	key, v, ok := annotation(svc, name)
	if !ok {
		return ""
	}
	if i := slices.IndexFunc(allowed, func(a string) bool { return strings.EqualFold(a, v) }); i >= 0 {
		return allowed[i]
	}
	p.add(annotationField(key), "%q is none of %s; %s", v, strings.Join(allowed, ", "), otherwise)
	return ""
}

// annotations reads what annotations say of a service, and names those that nobody follows.
func (p *problems) annotations(svc *corev1.Service, row *state.Service) {
	row.Mode = p.choice(svc, annotationMode, "the node's setting is used", "snat", "dsr")
	row.Algorithm = p.choice(svc, annotationAlgorithm, "the node's setting is used", "random", "maglev")
	row.RangesDeny = p.choice(svc, annotationRangesPolicy, "the source ranges are those that are let in", "allow", "deny") == "deny"
	row.Only = p.choice(svc, annotationType, "all that the service has is served", string(corev1.ServiceTypeClusterIP), string(corev1.ServiceTypeNodePort), string(corev1.ServiceTypeLoadBalancer))
	if key, _, _ := annotation(svc, annotationType); row.Only == string(corev1.ServiceTypeLoadBalancer) && row.Type != row.Only ||
		row.Only == string(corev1.ServiceTypeNodePort) && row.Type == string(corev1.ServiceTypeClusterIP) {
		p.add(annotationField(key), "%s alone is to be served, and the service is of type %s: it has none", row.Only, row.Type)
	}
	row.Nodes = p.nodes(svc)
	for _, key := range slices.Sorted(maps.Keys(svc.Annotations)) {
		group, name, _ := strings.Cut(key, "/")
		if !slices.Contains(annotationGroups, group+"/") || slices.Contains(annotationNames, name) || slices.Contains(emptyAnnotations, name) {
			continue
		}
		if absent, known := absentAnnotations[name]; !known {
			p.add(annotationField(key), "is not known; those that are followed are %s", strings.Join(annotationNames, ", "))
		} else if v := svc.Annotations[key]; !strings.EqualFold(v, absent.off) {
			p.add(annotationField(key), "%q is not supported by this version: %s", v, absent.instead)
		}
	}
}

// nodes is the selector of the nodes that serve the service; empty: all of them. A selector wins over the value of one label.
func (p *problems) nodes(svc *corev1.Service) string {
	var sel labels.Selector
	var err error
	key, text, ok := annotation(svc, annotationNodeSelector)
	if ok {
		sel, err = labels.Parse(text)
	} else if key, text, ok = annotation(svc, annotationNode); ok {
		sel, err = labels.ValidatedSelectorFromSet(labels.Set{key: text})
	}
	switch {
	case !ok:
		return ""
	case err != nil:
		p.add(annotationField(key), "%q selects no nodes by their labels, like pool=edge or pool in (edge,core); every node serves the service", text)
		return ""
	}
	return sel.String()
}

// Selects reports whether labels meet the selector of a row of services, which has been read once.
func Selects(selector string, set map[string]string) bool {
	sel, err := labels.Parse(selector)
	return err == nil && sel.Matches(labels.Set(set))
}
