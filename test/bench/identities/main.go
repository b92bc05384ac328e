// SPDX-License-Identifier: Apache-2.0

// Command identities is `make bench-identities`: 10,000 pods with 2,000 sets of labels are created through a real API
// server (etcd and kube-apiserver from the sandbox's cache), a hundred a second, on three nodes whose agents are real,
// too. There are no containers: the generator binds each pod and reports its addresses, as a kubelet would. Measured is
// the time from the creation of a pod to its row, with the right identity, in the kernel's ipcache of every node.
// Everything is in network namespaces and goes with the process.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/lash-net/lash/internal/bench"
)

const goalP99 = time.Second

type options struct {
	pods, sets int
	rate       float64
	restart    bool
	agent      string
	operator   string
	cache      string
	keep       string
	profile    string
}

type report struct {
	Time               time.Time     `json:"time"`
	Pods               int           `json:"pods"`
	Sets               int           `json:"labelSets"`
	Rate               float64       `json:"podsPerSecond"`
	Achieved           float64       `json:"podsPerSecondAchieved"`
	Restarted          bool          `json:"agentRestarted"`
	P50                time.Duration `json:"p50"`
	P99                time.Duration `json:"p99"`
	Max                time.Duration `json:"max"`
	Identities         int           `json:"identities"`
	Refused            int           `json:"identitiesRefused"`
	Duplicates         int           `json:"duplicates"`
	Wrong              int           `json:"wrong"`
	Memory             []memory      `json:"memory"`
	Removed            time.Duration `json:"podsRemovedAfter"`
	LeakedEndpoints    int           `json:"leakedCiliumEndpoints"`
	LeakedRows         int           `json:"leakedIPCacheRows"`
	LeakedIdentities   int           `json:"leakedIdentities"`
	IdentitiesGoneTook time.Duration `json:"identitiesGoneAfter"`
	CPU                []cpuUse      `json:"cpu"`
	OK                 bool          `json:"ok"`
}

// cpuUse is a process's while pods are created: milliseconds a pod, and of one CPU.
type cpuUse struct {
	Name  string  `json:"name"`
	Pod   float64 `json:"msPerPod"`
	Share float64 `json:"share"`
}

// memory is an agent's, resident, in bytes.
type memory struct {
	Node   string `json:"node"`
	Before int64  `json:"before"`
	After  int64  `json:"after"`
}

func main() {
	runtime.GOMAXPROCS(1) // the others need the CPUs
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	err := run(ctx, os.Args[1:])
	switch {
	case err == nil || errors.Is(err, flag.ErrHelp):
	case ctx.Err() != nil:
		fmt.Fprintln(os.Stderr, "bench-identities: interrupted, everything is taken down")
		os.Exit(130)
	default:
		fmt.Fprintln(os.Stderr, "bench-identities:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	var o options
	fs := flag.NewFlagSet("bench-identities", flag.ContinueOnError)
	fs.IntVar(&o.pods, "pods", 10000, "pods to create, at most 12000")
	fs.IntVar(&o.sets, "sets", 2000, "distinct sets of labels among them")
	fs.Float64Var(&o.rate, "rate", 100, "pods created a second")
	fs.BoolVar(&o.restart, "restart", false, "kill one agent halfway and start it again")
	fs.StringVar(&o.agent, "agent", "bin/lash-agent", "the agent's binary")
	fs.StringVar(&o.operator, "operator", "bin/lash-operator", "the operator's binary")
	fs.StringVar(&o.cache, "cache", "/var/cache/lash-sandbox/bin", "where the sandbox keeps etcd and kube-apiserver")
	fs.StringVar(&o.keep, "logs", "", "directory to leave the logs in; empty: they go")
	fs.StringVar(&o.profile, "profile", "", "directory to write CPU profiles of the API server and an agent to, and the API server's metrics, taken while pods are created; empty: none are")
	file := fs.String("json", "dist/bench-identities.json", "write the report there as well; empty: do not")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if o.pods < 1 || o.pods > 12000 || o.sets < 1 || o.rate <= 0 {
		return errors.New("-pods must be from 1 to 12000, -sets and -rate more than 0")
	}
	if os.Geteuid() != 0 {
		return errors.New("must run as root: it makes network namespaces and loads programs")
	}
	for _, p := range []*string{&o.agent, &o.operator} {
		abs, err := filepath.Abs(*p)
		if err != nil {
			return err
		}
		if _, err := os.Stat(abs); err != nil {
			return fmt.Errorf("%w: build it first (make build)", err)
		}
		*p = abs
	}
	if err := bench.EnterMounts(); err != nil {
		return err
	}
	runtime.LockOSThread() // children die with this thread
	r, err := measure(ctx, o)
	if err != nil {
		return err
	}
	r.print()
	if *file != "" {
		if err := bench.WriteJSON(*file, r); err != nil {
			return err
		}
	}
	if !r.OK {
		return bench.ErrGates
	}
	return nil
}

func say(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "bench-identities: "+format+"\n", args...)
}

// measure does everything; what it makes is gone when it returns.
func measure(ctx context.Context, o options) (*report, error) {
	dir, err := os.MkdirTemp("", "lash-bench-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	c := &cluster{dir: dir, o: o}
	defer c.close()
	if o.keep != "" {
		defer c.keepLogs(o.keep)
	}
	if err := c.start(ctx); err != nil {
		return nil, err
	}
	r := &report{Time: time.Now().UTC(), Pods: o.pods, Sets: min(o.sets, o.pods), Rate: o.rate, Restarted: o.restart}
	base, err := c.rows()
	if err != nil {
		return nil, err
	}
	for _, n := range c.nodes {
		m, err := n.agent.memory()
		if err != nil {
			return nil, err
		}
		r.Memory = append(r.Memory, memory{Node: n.name, Before: m})
	}

	say("%d pods with %d sets of labels, %g a second", o.pods, r.Sets, o.rate)
	l, err := newLoad(ctx, c)
	if err != nil {
		return nil, err
	}
	began, cpu := time.Now(), c.cpu()
	if o.profile != "" {
		go func() {
			if err := c.profile(ctx, o.profile); err != nil {
				say("profile: %v", err)
			}
		}()
	}
	latencies, created, err := l.create(ctx)
	if err != nil {
		return nil, err
	}
	for i, p := range c.cpu() {
		if i < len(cpu) { // it ran before
			p.used -= cpu[i].used
		}
		if p.used > 0 {
			r.CPU = append(r.CPU, cpuUse{p.name, p.used.Seconds() / float64(o.pods) * 1e3, p.used.Seconds() / time.Since(began).Seconds()})
		}
	}
	r.Achieved = float64(o.pods) / created.Seconds()
	slices.Sort(latencies)
	at := func(share float64) time.Duration { return latencies[int(share*float64(len(latencies)-1))] }
	r.P50, r.P99, r.Max = at(.5), at(.99), at(1)
	if r.Refused, err = c.refused(ctx); err != nil {
		return nil, err
	}
	if r.Identities, r.Duplicates, r.Wrong, err = l.check(ctx); err != nil {
		return nil, err
	}
	for i, n := range c.nodes {
		if r.Memory[i].After, err = n.agent.memory(); err != nil {
			return nil, err
		}
	}

	say("deleting them")
	began = time.Now()
	if err := l.remove(ctx); err != nil {
		return nil, err
	}
	r.LeakedEndpoints, r.LeakedRows, err = l.settle(ctx, base)
	if err != nil {
		return nil, err
	}
	r.Removed = time.Since(began)
	say("collecting their identities")
	began = time.Now()
	if r.LeakedIdentities, err = c.collect(ctx); err != nil {
		return nil, err
	}
	r.IdentitiesGoneTook = time.Since(began)
	r.OK = r.Duplicates == 0 && r.Wrong == 0 && r.LeakedEndpoints == 0 && r.LeakedRows == 0 && r.LeakedIdentities == 0 && r.P99 < goalP99
	return r, nil
}

func (r *report) print() {
	fmt.Printf("%d pods with %d sets of labels on three nodes, %g a second\n", r.Pods, r.Sets, r.Rate)
	w := tabwriter.NewWriter(os.Stdout, 2, 0, 2, ' ', 0)
	line := func(name, value, goal string, ok bool) {
		verdict := ""
		if goal != "" {
			verdict = "pass"
			if !ok {
				verdict = "FAIL"
			}
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", name, value, goal, verdict)
	}
	none := func(name string, n int) { line(name, fmt.Sprint(n), "0", n == 0) }
	ms := func(d time.Duration) string { return d.Round(time.Millisecond).String() }
	fmt.Fprintln(w, "what\tvalue\tgoal\tverdict")
	line("pods created a second", fmt.Sprintf("%.1f", r.Achieved), "", true)
	line("from object to every ipcache, p50", ms(r.P50), "", true)
	line("from object to every ipcache, p99", ms(r.P99), "< "+goalP99.String(), r.P99 < goalP99)
	line("from object to every ipcache, slowest", ms(r.Max), "", true)
	line("identities", fmt.Sprint(r.Identities), "", true)
	line("identities refused, as another node was first", fmt.Sprint(r.Refused), "", true)
	none("sets of labels with two identities", r.Duplicates)
	none("rows with another identity than the pod's labels", r.Wrong)
	for _, m := range r.Memory {
		line("memory of the agent on "+m.Node, fmt.Sprintf("%.1f to %.1f MB, %.2f MB per thousand pods", float64(m.Before)/1e6, float64(m.After)/1e6,
			float64(m.After-m.Before)/1e3/float64(r.Pods)), "", true)
	}
	all := 0.0
	for _, u := range r.CPU {
		all += u.Pod
		line("CPU of "+u.Name, fmt.Sprintf("%.2f ms a pod, %.0f%% of one", u.Pod, 100*u.Share), "", true)
	}
	line("CPU of all", fmt.Sprintf("%.2f ms a pod", all), "", true)
	none("CiliumEndpoints left of deleted pods", r.LeakedEndpoints)
	none("ipcache rows left of deleted pods", r.LeakedRows)
	line("pods, CiliumEndpoints and rows gone after", ms(r.Removed), "", true)
	none("identities left after collection", r.LeakedIdentities)
	line("identities gone after", ms(r.IdentitiesGoneTook), "", true)
	w.Flush()
}
