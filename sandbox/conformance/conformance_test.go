// SPDX-License-Identifier: Apache-2.0

package conformance

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/lash-net/lash/sandbox/build"
	"github.com/lash-net/lash/sandbox/cluster"
)

func never(string) bool { return false }

func TestEverySkipHasAReason(t *testing.T) {
	rules, err := parseRules(skipList)
	if err != nil {
		t.Fatal(err)
	}
	if len(rules) == 0 {
		t.Error("the list of skips is empty")
	}
	for _, bad := range []string{`\[X\]`, `\[X\] =>`, ` => because`, `unless moonlight: X => because`, `( => because`} {
		if _, err := parseRules(bad); err == nil || !strings.Contains(err.Error(), "line 1") {
			t.Errorf("%q was accepted: %v", bad, err)
		}
	}
}

// The list and the suite that is built here belong together: no conformance spec is skipped, every rule finds its specs.
func TestSkipsFitTheSuite(t *testing.T) {
	e2e := build.Cache(cluster.CacheDir).Bin(build.E2E)
	if _, err := os.Stat(e2e); err != nil {
		t.Skip("the suite is not built (`make conformance` builds it, and checks the same before it starts)")
	}
	rules, err := parseRules(skipList)
	if err != nil {
		t.Fatal(err)
	}
	names, err := listSpecs(t.Context(), e2e)
	if err != nil {
		t.Fatal(err)
	}
	for _, has := range []bool{false, true} {
		plan, err := makePlan(names, rules, nil, func(string) bool { return has })
		if err != nil {
			t.Fatal(err)
		}
		conformance, run := 0, 0
		seen := map[string]bool{}
		exact := regexp.MustCompile(exactly(plan))
		for _, s := range plan {
			if seen[s.Name] {
				t.Errorf("two specs are called %q", s.Name)
			}
			seen[s.Name] = true
			if s.Skip == "" {
				run++
			}
			if strings.Contains(s.Name, "[Conformance]") {
				conformance++
				if s.Skip != "" {
					t.Errorf("a conformance spec is skipped: %s: %s", s.Name, s.Skip)
				}
			}
			if exact.MatchString("Kubernetes e2e suite "+s.Name) != (s.Skip == "") {
				t.Errorf("--focus does not do what the plan says of %q", s.Name)
			}
		}
		if conformance != 45 {
			t.Errorf("%d specs of sig-network are [Conformance], want 45", conformance)
		}
		t.Logf("conditions met: %v; %d of %d specs run", has, run, len(plan))
	}
}

func TestPlanTakesTheFirstRuleAndRefusesIdleOnes(t *testing.T) {
	rules, err := parseRules("# comment\n\nunless sctp: sctp => no SCTP\nslow|sctp => slow\n")
	if err != nil {
		t.Fatal(err)
	}
	names := []string{"[sig-network] a", "[sig-network] b sctp", "[sig-network] c slow"}
	for has, want := range map[bool]string{false: "no SCTP", true: "slow"} {
		plan, err := makePlan(names, rules, nil, func(string) bool { return has })
		if err != nil {
			t.Fatal(err)
		}
		if plan[0].Skip != "" || plan[1].Skip != want || plan[2].Skip != "slow" {
			t.Errorf("with SCTP %v: %+v", has, plan)
		}
	}
	plan, err := makePlan(names, rules, regexp.MustCompile("a$"), never)
	if err != nil || len(plan) != 1 {
		t.Errorf("focus: %+v %v", plan, err)
	}
	if _, err := makePlan(names, rules, regexp.MustCompile("nothing"), never); err == nil {
		t.Error("a focus that matches nothing was accepted")
	}
	if _, err := makePlan(names[:2], append(rules, rule{line: 9, match: regexp.MustCompile("gone")}), nil, never); err == nil || !strings.Contains(err.Error(), "line 9") {
		t.Errorf("an idle rule was accepted: %v", err)
	}
}

func TestSpecsAreReadFromTheSuitesList(t *testing.T) {
	got := parseSpecs("The following spec names can be used with 'ginkgo run --focus/skip':\n" +
		"    test/e2e/network/service.go:740: [sig-network] Services should serve b  [Conformance]\n" +
		"    test/e2e/apps/job.go:7: [sig-apps] Job: [sig-network] no\n" +
		"    test/e2e/network/dns.go:54: [sig-network] DNS a: b\n")
	if len(got) != 2 || got[0] != "[sig-network] DNS a: b" || got[1] != "[sig-network] Services should serve b  [Conformance]" {
		t.Errorf("%q", got)
	}
}

// What the suite does not say has passed has failed.
func TestReportIsHeldAgainstThePlan(t *testing.T) {
	file := filepath.Join(t.TempDir(), "report.json")
	if err := os.WriteFile(file, []byte(`[{"SpecReports":[
	 {"LeafNodeType":"SynchronizedBeforeSuite","State":"failed","Failure":{"Message":"no nodes"}},
	 {"ContainerHierarchyTexts":["[sig-network] S"],"LeafNodeType":"It","LeafNodeText":"good","State":"passed","RunTime":1500000000},
	 {"ContainerHierarchyTexts":["[sig-network] S"],"LeafNodeType":"It","LeafNodeText":"bad","State":"failed","Failure":{"Message":"timed out\n waiting","Location":{"FileName":"/x/network/service.go","LineNumber":7}}},
	 {"ContainerHierarchyTexts":["[sig-network] S"],"LeafNodeType":"It","LeafNodeText":"panic","State":"panicked","Failure":{"Message":"nil"}},
	 {"ContainerHierarchyTexts":["[sig-network] S"],"LeafNodeType":"It","LeafNodeText":"shy","State":"skipped","Failure":{"Message":"needs 4 nodes"}},
	 {"ContainerHierarchyTexts":["[sig-network] S"],"LeafNodeType":"It","LeafNodeText":"unfocused","State":"skipped"},
	 {"ContainerHierarchyTexts":["[sig-network] S"],"LeafNodeType":"It","LeafNodeText":"cloud","State":"skipped"}]}]`), 0o644); err != nil {
		t.Fatal(err)
	}
	p := "[sig-network] S "
	results, err := readReport(file, []Spec{{p + "good", ""}, {p + "bad", ""}, {p + "panic", ""}, {p + "shy", ""}, {p + "unfocused", ""}, {p + "absent", ""}, {p + "cloud", "needs a cloud"}})
	if err != nil {
		t.Fatal(err)
	}
	want := []Result{
		{"[SynchronizedBeforeSuite] ", failed, 0, "no nodes"},
		{p + "good", passed, 1.5, ""},
		{p + "bad", failed, 0, "timed out\n waiting (network/service.go:7)"},
		{p + "panic", failed, 0, "panicked: nil"},
		{p + "shy", failed, 0, "skipped itself, which the list of skips does not know: needs 4 nodes"},
		{p + "unfocused", failed, 0, "did not run"},
		{p + "absent", failed, 0, "did not run"},
		{p + "cloud", skipped, 0, "needs a cloud"},
	}
	for i, w := range want {
		if i >= len(results) || results[i] != w {
			t.Errorf("result %d: %+v, want %+v", i, results[min(i, len(results)-1)], w)
		}
	}
	var b bytes.Buffer
	summarise(&b, results)
	for _, s := range []string{"skipped 1: needs a cloud\n    S cloud\n", "FAIL S bad\n    timed out waiting (network/service.go:7)\n", "\nconformance: 1 passed, 6 failed, 1 skipped\n"} {
		if !strings.Contains(b.String(), s) {
			t.Errorf("the summary lacks %q:\n%s", s, b.String())
		}
	}
	if err := writeJUnit(file, results); err != nil {
		t.Fatal(err)
	}
	junit, err := os.ReadFile(file)
	if err != nil || !bytes.Contains(junit, []byte(`<testsuite name="sig-network" tests="8" failures="6" skipped="1">`)) || !bytes.Contains(junit, []byte(`<skipped message="needs a cloud">`)) {
		t.Errorf("%v\n%s", err, junit)
	}
}

func TestProgressIsReadFromTheLog(t *testing.T) {
	var lines []string
	o := Options{}
	o.Say = func(format string, args ...any) {
		lines = append(lines, strings.TrimSpace(fmt.Sprintf(format, args...)))
	}
	o.follow(strings.NewReader(`Running in parallel across 4 processes
------------------------------
• [6.166 seconds]
[sig-network] Services should serve [Conformance] [sig-network, Conformance]
k8s.io/kubernetes/test/e2e/network/service.go:785
------------------------------
• [FAILED] [61.000 seconds]
[sig-network] DNS [It] should fail [sig-network]
------------------------------
S [SKIPPED] [0.100 seconds]
[sig-network] Zones [BeforeEach] should skip
`), 3)
	want := []string{"1 of 3  ok     6.2s  Services should serve [Conformance]", "2 of 3  FAIL  61.0s  DNS should fail", "3 of 3  skip   0.1s  Zones should skip"}
	if strings.Join(lines, "\n") != strings.Join(want, "\n") {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(lines, "\n"), strings.Join(want, "\n"))
	}
}

func TestIperfVersion(t *testing.T) {
	for text, want := range map[string]bool{"iperf version 2.1.8 (12 August 2022) pthreads": false, "iperf version 2.2.1 (4 November 2024) pthreads": true, "iperf version 2.10.0": true, "": false} {
		if newIperf(text) != want {
			t.Errorf("%q: %v", text, !want)
		}
	}
}
