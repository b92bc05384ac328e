// SPDX-License-Identifier: Apache-2.0

package monitor

import (
	"strings"
	"testing"

	"github.com/lash-net/lash/bpf"
)

// Every verdict, direction and match, as programs will send them once there is policy.
func TestVerdictLines(t *testing.T) {
	syn, syn6 := tcp("10.244.1.235:54590", "10.244.2.251:7000", 2), tcp("[fd00::1:a]:54590", "[fd00::2:b]:7000", 2)
	for _, tc := range []struct {
		verdict     int32
		flags, auth uint8
		remote      uint32
		frame       []byte
		want        string
		jsonHas     string
		src, dst    uint16
	}{
		{0, bpf.VerdictEgress | 2<<3, 0, 28568, syn, "remote ID 28568, proto 6, egress, action allow, auth: disabled, match L3-L4, 10.244.1.235:54590 -> 10.244.2.251:7000 tcp SYN", `"action":"allow","matchType":"L3-L4"`, 1722, 0},
		{0, bpf.VerdictIngress | 1<<3, 1, 8465, syn, "remote ID 8465, proto 6, ingress, action allow, auth: spire, match L3-Only, 10.244.1.235:54590 -> 10.244.2.251:7000 tcp SYN", `"direction":"ingress"`, 0, 1722},
		{-int32(bpf.DropPolicy), bpf.VerdictIngress, 0, 2, syn, "remote ID world, proto 6, ingress, action deny, auth: disabled, match none, 10.244.1.235:54590 -> 10.244.2.251:7000 tcp SYN", `"verdict":-133`, 0, 1722},
		{-int32(bpf.DropPolicy), bpf.VerdictEgress | bpf.VerdictIPv6, 0, 10, syn6, "remote ID world-ipv6, proto 6, egress, action deny, auth: disabled, match none, [fd00::1:a]:54590 -> [fd00::2:b]:7000 tcp SYN", `"remoteLabel":10`, 1722, 0},
		{0, bpf.VerdictEgress | bpf.VerdictAudited | 3<<3, 0, 28568, syn, "remote ID 28568, proto 6, egress, action audit, auth: disabled, match L4-Only, 10.244.1.235:54590 -> 10.244.2.251:7000 tcp SYN", `"action":"audit"`, 1722, 0},
		{10000, bpf.VerdictEgress | 4<<3, 0, 28568, syn, "remote ID 28568, proto 6, egress, action redirect, auth: disabled, match all, 10.244.1.235:54590 -> 10.244.2.251:7000 tcp SYN", `"verdict":10000`, 1722, 0},
		{0, bpf.VerdictIngress | 5<<3, 2, 28568, syn, "remote ID 28568, proto 6, ingress, action allow, auth: test-always-fail, match L3-Proto, 10.244.1.235:54590 -> 10.244.2.251:7000 tcp SYN", `"matchType":"L3-Proto"`, 0, 1722},
		{0, bpf.VerdictIngress | 6<<3, 7, 28568, syn, "remote ID 28568, proto 6, ingress, action allow, auth: 7, match Proto-Only, 10.244.1.235:54590 -> 10.244.2.251:7000 tcp SYN", `"matchType":"Proto-Only"`, 0, 1722},
	} {
		m := bpf.VerdictNotify{
			Head: bpf.Message{Type: bpf.EventVerdict, Source: 1722, Hash: 0x9e8c339d}, Cap: bpf.Captured{LenOrig: 54, LenCap: uint16(len(tc.frame)), Version: 1},
			RemoteIdentity: tc.remote, Verdict: tc.verdict, DstPort: 7000, Proto: 6, Flags: tc.flags, AuthType: tc.auth, Cookie: 7,
		}
		want := "Policy verdict log: flow 0x9e8c339d local EP ID 1722, " + tc.want + "\n"
		for _, v := range []Verbosity{Brief, Verbose, Dissected} {
			if got := print(t, func(p *Printer) { p.Verbosity = v }, sent{m, tc.frame}); got != want {
				t.Errorf("verbosity %d:\ngot  %swant %s", v, got, want)
			}
		}
		if got := print(t, func(p *Printer) { p.Verbosity = JSON }, sent{m, tc.frame}); !strings.Contains(got, tc.jsonHas) {
			t.Errorf("got %swant %s in it", got, tc.jsonHas)
		}
		decoded, err := Decode(raw(t, m, tc.frame...))
		if err != nil {
			t.Fatal(err)
		}
		if src, dst := decoded.Endpoints(); src != tc.src || dst != tc.dst {
			t.Errorf("endpoints %d and %d, want %d and %d", src, dst, tc.src, tc.dst)
		}
		if !(Filter{Types: []string{TypeVerdict}, Related: []uint16{1722}}).Match(decoded) || (Filter{Related: []uint16{28568}}).Match(decoded) {
			t.Error("the filter takes an identity for an endpoint, or does not know the verdict's")
		}
	}
}
