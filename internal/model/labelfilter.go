// SPDX-License-Identifier: Apache-2.0

package model

import (
	"fmt"
	"regexp"
	"strings"
)

// The patterns that always apply. Labels that Kubernetes or a controller gives each pod on its own would make an
// identity a pod; what a policy can name of a namespace, of an application and of the cluster is always kept.
var defaultPatterns = []string{
	`reserved:.*`,
	`io\.kubernetes\.pod\.namespace`,
	`io\.cilium\.k8s\.namespace\.labels`,
	`io\.cilium\.k8s\.policy\.cluster`,
	`app\.kubernetes\.io`,
	`!io\.kubernetes`,
	`!kubernetes\.io`,
	`!statefulset\.kubernetes\.io/pod-name`,
	`!apps\.kubernetes\.io/pod-index`,
	`!batch\.kubernetes\.io/job-completion-index`,
	`!batch\.kubernetes\.io/controller-uid`,
	`!beta\.kubernetes\.io`,
	`!k8s\.io`,
	`!pod-template-generation`,
	`!pod-template-hash`,
	`!controller-revision-hash`,
	`!annotation.*`,
	`!controller-uid`,
	`!etcd_node`,
}

// LabelFilter tells the labels that make an identity from the others. The longest match of all patterns decides, of
// equally long ones the last; a label that no pattern matches is kept unless somebody has asked for certain ones only.
type LabelFilter struct {
	rules []labelRule
	only  bool // a pattern of the user's includes
}

type labelRule struct {
	source  string // "k8s:"; empty: any
	exclude bool
	key     *regexp.Regexp // matches at the beginning of the key
}

// ParseLabelFilter reads patterns separated by spaces, as the configuration key labels has them: an optional source
// (k8s:, any:), an optional ! to exclude, and a regular expression for the beginning of the label's key. They are added
// to the default ones.
func ParseLabelFilter(patterns string) (*LabelFilter, error) {
	f := &LabelFilter{}
	for _, p := range defaultPatterns {
		r, err := parseLabelRule(p)
		if err != nil {
			return nil, err
		}
		f.rules = append(f.rules, r)
	}
	for _, p := range strings.Fields(patterns) {
		r, err := parseLabelRule(p)
		if err != nil {
			return nil, err
		}
		f.rules = append(f.rules, r)
		f.only = f.only || !r.exclude
	}
	return f, nil
}

func parseLabelRule(p string) (labelRule, error) {
	var r labelRule
	expr := p
	for _, source := range []string{LabelSource, "reserved:", "any:"} {
		if rest, ok := strings.CutPrefix(p, source); ok {
			r.source, expr = strings.TrimPrefix(source, "any:"), rest
		}
	}
	expr, r.exclude = strings.CutPrefix(expr, "!")
	if expr == "" {
		return r, fmt.Errorf("pattern %q says nothing about a key: write the beginning of one, like k8s:app or !job-name", p)
	}
	re, err := regexp.Compile("^(?:" + expr + ")")
	if err != nil {
		return r, fmt.Errorf("pattern %q: %w", p, err)
	}
	re.Longest()
	r.key = re
	return r, nil
}

// Keep reports whether the label of that source ("k8s:") and key makes an identity.
func (f *LabelFilter) Keep(source, key string) bool {
	keep, longest := !f.only, 0
	for _, r := range f.rules {
		if r.source != "" && r.source != source {
			continue
		}
		if m := r.key.FindStringIndex(key); m != nil && m[1] >= longest {
			keep, longest = !r.exclude, m[1]
		}
	}
	return keep
}
