// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// TestMain makes the test binary the worker that the bench executes.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == WorkerArg {
		if err := RunWorker(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// sample is two rounds of one gated path and its baseline.
func sample(values map[string][2]float64) *Report {
	r := &Report{Rounds: 2}
	for name, v := range values {
		path, rest, _ := strings.Cut(name, "/")
		kind, family, _ := strings.Cut(rest, "/")
		beside := ""
		if path == Direct {
			beside = "lash-same"
		}
		for round, x := range v {
			r.Cells = append(r.Cells, Cell{Round: round, Path: path, Beside: beside, Kind: kind, Family: int(family[0] - '0'), Value: x})
		}
	}
	return r
}

var twoPaths = []Path{
	{Name: Direct, Group: SameNode},
	{Name: "lash-same", Group: SameNode, Against: Direct, Gated: true},
}

func TestRatiosArePairedWithinARound(t *testing.T) {
	// The machine was twice as slow in the second round: paired, that vanishes.
	r := sample(map[string][2]float64{"direct/rr/4": {5, 10}, "lash-same/rr/4": {5.25, 10.5}})
	r.evaluate(twoPaths, []string{RR}, []int{4})
	got := r.Results[1]
	if got.Ratio != 1.05 || got.Best != 5.25 || got.Verdict != pass || !r.OK {
		t.Errorf("got %+v, ok %v", got, r.OK)
	}
	if r.Results[0].Ratio != 0 || r.Results[0].Verdict != "" {
		t.Errorf("the baseline is compared with something: %+v", r.Results[0])
	}
}

func TestABaselineIsComparedWithWhatItWasMeasuredBeside(t *testing.T) {
	r := sample(map[string][2]float64{"direct/rr/4": {5, 10}, "lash-same/rr/4": {5, 10}})
	for round := range r.Rounds { // when it was the other path's turn, the machine was slow
		r.Cells = append(r.Cells, Cell{Round: round, Path: Direct, Beside: "limit-same", Kind: RR, Family: 4, Value: 100}, Cell{Round: round, Path: "limit-same", Kind: RR, Family: 4, Value: 100})
	}
	r.evaluate(append(slices.Clone(twoPaths), Path{Name: "limit-same", Group: SameNode, Against: Direct}), []string{RR}, []int{4})
	for _, x := range r.Results[1:] {
		if x.Ratio != 1 {
			t.Errorf("%s: ratio %v, want 1", x.Path, x.Ratio)
		}
	}
	if got := r.Results[0]; got.Best != 5 || got.Failed != 0 {
		t.Errorf("the baseline is the best of all its figures: %+v", got)
	}
}

func TestEveryPathIsComparedOnce(t *testing.T) {
	for _, names := range []string{"", "all", "lash-events", "direct"} {
		paths, err := Select(items(names))
		if err != nil {
			t.Fatal(err)
		}
		var wireds []*wired
		for _, p := range paths {
			wireds = append(wireds, &wired{Path: p})
		}
		measured := map[string]int{} // path and kind
		for _, c := range comparisons(wireds, Kinds) {
			measured[c.path.Name+"/"+c.kind]++
			if c.baseline != nil {
				if c.baseline.Name != c.path.Against {
					t.Errorf("%s is compared with %s", c.path.Name, c.baseline.Name)
				}
				measured[c.baseline.Name+"/"+c.kind] += 1 << 16 // at least once
			} else if c.path.Against != "" {
				t.Errorf("%s is compared with nothing", c.path.Name)
			}
		}
		for _, p := range paths {
			for _, kind := range Kinds {
				n := measured[p.Name+"/"+kind]
				if p.carries(kind) && (n == 0 || n&0xffff > 1) || !p.carries(kind) && n > 0 || p.Against != "" && p.carries(kind) && n&0xffff != 1 {
					t.Errorf("paths %q: %s of %s is measured %d times", names, kind, p.Name, n)
				}
			}
		}
	}
}

func TestGates(t *testing.T) {
	for _, c := range []struct {
		kind string
		lash float64 // against a baseline of 100
		want string
	}{
		{RR, 109, pass}, {RR, 111, miss}, {CRR, 87, pass}, {CRR, 85, miss}, {Stream, 93, pass}, {Stream, 91, miss}, {StreamX, 10, ""},
	} {
		r := sample(map[string][2]float64{"direct/" + c.kind + "/4": {100, 100}, "lash-same/" + c.kind + "/4": {c.lash, c.lash}})
		r.evaluate(twoPaths, []string{c.kind}, []int{4})
		if got := r.Results[1].Verdict; got != c.want || r.OK != (c.want != miss) {
			t.Errorf("%s %v: verdict %q, ok %v; want %q", c.kind, c.lash, got, r.OK, c.want)
		}
	}
}

func TestIPv6IsComparedRelativeToItsOwnBaseline(t *testing.T) {
	for _, c := range []struct {
		lash6 float64
		want  string
	}{{11.2, pass}, {11.5, miss}} {
		r := sample(map[string][2]float64{
			"direct/rr/4": {10, 10}, "direct/rr/6": {11, 11}, "lash-same/rr/4": {10, 10}, "lash-same/rr/6": {c.lash6, c.lash6},
		})
		r.evaluate(twoPaths, []string{RR}, []int{4, 6})
		if got := r.Families[1].Verdict; got != c.want {
			t.Errorf("%v µs against 11: %q, want %q", c.lash6, got, c.want)
		}
	}
}

func TestAFailedCellFailsTheRun(t *testing.T) {
	r := sample(map[string][2]float64{"direct/rr/4": {5, 5}, "lash-same/rr/4": {5, 5}})
	for i := range r.Cells {
		if r.Cells[i].Path == "lash-same" && r.Cells[i].Round == 1 {
			r.Cells[i].Value, r.Cells[i].Error = 0, "connect: no answer"
		}
	}
	r.evaluate(twoPaths, []string{RR}, []int{4})
	if r.OK || r.Results[1].Failed != 1 || r.Results[1].Ratio != 1 {
		t.Errorf("ok %v, %+v", r.OK, r.Results[1])
	}
	empty := &Report{Rounds: 1}
	empty.evaluate(twoPaths, []string{RR}, []int{4})
	if empty.OK || empty.Results[1].Verdict != miss {
		t.Errorf("a run without a figure: ok %v, %+v", empty.OK, empty.Results[1])
	}
}

func TestQuantileInterpolates(t *testing.T) {
	for _, c := range []struct {
		values  []float64
		q, want float64
	}{{nil, .5, 0}, {[]float64{3}, .5, 3}, {[]float64{4, 1}, .5, 2.5}, {[]float64{9, 1, 5}, .5, 5}, {[]float64{1, 2, 3, 4, 5}, .25, 2}, {[]float64{1, 2}, 1, 2}} {
		if got := quantile(c.values, c.q); got != c.want {
			t.Errorf("quantile %v of %v is %v, want %v", c.q, c.values, got, c.want)
		}
	}
}

func TestSelectBringsBaselinesAlong(t *testing.T) {
	names := func(ps []Path) (out []string) {
		for _, p := range ps {
			out = append(out, p.Name)
		}
		return out
	}
	got, err := Select([]string{"lash-host"})
	if err != nil || !slices.Equal(names(got), []string{Bare, "lash-host"}) {
		t.Errorf("got %q, %v", names(got), err)
	}
	// What a baseline is itself compared with is measured too.
	chain, err := Select([]string{"lash-events"})
	if err != nil || strings.Join(names(chain), " ") != "bare lash-across lash-events" {
		t.Errorf("got %q, %v", names(chain), err)
	}
	usual, _ := Select(nil)
	all, _ := Select([]string{"all"})
	if len(all) != len(Paths()) || len(usual) >= len(all) {
		t.Errorf("%d usual paths of %d, all are %d", len(usual), len(all), len(Paths()))
	}
	if _, err := Select([]string{"lash-hots"}); err == nil || !strings.Contains(err.Error(), "lash-host") {
		t.Errorf("a misspelt path gives %v, want the names there are", err)
	}
}

func TestEveryPathHasItsBaselineAndGates(t *testing.T) {
	all := Paths()
	seen := map[string]bool{}
	for _, p := range all {
		if seen[p.Name] {
			t.Errorf("two paths are named %s", p.Name)
		}
		seen[p.Name] = true
		if p.Against != "" && !slices.ContainsFunc(all, func(b Path) bool { return b.Name == p.Against }) {
			t.Errorf("path %s is compared with %s, which there is not", p.Name, p.Against)
		}
		if p.Gated && len(gates[p.Group]) == 0 {
			t.Errorf("path %s has no gates", p.Name)
		}
		if i := slices.IndexFunc(all, func(b Path) bool { return b.Name == p.Against }); i >= 0 {
			for _, kind := range Kinds {
				if p.carries(kind) && !all[i].carries(kind) {
					t.Errorf("%s of path %s is compared with %s, where it is not measured", kind, p.Name, p.Against)
				}
				if _, gated := gates[p.Group][kind]; p.Gated && gated && !p.carries(kind) {
					t.Errorf("%s of path %s has a gate and is not measured", kind, p.Name)
				}
			}
		}
	}
}

func TestOddFlagsAreRefused(t *testing.T) {
	for _, args := range [][]string{{"-rounds", "0"}, {"-cell", "1ms"}, {"-paths", "nowhere"}, {"-kinds", "udp"}, {"-families", "5"}, {"-kinds", ""}, {"more"}, {"-ruonds", "3"}} {
		var out bytes.Buffer
		if err := Main(context.Background(), args, "", &out, &out); err == nil || strings.Contains(err.Error(), "root") {
			t.Errorf("%q gives %v, want an error that names the flag", args, err)
		}
	}
}

func TestCompareLeavesOutTheIdle(t *testing.T) {
	before := map[ebpf.ProgramID]programRuns{1: {"busy", 100, 10}, 2: {"idle", 100, 10}}
	after := map[ebpf.ProgramID]programRuns{1: {"busy", 100 + 50*2000, 2010}, 2: {"idle", 200, 12}, 3: {"new", 90 * 1000, 1000}}
	got := compare(before, after, 1000)
	want := []ProgramCost{{Program: "busy", ID: 1, NS: 50, Runs: 2}, {Program: "new", ID: 3, NS: 90, Runs: 1}}
	if !slices.Equal(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

func TestReportIsPrintedAndWritten(t *testing.T) {
	r := sample(map[string][2]float64{"direct/rr/4": {5, 5}, "lash-same/rr/4": {5.2, 5.2}})
	r.evaluate(twoPaths, []string{RR}, []int{4})
	r.Programs = []ProgramCost{{Path: "lash-same", Kind: RR, Family: 4, Program: "from_container", NS: 95, Runs: 1}}
	var out bytes.Buffer
	if err := r.Print(&out); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"1.040", "<=1.10", "pass", "from_container", "bench: 1 of 1 gates kept"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the report lacks %q:\n%s", want, out.String())
		}
	}
	file := filepath.Join(t.TempDir(), "new", "bench.json")
	if err := WriteJSON(file, r); err != nil {
		t.Fatal(err)
	}
	var back Report
	text, _ := os.ReadFile(file)
	if err := json.Unmarshal(text, &back); err != nil || back.Results[1].Ratio != r.Results[1].Ratio {
		t.Errorf("read back %+v, %v", back.Results, err)
	}
}

// TestTraffic runs every kind over a direct pair, in both families.
func TestTraffic(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces")
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	paths, err := Select([]string{Direct})
	if err != nil {
		t.Fatal(err)
	}
	b, err := newBed(Options{Paths: paths, Say: t.Logf})
	if err != nil {
		t.Fatal(err)
	}
	defer b.close()
	for _, kind := range Kinds {
		for _, family := range []int{4, 6} {
			client, server, err := b.cell(b.paths[0], kind, family, 10*time.Millisecond, 50*time.Millisecond)
			if err != nil {
				t.Errorf("%s IPv%d: %v", kind, family, err)
				continue
			}
			if v := value(kind, client, server); v <= 0 {
				t.Errorf("%s IPv%d: %v", kind, family, v)
			}
			if kind == CRR && server.Count < client.Count {
				t.Errorf("crr: the server saw %d connections, the client made %d", server.Count, client.Count)
			}
			if kind == Flood && server.Count != client.Count { // nothing loses any between these two
				t.Errorf("pps: of %d datagrams %d were delivered", client.Count, server.Count)
			}
		}
	}
}

func TestADeadEndGivesAnErrorAndNotAFigure(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces")
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	b, err := newBed(Options{Paths: []Path{{Name: "nowhere", Setup: func(t *Topology) (Pair, error) {
		p, err := direct(t)
		p.Client, err = NewNetns("elsewhere") // from where nothing leads to the server
		if err == nil {
			t.all = append(t.all, p.Client)
		}
		return p, err
	}}}, Say: t.Logf})
	if err != nil {
		t.Fatal(err)
	}
	defer b.close()
	if _, _, err := b.cell(b.paths[0], RR, 4, 0, time.Millisecond); err == nil || !strings.Contains(err.Error(), "connect") {
		t.Errorf("got %v, want the client's connect error", err)
	}
}

func TestKernelsCountersAreRead(t *testing.T) {
	if n, ok := snmpField("Tcp: A B\nTcp: 1 2\nUdp: InDatagrams RcvbufErrors\nUdp: 7 9\n", "Udp:", "RcvbufErrors"); n != 9 || !ok {
		t.Errorf("snmp: %d, %v", n, ok)
	}
	if n, ok := snmp6Field("Ip6X \t1\nUdp6RcvbufErrors       \t12\n", "Udp6RcvbufErrors"); n != 12 || !ok {
		t.Errorf("snmp6: %d, %v", n, ok)
	}
	if _, ok := snmpField("Udp: A\nUdp: 1\n", "Udp:", "B"); ok {
		t.Error("a counter that is not there was read")
	}
}

func TestRawAddress(t *testing.T) {
	r := newRawAddr(netip.MustParseAddrPort("10.1.2.3:256"))
	if r.size != unix.SizeofSockaddrInet4 || !bytes.Equal(r.bytes[2:8], []byte{1, 0, 10, 1, 2, 3}) {
		t.Errorf("IPv4: % x, size %d", r.bytes[:8], r.size)
	}
	r = newRawAddr(netip.MustParseAddrPort("[fd00::1]:1"))
	if r.size != unix.SizeofSockaddrInet6 || r.bytes[3] != 1 || r.bytes[8] != 0xfd || r.bytes[23] != 1 {
		t.Errorf("IPv6: % x, size %d", r.bytes, r.size)
	}
}
