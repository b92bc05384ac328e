// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"encoding/json"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/lash-net/lash/api/agent"
	"github.com/lash-net/lash/internal/monitor"
)

// events serves an agent that tells three things and ends, and whose options can be changed.
func events(t *testing.T) (socket string, changed *string) {
	t.Helper()
	socket, changed = filepath.Join(t.TempDir(), "s"), new(string)
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	message, err := monitor.EncodeAgent("Endpoint created", map[string]int{"id": 7})
	if err != nil {
		t.Fatal(err)
	}
	status := testStatus()
	status.NodeMonitor = agent.Component{State: agent.StateOk, Message: "Listening for events on 2 CPUs with 64x4096 of shared memory"}
	mux := http.NewServeMux()
	answer := func(w http.ResponseWriter, v any) {
		if err := json.NewEncoder(w).Encode(v); err != nil {
			t.Error(err)
		}
	}
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, _ *http.Request) { answer(w, status) })
	mux.HandleFunc("GET /v1/monitor", func(w http.ResponseWriter, _ *http.Request) {
		b := monitor.AppendFrame(nil, time.Now(), monitor.NoCPU, 0, message)
		b = monitor.AppendFrame(b, time.Now(), 1, 5, nil)
		b = monitor.AppendFrame(b, time.Now(), 1, 0, []byte{99})
		if _, err := w.Write(b); err != nil {
			t.Error(err)
		}
	})
	mux.HandleFunc("GET /v1/endpoints/7/log", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, []agent.EndpointChange{{Time: time.Unix(0, 0), Status: "OK", State: "ready", Message: "ready, was creating"}})
	})
	options := []agent.Option{{Name: "Debug", Value: "Disabled", Takes: "Enabled or Disabled"}}
	mux.HandleFunc("GET /v1/config", func(w http.ResponseWriter, _ *http.Request) { answer(w, options) })
	mux.HandleFunc("PATCH /v1/config", func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		if *changed = string(b); strings.Contains(*changed, "Nothing") {
			w.WriteHeader(http.StatusBadRequest)
			answer(w, agent.Error{Error: "Nothing: there is no such option"})
			return
		}
		answer(w, options)
	})
	srv := &http.Server{Handler: mux}
	go srv.Serve(l)
	t.Cleanup(func() { srv.Close() })
	return socket, changed
}

func TestMonitorPrintsWhatTheAgentTells(t *testing.T) {
	socket, _ := events(t)
	for args, want := range map[string]string{
		"monitor":             "Listening for events on 2 CPUs with 64x4096 of shared memory\nPress Ctrl-C to quit\n>> Endpoint created: {\"id\":7}\nCPU 01: Lost 5 events\n",
		"monitor --type drop": "Listening for events on 2 CPUs with 64x4096 of shared memory\nPress Ctrl-C to quit\nCPU 01: Lost 5 events\n",
		"monitor -o json":     "{\"type\":\"agent\",\"subtype\":\"Endpoint created\",\"message\":{\"id\":7}}\n{\"cpu\":\"CPU 01:\",\"type\":\"lost\",\"lost\":5}\n",
	} {
		code, out, errOut := run(t, append(strings.Fields(args), "--socket", socket)...)
		if code != 1 || out != want || !strings.Contains(errOut, "unknown type 99") || !strings.Contains(errOut, "the agent has ended") {
			t.Errorf("lash %s: status %d, %q\n%s\nwant\n%s", args, code, errOut, out, want)
		}
	}
	for args, want := range map[string]string{
		"monitor --type drops": "there are agent, capture", "monitor --from 0": "must be the number of an endpoint", "monitor --to 70000": "must be the number", "monitor x": "unknown command",
		"config Debug": "must be OPTION=VALUE", "config Nothing=x": "no such option", "endpoint log x": "must be a number",
	} {
		code, _, errOut := run(t, append(strings.Fields(args), "--socket", socket)...)
		if code != 1 || !strings.Contains(errOut, want) {
			t.Errorf("lash %s: status %d, %q lacks %q", args, code, errOut, want)
		}
	}
}

func TestOptionsAreShownAndChanged(t *testing.T) {
	socket, changed := events(t)
	for args, want := range map[string]string{
		"config": "Debug                             : Disabled", "config -o json": `"takes": "Enabled or Disabled"`, "endpoint log 7": "1970-01-01T00:00:00Z   OK       ready   ready, was creating",
	} {
		if code, out, errOut := run(t, append(strings.Fields(args), "--socket", socket)...); code != 0 || !strings.Contains(out, want) {
			t.Errorf("lash %s: status %d, %q, %q lacks %q", args, code, errOut, out, want)
		}
	}
	if code, _, errOut := run(t, "config", "Debug=Enabled", "--socket", socket); code != 0 || *changed != `{"Debug":"Enabled"}` {
		t.Errorf("status %d, %q, sent %s", code, errOut, *changed)
	}
}
