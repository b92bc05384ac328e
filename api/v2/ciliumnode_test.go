// SPDX-License-Identifier: Apache-2.0

package v2

import (
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"reflect"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
)

func TestDeepCopySharesNothing(t *testing.T) {
	n := &CiliumNode{
		ObjectMeta: metav1.ObjectMeta{Name: "a", Labels: map[string]string{"k": "v"}},
		Spec:       NodeSpec{Addresses: []NodeAddress{{InternalIP, "192.0.2.1"}}, IPAM: NodeIPAM{PodCIDRs: []string{"10.0.0.0/24"}}},
		Status:     NodeStatus{IPAM: NodeIPAMStatus{Used: map[string]AllocationIP{"10.0.0.1": {Owner: "router"}}}},
	}
	want, _ := json.Marshal(n)
	c := n.DeepCopy()
	if !reflect.DeepEqual(n, c) {
		t.Fatalf("copy %+v differs from %+v", c, n)
	}
	c.Labels["k"] = "x"
	c.Spec.Addresses[0].IP = "x"
	c.Spec.IPAM.PodCIDRs[0] = "x"
	c.Status.IPAM.Used["10.0.0.1"] = AllocationIP{}
	if got, _ := json.Marshal(n); string(got) != string(want) {
		t.Errorf("changing the copy changed the original: %s", got)
	}
}

func TestClientSpeaksToTheResource(t *testing.T) {
	var request, body string
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		request = r.Method + " " + r.URL.String()
		b, _ := io.ReadAll(r.Body)
		body = string(b)
		w.Header().Set("Content-Type", "application/json")
		switch {
		case r.URL.Query().Get("watch") != "":
			io.WriteString(w, `{"type":"ADDED","object":{"apiVersion":"cilium.io/v2","kind":"CiliumNode","metadata":{"name":"b"}}}`)
		case r.URL.Path == "/apis/cilium.io/v2/ciliumnodes" && r.Method == "GET":
			io.WriteString(w, `{"apiVersion":"cilium.io/v2","kind":"CiliumNodeList","metadata":{"resourceVersion":"7"},"items":[{"metadata":{"name":"a"}}]}`)
		default:
			io.WriteString(w, `{"apiVersion":"cilium.io/v2","kind":"CiliumNode","metadata":{"name":"a"},"spec":{"ipam":{"podCIDRs":["10.0.0.0/24"]}}}`)
		}
	}))
	defer srv.Close()
	clients, err := New(&rest.Config{Host: srv.URL})
	if err != nil {
		t.Fatal(err)
	}
	nodes := clients.Nodes
	ctx := t.Context()
	want := func(err error, r string) {
		t.Helper()
		if err != nil {
			t.Error(err)
		}
		if request != r {
			t.Errorf("request %q, want %q", request, r)
		}
	}

	n, err := nodes.Get(ctx, "a")
	want(err, "GET /apis/cilium.io/v2/ciliumnodes/a")
	if len(n.Spec.IPAM.PodCIDRs) != 1 {
		t.Errorf("got %+v", n)
	}
	l, err := nodes.List(ctx, metav1.ListOptions{ResourceVersion: "0", Limit: 500})
	want(err, "GET /apis/cilium.io/v2/ciliumnodes?limit=500&resourceVersion=0")
	if len(l.Items) != 1 || l.ResourceVersion != "7" {
		t.Errorf("got %+v", l)
	}
	_, err = nodes.Create(ctx, &CiliumNode{ObjectMeta: metav1.ObjectMeta{Name: "a"}})
	want(err, "POST /apis/cilium.io/v2/ciliumnodes")
	var sent CiliumNode
	if err := json.Unmarshal([]byte(body), &sent); err != nil || sent.Kind != "CiliumNode" || sent.APIVersion != "cilium.io/v2" || sent.Name != "a" {
		t.Errorf("sent %s (%v)", body, err)
	}
	_, err = nodes.Update(ctx, &CiliumNode{ObjectMeta: metav1.ObjectMeta{Name: "a"}})
	want(err, "PUT /apis/cilium.io/v2/ciliumnodes/a")
	_, err = nodes.Patch(ctx, "a", types.MergePatchType, []byte(`{}`), "status")
	want(err, "PATCH /apis/cilium.io/v2/ciliumnodes/a/status")
	want(nodes.Delete(ctx, "a", "uid-1", ""), "DELETE /apis/cilium.io/v2/ciliumnodes/a")
	w, err := nodes.Watch(ctx, metav1.ListOptions{ResourceVersion: "7"})
	want(err, "GET /apis/cilium.io/v2/ciliumnodes?resourceVersion=7&watch=true")
	defer w.Stop()
	if e := <-w.ResultChan(); e.Object.(*CiliumNode).Name != "b" {
		t.Errorf("watched %+v", e)
	}
}
