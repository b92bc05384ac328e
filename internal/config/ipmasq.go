// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"sigs.k8s.io/yaml"
)

// IPMasq is the file of ip-masq-agent, understood.
type IPMasq struct {
	NonMasquerade []netip.Prefix // destinations that keep the pod's address; sorted, each once
	Resync        time.Duration  // how often the file is read
}

// ipMasqFile is the file as its users write it, YAML or JSON.
type ipMasqFile struct {
	NonMasqueradeCIDRs []string `json:"nonMasqueradeCIDRs"`
	CIDRLimit          int      `json:"cidrLimit"`
	MasqLinkLocal      bool     `json:"masqLinkLocal"`
	MasqLinkLocalIPv6  bool     `json:"masqLinkLocalIPv6"`
	ResyncInterval     string   `json:"resyncInterval"`
}

// defaultNonMasquerade is what ip-masq-agent does not masquerade without a configuration: private, shared and reserved
// ranges (RFC 1918, 6598, 6890, 5737, 7526, 2544, 1112).
var defaultNonMasquerade = []string{
	"10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24",
	"198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "240.0.0.0/4",
}

const (
	linkLocal4      = "169.254.0.0/16"
	linkLocal6      = "fe80::/10"
	ipMasqResync    = 5 * time.Second
	ipMasqResyncMin = time.Second
	ipMasqRows      = 16384 // of lash_ipmasq
)

// ParseIPMasq reads the file of ip-masq-agent; errors call it path. A file that is not there or says nothing means the
// defaults. All that is wrong is reported, and nothing of a file with a mistake is used.
func ParseIPMasq(path string, data []byte) (*IPMasq, error) {
	var f ipMasqFile
	if err := yaml.UnmarshalStrict(data, &f); err != nil {
		text := strings.TrimPrefix(strings.TrimPrefix(err.Error(), "error converting YAML to JSON: "), "error unmarshaling JSON: ")
		return nil, fmt.Errorf("%s: %s: write YAML or JSON with nonMasqueradeCIDRs, cidrLimit, masqLinkLocal, masqLinkLocalIPv6, resyncInterval", path, text)
	}
	var errs []error
	bad := func(field, value, format string, args ...any) {
		errs = append(errs, &Error{Key: field, Value: value, Source: Source{"file", path}, Problem: fmt.Sprintf(format, args...)})
	}
	cidrs := f.NonMasqueradeCIDRs
	if f.NonMasqueradeCIDRs == nil && !f.MasqLinkLocal && !f.MasqLinkLocalIPv6 {
		cidrs = defaultNonMasquerade
	}
	if f.CIDRLimit < 0 || f.CIDRLimit > 0 && len(cidrs) > f.CIDRLimit {
		bad("cidrLimit", fmt.Sprint(f.CIDRLimit), "there are %d nonMasqueradeCIDRs: remove some, or cidrLimit", len(cidrs))
	}
	if !f.MasqLinkLocal {
		cidrs = append(slices.Clone(cidrs), linkLocal4)
	}
	if !f.MasqLinkLocalIPv6 {
		cidrs = append(slices.Clone(cidrs), linkLocal6)
	}
	out := &IPMasq{Resync: ipMasqResync}
	for i, s := range cidrs {
		p, err := parseCIDR(strings.TrimSpace(s))
		if err != nil {
			bad(fmt.Sprintf("nonMasqueradeCIDRs[%d]", i), s, "%v", err)
			continue
		}
		out.NonMasquerade = append(out.NonMasquerade, p)
	}
	if len(cidrs) > ipMasqRows {
		bad("nonMasqueradeCIDRs", fmt.Sprintf("%d CIDRs", len(cidrs)), "must be at most %d: join neighbouring ones", ipMasqRows)
	}
	if s := f.ResyncInterval; s != "" {
		d, err := time.ParseDuration(s)
		if err != nil || d < ipMasqResyncMin {
			bad("resyncInterval", s, "must be a duration of at least %v with its unit, like 60s", ipMasqResyncMin)
		}
		out.Resync = d
	}
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	slices.SortFunc(out.NonMasquerade, netip.Prefix.Compare)
	out.NonMasquerade = slices.Compact(out.NonMasquerade)
	return out, nil
}
