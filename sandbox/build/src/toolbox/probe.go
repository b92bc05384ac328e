// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Result of a probe.
type Result struct {
	Sent     int64 `json:"sent"`
	Received int64 `json:"received"`
	Lost     int64 `json:"lost"`
	// Overflowed messages or answers arrived, but server or probe was not given the CPU in time to read them; they are not
	// in Lost.
	Overflowed int64 `json:"overflowed,omitempty"`
	// Strays are answers to an unconnected socket from another address than it asked: of a backend that answered when its
	// connection had been forgotten.
	Strays     int64      `json:"strays,omitempty"`
	FirstStray *time.Time `json:"firstStray,omitempty"`
	// Resent is how many TCP segments either side sent again, Needless of how many of them the peer said that it had them
	// already (DSACK): a busy machine makes TCP impatient.
	Resent    int64      `json:"resent,omitempty"`
	Needless  int64      `json:"needless,omitempty"`
	FirstLost *time.Time `json:"firstLost,omitempty"` // when the first message without an answer was sent
	LastLost  *time.Time `json:"lastLost,omitempty"`
	LostRuns  int64      `json:"lostRuns,omitempty"` // of messages without an answer, one after the other
	MaxGapMS  float64    `json:"maxGapMs"`           // between answers
	MaxGapAt  time.Time  `json:"maxGapAt"`           // its end
	Error     string     `json:"error,omitempty"`
	// Servers are those that answered, with -who.
	Servers map[string]Server `json:"servers,omitempty"`
}

// Server is one that answered a probe.
type Server struct {
	Answers               int64     `json:"answers"`
	First, Last           time.Time // answer
	FirstAsked, LastAsked time.Time // of what it answered, when that was sent
	BehindMS              float64   // the longest that an answer took, of what was sent within a second of the last
}

func run(ctx context.Context, c net.Conn, m message, interval, total time.Duration) Result {
	l := &ledger{last: time.Now(), asked: make(chan struct{}), who: m.who}
	readErr := make(chan error, 1)
	go func() {
		s := bufio.NewScanner(c)
		s.Buffer(nil, 1<<17)
		for s.Scan() {
			if err := l.answer(s.Text()); err != nil {
				readErr <- err
				return
			}
		}
		readErr <- s.Err()
	}()
	ctx, cancel := context.WithTimeout(ctx, total)
	defer cancel()
	tick := time.NewTicker(interval)
	defer tick.Stop()
	problem := ""
sending:
	for {
		select {
		case <-ctx.Done():
			break sending
		case <-tick.C:
			if _, err := io.WriteString(c, m.text(l.send())); err != nil {
				problem = err.Error()
				break sending
			}
		}
	}
	deadline := time.Now().Add(2 * time.Second) // answers on their way
	for !l.complete() && time.Now().Before(deadline) {
		time.Sleep(time.Millisecond)
	}
	if _, ok := c.(*net.TCPConn); ok && problem == "" {
		_, _ = io.WriteString(c, "resent\n")
		select {
		case <-l.asked:
		case <-time.After(2 * time.Second):
			problem = "the server does not say what it had to send again"
		}
	}
	resent, needless := resent(c)
	overflowed := overflowed(c)
	_ = c.SetReadDeadline(time.Now())
	if err := <-readErr; err != nil && !errors.Is(err, os.ErrDeadlineExceeded) && problem == "" {
		problem = err.Error()
	}
	r := l.result()
	if f, ok := c.(*floating); ok {
		r.Strays, r.FirstStray = f.strays.Load(), f.first.Load()
	}
	r.Resent, r.Needless, r.Error = resent+l.resent, needless+l.needless, problem
	here := min(overflowed, r.Lost)
	r.Overflowed += here
	if r.Lost -= here; r.Lost == 0 {
		r.FirstLost, r.LastLost, r.LostRuns = nil, nil, 0
	}
	return r
}

// message is what a probe sends besides the number.
type message struct {
	size int  // at least; 0: just the number
	who  bool // the server is to say its name
}

func (m message) text(number int) string {
	s := strconv.Itoa(number)
	if m.who {
		s = "who " + s
	}
	if pad := m.size - len(s) - 2; pad > 0 {
		s += " " + strings.Repeat("x", pad)
	}
	return s + "\n"
}

// entry is a message of a probe and its answer.
type entry struct {
	sent, answered time.Time
	by             string // who answered, where answers name that
	dropped        int64  // datagrams that the server's socket had had no room for when the message came
}

func (e entry) lost() bool { return e.answered.IsZero() }

// ledger is what was sent when and what of it was answered.
type ledger struct {
	mu       sync.Mutex
	entries  []entry // by the messages' numbers
	received int64
	last     time.Time // answer
	gap      time.Duration
	gapEnd   time.Time
	asked    chan struct{} // closed when the other side has said what it sent again

	resent, needless int64 // by the other side
	who              bool  // answers name who sent them
}

func (l *ledger) send() (number int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.entries = append(l.entries, entry{sent: time.Now()})
	return len(l.entries) - 1
}

func (l *ledger) answer(text string) error {
	head, rest, _ := strings.Cut(text, " ")
	l.mu.Lock()
	defer l.mu.Unlock()
	if head == "resent" {
		defer close(l.asked)
		_, err := fmt.Sscan(rest, &l.resent, &l.needless)
		return err
	}
	n, err := strconv.Atoi(head)
	if err != nil || n < 0 || n >= len(l.entries) {
		return fmt.Errorf("answer %q", text)
	}
	now := time.Now()
	if gap := now.Sub(l.last); gap > l.gap {
		l.gap, l.gapEnd = gap, now
	}
	l.last = now
	e := &l.entries[n]
	if !e.lost() {
		return nil // once more
	}
	e.answered = now
	l.received++
	if !l.who {
		return nil
	}
	name, dropped, _ := strings.Cut(rest, " ")
	if e.by = name; dropped != "" {
		if e.dropped, err = strconv.ParseInt(dropped, 10, 64); err != nil {
			return fmt.Errorf("answer %q", text)
		}
	}
	return nil
}

func (l *ledger) complete() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.received == int64(len(l.entries))
}

func (l *ledger) result() Result {
	l.mu.Lock()
	defer l.mu.Unlock()
	r := Result{Sent: int64(len(l.entries)), Received: l.received, MaxGapMS: float64(l.gap.Microseconds()) / 1000, MaxGapAt: l.gapEnd, Servers: l.servers()}
	for i := 0; i < len(l.entries); i++ {
		if !l.entries[i].lost() {
			continue
		}
		end := i
		for end < len(l.entries) && l.entries[end].lost() {
			end++
		}
		overflowed := l.overflowed(i, end)
		r.Overflowed += overflowed
		if lost := int64(end-i) - overflowed; lost > 0 {
			r.Lost += lost
			r.LostRuns++
			if r.FirstLost == nil {
				r.FirstLost = &l.entries[i].sent
			}
			r.LastLost = &l.entries[end-1].sent
		}
		i = end
	}
	return r
}

// servers are those that answered.
func (l *ledger) servers() map[string]Server {
	servers := map[string]Server{}
	for _, e := range l.entries {
		if e.by == "" {
			continue
		}
		s, known := servers[e.by]
		if !known {
			s.First, s.FirstAsked = e.answered, e.sent
		}
		s.Answers++
		s.LastAsked = e.sent
		if e.answered.Before(s.First) {
			s.First = e.answered
		}
		if e.answered.After(s.Last) {
			s.Last = e.answered
		}
		servers[e.by] = s
	}
	for _, e := range l.entries {
		s := servers[e.by]
		if took := float64(e.answered.Sub(e.sent).Microseconds()) / 1000; e.by != "" && s.LastAsked.Sub(e.sent) < time.Second && took > s.BehindMS {
			s.BehindMS = took
			servers[e.by] = s
		}
	}
	return servers
}

// overflowed is how many of the messages from..end, none of which was answered, may have been without room in the server's
// socket: as many as it counted between the answers before and after them, if those are the same server's.
func (l *ledger) overflowed(from, end int) int64 {
	if from == 0 || end == len(l.entries) || l.entries[from-1].by != l.entries[end].by {
		return 0
	}
	return max(0, min(int64(end-from), l.entries[end].dropped-l.entries[from-1].dropped))
}
