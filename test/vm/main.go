// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// Hidden first arguments: this program is its own helper and its own guest.
const (
	shareFlag = "-share-daemon"
	stepsFlag = "-guest-steps"
)

const usage = `Runs a command, or the tests of packages, on other kernels.

  vm [flags] -- COMMAND [ARG...]     run COMMAND as root, here, on each kernel
  vm [flags] -pkg PATTERN...         run Go tests, compiled outside, on each kernel
  vm [flags]                         only fetch and unpack the kernels

Each kernel boots in qemu (emulated, no KVM needed) on a copy-on-write view of
this machine's root file system. The exit status is the command's; of several
kernels or packages the first that is not 0; 124 on timeout, 125 if a machine
died, 126 if none could be started. Output goes to stdout, progress to stderr.

  vm -kernel 6.1 -- uname -r
  vm -kernel 6.1,6.12 -pkg ./test/netns -run TestTCX -timeout 10m

Flags:
`

// options are the flags, checked.
type options struct {
	kernels  []string
	packages []string
	run      string
	tags     string
	command  []string
	env      []string
	timeout  time.Duration
	memory   string
	cpus     int
	writable string
	kargs    string
	console  string
	cache    string
}

func main() {
	// Children die with the thread that made them: keep this one to the end.
	runtime.LockOSThread()
	if os.Getpid() == 1 && exists("/spec.json") {
		guestMain()
	}
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case shareFlag:
			fail(shareMain(os.Args[2:]))
		case stepsFlag:
			if err := stepsMain(); err != nil {
				fail(err)
			}
			return
		}
	}
	opts, err := parseOptions(os.Args[1:])
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err != nil {
		fail(err)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	status, err := run(ctx, opts)
	interrupted := ctx.Err() != nil
	stop()
	switch {
	case interrupted:
		fmt.Fprintln(os.Stderr, "vm: interrupted, everything is taken down")
		os.Exit(130)
	case errors.Is(err, errDied):
		fmt.Fprintln(os.Stderr, "vm:", err)
		os.Exit(exitDied)
	case err != nil:
		fail(err)
	}
	os.Exit(status)
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "vm:", err)
	os.Exit(exitCannotRun)
}

type list []string

func (l *list) String() string     { return strings.Join(*l, ",") }
func (l *list) Set(s string) error { *l = append(*l, s); return nil }

// parseOptions reads the arguments; -help prints the usage and gives flag.ErrHelp.
func parseOptions(args []string) (options, error) {
	var o options
	var packages, env list
	fs := flag.NewFlagSet("vm", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	kernels := fs.String("kernel", "6.1,6.12", "kernels, in this order: 6.1, 6.12 or full releases")
	fs.Var(&packages, "pkg", "packages whose tests to run, as for go test; may be repeated")
	fs.StringVar(&o.run, "run", "", "run only the tests that match, as go test -run")
	fs.StringVar(&o.tags, "tags", "", "build tags for -pkg")
	fs.Var(&env, "env", "NAME=VALUE for the command, or NAME for its value here; may be repeated")
	fs.DurationVar(&o.timeout, "timeout", 15*time.Minute, "limit for the command, or for each package")
	fs.StringVar(&o.memory, "memory", "2G", "memory of the guest")
	fs.IntVar(&o.cpus, "cpus", 2, "CPUs of the guest")
	fs.StringVar(&o.writable, "writable", "", "a folder in which the guest's writes reach the host")
	fs.StringVar(&o.kargs, "append", "", "further kernel parameters")
	fs.StringVar(&o.console, "console", "", "keep the guest's console in this file, with the kernel's name at its end")
	fs.StringVar(&o.cache, "cache", "/var/cache/lash-vm", "folder of the unpacked kernels")
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			fmt.Print(usage)
			fs.SetOutput(os.Stdout)
			fs.PrintDefaults()
			return o, err
		}
		return o, fmt.Errorf("%w (vm -help explains)", err)
	}
	o.command, o.env, o.packages = fs.Args(), env, packages
	for _, k := range strings.Split(*kernels, ",") {
		if k = strings.TrimSpace(k); k != "" {
			o.kernels = append(o.kernels, k)
		}
	}
	switch {
	case len(o.kernels) == 0:
		return o, fmt.Errorf("-kernel names no kernel")
	case len(o.command) > 0 && len(o.packages) > 0:
		return o, fmt.Errorf("-pkg and a command exclude each other")
	case o.timeout <= 0:
		return o, fmt.Errorf("-timeout %s: must be above 0", o.timeout)
	case o.cpus < 1:
		return o, fmt.Errorf("-cpus %d: must be at least 1", o.cpus)
	}
	for i, e := range o.env {
		if !strings.Contains(e, "=") {
			o.env[i] = e + "=" + os.Getenv(e)
		}
	}
	if o.writable != "" {
		abs, err := filepath.Abs(o.writable)
		if err != nil {
			return o, err
		}
		if st, err := os.Stat(abs); err != nil || !st.IsDir() || abs == "/" {
			return o, fmt.Errorf("-writable %s: must be a folder, and not the root", o.writable)
		}
		o.writable = abs
	}
	return o, nil
}

// run does everything for each kernel in turn and returns the exit status.
func run(ctx context.Context, o options) (int, error) {
	if os.Geteuid() != 0 {
		return 0, errors.New("must run as root: it mounts folders and shares this machine's files")
	}
	say := func(format string, args ...any) { fmt.Fprintf(os.Stderr, "vm: "+format+"\n", args...) }
	if err := installTools(ctx, say); err != nil {
		return 0, err
	}
	cwd, err := os.Getwd()
	if err != nil {
		return 0, err
	}
	work, release, err := newRunDir()
	if err != nil {
		return 0, err
	}
	defer release()
	var steps []Step
	paths := []string{cwd, o.cache}
	if len(o.command) > 0 {
		steps = []Step{{Name: strings.Join(o.command, " "), Dir: cwd, Argv: o.command, Env: o.env, Timeout: o.timeout}}
	} else if len(o.packages) > 0 {
		tests, err := compileTests(ctx, work, o.packages, o.tags, say)
		if err != nil {
			return 0, err
		}
		paths = append(paths, work)
		for _, t := range tests {
			paths = append(paths, t.Dir)
			steps = append(steps, testStep(t, o.run, o.timeout, o.env))
		}
	}
	mountinfo, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return 0, err
	}
	shares := sharesFor(paths, o.writable, mountPoints(string(mountinfo)))

	status := 0
	kernels := cache{o.cache, say}
	for _, name := range o.kernels {
		kernel, err := kernels.Kernel(ctx, name)
		if err != nil {
			return 0, err
		}
		if len(steps) == 0 {
			say("kernel %s is ready: %s", kernel.Release, filepath.Dir(filepath.Dir(kernel.Image)))
			continue
		}
		s, err := runKernel(ctx, o, kernel, Spec{
			Release: kernel.Release, ModDir: kernel.ModDir, Shares: shares, Steps: steps, Hostname: "vm",
		}, len(o.packages) > 0)
		if err != nil {
			return 0, fmt.Errorf("kernel %s: %w", kernel.Release, err)
		}
		if status == 0 {
			status = s
		}
	}
	return status, nil
}

// runKernel is one boot; it returns the first status that is not 0.
func runKernel(ctx context.Context, o options, kernel Kernel, spec Spec, tests bool) (int, error) {
	say := func(format string, args ...any) {
		fmt.Fprintf(os.Stderr, "vm %s: %s\n", kernel.Release, fmt.Sprintf(format, args...))
	}
	status, passed := 0, 0
	started := map[int]float64{}
	m := &Machine{
		Kernel: kernel, Memory: o.memory, CPUs: o.cpus, Append: o.kargs, Boot: 3 * time.Minute,
		Output: os.Stdout,
		Event: func(e Event) {
			switch e.Kind {
			case "up":
				say("booted in %.1f s", e.Uptime)
			case "start":
				started[e.Step] = e.Uptime
				if tests {
					say("testing %s (%d of %d)", spec.Steps[e.Step].Name, e.Step+1, len(spec.Steps))
				}
			case "end":
				if status == 0 {
					status = e.Status
				}
				word := "ok"
				if e.Status != 0 {
					word = fmt.Sprintf("status %d", e.Status)
				} else {
					passed++
				}
				if e.Text != "" {
					word += " (" + e.Text + ")"
				}
				say("%s: %s, %.1f s", spec.Steps[e.Step].Name, word, e.Uptime-started[e.Step])
			case "fail":
				say("guest: %s", e.Text)
			}
		},
	}
	if o.console != "" {
		m.Console = o.console + "-" + kernel.Release
	}
	say("booting")
	begin := time.Now()
	if err := m.Run(ctx, spec); err != nil {
		return 0, err
	}
	if tests {
		say("%d of %d packages passed, %.0f s in all", passed, len(spec.Steps), time.Since(begin).Seconds())
	}
	return status, nil
}
