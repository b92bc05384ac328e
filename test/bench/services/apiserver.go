// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer/protobuf"
)

// apiServer answers lists of services and slices, in protobuf as the real one does, and watches of slices.
type apiServer struct {
	*httptest.Server
	lists  map[string][]byte // by resource
	slices []*discoveryv1.EndpointSlice

	mu       sync.Mutex
	revision int
	events   chan []byte
}

func serviceName(i int) string { return fmt.Sprintf("service-%d", i) }

func endpointAddr(i, j int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, byte(64 + i>>12), byte(i >> 4), byte(i<<4 | j)})
}

func serve(services, endpoints int) (*apiServer, error) {
	a := &apiServer{lists: map[string][]byte{}, revision: 1, events: make(chan []byte, 16)}
	list := &corev1.ServiceList{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "ServiceList"}, ListMeta: metav1.ListMeta{ResourceVersion: "1"}}
	sliceList := &discoveryv1.EndpointSliceList{TypeMeta: metav1.TypeMeta{APIVersion: "discovery.k8s.io/v1", Kind: "EndpointSliceList"}, ListMeta: metav1.ListMeta{ResourceVersion: "1"}}
	yes, tcp, port, name := true, corev1.ProtocolTCP, int32(8080), "http"
	for i := range services {
		svc := corev1.Service{
			ObjectMeta: metav1.ObjectMeta{Namespace: "bench", Name: serviceName(i), ResourceVersion: "1"},
			Spec: corev1.ServiceSpec{Type: corev1.ServiceTypeClusterIP, ClusterIPs: []string{netip.AddrFrom4([4]byte{10, 96, byte(i >> 8), byte(i)}).String()},
				Ports: []corev1.ServicePort{{Name: name, Protocol: tcp, Port: 80}}},
		}
		if i%10 == 0 && i/10 < 2768 {
			svc.Spec.Type, svc.Spec.Ports[0].NodePort = corev1.ServiceTypeNodePort, int32(30000+i/10)
		}
		list.Items = append(list.Items, svc)
		s := discoveryv1.EndpointSlice{
			TypeMeta: metav1.TypeMeta{APIVersion: "discovery.k8s.io/v1", Kind: "EndpointSlice"},
			ObjectMeta: metav1.ObjectMeta{Namespace: "bench", Name: serviceName(i) + "-x", ResourceVersion: "1",
				Labels: map[string]string{discoveryv1.LabelServiceName: serviceName(i)}},
			AddressType: discoveryv1.AddressTypeIPv4, Ports: []discoveryv1.EndpointPort{{Name: &name, Protocol: &tcp, Port: &port}},
		}
		for j := range endpoints {
			node := fmt.Sprintf("n%d", j%5+1)
			s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{Addresses: []string{endpointAddr(i, j).String()}, NodeName: &node,
				Conditions: discoveryv1.EndpointConditions{Ready: &yes, Serving: &yes}})
		}
		sliceList.Items = append(sliceList.Items, s)
		a.slices = append(a.slices, &sliceList.Items[len(sliceList.Items)-1])
	}
	pods := &corev1.PodList{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "PodList"}, ListMeta: metav1.ListMeta{ResourceVersion: "1"}}
	for resource, obj := range map[string]runtime.Object{"services": list, "endpointslices": sliceList, "pods": pods} {
		b, err := encode(obj)
		if err != nil {
			return nil, err
		}
		a.lists[resource] = b
	}
	for i := range sliceList.Items { // where append has put them in the end
		a.slices[i] = &sliceList.Items[i]
	}
	a.Server = httptest.NewServer(a)
	return a, nil
}

func encode(obj runtime.Object) ([]byte, error) {
	scheme := runtime.NewScheme()
	if err := corev1.AddToScheme(scheme); err != nil {
		return nil, err
	}
	if err := discoveryv1.AddToScheme(scheme); err != nil {
		return nil, err
	}
	var b strings.Builder
	if err := protobuf.NewSerializer(scheme, scheme).Encode(obj, &b); err != nil {
		return nil, err
	}
	return []byte(b.String()), nil
}

// ServeHTTP implements http.Handler.
func (a *apiServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	resource := r.URL.Path[strings.LastIndexByte(r.URL.Path, '/')+1:]
	body, ok := a.lists[resource]
	switch {
	case !ok:
		http.Error(w, "no such resource", http.StatusNotFound)
	case r.URL.Query().Get("watch") == "":
		w.Header().Set("Content-Type", "application/vnd.kubernetes.protobuf")
		w.Write(body)
	default:
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusOK)
		w.(http.Flusher).Flush()
		var events chan []byte
		if resource == "endpointslices" {
			events = a.events
		}
		for {
			select {
			case <-r.Context().Done():
				return
			case e := <-events:
				w.Write(e)
				w.(http.Flusher).Flush()
			}
		}
	}
}

// change gives the first endpoint of a service another address, and returns that and when the event was sent.
func (a *apiServer) change(which, n int) (netip.Addr, time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	addr := netip.AddrFrom4([4]byte{10, 200, byte(n >> 8), byte(n)})
	s := a.slices[which].DeepCopy()
	a.revision++
	s.ResourceVersion = strconv.Itoa(a.revision)
	s.Endpoints[0].Addresses = []string{addr.String()}
	a.slices[which] = s
	b, err := json.Marshal(map[string]any{"type": "MODIFIED", "object": s})
	if err != nil {
		panic(err)
	}
	at := time.Now()
	a.events <- append(b, '\n')
	return addr, at
}
