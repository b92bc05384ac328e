// SPDX-License-Identifier: Apache-2.0

package main

import "testing"

func TestDamageIsRead(t *testing.T) {
	v4 := func(n string) string {
		return "Ip: Forwarding\nIp: 1\nUdp: InDatagrams InCsumErrors\nUdp: 5 " + n + "\nUdpLite: InCsumErrors\nUdpLite: 7\n"
	}
	for want, tables := range map[bool][][2]string{
		false: {{v4("0"), "Udp6InDatagrams 4\nUdp6InCsumErrors 0\n"}, {v4("0"), ""}},
		true:  {{v4("2"), ""}, {v4("0"), "Udp6InCsumErrors     1\n"}, {"Udp: InDatagrams\nUdp: 5\n", ""}},
	} {
		for _, c := range tables {
			if countedDamage(c[0], c[1]) != want {
				t.Errorf("%q: want %v", c, want)
			}
		}
	}
}
