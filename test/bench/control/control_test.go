// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

func TestPathsOfTheAPI(t *testing.T) {
	for in, want := range map[string]path{
		"/api/v1/nodes":                            {"nodes", "", ""},
		"/api/v1/nodes/a/status":                   {"nodes", "", "a"},
		"/api/v1/namespaces":                       {"namespaces", "", ""},
		"/api/v1/namespaces/x":                     {"namespaces", "", "x"},
		"/api/v1/namespaces/x/pods/p":              {"pods", "x", "p"},
		"/apis/cilium.io/v2/ciliumnodes/a":         {"ciliumnodes", "", "a"},
		"/apis/discovery.k8s.io/v1/endpointslices": {"endpointslices", "", ""},
	} {
		if got, ok := parsePath(in); !ok || got != want {
			t.Errorf("%s gives %+v, %v; want %+v", in, got, ok, want)
		}
	}
	for _, in := range []string{"/", "/api", "/api/v1", "/apis/x/v1/unknowns"} {
		if got, ok := parsePath(in); ok {
			t.Errorf("%s gives %+v, want nothing", in, got)
		}
	}
}

func TestWritesAreMergedAndRead(t *testing.T) {
	api := newAPIServer()
	api.Put("nodes", "", "a", object{"spec": object{"podCIDR": "10.0.0.0/24"}})
	call := func(method, url, body string) object {
		w := httptest.NewRecorder()
		api.ServeHTTP(w, httptest.NewRequest(method, url, strings.NewReader(body)))
		var o object
		if err := json.Unmarshal(w.Body.Bytes(), &o); err != nil {
			t.Fatalf("%s %s: %v: %s", method, url, err, w.Body)
		}
		return o
	}
	call("PATCH", "/api/v1/nodes/a", `{"metadata":{"resourceVersion":"2"},"spec":{"taints":[]}}`)
	got := call("GET", "/api/v1/nodes/a", "")
	if got["kind"] != "Node" || got["metadata"].(object)["name"] != "a" {
		t.Errorf("the node became %v", got)
	}
	if list := call("GET", "/api/v1/nodes?limit=500", ""); len(list["items"].([]any)) != 1 || list["kind"] != "NodeList" {
		t.Errorf("listed %v", list)
	}
	if missing := call("GET", "/api/v1/nodes/b", ""); missing["reason"] != "NotFound" {
		t.Errorf("an unknown node gives %v", missing)
	}
	if made := call("POST", "/apis/cilium.io/v2/ciliumnodes", `{"metadata":{"name":"n"}}`); made["metadata"].(object)["uid"] == nil {
		t.Errorf("a new object has no uid: %v", made)
	}
}

func TestQuantilesOfDurations(t *testing.T) {
	var all []time.Duration
	for i := 100; i >= 1; i-- {
		all = append(all, time.Duration(i))
	}
	for share, want := range map[float64]time.Duration{.5: 50, .99: 99, 1: 100} {
		if got := at(all, share); got != want {
			t.Errorf("%v of 1..100 is %d, want %d", share, got, want)
		}
	}
}

func TestGoalsDecide(t *testing.T) {
	r := &report{OK: true}
	r.limit("a", 29.9, "ms", 30, "")
	r.limit("b", 1e9, "ms", 0, "")
	r.none("c", 0)
	if !r.OK || r.Lines[0].Verdict != "pass" || r.Lines[1].Verdict != "" {
		t.Errorf("kept goals fail: %+v", r)
	}
	r.limit("d", 30, "ms", 30, "")
	if r.OK || r.Lines[3].Verdict != "FAIL" {
		t.Errorf("a missed goal passes: %+v", r)
	}
	r = &report{OK: true}
	if r.none("c", 1); r.OK {
		t.Error("a count above 0 passes")
	}
	var b bytes.Buffer
	if err := r.print(&b); err != nil || !strings.Contains(b.String(), "0 of 1 goals kept") {
		t.Errorf("printed %q, %v", b.String(), err)
	}
}

func TestMemoryIsReadFromStatus(t *testing.T) {
	const status = "Name:\tx\nVmHWM:\t  70000 kB\nVmRSS:\t   61440 kB\n"
	if got := kilobytes(status, "VmRSS:"); got != 61440<<10 {
		t.Errorf("got %d", got)
	}
	if got := kilobytes(status, "VmSwap:"); got != 0 {
		t.Errorf("a missing field gives %d", got)
	}
}
