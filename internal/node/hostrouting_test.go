// SPDX-License-Identifier: Apache-2.0

package node

import (
	"strings"
	"testing"
)

func TestHostRouting(t *testing.T) {
	good := HostRoutingInput{
		KubeProxyReplacement: true, BPFMasquerade: true, IPv4Masquerade: true, IPv6Masquerade: true, RoutingMode: "native", Kernel: "6.18.0",
		SetBy: func(key string) string { return "default" },
	}
	for _, tc := range []struct {
		name   string
		tweak  func(*HostRoutingInput)
		reason string
		log    string
	}{
		{"all requirements met", func(*HostRoutingInput) {}, "", ""},
		{"user", func(in *HostRoutingInput) { in.Legacy = true }, "enable-host-legacy-routing=true", "BPF host routing is switched off by the user (enable-host-legacy-routing=true)."},
		{"no BPF masquerade", func(in *HostRoutingInput) { in.BPFMasquerade = false }, "enable-bpf-masquerade=false",
			"BPF host routing requires enable-bpf-masquerade. Falling back to legacy host routing (enable-host-legacy-routing=true)."},
		{"no masquerading at all needs none in BPF", func(in *HostRoutingInput) {
			in.BPFMasquerade, in.IPv4Masquerade, in.IPv6Masquerade = false, false, false
		}, "", ""},
		{"one family masquerades", func(in *HostRoutingInput) { in.BPFMasquerade, in.IPv4Masquerade = false, false }, "enable-bpf-masquerade=false",
			"BPF host routing requires enable-bpf-masquerade. Falling back to legacy host routing (enable-host-legacy-routing=true)."},
		{"old kernel", func(in *HostRoutingInput) { in.MissingHelpers = []string{"bpf_redirect_peer"} }, "kernel lacks bpf_redirect_peer",
			"BPF host routing requires kernel 5.10 or newer. Falling back to legacy host routing (enable-host-legacy-routing=true)."},
		{"kube-proxy", func(in *HostRoutingInput) { in.KubeProxyReplacement = false }, "kube-proxy-replacement=false",
			"BPF host routing requires kube-proxy-replacement. Falling back to legacy host routing (enable-host-legacy-routing=true)."},
		{"two causes are both named", func(in *HostRoutingInput) { in.KubeProxyReplacement, in.BPFMasquerade = false, false },
			"kube-proxy-replacement=false; enable-bpf-masquerade=false",
			"BPF host routing requires kube-proxy-replacement. Falling back to legacy host routing (enable-host-legacy-routing=true).|" +
				"BPF host routing requires enable-bpf-masquerade. Falling back to legacy host routing (enable-host-legacy-routing=true)."},
	} {
		t.Run(tc.name, func(t *testing.T) {
			in := good
			tc.tweak(&in)
			h := ChooseHostRouting(in)
			if h.BPF != (tc.reason == "") || h.Reason != tc.reason {
				t.Errorf("BPF %v because of %q, want %q", h.BPF, h.Reason, tc.reason)
			}
			if got := strings.Join(h.Log, "|"); got != tc.log {
				t.Errorf("log is %q, want %q", got, tc.log)
			}
			unmet := 0
			for _, r := range h.Requirements {
				if !r.Met {
					unmet++
				}
				if r.Requirement == "" || r.Found == "" || r.Needed == "" || r.SetBy == "" || r.Change == "" {
					t.Errorf("incomplete row %+v", r)
				}
			}
			if len(h.Requirements) != 5 || unmet != len(h.Log) {
				t.Errorf("%d requirements, %d unmet, %d log lines", len(h.Requirements), unmet, len(h.Log))
			}
		})
	}
}
