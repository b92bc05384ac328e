// SPDX-License-Identifier: Apache-2.0

package endpoint

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/state"
)

func TestLogRemembersWhatBecameOfEndpoints(t *testing.T) {
	tables, err := state.New()
	if err != nil {
		t.Fatal(err)
	}
	defer tables.Stop()
	var told []string
	l := NewLog(tables, func(kind string, ep model.Endpoint) { told = append(told, kind) })
	changes, err := l.follow()
	if err != nil {
		t.Fatal(err)
	}
	ep := model.Endpoint{ID: 7, ContainerID: "c1", Namespace: "default", Pod: "a", State: model.EndpointCreating, Identity: 5, IPv4: netip.MustParseAddr("10.0.0.1")}
	write := func(change func(*model.Endpoint)) {
		change(&ep)
		state.Insert(tables.DB, tables.Endpoints, ep)
		l.look(changes)
	}
	write(func(*model.Endpoint) {})
	write(func(ep *model.Endpoint) { ep.State = model.EndpointReady })
	write(func(ep *model.Endpoint) { ep.Labels = map[string]string{"a": "b"} })
	write(func(ep *model.Endpoint) { ep.Identity = 4711 })
	write(func(ep *model.Endpoint) { ep.CreatedAt = ep.CreatedAt.Add(1) }) // of no interest
	write(func(ep *model.Endpoint) { ep.State = model.EndpointDeleting })
	state.Delete(tables.DB, tables.Endpoints, ep)
	l.look(changes)
	var got []string
	for _, c := range l.Of(7) {
		got = append(got, c.State+": "+c.Message)
	}
	want := []string{
		"creating: endpoint of pod default/a seen for the first time", "ready: ready, was creating", "ready: labels changed", "ready: identity 4711, was 5",
		"deleting: deleting, was ready", "deleted: endpoint deleted",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %q\nwant %q", got, want)
	}
	if want := []string{"created", "regenerated", "regenerated", "deleted"}; !slices.Equal(told, want) {
		t.Errorf("told %q, want %q", told, want)
	}
	// Another pod gets the number.
	write(func(ep *model.Endpoint) { ep.ContainerID, ep.Pod, ep.State = "c2", "b", model.EndpointReady })
	if got := l.Of(7); len(got) != 7 || got[6].Message != "endpoint of pod default/b seen for the first time" {
		t.Errorf("got %+v", got)
	}
	if got := l.Of(8); got != nil {
		t.Errorf("of an unknown endpoint: %+v", got)
	}
}
