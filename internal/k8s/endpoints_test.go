// SPDX-License-Identifier: Apache-2.0

package k8s

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	v2 "github.com/lash-net/lash/api/v2"
	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/reconcile"
	"github.com/lash-net/lash/internal/state"
)

// cepServer stores CiliumEndpoints and CiliumIdentities as an API server does, fails a share of the requests before or
// after they took effect, and tells a table of its CiliumEndpoints, as a watch would.
type cepServer struct {
	mu          sync.Mutex
	objects     map[string]*v2.CiliumEndpoint // by namespace/name
	identities  map[string]*v2.CiliumIdentity
	next        int
	fail        float64
	subresource bool // the definition has the status as a subresource
	requests    []string
	tables      *state.Tables
}

func newCEPServer(t *testing.T) (*cepServer, *Client) {
	t.Helper()
	tables, err := state.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tables.Stop() })
	s := &cepServer{objects: map[string]*v2.CiliumEndpoint{}, identities: map[string]*v2.CiliumIdentity{}, tables: tables}
	srv := httptest.NewServer(s)
	t.Cleanup(srv.Close)
	c, err := NewClient(&rest.Config{Host: srv.URL})
	if err != nil {
		t.Fatal(err)
	}
	return s, c
}

func (s *cepServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	answer := func(code int, v any) {
		if rand.Float64() < s.fail {
			code, v = 500, map[string]any{"kind": "Status", "status": "Failure", "code": 500, "reason": "InternalError"}
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(code)
		json.NewEncoder(w).Encode(v)
	}
	status := func(code int, reason string) {
		answer(code, map[string]any{"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason})
	}
	if rand.Float64() < s.fail {
		status(500, "InternalError")
		return
	}
	s.requests = append(s.requests, r.Method+" "+strings.TrimPrefix(r.URL.Path, "/apis/cilium.io/v2/"))
	body, _ := io.ReadAll(r.Body)
	path := strings.Split(strings.Trim(r.URL.Path, "/"), "/")[3:]
	if path[0] == "ciliumidentities" {
		s.identity(r.Method, path[1:], body, answer, status)
		return
	}
	namespace, path := path[1], path[3:]
	key := namespace + "/" + append(path, "")[0]
	have := s.objects[key]
	if r.Method != http.MethodPost && have == nil {
		status(404, "NotFound")
		return
	}
	switch r.Method {
	case http.MethodPost:
		o := &v2.CiliumEndpoint{}
		json.Unmarshal(body, o)
		if key = namespace + "/" + o.Name; s.objects[key] != nil {
			status(409, "AlreadyExists")
			return
		}
		s.next++
		o.UID, o.Namespace = types.UID(fmt.Sprint("uid-", s.next)), namespace
		if s.subresource {
			o.Status = v2.EndpointStatus{}
		}
		s.put(key, o)
		answer(201, o)
	case http.MethodGet:
		answer(200, have)
	case http.MethodDelete:
		var opts struct{ Preconditions struct{ UID string } }
		json.Unmarshal(body, &opts)
		if u := opts.Preconditions.UID; u != "" && u != string(have.UID) {
			status(409, "Conflict")
			return
		}
		s.put(key, nil)
		answer(200, map[string]any{"kind": "Status", "status": "Success"})
	case http.MethodPatch:
		var ops []struct {
			Op, Path string
			Value    json.RawMessage
		}
		json.Unmarshal(body, &ops)
		o := have.DeepCopy()
		for _, op := range ops {
			switch {
			case op.Op == "test" && op.Path == "/metadata/uid" && string(op.Value) == fmt.Sprintf("%q", have.UID):
			case op.Op == "add" && op.Path == "/status":
				if s.subresource == (len(path) == 2) {
					o.Status = v2.EndpointStatus{}
					json.Unmarshal(op.Value, &o.Status)
				}
			default:
				status(422, "Invalid")
				return
			}
		}
		if len(path) == 2 && !s.subresource {
			status(404, "NotFound")
			return
		}
		s.put(key, o)
		answer(200, o)
	}
}

func (s *cepServer) identity(method string, path []string, body []byte, answer func(int, any), status func(int, string)) {
	switch method {
	case http.MethodPost:
		o := &v2.CiliumIdentity{}
		json.Unmarshal(body, o)
		if s.identities[o.Name] != nil {
			status(409, "AlreadyExists")
			return
		}
		s.identities[o.Name] = o
		answer(201, o)
	default:
		have := s.identities[path[0]]
		if have == nil {
			status(404, "NotFound")
			return
		}
		if method == http.MethodPatch {
			delete(have.Annotations, v2.UnusedAnnotation)
		}
		answer(200, have)
	}
}

// put stores or removes an object, and its row.
func (s *cepServer) put(key string, o *v2.CiliumEndpoint) {
	if o == nil {
		row, _ := convertEndpoint(s.objects[key])
		delete(s.objects, key)
		state.Delete(s.tables.DB, s.tables.CiliumEndpoints, row)
		return
	}
	s.objects[key] = o
	row, _ := convertEndpoint(o)
	state.Insert(s.tables.DB, s.tables.CiliumEndpoints, row)
}

func (s *cepServer) setFail(share float64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fail = share
}

func (s *cepServer) took() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := strings.Join(s.requests, ", ")
	s.requests = nil
	return r
}

func published(name, pod string, identity model.Identity) state.PublishedEndpoint {
	return state.PublishedEndpoint{
		CiliumEndpoint: state.CiliumEndpoint{Namespace: "d", Name: name, PodUID: pod, Node: netip.MustParseAddr("172.18.0.11"), IPv4: netip.MustParseAddr("10.0.1.5"),
			IPv6: netip.MustParseAddr("fd00:1::5"), Identity: identity, EndpointID: 7, State: "ready"},
		Labels: "k8s:app=x", ContainerID: "c", Ports: []state.PodPort{{Name: "http", L4: model.L4{Proto: 6, Port: 80}}},
	}
}

func self() []netip.Addr { return []netip.Addr{netip.MustParseAddr("172.18.0.11")} }

func TestEndpointIsWrittenOnceAndChangedInPlace(t *testing.T) {
	for _, subresource := range []bool{false, true} {
		s, c := newCEPServer(t)
		s.subresource = subresource
		target := c.Endpoints(s.tables, self)
		v := published("a", "pod-1", 300)
		if err := target.Put(t.Context(), "d/a", v); err != nil {
			t.Fatal(err)
		}
		want := "POST namespaces/d/ciliumendpoints"
		if subresource {
			want += ", PATCH namespaces/d/ciliumendpoints/a, PATCH namespaces/d/ciliumendpoints/a/status"
		}
		if got := s.took(); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
		v.Identity = 301
		if err := target.Put(t.Context(), "d/a", v); err != nil {
			t.Fatal(err)
		}
		o := s.objects["d/a"]
		if o.Status.Identity.ID != 301 || o.Status.Networking.Addressing[0] != (v2.AddressPair{IPv4: "10.0.1.5", IPv6: "fd00:1::5"}) || o.Status.NamedPorts[0].Protocol != "TCP" ||
			o.OwnerReferences[0].UID != "pod-1" || o.UID != "uid-1" {
			t.Errorf("object is %+v", o)
		}
		s.took()
		if rows, err := target.List(t.Context()); err != nil || !rows["d/a"].Same(v) {
			t.Errorf("listed %+v, %v", rows, err)
		}
		if err := target.Delete(t.Context(), "d/a"); err != nil || len(s.objects) != 0 {
			t.Errorf("%v, %d objects", err, len(s.objects))
		}
		if err := target.Delete(t.Context(), "d/a"); err != nil {
			t.Errorf("the second time: %v", err)
		}
	}
}

func TestEndpointOfAnEarlierPodIsReplaced(t *testing.T) {
	s, c := newCEPServer(t)
	old := c.Endpoints(s.tables, self)
	if err := old.Put(t.Context(), "d/a", published("a", "pod-1", 300)); err != nil {
		t.Fatal(err)
	}
	// By the same agent, and by that of another node.
	for i, target := range []reconcile.Target[string, state.PublishedEndpoint]{old, c.Endpoints(s.tables, self)} {
		pod := fmt.Sprint("pod-", i+2)
		if err := target.Put(t.Context(), "d/a", published("a", pod, 301)); err != nil {
			t.Fatal(err)
		}
		if o := s.objects["d/a"]; string(o.OwnerReferences[0].UID) != pod {
			t.Errorf("object is of %+v", o.OwnerReferences)
		}
	}
	// Who has lost the pod does not delete the other's object.
	if err := old.Delete(t.Context(), "d/a"); err != nil || s.objects["d/a"] == nil {
		t.Errorf("%v, %v", err, s.objects)
	}
}

// Whatever fails, and whoever interferes, in the end the objects are those that are wanted.
func TestEndpointsConverge(t *testing.T) {
	s, c := newCEPServer(t)
	s.fail = .3
	var mu sync.Mutex
	rows, changed := map[string]state.PublishedEndpoint{}, make(chan struct{})
	set := func(f func()) {
		mu.Lock()
		defer mu.Unlock()
		f()
		close(changed)
		changed = make(chan struct{})
	}
	loop := reconcile.New(reconcile.Config[string, state.PublishedEndpoint]{
		Name: "t", Target: c.Endpoints(s.tables, self), Equal: state.PublishedEndpoint.Same, Parallel: 4, Log: slog.New(slog.DiscardHandler),
		RetryMin: time.Millisecond, RetryMax: 10 * time.Millisecond, Reread: 50 * time.Millisecond,
		Desired: func() reconcile.Snapshot[string, state.PublishedEndpoint] {
			mu.Lock()
			defer mu.Unlock()
			snap := reconcile.Snapshot[string, state.PublishedEndpoint]{Rows: map[string]state.PublishedEndpoint{}, Complete: true, Changed: []<-chan struct{}{changed}}
			for k, v := range rows {
				snap.Rows[k] = v
			}
			return snap
		},
	})
	var wg sync.WaitGroup
	ctx, cancel := context.WithCancel(t.Context())
	wg.Go(func() { loop.Run(ctx) })
	defer func() { cancel(); wg.Wait() }()
	for i := range 300 {
		name := fmt.Sprint("p", rand.N(20))
		set(func() {
			if rand.N(3) == 0 {
				delete(rows, "d/"+name)
			} else {
				rows["d/"+name] = published(name, fmt.Sprint("pod-", name, rand.N(2)), model.Identity(300+rand.N(5)))
			}
		})
		if i%20 == 0 { // somebody deletes what is ours
			s.mu.Lock()
			for k := range s.objects {
				s.put(k, nil)
				break
			}
			s.mu.Unlock()
		}
		time.Sleep(time.Millisecond)
	}
	s.setFail(0)
	agree := func() error {
		mu.Lock()
		defer mu.Unlock()
		s.mu.Lock()
		defer s.mu.Unlock()
		if len(s.objects) != len(rows) {
			return fmt.Errorf("%d objects, %d rows", len(s.objects), len(rows))
		}
		for k, v := range rows {
			if o := s.objects[k]; o == nil || owner(o) != v.PodUID || o.Status.Identity.ID != int64(v.Identity) {
				return errors.New(k)
			}
		}
		return nil
	}
	until(t, "agreement", func() bool { return agree() == nil })
}

func TestIdentitiesAtTheAPIServer(t *testing.T) {
	s, c := newCEPServer(t)
	l := model.Labels("k8s:app=x;k8s:io.kubernetes.pod.namespace=d")
	for i := range 2 { // the second time it exists
		if taken, err := c.CreateIdentity(t.Context(), 300, l); err != nil || taken != (i == 1) {
			t.Errorf("attempt %d: taken %v, %v", i, taken, err)
		}
	}
	if o := s.identities["300"]; o.Labels["io.kubernetes.pod.namespace"] != "d" || o.SecurityLabels["k8s:app"] != "x" {
		t.Errorf("object is %+v", o)
	}
	if taken, err := c.CreateIdentity(t.Context(), 300, "k8s:app=y"); err != nil || !taken {
		t.Errorf("another's number: taken %v, %v", taken, err)
	}
	if got, err := c.IdentityLabels(t.Context(), 300); err != nil || got != l {
		t.Errorf("a taken number means %q, %v", got, err)
	}
	if _, err := c.IdentityLabels(t.Context(), 299); err == nil {
		t.Error("a number that is not there means something")
	}
	s.identities["300"].Annotations = map[string]string{v2.UnusedAnnotation: "x"}
	if row, _ := convertIdentity(s.identities["300"]); !row.Unused || row.ID != 300 || row.Labels != l {
		t.Errorf("row is %+v", row)
	}
	if err := c.UseIdentity(t.Context(), 300); err != nil || len(s.identities["300"].Annotations) != 0 {
		t.Errorf("%v, %v", err, s.identities["300"].Annotations)
	}
	if err := c.UseIdentity(t.Context(), 301); err != nil {
		t.Errorf("one that is gone: %v", err)
	}
}
