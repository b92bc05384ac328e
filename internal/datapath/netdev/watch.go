// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Change says what kinds of objects of the node changed. It carries no contents: whoever is interested reads the kernel.
type Change struct {
	Links, Addrs, Routes, Neighbors bool
	// ServiceRoutes: of those to services' addresses some are gone. That they come is no news: nobody else makes them.
	ServiceRoutes bool
	// Lost: the kernel had more messages than the socket could hold, so anything may have changed.
	Lost bool
}

func (c Change) any() bool { return c != Change{} }

func (c Change) merge(d Change) Change {
	return Change{
		Links: c.Links || d.Links, Addrs: c.Addrs || d.Addrs, Routes: c.Routes || d.Routes,
		Neighbors: c.Neighbors || d.Neighbors, Lost: c.Lost || d.Lost, ServiceRoutes: c.ServiceRoutes || d.ServiceRoutes,
	}
}

// Changes are held back until nothing has come for quiet, but for latest at most.
const (
	quiet  = 20 * time.Millisecond
	latest = 200 * time.Millisecond
)

// Watcher reports changes of the node's links, addresses, routes and neighbours. Pods' devices are left out: they come
// and go with every pod and are no news to the agent. Of neighbours only hardware addresses that appear, differ or
// vanish are reported, not the ageing of entries.
type Watcher struct {
	socket *os.File
	out    chan Change
	neighs map[neighKey]string
}

type neighKey struct {
	link int
	addr netip.Addr
}

// Watch subscribes; no change after it returns is missed. Run has to be called.
func (h *Host) Watch() (*Watcher, error) {
	w := &Watcher{out: make(chan Change), neighs: map[neighKey]string{}}
	err := h.do(func() error {
		fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
		if err != nil {
			return os.NewSyscallError("socket", err)
		}
		// Room for bursts such as a routing daemon's full table; less is no error, only more losses, which are reported.
		const room = 4 << 20
		if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, room) != nil {
			_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, room)
		}
		var groups uint32
		for _, group := range []uint{
			unix.RTNLGRP_LINK, unix.RTNLGRP_NEIGH, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
			unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE,
		} {
			groups |= 1 << (group - 1)
		}
		if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groups}); err != nil {
			unix.Close(fd)
			return os.NewSyscallError("bind", err)
		}
		w.socket = os.NewFile(uintptr(fd), "netlink")
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("subscribe to changes of links, addresses, routes and neighbours: %w", err)
	}
	return w, nil
}

// Changes delivers; while nobody receives, changes are merged into one.
func (w *Watcher) Changes() <-chan Change { return w.out }

// Run reads until ctx ends and closes the subscription.
func (w *Watcher) Run(ctx context.Context) error {
	defer w.socket.Close()
	in := make(chan Change)
	failed := make(chan error, 1)
	stop := context.AfterFunc(ctx, func() { w.socket.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	go func() { failed <- w.read(ctx, in) }()

	var pending Change
	var oldest time.Time
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	due := false
	for {
		var out chan Change
		if due && pending.any() {
			out = w.out
		}
		select {
		case change := <-in:
			if !pending.any() {
				oldest = time.Now()
			}
			pending = pending.merge(change)
			if !due {
				timer.Reset(min(quiet, max(0, latest-time.Since(oldest))))
			}
		case <-timer.C:
			due = true
		case out <- pending:
			pending, due = Change{}, false
		case err := <-failed:
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
	}
}

func (w *Watcher) read(ctx context.Context, in chan<- Change) error {
	buf := make([]byte, 1<<16)
	for {
		n, err := w.socket.Read(buf)
		var change Change
		switch {
		case errors.Is(err, unix.ENOBUFS):
			change.Lost = true
			clear(w.neighs)
		case err != nil:
			return fmt.Errorf("receive changes of links, addresses, routes and neighbours: %w", err)
		default:
			messages, err := syscall.ParseNetlinkMessage(buf[:n])
			if err != nil {
				change.Lost = true
			}
			for _, m := range messages {
				change = change.merge(w.classify(m))
			}
		}
		if !change.any() {
			continue
		}
		select {
		case in <- change:
		case <-ctx.Done():
			return nil
		}
	}
}

func (w *Watcher) classify(m syscall.NetlinkMessage) Change {
	switch m.Header.Type {
	case unix.RTM_NEWLINK, unix.RTM_DELLINK:
		return Change{Links: w.linkMatters(m)}
	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		return Change{Addrs: true}
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		if len(m.Data) < unix.SizeofRtMsg {
			return Change{Routes: true}
		}
		// The local table follows addresses, which are reported, and pods' devices: each adds its multicast route.
		route := nl.DeserializeRtMsg(m.Data)
		if route.Protocol == uint8(ServiceRouteProtocol) {
			return Change{ServiceRoutes: m.Header.Type == unix.RTM_DELROUTE}
		}
		return Change{Routes: route.Flags&unix.RTM_F_CLONED == 0 && route.Table != unix.RT_TABLE_LOCAL}
	case unix.RTM_NEWNEIGH, unix.RTM_DELNEIGH:
		return Change{Neighbors: w.neighMatters(m)}
	}
	return Change{}
}

func (w *Watcher) linkMatters(m syscall.NetlinkMessage) bool {
	if len(m.Data) < unix.SizeofIfInfomsg {
		return true
	}
	if m.Data[0] == unix.AF_BRIDGE { // a port's state in its bridge
		return false
	}
	attrs, err := nl.ParseRouteAttr(m.Data[unix.SizeofIfInfomsg:])
	if err != nil {
		return true
	}
	for _, attr := range attrs {
		if attr.Attr.Type == unix.IFLA_IFNAME {
			return !isPodName(strings.TrimRight(string(attr.Value), "\x00"))
		}
	}
	return true
}

func (w *Watcher) neighMatters(m syscall.NetlinkMessage) bool {
	neigh, err := netlink.NeighDeserialize(m.Data)
	if err != nil {
		return true
	}
	if neigh.Family != unix.AF_INET && neigh.Family != unix.AF_INET6 {
		return false
	}
	const known = unix.NUD_REACHABLE | unix.NUD_STALE | unix.NUD_DELAY | unix.NUD_PROBE | unix.NUD_PERMANENT
	key := neighKey{neigh.LinkIndex, addrOf(neigh.IP)}
	before, had := w.neighs[key]
	if m.Header.Type == unix.RTM_DELNEIGH || neigh.State&known == 0 {
		delete(w.neighs, key)
		return had
	}
	now := neigh.HardwareAddr.String()
	w.neighs[key] = now
	return before != now
}

// isPodName tells the names this project gives to the host sides of pods' devices.
func isPodName(name string) bool {
	digits, ok := strings.CutPrefix(name, "lxc")
	if !ok || len(digits) != 12 {
		return false
	}
	return strings.Trim(digits, "0123456789abcdef") == ""
}
