// SPDX-License-Identifier: Apache-2.0

package k8s

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cilium/statedb"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/rest"

	v2 "github.com/lash-net/lash/api/v2"
	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/state"
)

// apiServer is an API server of a few objects: lists answer with them, watches with what publish is given.
type apiServer struct {
	*httptest.Server
	down atomic.Bool

	mu      sync.Mutex
	lists   map[string]string // path to items
	watches map[string][]chan string
	rv      int
	stop    chan struct{}
	patches []string
	// selectors of labels, by "PATH watch=true" or "PATH watch="
	selectors map[string]string
}

func newAPIServer(t *testing.T) *apiServer {
	s := &apiServer{lists: map[string]string{}, watches: map[string][]chan string{}, selectors: map[string]string{}, rv: 1, stop: make(chan struct{})}
	s.Server = httptest.NewServer(http.HandlerFunc(s.serve))
	t.Cleanup(func() { close(s.stop); s.CloseClientConnections(); s.Close() })
	return s
}

func (s *apiServer) serve(w http.ResponseWriter, r *http.Request) {
	if s.down.Load() {
		panic(http.ErrAbortHandler)
	}
	w.Header().Set("Content-Type", "application/json")
	path := r.URL.Path
	s.mu.Lock()
	s.selectors[path+" watch="+r.URL.Query().Get("watch")] = r.URL.Query().Get("labelSelector")
	s.mu.Unlock()
	if r.URL.Query().Get("watch") != "" {
		ch := make(chan string, 100)
		s.mu.Lock()
		s.watches[path] = append(s.watches[path], ch)
		s.mu.Unlock()
		w.(http.Flusher).Flush()
		for {
			select {
			case <-r.Context().Done():
				return
			case <-s.stop:
				return
			case e := <-ch:
				fmt.Fprintln(w, e)
				w.(http.Flusher).Flush()
			}
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	kinds := map[string]string{"/api/v1/nodes": "v1 NodeList", "/api/v1/services": "v1 ServiceList", "/api/v1/pods": "v1 PodList",
		"/apis/discovery.k8s.io/v1/endpointslices": "discovery.k8s.io/v1 EndpointSliceList", "/apis/cilium.io/v2/ciliumnodes": "cilium.io/v2 CiliumNodeList",
		"/api/v1/namespaces": "v1 NamespaceList", "/apis/cilium.io/v2/ciliumidentities": "cilium.io/v2 CiliumIdentityList", "/apis/cilium.io/v2/ciliumendpoints": "cilium.io/v2 CiliumEndpointList"}
	if kind, ok := kinds[path]; ok {
		version, kind, _ := strings.Cut(kind, " ")
		fmt.Fprintf(w, `{"apiVersion":%q,"kind":%q,"metadata":{"resourceVersion":"%d"},"items":[%s]}`, version, kind, s.rv, s.lists[path])
		return
	}
	if r.Method != http.MethodGet {
		s.patches = append(s.patches, r.Method+" "+path)
	}
	if item, ok := s.lists[strings.TrimSuffix(path, "/status")]; ok {
		fmt.Fprint(w, item)
		return
	}
	w.WriteHeader(http.StatusNotFound)
	fmt.Fprint(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"NotFound","code":404}`)
}

func (s *apiServer) set(path string, items ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.rv++
	s.lists[path] = strings.Join(items, ",")
}

func (s *apiServer) publish(path, typ, object string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, ch := range s.watches[path] {
		ch <- fmt.Sprintf(`{"type":%q,"object":%s}`, typ, object)
	}
}

func (s *apiServer) watched(path string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.watches[path]) > 0
}

func start(t *testing.T, s *apiServer) *state.Tables {
	t.Helper()
	tables, err := state.New()
	if err != nil {
		t.Fatal(err)
	}
	c, err := NewClient(&rest.Config{Host: s.URL})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for _, r := range Reflectors(c, tables, "n1", "", slog.New(slog.DiscardHandler)) {
		wg.Go(func() { r.Run(ctx) })
	}
	t.Cleanup(func() { cancel(); wg.Wait(); tables.Stop() })
	return tables
}

// until polls a condition that depends on the network.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s did not happen", what)
		}
	}
}

func service(name, ip string) string {
	return fmt.Sprintf(`{"metadata":{"name":%q,"namespace":"d","resourceVersion":"9"},"spec":{"clusterIP":%q,"clusterIPs":[%q],"ports":[{"port":80}]}}`, name, ip, ip)
}

func names[Row any](t *state.Tables, tbl statedb.Table[Row], name func(Row) string) string {
	var s []string
	for r := range tbl.All(t.DB.ReadTxn()) {
		s = append(s, name(r))
	}
	return strings.Join(s, " ")
}

const servicesPath = "/api/v1/services"

func TestListThenWatchThenOutage(t *testing.T) {
	s := newAPIServer(t)
	s.set(servicesPath, service("a", "10.96.0.1"), service("b", "10.96.0.2"))
	tables := start(t, s)
	complete := func() bool { ok, _ := tables.Services.Initialized(tables.DB.ReadTxn()); return ok }
	list := func() string { return names(tables, tables.Services, state.Service.Key) }
	until(t, "the first list", func() bool { return complete() && list() == "d/a d/b" })
	until(t, "the watch", func() bool { return s.watched(servicesPath) })
	s.publish(servicesPath, "ADDED", strings.Replace(service("c", "10.96.0.3"), "{", `{"apiVersion":"v1","kind":"Service",`, 1))
	s.publish(servicesPath, "DELETED", strings.Replace(service("a", "10.96.0.1"), "{", `{"apiVersion":"v1","kind":"Service",`, 1))
	until(t, "the events", func() bool { return list() == "d/b d/c" })

	// While the API server is down nothing is lost; what happened meanwhile is made up for by one list.
	s.down.Store(true)
	s.CloseClientConnections()
	until(t, "the outage being noticed", func() bool {
		for c := range tables.Controllers.All(tables.DB.ReadTxn()) {
			if c.Name == "k8s-reflector core/v1::Service" && c.Errors > 0 {
				return true
			}
		}
		return false
	})
	if got := list(); got != "d/b d/c" {
		t.Errorf("rows during the outage: %s", got)
	}
	s.set(servicesPath, service("c", "10.96.0.3"), service("e", "10.96.0.5"))
	s.down.Store(false)
	until(t, "the relist", func() bool { return list() == "d/c d/e" })
	until(t, "health", func() bool {
		for c := range tables.Controllers.All(tables.DB.ReadTxn()) {
			if c.Name == "k8s-reflector core/v1::Service" {
				return c.Errors == 0 && c.LastError > 0
			}
		}
		return false
	})
}

// Services that another proxy serves, or none, are not ours: the API server is asked to leave them and their slices out.
func TestServicesOfOthersAreLeftOut(t *testing.T) {
	const slicesPath = "/apis/discovery.k8s.io/v1/endpointslices"
	s := newAPIServer(t)
	start(t, s)
	until(t, "the watches", func() bool { return s.watched(servicesPath) && s.watched(slicesPath) })
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, path := range []string{servicesPath, slicesPath} {
		for _, how := range []string{"", "true"} {
			text, asked := s.selectors[path+" watch="+how]
			sel, err := labels.Parse(text)
			if err != nil || !asked {
				t.Fatalf("%s watch=%s: asked %v, %q: %v", path, how, asked, text, err)
			}
			for label, want := range map[string]bool{"": true, "service.kubernetes.io/service-proxy-name": false, "service.kubernetes.io/headless": false} {
				set := labels.Set{"kubernetes.io/service-name": "a"}
				if label != "" {
					set[label] = ""
				}
				if sel.Matches(set) != want {
					t.Errorf("%s watch=%s: an object with label %q matches %q: %v", path, how, label, text, !want)
				}
			}
		}
	}
}

// One that is told its name serves what names it, and nothing else.
func TestServicesOfThisProxyOnly(t *testing.T) {
	const label = "service.kubernetes.io/service-proxy-name"
	for _, tc := range []struct {
		proxy string
		set   labels.Set
		want  bool
	}{
		{"", labels.Set{}, true}, {"", labels.Set{label: "lash"}, false}, {"", labels.Set{label: ""}, false},
		{"lash", labels.Set{}, false}, {"lash", labels.Set{label: "lash"}, true}, {"lash", labels.Set{label: "other"}, false},
		{"lash", labels.Set{label: "lash", "service.kubernetes.io/headless": ""}, false},
	} {
		sel, err := labels.Parse(ofServices(tc.proxy))
		if err != nil || sel.Matches(tc.set) != tc.want {
			t.Errorf("proxy %q, %v: served %v, %v", tc.proxy, tc.set, !tc.want, err)
		}
	}
}

// An unreachable API server leaves tables incomplete, which keeps loops from deleting.
func TestNothingIsCompleteBeforeTheFirstList(t *testing.T) {
	s := newAPIServer(t)
	s.down.Store(true)
	tables := start(t, s)
	until(t, "an error", func() bool { return tables.Controllers.NumObjects(tables.DB.ReadTxn()) == 8 })
	if p := tables.Pending(); len(p) != 7 {
		t.Errorf("pending: %v", p)
	}
}

func TestMalformedObjectsAreNamedAndDisturbNoOther(t *testing.T) {
	s := newAPIServer(t)
	s.set(servicesPath, service("bad", "10.96.0.x"), service("good", "10.96.0.2"))
	tables := start(t, s)
	until(t, "the list", func() bool { return names(tables, tables.Services, state.Service.Key) == "d/bad d/good" })
	bad := func() string {
		return names(tables, tables.BadObjects, func(b state.BadObject) string { return b.Key() + " " + b.Field + " " + b.Problem })
	}
	if got, want := bad(), `Service d/bad spec.clusterIPs[0] "10.96.0.x" is no IP address`; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	until(t, "the watch", func() bool { return s.watched(servicesPath) })
	s.publish(servicesPath, "MODIFIED", strings.Replace(service("bad", "10.96.0.9"), "{", `{"apiVersion":"v1","kind":"Service",`, 1))
	until(t, "the mended object", func() bool { return bad() == "" })
}

func ptr[T any](v T) *T { return &v }

func TestConversionsNameTheField(t *testing.T) {
	for _, tc := range []struct {
		name string
		do   func() problems
		want string
	}{
		{"node address", func() problems {
			_, p := convertNode(&corev1.Node{Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{{Type: "Hostname", Address: "x"}, {Type: "InternalIP", Address: "1.2.3"}}}})
			return p
		}, `status.addresses[1].address: "1.2.3" is no IP address`},
		{"node CIDR", func() problems {
			_, p := convertNode(&corev1.Node{Spec: corev1.NodeSpec{PodCIDRs: []string{"10.0.0.0/24", "10.0.0.0/33"}}})
			return p
		}, `spec.podCIDRs[1]: "10.0.0.0/33" is no CIDR, like 10.0.1.0/24`},
		{"CIDR with host bits", func() problems {
			_, p := convertNode(&corev1.Node{Spec: corev1.NodeSpec{PodCIDR: "10.0.0.7/24"}})
			return p
		}, "spec.podCIDR: 10.0.0.7/24 has bits set after its prefix; 10.0.0.0/24 is used"},
		{"CiliumNode address", func() problems {
			_, p := convertCiliumNode(&v2.CiliumNode{Spec: v2.NodeSpec{Addresses: []v2.NodeAddress{{Type: "CiliumInternalIP", IP: "fe80::1%eth0"}}}})
			return p
		}, `spec.addresses[0].ip: "fe80::1%eth0" is no IP address`},
		{"CiliumNode CIDR", func() problems {
			_, p := convertCiliumNode(&v2.CiliumNode{Spec: v2.NodeSpec{IPAM: v2.NodeIPAM{PodCIDRs: []string{"x"}}}})
			return p
		}, `spec.ipam.podCIDRs[0]: "x" is no CIDR, like 10.0.1.0/24`},
		{"service port", func() problems {
			_, p := convertService(&corev1.Service{Spec: corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: 70000}}}})
			return p
		}, "spec.ports[0].port: 70000 is no port from 1 to 65535"},
		{"service protocol", func() problems {
			_, p := convertService(&corev1.Service{Spec: corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: 7, Protocol: "tcp"}}}})
			return p
		}, `spec.ports[0].protocol: "tcp" is none of TCP, UDP, SCTP`},
		{"slice address", func() problems {
			_, p := convertSlice(&discoveryv1.EndpointSlice{AddressType: "IPv4", Endpoints: []discoveryv1.Endpoint{{Addresses: []string{"10.0.0.256"}}}})
			return p
		}, `endpoints[0].addresses[0]: "10.0.0.256" is no IP address`},
		{"slice family", func() problems {
			_, p := convertSlice(&discoveryv1.EndpointSlice{AddressType: "IPv4", Endpoints: []discoveryv1.Endpoint{{Addresses: []string{"fd00::1"}}}})
			return p
		}, "endpoints[0].addresses[0]: fd00::1 is not of addressType IPv4"},
		{"slice without address", func() problems {
			_, p := convertSlice(&discoveryv1.EndpointSlice{AddressType: "IPv6", Endpoints: []discoveryv1.Endpoint{{}}})
			return p
		}, "endpoints[0].addresses: is empty"},
		{"slice port", func() problems {
			_, p := convertSlice(&discoveryv1.EndpointSlice{AddressType: "IPv4", Ports: []discoveryv1.EndpointPort{{Port: ptr(int32(-1))}}})
			return p
		}, "ports[0].port: -1 is no port from 1 to 65535"},
		{"slice without port", func() problems {
			_, p := convertSlice(&discoveryv1.EndpointSlice{AddressType: "IPv4", Ports: []discoveryv1.EndpointPort{{}}})
			return p
		}, "ports[0].port: is missing"},
		{"slice of names", func() problems {
			_, p := convertSlice(&discoveryv1.EndpointSlice{AddressType: "FQDN", Endpoints: []discoveryv1.Endpoint{{Addresses: []string{"a.example"}}}})
			return p
		}, `addressType: "FQDN" is none of IPv4, IPv6: nothing that a packet could be sent to`},
		{"slice of a group", func() problems {
			row, p := convertSlice(&discoveryv1.EndpointSlice{AddressType: "IPv4", Endpoints: []discoveryv1.Endpoint{{Addresses: []string{"239.1.1.1"}}, {Addresses: []string{"10.0.0.1"}}}})
			if len(row.Endpoints) != 1 {
				p.add("endpoints", "are %v", row.Endpoints)
			}
			return p
		}, "endpoints[0].addresses[0]: 239.1.1.1 is no address of a pod or a machine"},
		{"slice of broadcasts", func() problems {
			_, p := convertSlice(&discoveryv1.EndpointSlice{AddressType: "IPv4", Endpoints: []discoveryv1.Endpoint{{Addresses: []string{"255.255.255.255"}}}})
			return p
		}, "endpoints[0].addresses[0]: 255.255.255.255 is no address of a pod or a machine"},
		{"pod address", func() problems {
			_, p := convertPod(&corev1.Pod{Status: corev1.PodStatus{PodIPs: []corev1.PodIP{{IP: "?"}}}})
			return p
		}, `status.podIPs[0].ip: "?" is no IP address`},
		{"pod sockmap", func() problems {
			row, p := convertPod(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Annotations: map[string]string{"lash.io/sockmap": "yes"}}})
			if row.Sockmap {
				p.add("sockmap", "is on")
			}
			return p
		}, `metadata.annotations[lash.io/sockmap]: "yes" is neither true nor false`},
		{"pod sockmap of the node", func() problems {
			row, p := convertPod(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Annotations: map[string]string{"lash.io/sockmap": "true"}}, Spec: corev1.PodSpec{HostNetwork: true}})
			if row.Sockmap {
				p.add("sockmap", "is on")
			}
			return p
		}, `metadata.annotations[lash.io/sockmap]: has no effect on a pod in the node's network namespace`},
		{"identity number", func() problems {
			_, p := convertIdentity(&v2.CiliumIdentity{ObjectMeta: metav1.ObjectMeta{Name: "0300"}})
			return p
		}, `metadata.name: "0300" is no number`},
		{"identity out of range", func() problems {
			_, p := convertIdentity(&v2.CiliumIdentity{ObjectMeta: metav1.ObjectMeta{Name: "70000"}})
			return p
		}, `metadata.name: 70000 is not from 256 to 65535, the numbers of this cluster`},
		{"endpoint address", func() problems {
			_, p := convertEndpoint(&v2.CiliumEndpoint{Status: v2.EndpointStatus{Networking: &v2.EndpointNetworking{Node: "1.2.3.4", Addressing: []v2.AddressPair{{IPv4: "x"}}}}})
			return p
		}, `status.networking.addressing[0].ipv4: "x" is no IP address`},
		{"endpoint family", func() problems {
			_, p := convertEndpoint(&v2.CiliumEndpoint{Status: v2.EndpointStatus{Networking: &v2.EndpointNetworking{Addressing: []v2.AddressPair{{IPv6: "10.0.0.1"}}}}})
			return p
		}, `status.networking.addressing[0].ipv6: 10.0.0.1 is of the other family`},
		{"endpoint node", func() problems {
			_, p := convertEndpoint(&v2.CiliumEndpoint{Status: v2.EndpointStatus{Networking: &v2.EndpointNetworking{Node: "n1"}}})
			return p
		}, `status.networking.node: "n1" is no IP address`},
	} {
		p := tc.do()
		if len(p) != 2 || p[0]+": "+p[1] != tc.want {
			t.Errorf("%s: got %q, want %q", tc.name, p, tc.want)
		}
	}
}

func TestSliceConditionsDefaultToReady(t *testing.T) {
	row, p := convertSlice(&discoveryv1.EndpointSlice{AddressType: "IPv4",
		Ports: []discoveryv1.EndpointPort{{Port: ptr(int32(80))}},
		Endpoints: []discoveryv1.Endpoint{
			{Addresses: []string{"10.0.0.1"}},
			{Addresses: []string{"10.0.0.2"}, Conditions: discoveryv1.EndpointConditions{Ready: ptr(false), Serving: ptr(true), Terminating: ptr(true)}},
			{Addresses: []string{"10.0.0.3"}, Conditions: discoveryv1.EndpointConditions{Ready: ptr(false)}},
		}})
	var got []string
	for _, e := range row.Endpoints {
		got = append(got, fmt.Sprint(e.Ready, e.Serving, e.Terminating))
	}
	if want := "true true false|false true true|false false false"; strings.Join(got, "|") != want || len(p) != 0 {
		t.Errorf("got %v, %v, want %s", got, p, want)
	}
	if row.Ports[0] != (state.SlicePort{L4: model.L4{Proto: model.ProtoTCP, Port: 80}}) {
		t.Errorf("port is %+v", row.Ports[0])
	}
}

func TestMarkNodeReadyAndPublish(t *testing.T) {
	s := newAPIServer(t)
	s.set("/api/v1/nodes/n1", `{"apiVersion":"v1","kind":"Node","metadata":{"name":"n1","resourceVersion":"5"},"spec":{"taints":[{"key":"a","effect":"NoSchedule"},{"key":"x"}]}}`)
	c, err := NewClient(&rest.Config{Host: s.URL})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.MarkNodeReady(t.Context(), "n1", NodeState{RemoveTaint: "a", Reason: "LashIsUp"}); err != nil {
		t.Fatal(err)
	}
	s.set("/apis/cilium.io/v2/ciliumnodes/n1", `{"apiVersion":"cilium.io/v2","kind":"CiliumNode","metadata":{"name":"n1","resourceVersion":"5"}}`)
	if err := c.PublishNode(t.Context(), PublishedNode{Name: "n1", Health: v2.HealthAddressing{IPv4: "10.0.0.9"}}); err != nil {
		t.Fatal(err)
	}
	for _, tunnel := range []string{"vxlan:8472", ""} {
		if err := c.AnnounceTunnel(t.Context(), "n1", tunnel); err != nil {
			t.Fatal(err)
		}
	}
	if got, want := strings.Join(s.patches, ", "), "PATCH /api/v1/nodes/n1, PATCH /api/v1/nodes/n1/status, PUT /apis/cilium.io/v2/ciliumnodes/n1, "+
		"PATCH /apis/cilium.io/v2/ciliumnodes/n1, PATCH /apis/cilium.io/v2/ciliumnodes/n1"; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if err := c.DeletePod(t.Context(), "d", "gone", "u"); err != nil {
		t.Errorf("deleting a pod that is gone: %v", err)
	}
}
