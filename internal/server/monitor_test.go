// SPDX-License-Identifier: Apache-2.0

package server

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/lash-net/lash/api/agent"
)

type fakeEvents chan []byte

func (e fakeEvents) Listen(ctx context.Context, each func([]byte) error) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case b, ok := <-e:
			if !ok {
				return nil
			}
			if err := each(b); err != nil {
				return err
			}
		}
	}
}

type fakeOptions map[string]string

func (o fakeOptions) Options() (out []agent.Option) {
	for name, value := range o {
		out = append(out, agent.Option{Name: name, Value: value})
	}
	return out
}

func (o fakeOptions) SetOptions(want map[string]string) error {
	for name := range want {
		if _, ok := o[name]; !ok {
			return errors.New("no such option")
		}
	}
	for name, value := range want {
		o[name] = value
	}
	return nil
}

type fakeLog map[uint16][]agent.EndpointChange

func (l fakeLog) Of(id uint16) []agent.EndpointChange { return l[id] }

// Each batch arrives when it is told, and the stream ends with its source.
func TestEventsAreStreamed(t *testing.T) {
	events := make(fakeEvents)
	s := New(Config{Events: events, Log: slog.New(slog.DiscardHandler)})
	srv := httptest.NewServer(s)
	defer srv.Close()
	resp, err := http.Get(srv.URL + "/v1/monitor")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	for _, want := range []string{"first", "second"} {
		events <- []byte(want)
		got := make([]byte, len(want))
		if _, err := io.ReadFull(resp.Body, got); err != nil || string(got) != want {
			t.Errorf("got %q, %v", got, err)
		}
	}
	close(events)
	if rest, err := io.ReadAll(resp.Body); err != nil || len(rest) != 0 {
		t.Errorf("at the end: %q, %v", rest, err)
	}
}

func TestOptionsAreShownAndChanged(t *testing.T) {
	options := fakeOptions{"Debug": "Disabled"}
	s := New(Config{Options: options, Log: slog.New(slog.DiscardHandler)})
	if got := get[[]agent.Option](t, s, "/v1/config", 200); len(got) != 1 || got[0].Value != "Disabled" {
		t.Errorf("got %+v", got)
	}
	for _, tc := range []struct {
		body string
		code int
		now  string
	}{{`{"Debug":"Enabled"}`, 200, "Enabled"}, {`{"Debug":"Disabled","Nothing":"x"}`, 400, "Enabled"}, {`no JSON`, 400, "Enabled"}} {
		rec := httptest.NewRecorder()
		s.ServeHTTP(rec, httptest.NewRequest("PATCH", "/v1/config", bytes.NewReader([]byte(tc.body))))
		if rec.Code != tc.code || options["Debug"] != tc.now || !json.Valid(rec.Body.Bytes()) {
			t.Errorf("%s: %d %s, now %s", tc.body, rec.Code, rec.Body, options["Debug"])
		}
	}
}

func TestEndpointLogIsAnswered(t *testing.T) {
	s := New(Config{EndpointLog: fakeLog{7: {{State: "ready"}}}, Log: slog.New(slog.DiscardHandler)})
	if got := get[[]agent.EndpointChange](t, s, "/v1/endpoints/7/log", 200); len(got) != 1 || got[0].State != "ready" {
		t.Errorf("got %+v", got)
	}
	get[agent.Error](t, s, "/v1/endpoints/8/log", 404)
	get[agent.Error](t, s, "/v1/endpoints/x/log", 400)
}
