// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// NewNetns makes a network namespace that has neither name nor mount: it ends, with the devices in it, when the file and
// the last socket made in it are closed, however the process ends.
func NewNetns() (*os.File, error) {
	type made struct {
		file *os.File
		err  error
	}
	done := make(chan made, 1)
	go func() {
		runtime.LockOSThread()
		own, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			done <- made{err: err}
			return
		}
		defer own.Close()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			runtime.UnlockOSThread()
			done <- made{err: os.NewSyscallError("unshare", err)}
			return
		}
		file, err := os.Open("/proc/thread-self/ns/net")
		// A thread that does not find back stays locked and ends with the goroutine.
		if unix.Setns(int(own.Fd()), unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
		done <- made{file, err}
	}()
	m := <-done
	return m.file, m.err
}

// InNetns runs f on a thread that has entered the namespace. Sockets that f makes stay in it.
func InNetns(ns *os.File, f func() error) error { return inNetns(ns, f) }
