// SPDX-License-Identifier: Apache-2.0

package conformance

import (
	"encoding/json"
	"encoding/xml"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Result is what became of a spec.
type Result struct {
	Name    string
	State   string // passed, failed, skipped
	Seconds float64
	Why     string // of a failure or skip
}

// States of results.
const (
	passed  = "passed"
	failed  = "failed"
	skipped = "skipped"
)

// ginkgoReport is the part of the suite's JSON report that is used here.
type ginkgoReport struct {
	SpecialSuiteFailureReasons []string
	SpecReports                []struct {
		ContainerHierarchyTexts []string
		LeafNodeType            string
		LeafNodeText            string
		State                   string
		RunTime                 time.Duration
		Failure                 struct {
			Message  string
			Location struct {
				FileName   string
				LineNumber int
			}
		}
	}
}

// readReport holds the suite's report against the plan. A spec of the plan passes only if the suite says so: one that
// did not run has failed, and so has one that skipped itself, because every skip belongs into the list.
func readReport(file string, plan []Spec) ([]Result, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var suites []ginkgoReport
	if err := json.Unmarshal(b, &suites); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	ran := map[string]Result{}
	var results []Result
	for _, suite := range suites {
		for _, r := range suite.SpecReports {
			res := Result{Name: strings.Join(append(r.ContainerHierarchyTexts, r.LeafNodeText), " "), State: r.State, Seconds: r.RunTime.Seconds(), Why: r.Failure.Message}
			if r.Failure.Location.FileName != "" {
				res.Why = fmt.Sprintf("%s (%s:%d)", res.Why, shortPath(r.Failure.Location.FileName), r.Failure.Location.LineNumber)
			}
			switch {
			case r.LeafNodeType == "It":
				ran[res.Name] = res
			case r.State != passed && r.State != skipped: // the suite's own preparation
				results = append(results, Result{"[" + r.LeafNodeType + "] " + r.LeafNodeText, failed, res.Seconds, res.Why})
			}
		}
	}
	for _, s := range plan {
		r, found := ran[s.Name]
		switch {
		case s.Skip != "":
			r = Result{Name: s.Name, State: skipped, Why: s.Skip}
		case !found || r.State == skipped && r.Why == "":
			r = Result{Name: s.Name, State: failed, Why: "did not run"}
		case r.State == skipped:
			r.State, r.Why = failed, "skipped itself, which the list of skips does not know: "+r.Why
		case r.State != passed:
			if r.State != failed {
				r.Why = r.State + ": " + r.Why
			}
			r.State = failed
		}
		results = append(results, r)
	}
	return results, nil
}

// shortPath leaves a file's directory and name.
func shortPath(p string) string {
	return filepath.Join(filepath.Base(filepath.Dir(p)), filepath.Base(p))
}

func count(results []Result, state string) (n int) {
	for _, r := range results {
		if r.State == state {
			n++
		}
	}
	return n
}

// summarise prints what a reader wants to know: what was skipped, by reason, then what failed, then the numbers.
func summarise(w io.Writer, results []Result) {
	byReason := map[string][]string{}
	var reasons []string
	for _, r := range results {
		if r.State == skipped {
			if byReason[r.Why] == nil {
				reasons = append(reasons, r.Why)
			}
			byReason[r.Why] = append(byReason[r.Why], r.Name)
		}
	}
	slices.SortStableFunc(reasons, func(a, b string) int { return len(byReason[b]) - len(byReason[a]) })
	for _, why := range reasons {
		fmt.Fprintf(w, "\nskipped %d: %s\n", len(byReason[why]), why)
		for _, name := range byReason[why] {
			fmt.Fprintf(w, "    %s\n", short(name))
		}
	}
	for _, r := range results {
		if r.State == failed {
			fmt.Fprintf(w, "\nFAIL %s\n    %s\n", short(r.Name), oneLine(r.Why, 600))
		}
	}
	of45 := ""
	var conf, confPassed int
	for _, r := range results {
		if strings.Contains(r.Name, "[Conformance]") {
			conf++
			if r.State == passed {
				confPassed++
			}
		}
	}
	if conf > 0 {
		of45 = fmt.Sprintf(" ([Conformance]: %d of %d passed)", confPassed, conf)
	}
	fmt.Fprintf(w, "\nconformance: %d passed, %d failed, %d skipped%s\n", count(results, passed), count(results, failed), count(results, skipped), of45)
}

// short is a spec's name without what all have in common.
func short(name string) string {
	return strings.Join(strings.Fields(strings.TrimPrefix(name, "[sig-network] ")), " ")
}

func oneLine(s string, limit int) string {
	s = strings.Join(strings.Fields(s), " ")
	if r := []rune(s); len(r) > limit {
		s = string(r[:limit]) + " ..."
	}
	return s
}

// writeJUnit writes the results as CI systems read them.
func writeJUnit(file string, results []Result) error {
	type message struct {
		Message string `xml:"message,attr"`
	}
	type testcase struct {
		Class   string   `xml:"classname,attr"`
		Name    string   `xml:"name,attr"`
		Time    string   `xml:"time,attr"`
		Failure *message `xml:"failure,omitempty"`
		Skipped *message `xml:"skipped,omitempty"`
	}
	suite := struct {
		XMLName  xml.Name   `xml:"testsuite"`
		Name     string     `xml:"name,attr"`
		Tests    int        `xml:"tests,attr"`
		Failures int        `xml:"failures,attr"`
		Skipped  int        `xml:"skipped,attr"`
		Cases    []testcase `xml:"testcase"`
	}{Name: "sig-network", Tests: len(results), Failures: count(results, failed), Skipped: count(results, skipped)}
	for _, r := range results {
		c := testcase{Class: "sig-network", Name: r.Name, Time: fmt.Sprintf("%.3f", r.Seconds)}
		switch r.State {
		case failed:
			c.Failure = &message{r.Why}
		case skipped:
			c.Skipped = &message{r.Why}
		}
		suite.Cases = append(suite.Cases, c)
	}
	b, err := xml.MarshalIndent(suite, "", " ")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append([]byte(xml.Header), append(b, '\n')...), 0o644)
}
