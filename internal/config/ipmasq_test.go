// SPDX-License-Identifier: Apache-2.0

package config

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

func TestIPMasqIsReadAsItsUsersWriteIt(t *testing.T) {
	byDefault := "[10.0.0.0/8 100.64.0.0/10 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24 192.88.99.0/24 192.168.0.0/16 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 240.0.0.0/4 fe80::/10]"
	for _, tt := range []struct{ data, want string }{
		{"", byDefault},
		{"# nothing\n", byDefault},
		{"{}", byDefault},
		{"masqLinkLocal: false\nresyncInterval: 60s", byDefault},
		{"nonMasqueradeCIDRs: []", "[169.254.0.0/16 fe80::/10]"},
		{"masqLinkLocal: true", "[fe80::/10]"},
		{"masqLinkLocal: true\nmasqLinkLocalIPv6: true", "[]"},
		{"nonMasqueradeCIDRs:\n- 10.0.0.0/8\n- fd00::/8\n- 10.0.0.0/8\n- 1.2.3.4/32\nmasqLinkLocal: true\nmasqLinkLocalIPv6: true\nresyncInterval: 60s", "[1.2.3.4/32 10.0.0.0/8 fd00::/8]"},
		{`{"nonMasqueradeCIDRs": ["192.0.2.0/24"], "masqLinkLocal": true, "cidrLimit": 1}`, "[192.0.2.0/24 fe80::/10]"},
	} {
		got, err := ParseIPMasq("/etc/config/ip-masq-agent", []byte(tt.data))
		if err != nil {
			t.Errorf("%q: %v", tt.data, err)
			continue
		}
		if s := fmt.Sprint(got.NonMasquerade); s != tt.want {
			t.Errorf("%q:\n got %s\nwant %s", tt.data, s, tt.want)
		}
		if want := map[bool]time.Duration{true: time.Minute, false: 5 * time.Second}[strings.Contains(tt.data, "60s")]; got.Resync != want {
			t.Errorf("%q: resync %v, want %v", tt.data, got.Resync, want)
		}
	}
}

func TestMistakesInIPMasqNameFieldAndRemedy(t *testing.T) {
	for _, tt := range []struct {
		data string
		want []string
	}{
		{"nonMasqueradeCIDR: [10.0.0.0/8]", []string{"nonMasqueradeCIDR", "write YAML or JSON with nonMasqueradeCIDRs"}},
		{"nonMasqueradeCIDRs: 10.0.0.0/8", []string{"nonMasqueradeCIDRs"}},
		{"nonMasqueradeCIDRs: [10.0.0.1/8, 10.0.0.1]", []string{`nonMasqueradeCIDRs[0]="10.0.0.1/8"`, "write 10.0.0.0/8", `nonMasqueradeCIDRs[1]="10.0.0.1"`, "write 10.0.0.1/32"}},
		{"nonMasqueradeCIDRs: ['::ffff:10.0.0.0/104']", []string{"not an IPv4-mapped one"}},
		{"nonMasqueradeCIDRs: [10.0.0.0/8, 10.1.0.0/16]\ncidrLimit: 1", []string{`cidrLimit="1"`, "remove some, or cidrLimit"}},
		{"resyncInterval: 60", []string{"resyncInterval"}},
		{"resyncInterval: 1ms", []string{`resyncInterval="1ms"`, "at least 1s", "like 60s"}},
		{"masqLinkLocal: maybe", []string{"masqLinkLocal"}},
		{"\tx", []string{"/etc/config/ip-masq-agent", "write YAML or JSON"}},
	} {
		_, err := ParseIPMasq("/etc/config/ip-masq-agent", []byte(tt.data))
		for _, want := range tt.want {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%q: %v, want %q", tt.data, err, want)
			}
		}
	}
}
