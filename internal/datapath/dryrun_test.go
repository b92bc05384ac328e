// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"

	"github.com/lash-net/lash/bpf"
	"github.com/lash-net/lash/internal/testutil"
)

func TestEveryMapIsReadOrWritten(t *testing.T) {
	seen := map[string]bool{}
	for object := range bpf.Programs {
		spec, err := bpf.Load(object)
		if err != nil {
			t.Fatal(err)
		}
		for name := range spec.Maps {
			if _, known := programsWrite[name]; isOurs(name) && !known {
				t.Errorf("map %s of object %s: say in programsWrite (dryrun.go) whether programs write it", name, object)
			}
			seen[name] = true
		}
	}
	for name := range programsWrite {
		if !seen[name] {
			t.Errorf("no object has map %s: take it out of programsWrite (dryrun.go)", name)
		}
	}
	// Every object with a program that runs on packets takes part.
	for object, programs := range bpf.Programs {
		if object == "sock" || object == "sockmap" {
			continue // on sockets
		}
		if !slices.Contains(dryObjects, object) {
			t.Errorf("object %s is not in dryObjects (dryrun.go)", object)
		}
		for _, name := range programs {
			if _, ok := hookOf[name]; name != "clock" && !ok {
				t.Errorf("program %s is not in hookOf (dryrun.go)", name)
			}
		}
	}
}

// The verifier itself says that programs only read what a dry run shares with the live programs: it refuses a program that
// writes a map which it may not.
func TestProgramsOnlyReadWhatADryRunShares(t *testing.T) {
	testutil.NeedRoot(t)
	if err := rlimit.RemoveMemlock(); err != nil {
		t.Log(err)
	}
	load := func(object string, readOnly func(string) bool) error {
		c := &bpf.Constants{HZ: 250, SNATMin: 1024, SNATMax: 29999, HostIfindex: 3, HostRouting: true, Masquerade4: true, Masquerade6: true, OverlayIfindex: 5, TunnelPort: 8472}
		coll, err := loadObject(object, c, func(name string, spec *ebpf.MapSpec) (*ebpf.Map, error) {
			spec.MaxEntries = min(spec.MaxEntries, 4096)
			redirects := spec.Type == ebpf.DevMapHash || spec.Type == ebpf.CPUMap // which programs can never write
			if readOnly(name) && !redirects {
				spec.Flags |= unix.BPF_F_RDONLY_PROG
			}
			m, err := newMap(name, spec)
			if err == nil {
				t.Cleanup(func() { m.Close() })
			}
			return m, err
		})
		if err == nil {
			coll.Close()
		}
		return err
	}
	for _, object := range dryObjects {
		if err := load(object, func(name string) bool { return !programsWrite[name] }); err != nil {
			t.Errorf("object %s: %v", object, err)
		}
	}
	// And it would have said so.
	if load("pod", func(name string) bool { return name == "lash_conn" || !programsWrite[name] }) == nil {
		t.Error("the verifier let programs write a map that is read only")
	}
}
