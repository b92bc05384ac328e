// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"net/netip"
	"regexp"
	"strings"
	"testing"

	"helm.sh/helm/v3/pkg/chartutil"
	"helm.sh/helm/v3/pkg/engine"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"
)

// renderAll renders the chart and returns its files by base name.
func renderAll(t *testing.T, sets ...string) map[string]string {
	t.Helper()
	c, _ := testChart(t)
	full, err := chartutil.ToRenderValues(c, parseSet(t, sets...), chartutil.ReleaseOptions{Name: "lash", Namespace: "kube-system"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	files, err := engine.Render(c, full)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for name, text := range files {
		base := name[strings.LastIndexByte(name, '/')+1:]
		out[base] = text
		for _, doc := range strings.Split(text, "\n---\n") {
			var obj map[string]any
			if strings.HasSuffix(base, ".yaml") {
				if err := yaml.UnmarshalStrict([]byte(doc), &obj); err != nil {
					t.Errorf("%s: %v\n%s", base, err, doc)
				}
			}
		}
	}
	return out
}

func sumOf(t *testing.T, text string) string {
	t.Helper()
	m := regexp.MustCompile(`config-checksum: ([0-9a-f]{64})`).FindStringSubmatch(text)
	if m == nil {
		t.Fatalf("no checksum in\n%s", text)
	}
	return m[1]
}

func testNode(name string, addrs ...string) corev1.Node {
	n := corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}
	for _, a := range addrs {
		netip.MustParseAddr(a)
		n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: a})
	}
	return n
}

func TestDetection(t *testing.T) {
	dual := []corev1.Node{testNode("a", "192.0.2.1", "2001:db8::1"), testNode("b", "192.0.2.2", "2001:db8::2")}
	for _, tt := range []struct {
		name string
		f    facts
		set  []string
		want map[string]string
		err  string
		warn string
	}{
		{"server, name and families", facts{apiServer: "https://192.0.2.9:6443", cluster: "Blue", nodes: dual}, nil,
			map[string]string{"k8sServiceHost": "192.0.2.9", "k8sServicePort": "6443", "cluster.name": "blue", "ipv6.enabled": "true"}, "", ""},
		{"the user's word counts", facts{apiServer: "https://192.0.2.9:6443", cluster: "blue", nodes: dual},
			[]string{"k8sServiceHost=192.0.2.8", "k8sServicePort=7443", "cluster.name=red", "ipv6.enabled=false", "operator.replicas=3"},
			map[string]string{"k8sServiceHost": "192.0.2.8", "k8sServicePort": "7443", "cluster.name": "red", "ipv6.enabled": "false", "operator.replicas": "3"}, "", ""},
		{"no port means 443", facts{apiServer: "https://api.example.com", nodes: dual}, nil,
			map[string]string{"k8sServiceHost": "api.example.com", "k8sServicePort": "443"}, "", ""},
		{"IPv6 address", facts{apiServer: "https://[2001:db8::9]:6443", nodes: dual}, nil, map[string]string{"k8sServiceHost": "2001:db8::9"}, "", ""},
		{"loopback, and the service knows better", facts{apiServer: "https://127.0.0.1:41234", endpoints: []string{"192.0.2.9:6443"}, nodes: dual}, nil,
			map[string]string{"k8sServiceHost": "192.0.2.9", "k8sServicePort": "6443"}, "", ""},
		{"loopback only", facts{apiServer: "https://127.0.0.1:41234", endpoints: []string{"127.0.0.1:6443"}, nodes: dual}, nil, nil,
			"good on this machine only, and the service kubernetes has no other: give the address nodes use with --set k8sServiceHost=ADDRESS", ""},
		{"loopback from the user", facts{apiServer: "https://192.0.2.9:6443", nodes: dual}, []string{"k8sServiceHost=localhost"}, nil, "k8sServiceHost=localhost", ""},
		{"kube-proxy stays", facts{apiServer: "https://127.0.0.1:41234", nodes: dual}, []string{"kubeProxyReplacement=false"}, map[string]string{"k8sServiceHost": "<nil>"}, "", ""},
		{"one node", facts{apiServer: "https://192.0.2.9:6443", nodes: dual[:1]}, nil, map[string]string{"operator.replicas": "1"}, "", ""},
		{"one node without IPv6", facts{apiServer: "https://192.0.2.9:6443", nodes: append([]corev1.Node{testNode("c", "192.0.2.3")}, dual...)}, nil, map[string]string{"ipv6.enabled": "<nil>"}, "", ""},
		{"IPv6 only", facts{apiServer: "https://[2001:db8::9]:6443", nodes: []corev1.Node{testNode("c", "2001:db8::3")}}, nil, map[string]string{"ipv6.enabled": "true", "ipv4.enabled": "false"}, "", ""},
		{"nodes in the pool", facts{apiServer: "https://10.0.0.9:6443", nodes: []corev1.Node{testNode("c", "10.0.0.3")}}, nil, nil, "", "the pool 10.0.0.0/8 for pods contains addresses of nodes (c 10.0.0.3)"},
		{"nodes beside the pool", facts{apiServer: "https://10.0.0.9:6443", nodes: []corev1.Node{testNode("c", "10.0.0.3")}},
			[]string{"ipam.operator.clusterPoolIPv4PodCIDRList={10.128.0.0/16}"}, nil, "", ""},
		{"an unusable cluster name is left", facts{apiServer: "https://192.0.2.9:6443", cluster: "arn:aws:eks/x", nodes: dual}, nil, map[string]string{"cluster.name": "<nil>"}, "", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			values := parseSet(t, tt.set...)
			_, warnings, err := detect(&tt.f, values)
			if (err != nil) != (tt.err != "") || err != nil && !strings.Contains(err.Error(), tt.err) {
				t.Fatalf("error %v, want %q", err, tt.err)
			}
			for path, want := range tt.want {
				if got, _ := lookupValue(values, path); sprint(got) != want {
					t.Errorf("%s is %v, want %s", path, got, want)
				}
			}
			if got := strings.Join(warnings, "\n"); (got == "") != (tt.warn == "") || !strings.Contains(got, tt.warn) {
				t.Errorf("warnings %q, want %q", got, tt.warn)
			}
		})
	}
}

func sprint(v any) string {
	if v == nil {
		return "<nil>"
	}
	b, _ := yaml.Marshal(v)
	return strings.Trim(strings.TrimSpace(string(b)), `"'`)
}
