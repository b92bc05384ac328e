// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	api "github.com/lash-net/lash/api/agent"
	"github.com/lash-net/lash/bpf"
	"github.com/lash-net/lash/internal/config"
	"github.com/lash-net/lash/internal/datapath"
	"github.com/lash-net/lash/internal/events"
	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/monitor"
)

// aggregations are the levels by their number in the programs.
var aggregations = []string{bpf.AggregateNone: "none", bpf.AggregateLow: "low", bpf.AggregateMedium: "medium", bpf.AggregateMaximum: "maximum"}

// monitoring is what programs are to tell while somebody listens.
type monitoring struct {
	mu        sync.Mutex
	want      datapath.Monitoring
	listening bool
	apply     func(datapath.Monitoring) error // nil until the datapath is open
}

func newMonitoring(cfg *config.Config) *monitoring {
	flags, _ := config.TCPFlags(cfg.MonitorFlags) // checked when it was loaded
	return &monitoring{want: datapath.Monitoring{
		Drops: cfg.BPFEventsDrop, Traces: cfg.BPFEventsTrace, Verdicts: cfg.BPFEventsVerdict, Debug: slices.Contains(cfg.DebugVerbose, "datapath"),
		Aggregation: uint8(slices.Index(aggregations, cfg.MonitorAggregation)), Interval: cfg.MonitorInterval, Flags: flags,
	}}
}

// listen switches the programs on or off. It is what the hub calls.
func (m *monitoring) listen(on bool) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.listening = on
	return m.change(m.want)
}

// change is called with mu held.
func (m *monitoring) change(want datapath.Monitoring) error {
	now := datapath.Monitoring{}
	if m.listening {
		now = want
	}
	if m.apply != nil {
		if err := m.apply(now); err != nil {
			return err
		}
	}
	m.want = want
	return nil
}

// option is a setting by the name that the field's users know.
type option struct {
	name, takes string
	get         func(datapath.Monitoring) string
	set         func(*datapath.Monitoring, string) error
}

func onOff(name string, field func(*datapath.Monitoring) *bool) option {
	return option{name, "Enabled or Disabled",
		func(m datapath.Monitoring) string {
			if *field(&m) {
				return "Enabled"
			}
			return "Disabled"
		},
		func(m *datapath.Monitoring, v string) error {
			switch strings.ToLower(v) {
			case "enabled", "enable", "true", "on":
				*field(m) = true
			case "disabled", "disable", "false", "off":
				*field(m) = false
			default:
				return fmt.Errorf("%s=%s: must be Enabled or Disabled", name, v)
			}
			return nil
		}}
}

var monitoringOptions = []option{
	onOff("Debug", func(m *datapath.Monitoring) *bool { return &m.Debug }),
	onOff("DropNotification", func(m *datapath.Monitoring) *bool { return &m.Drops }),
	{"MonitorAggregationFlags", "TCP flags, like syn,fin,rst, or all",
		func(m datapath.Monitoring) string { return strings.Join(config.TCPFlagNames(m.Flags), ",") },
		func(m *datapath.Monitoring, v string) (err error) {
			m.Flags, err = config.TCPFlags(strings.FieldsFunc(v, func(r rune) bool { return r == ',' || r == ' ' }))
			return err
		}},
	{"MonitorAggregationInterval", "a duration, like 5s",
		func(m datapath.Monitoring) string { return m.Interval.String() },
		func(m *datapath.Monitoring, v string) error {
			d, err := time.ParseDuration(v)
			if err != nil || d < 100*time.Millisecond || d > time.Hour {
				return fmt.Errorf("MonitorAggregationInterval=%s: must be a duration from 100ms to 1h, like 5s", v)
			}
			m.Interval = d
			return nil
		}},
	{"MonitorAggregationLevel", "None, Low, Medium or Maximum",
		func(m datapath.Monitoring) string {
			s := aggregations[m.Aggregation]
			return strings.ToUpper(s[:1]) + s[1:]
		},
		func(m *datapath.Monitoring, v string) error {
			v = strings.ToLower(v)
			if old, ok := map[string]string{"disabled": "none", "lowest": "low", "max": "maximum"}[v]; ok {
				v = old
			}
			i := slices.Index(aggregations, v)
			if i < 0 {
				return fmt.Errorf("MonitorAggregationLevel=%s: must be None, Low, Medium or Maximum", v)
			}
			m.Aggregation = uint8(i)
			return nil
		}},
	onOff("PolicyVerdictNotification", func(m *datapath.Monitoring) *bool { return &m.Verdicts }),
	onOff("TraceNotification", func(m *datapath.Monitoring) *bool { return &m.Traces }),
}

// Options implements server.Options.
func (m *monitoring) Options() []api.Option {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []api.Option
	for _, o := range monitoringOptions {
		out = append(out, api.Option{Name: o.name, Value: o.get(m.want), Takes: o.takes})
	}
	return out
}

// SetOptions implements server.Options. What it changes lasts until the agent starts again.
func (m *monitoring) SetOptions(values map[string]string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	want := m.want
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(values)) {
		i := slices.IndexFunc(monitoringOptions, func(o option) bool { return strings.EqualFold(o.name, name) })
		if i < 0 {
			var names []string
			for _, o := range monitoringOptions {
				names = append(names, o.name)
			}
			err := fmt.Errorf("%s: there is no such option that can be changed now; there are %s", name, strings.Join(names, ", "))
			if near := config.Nearest(name, names); near != "" {
				err = fmt.Errorf("%s: there is no such option that can be changed now: did you mean %s?", name, near)
			}
			errs = append(errs, err)
			continue
		}
		errs = append(errs, monitoringOptions[i].set(&want, values[name]))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return m.change(want)
}

// startEvents reads the programs' ring for whoever listens.
func (a *agent) startEvents(g *group) (ring *datapath.Events, err error) {
	if ring, err = a.dp.OpenEvents(); err != nil {
		return nil, err
	}
	a.monitoring.mu.Lock()
	a.monitoring.apply = a.dp.SetMonitoring
	a.monitoring.mu.Unlock()
	hub := events.New(ring, a.monitoring.listen, a.log)
	a.hub.Store(hub)
	g.start("events", hub.Run)
	return ring, nil
}

// listener lets the server listen once there is something to hear.
type listener struct{ a *agent }

func (l listener) Listen(ctx context.Context, each func([]byte) error) error {
	hub := l.a.hub.Load()
	if hub == nil {
		return errors.New("the datapath is not loaded yet: " + l.a.phase.Load().waiting)
	}
	return hub.Listen(ctx, each)
}

// endpointChanged tells listeners what the agent did.
func (a *agent) endpointChanged(kind string, ep model.Endpoint) {
	hub := a.hub.Load()
	if hub == nil {
		return
	}
	type named struct {
		ID        uint16 `json:"id"`
		PodName   string `json:"pod-name"`
		Namespace string `json:"namespace"`
	}
	var facts any = named{ep.ID, ep.Pod, ep.Namespace}
	if kind == "regenerated" {
		labels := []string{}
		for k, v := range ep.Labels {
			labels = append(labels, k+"="+v)
		}
		slices.Sort(labels)
		facts = struct {
			ID     uint16   `json:"id"`
			Labels []string `json:"labels"`
		}{ep.ID, labels}
	}
	if m, err := monitor.EncodeAgent("Endpoint "+kind, facts); err == nil {
		hub.Publish(m)
	}
}

// monitorFact is the ring's size and what went through it.
func (a *agent) monitorFact(dp *datapath.Datapath) api.NodeMonitor {
	size, cpus := dp.EventsMemory()
	f := api.NodeMonitor{CPUs: cpus, PageSize: os.Getpagesize(), Pages: int(size) / os.Getpagesize() / cpus}
	if hub := a.hub.Load(); hub != nil {
		s := hub.Stats()
		f.Listeners, f.Seen, f.Lost, f.Missed, f.Unknown = s.Listeners, s.Seen, s.Lost, s.Missed, s.Unknown
	}
	a.monitoring.mu.Lock()
	defer a.monitoring.mu.Unlock()
	for _, k := range []struct {
		on   bool
		name string
	}{{a.monitoring.want.Drops, "drop"}, {a.monitoring.want.Verdicts, "policy-verdict"}, {a.monitoring.want.Traces, "trace"}} {
		if !k.on {
			f.Off = append(f.Off, k.name)
		}
	}
	return f
}
