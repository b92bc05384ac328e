// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

func generatorFor(t *testing.T, fresh int, urls ...string) *generator {
	t.Helper()
	g := &generator{fresh: fresh, keep: 4, timeout: time.Second, result: LoadResult{Failures: map[string]int64{}, Servers: map[string]int64{}}}
	for _, u := range urls {
		x, err := newTarget(u + "/hostname")
		if err != nil {
			t.Fatal(err)
		}
		g.targets = append(g.targets, x)
	}
	return g
}

// A server that announces its end takes no request with it; its connections are renewed.
func TestNothingFailsWhileAServerDrains(t *testing.T) {
	var leaving atomic.Bool
	s := httptest.NewServer(announce(&leaving, handler("me")))
	defer s.Close()
	time.AfterFunc(100*time.Millisecond, func() { leaving.Store(true) })
	r := generatorFor(t, 0, s.URL).run(context.Background(), 500, 200*time.Millisecond)
	if r.Failed != 0 || r.Sent < 90 || r.Servers["me"] != r.Sent || r.Connections < 20 {
		t.Errorf("got %+v", r)
	}
	resp, err := http.Get(s.URL + "/healthz")
	if err != nil || resp.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("a server that leaves is ready: %v %v", resp, err)
	}
}

func TestShareOfNewConnections(t *testing.T) {
	a, b := httptest.NewServer(handler("a")), httptest.NewServer(handler("b"))
	defer a.Close()
	defer b.Close()
	r := generatorFor(t, 25, a.URL, b.URL).run(context.Background(), 1000, 400*time.Millisecond)
	if r.Failed != 0 || r.Servers["a"] < r.Sent*4/10 || r.Servers["b"] < r.Sent*4/10 {
		t.Errorf("got %+v", r)
	}
	// Requests that wait on a busy machine need more kept connections than the usual four of each server.
	if fresh := r.Connections - 2*4; fresh < r.Sent*2/10 || fresh > r.Sent/2 {
		t.Errorf("%d connections for %d requests", r.Connections, r.Sent)
	}
}

func TestEveryFailureIsCountedByItsKind(t *testing.T) {
	broken := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }))
	defer broken.Close()
	sad := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500) }))
	defer sad.Close()
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	nobody, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nobody.Close()
	for url, want := range map[string]string{
		broken.URL: "request on a new connection: closed by the server", sad.URL: "request on a new connection: status 500 Internal Server Error",
		"http://" + silent.Addr().String(): "request on a new connection: no answer in time", "http://" + nobody.Addr().String(): "connect: refused",
	} {
		g := generatorFor(t, 100, url)
		g.timeout = 100 * time.Millisecond
		r := g.run(context.Background(), 100, 50*time.Millisecond)
		if r.Failures[want] != r.Sent || r.Failed != r.Sent || r.Sent == 0 || r.FirstFailure == nil || r.LastFailure == nil {
			t.Errorf("want %s, got %+v", want, r)
		}
	}
}

// A server that ends without a word takes its kept connections with it: that is seen, and not tried again.
func TestAbruptEndIsSeen(t *testing.T) {
	s := httptest.NewServer(handler("me"))
	time.AfterFunc(100*time.Millisecond, s.CloseClientConnections)
	defer s.Close()
	r := generatorFor(t, 0, s.URL).run(context.Background(), 500, 200*time.Millisecond)
	kept := int64(0)
	for k, n := range r.Failures {
		if strings.HasPrefix(k, "request on a kept connection: ") {
			kept += n
		}
	}
	if kept == 0 || kept != r.Failed || r.Failed > r.Connections { // each connection had one request at most
		t.Errorf("got %+v", r)
	}
}

// Requests are sent when they are due, also while nobody answers, and their time counts from then.
func TestLoadIsAnOpenLoop(t *testing.T) {
	slow := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { time.Sleep(150 * time.Millisecond) }))
	defer slow.Close()
	r := generatorFor(t, 50, slow.URL).run(context.Background(), 200, 300*time.Millisecond)
	if r.Sent != 60 || r.Failed != 0 || r.P50MS < 150 {
		t.Errorf("got %+v", r)
	}
}
