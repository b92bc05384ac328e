// SPDX-License-Identifier: Apache-2.0

package netns

import (
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"

	"github.com/lash-net/lash/bpf"
	"github.com/lash-net/lash/internal/datapath"
)

// An agent that starts again takes the programs of the one before, unless it would make others; nothing of those remains.
func TestProgramsAreVerifiedOnce(t *testing.T) {
	c := newCluster(t, options{podsPerNode: 1})
	n, far := c.nodes[0], c.nodes[1].pods[0]
	serve(t, far.ns, far.ip4)
	var names []string
	for _, object := range bpf.Programs {
		names = append(names, object...)
	}
	ids := func(d *datapath.Datapath) (map[string]ebpf.ProgramID, error) {
		out := map[string]ebpf.ProgramID{}
		for _, name := range names {
			info, err := d.Program(name).Info()
			if err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
			out[name], _ = info.ID()
		}
		return out, nil
	}
	cfg := n.dp.Config()
	var before map[string]ebpf.ProgramID
	n.do(t, "programs", func() (err error) { before, err = ids(n.dp); return err })
	// start is another agent's start. same: its programs are those of before.
	start := func(what string, cfg datapath.Config, same func(name string) bool) {
		t.Helper()
		n.do(t, what, func() error {
			d, err := datapath.Open(cfg, slog.New(slog.DiscardHandler))
			if err != nil {
				return err
			}
			defer d.Close()
			now, err := ids(d)
			if err != nil {
				return err
			}
			for _, name := range names {
				if (now[name] == before[name]) != same(name) {
					return fmt.Errorf("program %s is %d, and was %d", name, now[name], before[name])
				}
			}
			before = now
			dirs, err := os.ReadDir(filepath.Join(cfg.Root, "programs"))
			if err != nil || len(dirs) != len(bpf.Programs) {
				return fmt.Errorf("%d directories of programs, want %d: %v", len(dirs), len(bpf.Programs), err)
			}
			pinned := map[string]bool{}
			for _, dir := range dirs {
				pins, err := os.ReadDir(filepath.Join(cfg.Root, "programs", dir.Name()))
				if err != nil {
					return err
				}
				for _, pin := range pins {
					pinned[pin.Name()] = true
				}
			}
			if diff := cmp.Diff(slices.Sorted(slices.Values(names)), slices.Sorted(maps.Keys(pinned))); diff != "" {
				return fmt.Errorf("pinned: -want +got\n%s", diff)
			}
			for _, dev := range []string{"eth0", n.pods[0].name} {
				ifindex, _, err := linkOf(dev)
				if err != nil {
					return err
				}
				attach := d.AttachPod
				if dev == "eth0" {
					attach = d.AttachDevice
				}
				if err := attach(ifindex, dev); err != nil {
					return err
				}
			}
			return nil
		})
		if _, err := exchange(n.pods[0].ns, netip.AddrPortFrom(far.ip4, servedPort), 10_000); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	all, none := func(string) bool { return true }, func(string) bool { return false }
	start("the same again", cfg, all)
	other := cfg
	other.DropNoBackend = true
	start("other constants", other, none)
	start("once more", other, all)
	bigger := other
	bigger.ConnMax *= 2
	start("another map", bigger, none) // all have lash_conn
	n.do(t, "an agent that was ended while it pinned", func() error {
		pins, err := filepath.Glob(filepath.Join(cfg.Root, "programs", "netdev-*", "to_netdev"))
		if err != nil || len(pins) != 1 {
			return fmt.Errorf("%v: %v", pins, err)
		}
		return os.Remove(pins[0])
	})
	start("after one that was ended", bigger, func(name string) bool { return !slices.Contains(bpf.Programs["netdev"], name) })
}
