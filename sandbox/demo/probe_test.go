// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"strings"
	"testing"
	"time"
)

func TestVerdictNamesWhatWasGoingOn(t *testing.T) {
	start := time.Now()
	at := func(s int) time.Time { return start.Add(time.Duration(s) * time.Second) }
	lost := at(15)
	d := &diary{entries: []entry{{at(10), "agent killed"}, {at(20), "node removed"}}}
	for want, r := range map[string]probeResult{
		"":                                   {Sent: 100, Received: 98, Overflowed: 2, MaxGapMS: 1300, Resent: 5, Needless: 4},
		"2 of 100 messages lost":             {Sent: 100, Received: 98, Lost: 2, FirstLost: &lost, LastLost: &lost, LostRuns: 1, MaxGapAt: at(21)},
		"(agent killed)":                     {Sent: 100, Received: 98, Lost: 2, FirstLost: &lost, LastLost: &lost, LostRuns: 1, MaxGapAt: at(21)},
		"(node removed)":                     {Sent: 100, Received: 98, Lost: 2, FirstLost: &lost, LastLost: &lost, LostRuns: 1, MaxGapAt: at(21)},
		"3 segments lost and sent again":     {Sent: 100, Received: 100, Resent: 3, MaxGapAt: at(5)},
		"(before anything was done)":         {Sent: 100, Received: 100, Resent: 3, MaxGapAt: at(5)},
		"broken off after 5 of 9 messages: ": {Sent: 9, Received: 5, Lost: 4, Error: "connection reset"},
		"sent nothing":                       {},
	} {
		err := r.verdict(d)
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
}
