// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"fmt"
	"net/netip"
	"path"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lash-net/lash/internal/model"
)

// DetectConfig is what the choice of devices depends on besides the kernel.
type DetectConfig struct {
	NodeAddrs []netip.Addr // InternalIPs of this node
	// Devices names devices to use; "eth*" (shell patterns) and "eth+" (prefix) stand for several. Empty: detect.
	Devices []string
	// DirectRouting names the device by which nodes reach each other. Empty: the one with the node's address.
	DirectRouting string
	MTU           int // 0: detect
}

// Detection is the outcome, with the reason of each choice.
type Detection struct {
	Devices []model.Device // ordered by name
	Skipped []Skipped      // ordered by name; patterns that match nothing among them
	// MTU for pods' devices and lash_host, bytes, and in words where it is from: "1500 from eth0 (node address 172.18.0.11)".
	MTU       int
	MTUReason string
}

// Skipped is a device that is not used, or a pattern without a device.
type Skipped struct{ Name, Reason string }

// DirectRouting is the device by which nodes reach each other; false if there is none.
func (d Detection) DirectRouting() (model.Device, bool) {
	for _, device := range d.Devices {
		if device.DirectRouting {
			return device, true
		}
	}
	return model.Device{}, false
}

const defaultMTU = 1500

// ownOrVirtual are the beginnings of names of devices that carry pods' or services' inner traffic, not the node's.
var ownOrVirtual = []struct{ prefix, reason string }{
	{"lash_", "a device of Lash"},
	{"lxc", "the host side of a pod's device"},
	{"cilium_", "a device of Cilium"},
	{"docker", "a bridge of Docker"},
	{"veth", "the host side of a container's device"},
	{"cni", "a bridge of another CNI plugin"},
	{"cali", "the host side of a pod's device of Calico"},
	{"flannel", "a device of flannel"},
	{"kube-", "a device of kube-proxy or kube-router"},
	{"nodelocaldns", "a device of the node-local DNS cache"},
	{"virbr", "a bridge of libvirt"},
}

// foreignDevice tells devices of the node from our own and from lo.
func foreignDevice(name string) bool {
	return name != "lo" && !strings.HasPrefix(name, "lash_") && !strings.HasPrefix(name, "lxc")
}

// Detect chooses the devices that programs are attached to, and the MTU.
func (h *Host) Detect(config DetectConfig) (Detection, error) {
	nl, err := h.open()
	if err != nil {
		return Detection{}, fmt.Errorf("netlink: %w", err)
	}
	defer nl.Close()
	links, err := dump(nl.LinkList)
	if err != nil {
		return Detection{}, fmt.Errorf("list links: %w", err)
	}
	addrs, err := dump(func() ([]netlink.Addr, error) { return nl.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return Detection{}, fmt.Errorf("list addresses: %w", err)
	}
	routes, err := dump(func() ([]netlink.Route, error) { return nl.RouteList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return Detection{}, fmt.Errorf("list routes: %w", err)
	}
	return choose(config, links, addrs, routes)
}

// choose is Detect on what the kernel said.
func choose(config DetectConfig, links []netlink.Link, addrs []netlink.Addr, routes []netlink.Route) (Detection, error) {
	var found Detection
	byDevice := map[int][]netlink.Addr{}
	for _, addr := range addrs {
		byDevice[addr.LinkIndex] = append(byDevice[addr.LinkIndex], addr)
	}
	kinds := map[int]string{}
	for _, link := range links {
		kinds[link.Attrs().Index] = link.Type()
	}
	defaults := defaultRouteDevices(routes)
	matched := map[string]bool{}

	for _, link := range links {
		attrs := link.Attrs()
		node := nodeAddr(config.NodeAddrs, byDevice[attrs.Index])
		pattern := matchDevice(config.Devices, attrs.Name)
		matched[pattern] = true
		reason, selected := judge(attrs, kinds[attrs.MasterIndex], pattern, node, len(config.Devices) > 0, defaults[attrs.Index])
		if attrs.Name == config.DirectRouting && foreignDevice(attrs.Name) && !selected {
			reason, selected = "direct-routing-device", true
		}
		if !selected {
			found.Skipped = append(found.Skipped, Skipped{attrs.Name, reason})
			continue
		}
		found.Devices = append(found.Devices, describe(attrs, byDevice[attrs.Index], config.NodeAddrs, reason))
	}
	for _, pattern := range config.Devices {
		if !matched[pattern] {
			found.Skipped = append(found.Skipped, Skipped{pattern, "no device matches this entry of devices"})
		}
	}
	slices.SortFunc(found.Devices, func(a, b model.Device) int { return strings.Compare(a.Name, b.Name) })
	slices.SortFunc(found.Skipped, func(a, b Skipped) int { return strings.Compare(a.Name, b.Name) })

	if err := markDirectRouting(&found, config, defaults); err != nil {
		return found, err
	}
	found.MTU, found.MTUReason = chooseMTU(config.MTU, found.Devices, config.NodeAddrs, defaults)
	return found, nil
}

// judge says whether a device is used, and why.
func judge(attrs *netlink.LinkAttrs, master, pattern string, node netip.Addr, listed, isDefault bool) (reason string, selected bool) {
	if attrs.Name == "lo" {
		return "the loopback device", false
	}
	for _, known := range ownOrVirtual {
		// Our own are never used; others are if they are named in full.
		if strings.HasPrefix(attrs.Name, known.prefix) && (pattern != attrs.Name || !foreignDevice(attrs.Name)) {
			return known.reason, false
		}
	}
	if pattern != attrs.Name && attrs.MasterIndex != 0 && master != "vrf" {
		return "a port of a " + master, false
	}
	switch {
	case pattern == attrs.Name:
		return "listed in devices", true
	case pattern != "":
		return fmt.Sprintf("matches %s of devices", pattern), true
	case node.IsValid():
		return "node address " + node.String(), true
	case listed:
		return "not listed in devices", false
	case isDefault:
		return "default route", true
	}
	return "neither a node address nor a default route", false
}

// matchDevice returns the first pattern that the name matches, the name itself preferred.
func matchDevice(patterns []string, name string) string {
	if slices.Contains(patterns, name) {
		return name
	}
	for _, pattern := range patterns {
		if prefix, ok := strings.CutSuffix(pattern, "+"); ok && strings.HasPrefix(name, prefix) {
			return pattern
		}
		if ok, _ := path.Match(pattern, name); ok { // a malformed pattern matches nothing and is reported so
			return pattern
		}
	}
	return ""
}

func defaultRouteDevices(routes []netlink.Route) map[int]bool {
	devices := map[int]bool{}
	for _, route := range routes {
		if p := prefixOf(route.Dst); p.IsValid() && p.Bits() != 0 || route.Type != unix.RTN_UNICAST {
			continue
		}
		if route.LinkIndex > 0 {
			devices[route.LinkIndex] = true
		}
		for _, hop := range route.MultiPath {
			devices[hop.LinkIndex] = true
		}
	}
	return devices
}

// nodeAddr returns the first of the node's addresses that the device has.
func nodeAddr(node []netip.Addr, addrs []netlink.Addr) netip.Addr {
	for _, want := range node {
		for _, addr := range addrs {
			if addrOf(addr.IP) == want {
				return want
			}
		}
	}
	return netip.Addr{}
}

func describe(attrs *netlink.LinkAttrs, addrs []netlink.Addr, node []netip.Addr, reason string) model.Device {
	device := model.Device{Ifindex: attrs.Index, Name: attrs.Name, MTU: attrs.MTU, Reason: reason}
	copy(device.MAC[:], attrs.HardwareAddr)
	for _, addr := range addrs {
		device.Addrs = append(device.Addrs, prefixOf(addr.IPNet))
	}
	device.IPv4 = masqueradeAddr(addrs, node, true)
	device.IPv6 = masqueradeAddr(addrs, node, false)
	return device
}

// masqueradeAddr is the address that traffic leaving by the device gets: the node's if the device has it, else the first
// usable one of global scope, lasting ones (permanent, not temporary or deprecated) preferred.
func masqueradeAddr(addrs []netlink.Addr, node []netip.Addr, v4 bool) netip.Addr {
	const unusable = unix.IFA_F_TENTATIVE | unix.IFA_F_DADFAILED
	const passing = unix.IFA_F_DEPRECATED | unix.IFA_F_TEMPORARY
	var lasting, any netip.Addr
	for _, addr := range addrs {
		ip := addrOf(addr.IP)
		if ip.Is4() != v4 || addr.Scope != int(netlink.SCOPE_UNIVERSE) || addr.Flags&unusable != 0 || ip.IsLinkLocalUnicast() {
			continue
		}
		if slices.Contains(node, ip) {
			return ip
		}
		// For IPv4 the bit of TEMPORARY means "secondary": just as little the address to be known by.
		if addr.Flags&passing == 0 && !lasting.IsValid() {
			lasting = ip
		}
		if !any.IsValid() {
			any = ip
		}
	}
	if lasting.IsValid() {
		return lasting
	}
	return any
}

func markDirectRouting(found *Detection, config DetectConfig, defaults map[int]bool) error {
	if config.DirectRouting != "" {
		for i := range found.Devices {
			if found.Devices[i].Name == config.DirectRouting {
				found.Devices[i].DirectRouting = true
				return nil
			}
		}
		return fmt.Errorf("direct-routing-device %q: no such device on this node", config.DirectRouting)
	}
	for _, want := range config.NodeAddrs {
		for i := range found.Devices {
			if hasNodeAddr(found.Devices[i], want) {
				found.Devices[i].DirectRouting = true
				return nil
			}
		}
	}
	// The node's address may be on lo, announced by a routing daemon: the default route leads to the others then.
	for i := range found.Devices {
		if defaults[found.Devices[i].Ifindex] {
			found.Devices[i].DirectRouting = true
			return nil
		}
	}
	return nil
}

func hasNodeAddr(device model.Device, addr netip.Addr) bool {
	return slices.ContainsFunc(device.Addrs, func(p netip.Prefix) bool { return p.Addr() == addr })
}

// chooseMTU takes the smallest MTU of the devices that lead out of the node: a packet of a pod may take any of them.
func chooseMTU(configured int, devices []model.Device, node []netip.Addr, defaults map[int]bool) (int, string) {
	if configured > 0 {
		return configured, fmt.Sprintf("%d from the configuration (mtu)", configured)
	}
	best, why := 0, ""
	for _, device := range devices {
		role := ""
		for _, addr := range node {
			if role == "" && hasNodeAddr(device, addr) {
				role = "node address " + addr.String()
			}
		}
		if role == "" && defaults[device.Ifindex] {
			role = "default route"
		}
		if role != "" && (best == 0 || device.MTU < best) {
			best, why = device.MTU, fmt.Sprintf("%d from %s (%s)", device.MTU, device.Name, role)
		}
	}
	if best == 0 {
		return defaultMTU, fmt.Sprintf("%d by default: no device has a node address or a default route", defaultMTU)
	}
	return best, why
}
