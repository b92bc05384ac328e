// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/lash-net/lash/internal/model"
)

const (
	podAlias    = aliasPrefix + "pod:" // then container id, '/', name in the pod
	maxAlias    = 255                  // IFALIASZ - 1
	txQueueLen  = 1000                 // the kernel's default for Ethernet, which peers do not get by themselves
	loopback    = 1                    // LOOPBACK_IFINDEX: lo is the first device of every namespace
	addrGenNone = 1                    // IN6_ADDR_GEN_MODE_NONE
)

// CreatePod makes the pod's pair of devices, host side here and pod side in netns, both down: no packet can flow yet.
// It returns the endpoint with the interface numbers and hardware addresses. A host side left by an earlier attempt is
// replaced: its name comes from the container's id, so it can be nobody else's.
func (h *Host) CreatePod(_ context.Context, netns *os.File, ep model.Endpoint, network model.PodNetwork) (model.Endpoint, error) {
	if err := h.checkPodNetns(netns); err != nil {
		return ep, err
	}
	nl, err := h.open()
	if err != nil {
		return ep, fmt.Errorf("netlink: %w", err)
	}
	defer nl.Close()

	if err := h.fault("create"); err != nil {
		return ep, err
	}
	ep.MAC, ep.NodeMAC = randomMAC(), randomMAC()
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.HardwareAddr = ep.IfName, network.MTU, ep.NodeMAC[:]
	pair := &netlink.Veth{
		LinkAttrs: attrs, PeerName: ep.ContainerIfName, PeerHardwareAddr: ep.MAC[:],
		PeerMTU: uint32(network.MTU), PeerTxQLen: txQueueLen, PeerNamespace: netlink.NsFd(netns.Fd()),
	}
	err = nl.LinkAdd(pair)
	if errors.Is(err, unix.EEXIST) {
		if err := deletePodLink(nl, ep.IfName); err != nil {
			return ep, err
		}
		err = nl.LinkAdd(pair)
	}
	if errors.Is(err, unix.EEXIST) {
		return ep, fmt.Errorf("create %s: the pod has a device of the name %s already, which is not from here", ep.IfName, ep.ContainerIfName)
	}
	if err != nil {
		return ep, fmt.Errorf("create %s with %s in the pod: %w", ep.IfName, ep.ContainerIfName, err)
	}
	if err := h.markPod(nl, &ep); err != nil {
		return ep, errors.Join(err, deletePodLink(nl, ep.IfName))
	}
	return ep, nil
}

// markPod gives the host side the alias by which it is recognised, and learns the numbers of both sides.
func (h *Host) markPod(nl *netlink.Handle, ep *model.Endpoint) error {
	if err := h.fault("mark"); err != nil {
		return err
	}
	link, err := nl.LinkByName(ep.IfName)
	if err != nil {
		return fmt.Errorf("find %s: %w", ep.IfName, err)
	}
	ep.Ifindex, ep.PeerIfindex = link.Attrs().Index, link.Attrs().ParentIndex
	if err := nl.LinkSetAlias(link, podAliasOf(*ep)); err != nil {
		return fmt.Errorf("alias of %s: %w", ep.IfName, err)
	}
	// The programs answer for the gateway: the host side needs no address, and none that makes the host speak (MLD,
	// router solicitations) on a wire where only the pod listens. Without IPv6 in the kernel there is nothing to set.
	err = nl.LinkSetIP6AddrGenMode(link, addrGenNone)
	if err != nil && !errors.Is(err, unix.EAFNOSUPPORT) && !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("no link-local address on %s: %w", ep.IfName, err)
	}
	return nil
}

// StartPod gives the pod its addresses and routes and takes both devices up. To be called when programs and rows are in
// place. What fails is left to DeletePod.
func (h *Host) StartPod(_ context.Context, netns *os.File, ep model.Endpoint, network model.PodNetwork) error {
	pod, err := openPod(netns, ep)
	if err != nil {
		return err
	}
	defer pod.Close()

	eth0 := linkOf(ep.PeerIfindex, ep.ContainerIfName)
	if err := h.fault("addresses"); err != nil {
		return err
	}
	for _, addr := range ep.Addrs() {
		if err := addPodAddr(netns, pod, eth0, addr); err != nil {
			return err
		}
	}
	if err := h.fault("pod up"); err != nil {
		return err
	}
	if err := pod.LinkSetUp(linkOf(loopback, "lo")); err != nil {
		return fmt.Errorf("set lo up in the pod: %w", err)
	}
	if err := pod.LinkSetUp(eth0); err != nil {
		return fmt.Errorf("set %s up in the pod: %w", ep.ContainerIfName, err)
	}
	if err := h.setHostUp(ep); err != nil {
		return err
	}
	if err := h.fault("routes"); err != nil {
		return err
	}
	for _, route := range podRoutes(ep, network) {
		if err := pod.RouteAdd(&route); err != nil {
			return fmt.Errorf("route %s in the pod: %w", route, err)
		}
	}
	return nil
}

// setHostUp takes the host side up, after the pod's: the one that is up first learns of its carrier by a link event, which
// the kernel delays by up to a second for a device that can send already. So it is the host side, which nobody watches,
// that shows "state DOWN" for a while, and not the pod's.
func (h *Host) setHostUp(ep model.Endpoint) error {
	if err := h.fault("host up"); err != nil {
		return err
	}
	nl, err := h.open()
	if err != nil {
		return fmt.Errorf("netlink: %w", err)
	}
	defer nl.Close()
	if err := nl.LinkSetUp(linkOf(ep.Ifindex, ep.IfName)); err != nil {
		return fmt.Errorf("set %s up: %w", ep.IfName, err)
	}
	return nil
}

// openPod returns a netlink handle of the pod's namespace, having set what has no netlink message on the same visit:
// the pod's addresses are ours alone, so neither router advertisements nor duplicate detection have a say, and
// detection would keep the link-local address unusable for a second.
func openPod(ns *os.File, ep model.Endpoint) (*netlink.Handle, error) {
	var pod *netlink.Handle
	err := inNetns(ns, func() (err error) {
		if pod, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
			return fmt.Errorf("netlink: %w", err)
		}
		conf := "ipv6/conf/" + ep.ContainerIfName + "/"
		for _, name := range []string{"accept_dad", "accept_ra"} {
			if err := writeSysctl(conf+name, "0"); err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
		}
		return nil
	})
	if err != nil {
		if pod != nil {
			pod.Close()
		}
		return nil, fmt.Errorf("pod's namespace: %w", err)
	}
	return pod, nil
}

func addPodAddr(ns *os.File, pod *netlink.Handle, link netlink.Link, addr netip.Addr) error {
	a := &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(addr, addr.BitLen()))}
	if addr.Is6() {
		a.Flags = unix.IFA_F_NODAD
	}
	err := pod.AddrAdd(link, a)
	if addr.Is6() && errors.Is(err, unix.EACCES) { // the runtime or an image switched the family off in the pod
		err = inNetns(ns, func() error {
			return writeSysctl("ipv6/conf/"+link.Attrs().Name+"/disable_ipv6", "0")
		})
		if err == nil {
			err = pod.AddrAdd(link, a)
		}
	}
	if err != nil {
		return fmt.Errorf("address %s in the pod: %w", addr, err)
	}
	return nil
}

// RoutePod replaces the routes of a pod by those of another network of the same routers: their MTU may differ.
func (h *Host) RoutePod(_ context.Context, ns *os.File, ep model.Endpoint, network model.PodNetwork) error {
	if err := h.checkPodNetns(ns); err != nil {
		return err
	}
	pod, err := netlink.NewHandleAt(netns.NsHandle(ns.Fd()), unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("pod's namespace: %w", err)
	}
	defer pod.Close()
	link, err := pod.LinkByName(ep.ContainerIfName)
	if err != nil || link.Attrs().Index != ep.PeerIfindex {
		return fmt.Errorf("the pod's namespace has no device %s of number %d: %w", ep.ContainerIfName, ep.PeerIfindex, err)
	}
	for _, route := range podRoutes(ep, network) {
		if err := pod.RouteReplace(&route); err != nil {
			return fmt.Errorf("route %s in the pod: %w", route, err)
		}
	}
	return nil
}

// podRoutes are the routes of a pod: the router directly, everything else by it. The MTU goes to the default route only.
func podRoutes(ep model.Endpoint, network model.PodNetwork) []netlink.Route {
	var routes []netlink.Route
	for _, addr := range ep.Addrs() {
		router := network.Router(addr)
		if !router.IsValid() {
			continue
		}
		direct := netlink.Route{LinkIndex: ep.PeerIfindex, Dst: ipNet(netip.PrefixFrom(router, router.BitLen())), Scope: netlink.SCOPE_LINK}
		all := netlink.Route{LinkIndex: ep.PeerIfindex, Dst: ipNet(everything(addr)), Gw: router.AsSlice(), MTU: network.RouteMTU}
		if addr.Is6() {
			direct.Scope = netlink.SCOPE_UNIVERSE // the only one of IPv6
		}
		routes = append(routes, direct, all)
	}
	return routes
}

// DeletePod removes the pod's devices: the host side takes the pod's side with it. Devices already gone are no error.
func (h *Host) DeletePod(_ context.Context, ifname string) error {
	nl, err := h.open()
	if err != nil {
		return fmt.Errorf("netlink: %w", err)
	}
	defer nl.Close()
	return deletePodLink(nl, ifname)
}

func deletePodLink(nl *netlink.Handle, ifname string) error {
	link, err := nl.LinkByName(ifname)
	if isNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("find %s: %w", ifname, err)
	}
	// No alias: we were interrupted between creating and marking it.
	alias := link.Attrs().Alias
	if _, veth := link.(*netlink.Veth); !veth || alias != "" && !strings.HasPrefix(alias, podAlias) {
		return fmt.Errorf("delete %s: not from here (%s, alias %q)", ifname, link.Type(), alias)
	}
	if err := nl.LinkDel(link); err != nil && !isNotFound(err) {
		return fmt.Errorf("delete %s: %w", ifname, err)
	}
	return nil
}

// PodLinks lists the host sides of all pods' devices that carry our alias: interface numbers by name.
func (h *Host) PodLinks(_ context.Context) (map[string]int, error) {
	nl, err := h.open()
	if err != nil {
		return nil, fmt.Errorf("netlink: %w", err)
	}
	defer nl.Close()
	links, err := dump(nl.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	pods := map[string]int{}
	for _, link := range links {
		if attrs := link.Attrs(); strings.HasPrefix(attrs.Alias, podAlias) {
			pods[attrs.Name] = attrs.Index
		}
	}
	return pods, nil
}

// CheckPod compares what the kernel has with what StartPod made. Every difference is in the error. Without netns it
// looks at the host side only.
func (h *Host) CheckPod(_ context.Context, netns *os.File, ep model.Endpoint, network model.PodNetwork) error {
	nl, err := h.open()
	if err != nil {
		return fmt.Errorf("netlink: %w", err)
	}
	defer nl.Close()
	link, err := nl.LinkByName(ep.IfName)
	if err != nil {
		return fmt.Errorf("device %s on the node: %w", ep.IfName, err)
	}
	host := checkLink("on the node", link.Attrs(), ep.Ifindex, ep.NodeMAC, network.MTU)
	if netns == nil {
		return host
	}
	if err := h.checkPodNetns(netns); err != nil {
		return errors.Join(host, err)
	}
	return errors.Join(host, checkInPod(netns, ep, network))
}

func checkLink(where string, attrs *netlink.LinkAttrs, index int, mac model.MAC, mtu int) error {
	var problems []error
	add := func(format string, args ...any) {
		problems = append(problems, fmt.Errorf("device %s %s: "+format, append([]any{attrs.Name, where}, args...)...))
	}
	if attrs.Index != index {
		add("interface number is %d, was %d: another device", attrs.Index, index)
	}
	if attrs.Flags&net.FlagUp == 0 {
		add("down")
	}
	if attrs.HardwareAddr.String() != mac.String() {
		add("hardware address is %s, was %s", attrs.HardwareAddr, mac)
	}
	if attrs.MTU != mtu {
		add("MTU is %d, was %d", attrs.MTU, mtu)
	}
	return errors.Join(problems...)
}

func checkInPod(ns *os.File, ep model.Endpoint, network model.PodNetwork) error {
	pod, err := netlink.NewHandleAt(netns.NsHandle(ns.Fd()), unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("pod's namespace: %w", err)
	}
	defer pod.Close()
	link, err := pod.LinkByName(ep.ContainerIfName)
	if err != nil {
		return fmt.Errorf("device %s in the pod: %w", ep.ContainerIfName, err)
	}
	problems := []error{checkLink("in the pod", link.Attrs(), ep.PeerIfindex, ep.MAC, network.MTU)}

	addrs, err := dump(func() ([]netlink.Addr, error) { return pod.AddrList(link, netlink.FAMILY_ALL) })
	if err != nil {
		return fmt.Errorf("addresses of the pod: %w", err)
	}
	for _, want := range ep.Addrs() {
		prefix := netip.PrefixFrom(want, want.BitLen())
		if !hasAddr(addrs, prefix) {
			problems = append(problems, fmt.Errorf("device %s in the pod: address %s is missing", ep.ContainerIfName, prefix))
		}
	}
	routes, err := dump(func() ([]netlink.Route, error) { return pod.RouteList(link, netlink.FAMILY_ALL) })
	if err != nil {
		return fmt.Errorf("routes of the pod: %w", err)
	}
	for _, want := range podRoutes(ep, network) {
		if !hasRoute(routes, want) {
			problems = append(problems, fmt.Errorf("routes of the pod: %s is missing", routeText(want, ep.ContainerIfName)))
		}
	}
	return errors.Join(problems...)
}

func hasAddr(addrs []netlink.Addr, want netip.Prefix) bool {
	for _, a := range addrs {
		if prefixOf(a.IPNet) == want {
			return true
		}
	}
	return false
}

func hasRoute(routes []netlink.Route, want netlink.Route) bool {
	for _, r := range routes {
		if prefixOf(r.Dst) == prefixOf(want.Dst) && r.Gw.Equal(want.Gw) && r.MTU == want.MTU && r.Scope == want.Scope {
			return true
		}
	}
	return false
}

func routeText(r netlink.Route, dev string) string {
	dst, via := prefixOf(r.Dst), ""
	name := dst.String()
	if dst.Bits() == 0 {
		name = "default"
	} else if dst.IsSingleIP() {
		name = dst.Addr().String()
	}
	if r.Gw != nil {
		via = " via " + r.Gw.String()
	}
	return name + via + " dev " + dev
}

// checkPodNetns refuses what is no network namespace, and the node's own: a pod of the host network has no endpoint.
func (h *Host) checkPodNetns(ns *os.File) error {
	kind, err := unix.IoctlRetInt(int(ns.Fd()), unix.NS_GET_NSTYPE)
	if err != nil || kind != unix.CLONE_NEWNET {
		return errors.New("CNI_NETNS is not a network namespace")
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(ns.Fd()), &st); err != nil {
		return fmt.Errorf("CNI_NETNS: %w", err)
	}
	if st.Ino == h.inode {
		return errors.New("CNI_NETNS is the network namespace of the node, which is not to get a pod's device")
	}
	return nil
}

func podAliasOf(ep model.Endpoint) string {
	alias := podAlias + ep.ContainerID + "/" + ep.ContainerIfName
	return alias[:min(len(alias), maxAlias)]
}

// randomMAC is a locally administered unicast address.
func randomMAC() model.MAC {
	var mac model.MAC
	rand.Read(mac[:]) // never fails
	mac[0] = mac[0]&^1 | 2
	return mac
}

// linkOf stands for a link whose number is known.
func linkOf(index int, name string) netlink.Link {
	return &netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: index, Name: name}}
}

func everything(family netip.Addr) netip.Prefix {
	if family.Is4() {
		return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	}
	return netip.PrefixFrom(netip.IPv6Unspecified(), 0)
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// prefixOf is the reverse of ipNet; invalid for nil.
func prefixOf(n *net.IPNet) netip.Prefix {
	if n == nil {
		return netip.Prefix{}
	}
	addr, _ := netip.AddrFromSlice(n.IP)
	bits, _ := n.Mask.Size()
	if addr.Is4In6() && len(n.Mask) == net.IPv4len {
		addr = addr.Unmap()
	}
	return netip.PrefixFrom(addr, bits)
}

func addrOf(ip net.IP) netip.Addr {
	addr, _ := netip.AddrFromSlice(ip)
	return addr.Unmap()
}
