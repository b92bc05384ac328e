// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lash-net/lash/internal/model"
)

// Way is the kernel's answer to where a packet goes: `ip route get`.
type Way struct {
	Local   bool         // to this node's own processes
	Route   netip.Prefix // that was met; invalid: the kernel does not say
	Via     netip.Addr   // invalid: directly
	Ifindex int
	Dev     string
	Src     netip.Addr // that a process's packet gets
	MTU     int        // the route's own, else the device's
}

// String is "10.0.2.0/24 via 172.18.0.12 dev eth0".
func (w Way) String() string {
	if w.Local {
		return "local"
	}
	s := "dev " + w.Dev
	if w.Via.IsValid() {
		s = "via " + w.Via.String() + " " + s
	}
	if w.Route.IsValid() {
		to := w.Route.String()
		if w.Route.Bits() == 0 {
			to = "default"
		}
		s = to + " " + s
	}
	return s
}

// FIB asks the routing table of the calling thread's namespace. iif: the device the packet came in by; 0: a process of
// the node sends it. An error is what the stack makes of the packet: no route, or a source that cannot come in there.
func FIB(dst, src netip.Addr, iif int) (Way, error) {
	o := netlink.RouteGetOptions{IifIndex: iif}
	if src.IsValid() {
		o.SrcAddr = src.AsSlice()
	}
	found, err := netlink.RouteGetWithOptions(dst.AsSlice(), &o)
	if err != nil {
		return Way{}, err
	}
	if len(found) == 0 {
		return Way{}, unix.ENETUNREACH
	}
	r := found[0]
	w := Way{Local: r.Type == unix.RTN_LOCAL, Ifindex: r.LinkIndex, MTU: r.MTU, Via: addrOf(r.Gw), Src: addrOf(r.Src)}
	if via, ok := r.Via.(*netlink.Via); ok {
		w.Via = addrOf(via.Addr)
	}
	switch r.Type {
	case unix.RTN_UNREACHABLE:
		return w, unix.EHOSTUNREACH
	case unix.RTN_BLACKHOLE:
		return w, unix.EINVAL
	case unix.RTN_PROHIBIT:
		return w, unix.EACCES
	}
	if dev, err := net.InterfaceByIndex(w.Ifindex); err == nil {
		w.Dev = dev.Name
		if w.MTU == 0 {
			w.MTU = dev.MTU
		}
	}
	o.FIBMatch = true
	if match, err := netlink.RouteGetWithOptions(dst.AsSlice(), &o); err == nil && len(match) > 0 {
		if w.Route = prefixOf(match[0].Dst); !w.Route.IsValid() {
			w.Route = everything(dst) // the kernel leaves out what is nothing
		}
	}
	return w, nil
}

// Neighbour is the MAC address that the kernel knows of an address behind a device. False: it would have to ask.
func Neighbour(ifindex int, a netip.Addr) (mac model.MAC, known bool, err error) {
	family := netlink.FAMILY_V6
	if a.Is4() {
		family = netlink.FAMILY_V4
	}
	all, err := netlink.NeighList(ifindex, family)
	if err != nil {
		return mac, false, fmt.Errorf("neighbours: %w", err)
	}
	for _, n := range all {
		if addrOf(n.IP) == a && len(n.HardwareAddr) == len(mac) && n.State&(netlink.NUD_INCOMPLETE|netlink.NUD_FAILED) == 0 {
			return model.MAC(n.HardwareAddr), true, nil
		}
	}
	return mac, false, nil
}

// FIBError says what the stack does about the packet.
func FIBError(err error) string {
	switch err {
	case unix.ENETUNREACH:
		return "no route"
	case unix.EHOSTUNREACH:
		return "unreachable: the routing table says so, or forwarding is off (net.ipv4.ip_forward)"
	case unix.EXDEV, unix.EINVAL:
		return "source address refused here (rp_filter, martian), or a blackhole route"
	case unix.EACCES:
		return "prohibited by the routing table"
	}
	return fmt.Sprint(err)
}
