// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"

	"github.com/lash-net/lash/internal/config"
	"github.com/lash-net/lash/internal/model"
	"github.com/lash-net/lash/internal/state"
)

func TestUnmanagedPodsAreRestartedOnceWhenFoundTwice(t *testing.T) {
	pod := func(name string, tweak func(*state.Pod)) state.Pod {
		p := state.Pod{Namespace: "d", Name: name, UID: name, Phase: "Running", Running: true, Controlled: true}
		if tweak != nil {
			tweak(&p)
		}
		return p
	}
	pods := []state.Pod{
		pod("old", nil),
		pod("ours", nil),
		pod("host", func(p *state.Pod) { p.HostNetwork = true }),
		pod("leaving", func(p *state.Pod) { p.Terminating = true }),
		pod("starting", func(p *state.Pod) { p.Running = false }),
		pod("done", func(p *state.Pod) { p.Phase = "Succeeded" }),
		pod("bare", func(p *state.Pod) { p.Controlled = false }),
		pod("static", func(p *state.Pod) { p.Mirror = true }),
	}
	managed := func(p state.Pod) bool { return p.Name == "ours" }
	names := func(pods []state.Pod) string {
		var s []string
		for _, p := range pods {
			s = append(s, p.Name)
		}
		return strings.Join(s, " ")
	}
	var w unmanagedWatch
	for i, want := range []struct{ restart, lost string }{{"", ""}, {"old", "bare static"}, {"", ""}} {
		restart, lost := w.look(pods, managed)
		if names(restart) != want.restart || names(lost) != want.lost {
			t.Errorf("look %d: restart %q, lost %q; want %+v", i, names(restart), names(lost), want)
		}
	}
	w.again(pods[0])
	if restart, _ := w.look(pods, managed); names(restart) != "old" {
		t.Errorf("after a failed restart: %q", names(restart))
	}
	// One that is gone and comes back under the same name is another pod.
	w.look(nil, managed)
	if restart, _ := w.look(pods, managed); len(restart) != 0 {
		t.Errorf("restarted at first sight: %q", names(restart))
	}
}

func TestWidestCgroup2(t *testing.T) {
	for _, tc := range []struct{ name, in, want string }{
		{"unified", "30 24 0:26 / /sys/fs/cgroup rw shared:9 - cgroup2 cgroup2 rw", "/sys/fs/cgroup"},
		{"hybrid", "30 24 0:26 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n31 24 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw", "/sys/fs/cgroup/unified"},
		{"the host's beside the container's", "30 24 0:26 /kubepods/pod1 /sys/fs/cgroup ro - cgroup2 cgroup ro\n31 24 0:26 / /run/lash/cgroup rw - cgroup2 cgroup rw", "/run/lash/cgroup"},
		{"none", "22 1 0:21 / /proc rw - proc proc rw\nnonsense", ""},
	} {
		if got := widestCgroup2(strings.NewReader(tc.in)); got != tc.want {
			t.Errorf("%s: got %q, want %q", tc.name, got, tc.want)
		}
	}
}

func TestOnlyOneAgentRuns(t *testing.T) {
	path := filepath.Join(t.TempDir(), "run", "agent.lock")
	unlock, err := lock(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := lock(ctx, path); err == nil || !strings.Contains(err.Error(), "another agent") {
		t.Errorf("a second agent: %v", err)
	}
	unlock()
	unlock, err = lock(t.Context(), path)
	if err != nil {
		t.Fatalf("after the first has ended: %v", err)
	}
	unlock()
}

func TestGroupEndsAllPartsAndSaysWhichFailed(t *testing.T) {
	g, _ := newGroup(t.Context())
	stopped := make(chan struct{})
	g.start("good", func(ctx context.Context) error { <-ctx.Done(); close(stopped); return ctx.Err() })
	g.start("done", func(context.Context) error { return nil })
	g.start("bad", func(context.Context) error { return errors.New("no socket") })
	if err := g.wait(); err == nil || err.Error() != "bad: no socket" {
		t.Errorf("got %v", err)
	}
	<-stopped

	ctx, cancel := context.WithCancel(t.Context())
	g, _ = newGroup(ctx)
	g.start("good", func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() })
	cancel()
	if err := g.wait(); err != nil {
		t.Errorf("told to end, got %v", err)
	}
}

// A node that ran before starts with what it knew; families that were switched off since are left out.
func TestLocalNodeSurvivesARestart(t *testing.T) {
	cfg := config.Default()
	cfg.StateDir, cfg.EnableIPv6 = t.TempDir(), true
	newAgent := func(name string) *agent {
		tables, err := state.New()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { tables.Stop() })
		return &agent{cfg: cfg, log: slog.New(slog.DiscardHandler), name: name, tables: tables, nodeCfg: nodeConfig(cfg, name)}
	}
	want := model.Node{
		Name: "n1", Local: true, Source: model.SourceLocal,
		Addrs:    []netip.Addr{netip.MustParseAddr("172.18.0.1"), netip.MustParseAddr("fd18::1")},
		PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.0.1.0/24"), netip.MustParsePrefix("fd00::100/120")},
		Routers:  []netip.Addr{netip.MustParseAddr("10.0.1.1"), netip.MustParseAddr("fd00::101")},
	}
	if _, err := newAgent("n1").updateLocal(func(model.Node) model.Node { return want }); err != nil {
		t.Fatal(err)
	}
	for _, mode := range []string{"cluster-pool", "kubernetes"} {
		cfg.IPAM = mode
		a := newAgent("n1")
		a.restoreLocal()
		if got, ok := a.local(a.tables.DB.ReadTxn()); !ok || !state.EqualNode(got, want) {
			t.Errorf("%s: got %+v, want %+v", mode, got, want)
		}
	}
	cfg.EnableIPv6 = false
	a := newAgent("n1")
	a.restoreLocal()
	if got, _ := a.local(a.tables.DB.ReadTxn()); len(got.Addrs) != 1 || len(got.PodCIDRs) != 1 || len(got.Routers) != 1 {
		t.Errorf("without IPv6: got %+v", got)
	}
	other := newAgent("n2")
	other.restoreLocal()
	if _, ok := other.local(other.tables.DB.ReadTxn()); ok {
		t.Error("a checkpoint of another node was used")
	}
}

// The lines that users grep for.
func TestLogFormat(t *testing.T) {
	var b bytes.Buffer
	newLogger(&b, false).Info("  --enable-host-legacy-routing='false'", "subsys", "daemon")
	if want := `level=info msg="  --enable-host-legacy-routing='false'" subsys=daemon`; !strings.Contains(b.String(), want) {
		t.Errorf("got %s, want %s", b.String(), want)
	}
}
