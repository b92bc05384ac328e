// SPDX-License-Identifier: Apache-2.0

package events

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"log/slog"
	"os"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/lash-net/lash/internal/monitor"
)

// fakeRing is a ring in memory.
type fakeRing struct {
	mu     sync.Mutex
	events [][]byte
	lost   []uint64
	fail   error
}

func (r *fakeRing) put(cpu uint16, messages ...string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, m := range messages {
		b := binary.NativeEndian.AppendUint64(nil, 1)
		b = binary.NativeEndian.AppendUint16(b, cpu)
		b = binary.NativeEndian.AppendUint16(b, uint16(len(m)))
		b = append(b, 0, 0, 0, 0)
		r.events = append(r.events, append(append(b, m...), "padding"...))
	}
}

func (r *fakeRing) Read() ([]byte, error) {
	r.mu.Lock()
	if len(r.events) == 0 || r.fail != nil {
		fail := r.fail
		r.mu.Unlock()
		if fail != nil {
			return nil, fail
		}
		time.Sleep(100 * time.Millisecond)
		return nil, os.ErrDeadlineExceeded
	}
	defer r.mu.Unlock()
	e := r.events[0]
	r.events = r.events[1:]
	return e, nil
}

func (r *fakeRing) Unread() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.events)
}

func (r *fakeRing) Lost() ([]uint64, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]uint64{}, r.lost...), nil
}

func (r *fakeRing) lose(cpu int, n uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lost[cpu] += n
}

// switches notes what the hub asked of the programs.
type switches struct {
	mu  sync.Mutex
	was []bool
	err error
}

func (s *switches) tell(on bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.was = append(s.was, on)
	return s.err
}

// run starts a hub that ends with the test.
func run(t *testing.T, r *fakeRing) (*Hub, *switches, context.Context) {
	s := &switches{}
	h := New(r, s.tell, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- h.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return h, s, ctx
}

// heard collects what a listener was told.
type heard struct {
	mu       sync.Mutex
	messages []string
	lost     map[int]uint32
}

func (x *heard) each(frames []byte) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.lost == nil {
		x.lost = map[int]uint32{}
	}
	for r := monitor.NewReader(bytes.NewReader(frames)); ; {
		e, err := r.Next()
		if err != nil {
			return nil
		}
		if len(e.Data) == 0 {
			x.lost[e.CPU] += e.Lost
			continue
		}
		x.messages = append(x.messages, string(e.Data))
	}
}

func TestEveryListenerHearsEverythingAndProgramsTellOnlyThen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &fakeRing{lost: []uint64{7, 0}}
		h, s, ctx := run(t, r)
		r.put(0, "before anybody listened")
		synctest.Wait()
		if len(s.was) != 0 {
			t.Errorf("switched %v though nobody listens", s.was)
		}
		r.Read() // as OpenEvents does
		var a, b heard
		actx, stopA := context.WithCancel(ctx)
		bctx, stopB := context.WithCancel(ctx)
		go h.Listen(actx, a.each)
		go h.Listen(bctx, b.each)
		synctest.Wait()
		r.put(1, "x", "y")
		r.lose(1, 3)
		time.Sleep(time.Second)
		synctest.Wait()
		h.Publish([]byte("z"))
		synctest.Wait()
		for _, x := range []*heard{&a, &b} {
			if len(x.messages) != 3 || x.messages[0] != "x" || x.messages[2] != "z" || x.lost[1] != 3 || x.lost[0] != 0 {
				t.Errorf("heard %q, lost %v", x.messages, x.lost)
			}
		}
		if got := h.Stats(); got != (Stats{Listeners: 2, Seen: 2, Lost: 3}) {
			t.Errorf("stats %+v", got)
		}
		stopA()
		stopB()
		time.Sleep(time.Second)
		synctest.Wait()
		if len(s.was) != 2 || !s.was[0] || s.was[1] {
			t.Errorf("switched %v", s.was)
		}
		// And again.
		var c heard
		cctx, stopC := context.WithCancel(ctx)
		defer stopC()
		go h.Listen(cctx, c.each)
		synctest.Wait()
		r.put(0, "again")
		time.Sleep(time.Second)
		synctest.Wait()
		if len(c.messages) != 1 {
			t.Errorf("the next listener heard %q", c.messages)
		}
	})
}

func TestASlowListenerLosesItsOwnAndIsToldHowMany(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &fakeRing{lost: []uint64{0}}
		h, _, ctx := run(t, r)
		var quick, slow heard
		let := make(chan struct{})
		go h.Listen(ctx, quick.each)
		go h.Listen(ctx, func(b []byte) error { <-let; return slow.each(b) })
		synctest.Wait()
		const n = 3 * queueLen
		for range n {
			r.put(0, "e")
			time.Sleep(200 * time.Millisecond)
		}
		close(let)
		r.put(0, "last")
		time.Sleep(time.Second)
		synctest.Wait()
		if len(quick.messages) != n+1 || len(quick.lost) != 0 {
			t.Errorf("the quick one heard %d of %d, lost %v", len(quick.messages), n+1, quick.lost)
		}
		if got := len(slow.messages) + int(slow.lost[monitor.NoCPU]); got != n+1 || slow.lost[monitor.NoCPU] == 0 {
			t.Errorf("the slow one heard %d and lost %d of %d", len(slow.messages), slow.lost[monitor.NoCPU], n+1)
		}
		if got := h.Stats().Missed; got != uint64(slow.lost[monitor.NoCPU]) {
			t.Errorf("missed %d, told %d", got, slow.lost[monitor.NoCPU])
		}
	})
}

func TestRecordsThatAreNoEventsAreCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &fakeRing{lost: []uint64{0}}
		h, _, ctx := run(t, r)
		var x heard
		go h.Listen(ctx, x.each)
		synctest.Wait()
		r.put(0, "")
		r.mu.Lock()
		r.events = append(r.events, []byte("short"), append(make([]byte, 10), 0xff, 0xff, 0, 0, 0, 0))
		r.mu.Unlock()
		r.put(0, "good")
		time.Sleep(time.Second)
		synctest.Wait()
		if s := h.Stats(); s.Unknown != 3 || s.Seen != 1 || len(x.messages) != 1 {
			t.Errorf("stats %+v, heard %q", s, x.messages)
		}
	})
}

func TestAListenerIsRefusedWhenProgramsCannotBeSwitched(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, s, ctx := run(t, &fakeRing{lost: []uint64{0}})
		s.err = errors.New("no such map")
		if err := h.Listen(ctx, func([]byte) error { return nil }); !errors.Is(err, s.err) {
			t.Errorf("got %v", err)
		}
		s.err = nil
	})
}

func TestListenersEndWithTheHub(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &switches{}
		h := New(&fakeRing{lost: []uint64{0}}, s.tell, slog.New(slog.DiscardHandler))
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 2)
		go func() { done <- h.Run(ctx) }()
		go func() { done <- h.Listen(t.Context(), func([]byte) error { return nil }) }()
		synctest.Wait()
		cancel()
		if err := errors.Join(<-done, <-done); err != nil {
			t.Error(err)
		}
		if err := h.Listen(t.Context(), func([]byte) error { return nil }); err != nil {
			t.Error(err)
		}
		if len(s.was) != 2 || s.was[1] {
			t.Errorf("switched %v", s.was)
		}
	})
}

func TestAFailingRingEndsTheHub(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &fakeRing{lost: []uint64{0}, fail: os.ErrClosed}
		h := New(r, (&switches{}).tell, slog.New(slog.DiscardHandler))
		done := make(chan error)
		go func() { done <- h.Run(t.Context()) }()
		go h.Listen(t.Context(), func([]byte) error { return nil })
		if err := <-done; !errors.Is(err, os.ErrClosed) {
			t.Errorf("got %v", err)
		}
	})
}
