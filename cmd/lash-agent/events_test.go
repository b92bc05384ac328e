// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/lash-net/lash/bpf"
	"github.com/lash-net/lash/internal/config"
	"github.com/lash-net/lash/internal/datapath"
)

func TestOptionsReachTheProgramsWhileSomebodyListens(t *testing.T) {
	cfg := config.Default()
	m := newMonitoring(cfg)
	var now datapath.Monitoring
	var fail error
	m.apply = func(w datapath.Monitoring) error { now = w; return fail }
	want := datapath.Monitoring{Drops: true, Traces: true, Verdicts: true, Aggregation: bpf.AggregateMedium, Interval: 5 * time.Second, Flags: 7}
	if err := m.SetOptions(map[string]string{"debug": "enabled"}); err != nil {
		t.Fatal(err)
	}
	if now != (datapath.Monitoring{}) {
		t.Errorf("nobody listens and programs tell %+v", now)
	}
	if err := m.listen(true); err != nil {
		t.Fatal(err)
	}
	want.Debug = true
	if now != want {
		t.Errorf("told %+v, want %+v", now, want)
	}
	if err := m.SetOptions(map[string]string{"MonitorAggregationLevel": "None", "Debug": "Disabled", "MonitorAggregationInterval": "1s", "MonitorAggregationFlags": "all", "TraceNotification": "off"}); err != nil {
		t.Fatal(err)
	}
	want = datapath.Monitoring{Drops: true, Verdicts: true, Aggregation: bpf.AggregateNone, Interval: time.Second, Flags: 0xff}
	if now != want {
		t.Errorf("told %+v, want %+v", now, want)
	}
	for option, problem := range map[string]string{
		"MonitorAggregationLevel=some": "None, Low, Medium or Maximum", "Debug=maybe": "Enabled or Disabled", "MonitorAggregationInterval=1": "like 5s",
		"MonitorAggregationFlags=xyz": "no TCP flag", "MonitorAggregatonLevel=none": "did you mean MonitorAggregationLevel?",
	} {
		name, value, _ := strings.Cut(option, "=")
		err := m.SetOptions(map[string]string{name: value, "DropNotification": "Disabled"})
		if err == nil || !strings.Contains(err.Error(), problem) {
			t.Errorf("%s: %v, want %q", option, err, problem)
		}
		if now != want {
			t.Errorf("%s changed %+v", option, now)
		}
	}
	fail = errors.New("no map")
	if err := m.SetOptions(map[string]string{"Debug": "Enabled"}); !errors.Is(err, fail) {
		t.Errorf("got %v", err)
	}
	for _, o := range m.Options() {
		if o.Name == "Debug" && o.Value != "Disabled" {
			t.Errorf("what could not be set is shown as set")
		}
	}
}
