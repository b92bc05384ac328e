// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"sync"
)

// The guest's one channel to the host carries frames: a kind, a length and
// that many bytes. Output and events share it, so that an event is read after
// all output written before it.
const (
	frameOutput = 'O'
	frameEvent  = 'E'
	frameMax    = 1 << 20
)

// frameWriter writes frames; its Write sends output.
type frameWriter struct {
	mu sync.Mutex
	w  io.Writer
}

func (f *frameWriter) Write(p []byte) (int, error) {
	for sent := 0; sent < len(p); {
		n := min(len(p)-sent, frameMax)
		if err := f.send(frameOutput, p[sent:sent+n]); err != nil {
			return sent, err
		}
		sent += n
	}
	return len(p), nil
}

func (f *frameWriter) Event(e Event) error {
	b, err := json.Marshal(e)
	if err != nil {
		return err
	}
	return f.send(frameEvent, b)
}

func (f *frameWriter) send(kind byte, p []byte) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	head := [5]byte{kind}
	binary.BigEndian.PutUint32(head[1:], uint32(len(p)))
	_, err := f.w.Write(append(head[:], p...))
	return err
}

// readFrames hands output and events to its functions until the stream ends,
// which is no error between two frames.
func readFrames(r io.Reader, output func([]byte), event func(Event)) error {
	var head [5]byte
	for {
		if _, err := io.ReadFull(r, head[:]); err != nil {
			if err == io.EOF {
				return nil
			}
			return err
		}
		n := binary.BigEndian.Uint32(head[1:])
		if n > frameMax {
			return fmt.Errorf("frame of %d bytes, at most %d are allowed", n, frameMax)
		}
		p := make([]byte, n)
		if _, err := io.ReadFull(r, p); err != nil {
			return fmt.Errorf("frame cut off: %w", err)
		}
		switch head[0] {
		case frameOutput:
			output(p)
		case frameEvent:
			var e Event
			if err := json.Unmarshal(p, &e); err != nil {
				return fmt.Errorf("event %q: %w", p, err)
			}
			event(e)
		default:
			return fmt.Errorf("frame of unknown kind %q", head[0])
		}
	}
}
