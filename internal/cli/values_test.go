// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"fmt"
	"strings"
	"testing"

	"helm.sh/helm/v3/pkg/chart"
	"helm.sh/helm/v3/pkg/strvals"
	"sigs.k8s.io/yaml"

	"github.com/lash-net/lash/internal/config"
)

func testChart(t *testing.T) (*chart.Chart, valuePaths) {
	t.Helper()
	c, err := loadChart()
	if err != nil {
		t.Fatal(err)
	}
	known, err := knownValues(c)
	if err != nil {
		t.Fatal(err)
	}
	return c, known
}

func parseSet(t *testing.T, sets ...string) map[string]any {
	t.Helper()
	values := map[string]any{}
	for _, s := range sets {
		if err := strvals.ParseInto(s, values); err != nil {
			t.Fatal(err)
		}
	}
	return values
}

func TestDefaultValuesAreKnownAndValid(t *testing.T) {
	c, known := testChart(t)
	for _, path := range leaves(c.Values, "", known) {
		if !known.has(path) {
			t.Errorf("%s is in values.yaml and not in values.schema.json", path)
		}
	}
	if notes, err := checkValues(c, map[string]any{}, "kube-system"); err != nil || len(notes) > 0 {
		t.Errorf("defaults: %v, %v", notes, err)
	}
}

func TestOldSpellingsOfValuesAreTranslated(t *testing.T) {
	c, known := testChart(t)
	for _, tt := range []struct {
		set, path, want string
		silent          bool
	}{
		{set: "tunnel=disabled", path: "routingMode", want: "native"},
		{set: "tunnel=geneve", path: "tunnelProtocol", want: "geneve"},
		{set: "routingMode=hybrid", path: "routingMode", want: "hybrid", silent: true},
		{set: "tunnelPort=4789", path: "tunnelPort", want: "4789", silent: true},
		{set: "kubeProxyReplacement=strict", path: "kubeProxyReplacement", want: "true"},
		{set: "kubeProxyReplacement=disabled", path: "kubeProxyReplacement", want: "false"},
		{set: "nativeRoutingCIDR=10.0.0.0/8", path: "ipv4NativeRoutingCIDR", want: "10.0.0.0/8"},
		{set: "bpf.hostRouting=true", path: "bpf.hostLegacyRouting", want: "false"},
		{set: "ipam.operator.clusterPoolIPv4PodCIDR=10.7.0.0/16", path: "ipam.operator.clusterPoolIPv4PodCIDRList", want: "[10.7.0.0/16]"},
		{set: "kubeProxyReplacement=true", path: "kubeProxyReplacement", want: "true", silent: true},
		{set: "socketLB.hostNamespaceOnly=true", path: "socketLB.hostNamespaceOnly", want: "true", silent: true},
		{set: "autoDirectNodeRoutes=true", path: "autoDirectNodeRoutes", want: "true", silent: true},
	} {
		values := parseSet(t, tt.set)
		said, err := translateValues(values, known)
		if err != nil {
			t.Errorf("%s: %v", tt.set, err)
			continue
		}
		if got, _ := lookupValue(values, tt.path); fmt.Sprint(got) != tt.want {
			t.Errorf("%s: %s is %v, want %s", tt.set, tt.path, got, tt.want)
		}
		if tt.silent != (len(said) == 0) || len(said) > 0 && !strings.Contains(said[0], tt.path+"="+tt.want) {
			t.Errorf("%s: said %q", tt.set, said)
		}
		if _, err := checkValues(c, values, "kube-system"); err != nil {
			t.Errorf("%s: %v", tt.set, err)
		}
	}
}

func TestValuesThatLeaveAFeatureOffAreDropped(t *testing.T) {
	c, known := testChart(t)
	values := parseSet(t, "hubble.enabled=false", "hubble.relay.enabled=false", "envoy.enabled=false", "l7Proxy=false", "encryption.enabled=false", "cni.chainingMode=none")
	if said, err := translateValues(values, known); err != nil || len(said) > 0 || len(values) > 0 {
		t.Errorf("left %v, said %q, %v", values, said, err)
	}
	if _, err := checkValues(c, values, "kube-system"); err != nil {
		t.Error(err)
	}
}

// Each says why it has no effect, and the rest of the values is used.
func TestValuesWithoutEffectAreDroppedWithTheReason(t *testing.T) {
	_, known := testChart(t)
	for path, key := range idleValues {
		if why := config.NoEffect(key); why == "" || known.has(path) {
			t.Errorf("%s: key %s has reason %q; a value of the chart: %v", path, key, why, known.has(path))
		}
		values := parseSet(t, path+"=true", "debug.enabled=true")
		said, err := translateValues(values, known)
		if err != nil || len(said) != 1 || said[0] != path+"=true has no effect: "+config.NoEffect(key) || len(values) != 1 {
			t.Errorf("%s: said %q, %v; left %v", path, said, err, values)
		}
	}
	for set, ok := range map[string]bool{"socketLB.enabled=false": true, "nodePort.enableHealthCheck=true": true, "nodePort.enableHealthCheck=false": false, "egressMasqueradeInterfaces=eth0": false, "loadBalancer.standalone=false": true, "nat46x64Gateway.enabled=true": false} {
		if _, err := translateValues(parseSet(t, set), known); (err == nil) != ok {
			t.Errorf("%s: %v", set, err)
		}
	}
}

// TestTheSeedsCommands are the commands users copy from what they read.
func TestTheSeedsCommands(t *testing.T) {
	_, known := testChart(t)
	direct := parseSet(t, "operator.replicas=1", "k8sServiceHost=192.168.2.43", "k8sServicePort=6443", "tunnel=disabled", "autoDirectNodeRoutes=true", "ipv4NativeRoutingCIDR=10.0.0.0/22",
		"debug.enabled=true", "debug.verbose=datapath", "ipam.mode=cluster-pool", "cluster.name=kubeproxy-replacement-ebpf-vxlan", "kubeProxyReplacement=strict", "bpf.masquerade=true")
	if _, err := translateValues(direct, known); err != nil {
		t.Error(err)
	}
	_, err := translateValues(parseSet(t, "monitorAggregation=none", "hubble.relay.enabled=true"), known)
	for _, want := range []string{"monitorAggregation=none: unknown value: did you mean bpf.monitorAggregation?", "hubble.relay.enabled=true: not supported by this version"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v lacks %q", err, want)
		}
	}
}

// TestMalformedValuesAreRefusedWithARemedy goes the way install goes: translation, schema, templates, configuration.
func TestMalformedValuesAreRefusedWithARemedy(t *testing.T) {
	for _, tt := range []struct {
		set  string
		want []string
	}{
		{"monitorAggregation=none", []string{"did you mean bpf.monitorAggregation?"}},
		{"masquerade=true", []string{"masquerade=true: unknown value", "did you mean bpf.masquerade?"}},
		{"routingmode=native", []string{"did you mean routingMode?"}},
		{"rotingMode=native", []string{"did you mean routingMode?"}},
		{"kubeProxyReplacment=true", []string{"did you mean kubeProxyReplacement?"}},
		{"hostLegacyRouting=true", []string{"did you mean bpf.hostLegacyRouting?"}},
		{"bpf.masqurade=true", []string{"did you mean bpf.masquerade?"}},
		{"operator.replica=1", []string{"did you mean operator.replicas?"}},
		{"clusterPoolIPv4PodCIDRList=10.0.0.0/8", []string{"did you mean ipam.operator.clusterPoolIPv4PodCIDRList?"}},
		{"ipv4NativeRoutingCidr=10.0.0.0/8", []string{"did you mean ipv4NativeRoutingCIDR?"}},
		{"zzz.qqq.vvv=1", []string{"zzz.qqq.vvv=1: unknown value", "--show-values"}},
		{"tunnel=gre", []string{"tunnel=gre: must be disabled, vxlan or geneve", "routingMode and tunnelProtocol"}},
		{"tunel=vxlan", []string{"did you mean tunnel?"}},
		{"routingMode=overlay", []string{"routingMode", "'tunnel', 'native', 'hybrid'"}},
		{"tunnelProtocol=gre", []string{"tunnelProtocol", "'vxlan', 'geneve'"}},
		{"tunnelPort=65536", []string{"tunnelPort", "65,535"}},
		{"tunnelPort=30000", []string{"tunnel-port", "node-port-range"}},
		{"underlayProtocol=ipv6", []string{"underlay-protocol", "set enable-ipv6 to true"}},
		{"underlayProtocol=v6", []string{"underlayProtocol", "'ipv6'"}},
		{"hubble.enabled=true", []string{"hubble.enabled=true: not supported by this version: leave it out"}},
		{"encryption.type=wireguard", []string{"encryption.type=wireguard: not supported"}},
		{"hostFirewall.enabled=true", []string{"hostFirewall.enabled=true: not supported"}},
		{"loadBalancer.dsrDispatch=geneve,loadBalancer.mode=dsr", []string{"bpf-lb-dsr-dispatch", "geneve needs tunnel-protocol geneve", "or opt"}},
		{"loadBalancer.l7.backend=envoy", []string{"loadBalancer.l7.backend=envoy: not supported"}},
		{"maglev.tableSize=1000", []string{"maglev", "tableSize"}},
		{"kubeProxyReplacement=perhaps", []string{"kubeProxyReplacement", "must be one of", "true"}},
		{"ipam.mode=eni", []string{"ipam.mode", "'cluster-pool', 'kubernetes'"}},
		{"ipam.operator.clusterPoolIPv4MaskSize=33", []string{"ipam.operator.clusterPoolIPv4MaskSize", "30"}},
		{"ipam.operator.clusterPoolIPv4MaskSize=big", []string{"ipam.operator.clusterPoolIPv4MaskSize", "want integer"}},
		{"ipam.operator.clusterPoolIPv4PodCIDRList={10.0.0.0}", []string{"ipam.operator.clusterPoolIPv4PodCIDRList.0"}},
		{"ipam.operator.clusterPoolIPv4PodCIDRList={10.0.0.1/8}", []string{"cluster-pool-ipv4-cidr", "write 10.0.0.0/8"}},
		{"ipam.operator.clusterPoolIPv4PodCIDRList={10.0.0.0/25}", []string{"cluster-pool-ipv4-cidr", "smaller than the /24", "cluster-pool-ipv4-mask-size"}},
		{"ipam.operator.clusterPoolIPv4PodCIDRList={10.0.0.0/8,10.1.0.0/16}", []string{"overlap: remove one of them"}},
		{"ipv4NativeRoutingCIDR=10.0.0.0", []string{"ipv4NativeRoutingCIDR", "pattern"}},
		{"ipv4NativeRoutingCIDR=10.0.0.0/99", []string{"ipv4-native-routing-cidr", "must be a CIDR"}},
		{"ipv4NativeRoutingCIDR=fd00::/8", []string{"must be an IPv4 CIDR"}},
		{"MTU=70000", []string{"MTU", "65,535"}},
		{"MTU=100", []string{"mtu", "from 626", "the tunnel takes 50"}},
		{"bpf.masquerade=yes", []string{"bpf.masquerade", "want boolean"}},
		{"bpf.hostLegacyRouting=1", []string{"bpf.hostLegacyRouting", "want boolean"}},
		{"bpf.monitorAggregation=all", []string{"bpf.monitorAggregation", "'none', 'low', 'medium', 'maximum'"}},
		{"socketLB.hostNamespaceOnly=yes", []string{"socketLB.hostNamespaceOnly", "want boolean"}},
		{"bpf.ctMax=10", []string{"bpf.ctMax", "1"}},
		{"bpf.lbMapMax=1", []string{"bpf.lbMapMax", "256"}},
		{"bpf.root=sys", []string{"bpf.root", "pattern"}},
		{"bpf.datapathMode=netkit", []string{"bpf.datapathMode", "'veth'"}},
		{"nodePort.range=30000", []string{"nodePort.range", "want string"}},
		{"nodePort.range=30000-", []string{"nodePort.range", "pattern"}},
		{`nodePort.range=32767-30000`, []string{"node-port-range", "FIRST <= LAST"}},
		{"healthPort=99999", []string{"healthPort", "65,535"}},
		{"healthPort=30100", []string{"agent-health-port", "node-port-range"}},
		{"cluster.name=Blue_1", []string{"cluster-name", "lower-case"}},
		{"cluster.id=256", []string{"cluster.id", "255"}},
		{"cluster.id=7", []string{"cluster-name", "name of its own"}},
		{"operator.replicas=0", []string{"operator.replicas", "1"}},
		{"operator.nodeGCInterval=30", []string{"operator.nodeGCInterval"}},
		{"image.pullPolicy=Sometimes", []string{"image.pullPolicy", "'Always'"}},
		{"k8sServicePort=99999", []string{"k8sServicePort"}},
		{"extraConfig.enable-hubble=true", []string{"enable-hubble", "not supported by this version"}},
		{"extraConfig.mtuu=1500", []string{"mtuu", "did you mean mtu?"}},
		{"devices={a-name-that-is-too-long}", []string{"devices", "at most 15 characters"}},
		{"ipv4.enabled=false", []string{"enable-ipv4", "set enable-ipv4 or enable-ipv6 to true"}},
		{"agentNotReadyTaintKey=a b", []string{"agent-not-ready-taint-key", "taint key"}},
		{"debug.verbose=all", []string{"debug-verbose", "datapath"}},
	} {
		c, known := testChart(t)
		values := parseSet(t, tt.set)
		_, err := translateValues(values, known)
		if err == nil {
			_, err = checkValues(c, values, "kube-system")
		}
		if err == nil {
			t.Errorf("%s: accepted", tt.set)
			continue
		}
		for _, want := range tt.want {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %q lacks %q", tt.set, err, want)
			}
		}
	}
}

func TestPlainHelmTakesTheOldSpellingOfTheTunnel(t *testing.T) {
	c, _ := testChart(t)
	for set, want := range map[string][]string{
		"":                {`routing-mode: "tunnel"`, `tunnel-protocol: "vxlan"`},
		"tunnel=disabled": {`routing-mode: "native"`, `tunnel-protocol: "vxlan"`},
		"tunnel=geneve":   {`routing-mode: "tunnel"`, `tunnel-protocol: "geneve"`},
	} {
		sets := []string{"kubeProxyReplacement=strict"}
		if set != "" {
			sets = append(sets, set)
		}
		if _, err := checkValues(c, parseSet(t, sets...), "kube-system"); err != nil {
			t.Errorf("%s: %v", set, err)
		}
		for _, line := range want {
			if got := renderAll(t, sets...)["configmap.yaml"]; !strings.Contains(got, line) {
				t.Errorf("%s: %q is not in\n%s", set, line, got)
			}
		}
	}
}

func TestConfigurationChangesRollTheAgents(t *testing.T) {
	a := renderAll(t)
	for _, set := range []string{"bpf.monitorAggregation=none", "routingMode=native", "tunnel=disabled"} {
		b := renderAll(t, set)
		for _, file := range []string{"agent.yaml", "operator.yaml"} {
			if sumOf(t, a[file]) == sumOf(t, b[file]) {
				t.Errorf("%s, %s: the checksum is the same for another configuration", set, file)
			}
		}
	}
}

// TestAgentNeedsNoNetworkToStart checks what lets a cluster without any CNI plugin come up.
func TestAgentNeedsNoNetworkToStart(t *testing.T) {
	for _, file := range []string{"agent.yaml", "operator.yaml"} {
		var o struct {
			Spec struct {
				Template struct {
					Spec struct {
						HostNetwork bool             `json:"hostNetwork"`
						Tolerations []map[string]any `json:"tolerations"`
						Containers  []struct {
							Env []struct{ Name, Value string } `json:"env"`
						} `json:"containers"`
					} `json:"spec"`
				} `json:"template"`
			} `json:"spec"`
		}
		if err := yaml.Unmarshal([]byte(renderAll(t, "k8sServiceHost=192.0.2.7", "k8sServicePort=6443")[file]), &o); err != nil {
			t.Fatal(err)
		}
		spec := o.Spec.Template.Spec
		if !spec.HostNetwork || len(spec.Tolerations) != 1 || fmt.Sprint(spec.Tolerations[0]) != "map[operator:Exists]" {
			t.Errorf("%s: hostNetwork %v, tolerations %v", file, spec.HostNetwork, spec.Tolerations)
		}
		env := map[string]string{}
		for _, e := range spec.Containers[0].Env {
			env[e.Name] = e.Value
		}
		if env["KUBERNETES_SERVICE_HOST"] != "192.0.2.7" || env["KUBERNETES_SERVICE_PORT"] != "6443" {
			t.Errorf("%s: environment %v", file, env)
		}
	}
}

// The file of ip-masq-agent is in a ConfigMap of its own, of which a change does not roll the agents. Without values for
// it, one that the user made is followed.
func TestIPMasqAgentHasAConfigMapOfItsOwn(t *testing.T) {
	off, on := renderAll(t), renderAll(t, "ipMasqAgent.enabled=true")
	if strings.Contains(off["agent.yaml"], "ip-masq-agent") || strings.TrimSpace(off["ip-masq-agent.yaml"]) != "" || strings.TrimSpace(on["ip-masq-agent.yaml"]) != "" {
		t.Errorf("switched off:\n%s\nwithout values:\n%s", off["ip-masq-agent.yaml"], on["ip-masq-agent.yaml"])
	}
	if !strings.Contains(on["agent.yaml"], "name: ip-masq-agent, optional: true") || !strings.Contains(on["configmap.yaml"], `enable-ip-masq-agent: "true"`) {
		t.Errorf("not mounted, or not switched on")
	}
	full := renderAll(t, "ipMasqAgent.enabled=true", "ipMasqAgent.config.nonMasqueradeCIDRs={10.0.0.0/8,fd00::/8}", "ipMasqAgent.config.masqLinkLocal=true")
	var cm struct{ Data map[string]string }
	if err := yaml.Unmarshal([]byte(full["ip-masq-agent.yaml"]), &cm); err != nil {
		t.Fatal(err)
	}
	got, err := config.ParseIPMasq("ip-masq-agent", []byte(cm.Data["config"]))
	if err != nil || sprint(got.NonMasquerade) != sprint([]string{"10.0.0.0/8", "fd00::/8", "fe80::/10"}) {
		t.Errorf("%v, %v of\n%s", got, err, full["ip-masq-agent.yaml"])
	}
	if full["agent.yaml"] != on["agent.yaml"] {
		t.Errorf("the list rolls the agents")
	}
}
