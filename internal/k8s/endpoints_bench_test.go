// SPDX-License-Identifier: Apache-2.0

package k8s

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/state"
)

// BenchmarkCiliumEndpointEvents is what every agent does of every pod in the cluster, from the text of a watch to the row:
// pods come and go, each with one event.
func BenchmarkCiliumEndpointEvents(b *testing.B) {
	const pods = 4096
	var events [2 * pods]string
	for i := range pods {
		events[i], events[pods+i] = endpointEvent(b, "ADDED", i), endpointEvent(b, "DELETED", i)
	}
	last := endpointEvent(b, "ADDED", pods)
	tables, err := state.New()
	if err != nil {
		b.Fatal(err)
	}
	defer tables.Stop()
	ctx, cancel := context.WithCancel(b.Context())
	c, err := NewClient(&rest.Config{Host: "http://api", Transport: answers(func(r *http.Request) io.Reader {
		if r.URL.Query().Get("watch") == "" {
			return strings.NewReader(`{"apiVersion":"cilium.io/v2","kind":"CiliumEndpointList","metadata":{"resourceVersion":"1"},"items":[]}`)
		}
		return &stream{ctx: ctx, n: b.N, event: func(i int) string {
			if i == b.N-1 {
				return last
			}
			return events[i%len(events)]
		}}
	})})
	if err != nil {
		b.Fatal(err)
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	b.ReportAllocs()
	b.SetBytes(int64(len(last)))
	b.ResetTimer()
	before := cpuTime(b)
	for _, r := range Reflectors(c, tables, "n1", "", slog.New(slog.DiscardHandler)) {
		if strings.HasSuffix(r.Name, "CiliumEndpoint") {
			wg.Go(func() { r.Run(ctx) })
		}
	}
	for seen := false; !seen; time.Sleep(time.Millisecond) {
		_, _, seen = tables.CiliumEndpoints.Get(tables.DB.ReadTxn(), state.CiliumEndpointByName(fmt.Sprint("default/web-", pods)))
	}
	b.ReportMetric(float64(cpuTime(b)-before)/float64(b.N), "cpu-ns/op")
}

// cpuTime is what this process has had of the CPUs, in nanoseconds: what others do on them is not in it.
func cpuTime(t testing.TB) int64 {
	var r unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &r); err != nil {
		t.Fatal(err)
	}
	return r.Utime.Nano() + r.Stime.Nano()
}

// answers is an API server without a connection to it.
type answers func(*http.Request) io.Reader

func (a answers) RoundTrip(r *http.Request) (*http.Response, error) {
	return &http.Response{StatusCode: http.StatusOK, Header: http.Header{"Content-Type": {"application/json"}}, Body: io.NopCloser(a(r)), Request: r}, nil
}

// stream is a watch's body of n events; it ends with ctx.
type stream struct {
	ctx     context.Context
	event   func(i int) string
	next, n int
	rest    string
}

func (s *stream) Read(p []byte) (int, error) {
	if s.rest == "" {
		if s.next == s.n {
			<-s.ctx.Done()
			return 0, io.EOF
		}
		s.rest = s.event(s.next)
		s.next++
	}
	n := copy(p, s.rest)
	s.rest = s.rest[n:]
	return n, nil
}

// endpointEvent is a watch's event of a pod's CiliumEndpoint as its agent writes it, and the API server completes it.
func endpointEvent(t testing.TB, typ string, i int) string {
	row := state.PublishedEndpoint{
		CiliumEndpoint: state.CiliumEndpoint{
			Namespace: "default", Name: fmt.Sprint("web-", i), PodUID: fmt.Sprintf("5d4c3b2a-0000-4000-8000-%012d", i), EndpointID: uint16(i), State: "ready", Identity: 1234,
			Node: netip.MustParseAddr("172.18.0.11"), IPv4: netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), IPv6: netip.AddrFrom16([16]byte{0: 0xfd, 14: byte(i >> 8), 15: byte(i)}),
		},
		Labels: model.LabelsOf(map[string]string{"k8s:app": "web", "k8s:io.cilium.k8s.policy.cluster": "default", "k8s:io.cilium.k8s.policy.serviceaccount": "default",
			"k8s:io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name": "default", "k8s:io.kubernetes.pod.namespace": "default"}),
		ContainerID: fmt.Sprintf("containerd://%064d", i),
		Ports:       []state.PodPort{{Name: "http", L4: model.L4{Proto: 6, Port: 8080}}},
	}
	o := endpointObject(row)
	now := metav1.NewTime(time.Unix(1764115200, 0))
	o.APIVersion, o.Kind, o.UID, o.ResourceVersion = "cilium.io/v2", "CiliumEndpoint", types.UID(fmt.Sprintf("0e1f2a3b-0000-4000-8000-%012d", i)), fmt.Sprint(100+i)
	o.Generation, o.CreationTimestamp = 1, now
	o.ManagedFields = []metav1.ManagedFieldsEntry{{Manager: "lash-agent", Operation: metav1.ManagedFieldsOperationUpdate, APIVersion: o.APIVersion, Time: &now, FieldsType: "FieldsV1",
		FieldsV1: &metav1.FieldsV1{Raw: fmt.Appendf(nil, `{"f:metadata":{"f:ownerReferences":{".":{},"k:{\"uid\":\"%s\"}":{}}},"f:status":{}}`, row.PodUID)}}}
	text, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf(`{"type":%q,"object":%s}`, typ, text) + "\n"
}
