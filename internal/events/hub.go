// SPDX-License-Identifier: Apache-2.0

package events

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lash-net/lash/internal/monitor"
)

// Ring is where programs put events. Its methods are called by one goroutine.
type Ring interface {
	// Read returns the next event (struct event_head and its message), valid until the next call;
	// os.ErrDeadlineExceeded when there has been none for a while, os.ErrClosed after Close.
	Read() ([]byte, error)
	// Unread is how many bytes wait to be read.
	Unread() int
	// Lost is how many events each CPU had no room for since the ring was made.
	Lost() ([]uint64, error)
}

const (
	// batchSize is when a batch is handed on though there is more to read, bytes.
	batchSize = 64 << 10
	// queueLen is how many batches wait for a listener before it loses some.
	queueLen = 64
	// pause is how long at least the reader lets events gather: it is woken at most that often.
	pause = 5 * time.Millisecond
)

// batch is whole frames, as package monitor has them.
type batch struct {
	frames []byte
	events uint32
}

// Hub reads the ring and hands its events on.
type Hub struct {
	ring Ring
	tell func(bool) error // switches the programs
	log  *slog.Logger

	wake chan struct{} // the first listener has come
	done chan struct{} // Run has ended

	mu        sync.Mutex
	listeners map[*listener]struct{}
	telling   bool

	seen, lost, missed, unknown atomic.Uint64
	known                       []uint64 // losses by CPU that have been told; Run's
}

// Stats are counters since the agent's start.
type Stats struct {
	Listeners int
	Seen      uint64 // events read
	Lost      uint64 // events the ring had no room for
	Missed    uint64 // events some listener had no room for, each counted for each such listener
	Unknown   uint64 // records that are no events
}

// New makes a hub; Run runs it. tell is called with true when the first listener comes and with false when the last
// has gone, never concurrently.
func New(ring Ring, tell func(bool) error, log *slog.Logger) *Hub {
	return &Hub{ring: ring, tell: tell, log: log, wake: make(chan struct{}, 1), done: make(chan struct{}), listeners: map[*listener]struct{}{}}
}

// Stats returns the counters.
func (h *Hub) Stats() Stats {
	h.mu.Lock()
	n := len(h.listeners)
	h.mu.Unlock()
	return Stats{n, h.seen.Load(), h.lost.Load(), h.missed.Load(), h.unknown.Load()}
}

// listener is one queue. What does not fit is counted, and told before the next batch that does.
type listener struct {
	queue chan batch
	lost  uint32 // guarded by Hub.mu
}

// Listen calls each with whole frames until ctx or Run ends, or each fails; each may keep them, not change them.
func (h *Hub) Listen(ctx context.Context, each func(frames []byte) error) error {
	l := &listener{queue: make(chan batch, queueLen)}
	if err := h.join(l); err != nil {
		return err
	}
	defer h.leave(l)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-h.done:
			return nil
		case b := <-l.queue:
			if err := each(b.frames); err != nil {
				return err
			}
		}
	}
}

func (h *Hub) join(l *listener) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	select {
	case <-h.done:
		return nil
	default:
	}
	if !h.telling {
		if err := h.tell(true); err != nil {
			return fmt.Errorf("switch events on: %w", err)
		}
		h.telling = true
	}
	h.listeners[l] = struct{}{}
	select {
	case h.wake <- struct{}{}:
	default:
	}
	return nil
}

func (h *Hub) leave(l *listener) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.listeners, l)
	h.quiet()
}

// quiet switches the programs off when nobody listens.
func (h *Hub) quiet() {
	if len(h.listeners) > 0 || !h.telling {
		return
	}
	if err := h.tell(false); err != nil {
		h.log.Warn("events were not switched off", "error", err)
		return
	}
	h.telling = false
}

// Publish hands an event of the agent's own to the listeners.
func (h *Hub) Publish(message []byte) {
	h.send(batch{monitor.AppendFrame(nil, time.Now(), monitor.NoCPU, 0, message), 1})
}

// send never waits.
func (h *Hub) send(b batch) {
	if b.events == 0 {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for l := range h.listeners {
		out := b
		if l.lost > 0 {
			out.frames = append(monitor.AppendFrame(nil, time.Now(), monitor.NoCPU, l.lost, nil), b.frames...)
		}
		select {
		case l.queue <- out:
			l.lost = 0
		default:
			l.lost += b.events
			h.missed.Add(uint64(b.events))
		}
	}
}

// Run reads until ctx ends. What the ring holds from before is not told.
func (h *Hub) Run(ctx context.Context) error {
	defer close(h.done)
	var err error
	if h.known, err = h.ring.Lost(); err != nil {
		return err
	}
	for ctx.Err() == nil && err == nil {
		select {
		case <-ctx.Done():
		case <-h.wake:
			err = h.read(ctx)
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	clear(h.listeners)
	h.quiet()
	return err
}

// read hands on events while anybody listens.
func (h *Hub) read(ctx context.Context) error {
	for ctx.Err() == nil {
		b, err := h.gather()
		if err != nil {
			return err
		}
		h.send(b)
		h.mu.Lock()
		idle := !h.telling && h.ring.Unread() == 0
		h.mu.Unlock()
		if idle {
			return nil
		}
	}
	return nil
}

// gather waits for events and makes a batch of what there is.
func (h *Hub) gather() (batch, error) {
	offset := clockOffset()
	var b batch
	if h.ring.Unread() == 0 {
		time.Sleep(pause)
	}
	for len(b.frames) < batchSize {
		record, err := h.ring.Read()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
		if err != nil {
			return b, fmt.Errorf("read events: %w", err)
		}
		if !h.add(&b, record, offset) {
			h.unknown.Add(1)
		}
		if h.ring.Unread() == 0 {
			break
		}
	}
	return b, h.addLost(&b)
}

// add appends one event, its time turned from the kernel's clock into the wall's.
func (h *Hub) add(b *batch, record []byte, offset int64) bool {
	ne := binary.NativeEndian
	if len(record) < monitor.HeadSize {
		return false
	}
	n := int(ne.Uint16(record[10:]))
	if n == 0 || monitor.HeadSize+n > len(record) {
		return false
	}
	at := time.Unix(0, int64(ne.Uint64(record))+offset)
	b.frames = monitor.AppendFrame(b.frames, at, ne.Uint16(record[8:]), 0, record[monitor.HeadSize:monitor.HeadSize+n])
	b.events++
	h.seen.Add(1)
	return true
}

// addLost appends what was lost since the last time.
func (h *Hub) addLost(b *batch) error {
	now, err := h.ring.Lost()
	if err != nil {
		return err
	}
	for cpu, n := range now {
		if cpu >= len(h.known) || n <= h.known[cpu] {
			continue
		}
		d := n - h.known[cpu]
		b.frames = monitor.AppendFrame(b.frames, time.Now(), uint16(cpu), uint32(d), nil)
		b.events++
		h.lost.Add(d)
	}
	h.known = now
	return nil
}

// clockOffset is what to add to the kernel's monotonic clock, nanoseconds.
func clockOffset() int64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		return 0
	}
	return time.Now().UnixNano() - ts.Nano()
}
