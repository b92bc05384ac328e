// SPDX-License-Identifier: Apache-2.0

package packet

import (
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/lash-net/lash/bpf"
)

// reached are the drops that the tests of this run have seen.
var reached = map[bpf.DropKey]bool{}

// unreachable tells of a drop, by its source line and the one before, why no single packet brings it about; "" if one should.
func unreachable(name, before, line string) string {
	switch {
	case strings.Contains(line, "DROP_WRITE"):
		return "the kernel refuses to write where the parser has read only when it is out of memory"
	case name == "overlay.c" && !strings.Contains(line, "DROP_TUNNEL_KEY") && !strings.Contains(line, "DROP_UNSUPPORTED_L3"):
		return "a test run's packet comes out of no tunnel"
	case strings.Contains(line, "DROP_VLAN"):
		return "a test run cannot give a packet a tag that is off the frame: see TestTaggedFramesOfPodsDoNotLeave in test/netns"
	case strings.Contains(before, "if (!scratch)"):
		return "the row of a per-CPU array is always there"
	case strings.Contains(before, "data + want > end"):
		return "the kernel runs no program on less than an L3 header; a device may"
	case strings.Contains(before, "if (!c)") && strings.Contains(line, "DROP_CT_INSERT"):
		return "another CPU must remove the record that was just made"
	}
	return ""
}

// Every drop of the programs' sources is one that a test has seen, or it is said why not.
func TestEveryDropIsReached(t *testing.T) {
	if len(reached) == 0 {
		t.Skip("no test of the tables ran before this one")
	}
	// FILE_ID of each source, as enum file_id has it.
	ids := map[string]uint8{"pod.c": bpf.FilePod, "netdev.c": bpf.FileNetdev, "host.c": bpf.FileHost, "overlay.c": bpf.FileOverlay, "parse.h": bpf.FileParse, "conn.h": bpf.FileConn, "nat.h": bpf.FileNAT, "route.h": bpf.FileRoute, "forward.h": bpf.FileRoute, "lb.h": bpf.FileLB, "dsr.h": bpf.FileDSR, "snat.h": bpf.FileSNAT, "xdp.c": bpf.FileXDP}
	drop := regexp.MustCompile(`DROP\(&?p, (DROP_\w+)\)`)
	for _, path := range slices.Concat(glob(t, "../../bpf/*.c"), glob(t, "../../bpf/lib/*.h")) {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		name := filepath.Base(path)
		lines := strings.Split(string(text), "\n")
		for i, line := range lines {
			m := drop.FindStringSubmatch(line)
			if m == nil {
				continue
			}
			id, ok := ids[name]
			if !ok {
				t.Fatalf("%s drops, and this test does not know its FILE_ID", name)
			}
			found := slices.ContainsFunc(slices.Collect(maps.Keys(reached)), func(k bpf.DropKey) bool { return k.File == id && int(k.Line) == i+1 })
			switch why := unreachable(name, lines[i-1], line); {
			case !found && why == "":
				t.Errorf("%s:%d: no test reaches %s", name, i+1, m[1])
			case found && why != "":
				t.Errorf("%s:%d: %s was reached, though %s", name, i+1, m[1], why)
			}
		}
	}
}

func glob(t *testing.T, pattern string) []string {
	files, err := filepath.Glob(pattern)
	if err != nil || len(files) == 0 {
		t.Fatalf("%s: %v", pattern, err)
	}
	return files
}
