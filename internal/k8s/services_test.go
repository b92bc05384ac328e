// SPDX-License-Identifier: Apache-2.0

package k8s

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/state"
)

func TestConvertServiceReadsEveryKind(t *testing.T) {
	local, vip, proxy := corev1.ServiceInternalTrafficPolicyLocal, corev1.LoadBalancerIPModeVIP, corev1.LoadBalancerIPModeProxy
	svc := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: "b", UID: "u", Annotations: map[string]string{
			"service.cilium.io/forwarding-mode": "snat", "service.lash.io/forwarding-mode": "dsr", "service.cilium.io/lb-algorithm": "maglev",
			corev1.AnnotationLoadBalancerSourceRangesKey: "10.1.0.0/16, 10.2.0.0/16",
		}},
		Spec: corev1.ServiceSpec{
			Type: corev1.ServiceTypeLoadBalancer, ClusterIPs: []string{"10.96.0.1", "fd96::1"}, ExternalIPs: []string{"192.0.2.7"},
			InternalTrafficPolicy: &local, ExternalTrafficPolicy: corev1.ServiceExternalTrafficPolicyLocal, HealthCheckNodePort: 32000,
			Ports: []corev1.ServicePort{{Name: "a", Port: 80, NodePort: 30080}, {Name: "a", Protocol: corev1.ProtocolUDP, Port: 80}, {Name: "s", Protocol: corev1.ProtocolSCTP, Port: 81}},
		},
		Status: corev1.ServiceStatus{LoadBalancer: corev1.LoadBalancerStatus{Ingress: []corev1.LoadBalancerIngress{
			{IP: "192.0.2.8", IPMode: &vip}, {IP: "192.0.2.9", IPMode: &proxy}, {Hostname: "lb.example"}, {IP: "2001:db8::8"},
		}}},
	}
	got, p := convertService(svc)
	if len(p) != 0 {
		t.Errorf("problems: %v", p)
	}
	addrs := func(list ...string) (out []netip.Addr) {
		for _, s := range list {
			out = append(out, netip.MustParseAddr(s))
		}
		return out
	}
	want := state.Service{
		Namespace: "a", Name: "b", UID: "u", Created: got.Created, Type: "LoadBalancer", ClusterIPs: addrs("10.96.0.1", "fd96::1"), ExternalIPs: addrs("192.0.2.7"),
		LoadBalancerIPs: addrs("192.0.2.8", "2001:db8::8"), InternalLocal: true, ExternalLocal: true, HealthCheckNodePort: 32000, Mode: "dsr", Algorithm: "maglev",
		SourceRanges: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16"), netip.MustParsePrefix("10.2.0.0/16")},
		Ports: []state.ServicePortSpec{{Name: "a", L4: model.L4{Proto: 6, Port: 80}, NodePort: 30080}, {Name: "a", L4: model.L4{Proto: 17, Port: 80}},
			{Name: "s", L4: model.L4{Proto: 132, Port: 81}}},
	}
	if !got.Equal(want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	// What belongs to other types is not read of a ClusterIP, and what the spec says wins over the old annotation.
	svc.Spec.LoadBalancerSourceRanges = []string{"10.3.0.0/16"}
	if got, _ := convertService(svc); len(got.SourceRanges) != 1 || got.SourceRanges[0].String() != "10.3.0.0/16" {
		t.Errorf("ranges are %v", got.SourceRanges)
	}
	svc.Spec.Type = corev1.ServiceTypeClusterIP
	if got, _ := convertService(svc); got.LoadBalancerIPs != nil || got.SourceRanges != nil || got.HealthCheckNodePort != 0 || got.Ports[0].NodePort != 0 {
		t.Errorf("a ClusterIP has %+v", got)
	}
	svc.Spec.ClusterIPs = []string{"None"}
	if got, p := convertService(svc); got.ClusterIPs != nil || len(p) != 0 {
		t.Errorf("headless: %v, %v", got.ClusterIPs, p)
	}
}

// What cannot be read is named by its field and leaves the rest as it is.
func TestMalformedServicesNameTheField(t *testing.T) {
	days := int32(1000000)
	for field, tweak := range map[string]func(*corev1.Service){
		"spec.clusterIPs[1]": func(s *corev1.Service) { s.Spec.ClusterIPs = append(s.Spec.ClusterIPs, "10.96.0.300") },
		"spec.externalIPs[0]": func(s *corev1.Service) {
			s.Spec.ExternalIPs = []string{"0.0.0.0", "192.0.2.1"}
		},
		"status.loadBalancer.ingress[0].ip": func(s *corev1.Service) {
			s.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: "x"}}
		},
		"spec.healthCheckNodePort": func(s *corev1.Service) {
			s.Spec.ExternalTrafficPolicy, s.Spec.HealthCheckNodePort = corev1.ServiceExternalTrafficPolicyLocal, 70000
		},
		"spec.loadBalancerSourceRanges[0]": func(s *corev1.Service) { s.Spec.LoadBalancerSourceRanges = []string{"10.0.0.1"} },
		"spec.ports[1].port":               func(s *corev1.Service) { s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Name: "x", Port: 80}) },
		"spec.ports[1].name": func(s *corev1.Service) {
			s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Name: "http", Port: 81})
		},
		"spec.ports[1].nodePort": func(s *corev1.Service) {
			s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Name: "x", Port: 81, NodePort: -1})
		},
		"metadata.annotations[service.lash.io/lb-algorithm]": func(s *corev1.Service) {
			s.Annotations = map[string]string{"service.lash.io/lb-algorithm": "fair"}
		},
		"spec.sessionAffinityConfig.clientIP.timeoutSeconds": func(s *corev1.Service) {
			s.Spec.SessionAffinity = corev1.ServiceAffinityClientIP
			s.Spec.SessionAffinityConfig = &corev1.SessionAffinityConfig{ClientIP: &corev1.ClientIPConfig{TimeoutSeconds: &days}}
		},
	} {
		svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: "b"}, Spec: corev1.ServiceSpec{
			Type: corev1.ServiceTypeLoadBalancer, ClusterIPs: []string{"10.96.0.1"}, Ports: []corev1.ServicePort{{Name: "http", Port: 80}},
		}}
		tweak(svc)
		got, p := convertService(svc)
		if len(p) != 2 || p[0] != field {
			t.Errorf("%s: problems are %q", field, p)
		}
		if len(got.ClusterIPs) != 1 || len(got.Ports) == 0 || got.Ports[0].Port != 80 {
			t.Errorf("%s: the rest is lost: %+v", field, got)
		}
		if strings.Contains(field, "SourceRanges") != got.RangesBroken {
			t.Errorf("%s: ranges broken: %v", field, got.RangesBroken)
		}
	}
}

func TestConvertPodReadsHostPorts(t *testing.T) {
	always := corev1.ContainerRestartPolicyAlways
	pod := &corev1.Pod{Spec: corev1.PodSpec{
		InitContainers: []corev1.Container{{Ports: []corev1.ContainerPort{{ContainerPort: 1, HostPort: 1}}}, {RestartPolicy: &always, Ports: []corev1.ContainerPort{{ContainerPort: 2, HostPort: 2}}}},
		Containers: []corev1.Container{{Ports: []corev1.ContainerPort{
			{Name: "web", ContainerPort: 80}, {ContainerPort: 81}, {ContainerPort: 82, HostPort: 8082, HostIP: "127.0.0.1"}, {ContainerPort: 83, HostPort: 99999}, {ContainerPort: 84, HostPort: 84, HostIP: "x"},
		}}},
	}}
	row, p := convertPod(pod)
	var got []string
	for _, port := range row.Ports {
		got = append(got, fmt.Sprintf("%s %d %d %v", port.Name, port.Port, port.HostPort, port.HostIP.IsValid()))
	}
	if want := []string{" 2 2 false", "web 80 0 false", " 82 8082 true"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	if len(p) != 4 || p[0] != "spec.containers[0].ports[3].hostPort" || p[2] != "spec.containers[0].ports[4].hostIP" {
		t.Errorf("problems are %q", p)
	}
	pod.Spec.HostNetwork = true // Kubernetes sets hostPort of such pods itself
	if row, _ := convertPod(pod); len(row.Ports) != 1 {
		t.Errorf("ports in the host's network: %+v", row.Ports)
	}
}

// Annotations of the field are followed, in whatever case their values are; what nobody follows is said.
func TestAnnotationsOfServices(t *testing.T) {
	const field, own = "service.cilium.io/", "service.lash.io/"
	for _, tt := range []struct {
		annotations map[string]string
		want        state.Service // what differs from a service without
		problem     string
	}{
		{annotations: map[string]string{field + "type": "LoadBalancer"}, want: state.Service{Only: "LoadBalancer"}},
		{annotations: map[string]string{field + "type": "nodeport", own + "type": "ClusterIP"}, want: state.Service{Only: "ClusterIP"}},
		{annotations: map[string]string{field + "type": "ExternalIPs"}, problem: `metadata.annotations[service.cilium.io/type]: "ExternalIPs" is none of ClusterIP, NodePort, LoadBalancer; all that the service has is served`},
		{annotations: map[string]string{field + "src-ranges-policy": "Deny"}, want: state.Service{RangesDeny: true}},
		{annotations: map[string]string{field + "src-ranges-policy": "allow"}},
		{annotations: map[string]string{field + "src-ranges-policy": "block"}, problem: `metadata.annotations[service.cilium.io/src-ranges-policy]: "block" is none of allow, deny; the source ranges are those that are let in`},
		{annotations: map[string]string{field + "forwarding-mode": "DSR", field + "lb-algorithm": "Maglev"}, want: state.Service{Mode: "dsr", Algorithm: "maglev"}},
		{annotations: map[string]string{field + "node": "edge"}, want: state.Service{Nodes: "service.cilium.io/node=edge"}},
		{annotations: map[string]string{field + "node": "edge", field + "node-selector": "pool in (edge, core), !old"}, want: state.Service{Nodes: "!old,pool in (core,edge)"}},
		{annotations: map[string]string{field + "node-selector": ""}},
		{annotations: map[string]string{field + "node-selector": "pool in edge"}, problem: `metadata.annotations[service.cilium.io/node-selector]: "pool in edge" selects no nodes by their labels, like pool=edge or pool in (edge,core); every node serves the service`},
		{annotations: map[string]string{field + "node": "a b"}, problem: `metadata.annotations[service.cilium.io/node]: "a b" selects no nodes by their labels, like pool=edge or pool in (edge,core); every node serves the service`},
		{annotations: map[string]string{field + "proxy-delegation": "none", field + "global": "false", field + "affinity": "local"}},
		{annotations: map[string]string{field + "proxy-delegation": "delegate-if-local"}, problem: `metadata.annotations[service.cilium.io/proxy-delegation]: "delegate-if-local" is not supported by this version: no packet is left to a proxy of the node, backends get all of them`},
		{annotations: map[string]string{field + "global": "true"}, problem: `metadata.annotations[service.cilium.io/global]: "true" is not supported by this version: clusters are not connected, endpoints of this one serve`},
		{annotations: map[string]string{own + "lb-algoritm": "maglev"}, problem: "metadata.annotations[service.lash.io/lb-algoritm]: is not known; those that are followed are forwarding-mode, lb-algorithm, type, src-ranges-policy, node, node-selector"},
		{annotations: map[string]string{"lbipam.cilium.io/ips": "192.0.2.1", "example.org/type": "x"}},
	} {
		svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Annotations: tt.annotations}, Spec: corev1.ServiceSpec{Type: corev1.ServiceTypeLoadBalancer}}
		got, p := convertService(svc)
		tt.want.Type, tt.want.Created = "LoadBalancer", got.Created
		if !got.Equal(tt.want) {
			t.Errorf("%v: got %+v", tt.annotations, got)
		}
		if said := strings.Join(p, ": "); said != tt.problem {
			t.Errorf("%v: said %q, want %q", tt.annotations, said, tt.problem)
		}
	}
	svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Annotations: map[string]string{field + "type": "NodePort"}}}
	if _, p := convertService(svc); len(p) != 2 || p[1] != "NodePort alone is to be served, and the service is of type ClusterIP: it has none" {
		t.Errorf("a ClusterIP of which the NodePort is to be served: %q", p)
	}
	for selector, want := range map[string]bool{"": true, "pool=edge": true, "pool in (core)": false, "!old": true, "service.cilium.io/node=": false} {
		if got := Selects(selector, map[string]string{"pool": "edge"}); got != want {
			t.Errorf("selector %q: %v", selector, got)
		}
	}
}

func TestLabelsAreKeptOfTheOwnNode(t *testing.T) {
	for name, want := range map[string]bool{"n1": true, "n2": false} {
		row, _ := nodeConverter("n1")(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"pool": "edge"}}})
		if got := row.Labels["pool"] == "edge"; got != want || row.Name != name {
			t.Errorf("%s: %+v", name, row)
		}
	}
}

func TestNodesThatLeave(t *testing.T) {
	now := metav1.Now()
	for want, nodes := range map[bool][]*corev1.Node{
		true:  {{ObjectMeta: metav1.ObjectMeta{DeletionTimestamp: &now}}, {Spec: corev1.NodeSpec{Taints: []corev1.Taint{{Key: "ToBeDeletedByClusterAutoscaler", Effect: "NoSchedule"}}}}},
		false: {{}, {Spec: corev1.NodeSpec{Unschedulable: true, Taints: []corev1.Taint{{Key: "node.kubernetes.io/unschedulable"}}}}},
	} {
		for _, n := range nodes {
			if row, _ := convertNode(n); row.Leaving != want {
				t.Errorf("%+v: leaving %v", n, row.Leaving)
			}
		}
	}
}
