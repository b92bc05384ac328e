// SPDX-License-Identifier: Apache-2.0

package node

import "strings"

// HostRoutingInput is what the choice of host routing depends on.
type HostRoutingInput struct {
	Legacy               bool // the user asked for it
	KubeProxyReplacement bool
	BPFMasquerade        bool
	IPv4Masquerade       bool
	IPv6Masquerade       bool
	RoutingMode          string
	MissingHelpers       []string // kernel helpers that a probe did not find
	Kernel               string   // release, as found
	// SetBy says who set a configuration key: "default", "file ...", "flag ...".
	SetBy func(key string) string
}

// Requirement is one condition of BPF host routing, and what would change it.
type Requirement struct {
	Requirement string
	Met         bool
	Found       string
	Needed      string
	SetBy       string
	Change      string
}

// HostRouting is the choice.
type HostRouting struct {
	BPF          bool
	Reason       string   // why not BPF, in a few words
	Log          []string // lines for the log, one a cause
	Requirements []Requirement
}

const fallingBack = "Falling back to legacy host routing (enable-host-legacy-routing=true)."

// ChooseHostRouting returns BPF host routing unless a requirement is not met or the user asked for legacy.
func ChooseHostRouting(in HostRoutingInput) HostRouting {
	var h HostRouting
	var reasons []string
	require := func(met bool, reason, line string, r Requirement) {
		r.Met = met
		h.Requirements = append(h.Requirements, r)
		if !met {
			reasons = append(reasons, reason)
			h.Log = append(h.Log, line)
		}
	}
	found := func(b bool) string {
		if b {
			return "true"
		}
		return "false"
	}
	set := func(key, value string) string {
		return key + "=" + value + " in ConfigMap lash-config, then restart the agents"
	}

	require(!in.Legacy, "enable-host-legacy-routing=true",
		"BPF host routing is switched off by the user (enable-host-legacy-routing=true).",
		Requirement{Requirement: "not switched off", Found: "enable-host-legacy-routing=" + found(in.Legacy), Needed: "false",
			SetBy: in.SetBy("enable-host-legacy-routing"), Change: set("enable-host-legacy-routing", "false")})

	helpers := "all present"
	if len(in.MissingHelpers) > 0 {
		helpers = "missing " + strings.Join(in.MissingHelpers, ", ")
	}
	require(len(in.MissingHelpers) == 0, "kernel lacks "+strings.Join(in.MissingHelpers, ", "),
		"BPF host routing requires kernel 5.10 or newer. "+fallingBack,
		Requirement{Requirement: "kernel helpers bpf_redirect_peer, bpf_redirect_neigh, bpf_fib_lookup", Found: helpers, Needed: "all present",
			SetBy: "kernel " + in.Kernel, Change: "boot a kernel of 5.10 or newer"})

	require(in.KubeProxyReplacement, "kube-proxy-replacement=false",
		"BPF host routing requires kube-proxy-replacement. "+fallingBack,
		Requirement{Requirement: "services in BPF", Found: "kube-proxy-replacement=" + found(in.KubeProxyReplacement), Needed: "true",
			SetBy: in.SetBy("kube-proxy-replacement"), Change: set("kube-proxy-replacement", "true")})

	masquerading := in.IPv4Masquerade || in.IPv6Masquerade
	masqueradeFound := "enable-bpf-masquerade=" + found(in.BPFMasquerade)
	if !masquerading {
		masqueradeFound = "no masquerading"
	}
	require(in.BPFMasquerade || !masquerading, "enable-bpf-masquerade=false",
		"BPF host routing requires enable-bpf-masquerade. "+fallingBack,
		Requirement{Requirement: "masquerading in BPF, or none", Found: masqueradeFound, Needed: "true",
			SetBy: in.SetBy("enable-bpf-masquerade"), Change: set("enable-bpf-masquerade", "true")})

	// Met by every mode there is.
	require(true, "", "", Requirement{Requirement: "direct routing or tunnel", Found: "routing-mode=" + in.RoutingMode, Needed: "native, tunnel or hybrid",
		SetBy: in.SetBy("routing-mode"), Change: set("routing-mode", "tunnel")})

	h.BPF = len(reasons) == 0
	h.Reason = strings.Join(reasons, "; ")
	return h
}
