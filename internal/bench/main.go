// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// ErrGates is the error of a run whose report shows a gate that was not kept.
var ErrGates = errors.New("not every gate was kept")

// Main is the bench as a command: it parses args, runs, prints the report to out
// and its progress to progress. file is where the report is written, too, unless
// the args say otherwise; empty: nowhere. The error is ErrGates if only a gate
// failed, and flag.ErrHelp if only help was asked for.
func Main(ctx context.Context, args []string, file string, out, progress io.Writer) error {
	fs := flag.NewFlagSet("bench", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	usage := func() {
		fs.SetOutput(out)
		fmt.Fprintln(out, "Measures Lash against bare network namespaces in the same run. Needs root; makes its own namespaces and leaves nothing.\n\nFlags:")
		fs.PrintDefaults()
	}
	rounds := fs.Int("rounds", 16, "rounds; a result needs at least ten")
	cell := fs.Duration("cell", 60*time.Millisecond, "measured time of one connection; there are two to four a figure")
	paths := fs.String("paths", "", "comma-separated paths, whose baselines come along; all for every one (default: those of Lash and its limits)")
	kinds := fs.String("kinds", strings.Join(Kinds, ","), "comma-separated kinds of traffic")
	families := fs.String("families", "4,6", "address families")
	fs.StringVar(&file, "json", file, "write the report there as well; empty: do not")
	if err := fs.Parse(args); errors.Is(err, flag.ErrHelp) {
		usage()
		return err
	} else if err != nil {
		return fmt.Errorf("%w (-help lists the flags)", err)
	}
	o := Options{Rounds: *rounds, Cell: *cell, Say: func(format string, args ...any) {
		fmt.Fprintf(progress, "bench: "+format+"\n", args...)
	}}
	switch {
	case fs.NArg() > 0:
		return fmt.Errorf("unexpected argument %q (-help lists the flags)", fs.Arg(0))
	case *rounds < 1:
		return fmt.Errorf("-rounds %d: must be at least 1", *rounds)
	case *cell < 20*time.Millisecond || *cell > time.Minute:
		return fmt.Errorf("-cell %s: must be between 20ms and 1m", *cell)
	}
	var err error
	if o.Paths, err = Select(items(*paths)); err != nil {
		return fmt.Errorf("-paths: %w", err)
	}
	for _, k := range items(*kinds) {
		if !slices.Contains(Kinds, k) {
			return fmt.Errorf("-kinds: no kind %q; there are %s", k, strings.Join(Kinds, ", "))
		}
	}
	o.Kinds = items(*kinds)
	for _, f := range items(*families) {
		switch f {
		case "4":
			o.Families = append(o.Families, 4)
		case "6":
			o.Families = append(o.Families, 6)
		default:
			return fmt.Errorf("-families: no family %q; there are 4 and 6", f)
		}
	}
	if len(o.Kinds) == 0 || len(o.Families) == 0 {
		return errors.New("-kinds and -families must name at least one each")
	}
	if os.Geteuid() != 0 {
		return errors.New("must run as root: it makes network namespaces and loads programs")
	}
	if err := EnterMounts(); err != nil {
		return err
	}
	report, err := Run(ctx, o)
	if err != nil {
		return err
	}
	if err := report.Print(out); err != nil {
		return err
	}
	if file != "" {
		if err := WriteJSON(file, report); err != nil {
			return err
		}
		o.Say("report in %s", file)
	}
	if !report.OK {
		return ErrGates
	}
	return nil
}

// mountsVariable tells the program that it has been executed again by EnterMounts.
const mountsVariable = "LASH_BENCH_MOUNTS"

// EnterMounts executes the program again in a mount namespace of its own, with a
// bpffs that nobody else sees: what is pinned there goes with the process.
func EnterMounts() error {
	if os.Getenv(mountsVariable) != "" {
		return os.Unsetenv(mountsVariable)
	}
	runtime.LockOSThread() // exec takes over this thread's namespaces
	if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("mount namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("bpf", bpfRoot, "bpf", 0, ""); err != nil {
		return fmt.Errorf("mount a bpffs at %s: %w", bpfRoot, err)
	}
	return fmt.Errorf("execute again: %w", unix.Exec("/proc/self/exe", os.Args, append(os.Environ(), mountsVariable+"=1")))
}

func items(s string) []string {
	return strings.FieldsFunc(s, func(r rune) bool { return r == ',' || r == ' ' })
}
