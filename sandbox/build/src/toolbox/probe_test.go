// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"net"
	"testing"
	"time"
)

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

// What the server's socket had no room for, because the server was not given the CPU, has arrived.
func TestProbeKnowsWhatTheServerHadNoRoomFor(t *testing.T) {
	if damaged() {
		t.Skip("datagrams with a wrong checksum have come to this network namespace: overflows cannot be told from them")
	}
	c, err := listenUDP("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.SetReadBuffer(1); err != nil { // the kernel's least
		t.Fatal(err)
	}
	conn, err := net.Dial("udp4", c.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	go func() {
		time.Sleep(100 * time.Millisecond)
		_ = udpEcho(c, "me")
	}()
	r := run(context.Background(), conn, message{who: true}, time.Millisecond, 200*time.Millisecond)
	if r.Lost != 0 || r.Overflowed < 10 || r.Received+r.Overflowed != r.Sent || r.FirstLost != nil || r.Servers["me"].Answers != r.Received {
		t.Errorf("got %+v", r)
	}
}

func TestOverflowExplainsNoMoreThanItsCount(t *testing.T) {
	answer := func(by string, dropped int64) entry { return entry{answered: time.Now(), by: by, dropped: dropped} }
	me, none := func(dropped int64) entry { return answer("me", dropped) }, entry{}
	for name, c := range map[string]struct {
		entries          []entry
		lost, overflowed int64
	}{
		"nothing lost":               {[]entry{me(0), me(0)}, 0, 0},
		"all":                        {[]entry{me(3), none, none, me(5)}, 0, 2},
		"one of two":                 {[]entry{me(3), none, none, me(4)}, 1, 1},
		"others' too":                {[]entry{me(3), none, me(9)}, 0, 1},
		"none":                       {[]entry{me(3), none, me(3)}, 1, 0},
		"another server":             {[]entry{me(0), none, answer("you", 7)}, 1, 0},
		"before the first answer":    {[]entry{none, me(7)}, 1, 0},
		"after the last answer":      {[]entry{me(7), none}, 1, 0},
		"a run of each kind":         {[]entry{me(0), none, me(1), none, me(1)}, 1, 1},
		"the count began once again": {[]entry{me(9), none, me(1)}, 1, 0},
	} {
		l := &ledger{entries: c.entries}
		if r := l.result(); r.Lost != c.lost || r.Overflowed != c.overflowed || (r.FirstLost != nil) != (c.lost > 0) {
			t.Errorf("%s: got %+v", name, r)
		}
	}
}

func TestServersAreToldByWhatWasAsked(t *testing.T) {
	start := time.Now()
	at := func(ms int) time.Time { return start.Add(time.Duration(ms) * time.Millisecond) }
	l := &ledger{entries: []entry{
		{sent: at(0), answered: at(900), by: "old"},
		{sent: at(2000), answered: at(2001), by: "old"},
		{sent: at(2020), answered: at(2150), by: "old"},
		{sent: at(2040)},
		{sent: at(2060), answered: at(2070), by: "new"},
	}}
	got := l.servers()
	for name, want := range map[string]Server{"old": {3, at(900), at(2150), at(0), at(2020), 130}, "new": {1, at(2070), at(2070), at(2060), at(2060), 10}} {
		if got[name] != want {
			t.Errorf("%s: got %+v, want %+v", name, got[name], want)
		}
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
			_, _ = c.WriteTo([]byte(answer(string(buf[:n]), []string{"first", "second"}[min(i, 1)], from)), from)
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
