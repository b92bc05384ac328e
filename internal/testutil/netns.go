// SPDX-License-Identifier: Apache-2.0

// Package testutil makes what tests of several packages need: network namespaces that nothing can leak.
package testutil

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// NeedRoot skips the test without the privileges that namespaces, devices and BPF take.
func NeedRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: it makes network namespaces")
	}
}

// Netns is a new network namespace. It has no name and no mount: it lives as long as the file is open, so that not even
// a killed test leaves it behind.
func Netns(t testing.TB) *os.File {
	t.Helper()
	NeedRoot(t)
	type made struct {
		file *os.File
		err  error
	}
	done := make(chan made)
	go func() {
		runtime.LockOSThread()
		own, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			done <- made{nil, err}
			return
		}
		defer own.Close()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			done <- made{nil, os.NewSyscallError("unshare", err)}
			return
		}
		f, err := os.Open("/proc/thread-self/ns/net")
		// A thread that does not find back stays locked and ends with the goroutine.
		if back := unix.Setns(int(own.Fd()), unix.CLONE_NEWNET); back == nil {
			runtime.UnlockOSThread()
		}
		done <- made{f, err}
	}()
	m := <-done
	if m.err != nil {
		t.Fatalf("network namespace: %v", m.err)
	}
	t.Cleanup(func() { m.file.Close() })
	return m.file
}

// NetnsPath is a path by which other processes can open the namespace while this one lives.
func NetnsPath(ns *os.File) string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), ns.Fd()) }

// In runs a command in the namespace and returns its output.
func In(t testing.TB, ns *os.File, command ...string) string {
	t.Helper()
	out, err := exec.Command("nsenter", append([]string{"--net=" + NetnsPath(ns)}, command...)...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(command, " "), err, out)
	}
	return string(out)
}

// Inside runs f on a thread that has entered the namespace: sockets that f makes itself, not in another goroutine, are
// in it. f must not end the test.
func Inside(t testing.TB, ns *os.File, f func()) {
	t.Helper()
	done := make(chan error)
	go func() {
		defer close(done) // also if f has ended the test
		runtime.LockOSThread()
		own, err := os.Open("/proc/thread-self/ns/net")
		if err == nil {
			defer own.Close()
			err = os.NewSyscallError("setns", unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET))
		}
		if err != nil {
			done <- err
			return
		}
		defer func() {
			if unix.Setns(int(own.Fd()), unix.CLONE_NEWNET) == nil {
				runtime.UnlockOSThread()
			}
		}()
		f()
	}()
	if err := <-done; err != nil {
		t.Fatalf("network namespace: %v", err)
	}
}
