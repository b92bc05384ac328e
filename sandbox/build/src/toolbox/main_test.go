// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"
)

func TestHTTPAnswersNameAndClient(t *testing.T) {
	s := httptest.NewServer(handler("me"))
	defer s.Close()
	for path, want := range map[string]string{"/hostname": "me", "/clientip": "127.0.0.1:", "/echo?msg=hi": "hi", "/healthz": "ok"} {
		r, err := s.Client().Get(s.URL + path)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(r.Body)
		r.Body.Close()
		if err != nil || !strings.HasPrefix(string(b), want) {
			t.Errorf("%s: %q %v, want %q", path, b, err, want)
		}
	}
}

func TestProbeCountsWhatIsLost(t *testing.T) {
	c, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	go func() { // swallows every tenth message
		buf := make([]byte, 100)
		for i := 0; ; i++ {
			n, from, err := c.ReadFrom(buf)
			if err != nil {
				return
			}
			if i%10 != 3 {
				_, _ = c.WriteTo(buf[:n], from)
			}
		}
	}()
	conn, err := net.Dial("udp", c.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	start := time.Now()
	r := run(context.Background(), conn, message{}, time.Millisecond, 100*time.Millisecond)
	if r.Sent < 20 || r.Lost < r.Sent/10-1 || r.Lost > r.Sent/10+1 || r.Error != "" {
		t.Errorf("got %+v", r)
	}
	if r.FirstLost == nil || r.FirstLost.Sub(start) > 50*time.Millisecond {
		t.Errorf("first lost %v, started %v", r.FirstLost, start)
	}
}

func TestProbeOverTCPLosesNothing(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() { _ = tcpEcho(l, "me") }()
	conn, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if r := run(context.Background(), conn, message{size: 4096}, time.Millisecond, 50*time.Millisecond); r.Sent == 0 || r.Lost != 0 || r.Error != "" {
		t.Errorf("got %+v", r)
	}
}

// Whoever answers is named, also where the socket is not connected.
func TestProbeTellsWhoAnswers(t *testing.T) {
	c, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	go func() { // two servers behind one address
		buf := make([]byte, 100)
		for i := 0; ; i++ {
			n, from, err := c.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = c.WriteTo([]byte(answer(string(buf[:n]), []string{"first", "second"}[min(i/10, 1)], from)), from)
		}
	}()
	for _, dial := range []func(context.Context, string, string) (net.Conn, error){dial, unconnectedTo} {
		conn, err := dial(context.Background(), "udp4", c.LocalAddr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		r := run(context.Background(), conn, message{who: true}, time.Millisecond, 50*time.Millisecond)
		if r.Lost != 0 || r.Error != "" || r.Servers["second"].Answers == 0 || r.Servers["second"].Last.Before(r.Servers["first"].Last) {
			t.Errorf("got %+v", r)
		}
	}
}

func TestProbePings(t *testing.T) {
	for network, addr := range map[string]string{"icmp4": "127.0.0.1", "icmp6": "::1"} {
		conn, err := dial(context.Background(), network, addr)
		if errors.Is(err, os.ErrPermission) {
			t.Skip("needs raw sockets: run as root")
		}
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if r := run(context.Background(), conn, message{}, time.Millisecond, 50*time.Millisecond); r.Sent == 0 || r.Lost != 0 || r.Error != "" {
			t.Errorf("%s: got %+v", network, r)
		}
	}
}
