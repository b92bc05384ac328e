// SPDX-License-Identifier: Apache-2.0

package model

import (
	"encoding/json"
	"net/netip"
	"reflect"
	"testing"
	"time"
)

// The checkpoint of an endpoint must survive a restart of the agent unchanged.
func TestEndpointCheckpointRoundTrips(t *testing.T) {
	want := Endpoint{
		ID: 1066, ContainerID: "c0ffee", Namespace: "default", Pod: "a-1", UID: "u",
		NetnsPath: "/var/run/netns/x", ContainerIfName: "eth0", IfName: "lxc0123456789ab", Ifindex: 24, PeerIfindex: 2,
		MAC: MAC{2, 0, 0, 0, 0, 1}, NodeMAC: MAC{2, 0, 0, 0, 0, 2},
		IPv4: netip.MustParseAddr("10.0.1.7"), Identity: IdentityInit, Labels: map[string]string{"app": "x"},
		State: EndpointReady, CreatedAt: time.Unix(1700000000, 5).UTC(),
	}
	b, err := json.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	var got Endpoint
	if err := json.Unmarshal(b, &got); err != nil {
		t.Fatalf("%v in %s", err, b)
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v\nwant %+v", got, want)
	}
	if got.IPv6.IsValid() || len(got.Addrs()) != 1 {
		t.Errorf("an absent family came back as an address: %v", got.Addrs())
	}
}

func TestMACText(t *testing.T) {
	for _, in := range []string{"02:00:00:00:00:01", ""} {
		var m MAC
		if err := m.UnmarshalText([]byte(in)); err != nil {
			t.Fatal(err)
		}
		if m.String() != in {
			t.Errorf("got %q, want %q", m, in)
		}
	}
	for _, bad := range []string{"x", "02:00:00:00:00", "02:00:00:00:00:00:00:01"} {
		if _, err := ParseMAC(bad); err == nil {
			t.Errorf("ParseMAC(%q) accepted", bad)
		}
	}
}

func TestIdentityNames(t *testing.T) {
	for id, want := range map[Identity]string{1: "reserved:host", 6: "reserved:remote-node", 8: "reserved:ingress", 9: "reserved:world-ipv4", 11: "11", 4711: "4711"} {
		if got := id.String(); got != want {
			t.Errorf("Identity(%d) is %q, want %q", uint32(id), got, want)
		}
	}
}

func TestFrontendString(t *testing.T) {
	f := FrontendKey{Addr: netip.MustParseAddr("fd00::1"), L4: L4{Proto: ProtoUDP, Port: 53}}
	if got, want := f.String(), "[fd00::1]:53/UDP"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}
