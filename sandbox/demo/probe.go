// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"sync"
	"syscall"
	"time"
)

// diary is what was done to the cluster and when, so that a loss can be put down to something.
type diary struct {
	mu      sync.Mutex
	entries []entry
}

type entry struct {
	at   time.Time
	what string
}

func (d *diary) write(what string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.entries = append(d.entries, entry{time.Now(), what})
}

// at is what was going on at a time.
func (d *diary) at(t time.Time) string {
	d.mu.Lock()
	defer d.mu.Unlock()
	what := "before anything was done"
	for _, e := range d.entries {
		if e.at.After(t) {
			break
		}
		what = e.what
	}
	return what
}

// probe is a toolbox probe in a pod, from start to stop. containerd runs it: neither the API server nor the kubelet
// nor the agent stands between it and its output.
type probe struct {
	name           string
	cmd            *exec.Cmd
	stdout, stderr bytes.Buffer
}

// probeResult is what toolbox probe prints.
type probeResult struct {
	Sent, Received, Lost, Overflowed int64
	Resent, Needless                 int64
	FirstLost, LastLost, FirstStray  *time.Time
	LostRuns, Strays                 int64
	MaxGapMS                         float64
	MaxGapAt                         time.Time
	Error                            string
	Servers                          map[string]server
}

// server is who answered a probe that asks.
type server struct {
	Answers               int64
	First, Last           time.Time // answer
	FirstAsked, LastAsked time.Time // of what it answered, when that was sent
	BehindMS              float64   // the longest that an answer took, in its last second
}

// startProbe sends a message each interval until stop.
func (w *world) startProbe(ctx context.Context, name, node string, args ...string) (*probe, error) {
	p := &probe{name: name}
	var err error
	argv := append([]string{"toolbox", "probe", "-for", "1h"}, args...)
	if p.cmd, err = w.inContainer(ctx, node, w.client[node], argv...); err != nil {
		return nil, err
	}
	p.cmd.Stdout, p.cmd.Stderr = &p.stdout, &p.stderr
	return p, p.cmd.Start()
}

// stop ends the probe and says what it found.
func (p *probe) stop() (probeResult, error) {
	var r probeResult
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	err := p.cmd.Wait() // its status says no more than its output
	if json.Unmarshal(p.stdout.Bytes(), &r) != nil {
		return r, fmt.Errorf("the probe ended without a result: %v %s", err, p.stderr.String())
	}
	return r, nil
}

// verdict on a probe that ran while the cluster was ill-treated. Gaps alone are no fault: the datapath keeps no packet
// back, so an outage loses some, and on a busy machine a probe waits for the CPU for a second.
func (r probeResult) verdict(d *diary) error {
	where := func(t time.Time) string { return fmt.Sprintf("at %s (%s)", t.Format("15:04:05.000"), d.at(t)) }
	const remedy = "see the drops of n1 and n2 below"
	switch {
	case r.Error != "":
		return fmt.Errorf("broken off after %d of %d messages: %s, last answer %s", r.Received, r.Sent, r.Error, where(r.MaxGapAt))
	case r.Sent == 0:
		return errors.New("the probe sent nothing")
	case r.Lost > 0 && r.FirstLost != nil:
		return fmt.Errorf("%d of %d messages lost, in %d runs, the first %s, the last at %s; longest gap %.0f ms ending %s; %s", r.Lost, r.Sent, r.LostRuns, where(*r.FirstLost), r.LastLost.Format("15:04:05.000"), r.MaxGapMS, where(r.MaxGapAt), remedy)
	case r.Resent > 2*r.Needless: // one DSACK may stand for two small segments that became one
		return fmt.Errorf("%d segments lost and sent again (and %d needlessly), of %d messages; longest gap %.0f ms ending %s; %s", r.Resent-r.Needless, r.Needless, r.Sent, r.MaxGapMS, where(r.MaxGapAt), remedy)
	}
	return nil
}
