// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"

	"github.com/lash-net/lash/bpf"
	"github.com/lash-net/lash/internal/testutil"
)

var update = flag.Bool("update", false, "write the golden files")

// features are the load-time switches; each set of them is another program to the verifier.
var switches = map[string]func(*bpf.Constants){
	"host-routing": func(c *bpf.Constants) { c.HostRouting = true },
	"masquerade4":  func(c *bpf.Constants) { c.Masquerade4 = true },
	"masquerade6":  func(c *bpf.Constants) { c.Masquerade6 = true },
	"native-cidrs": func(c *bpf.Constants) {
		c.Native4Net, c.Native4Mask = bpf.PrefixFrom(netip.MustParsePrefix("10.0.0.0/8"))
		c.Native6Net, c.Native6Mask = bpf.PrefixFrom(netip.MustParsePrefix("fd00::/48"))
	},
	"services": func(c *bpf.Constants) {
		c.Services, c.DSR, c.LBRefuse, c.MaglevSize, c.XDPCPUs = true, true, true, 16381, 2
	},
	"tunnel": func(c *bpf.Constants) { c.OverlayIfindex, c.TunnelPort = 5, 8472 },
	"pod-cidrs": func(c *bpf.Constants) {
		c.Pod4Net, c.Pod4Mask = bpf.PrefixFrom(netip.MustParsePrefix("10.0.1.0/24"))
		c.Pod6Net, c.Pod6Mask = bpf.PrefixFrom(netip.MustParsePrefix("fd00::100/120"))
	},
}

func sets() map[string][]string {
	all := slices.Sorted(maps.Keys(switches))
	out := map[string][]string{"none": nil, "all": all}
	for _, name := range all {
		out["only "+name] = []string{name}
	}
	return out
}

// verified loads one object with some switches on and returns each program's count of verified instructions.
func verified(t *testing.T, object string, on []string, have Features) map[string]uint32 {
	t.Helper()
	spec, err := bpf.Load(object)
	if err != nil {
		t.Fatal(err)
	}
	c := &bpf.Constants{HZ: 250, SNATMin: 1024, SNATMax: 29999, HostIfindex: 3, HaveSetRetval: have.SetRetval}
	for _, name := range on {
		switches[name](c)
	}
	if err := bpf.Specialise(spec, c); err != nil {
		t.Fatal(err)
	}
	for _, m := range spec.Maps {
		m.MaxEntries = min(m.MaxEntries, 4096) // a ring has at least a page
	}
	coll, err := ebpf.NewCollection(spec)
	if err != nil {
		t.Errorf("object %s with %v: %v", object, on, err)
		return nil
	}
	defer coll.Close()
	counts := map[string]uint32{}
	for name, p := range coll.Programs {
		info, err := p.Info()
		if err != nil {
			t.Fatal(err)
		}
		n, _ := info.VerifiedInstructions() // 5.16 and newer
		counts[name] = n
	}
	return counts
}

// Every object loads with every switch off, on, and each alone; what that costs the
// verifier is on record. Counts differ from kernel to kernel, so each has its own file.
func TestEveryObjectLoadsWithEachSwitch(t *testing.T) {
	testutil.NeedRoot(t)
	if err := rlimit.RemoveMemlock(); err != nil {
		t.Log(err)
	}
	have := Probe()
	got := map[string]uint32{}
	for set, on := range sets() {
		for object := range bpf.Programs {
			for program, n := range verified(t, object, on, have) {
				got[program+", "+set] = n
			}
		}
	}
	if t.Failed() {
		return
	}
	golden := filepath.Join("testdata", "instructions-"+kernel(t)+".json")
	if *update {
		b, err := json.MarshalIndent(got, "", "  ")
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(golden, append(b, '\n'), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile(golden)
	if err != nil {
		t.Skipf("all objects load; no counts on record for this kernel (%s): run with -update", golden)
	}
	want := map[string]uint32{}
	if err := json.Unmarshal(b, &want); err != nil {
		t.Fatal(err)
	}
	for _, name := range slices.Sorted(maps.Keys(got)) {
		// The verifier's path depends a little on the compiler's patch level; growth beyond a tenth is a change to look at.
		if float64(got[name]) > 1.1*float64(want[name])+100 {
			t.Errorf("%s: %d instructions verified, %d on record (-update if that is wanted)", name, got[name], want[name])
		}
	}
}

func kernel(t *testing.T) string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	parts := strings.SplitN(unix.ByteSliceToString(u.Release[:]), ".", 3)
	return fmt.Sprintf("%s.%s", parts[0], parts[1])
}
