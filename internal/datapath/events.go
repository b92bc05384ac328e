// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"

	"github.com/lash-net/lash/bpf"
)

// eventsPages is how much of the events' ring there is for each CPU, in pages.
const eventsPages = 64

// eventsTimer is how long an event waits at most for the reader, when too few follow it to wake it.
const eventsTimer = 100 * time.Millisecond

// eventsSize is the size of the ring in bytes: a power of two, as the kernel wants it.
func eventsSize(cpus int) uint32 {
	size := uint32(eventsPages * os.Getpagesize())
	for cpus > 1 {
		size, cpus = size*2, (cpus+1)/2
	}
	return size
}

// eventsWake is how far behind the reader may be before it is woken, bytes.
func eventsWake(size uint32) uint32 { return size / 4 }

// Monitoring is what programs tell about packets. The zero value is nothing.
type Monitoring struct {
	Drops    bool
	Traces   bool
	Debug    bool
	Verdicts bool

	Aggregation uint8         // bpf.AggregateNone and so on
	Interval    time.Duration // between two events of one direction of a connection; 0: none for that
	Flags       uint8         // TCP flags that are worth an event the first time
}

func (m Monitoring) row(hz uint32) (events uint8, report uint16, interval uint32) {
	for bit, on := range map[uint8]bool{bpf.EventsDrop: m.Drops, bpf.EventsTrace: m.Traces, bpf.EventsDebug: m.Debug, bpf.EventsVerdict: m.Verdicts} {
		if on {
			events |= bit
		}
	}
	if m.Traces || m.Debug {
		report = bpf.ReportFirst | uint16(m.Flags)
		if m.Aggregation < bpf.AggregateMedium {
			report |= bpf.ReportEvery
		}
	}
	if m.Aggregation < bpf.AggregateMaximum {
		interval = uint32(m.Interval.Seconds() * float64(hz))
	}
	return events, report, interval
}

// SetMonitoring changes what the running programs tell; the next packet is told about accordingly.
func (d *Datapath) SetMonitoring(m Monitoring) error {
	hz, err := ticksPerSecond()
	if err != nil {
		return err
	}
	err = d.changeRuntime(func(rt *bpf.Runtime) {
		rt.Events, rt.Report, rt.Interval = m.row(hz)
		rt.Aggregation = m.Aggregation
	})
	if err != nil {
		return fmt.Errorf("change monitoring: %w", err)
	}
	return nil
}

// Events reads the ring of events. There is one reader.
type Events struct {
	reader *ringbuf.Reader
	lost   *ebpf.Map
	record ringbuf.Record
}

// OpenEvents opens the ring and skips what an earlier reader left in it.
func (d *Datapath) OpenEvents() (*Events, error) {
	r, err := ringbuf.NewReader(d.maps["lash_events"])
	if err != nil {
		return nil, fmt.Errorf("open the ring of events: %w", err)
	}
	e := &Events{reader: r, lost: d.maps["lash_events_lost"]}
	for r.AvailableBytes() > 0 {
		if _, err := e.Read(); err != nil {
			return nil, errors.Join(fmt.Errorf("empty the ring of events: %w", err), r.Close())
		}
	}
	return e, nil
}

// EventsMemory is the size of the ring, and how many CPUs share it.
func (d *Datapath) EventsMemory() (bytes uint32, cpus int) {
	return d.maps["lash_events"].MaxEntries(), runtime.NumCPU()
}

// Close ends a Read that waits.
func (e *Events) Close() error { return e.reader.Close() }

// Read returns the next event, valid until the next call; os.ErrDeadlineExceeded when there was none for the timer's time.
func (e *Events) Read() ([]byte, error) {
	e.reader.SetDeadline(time.Now().Add(eventsTimer))
	err := e.reader.ReadInto(&e.record)
	return e.record.RawSample, err
}

// Unread is how many bytes wait to be read.
func (e *Events) Unread() int { return e.reader.AvailableBytes() }

// Lost is how many events each CPU had no room for since the ring was made.
func (e *Events) Lost() ([]uint64, error) {
	var perCPU []uint64
	if err := e.lost.Lookup(uint32(0), &perCPU); err != nil {
		return nil, fmt.Errorf("read lash_events_lost: %w", err)
	}
	return perCPU, nil
}
