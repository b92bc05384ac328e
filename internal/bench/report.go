// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"
)

// Report is what `lash bench` prints and writes.
type Report struct {
	Kernel     string        `json:"kernel"`
	Machine    string        `json:"machine"` // model of its CPU and their number
	Time       time.Time     `json:"time"`
	Rounds     int           `json:"rounds"`
	CellTime   time.Duration `json:"cellTime"`
	RealTime   bool          `json:"realTime"` // both ends ran at real-time priority
	Congestion string        `json:"congestionControl"`
	Results    []Row         `json:"results"`
	Families   []FamilyPair  `json:"families"`
	Programs   []ProgramCost `json:"programs"`
	Lookups    []Lookups     `json:"lookups,omitempty"`
	Cells      []Cell        `json:"cells"`
	OK         bool          `json:"ok"` // every gate is kept and no cell failed
}

// Row is one path, kind and family.
type Row struct {
	Group   string  `json:"group"`
	Path    string  `json:"path"`
	Kind    string  `json:"kind"`
	Family  int     `json:"family"`
	Median  float64 `json:"median"`
	Best    float64 `json:"best"`
	Ratio   float64 `json:"ratio,omitempty"` // median of the rounds' ratios to the baseline
	Low     float64 `json:"ratioLow,omitempty"`
	High    float64 `json:"ratioHigh,omitempty"` // quartiles of them
	Limit   float64 `json:"limitRatio,omitempty"`
	Cilium  float64 `json:"ciliumRatio,omitempty"`
	Gate    float64 `json:"gate,omitempty"`
	Verdict string  `json:"verdict,omitempty"` // "pass", "FAIL", or empty without a gate
	Failed  int     `json:"failed,omitempty"`  // rounds without a figure
}

// FamilyPair compares a path's IPv6 with its IPv4.
type FamilyPair struct {
	Path    string  `json:"path"`
	Kind    string  `json:"kind"`
	Raw     float64 `json:"raw"`        // median over rounds of v6/v4
	Ratio   float64 `json:"toBaseline"` // the same of both families' ratios to their own baselines
	Verdict string  `json:"verdict,omitempty"`
}

const (
	pass = "pass"
	miss = "FAIL"
)

func newReport(o Options, b *bed, cells []Cell, programs []ProgramCost) *Report {
	r := &Report{
		Kernel: kernelRelease(), Machine: machine(), Time: time.Now().UTC(), Rounds: o.Rounds, CellTime: o.Cell,
		RealTime: b.realTime, Congestion: b.congestion, Programs: programs, Cells: cells,
	}
	r.evaluate(o.Paths, o.Kinds, o.Families)
	return r
}

// evaluate fills Results, Families and OK from Cells.
func (r *Report) evaluate(paths []Path, kinds []string, families []int) {
	type key struct {
		round, family      int
		path, beside, kind string
	}
	type side struct {
		round, family int
		path, kind    string
	}
	figures, raw := map[key]float64{}, map[side][]float64{}
	for _, c := range r.Cells {
		if c.Error == "" && c.Value > 0 {
			figures[key{c.Round, c.Family, c.Path, c.Beside, c.Kind}] = c.Value
			s := side{c.Round, c.Family, c.Path, c.Kind}
			raw[s] = append(raw[s], c.Value)
		}
	}
	r.OK = len(r.Cells) > 0
	for _, p := range paths {
		for _, kind := range kinds {
			if !p.carries(kind) {
				continue
			}
			for _, family := range families {
				row := Row{Group: p.Group, Path: p.Name, Kind: kind, Family: family}
				var values, ratios []float64
				for round := range r.Rounds {
					all := raw[side{round, family, p.Name, kind}]
					if len(all) == 0 {
						row.Failed++
						continue
					}
					values = append(values, all...)
					v, ok := figures[key{round, family, p.Name, "", kind}]
					base, compared := figures[key{round, family, p.Against, p.Name, kind}]
					if ok && compared {
						ratios = append(ratios, v/base)
					} else if p.Against != "" {
						row.Failed++
					}
				}
				row.Median, row.Best = quantile(values, .5), best(kind, values)
				if p.Against != "" {
					row.Ratio, row.Low, row.High = quantile(ratios, .5), quantile(ratios, .25), quantile(ratios, .75)
					ref := references[p.Group][kind]
					row.Limit, row.Cilium = ref.limit, ref.cilium
				}
				if gate, ok := gates[p.Group][kind]; ok && p.Gated && family == 4 {
					row.Gate, row.Verdict = gate, pass
					if len(ratios) == 0 || !within(kind, row.Ratio, gate) {
						row.Verdict = miss
					}
				}
				r.OK = r.OK && row.Failed == 0 && row.Verdict != miss
				r.Results = append(r.Results, row)
			}
			if slices.Contains(families, 4) && slices.Contains(families, 6) {
				var plain, relative []float64
				for round := range r.Rounds {
					v4, v6 := quantile(raw[side{round, 4, p.Name, kind}], .5), quantile(raw[side{round, 6, p.Name, kind}], .5)
					if v4 == 0 || v6 == 0 {
						continue
					}
					plain = append(plain, v6/v4)
					v4, v6 = figures[key{round, 4, p.Name, "", kind}], figures[key{round, 6, p.Name, "", kind}]
					b4, b6 := figures[key{round, 4, p.Against, p.Name, kind}], figures[key{round, 6, p.Against, p.Name, kind}]
					if v4 > 0 && v6 > 0 && b4 > 0 && b6 > 0 {
						relative = append(relative, (v6/b6)/(v4/b4))
					}
				}
				f := FamilyPair{Path: p.Name, Kind: kind, Raw: quantile(plain, .5), Ratio: quantile(relative, .5)}
				if _, ok := gates[p.Group][kind]; ok && p.Gated {
					f.Verdict = pass
					gate := 1 - familyGate
					if lessIsMore(kind) {
						gate = 1 + familyGate
					}
					if len(relative) == 0 || !within(kind, f.Ratio, gate) {
						f.Verdict = miss
					}
				}
				r.OK = r.OK && f.Verdict != miss
				r.Families = append(r.Families, f)
			}
		}
	}
}

// quantile interpolates between the ordered values; 0 without any.
func quantile(values []float64, q float64) float64 {
	if len(values) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(values))
	at := q * float64(len(s)-1)
	i := int(at)
	if i+1 == len(s) {
		return s[i]
	}
	return s[i] + (at-float64(i))*(s[i+1]-s[i])
}

func best(kind string, values []float64) float64 {
	switch {
	case len(values) == 0:
		return 0
	case lessIsMore(kind):
		return slices.Min(values)
	}
	return slices.Max(values)
}

// units are what the figures of a kind are in, and how to print one.
var units = map[string]struct {
	name   string
	format string
	scale  float64
}{
	RR: {"µs", "%.2f", 1}, CRR: {"k/s", "%.1f", 1e-3}, Stream: {"Gbit/s", "%.1f", 1}, StreamX: {"Gbit/s", "%.1f", 1}, Flood: {"kpps", "%.0f", 1e-3},
}

// Print writes the tables.
func (r *Report) Print(w io.Writer) error {
	priority := "real-time priority"
	if !r.RealTime {
		priority = "ORDINARY PRIORITY: real-time was not permitted, figures are noisier"
	}
	fmt.Fprintf(w, "%s, kernel %s, %d rounds of %s cells, %s, %s\n", r.Machine, r.Kernel, r.Rounds, r.CellTime, r.Congestion, priority)
	fmt.Fprintf(w, "Ratios are medians over rounds of the figure divided by its baseline's, measured beside it by turns.\n\n")
	t := tabwriter.NewWriter(w, 2, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "group\tpath\tkind\tIP\tmedian\tbest\tunit\tratio\tquartiles\tlimit\tCilium\tgate\tverdict\t")
	for _, x := range r.Results {
		u := units[x.Kind]
		fmt.Fprintf(t, "%s\t%s\t%s\tv%d\t"+u.format+"\t"+u.format+"\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t\n", x.Group, x.Path, x.Kind, x.Family,
			x.Median*u.scale, x.Best*u.scale, u.name, ratio(x.Ratio), quartiles(x), ratio(x.Limit), ratio(x.Cilium), gateText(x), verdictText(x))
	}
	if err := t.Flush(); err != nil {
		return err
	}
	if err := r.printModes(w); err != nil {
		return err
	}
	if len(r.Families) > 0 {
		fmt.Fprintf(w, "\nIPv6 against IPv4, of the same round (gate: within %.0f %%, each family relative to its own baseline)\n", familyGate*100)
		t = tabwriter.NewWriter(w, 2, 0, 2, ' ', tabwriter.AlignRight)
		fmt.Fprintln(t, "path\tkind\tv6/v4\trelative\tverdict\t")
		for _, f := range r.Families {
			fmt.Fprintf(t, "%s\t%s\t%.3f\t%s\t%s\t\n", f.Path, f.Kind, f.Raw, ratio(f.Ratio), dash(f.Verdict))
		}
		if err := t.Flush(); err != nil {
			return err
		}
	}
	if len(r.Programs) > 0 {
		fmt.Fprintf(w, "\nPrograms, by the kernel's run statistics (about 40 ns of each run are its clock)\n")
		t = tabwriter.NewWriter(w, 2, 0, 2, ' ', tabwriter.AlignRight)
		fmt.Fprintln(t, "path\tkind\tIP\tprogram\tid\tns a run\truns\tper\t")
		for _, p := range r.Programs {
			per := map[string]string{RR: "exchange", CRR: "connection", Flood: "datagram"}[p.Kind]
			if per == "" {
				per = "64 KiB"
			}
			fmt.Fprintf(t, "%s\t%s\tv%d\t%s\t%d\t%.0f\t%.2f\t%s\t\n", p.Path, p.Kind, p.Family, p.Program, p.ID, p.NS, p.Runs, per)
		}
		if err := t.Flush(); err != nil {
			return err
		}
	}
	if err := printLookups(w, r.Lookups); err != nil {
		return err
	}
	passed, gated := 0, 0
	for _, v := range r.verdicts() {
		gated++
		if v == pass {
			passed++
		}
	}
	_, err := fmt.Fprintf(w, "\nbench: %d of %d gates kept\n", passed, gated)
	return err
}

// printModes compares the ways between nodes with each other.
func (r *Report) printModes(w io.Writer) error {
	modes := []struct{ title, path string }{{"node", Bare}, {"VXLAN", "lash-vxlan"}, {"native", "lash-across"}, {"legacy", "lash-legacy"}}
	ratios := map[string]map[string]float64{}
	for _, x := range r.Results {
		if x.Family == 4 {
			if ratios[x.Kind] == nil {
				ratios[x.Kind] = map[string]float64{}
			}
			ratios[x.Kind][x.Path] = x.Ratio
		}
	}
	fmt.Fprintf(w, "\nBetween nodes, IPv4, as ratios to node to node\n")
	t := tabwriter.NewWriter(w, 2, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprint(t, "kind\t")
	for _, m := range modes {
		fmt.Fprint(t, m.title, "\t")
	}
	fmt.Fprintln(t)
	for _, kind := range Kinds {
		if _, ok := ratios[kind][Bare]; !ok {
			continue
		}
		fmt.Fprint(t, kind, "\t")
		for _, m := range modes {
			x := ratios[kind][m.path]
			if m.path == Bare {
				x = 1
			}
			fmt.Fprint(t, ratio(x), "\t")
		}
		fmt.Fprintln(t)
	}
	return t.Flush()
}

func (r *Report) verdicts() []string {
	var all []string
	for _, x := range r.Results {
		all = append(all, x.Verdict)
	}
	for _, f := range r.Families {
		all = append(all, f.Verdict)
	}
	for _, l := range r.Lookups {
		all = append(all, l.Verdict)
	}
	return slices.DeleteFunc(all, func(v string) bool { return v == "" })
}

func ratio(x float64) string {
	if x == 0 {
		return "-"
	}
	return fmt.Sprintf("%.3f", x)
}

func quartiles(x Row) string {
	if x.Ratio == 0 {
		return "-"
	}
	return fmt.Sprintf("%.3f..%.3f", x.Low, x.High)
}

func gateText(x Row) string {
	if x.Gate == 0 {
		return "-"
	}
	if lessIsMore(x.Kind) {
		return fmt.Sprintf("<=%.2f", x.Gate)
	}
	return fmt.Sprintf(">=%.2f", x.Gate)
}

func verdictText(x Row) string {
	if x.Failed > 0 {
		return strings.TrimSpace(fmt.Sprintf("%s %d rounds failed", x.Verdict, x.Failed))
	}
	return dash(x.Verdict)
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// WriteJSON writes a report to a file, making its folder.
func WriteJSON(path string, report any) error {
	text, err := json.MarshalIndent(report, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, append(text, '\n'), 0o644)
}

func kernelRelease() string {
	var uts unix.Utsname
	if unix.Uname(&uts) != nil {
		return "unknown"
	}
	return unix.ByteSliceToString(uts.Release[:])
}

func machine() string {
	text, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(text)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
			return fmt.Sprintf("%d CPUs %s", runtime.NumCPU(), strings.TrimSpace(value))
		}
	}
	return fmt.Sprintf("%d CPUs", runtime.NumCPU())
}
