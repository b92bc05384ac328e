// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"context"
	"errors"
	"maps"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/lash-net/lash/bpf"
	"github.com/lash-net/lash/internal/model"
)

// What is remembered of a backend that is gone is forgotten, of one that keeps its connections it is not.
// A client uses the ports of a connection to a backend that is gone again, after that one was listed and before it is
// removed: the new connection stays.
func TestForgettingSparesConnectionsThatCameMeanwhile(t *testing.T) {
	d := serviceMaps(t)
	lost := func(_ uint32, _ bpf.Addr, port bpf.BE16) bool { return port == 1 }
	stays, goes := bpf.ConnKey{LoPort: 1, Proto: 6}, bpf.ConnKey{LoPort: 2, Proto: 6}
	for k, port := range map[bpf.ConnKey]bpf.BE16{stays: 2, goes: 1} {
		if err := d.maps["lash_conn"].Put(&k, &bpf.Conn{Flags: bpf.ConnDNAT, Service: 9, ToPort: port}); err != nil {
			t.Fatal(err)
		}
	}
	n, err := d.forgetConnections(context.Background(), []bpf.ConnKey{stays, goes, {LoPort: 3}}, lost)
	var c bpf.Conn
	if err != nil || n != 1 || d.maps["lash_conn"].Lookup(&stays, &c) != nil || d.maps["lash_conn"].Lookup(&goes, &c) == nil {
		t.Errorf("%d forgotten, %v", n, err)
	}
}

func TestForgetRemovedBackends(t *testing.T) {
	d := serviceMaps(t)
	ctx := context.Background()
	target := d.ServicePorts()
	port := func(kinds string) model.ServicePort {
		return model.ServicePort{ID: 9, Proto: 6, Backends: testBackends(kinds), Frontends: []model.Frontend{testFrontend("10.96.0.9", 80, nil)}}
	}
	if err := target.Put(ctx, 9, port("ccc")); err != nil {
		t.Fatal(err)
	}
	at, p := func(n byte) bpf.Addr { return bpf.AddrFrom(testBackends("ccc")[n-1].Addr) }, bpf.ToBE16(8080)
	conn := func(n byte) bpf.ConnKey { return bpf.ConnKey{Lo: at(n), Hi: at(n), LoPort: 7, Proto: 6} }
	put := func(m string, k, v any) {
		t.Helper()
		if err := d.maps[m].Put(k, v); err != nil {
			t.Fatal(err)
		}
	}
	for n := byte(1); n <= 3; n++ {
		k := conn(n)
		put("lash_conn", &k, &bpf.Conn{Flags: bpf.ConnDNAT, Service: 9, ToAddr: at(n), ToPort: p})
		put("lash_affinity", &bpf.AffinityKey{Client: at(n), Service: 9}, &bpf.Affinity{Addr: at(n), Port: p})
		put("lash_sock_pin", &bpf.SockPinKey{Cookie: uint64(n), Addr: at(1)}, &bpf.SockPin{Addr: at(n), Port: p, Service: 9})
		put("lash_sock_rev", &bpf.SockRevKey{Cookie: uint64(n), Addr: at(n), Port: p}, &bpf.SockRev{Service: 9})
	}
	other := bpf.ConnKey{LoPort: 9, Proto: 6}
	put("lash_conn", &other, &bpf.Conn{}) // not a service's
	if n, err := d.Forget(ctx, nil); err != nil || n != (Forgotten{}) {
		t.Fatalf("forgot %+v, %v", n, err)
	}
	if target.TakeRemoved() {
		t.Error("a backend is said to be gone")
	}
	if err := target.Put(ctx, 9, port("ck-")); err != nil { // 2 terminates, 3 is gone
		t.Fatal(err)
	}
	if !target.TakeRemoved() || target.TakeRemoved() {
		t.Error("that a backend is gone is not said once")
	}
	// What could not be done is done the next time.
	if _, err := d.Forget(ctx, func(map[uint64]bool) (int, error) { return 0, errors.New("not now") }); err == nil {
		t.Error("a failure is not told")
	}
	var asked map[uint64]bool
	n, err := d.Forget(ctx, func(cookies map[uint64]bool) (int, error) { asked = cookies; return 1, nil })
	if err != nil || n.Sockets != 1 || n.Destroyed != 1 || !maps.Equal(asked, map[uint64]bool{3: true}) {
		t.Errorf("forgot %+v of %v, %v", n, asked, err)
	}
	for i := byte(1); i <= 3; i++ {
		var c bpf.Conn
		k := conn(i)
		if err := d.maps["lash_conn"].Lookup(&k, &c); errors.Is(err, ebpf.ErrKeyNotExist) != (i == 3) {
			t.Errorf("connection to backend %d: %v", i, err)
		}
		var a bpf.Affinity
		if err := d.maps["lash_affinity"].Lookup(&bpf.AffinityKey{Client: at(i), Service: 9}, &a); errors.Is(err, ebpf.ErrKeyNotExist) != (i == 3) {
			t.Errorf("affinity to backend %d: %v", i, err)
		}
	}
	var c bpf.Conn
	if err := d.maps["lash_conn"].Lookup(&other, &c); err != nil {
		t.Errorf("a connection that is no service's: %v", err)
	}
	if n, err := d.Forget(ctx, nil); err != nil || n != (Forgotten{}) {
		t.Errorf("a second time it forgot %+v, %v", n, err)
	}
}
