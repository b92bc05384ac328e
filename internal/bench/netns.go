// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Netns is a network namespace without a name: it lives while a process is in
// it or has it open, so nothing is left behind however this one ends.
type Netns struct {
	Name string // for messages
	file *os.File
	nl   *netlink.Handle
}

// NewNetns makes a namespace with lo up.
func NewNetns(name string) (*Netns, error) {
	made := make(chan error, 1)
	n := &Netns{Name: name}
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			n.file, err = os.Open("/proc/thread-self/ns/net")
		}
		made <- err
	}()
	if err := <-made; err != nil {
		return nil, fmt.Errorf("network namespace %s: %w", name, err)
	}
	nl, err := netlink.NewHandleAt(netns.NsHandle(n.file.Fd()), unix.NETLINK_ROUTE)
	if err != nil {
		n.file.Close()
		return nil, fmt.Errorf("netlink in %s: %w", name, err)
	}
	n.nl = nl
	if err := n.SetUp("lo"); err != nil {
		n.Close()
		return nil, err
	}
	return n, nil
}

// Close gives the namespace up.
func (n *Netns) Close() {
	n.nl.Close()
	n.file.Close()
}

// Path is a name under which this process can open the namespace.
func (n *Netns) Path() string { return fmt.Sprintf("/proc/self/fd/%d", n.file.Fd()) }

// Do runs f on the calling thread within the namespace. Processes that f starts
// belong to that thread, which comes back and goes on.
func (n *Netns) Do(f func() error) (err error) {
	runtime.LockOSThread()
	home, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer home.Close()
	if err := unix.Setns(int(n.file.Fd()), unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("enter %s: %w", n.Name, err)
	}
	defer func() {
		if back := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); back != nil {
			err = errors.Join(err, fmt.Errorf("leave %s: %w", n.Name, back)) // and the thread stays locked
			return
		}
		runtime.UnlockOSThread()
	}()
	return f()
}

// Sysctl writes a value below /proc/sys/net of the namespace.
func (n *Netns) Sysctl(name, value string) error {
	return n.Do(func() error {
		if err := os.WriteFile("/proc/sys/net/"+name, []byte(value), 0o644); err != nil {
			return fmt.Errorf("in %s: %w", n.Name, err)
		}
		return nil
	})
}

// Link finds a device of the namespace.
func (n *Netns) Link(name string) (netlink.Link, error) {
	l, err := n.nl.LinkByName(name)
	if err != nil {
		return nil, fmt.Errorf("device %s in %s: %w", name, n.Name, err)
	}
	return l, nil
}

// SetUp sets a device up.
func (n *Netns) SetUp(name string) error {
	l, err := n.Link(name)
	if err == nil {
		err = n.nl.LinkSetUp(l)
	}
	if err != nil {
		return fmt.Errorf("set %s up in %s: %w", name, n.Name, err)
	}
	return nil
}

// Veth connects two namespaces by a pair of devices, both up.
func Veth(a *Netns, aName string, b *Netns, bName string) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = aName
	pair := &netlink.Veth{LinkAttrs: attrs, PeerName: bName, PeerNamespace: netlink.NsFd(b.file.Fd())}
	if err := a.nl.LinkAdd(pair); err != nil {
		return fmt.Errorf("connect %s in %s with %s in %s: %w", aName, a.Name, bName, b.Name, err)
	}
	return errors.Join(a.SetUp(aName), b.SetUp(bName))
}

// AddAddr gives a device an address, usable at once.
func (n *Netns) AddAddr(dev string, addr netip.Prefix) error {
	l, err := n.Link(dev)
	if err != nil {
		return err
	}
	a := &netlink.Addr{IPNet: ipNet(addr)}
	if addr.Addr().Is6() {
		a.Flags = unix.IFA_F_NODAD
	}
	if err := n.nl.AddrAdd(l, a); err != nil {
		return fmt.Errorf("address %s on %s in %s: %w", addr, dev, n.Name, err)
	}
	return nil
}

// AddRoute routes dst by via, or directly if via is invalid.
func (n *Netns) AddRoute(dst netip.Prefix, via netip.Addr, dev string) error {
	l, err := n.Link(dev)
	if err != nil {
		return err
	}
	r := &netlink.Route{LinkIndex: l.Attrs().Index, Dst: ipNet(dst)}
	if via.IsValid() {
		r.Gw = via.AsSlice()
		r.Flags = int(netlink.FLAG_ONLINK)
	} else if dst.Addr().Is4() {
		r.Scope = netlink.SCOPE_LINK
	}
	if err := n.nl.RouteAdd(r); err != nil {
		return fmt.Errorf("route %s in %s: %w", dst, n.Name, err)
	}
	return nil
}

// AddNeigh makes a neighbour permanent.
func (n *Netns) AddNeigh(addr netip.Addr, dev string, mac net.HardwareAddr) error {
	l, err := n.Link(dev)
	if err != nil {
		return err
	}
	err = n.nl.NeighSet(&netlink.Neigh{LinkIndex: l.Attrs().Index, State: netlink.NUD_PERMANENT, IP: addr.AsSlice(), HardwareAddr: mac})
	if err != nil {
		return fmt.Errorf("neighbour %s in %s: %w", addr, n.Name, err)
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
