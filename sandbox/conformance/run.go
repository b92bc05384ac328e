// SPDX-License-Identifier: Apache-2.0

// Package conformance runs the upstream Kubernetes e2e suite, built from its Go module, against a sandbox: every
// spec of sig-network but those that skips.txt names, each with its reason.
package conformance

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"time"

	"github.com/lash-net/lash/sandbox/cluster"
	"github.com/lash-net/lash/sandbox/plan"
	"github.com/lash-net/lash/sandbox/testbed"
)

// Options of Run.
type Options struct {
	testbed.Options
	Focus  string        // only specs whose names match
	Procs  int           // specs at once
	Limit  time.Duration // of the whole run
	Keep   bool          // leave the cluster up
	List   bool          // print what would run, and end
	Report string        // directory of log, report and JUnit file
	Out    io.Writer
}

// ErrFailed is returned when a spec failed; the summary says which and why.
var ErrFailed = errors.New("conformance failed")

// Run runs the specs and prints the summary. A cluster that it brought up it also takes down.
func Run(ctx context.Context, name string, o Options) error {
	c, err := cluster.New(name, o.Say)
	if err != nil {
		return err
	}
	kit, err := c.PrepareConformance(ctx)
	if err != nil {
		return err
	}
	specs, err := o.plan(ctx, kit.E2E)
	if err != nil {
		return err
	}
	if o.List {
		printPlan(o.Out, specs)
		return nil
	}
	_, err = cluster.Open(name, func(string, ...any) {})
	stays := o.Keep || !errors.Is(err, cluster.ErrNotUp)
	results, err := o.run(ctx, name, kit, specs, stays)
	if !stays {
		if down := c.Down(context.WithoutCancel(ctx)); down != nil {
			o.Say("taking the cluster down: %v", down) // beside a failure of specs it would not be seen
			err = errors.Join(err, down)
		}
	}
	if err != nil && ctx.Err() != nil {
		return errors.Join(errors.New("interrupted"), err)
	}
	if len(results) > 0 {
		err = errors.Join(err, o.conclude(results))
	}
	return err
}

func (o Options) plan(ctx context.Context, e2e string) ([]Spec, error) {
	rules, err := parseRules(skipList)
	if err != nil {
		return nil, err
	}
	names, err := listSpecs(ctx, e2e)
	if err != nil {
		return nil, err
	}
	var focus *regexp.Regexp
	if o.Focus != "" {
		if focus, err = regexp.Compile(o.Focus); err != nil {
			return nil, fmt.Errorf("--focus: %w", err)
		}
	}
	return makePlan(names, rules, focus, func(cond string) bool { return conditions[cond]() })
}

func printPlan(w io.Writer, specs []Spec) {
	n := 0
	for _, s := range specs {
		if s.Skip == "" {
			n++
			fmt.Fprintf(w, "run   %s\n", short(s.Name))
		} else {
			fmt.Fprintf(w, "skip  %s\n      %s\n", short(s.Name), s.Skip)
		}
	}
	fmt.Fprintf(w, "%d to run, %d skipped\n", n, len(specs)-n)
}

func (o Options) run(ctx context.Context, name string, kit cluster.ConformanceKit, specs []Spec, stays bool) ([]Result, error) {
	todo := 0
	for _, s := range specs {
		if s.Skip == "" {
			todo++
		}
	}
	if todo == 0 {
		return nil, fmt.Errorf("every spec that --focus %q matches is in the list of skips; see --list", o.Focus)
	}
	c, err := testbed.Up(ctx, name, o.Options)
	if err != nil {
		return nil, err
	}
	defer c.Unlock()
	for _, a := range kit.Archives {
		if err := c.Load(ctx, a); err != nil {
			return nil, err
		}
	}
	if err := c.RouteToPods(ctx); err != nil {
		return nil, err
	}
	o.Say("images of the suite loaded; running %d specs, %d at once", todo, o.Procs)
	dir, err := filepath.Abs(o.Report)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	report := filepath.Join(dir, "report.json")
	if err := os.RemoveAll(report); err != nil { // an old one must not speak for this run
		return nil, err
	}
	log, err := os.Create(filepath.Join(dir, "log.txt"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd, err := c.ExecCommand(ctx, plan.ControlPlane, kit.Ginkgo, "run", "--no-color", "-v",
		"--procs="+strconv.Itoa(o.Procs), "--timeout="+o.Limit.String(), "--poll-progress-after=0",
		"--output-dir="+dir, "--json-report="+filepath.Base(report), "--focus="+exactly(specs), kit.E2E, "--",
		"--provider=skeleton", "--kubeconfig="+c.Kubeconfig(true), "--kubectl-path="+kit.Kubectl, "--node-os-distro=custom",
		"--num-nodes="+strconv.Itoa(len(c.Nodes)), "--allowed-not-ready-nodes=0", "--disable-log-dump", "--delete-namespace-on-failure")
	if err != nil {
		return nil, err
	}
	if stays {
		cmd.WaitDelay = 90 * time.Second // the suite removes its namespaces when it is told to end
	}
	r, w := io.Pipe()
	cmd.Stdout, cmd.Stderr = w, w
	done := make(chan struct{})
	go func() {
		defer close(done)
		o.follow(io.TeeReader(r, log), todo)
	}()
	runErr := cmd.Run() // fails when a spec does; the report knows more
	_ = w.Close()
	<-done
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	results, err := readReport(report, specs)
	if err != nil {
		return nil, fmt.Errorf("the suite ended without its report (%w): %w; see %s", runErr, err, log.Name())
	}
	if runErr != nil && count(results, failed) == 0 {
		return results, fmt.Errorf("no spec failed, but the suite did: %w; see %s", runErr, log.Name())
	}
	return results, nil
}

var verdict = regexp.MustCompile(`^[•S](?: \[([A-Z ]+)\])?.* \[([0-9.]+) seconds\]$`)

// clutter of a spec's line in the log: the mark on the part that failed, and the labels.
var clutter = regexp.MustCompile(`\[(It|BeforeEach|AfterEach|DeferCleanup \(Each\))\] | \[sig-network(, [^\]]*)?\]$`)

// follow prints a line for each spec that has ended.
func (o Options) follow(r io.Reader, todo int) {
	s := bufio.NewScanner(r)
	s.Buffer(nil, 16<<20)
	n := 0
	for s.Scan() {
		m := verdict.FindStringSubmatch(s.Text())
		if m == nil || !s.Scan() {
			continue
		}
		n++
		what := "ok  "
		if m[1] == "SKIPPED" {
			what = "skip"
		} else if m[1] != "" {
			what = "FAIL"
		}
		seconds, _ := strconv.ParseFloat(m[2], 64)
		o.Say("%3d of %d  %s %5.1fs  %s", n, todo, what, seconds, short(clutter.ReplaceAllString(s.Text(), "")))
	}
	_, _ = io.Copy(io.Discard, r) // a line that is too long ends the scanner, not the log
}

func (o Options) conclude(results []Result) error {
	summary, err := os.Create(filepath.Join(o.Report, "summary.txt"))
	if err != nil {
		return err
	}
	defer summary.Close()
	summarise(io.MultiWriter(o.Out, summary), results)
	if err := writeJUnit(filepath.Join(o.Report, "junit.xml"), results); err != nil {
		return err
	}
	o.Say("log, report, summary and junit.xml are in %s", o.Report)
	if count(results, failed) > 0 {
		return ErrFailed
	}
	return nil
}
