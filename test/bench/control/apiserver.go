// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
)

// object is an API object as JSON has it.
type object = map[string]any

// apiServer answers the agent's requests from a few fixed objects: lists, watches
// that announce these and then stay silent, gets, and writes that are accepted
// and merged at the top level only. It is not Kubernetes; it keeps the agent's
// own work apart from that of a real API server on the same two cores.
type apiServer struct {
	mu      sync.Mutex
	objects map[string]map[string]object // by resource, then by namespace/name
	version int
}

// resources are what the agent may ask for: API version and kind.
var resources = map[string][2]string{
	"nodes":          {"v1", "Node"},
	"pods":           {"v1", "Pod"},
	"namespaces":     {"v1", "Namespace"},
	"services":       {"v1", "Service"},
	"endpointslices": {"discovery.k8s.io/v1", "EndpointSlice"},
	"ciliumnodes":    {"cilium.io/v2", "CiliumNode"},

	"ciliumidentities": {"cilium.io/v2", "CiliumIdentity"},
	"ciliumendpoints":  {"cilium.io/v2", "CiliumEndpoint"},
}

func newAPIServer() *apiServer {
	return &apiServer{objects: map[string]map[string]object{}, version: 1}
}

// Put adds an object; what it lacks of an API object's fields is filled in.
func (s *apiServer) Put(resource, namespace, name string, o object) {
	s.mu.Lock()
	defer s.mu.Unlock()
	meta, _ := o["metadata"].(object)
	if meta == nil {
		meta = object{}
	}
	s.version++
	meta["name"], meta["resourceVersion"] = name, fmt.Sprint(s.version)
	if _, ok := meta["uid"]; !ok {
		meta["uid"] = fmt.Sprintf("00000000-0000-4000-8000-%012x", s.version)
	}
	if namespace != "" {
		meta["namespace"] = namespace
	}
	o["metadata"], o["apiVersion"], o["kind"] = meta, resources[resource][0], resources[resource][1]
	if s.objects[resource] == nil {
		s.objects[resource] = map[string]object{}
	}
	s.objects[resource][namespace+"/"+name] = o
}

// path is what a request's path names.
type path struct{ resource, namespace, name string }

// parsePath reads /api/v1/... and /apis/GROUP/VERSION/....
func parsePath(p string) (path, bool) {
	parts := strings.Split(strings.Trim(p, "/"), "/")
	switch {
	case len(parts) > 2 && parts[0] == "api":
		parts = parts[2:]
	case len(parts) > 3 && parts[0] == "apis":
		parts = parts[3:]
	default:
		return path{}, false
	}
	var out path
	if len(parts) > 2 && parts[0] == "namespaces" {
		out.namespace, parts = parts[1], parts[2:]
	}
	out.resource = parts[0]
	if len(parts) > 1 {
		out.name = parts[1]
	}
	_, known := resources[out.resource]
	return out, known
}

func (s *apiServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	if r.URL.Path == "/version" {
		json.NewEncoder(w).Encode(object{"major": "1", "minor": "34", "gitVersion": "v1.34.4"})
		return
	}
	if strings.HasSuffix(r.URL.Path, "healthz") || strings.HasSuffix(r.URL.Path, "readyz") || strings.HasSuffix(r.URL.Path, "livez") {
		io.WriteString(w, "ok")
		return
	}
	p, ok := parsePath(r.URL.Path)
	if !ok {
		s.refuse(w, http.StatusNotFound, "NotFound", "the bench's API server has no "+r.URL.Path)
		return
	}
	query := r.URL.Query()
	switch {
	case r.Method == http.MethodGet && (query.Get("watch") == "1" || query.Get("watch") == "true"):
		s.watch(w, r, p, query.Get("sendInitialEvents") == "true")
	case r.Method == http.MethodGet && p.name == "":
		s.list(w, p)
	case r.Method == http.MethodGet:
		s.get(w, p)
	case r.Method == http.MethodDelete:
		json.NewEncoder(w).Encode(object{"apiVersion": "v1", "kind": "Status", "status": "Success"})
	default:
		s.write(w, r, p)
	}
}

func (s *apiServer) refuse(w http.ResponseWriter, code int, reason, message string) {
	w.WriteHeader(code)
	json.NewEncoder(w).Encode(object{"apiVersion": "v1", "kind": "Status", "status": "Failure", "code": code, "reason": reason, "message": message})
}

func (s *apiServer) list(w http.ResponseWriter, p path) {
	s.mu.Lock()
	defer s.mu.Unlock()
	items := []object{}
	for _, o := range s.objects[p.resource] {
		items = append(items, o)
	}
	names := resources[p.resource]
	json.NewEncoder(w).Encode(object{
		"apiVersion": names[0], "kind": names[1] + "List", "metadata": object{"resourceVersion": fmt.Sprint(s.version)}, "items": items,
	})
}

// watch stays open; initial says to begin with all objects and a bookmark.
func (s *apiServer) watch(w http.ResponseWriter, r *http.Request, p path, initial bool) {
	enc := json.NewEncoder(w)
	if initial {
		s.mu.Lock()
		for _, o := range s.objects[p.resource] {
			enc.Encode(object{"type": "ADDED", "object": o})
		}
		names := resources[p.resource]
		enc.Encode(object{"type": "BOOKMARK", "object": object{
			"apiVersion": names[0], "kind": names[1],
			"metadata": object{"resourceVersion": fmt.Sprint(s.version), "annotations": object{"k8s.io/initial-events-end": "true"}},
		}})
		s.mu.Unlock()
	}
	w.(http.Flusher).Flush()
	<-r.Context().Done()
}

func (s *apiServer) get(w http.ResponseWriter, p path) {
	s.mu.Lock()
	defer s.mu.Unlock()
	o, ok := s.objects[p.resource][p.namespace+"/"+p.name]
	if !ok {
		s.refuse(w, http.StatusNotFound, "NotFound", p.resource+" "+p.name+" not found")
		return
	}
	json.NewEncoder(w).Encode(o)
}

// write merges the body's top level into the object, or makes it.
func (s *apiServer) write(w http.ResponseWriter, r *http.Request, p path) {
	var body object
	if err := json.NewDecoder(r.Body).Decode(&body); err != nil {
		s.refuse(w, http.StatusBadRequest, "BadRequest", err.Error())
		return
	}
	if p.name == "" {
		meta, _ := body["metadata"].(object)
		p.name, _ = meta["name"].(string)
	}
	s.mu.Lock()
	o := s.objects[p.resource][p.namespace+"/"+p.name]
	s.mu.Unlock()
	if o == nil {
		o = object{}
	}
	merged := object{}
	for k, v := range o {
		merged[k] = v
	}
	for k, v := range body {
		if k != "metadata" && k != "status" {
			merged[k] = v
		}
	}
	if o["metadata"] == nil {
		merged["metadata"] = body["metadata"]
	}
	s.Put(p.resource, p.namespace, p.name, merged)
	json.NewEncoder(w).Encode(merged)
}
