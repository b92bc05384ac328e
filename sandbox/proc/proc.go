// SPDX-License-Identifier: Apache-2.0

// Package proc remembers processes across programs: a pid with the time its process started, so that a
// number that was used again is never taken for the old process.
package proc

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
)

// Ref names one process. The zero Ref is no process.
type Ref struct {
	Pid   int
	Start uint64 // clock ticks after boot, field 22 of /proc/PID/stat
}

// Of makes a reference to a running process.
func Of(pid int) (Ref, error) {
	start, state, err := stat(pid)
	if err != nil {
		return Ref{}, err
	}
	if state == 'Z' || state == 'X' {
		return Ref{}, fmt.Errorf("process %d has ended", pid)
	}
	return Ref{pid, start}, nil
}

// Alive says whether the process still runs; a zombie does not.
func (r Ref) Alive() bool {
	if r.Pid == 0 {
		return false
	}
	start, state, err := stat(r.Pid)
	return err == nil && start == r.Start && state != 'Z' && state != 'X'
}

// Kill sends SIGKILL if the process still runs.
func (r Ref) Kill() {
	if r.Alive() {
		_ = syscall.Kill(r.Pid, syscall.SIGKILL)
	}
}

// Write stores the reference in a file, all of it or nothing.
func (r Ref) Write(file string) error {
	if err := os.WriteFile(file+".new", fmt.Appendf(nil, "%d %d\n", r.Pid, r.Start), 0o644); err != nil {
		return err
	}
	return os.Rename(file+".new", file)
}

// Read loads a reference; a missing or damaged file is no process.
func Read(file string) Ref {
	b, err := os.ReadFile(file)
	if err != nil {
		return Ref{}
	}
	var r Ref
	if n, _ := fmt.Sscanf(string(b), "%d %d", &r.Pid, &r.Start); n != 2 {
		return Ref{}
	}
	return r
}

func stat(pid int) (start uint64, state byte, err error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, 0, err
	}
	// the command's name may hold spaces and parentheses: fields count from the last ')'
	_, rest, ok := cutLast(string(b), ") ")
	f := strings.Fields(rest)
	if !ok || len(f) < 20 {
		return 0, 0, fmt.Errorf("/proc/%d/stat: unexpected format", pid)
	}
	start, err = strconv.ParseUint(f[19], 10, 64)
	return start, f[0][0], err
}

func cutLast(s, sep string) (before, after string, found bool) {
	i := strings.LastIndex(s, sep)
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+len(sep):], true
}
