// SPDX-License-Identifier: Apache-2.0

package v2

import (
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
)

// The form other tools read.
func TestObjectsAsOthersReadThem(t *testing.T) {
	for want, obj := range map[string]any{
		`{"metadata":{"name":"300"},"security-labels":{"k8s:app":"x"}}`: &CiliumIdentity{ObjectMeta: metav1.ObjectMeta{Name: "300"}, SecurityLabels: map[string]string{"k8s:app": "x"}},
		`{"metadata":{"name":"a"},"status":{"id":7,"state":"ready","identity":{"id":300,"labels":["k8s:app=x"]},"networking":{"addressing":[{"ipv4":"10.0.1.5","ipv6":"fd00::5"}],"node":"172.18.0.11"},"named-ports":[{"name":"http","port":80,"protocol":"TCP"}],"external-identifiers":{"k8s-pod-name":"a"}}}`: &CiliumEndpoint{
			ObjectMeta: metav1.ObjectMeta{Name: "a"},
			Status: EndpointStatus{ID: 7, State: "ready", Identity: &EndpointIdentity{300, []string{"k8s:app=x"}},
				Networking: &EndpointNetworking{[]AddressPair{{"10.0.1.5", "fd00::5"}}, "172.18.0.11"},
				NamedPorts: []NamedPort{{"http", 80, "TCP"}}, ExternalIDs: EndpointExternalIDs{K8sPodName: "a"}},
		},
	} {
		if b, err := json.Marshal(obj); err != nil || string(b) != want {
			t.Errorf("got  %s (%v)\nwant %s", b, err, want)
		}
	}
}

func TestCopiesOfIdentitiesAndEndpointsShareNothing(t *testing.T) {
	i := &CiliumIdentity{SecurityLabels: map[string]string{"k8s:app": "x"}}
	i.DeepCopy().SecurityLabels["k8s:app"] = "y"
	e := &CiliumEndpoint{Status: EndpointStatus{Identity: &EndpointIdentity{1, []string{"a"}}, Networking: &EndpointNetworking{Addressing: []AddressPair{{"a", "b"}}}, NamedPorts: []NamedPort{{Name: "a"}}}}
	c := e.DeepCopy()
	c.Status.Identity.Labels[0], c.Status.Networking.Addressing[0].IPv4, c.Status.NamedPorts[0].Name = "z", "z", "z"
	c.Status.Identity.ID = 9
	s := e.Status
	if i.SecurityLabels["k8s:app"] != "x" || s.Identity.Labels[0] != "a" || s.Identity.ID != 1 || s.Networking.Addressing[0].IPv4 != "a" || s.NamedPorts[0].Name != "a" {
		t.Errorf("%+v %+v", i, e)
	}
}

func TestNamespacedRequests(t *testing.T) {
	var request string
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		request = r.Method + " " + r.URL.String() + " " + string(body)
		w.Header().Set("Content-Type", "application/json")
		io.WriteString(w, `{"apiVersion":"cilium.io/v2","kind":"CiliumEndpoint","metadata":{"name":"a"}}`)
	}))
	defer srv.Close()
	c, err := New(&rest.Config{Host: srv.URL})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Endpoints.In("d").Get(t.Context(), "a"); err != nil || request != "GET /apis/cilium.io/v2/namespaces/d/ciliumendpoints/a " {
		t.Errorf("%q, %v", request, err)
	}
	if _, err := c.Endpoints.Watch(t.Context(), metav1.ListOptions{}); err != nil || request != "GET /apis/cilium.io/v2/ciliumendpoints?watch=true " {
		t.Errorf("%q, %v", request, err)
	}
	if err := c.Identities.Delete(t.Context(), "300", "u", "7"); err != nil || request != `DELETE /apis/cilium.io/v2/ciliumidentities/300 {"kind":"DeleteOptions","apiVersion":"cilium.io/v2","preconditions":{"uid":"u","resourceVersion":"7"}}`+"\n" {
		t.Errorf("%q, %v", request, err)
	}
}
