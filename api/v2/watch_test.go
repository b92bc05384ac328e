// SPDX-License-Identifier: Apache-2.0

package v2

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strings"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
)

const event = `{"type":"%s","object":{"apiVersion":"cilium.io/v2","kind":"CiliumEndpoint","metadata":{"name":"a","namespace":"n","uid":"u","resourceVersion":"12",` +
	`"creationTimestamp":"2026-11-26T00:00:00Z","ownerReferences":[{"apiVersion":"v1","kind":"Pod","name":"a","uid":"p"}],"managedFields":[{"manager":"lash-agent",` +
	`"operation":"Update","apiVersion":"cilium.io/v2","time":"2026-11-26T00:00:00Z","fieldsType":"FieldsV1","fieldsV1":{"f:metadata":{"f:ownerReferences":{".":{},` +
	`"k:{\"uid\":\"p\"}":{}}},"f:status":{".":{},"f:external-identifiers":{".":{},"f:container-id":{},"f:k8s-namespace":{},"f:k8s-pod-name":{},"f:pod-name":{}},"f:id":{},` +
	`"f:identity":{".":{},"f:id":{},"f:labels":{}},"f:named-ports":{},"f:networking":{".":{},"f:addressing":{},"f:node":{}},"f:state":{}}}}]},` +
	`"status":{"id":7,"state":"ready","identity":{"id":300,"labels":["k8s:app=x","k8s:io.cilium.k8s.policy.cluster=default","k8s:io.cilium.k8s.policy.serviceaccount=default",` +
	`"k8s:io.kubernetes.pod.namespace=n"]},"networking":{"addressing":[{"ipv4":"10.0.1.5","ipv6":"fd00::5"}],"node":"172.18.0.11"},` +
	`"named-ports":[{"name":"http","port":80,"protocol":"TCP"}],"external-identifiers":{"k8s-namespace":"n","k8s-pod-name":"a","pod-name":"n/a"}}}}` + "\n"

// watched serves a watch with the body and returns clients of the server.
func watched(t testing.TB, body func(io.Writer)) *Clients {
	t.Helper()
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		body(w)
	}))
	t.Cleanup(srv.Close)
	c, err := New(&rest.Config{Host: srv.URL})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// byClientGo is the same watch, decoded by client-go.
func byClientGo(t testing.TB, r *Endpoints) watch.Interface {
	t.Helper()
	opts := metav1.ListOptions{Watch: true}
	w, err := r.request(r.rest.Get()).VersionedParams(&opts, r.params).Watch(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func events(w watch.Interface) (all []watch.Event) {
	for e := range w.ResultChan() {
		all = append(all, e)
	}
	return all
}

func TestWatchTellsWhatClientGoTells(t *testing.T) {
	bookmark := `{"type":"BOOKMARK","object":{"kind":"CiliumEndpoint","apiVersion":"cilium.io/v2","metadata":{"resourceVersion":"99","creationTimestamp":null,"annotations":{"k8s.io/initial-events-end":"true"}}}}` + "\n"
	expired := `{"type":"ERROR","object":{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"too old resource version","reason":"Expired","code":410}}` + "\n"
	for name, body := range map[string]string{
		"unknown fields":   strings.Replace(fmt.Sprintf(event, "ADDED"), `"status":{"id":7`, `"extra":[{"a":null}],"status":{"id":7,"ID":9,"more":{}`, 1),
		"events":           fmt.Sprintf(event, "ADDED") + fmt.Sprintf(event, "MODIFIED") + fmt.Sprintf(event, "DELETED") + bookmark,
		"expired":          fmt.Sprintf(event, "ADDED") + expired,
		"nothing":          "",
		"ends in an event": fmt.Sprintf(event, "ADDED") + fmt.Sprintf(event, "ADDED")[:200],
	} {
		t.Run(name, func(t *testing.T) {
			c := watched(t, func(w io.Writer) { io.WriteString(w, body) })
			w, err := c.Endpoints.Watch(t.Context(), metav1.ListOptions{})
			if err != nil {
				t.Fatal(err)
			}
			got, want := events(w), events(byClientGo(t, c.Endpoints))
			if len(got) != strings.Count(body, "\n") || !reflect.DeepEqual(got, want) {
				t.Errorf("got  %+v\nwant %+v", got, want)
			}
			if name == "expired" && !apierrors.IsResourceExpired(apierrors.FromObject(got[1].Object)) {
				t.Errorf("the last event is %+v", got[1])
			}
		})
	}
}

func TestWatchEndsWithAnErrorAtWhatIsNoEvent(t *testing.T) {
	for body, want := range map[string]string{
		"no JSON\n": "invalid character 'o'",
		`{"type":"ODD","object":{"metadata":{}}}`: "invalid watch event type",
		`{}`:                                  "invalid watch event type",
		`{"type":"ADDED"}`:                    "event ADDED has no object",
		`{"type":"ADDED","object":null}`:      "event ADDED has no object",
		`{"type":"ERROR"}`:                    "event ERROR has no object",
		`{"type":7,"object":{"metadata":{}}}`: "field .type",
		`{"object":{"kind":"Status"},"type":"ERROR"}`:                                     "field .object",
		`{"type":"ADDED","object":[]}`:                                                    "field .object",
		`{"type":"ADDED","object":{"metadata":7}}`:                                        "object.metadata",
		`{"type":"ADDED","object":{"status":{"networking":{"addressing":[{"ipv4":7}]}}}}`: "object.status.networking.addressing.ipv4",
		`{"type":"ADDED","object":{"metadata":{"creationTimestamp":"yesterday"}}}`:        "parsing time",
	} {
		c := watched(t, func(w io.Writer) { io.WriteString(w, fmt.Sprintf(event, "ADDED")+body+fmt.Sprintf(event, "DELETED")) })
		w, err := c.Endpoints.Watch(t.Context(), metav1.ListOptions{})
		if err != nil {
			t.Fatal(err)
		}
		all := events(w)
		if len(all) != 2 || all[1].Type != watch.Error {
			t.Errorf("after %s: %+v", body, all)
			continue
		}
		if err := apierrors.FromObject(all[1].Object); !strings.Contains(err.Error(), want) {
			t.Errorf("after %s: %v, want %s", body, err, want)
		}
	}
}

func TestWatchIsRefusedAndStopped(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Error(w, "no", http.StatusForbidden)
	}))
	defer srv.Close()
	c, err := New(&rest.Config{Host: srv.URL})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Endpoints.Watch(t.Context(), metav1.ListOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("got %v", err)
	}
	over := make(chan struct{})
	c = watched(t, func(w io.Writer) {
		fmt.Fprintf(w, event, "ADDED")
		w.(http.Flusher).Flush()
		<-over
	})
	defer close(over)
	w, err := c.Endpoints.Watch(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	<-w.ResultChan()
	w.Stop()
	select {
	case e, ok := <-w.ResultChan():
		if ok {
			t.Errorf("after Stop: %+v", e)
		}
	case <-time.After(30 * time.Second):
		t.Error("Stop did not end the watch")
	}
}

func BenchmarkWatch(b *testing.B) {
	for _, how := range []string{"client-go", "own"} {
		b.Run(how, func(b *testing.B) {
			c := watched(b, func(w io.Writer) {
				one := fmt.Appendf(nil, event, "ADDED")
				for range b.N {
					w.Write(one)
				}
			})
			b.ReportAllocs()
			b.ResetTimer()
			w, err := c.Endpoints.Watch(b.Context(), metav1.ListOptions{})
			if how == "client-go" {
				w = byClientGo(b, c.Endpoints)
			}
			if err != nil {
				b.Fatal(err)
			}
			n := 0
			for range w.ResultChan() {
				n++
			}
			if n != b.N {
				b.Errorf("%d events of %d", n, b.N)
			}
		})
	}
}
