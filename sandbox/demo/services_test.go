// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"strings"
	"testing"
	"time"
)

func TestVerdictOnLoad(t *testing.T) {
	at := time.Now()
	d := &diary{entries: []entry{{at.Add(-time.Second), "agents killed"}}}
	failed := loaded{Sent: 1000, Failed: 2, Seconds: 1, Failures: map[string]int64{"connect: refused": 2}}
	failed.FirstFailure = &failure{at, "10.0.0.1:80", "", "connect: refused"}
	for want, l := range map[string]loaded{
		"":                   {Sent: 900, Seconds: 1}, // what was not sent has not failed
		"2 connect: refused": failed,
		"(agents killed)":    failed,
		"1000 sent (1000/s":  failed,
	} {
		if err := l.verdict(d); want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
}

// A generator that falls behind is told apart from requests that fail, and hides none.
func TestGeneratorThatFallsBehind(t *testing.T) {
	if err := (loaded{Sent: 990, Seconds: 1}).offered(1000); err != nil {
		t.Error(err)
	}
	l := loaded{Sent: 900, Failed: 1, Seconds: 1, FirstFailure: &failure{}}
	if err := l.offered(1000); err == nil || !strings.Contains(err.Error(), "sent 900 requests a second and was to send 1000") {
		t.Errorf("got %v", err)
	}
	if err := l.verdict(&diary{}); err == nil {
		t.Error("the failed request is hidden")
	}
}

func TestServicesOfTheClustersModeAskForNone(t *testing.T) {
	for mode, annotated := range map[string]string{"SNAT": "dsr", "DSR": "snat"} {
		got := byDefault(servicesYAML, mode)
		if n := strings.Count(got, "forwarding-mode"); n != 3 || strings.Count(got, "forwarding-mode: "+annotated) != n {
			t.Errorf("%s: %d services are annotated, want the 3 with %s:\n%s", mode, n, annotated, got)
		}
	}
	if byDefault(servicesYAML, "Hybrid") != servicesYAML {
		t.Error("a cluster of which no mode is the default lost annotations")
	}
}

func TestVerdictOnRepinnedDatagrams(t *testing.T) {
	ready := time.Now()
	at := func(d time.Duration) time.Time { return ready.Add(d) }
	both := func(last, first time.Duration) map[string]server {
		asked := func(first, last time.Duration) server {
			return server{Answers: 10, First: at(first + time.Second), Last: at(last + time.Second), FirstAsked: at(first), LastAsked: at(last)} // its server is slow
		}
		return map[string]server{"old": asked(-time.Minute, last), "new": asked(first, time.Minute)}
	}
	some := server{Answers: 10, First: at(0), Last: at(0), FirstAsked: at(0), LastAsked: at(0)}
	for want, servers := range map[string]map[string]server{
		"":                      both(100*time.Millisecond, 120*time.Millisecond),
		"old is still asked":    both(1100*time.Millisecond, 1120*time.Millisecond),
		"new was asked at":      both(500*time.Millisecond, 100*time.Millisecond),
		"want old and then new": {"old": some},
		"third":                 {"old": some, "new": some, "third": some},
	} {
		if err := repinnedInTime(probeResult{Servers: servers}, "old", "new", ready); want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
}

func TestDatagramsUnderWay(t *testing.T) {
	moved := time.Now()
	late, early := moved.Add(time.Millisecond), moved.Add(-300*time.Millisecond)
	for _, c := range []struct {
		what  string
		first *time.Time
		want  int64
	}{{"no answer came from the backend itself", nil, 0}, {"they came when the flow had another", &late, 13}, {"they came while it had that one", &early, 0}} {
		r := probeResult{Lost: 13, Strays: 14, FirstStray: c.first, Servers: map[string]server{"new": {First: moved}}}
		if got := underWayWith(r, "new"); got != c.want {
			t.Errorf("%s: %d of 13 were under way, want %d", c.what, got, c.want)
		}
	}
}

// A backend that is behind excuses what was lost right before the flow got another, no outage at any other time.
func TestDatagramsThatABackendHadNotRead(t *testing.T) {
	moved := time.Now()
	for _, c := range []struct {
		what        string
		first, last time.Duration // before the other backend
		behind      time.Duration
		want        int64
	}{
		{"right before", 500 * time.Millisecond, 20 * time.Millisecond, 480 * time.Millisecond, 13},
		{"longer than it was behind", 500 * time.Millisecond, 20 * time.Millisecond, 100 * time.Millisecond, 0},
		{"at an agent's start, long before", 20 * time.Second, 19 * time.Second, 700 * time.Millisecond, 0},
		{"some of it after", 100 * time.Millisecond, -20 * time.Millisecond, 480 * time.Millisecond, 0},
		{"it was not behind", 20 * time.Millisecond, 20 * time.Millisecond, 0, 0},
	} {
		first, last := moved.Add(-c.first), moved.Add(-c.last)
		r := probeResult{Lost: 13, FirstLost: &first, LastLost: &last, Servers: map[string]server{"new": {FirstAsked: moved}}}
		if got := unreadBy(r, "new", c.behind); got != c.want {
			t.Errorf("%s: %d of 13, want %d", c.what, got, c.want)
		}
	}
	if got := unreadBy(probeResult{}, "new", time.Second); got != 0 {
		t.Errorf("nothing lost: %d", got)
	}
}

// Every object of malformed.yaml has its report, or is in order or refused by its name.
func TestEveryMalformedObjectHasAReport(t *testing.T) {
	events := map[string][]string{}
	for _, object := range strings.Split(malformedYAML, "\n---\n")[1:] {
		_, kind, _ := strings.Cut(object, "kind: ")
		kind, _, _ = strings.Cut(kind, "\n")
		_, name, _ := strings.Cut(object, "{name: ")
		name, _, _ = strings.Cut(name, ",")
		if strings.HasPrefix(name, "fine") || strings.HasPrefix(name, "refused-") {
			continue
		}
		text, ok := reports[kind+" "+name]
		if !ok {
			t.Errorf("%s %s has no report", kind, name)
		}
		events[kind+" "+name] = []string{text + "; and so on"}
	}
	if err := compareReports(events); err != nil {
		t.Error(err)
	}
	events["Service fine"] = []string{"is bad"}
	delete(events, "Service octal")
	if err := compareReports(events); err == nil || !strings.Contains(err.Error(), "Service octal: events are []") || !strings.Contains(err.Error(), `Service fine: events are ["is bad"], want none`) {
		t.Errorf("got %v", err)
	}
}
