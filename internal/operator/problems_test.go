// SPDX-License-Identifier: Apache-2.0

package operator

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/rest"

	"github.com/lash-net/lash/internal/config"
)

const badServices = `{"apiVersion": "v1", "kind": "ServiceList", "metadata": {"resourceVersion": "1"}, "items": [
 {"metadata": {"namespace": "a", "name": "old", "uid": "u1", "creationTimestamp": "2026-01-01T00:00:00Z"}, "spec": {"clusterIPs": ["10.96.0.1"], "externalIPs": ["192.0.2.1"], "ports": [{"port": 80, "protocol": "TCP"}]}},
 {"metadata": {"namespace": "a", "name": "young", "uid": "u2", "creationTimestamp": "2026-02-01T00:00:00Z"}, "spec": {"clusterIPs": ["10.96.0.2"], "externalIPs": ["192.0.2.1"], "ports": [{"port": 80, "protocol": "TCP"}]}},
 {"metadata": {"namespace": "b", "name": "fast", "uid": "u3", "annotations": {"service.cilium.io/forwarding-mode": "fast"}}, "spec": {"clusterIPs": ["10.96.0.3"], "externalIPs": ["2001:db8::1"], "ports": [{"name": "http", "port": 80, "protocol": "TCP"}]}}]}`

const badSlices = `{"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSliceList", "metadata": {"resourceVersion": "1"}, "items": [
 {"metadata": {"namespace": "b", "name": "fast-1", "uid": "u4", "labels": {"kubernetes.io/service-name": "fast"}}, "addressType": "IPv4", "endpoints": [{"addresses": ["10.0.0.300"]}]},
 {"metadata": {"namespace": "b", "name": "by-hand", "uid": "u5", "labels": {"kubernetes.io/service-name": "fast"}}, "addressType": "IPv4", "ports": [{"name": "htpp", "port": 80, "protocol": "TCP"}], "endpoints": [{"addresses": ["10.0.0.3"]}]},
 {"metadata": {"namespace": "b", "name": "derived", "uid": "u6", "labels": {"kubernetes.io/service-name": "fast", "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io"}}, "addressType": "IPv4", "ports": [{"name": "of-before", "port": 80, "protocol": "TCP"}], "endpoints": []},
 {"metadata": {"namespace": "b", "name": "nobodys", "uid": "u7"}, "addressType": "IPv4", "endpoints": []}]}`

// eventServer is as much of an API server as the reporter needs.
type eventServer struct {
	mu     sync.Mutex
	events map[string]*corev1.Event
	posts  int
}

func (s *eventServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	switch resource := path.Base(r.URL.Path); {
	case r.URL.Query().Get("watch") != "":
		w.(http.Flusher).Flush()
		s.mu.Unlock()
		<-r.Context().Done()
		s.mu.Lock()
	case resource == "services":
		fmt.Fprint(w, badServices)
	case resource == "endpointslices":
		fmt.Fprint(w, badSlices)
	case r.Method == http.MethodPost:
		s.posts++
		scheme := runtime.NewScheme()
		corev1.AddToScheme(scheme)
		var b strings.Builder
		if _, err := fmt.Fprint(&b, readAll(r)); err != nil {
			http.Error(w, err.Error(), 500)
			return
		}
		obj, _, err := serializer.NewCodecFactory(scheme).UniversalDeserializer().Decode([]byte(b.String()), nil, nil)
		if err != nil {
			http.Error(w, err.Error(), 400)
			return
		}
		e := obj.(*corev1.Event)
		if s.events[e.Name] != nil {
			w.WriteHeader(http.StatusConflict)
			fmt.Fprint(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"AlreadyExists","code":409}`)
			return
		}
		s.events[e.Name] = e
		json.NewEncoder(w).Encode(e)
	case r.Method == http.MethodPatch:
		var patch struct{ Count int32 }
		json.Unmarshal([]byte(readAll(r)), &patch)
		s.events[resource].Count = patch.Count
		json.NewEncoder(w).Encode(s.events[resource])
	default:
		e := s.events[resource].DeepCopy()
		e.APIVersion, e.Kind = "v1", "Event"
		json.NewEncoder(w).Encode(e)
	}
}

func readAll(r *http.Request) string {
	var b strings.Builder
	buf := make([]byte, 4096)
	for {
		n, err := r.Body.Read(buf)
		b.Write(buf[:n])
		if err != nil {
			return b.String()
		}
	}
}

func (s *eventServer) lines() (out []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range s.events {
		o := e.InvolvedObject
		out = append(out, fmt.Sprintf("%dx %s %s/%s %s %s: %s", e.Count, o.Kind, o.Namespace, o.Name, o.UID, e.Type, e.Message))
	}
	slices.Sort(out)
	return out
}

// Each problem is one Event on its object, also when another leader finds it again.
func TestProblemsOfServicesAreEventsOnThem(t *testing.T) {
	api := &eventServer{events: map[string]*corev1.Event{}}
	srv := httptest.NewServer(api)
	defer srv.Close()
	for round := 1; round <= 2; round++ {
		ctx, cancel := context.WithCancel(t.Context())
		stopped := make(chan error)
		go func() {
			stopped <- reportProblems(ctx, config.Default(), slog.New(slog.DiscardHandler), &rest.Config{Host: srv.URL})
		}()
		want := []string{
			fmt.Sprintf("%dx EndpointSlice b/by-hand u5 Warning: ports[0]: service b/fast has no port \"htpp\"/TCP, but \"http\"/TCP: name and protocol must be those of a port of the service", round),
			fmt.Sprintf("%dx EndpointSlice b/fast-1 u4 Warning: endpoints[0].addresses[0]: \"10.0.0.300\" is no IP address", round),
			fmt.Sprintf("%dx EndpointSlice b/nobodys u7 Warning: metadata.labels[kubernetes.io/service-name]: is missing: the slice belongs to no service", round),
			fmt.Sprintf("%dx Service a/young u2 Warning: ExternalIPs 192.0.2.1:80/TCP is that of service a/old: give one of them another address or port", round),
			fmt.Sprintf("%dx Service b/fast u3 Warning: metadata.annotations[service.cilium.io/forwarding-mode]: \"fast\" is none of snat, dsr; the node's setting is used", round),
			fmt.Sprintf("%dx Service b/fast u3 Warning: spec.externalIPs: 2001:db8::1 is not served, the service has no cluster IP of that family: set spec.ipFamilyPolicy: RequireDualStack", round),
		}
		var got []string
		for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
			if got = api.lines(); slices.Equal(got, want) {
				break
			}
		}
		if !slices.Equal(got, want) {
			t.Fatalf("round %d: got\n%s\nwant\n%s", round, strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
		time.Sleep(1200 * time.Millisecond) // another pass tells nothing anew
		if again := api.lines(); !slices.Equal(again, want) {
			t.Errorf("round %d: told again at once: %s", round, strings.Join(again, "\n"))
		}
		cancel()
		if err := <-stopped; err != nil {
			t.Error(err)
		}
	}
}
