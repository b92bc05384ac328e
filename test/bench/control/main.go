// SPDX-License-Identifier: Apache-2.0

// Command control is `make bench-control`: what the control plane of a node
// costs. A real agent runs in a network namespace against a small API server
// within this program; the real plugin is executed for each of 100 pods, which
// are network namespaces too. Everything goes with the process.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/cilium/ebpf"

	"github.com/lash-net/lash/internal/bench"
)

// Goals of a node with 100 pods.
const (
	goalADD    = 30 * time.Millisecond
	goalReady  = time.Second
	goalMemory = 80_000_000
)

// Line is one figure, in the order of the report.
type Line struct {
	Name    string  `json:"name"`
	Value   float64 `json:"value"`
	Unit    string  `json:"unit"`
	Goal    string  `json:"goal,omitempty"`
	Cilium  string  `json:"cilium,omitempty"` // version 1.19.4 on a two-core machine
	Verdict string  `json:"verdict,omitempty"`
}

type report struct {
	Time  time.Time       `json:"time"`
	Pods  int             `json:"pods"`
	Lines []Line          `json:"lines"`
	ADD   []time.Duration `json:"addDurations"`
	DEL   []time.Duration `json:"delDurations"`
	OK    bool            `json:"ok"`
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	err := run(ctx, os.Args[1:])
	switch {
	case err == nil || errors.Is(err, flag.ErrHelp):
	case ctx.Err() != nil:
		fmt.Fprintln(os.Stderr, "bench-control: interrupted, everything is taken down")
		os.Exit(130)
	default:
		fmt.Fprintln(os.Stderr, "bench-control:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("bench-control", flag.ContinueOnError)
	pods := fs.Int("pods", 100, "pods on the node, at most 200")
	agentPath := fs.String("agent", "bin/lash-agent", "the agent's binary")
	pluginPath := fs.String("plugin", "bin/lash-cni", "the CNI plugin's binary")
	restarts := fs.Int("restarts", 5, "starts of the agent on the node with its pods; the median counts")
	file := fs.String("json", "dist/bench-control.json", "write the report there as well; empty: do not")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if *pods < 1 || *pods > 200 || *restarts < 1 {
		return fmt.Errorf("-pods must be within 1 and 200, -restarts at least 1")
	}
	if os.Geteuid() != 0 {
		return errors.New("must run as root: it makes network namespaces and loads programs")
	}
	for _, p := range []*string{agentPath, pluginPath} {
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
	r, err := measure(ctx, *agentPath, *pluginPath, *pods, *restarts)
	if err != nil {
		return err
	}
	if err := r.print(os.Stdout); err != nil {
		return err
	}
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

// measure does everything; what it makes is gone when it returns.
func measure(ctx context.Context, agentPath, pluginPath string, pods, restarts int) (*report, error) {
	say := func(format string, args ...any) { fmt.Fprintf(os.Stderr, "bench-control: "+format+"\n", args...) }
	dir, err := os.MkdirTemp("", "lash-bench-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	topology, err := bench.NewTopology()
	if err != nil {
		return nil, err
	}
	defer topology.Close()
	n := &node{dir: dir, agent: agentPath, plugin: pluginPath}
	if n.Node, err = topology.Node(); err != nil {
		return nil, err
	}
	// A default route makes eth0 the node's device.
	if err := n.AddDefaultRoutes(); err != nil {
		return nil, err
	}
	api := newAPIServer()
	fill(api, n.Node, pods)
	server, err := serveIn(n.Node, api)
	if err != nil {
		return nil, err
	}
	defer server.Close()
	n.api = "http://" + server.Addr
	defer n.cleanUp()
	if err := n.prepare(); err != nil {
		return nil, err
	}
	var namespaces []string
	for i := range pods {
		ns, err := bench.NewNetns(podName(i))
		if err != nil {
			return nil, err
		}
		defer ns.Close()
		namespaces = append(namespaces, strings.Replace(ns.Path(), "self", fmt.Sprint(os.Getpid()), 1))
	}

	say("first start of the agent")
	a, err := n.start(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { a.kill() }()
	first := a.Ready
	conf, err := n.conf()
	if err != nil {
		return nil, err
	}
	r := &report{Time: time.Now().UTC(), Pods: pods}
	bare, err := n.version(conf)
	if err != nil {
		return nil, err
	}
	before, err := programIDs()
	if err != nil {
		return nil, err
	}
	say("CNI ADD of %d pods", pods)
	for i, ns := range namespaces {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		took, err := n.call("ADD", i, ns, conf)
		if err != nil {
			return nil, fmt.Errorf("%w\n%s", err, n.logTail())
		}
		r.ADD = append(r.ADD, took)
	}
	after, err := programIDs()
	if err != nil {
		return nil, err
	}
	fresh := 0
	for id := range after {
		if !before[id] {
			fresh++
		}
	}
	rss, peak, err := a.Memory()
	if err != nil {
		return nil, err
	}
	var ready []time.Duration
	var rssAfter int64
	for i := range restarts {
		say("restart %d of %d, with %d pods", i+1, restarts, pods)
		a.kill()
		next, err := n.start(ctx)
		if err != nil {
			return nil, err
		}
		a = next
		ready = append(ready, a.Ready)
		if now, _, err := a.Memory(); err == nil {
			rssAfter = max(rssAfter, now)
		}
	}
	say("CNI DEL of %d pods", pods)
	for i, ns := range namespaces {
		took, err := n.call("DEL", i, ns, conf)
		if err != nil {
			return nil, fmt.Errorf("%w\n%s", err, n.logTail())
		}
		r.DEL = append(r.DEL, took)
	}
	r.OK = true
	r.limit("CNI ADD p50", milliseconds(at(r.ADD, .50)), "ms", 0, "120")
	r.limit("CNI ADD p99", milliseconds(at(r.ADD, .99)), "ms", milliseconds(goalADD), "153")
	r.limit("CNI ADD slowest", milliseconds(at(r.ADD, 1)), "ms", 0, "")
	r.limit("  of it executing the plugin (CNI VERSION)", milliseconds(bare), "ms", 0, "32 to 41")
	r.limit("CNI DEL p50", milliseconds(at(r.DEL, .50)), "ms", 0, "64")
	r.limit("CNI DEL p99", milliseconds(at(r.DEL, .99)), "ms", 0, "78")
	r.none("programs loaded for the pods", fresh)
	r.limit("agent ready, first start on the node", milliseconds(first), "ms", 0, "800")
	r.limit("agent ready on the existing node, median", milliseconds(at(ready, .5)), "ms", milliseconds(goalReady), "1400")
	r.limit("agent ready on the existing node, slowest", milliseconds(at(ready, 1)), "ms", milliseconds(goalReady), "")
	r.limit("agent memory, resident with all pods", float64(rss)/1e6, "MB", goalMemory/1e6, "170 to 200, at ready")
	r.limit("agent memory, its peak", float64(peak)/1e6, "MB", 0, "")
	r.limit("agent memory, resident after a restart", float64(rssAfter)/1e6, "MB", goalMemory/1e6, "")
	return r, nil
}

// fill gives the API server the node and its pods.
func fill(api *apiServer, n *bench.Node, pods int) {
	p4, p6 := n.Prefixes()
	api.Put("nodes", "", nodeName, object{
		"spec": object{"podCIDR": p4.String(), "podCIDRs": []string{p4.String(), p6.String()}},
		"status": object{"addresses": []object{
			{"type": "InternalIP", "address": n.Addr4.String()}, {"type": "InternalIP", "address": n.Addr6.String()},
			{"type": "Hostname", "address": nodeName},
		}},
	})
	api.Put("namespaces", "", "bench", object{})
	for i := range pods {
		api.Put("pods", "bench", podName(i), object{
			"metadata": object{"uid": podUID(i), "labels": object{"app": "bench"}},
			"spec":     object{"nodeName": nodeName, "containers": []object{{"name": "c", "image": "none"}}},
			"status":   object{"phase": "Pending"},
		})
	}
}

// serveIn listens in the node's namespace, as the API server's address is there.
func serveIn(n *bench.Node, h http.Handler) (*http.Server, error) {
	var l net.Listener
	if err := n.Do(func() (err error) {
		l, err = net.Listen("tcp", "127.0.0.1:0")
		return err
	}); err != nil {
		return nil, err
	}
	s := &http.Server{Addr: l.Addr().String(), Handler: h}
	go s.Serve(l)
	return s, nil
}

// version is the median time of executing the plugin for nothing.
func (n *node) version(conf []byte) (time.Duration, error) {
	var all []time.Duration
	for range 20 {
		took, err := n.call("VERSION", 0, "", conf)
		if err != nil {
			return 0, err
		}
		all = append(all, took)
	}
	return at(all, .5), nil
}

// programIDs are the programs of the whole kernel.
func programIDs() (map[ebpf.ProgramID]bool, error) {
	all := map[ebpf.ProgramID]bool{}
	for id := ebpf.ProgramID(0); ; {
		next, err := ebpf.ProgramGetNextID(id)
		if errors.Is(err, os.ErrNotExist) {
			return all, nil
		}
		if err != nil {
			return nil, fmt.Errorf("list programs: %w", err)
		}
		id = next
		all[id] = true
	}
}

// at is the smallest duration that a share of them does not exceed.
func at(all []time.Duration, share float64) time.Duration {
	s := slices.Sorted(slices.Values(all))
	i := int(share*float64(len(s))+.9999999) - 1
	return s[min(max(i, 0), len(s)-1)]
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// limit adds a figure that should stay below its goal; goal 0 is none.
func (r *report) limit(name string, value float64, unit string, goal float64, cilium string) {
	l := Line{Name: name, Value: value, Unit: unit, Cilium: cilium}
	if goal > 0 {
		l.Goal, l.Verdict = fmt.Sprintf("< %g", goal), "pass"
		if value >= goal {
			l.Verdict, r.OK = "FAIL", false
		}
	}
	r.Lines = append(r.Lines, l)
}

// none adds a count that must be 0.
func (r *report) none(name string, n int) {
	l := Line{Name: name, Value: float64(n), Goal: "0", Verdict: "pass"}
	if n != 0 {
		l.Verdict, r.OK = "FAIL", false
	}
	r.Lines = append(r.Lines, l)
}

func (r *report) print(w io.Writer) error {
	fmt.Fprintf(w, "Control plane of a node with %d pods\n", r.Pods)
	t := tabwriter.NewWriter(w, 2, 0, 2, ' ', 0)
	fmt.Fprintln(t, "what\tvalue\tunit\tgoal\tCilium\tverdict")
	passed, gated := 0, 0
	for _, l := range r.Lines {
		fmt.Fprintf(t, "%s\t%.1f\t%s\t%s\t%s\t%s\n", l.Name, l.Value, l.Unit, l.Goal, l.Cilium, l.Verdict)
		if l.Verdict != "" {
			gated++
		}
		if l.Verdict == "pass" {
			passed++
		}
	}
	if err := t.Flush(); err != nil {
		return err
	}
	_, err := fmt.Fprintf(w, "bench-control: %d of %d goals kept\n", passed, gated)
	return err
}
