// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

const (
	// RouteProtocol marks the routes of the node that are ours.
	RouteProtocol netlink.RouteProtocol = 76
	// ServiceRouteProtocol marks those to services' addresses.
	ServiceRouteProtocol netlink.RouteProtocol = 77
	// aliasPrefix marks our links.
	aliasPrefix = "lash:"
)

// Host is the network namespace of the node.
type Host struct {
	ns    *os.File // nil: the namespace of this process
	inode uint64

	// faults is set by tests only: it makes the named step of a pod's life fail.
	faults func(step string) error
}

// OpenHost is the node whose namespace this process is in.
func OpenHost() (*Host, error) {
	var st unix.Stat_t
	if err := unix.Stat("/proc/thread-self/ns/net", &st); err != nil {
		return nil, fmt.Errorf("network namespace of the node: %w", err)
	}
	return &Host{inode: st.Ino}, nil
}

// OpenHostAt is the node whose namespace the path names. Close releases it.
func OpenHostAt(path string) (*Host, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("network namespace of the node: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		f.Close()
		return nil, fmt.Errorf("network namespace %s: %w", path, err)
	}
	return &Host{ns: f, inode: st.Ino}, nil
}

// Close releases the namespace.
func (h *Host) Close() error {
	if h.ns == nil {
		return nil
	}
	return h.ns.Close()
}

func (h *Host) fault(step string) error {
	if h.faults == nil {
		return nil
	}
	return h.faults(step)
}

// open returns a netlink handle of the node. One an operation: a handle serves one request at a time, and removing a
// device waits for grace periods of the kernel.
func (h *Host) open() (*netlink.Handle, error) {
	if h.ns == nil {
		return netlink.NewHandle(unix.NETLINK_ROUTE)
	}
	return netlink.NewHandleAt(netns.NsHandle(h.ns.Fd()), unix.NETLINK_ROUTE)
}

// do runs f in the namespace of the node; what depends on the thread's namespace is /proc/sys/net and new sockets.
func (h *Host) do(f func() error) error {
	if h.ns == nil {
		return f()
	}
	return inNetns(h.ns, f)
}

// inNetns runs f on a thread that has entered the namespace. If the way back fails, the thread is given up instead of
// being reused in the wrong namespace.
func inNetns(ns *os.File, f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		own, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			done <- err
			return
		}
		defer own.Close()
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			runtime.UnlockOSThread()
			done <- os.NewSyscallError("setns", err)
			return
		}
		err = f()
		if unix.Setns(int(own.Fd()), unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
		done <- err
	}()
	return <-done
}

// dump repeats a netlink dump that the kernel marked as interrupted by a change: it may lack entries.
func dump[T any](list func() ([]T, error)) ([]T, error) {
	const attempts = 20
	var err error
	for range attempts {
		var all []T
		if all, err = list(); err == nil {
			return all, nil
		}
		if !errors.Is(err, netlink.ErrDumpInterrupted) && !errors.Is(err, unix.EINTR) {
			return nil, err
		}
	}
	return nil, fmt.Errorf("%d times: %w", attempts, err)
}

func isNotFound(err error) bool {
	var missing netlink.LinkNotFoundError
	return errors.As(err, &missing) || errors.Is(err, unix.ENODEV)
}
