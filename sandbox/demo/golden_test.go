// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"regexp"
	"slices"
	"strings"
	"testing"
)

func TestShapeOfOneRun(t *testing.T) {
	const out = `1: lo: <LOOPBACK,UP,LOWER_UP> mtu 65536 qdisc noqueue state UNKNOWN group default qlen 1000
    link/loopback 00:00:00:00:00:00 brd 00:00:00:00:00:00
    inet 127.0.0.1/8 scope host lo
9: lxc2e4ac370ba86@if8: <BROADCAST,MULTICAST,UP,LOWER_UP> mtu 1500 qdisc noqueue state UP group default qlen 1000
    link/ether 5a:34:6e:44:ca:47 brd ff:ff:ff:ff:ff:ff link-netns cni-bd3fd18b
    inet6 fe80::5834:6eff:fe44:ca47/64 scope link 
7: lxc3f4ac370ba86@if6: <BROADCAST,MULTICAST,UP,LOWER_UP> mtu 1500 qdisc noqueue state UP group default qlen 1000
    link/ether 5a:34:6e:44:ca:48 brd ff:ff:ff:ff:ff:ff link-netnsid 3
    inet6 fe80::5834:6eff:fe44:ca48/64 scope link 
3: lash_host@lash_net: <BROADCAST,MULTICAST,NOARP,UP,LOWER_UP> mtu 1500 qdisc noqueue state UP group default qlen 1000
    link/ether ea:0c:d0:41:5c:59 brd ff:ff:ff:ff:ff:ff
    inet 10.0.2.194/32 scope link lash_host

default via 172.18.0.1 dev eth0 
10.0.1.0/24 via 10.0.2.194 dev lash_host src 10.0.2.194 mtu 1450 
10.0.0.0/24 via 10.0.2.194 dev lash_host src 10.0.2.194 mtu 1450 

fe80::/64 dev eth0 proto kernel metric 256 pref medium
`
	names := map[string]string{"10.0.2.194": "ROUTER4", "10.0.1.0/24": "OTHER-CIDR4", "10.0.0.0/24": "OTHER-CIDR4"}
	const want = `N: lash_host@lash_net: <BROADCAST,MULTICAST,NOARP,UP,LOWER_UP> mtu 1500 qdisc noqueue state UP group default qlen 1000
    link/ether MAC brd ff:ff:ff:ff:ff:ff
    inet ROUTER4/32 scope link lash_host
N: lo: <LOOPBACK,UP,LOWER_UP> mtu 65536 qdisc noqueue state UNKNOWN group default qlen 1000
    link/loopback 00:00:00:00:00:00 brd 00:00:00:00:00:00
    inet 127.0.0.1/8 scope host lo
N: lxcENDPOINT@ifN: <BROADCAST,MULTICAST,UP,LOWER_UP> mtu 1500 qdisc noqueue state UP group default qlen 1000
    link/ether MAC brd ff:ff:ff:ff:ff:ff link-netns NS
    inet6 LINKLOCAL/64 scope link

OTHER-CIDR4 via ROUTER4 dev lash_host src ROUTER4 mtu 1450
default via 172.18.0.1 dev eth0

fe80::/64 dev eth0 proto kernel metric 256 pref medium
`
	if err := firstDifference(want, shape(out, names)); err != nil {
		t.Error(err)
	}
	if err := firstDifference("a\nb", "a"); err == nil || !strings.Contains(err.Error(), `line 2 is "(the end)"`) {
		t.Errorf("a missing line: %v", err)
	}
}

// The seeds' own lines (002, 003), with Lash's names of devices. Each must be in the golden file of the mode. Of theirs only
// the link-local addresses of the pods' host sides are missing: these have none on purpose (netdev, markPod).
var seedLines = map[string][]string{
	"vxlan-pod": {
		"N: lo: <LOOPBACK,UP,LOWER_UP> mtu 65536 qdisc noqueue state UNKNOWN group default qlen 1000",
		"N: eth0@ifN: <BROADCAST,MULTICAST,UP,LOWER_UP> mtu 1500 qdisc noqueue state UP group default qlen 1000",
		"    link/ether MAC brd ff:ff:ff:ff:ff:ff link-netns NS",
		"    inet POD4/32 scope global eth0",
		"       valid_lft forever preferred_lft forever",
		"    inet6 LINKLOCAL/64 scope link",
		"default via ROUTER4 dev eth0 mtu 1450",
		"ROUTER4 dev eth0 scope link",
	},
	"vxlan-node": {
		"N: lash_net@lash_host: <BROADCAST,MULTICAST,NOARP,UP,LOWER_UP> mtu 1500 qdisc noqueue state UP group default qlen 1000",
		"N: lash_host@lash_net: <BROADCAST,MULTICAST,NOARP,UP,LOWER_UP> mtu 1500 qdisc noqueue state UP group default qlen 1000",
		"    inet ROUTER4/32 scope global lash_host", // so 002; 003 has scope link
		"N: lash_vxlan: <BROADCAST,MULTICAST,UP,LOWER_UP> mtu 1500 qdisc noqueue state UNKNOWN group default qlen 1000",
		"N: lxc_health@ifN: <BROADCAST,MULTICAST,UP,LOWER_UP> mtu 1500 qdisc noqueue state UP group default qlen 1000",
		"N: lxcENDPOINT@ifN: <BROADCAST,MULTICAST,UP,LOWER_UP> mtu 1500 qdisc noqueue state UP group default qlen 1000",
		"N: eth0@ifN: <BROADCAST,MULTICAST,UP,LOWER_UP> mtu 1500 qdisc noqueue state UP group default qlen 1000",
		"    inet NODE4/16 scope global eth0", // the broadcast address was the container runtime's
		"default via 172.18.0.1 dev eth0",
		"OTHER-CIDR4 via ROUTER4 dev lash_host src ROUTER4 mtu 1450",
		"CIDR4 via ROUTER4 dev lash_host src ROUTER4",
		"ROUTER4 dev lash_host scope link",
		"172.18.0.0/16 dev eth0 proto kernel scope link src NODE4",
	},
	"native-pod": {
		"default via ROUTER4 dev eth0 mtu 1500",
		"ROUTER4 dev eth0 scope link",
	},
	"native-node": {
		"OTHER-CIDR4 via OTHER-NODE4 dev eth0",
		"CIDR4 via ROUTER4 dev lash_host src ROUTER4",
		"ROUTER4 dev lash_host scope link",
	},
}

// deviations are what Lash shows and the seeds' version did not.
var deviations = []struct {
	find *regexp.Regexp
	is   string
}{
	{regexp.MustCompile(` proto 76\b`), ""}, // routes carry their owner, so that only its own are ever removed
}

func TestGoldenFilesHaveTheSeedsLines(t *testing.T) {
	for name, want := range seedLines {
		raw, err := goldenFiles.ReadFile("testdata/" + name + ".golden")
		if err != nil {
			t.Fatal(err)
		}
		text := string(raw)
		for _, d := range deviations {
			text = d.find.ReplaceAllString(text, d.is)
		}
		lines := strings.Split(text, "\n")
		for _, l := range want {
			if !slices.Contains(lines, l) {
				t.Errorf("%s lacks the seeds' line %q", name, l)
			}
		}
		if strings.HasPrefix(name, "native") && strings.Contains(text, "lash_vxlan") {
			t.Errorf("%s has the tunnel device", name)
		}
	}
}
