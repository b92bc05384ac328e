// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer/protobuf"
	"k8s.io/client-go/rest"

	"github.com/lash-net/lash/bpf"
	"github.com/lash-net/lash/internal/config"
	"github.com/lash-net/lash/internal/datapath"
	"github.com/lash-net/lash/internal/k8s"
	"github.com/lash-net/lash/internal/state"
	"github.com/lash-net/lash/internal/testutil"
)

// What programs note when they find no source port is told by the status, the log, an Event on the node and
// `lash bpf nat list --top`, each of which names the destination and who has its ports: once, and until it is over.
func TestExhaustedSourcePortsAreTold(t *testing.T) {
	var dp *datapath.Datapath
	var err error
	testutil.Inside(t, testutil.Netns(t), func() {
		dp, err = datapath.Open(datapath.Config{SNATMin: 1024, SNATMax: 1026, Masquerade4: true, Masquerade6: true, ConnMax: 1024, ServiceMax: 16}, slog.New(slog.DiscardHandler))
	})
	if err != nil {
		t.Fatal(err)
	}
	defer dp.Close()

	var events []corev1.Event
	up := false
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil || r.Method != http.MethodPost || r.URL.Path != "/api/v1/namespaces/default/events" {
			t.Errorf("%s %s: %v", r.Method, r.URL, err)
		}
		if !up {
			http.Error(w, "starting", http.StatusServiceUnavailable)
			return
		}
		scheme := runtime.NewScheme()
		var event corev1.Event
		if err := corev1.AddToScheme(scheme); err != nil {
			t.Error(err)
		} else if _, _, err := protobuf.NewSerializer(scheme, scheme).Decode(body, nil, &event); err != nil {
			t.Error(err)
		}
		events = append(events, event)
		w.Header().Set("Content-Type", r.Header.Get("Content-Type"))
		w.WriteHeader(http.StatusCreated)
		w.Write(body)
	}))
	defer srv.Close()
	client, err := k8s.NewClient(&rest.Config{Host: srv.URL})
	if err != nil {
		t.Fatal(err)
	}
	tables, err := state.New()
	if err != nil {
		t.Fatal(err)
	}
	defer tables.Stop()
	var log bytes.Buffer
	a := &agent{cfg: config.Default(), name: "n1", log: slog.New(slog.NewTextHandler(&log, nil)), tables: tables, api: client, dp: dp}

	w := tables.DB.WriteTxn(tables.Endpoints)
	for id, ep := range []state.Endpoint{
		{Namespace: "default", Pod: "web", IPv4: netip.MustParseAddr("10.0.1.10"), IPv6: netip.MustParseAddr("fd00:0:0:1::a")},
		{Namespace: "default", Pod: "cron", IPv4: netip.MustParseAddr("10.0.1.11"), IPv6: netip.MustParseAddr("fd00:0:0:1::b")},
	} {
		ep.ID = uint16(id + 1)
		if _, _, err := tables.Endpoints.Insert(w, ep); err != nil {
			t.Fatal(err)
		}
	}
	w.Commit()
	for _, f := range []struct{ node, to, web, cron string }{
		{"172.18.0.11", "192.0.2.7:53", "10.0.1.10", "10.0.1.11"}, {"fd18::11", "[2001:db8::7]:53", "fd00:0:0:1::a", "fd00:0:0:1::b"},
	} {
		exhaust(t, dp, netip.MustParseAddr(f.node), netip.MustParseAddrPort(f.to), netip.MustParseAddr(f.web), netip.MustParseAddr(f.web), netip.MustParseAddr(f.cron))
	}

	task := a.exhaustedPorts()
	warnings := func() (texts []string) {
		for w := range tables.Warnings.All(tables.DB.ReadTxn()) {
			texts = append(texts, w.Text)
		}
		return texts
	}
	// The API server is not there yet: the Event is tried again, and nothing else is told twice.
	if err := task.Do(t.Context()); err == nil || !strings.Contains(err.Error(), "event on node n1") {
		t.Errorf("the API server fails: %v", err)
	}
	up = true
	for range 2 {
		if err := task.Do(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	want := []string{
		"no source port is left for connections from 172.18.0.11 to 192.0.2.7:53 (UDP): 3 of 3 are in use, 7 packets were dropped; most by default/web (2), default/cron (1)",
		"no source port is left for connections from fd18::11 to [2001:db8::7]:53 (UDP): 3 of 3 are in use, 7 packets were dropped; most by default/web (2), default/cron (1)",
	}
	if got := warnings(); len(got) != 2 || got[0] != want[0] || got[1] != want[1] {
		t.Errorf("warnings %q, want %q", got, want)
	}
	if n := strings.Count(log.String(), "no source port is left"); n != 2 || !strings.Contains(log.String(), `inUse=3 dropped=7 by="default/web (2), default/cron (1)"`) {
		t.Errorf("logged %d times:\n%s", n, log.String())
	}
	if len(events) != 2 {
		t.Fatalf("events %+v", events)
	}
	for _, e := range events {
		what, by, _ := strings.Cut(e.Message, "; ")
		if e.InvolvedObject.Kind != "Node" || e.InvolvedObject.Name != "n1" || e.Reason != "SourcePortsExhausted" || e.Type != corev1.EventTypeWarning ||
			!strings.HasPrefix(want[0], what) && !strings.HasPrefix(want[1], what) || by != "most are used by default/web" {
			t.Errorf("event %+v", e)
		}
	}
	columns, rows, err := a.dumpSourcePorts(dp)
	if err != nil || len(rows) != 2 || len(columns) != len(rows[0]) {
		t.Fatalf("%v %v, %v", columns, rows, err)
	}
	for i, got := range rows {
		row := []string{"172.18.0.11", "UDP", "192.0.2.7:53", "3", "3", "7, the last 0s ago", "default/web (2), default/cron (1)"}
		if i == 1 {
			row[0], row[2] = "fd18::11", "[2001:db8::7]:53"
		}
		if strings.Join(got, "|") != strings.Join(row, "|") {
			t.Errorf("row %q, want %q", got, row)
		}
	}

	// A minute after the last drop it is over. When it happens again, it is told again.
	for _, ended := range []bool{true, false} {
		age(t, dp, ended)
		if err := task.Do(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := warnings(); (len(got) == 0) != ended {
			t.Errorf("ended %v: warnings %q", ended, got)
		}
	}
	if n := strings.Count(log.String(), "no source port is left"); n != 4 || len(events) != 4 {
		t.Errorf("the second time: %d events, logged %d times", len(events), n)
	}
}

// exhaust makes the rows that programs make when the connections of pods have taken the ports from 1024 on, one each, and
// seven packets found none.
func exhaust(t *testing.T, dp *datapath.Datapath, node netip.Addr, to netip.AddrPort, pods ...netip.Addr) {
	t.Helper()
	const udp = 17
	for i, pod := range pods {
		port := uint16(1024 + i)
		k, fromHi := bpf.ConnKeyOf(netip.AddrPortFrom(pod, port), to, udp)
		c := bpf.Conn{Flags: bpf.ConnNAT, NATAddr: bpf.AddrFrom(node), NATPort: bpf.ToBE16(port)}
		if fromHi {
			c.Flags |= bpf.ConnInitiatorHi
		}
		translated, _ := bpf.ConnKeyOf(netip.AddrPortFrom(node, port), to, udp)
		if err := dp.Map("lash_conn").Put(&k, &c); err != nil {
			t.Fatal(err)
		}
		if err := dp.Map("lash_nat").Put(&translated, &k); err != nil {
			t.Fatal(err)
		}
	}
	key := bpf.SNATFullKey{NAT: bpf.AddrFrom(node), Dst: bpf.AddrFrom(to.Addr()), Dport: bpf.ToBE16(to.Port()), Proto: udp}
	if err := dp.Map("lash_snat_full").Put(&key, &bpf.SNATFull{Packets: 7, Last: ticks(t, dp)}); err != nil {
		t.Fatal(err)
	}
}

// age has the last packets without a port been dropped long ago, or now.
func age(t *testing.T, dp *datapath.Datapath, long bool) {
	t.Helper()
	full := map[bpf.SNATFullKey]bpf.SNATFull{}
	var k bpf.SNATFullKey
	var v bpf.SNATFull
	rows := dp.Map("lash_snat_full").Iterate()
	for rows.Next(&k, &v) {
		full[k] = v
	}
	for k, v := range full {
		v.Last = ticks(t, dp)
		if long {
			v.Last -= 100 * 1000 // more than a minute at any CONFIG_HZ
		}
		if err := dp.Map("lash_snat_full").Put(&k, &v); err != nil {
			t.Fatal(err)
		}
	}
	if rows.Err() != nil || len(full) != 2 {
		t.Fatalf("rows %v, %v", full, rows.Err())
	}
}

// ticks is the kernel's time as its programs have it.
func ticks(t *testing.T, dp *datapath.Datapath) uint32 {
	t.Helper()
	if _, err := dp.ExhaustedPorts(0); err != nil { // reads the clock
		t.Fatal(err)
	}
	var rt bpf.Runtime
	if err := dp.Map("lash_runtime").Lookup(uint32(0), &rt); err != nil {
		t.Fatal(err)
	}
	return uint32(rt.Ticks)
}
