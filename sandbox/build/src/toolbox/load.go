// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"
)

// LoadResult is what a load generator saw.
type LoadResult struct {
	Sent         int64            `json:"sent"`
	Failed       int64            `json:"failed"`
	Failures     map[string]int64 `json:"failures,omitempty"` // by kind: what was done, what came of it
	FirstFailure *Failure         `json:"firstFailure,omitempty"`
	LastFailure  *time.Time       `json:"lastFailure,omitempty"`
	Connections  int64            `json:"connections"` // that were opened
	Seconds      float64          `json:"seconds"`
	// Milliseconds from the time a request was due to the end of its answer, of those that did not fail.
	P50MS float64 `json:"p50Ms"`
	P99MS float64 `json:"p99Ms"`
	MaxMS float64 `json:"maxMs"`
	// LateMS is how late the generator itself was with 1 % of the requests: what of P99MS is the machine's.
	LateMS  float64          `json:"lateMs"`
	Servers map[string]int64 `json:"servers"` // answers by what they said
}

// Failure is one request that failed.
type Failure struct {
	At    time.Time `json:"at"`
	To    string    `json:"to"`
	From  string    `json:"from,omitempty"` // the connection's own address, if there was one
	Error string    `json:"error"`
}

type generator struct {
	targets []*target
	fresh   int // percent
	keep    int
	timeout time.Duration

	mu        sync.Mutex
	result    LoadResult
	latencies []time.Duration
	late      []time.Duration
}

// target is one URL and the connections that are kept for it, each of which waits until all others were used.
type target struct {
	addr            string
	request, closes string

	mu   sync.Mutex
	idle []*link
	open int // kept ones, idle or not
}

type link struct {
	net.Conn
	r    *bufio.Reader
	used bool
}

func newTarget(s string) (*target, error) {
	u, err := url.Parse(s)
	if err != nil || u.Scheme != "http" || u.Port() == "" {
		return nil, fmt.Errorf("%q is no URL like http://10.0.0.1:80/hostname", s)
	}
	head := "GET " + u.RequestURI() + " HTTP/1.1\r\nHost: " + u.Host + "\r\n"
	return &target{addr: u.Host, request: head + "\r\n", closes: head + "Connection: close\r\n\r\n"}, nil
}

func (g *generator) run(ctx context.Context, rate int, total time.Duration) LoadResult {
	var wg sync.WaitGroup
	start, interval := time.Now(), time.Second/time.Duration(rate)
	for n := 0; ctx.Err() == nil; n++ {
		due := start.Add(time.Duration(n) * interval)
		if due.Sub(start) >= total {
			break
		}
		time.Sleep(time.Until(due))
		// Fresh ones are spread evenly, and over the URLs, too.
		t, fresh := g.targets[(n+n/100)%len(g.targets)], n*g.fresh%100 < g.fresh
		wg.Go(func() { g.one(t, fresh, due) })
	}
	seconds := time.Since(start).Seconds()
	wg.Wait()
	for _, t := range g.targets {
		for _, c := range t.idle {
			c.Close()
		}
	}
	r := g.result
	r.Seconds = seconds
	slices.Sort(g.latencies)
	slices.Sort(g.late)
	ms := func(list []time.Duration, percent int) float64 {
		if len(list) == 0 {
			return 0
		}
		return float64(list[min(len(list)*percent/100, len(list)-1)].Microseconds()) / 1000
	}
	r.P50MS, r.P99MS, r.MaxMS, r.LateMS = ms(g.latencies, 50), ms(g.latencies, 99), ms(g.latencies, 100), ms(g.late, 99)
	return r
}

// one does one request and writes down what came of it.
func (g *generator) one(t *target, fresh bool, due time.Time) {
	late := time.Since(due)
	deadline := time.Now().Add(g.timeout)
	phase, from := "connect", ""
	server, err := func() (string, error) {
		c, err := g.connection(t, fresh, deadline)
		if err != nil {
			return "", err
		}
		from = c.LocalAddr().String()
		phase = map[bool]string{false: "request on a new connection", true: "request on a kept connection"}[c.used]
		c.used = true
		server, again, err := t.ask(c, fresh, deadline)
		t.release(c, fresh, err == nil && again)
		return server, err
	}()
	took := time.Since(due)
	g.mu.Lock()
	defer g.mu.Unlock()
	r := &g.result
	r.Sent++
	g.late = append(g.late, late)
	if err == nil {
		r.Servers[server]++
		g.latencies = append(g.latencies, took)
		return
	}
	r.Failed++
	now := time.Now()
	r.Failures[phase+": "+kind(err)]++
	r.LastFailure = &now
	if r.FirstFailure == nil {
		r.FirstFailure = &Failure{At: now, To: t.addr, From: from, Error: phase + ": " + err.Error()}
	}
}

// connection is a new one, or the kept one that has waited longest, once there are as many as are kept.
func (g *generator) connection(t *target, fresh bool, deadline time.Time) (*link, error) {
	if !fresh {
		t.mu.Lock()
		if t.open >= g.keep && len(t.idle) > 0 {
			c := t.idle[0]
			t.idle = t.idle[1:]
			t.mu.Unlock()
			return c, nil
		}
		t.open++
		t.mu.Unlock()
	}
	c, err := (&net.Dialer{Deadline: deadline}).Dial("tcp", t.addr)
	if err != nil {
		if !fresh {
			t.mu.Lock()
			t.open--
			t.mu.Unlock()
		}
		return nil, err
	}
	g.mu.Lock()
	g.result.Connections++
	g.mu.Unlock()
	return &link{Conn: c, r: bufio.NewReaderSize(c, 1024)}, nil
}

// ask sends the request and reads its answer. again: the connection may be used again.
func (t *target) ask(c *link, fresh bool, deadline time.Time) (server string, again bool, err error) {
	if err := c.SetDeadline(deadline); err != nil {
		return "", false, err
	}
	request := t.request
	if fresh {
		request = t.closes
	}
	if _, err := io.WriteString(c, request); err != nil {
		return "", false, err
	}
	resp, err := http.ReadResponse(c.r, nil)
	if err != nil {
		return "", false, err
	}
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = errStatus(resp.Status)
	}
	return string(body), !resp.Close, err
}

func (t *target) release(c *link, fresh, again bool) {
	if !fresh {
		t.mu.Lock()
		defer t.mu.Unlock()
		if again {
			t.idle = append(t.idle, c)
			return
		}
		t.open--
	}
	c.Close()
}

type errStatus string

func (e errStatus) Error() string { return "status " + string(e) }

// kind is the error without what differs from one to the next.
func kind(err error) string {
	var status errStatus
	var timeout net.Error
	for _, k := range []struct {
		err  error
		name string
	}{
		{syscall.ECONNREFUSED, "refused"}, {syscall.ECONNRESET, "reset"}, {syscall.EPIPE, "reset"}, {syscall.ECONNABORTED, "aborted"},
		{syscall.EHOSTUNREACH, "unreachable"}, {syscall.ENETUNREACH, "unreachable"}, {syscall.EPERM, "not permitted"},
		{io.EOF, "closed by the server"}, {io.ErrUnexpectedEOF, "closed by the server"}, {os.ErrDeadlineExceeded, "no answer in time"},
	} {
		if errors.Is(err, k.err) {
			return k.name
		}
	}
	switch {
	case errors.As(err, &status):
		return err.Error()
	case errors.As(err, &timeout) && timeout.Timeout():
		return "no answer in time"
	}
	return "other"
}
