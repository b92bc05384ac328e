// SPDX-License-Identifier: Apache-2.0

package server

import (
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/state"
)

// filter is a Prefilter in memory.
type filter []netip.Prefix

func (f *filter) Prefilter() ([]netip.Prefix, error) { return *f, nil }

func (f *filter) ChangePrefilter(add, remove []netip.Prefix) error {
	*f = slices.DeleteFunc(append(*f, add...), func(p netip.Prefix) bool { return slices.Contains(remove, p) })
	return nil
}

func TestPrefilterCutsNoNodeOff(t *testing.T) {
	tables, err := state.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tables.Stop() })
	state.Insert(tables.DB, tables.Nodes, model.Node{Name: "n2", Addrs: []netip.Addr{netip.MustParseAddr("172.18.0.12"), netip.MustParseAddr("fd18::12")}})
	f := &filter{}
	s := New(Config{Tables: tables, Prefilter: f, Log: slog.New(slog.DiscardHandler)})
	for _, tt := range []struct {
		send string
		code int
		want string
	}{
		{`{"add":["192.0.2.0/24","2001:db8::/32"]}`, http.StatusOK, `["192.0.2.0/24","2001:db8::/32"]`},
		{`{"add":["172.18.0.0/16"]}`, http.StatusUnprocessableEntity, "172.18.0.12, the address of node n2"},
		{`{"add":["198.51.100.0/24","::/0"]}`, http.StatusUnprocessableEntity, "fd18::12"},
		{`{"remove":["192.0.2.0/24"]}`, http.StatusOK, `["2001:db8::/32"]`},
		{`{"add":["everybody"]}`, http.StatusBadRequest, "everybody"},
	} {
		rec := httptest.NewRecorder()
		s.ServeHTTP(rec, httptest.NewRequest("PATCH", "/v1/prefilter", strings.NewReader(tt.send)))
		if rec.Code != tt.code || !strings.Contains(rec.Body.String(), tt.want) {
			t.Errorf("%s: %d %s, want %d %s", tt.send, rec.Code, rec.Body, tt.code, tt.want)
		}
	}
	if got := get[[]netip.Prefix](t, s, "/v1/prefilter", http.StatusOK); len(got) != 1 {
		t.Errorf("the prefilter is %v: what was refused must change nothing", got)
	}
}
