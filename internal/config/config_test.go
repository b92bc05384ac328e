// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the generated reference")

func TestReferenceIsCurrent(t *testing.T) {
	path := filepath.Join("..", "..", "docs", "reference", "configuration.md")
	if *update {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(Reference()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if string(b) != Reference() {
		t.Errorf("%s is out of date: run go generate ./internal/config", path)
	}
}

func TestEveryKeyIsDocumentedAndRoundTrips(t *testing.T) {
	if n := len(Options()); n > 80 { // of the field's hundreds
		t.Errorf("%d keys, at most 80", n)
	}
	kebab := regexp.MustCompile(`^[a-z0-9]+(-[a-z0-9]+)*$`)
	seen := map[string]bool{}
	c := Default()
	for _, o := range Options() {
		if !kebab.MatchString(o.Key) || seen[o.Key] {
			t.Errorf("key %q is not kebab-case or occurs twice", o.Key)
		}
		seen[o.Key] = true
		if o.Doc == "" || o.Section == "" || !strings.HasSuffix(o.Doc, ".") {
			t.Errorf("%s lacks a sentence of documentation or a section", o.Key)
		}
		if got := o.get(c); got != o.Default {
			t.Errorf("%s: default %q reads back as %q", o.Key, o.Default, got)
		}
		for _, m := range []map[string]string{renamed, meaningless} {
			if _, ok := m[o.Key]; ok {
				t.Errorf("%s is a key and an old spelling at once", o.Key)
			}
		}
		if _, ok := absent[o.Key]; ok {
			t.Errorf("%s is a key and absent at once", o.Key)
		}
	}
	if errs := c.check(); len(errs) > 0 {
		t.Errorf("the default is invalid: %v", errs)
	}
}

func TestFlagsWinOverFilesAndFilesOverDefaults(t *testing.T) {
	dir := writeDir(t, map[string]string{"mtu": "1400\n", "cluster-name": "blue", "..data": "ignored"})
	c, err := Load(dir, []string{"--mtu=1500", "--debug", "--devices", "eth0,eth1"})
	if err != nil {
		t.Fatal(err)
	}
	if c.MTU != 1500 || c.ClusterName != "blue" || !c.Debug || !slices.Equal(c.Devices, []string{"eth0", "eth1"}) {
		t.Errorf("got mtu %d, cluster %q, debug %v, devices %q", c.MTU, c.ClusterName, c.Debug, c.Devices)
	}
	for key, want := range map[string]string{"mtu": "flag", "cluster-name": "file", "ipam": "default"} {
		if got := c.Source(key).Kind; got != want {
			t.Errorf("source of %s: %s, want %s", key, got, want)
		}
	}
	if !slices.Contains(c.Dump(), "--enable-host-legacy-routing='false'") || !slices.Contains(c.Dump(), "--datapath-mode='veth'") {
		t.Errorf("dump lacks expected lines: %q", c.Dump())
	}
}

func TestConfigDirFlagReplacesDir(t *testing.T) {
	dir := writeDir(t, map[string]string{"mtu": "1400"})
	c, err := Load("/does/not/exist", []string{"--config-dir=" + dir})
	if err != nil || c.MTU != 1400 {
		t.Errorf("got %v, %v", c, err)
	}
	if _, err := Load("", []string{"--help"}); !errors.Is(err, flag.ErrHelp) {
		t.Errorf("--help: %v", err)
	}
}

func TestOldSpellingsAreTranslatedAndReported(t *testing.T) {
	for _, tt := range []struct {
		key, value, nowKey, now string
	}{
		{"tunnel", "disabled", "routing-mode", "native"},
		{"tunnel", "vxlan", "routing-mode", "tunnel"},
		{"tunnel", "geneve", "routing-mode", "tunnel"},
		{"tunnel", "geneve", "tunnel-protocol", "geneve"},
		{"kube-proxy-replacement", "strict", "kube-proxy-replacement", "true"},
		{"kube-proxy-replacement", "Probe", "kube-proxy-replacement", "true"},
		{"kube-proxy-replacement", "disabled", "kube-proxy-replacement", "false"},
		{"native-routing-cidr", "10.0.0.0/8", "ipv4-native-routing-cidr", "10.0.0.0/8"},
		{"masquerade", "false", "enable-ipv4-masquerade", "false"},
		{"bpf-ct-global-tcp-max", "100000", "bpf-ct-max", "100000"},
	} {
		c, err := FromMap("lash-config", map[string]string{tt.key: tt.value})
		if err != nil {
			t.Errorf("%s: %v", tt.key, err)
			continue
		}
		if got, _ := c.Get(tt.nowKey); got != tt.now {
			t.Errorf("%s=%s: %s is %q, want %q", tt.key, tt.value, tt.nowKey, got, tt.now)
		}
		if notes := strings.Join(c.Notes(), "\n"); !strings.Contains(notes, tt.key) || !strings.Contains(notes, tt.nowKey+`="`+tt.now+`"`) {
			t.Errorf("%s=%s: notes %q do not say what became of it", tt.key, tt.value, notes)
		}
	}
}

// The mode of who configures nothing, and what follows from the keys of the tunnel.
func TestTunnelOfTheConfiguration(t *testing.T) {
	for _, tt := range []struct {
		data     map[string]string
		tunnel   bool
		port     uint16
		v6       bool
		overhead int
	}{
		{nil, true, 8472, false, 50},
		{map[string]string{"tunnel-protocol": "geneve", "routing-mode": "hybrid"}, true, 6081, false, 50},
		{map[string]string{"tunnel-protocol": "", "tunnel-port": "", "underlay-protocol": ""}, true, 8472, false, 50},
		{map[string]string{"tunnel-port": "4789", "enable-ipv6": "true", "underlay-protocol": "ipv6"}, true, 4789, true, 70},
		{map[string]string{"enable-ipv4": "false", "enable-ipv6": "true"}, true, 8472, true, 70},
		{map[string]string{"tunnel": "disabled"}, false, 8472, false, 50},
	} {
		c, err := FromMap("lash-config", tt.data)
		if err != nil {
			t.Errorf("%v: %v", tt.data, err)
			continue
		}
		if c.Tunnel() != tt.tunnel || c.TunnelUDPPort() != tt.port || c.UnderlayIPv6() != tt.v6 || c.TunnelOverhead() != tt.overhead {
			t.Errorf("%v: tunnel %v, port %d, IPv6 underlay %v, overhead %d", tt.data, c.Tunnel(), c.TunnelUDPPort(), c.UnderlayIPv6(), c.TunnelOverhead())
		}
	}
}

func TestValuesThatLeaveAFeatureOffAreAccepted(t *testing.T) {
	data := map[string]string{}
	for key, off := range absent {
		data[key] = off[0]
	}
	if _, err := FromMap("lash-config", data); err != nil {
		t.Error(err)
	}
}

func TestNativeRoutingCIDRThatMissesAPoolIsNoted(t *testing.T) {
	c, err := FromMap("lash-config", map[string]string{"ipv4-native-routing-cidr": "10.0.0.0/22", "cluster-pool-ipv4-cidr": "10.0.0.0/16"})
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Notes()) != 1 || !strings.Contains(c.Notes()[0], "10.0.0.0/22 does not contain the pool 10.0.0.0/16") {
		t.Errorf("notes: %q", c.Notes())
	}
	if got := c.MasqueradeExclusion(false); !slices.Equal(got, []netip.Prefix{netip.MustParsePrefix("10.0.0.0/22")}) {
		t.Errorf("exclusion %v", got)
	}
}

// Helm values of a cluster that uses no DSR may name a dispatch all the same.
func TestDispatchWithoutDSRIsNoted(t *testing.T) {
	for data, note := range map[string]string{"snat": "has no effect", "dsr": "", "hybrid": ""} {
		m := map[string]string{"bpf-lb-mode": data, "bpf-lb-dsr-dispatch": "geneve", "routing-mode": "native"}
		if note == "" {
			m["tunnel-protocol"] = "geneve"
		}
		c, err := FromMap("lash-config", m)
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.Join(c.Notes(), " "); !strings.Contains(got, note) || (got == "") != (note == "") {
			t.Errorf("%s: notes %q", data, got)
		}
	}
}

// TestMalformedConfigurationIsRefusedWithARemedy checks that each error names the key, the value and what to do.
func TestMalformedConfigurationIsRefusedWithARemedy(t *testing.T) {
	type kv = map[string]string
	for _, tt := range []struct {
		data kv
		want []string
	}{
		{kv{"rooting-mode": "native"}, []string{"rooting-mode", "did you mean routing-mode?"}},
		{kv{"enable-bpf-masquerad": "true"}, []string{"did you mean enable-bpf-masquerade?"}},
		{kv{"aggregation": "none"}, []string{"did you mean monitor-aggregation?"}},
		{kv{"frobnicate": "x"}, []string{"frobnicate", "unknown key", "remove it"}},
		{kv{"k8s-service-proxy-name": "a,b"}, []string{`k8s-service-proxy-name="a,b"`, "the value of a label"}},
		{kv{"enable-health-check-nodeport": "false"}, []string{`set it to "true"`}},
		{kv{"routing-mode": "nativ"}, []string{`routing-mode="nativ"`, "must be native, tunnel or hybrid"}},
		{kv{"tunnel": "gre"}, []string{`tunnel="gre"`, "must be disabled, vxlan or geneve", "routing-mode and tunnel-protocol"}},
		{kv{"tunel": "vxlan"}, []string{"did you mean tunnel?"}},
		{kv{"tunnel-protocol": "gre"}, []string{`tunnel-protocol="gre"`, "must be vxlan or geneve"}},
		{kv{"tunnel-port": "70000"}, []string{`tunnel-port="70000"`, "from 1 to 65535"}},
		{kv{"tunnel-port": "30000"}, []string{`tunnel-port="30000"`, "node-port-range", "outside of it"}},
		{kv{"underlay-protocol": "ipv6"}, []string{`underlay-protocol="ipv6"`, "set enable-ipv6 to true, or underlay-protocol to auto"}},
		{kv{"underlay-protocol": "ipv4", "enable-ipv4": "false", "enable-ipv6": "true"}, []string{"IPv4 is off: set enable-ipv4 to true"}},
		{kv{"routing-mode": "hybrid", "auto-direct-node-routes": "false"}, []string{`routing-mode="hybrid"`, "auto-direct-node-routes is false: set it to true, or routing-mode to tunnel"}},
		{kv{"tunnel": "geneve", "tunnel-protocol": "vxlan"}, []string{"tunnel", "old spelling of tunnel-protocol", "remove one"}},
		{kv{"enable-ip-masq-agent": "true", "enable-bpf-masquerade": "false"}, []string{"enable-ip-masq-agent", "set enable-bpf-masquerade to true"}},
		{kv{"ip-masq-agent-config-path": "x"}, []string{"ip-masq-agent-config-path", "absolute path"}},
		{kv{"enable-wireguard": "true"}, []string{"enable-wireguard", "not supported by this version", `"false"`}},
		{kv{"enable-hubble": "true"}, []string{"enable-hubble", "not supported"}},
		{kv{"bpf-lb-mode": "hybrid", "bpf-lb-dsr-dispatch": "geneve"}, []string{"bpf-lb-dsr-dispatch", "geneve needs tunnel-protocol geneve", "or opt"}},
		{kv{"bpf-lb-mode": "dsr", "bpf-lb-dsr-dispatch": "ipip"}, []string{"outside of the cluster", "set opt"}},
		{kv{"bpf-lb-mode": "fast"}, []string{"snat, dsr or hybrid"}},
		{kv{"bpf-lb-maglev-table-size": "1000"}, []string{"bpf-lb-maglev-table-size", "16381"}},
		{kv{"bpf-lb-maglev-hash-seed": "short"}, []string{"bpf-lb-maglev-hash-seed", "12 bytes in base64"}},
		{kv{"bpf-lb-acceleration": "generic"}, []string{"bpf-lb-acceleration", "disabled, native or best-effort"}},
		{kv{"bpf-lb-xdp-spread": "true"}, []string{"bpf-lb-xdp-spread", "set bpf-lb-acceleration"}},
		{kv{"nodeport-addresses": "10.0.0.1"}, []string{"nodeport-addresses", "10.0.0.1/32"}},
		{kv{"kube-proxy-replacement-healthz-bind-address": "10256"}, []string{"0.0.0.0:10256"}},
		{kv{"enable-ipv4": "yes"}, []string{`enable-ipv4="yes"`, "must be true or false"}},
		{kv{"enable-ipv4": "false", "enable-ipv6": "false"}, []string{"enable-ipv4", "set enable-ipv4 or enable-ipv6 to true"}},
		{kv{"kube-proxy-replacement": "sometimes"}, []string{`kube-proxy-replacement="sometimes"`, "must be true or false"}},
		{kv{"mtu": "large"}, []string{`mtu="large"`, "whole number"}},
		{kv{"mtu": "100", "routing-mode": "native"}, []string{`mtu="100"`, "from 576 to 65535"}},
		{kv{"mtu": "600", "enable-ipv6": "true", "routing-mode": "native"}, []string{`mtu="600"`, "from 1280"}},
		{kv{"mtu": "1320", "enable-ipv6": "true"}, []string{`mtu="1320"`, "from 1330 to 65535, of which the tunnel takes 50"}},
		{kv{"mtu": "-1"}, []string{`mtu="-1"`, "0 (detect)"}},
		{kv{"ipam": "eni"}, []string{`ipam="eni"`, "cluster-pool or kubernetes"}},
		{kv{"cluster-pool-ipv4-cidr": "10.0.0.0"}, []string{"cluster-pool-ipv4-cidr", "write 10.0.0.0/32"}},
		{kv{"cluster-pool-ipv4-cidr": "10.1.2.3/8"}, []string{"write 10.0.0.0/8"}},
		{kv{"cluster-pool-ipv4-cidr": "ten/8"}, []string{"must be a CIDR"}},
		{kv{"cluster-pool-ipv4-cidr": ""}, []string{"cluster-pool-ipv4-cidr", "at least one IPv4 CIDR"}},
		{kv{"cluster-pool-ipv4-cidr": "fd00::/104"}, []string{"fd00::/104 is not an IPv4 CIDR"}},
		{kv{"cluster-pool-ipv4-cidr": "10.0.0.0/25"}, []string{"smaller than the /24", "cluster-pool-ipv4-mask-size"}},
		{kv{"cluster-pool-ipv4-cidr": "10.0.0.0/8,10.2.0.0/16"}, []string{"overlap", "remove one"}},
		{kv{"cluster-pool-ipv4-cidr": "127.0.0.0/8"}, []string{"127.0.0.0/8", "choose a private range"}},
		{kv{"cluster-pool-ipv4-mask-size": "33"}, []string{"cluster-pool-ipv4-mask-size", "from 16 to 30"}},
		{kv{"cluster-pool-ipv4-mask-size": "8"}, []string{"from 16 to 30"}},
		{kv{"cluster-pool-ipv6-mask-size": "64", "enable-ipv6": "true"}, []string{"cluster-pool-ipv6-mask-size", "from 112 to 126"}},
		{kv{"cluster-pool-ipv6-cidr": "10.0.0.0/8", "enable-ipv6": "true"}, []string{"10.0.0.0/8 is not an IPv6 CIDR"}},
		{kv{"cluster-pool-ipv4-cidr": "::ffff:10.0.0.0/104"}, []string{"not an IPv4-mapped one"}},
		{kv{"ipv4-native-routing-cidr": "fd00::/8"}, []string{"ipv4-native-routing-cidr", "must be an IPv4 CIDR"}},
		{kv{"ipv6-native-routing-cidr": "10.0.0.0/8"}, []string{"must be an IPv6 CIDR"}},
		{kv{"ipv4-native-routing-cidr": "10.0.0.0/8,10.1.0.0/16"}, []string{"must be a CIDR"}},
		{kv{"devices": "a-very-long-device-name"}, []string{"devices", "at most 15 characters"}},
		{kv{"devices": "eth0/1"}, []string{`"eth0/1" is not the name`}},
		{kv{"devices": "eth0", "direct-routing-device": "eth1"}, []string{"direct-routing-device", `not among devices="eth0"`, "add it there"}},
		{kv{"direct-routing-device": "eth+"}, []string{"one network device"}},
		{kv{"node-port-range": "30000"}, []string{"node-port-range", "FIRST-LAST"}},
		{kv{"node-port-range": "32767-30000"}, []string{"FIRST <= LAST"}},
		{kv{"node-port-range": "30000-99999"}, []string{"<= 65535"}},
		{kv{"agent-health-port": "0"}, []string{"agent-health-port", "from 1 to 65535"}},
		{kv{"agent-health-port": "30001"}, []string{"lies in node-port-range", "outside of it"}},
		{kv{"operator-api-serve-addr": "9234"}, []string{"operator-api-serve-addr", "ADDRESS:PORT"}},
		{kv{"cluster-name": "Blue_Cluster"}, []string{"cluster-name", "lower-case letters"}},
		{kv{"cluster-id": "256"}, []string{"cluster-id", "from 0 to 255"}},
		{kv{"cluster-id": "3"}, []string{"cluster-name", "name of its own"}},
		{kv{"agent-not-ready-taint-key": "not a key"}, []string{"agent-not-ready-taint-key", "like node.cilium.io/agent-not-ready"}},
		{kv{"bpf-ct-max": "12"}, []string{"bpf-ct-max", "from 1024"}},
		{kv{"bpf-lb-map-max": "1"}, []string{"bpf-lb-map-max", "from 256"}},
		{kv{"monitor-aggregation": "some"}, []string{"none, low, medium or maximum"}},
		{kv{"datapath-mode": "netkit"}, []string{`datapath-mode="netkit"`, "must be veth"}},
		{kv{"nodes-gc-interval": "30"}, []string{"nodes-gc-interval", "with its unit, like 30s"}},
		{kv{"nodes-gc-interval": "1ms"}, []string{"at least 1s"}},
		{kv{"unmanaged-pod-watcher-interval": "-3s"}, []string{"unmanaged-pod-watcher-interval", "duration"}},
		{kv{"state-dir": "run/lash"}, []string{"state-dir", "absolute path"}},
		{kv{"state-dir": "/var/../run"}, []string{"without . or .. parts"}},
		{kv{"cni-socket-path": "/var/run/lash/lash.sock"}, []string{"cni-socket-path", "same as socket-path"}},
		{kv{"socket-path": "/" + strings.Repeat("x", 120)}, []string{"socket-path", "107 bytes"}},
		{kv{"cgroup-root": "unified"}, []string{"cgroup-root", "absolute path"}},
		{kv{"debug-verbose": "everything"}, []string{"debug-verbose", "datapath"}},
		{kv{"tunnel": "disabled", "routing-mode": "tunnel"}, []string{"tunnel", "old spelling of routing-mode", "remove one"}},
		{kv{"masquerade": "false", "enable-ipv4-masquerade": "true"}, []string{"masquerade", "old spelling of enable-ipv4-masquerade", "remove one"}},
	} {
		_, err := FromMap("lash-config", tt.data)
		if err == nil {
			t.Errorf("%v: accepted", tt.data)
			continue
		}
		var e *Error
		if !errors.As(err, &e) {
			t.Errorf("%v: %T is not an Error", tt.data, err)
		}
		for _, want := range tt.want {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%v: %q lacks %q", tt.data, err, want)
			}
		}
	}
}

func TestMalformedArgumentsAreRefused(t *testing.T) {
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"mtu=1500"}, "--key=value"},
		{[]string{"-mtu=1500"}, "--key=value"},
		{[]string{"--mtu"}, "write --mtu=VALUE"},
		{[]string{"--mtu", "--debug"}, "write --mtu=VALUE"},
		{[]string{"--mtx=1500"}, "did you mean mtu?"},
		{[]string{"--config-dir=/does/not/exist"}, "/does/not/exist"},
	} {
		if _, err := Load("", tt.args); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%q: %v, want %q", tt.args, err, tt.want)
		}
	}
}

func TestAllErrorsAreReportedAtOnce(t *testing.T) {
	_, err := FromMap("lash-config", map[string]string{"mtu": "x", "ipam": "y", "nope": "z"})
	for _, want := range []string{"mtu", "ipam", "nope"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v lacks %s", err, want)
		}
	}
}

// FuzzLoad checks that no value of any key makes the parser panic or lets an invalid configuration through.
func FuzzLoad(f *testing.F) {
	for _, o := range Options() {
		f.Add(o.Key, o.Default)
	}
	f.Fuzz(func(t *testing.T, key, value string) {
		c, err := FromMap("fuzz", map[string]string{key: value})
		if err == nil {
			if errs := c.check(); len(errs) > 0 {
				t.Errorf("%s=%q accepted: %v", key, value, errs)
			}
		}
	})
}

func writeDir(t *testing.T, data map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, value := range data {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(value), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}
