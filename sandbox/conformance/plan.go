// SPDX-License-Identifier: Apache-2.0

package conformance

import (
	"bufio"
	"context"
	_ "embed"
	"fmt"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

//go:embed skips.txt
var skipList string

// A rule takes specs out of the run, and says why.
type rule struct {
	line   int
	unless string // a condition: the rule holds only where it is not met
	match  *regexp.Regexp
	reason string
}

// conditions of rules: what a machine may or may not have.
var conditions = map[string]func() bool{"sctp": hasSCTP, "iperf-2.2": hasIperf22}

// hasSCTP says whether the kernel has SCTP sockets.
func hasSCTP() bool {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_SCTP)
	if err != nil {
		return false
	}
	unix.Close(fd)
	return true
}

// hasIperf22 says whether this machine's iperf, which the images get, reports as that version does.
func hasIperf22() bool {
	out, _ := exec.Command("iperf", "-v").CombinedOutput() // exits with 1
	return newIperf(string(out))
}

func newIperf(version string) bool {
	m := regexp.MustCompile(`iperf version 2\.([0-9]+)`).FindStringSubmatch(version)
	if m == nil {
		return false
	}
	minor, err := strconv.Atoi(m[1])
	return err == nil && minor >= 2
}

// parseRules reads a skip list: a line is REGEXP => REASON, or unless CONDITION: REGEXP => REASON.
func parseRules(text string) ([]rule, error) {
	var rules []rule
	s := bufio.NewScanner(strings.NewReader(text))
	for n := 1; s.Scan(); n++ {
		line := strings.TrimSpace(s.Text())
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		expr, reason, ok := strings.Cut(line, " => ")
		expr, reason = strings.TrimSpace(expr), strings.TrimSpace(reason)
		if !ok || expr == "" || reason == "" {
			return nil, fmt.Errorf("skips.txt line %d: %q is not REGEXP => REASON", n, line)
		}
		r := rule{line: n, reason: reason}
		if rest, found := strings.CutPrefix(expr, "unless "); found {
			cond, e, ok := strings.Cut(rest, ": ")
			if !ok || conditions[cond] == nil {
				return nil, fmt.Errorf("skips.txt line %d: unknown condition in %q", n, expr)
			}
			r.unless, expr = cond, e
		}
		var err error
		if r.match, err = regexp.Compile(expr); err != nil {
			return nil, fmt.Errorf("skips.txt line %d: %w", n, err)
		}
		rules = append(rules, r)
	}
	return rules, s.Err()
}

// Spec is one spec of the suite and whether it is run.
type Spec struct {
	Name string
	Skip string // why it is not run; empty for one that is
}

// makePlan gives every spec its verdict by the first rule that matches. A rule that matches no spec is an error:
// the suite has changed, and the list must follow. has says which conditions are met.
func makePlan(names []string, rules []rule, focus *regexp.Regexp, has func(condition string) bool) ([]Spec, error) {
	used := make([]bool, len(rules))
	var plan []Spec
	for _, name := range names {
		s := Spec{Name: name}
		for i, r := range rules {
			if !r.match.MatchString(name) {
				continue
			}
			used[i] = true
			if s.Skip == "" && (r.unless == "" || !has(r.unless)) {
				s.Skip = r.reason
			}
		}
		if focus == nil || focus.MatchString(name) {
			plan = append(plan, s)
		}
	}
	if i := slices.Index(used, false); i >= 0 {
		return nil, fmt.Errorf("skips.txt line %d: %q matches no spec of the suite", rules[i].line, rules[i].match)
	}
	if len(plan) == 0 {
		return nil, fmt.Errorf("--focus %q matches no spec of sig-network", focus)
	}
	return plan, nil
}

// listSpecs asks the suite for the names of its specs about networks, sorted.
func listSpecs(ctx context.Context, e2e string) ([]string, error) {
	out, err := exec.CommandContext(ctx, e2e, "--list-tests").Output()
	if err != nil {
		return nil, fmt.Errorf("%s --list-tests: %w", e2e, err)
	}
	names := parseSpecs(string(out))
	if len(names) == 0 {
		return nil, fmt.Errorf("%s --list-tests names no spec of sig-network", e2e)
	}
	return names, nil
}

// listed is a line of the suite's list: FILE:LINE: NAME.
var listed = regexp.MustCompile(`(?m)^ *[^ :]+:[0-9]+: (\[sig-network\] .*)$`)

func parseSpecs(list string) []string {
	var names []string
	for _, m := range listed.FindAllStringSubmatch(list, -1) {
		names = append(names, m[1])
	}
	slices.Sort(names)
	return names
}

// exactly is an expression for --focus that matches these specs only.
func exactly(plan []Spec) string {
	var quoted []string
	for _, s := range plan {
		if s.Skip == "" {
			quoted = append(quoted, regexp.QuoteMeta(s.Name))
		}
	}
	return "(" + strings.Join(quoted, "|") + ")$"
}
