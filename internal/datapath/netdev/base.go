// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/lash-net/lash/internal/model"
)

// Names of the pair that stands for the node itself: processes of the node reach pods through HostDevice, which has the
// router addresses.
const (
	HostDevice = "lash_host"
	NetDevice  = "lash_net"

	baseAlias = aliasPrefix + "base"
)

// BaseConfig is what the node's own devices are to look like.
type BaseConfig struct {
	Router4, Router6 netip.Addr // invalid if the family is off
	MTU              int        // bytes
}

// Base is what EnsureBase found or made.
type Base struct {
	HostIfindex, NetIfindex int
	HostMAC, NetMAC         model.MAC
	// Changes says what had to be made or mended, one sentence each; empty if all was as wanted.
	Changes []string
}

// EnsureBase makes the node's pair of devices and its sysctls as wanted from whatever state they are in. The second
// call changes nothing. Only a device of our name that is no veth, or has somebody else's alias, is an error.
func (h *Host) EnsureBase(config BaseConfig) (Base, error) {
	nl, err := h.open()
	if err != nil {
		return Base{}, fmt.Errorf("netlink: %w", err)
	}
	defer nl.Close()

	var base Base
	changed := func(format string, args ...any) { base.Changes = append(base.Changes, fmt.Sprintf(format, args...)) }
	host, peer, err := ensurePair(nl, config.MTU, changed)
	if err != nil {
		return base, err
	}
	// The router addresses come before the links are up: no address of the family is missing when routes are added.
	if err := ensureRouters(nl, host, config, changed); err != nil {
		return base, err
	}
	for _, link := range []netlink.Link{host, peer} {
		if err := ensureLink(nl, link, config.MTU, changed); err != nil {
			return base, err
		}
	}
	base.HostIfindex, base.NetIfindex = host.Attrs().Index, peer.Attrs().Index
	base.HostMAC, base.NetMAC = macOf(host), macOf(peer)
	err = h.do(func() error { return ensureForwarding(config, changed) })
	return base, err
}

// ensurePair returns both devices, made if they are missing or not each other's peers.
func ensurePair(nl *netlink.Handle, mtu int, changed func(string, ...any)) (host, peer netlink.Link, err error) {
	if host, err = ownVeth(nl, HostDevice); err != nil {
		return nil, nil, err
	}
	if peer, err = ownVeth(nl, NetDevice); err != nil {
		return nil, nil, err
	}
	if host != nil && peer != nil && host.Attrs().ParentIndex == peer.Attrs().Index && host.Attrs().NetNsID < 0 {
		return host, peer, nil
	}
	for _, half := range []netlink.Link{host, peer} {
		if half == nil {
			continue
		}
		changed("%s: removed, its peer was not there", half.Attrs().Name)
		if err := nl.LinkDel(half); err != nil && !isNotFound(err) {
			return nil, nil, fmt.Errorf("delete %s: %w", half.Attrs().Name, err)
		}
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = HostDevice, mtu
	hostMAC, netMAC := randomMAC(), randomMAC()
	attrs.HardwareAddr = hostMAC[:]
	err = nl.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: NetDevice, PeerMTU: uint32(mtu), PeerTxQLen: txQueueLen, PeerHardwareAddr: netMAC[:]})
	if err != nil {
		return nil, nil, fmt.Errorf("create %s with %s: %w", HostDevice, NetDevice, err)
	}
	changed("%s with %s: created", HostDevice, NetDevice)
	if host, err = nl.LinkByName(HostDevice); err != nil {
		return nil, nil, fmt.Errorf("find %s: %w", HostDevice, err)
	}
	if peer, err = nl.LinkByName(NetDevice); err != nil {
		return nil, nil, fmt.Errorf("find %s: %w", NetDevice, err)
	}
	return host, peer, nil
}

// ownVeth returns the device of that name, nil if there is none, an error if it is not ours. One without alias is: we
// may have been interrupted between creating and marking it.
func ownVeth(nl *netlink.Handle, name string) (netlink.Link, error) {
	link, err := nl.LinkByName(name)
	if isNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("find %s: %w", name, err)
	}
	alias := link.Attrs().Alias
	if _, veth := link.(*netlink.Veth); !veth || alias != "" && alias != baseAlias {
		return nil, fmt.Errorf("device %s is not from here (%s, alias %q): rename or remove it", name, link.Type(), alias)
	}
	return link, nil
}

func ensureLink(nl *netlink.Handle, link netlink.Link, mtu int, changed func(string, ...any)) error {
	attrs := link.Attrs()
	name := attrs.Name
	if attrs.Alias != baseAlias {
		if err := nl.LinkSetAlias(link, baseAlias); err != nil {
			return fmt.Errorf("alias of %s: %w", name, err)
		}
		changed("%s: alias set", name)
	}
	if attrs.MTU != mtu {
		if err := nl.LinkSetMTU(link, mtu); err != nil {
			return fmt.Errorf("MTU %d of %s: %w", mtu, name, err)
		}
		changed("%s: MTU %d, was %d", name, mtu, attrs.MTU)
	}
	if attrs.RawFlags&unix.IFF_NOARP == 0 {
		if err := nl.LinkSetARPOff(link); err != nil {
			return fmt.Errorf("NOARP of %s: %w", name, err)
		}
		changed("%s: ARP off", name)
	}
	if attrs.Flags&net.FlagUp == 0 {
		if err := nl.LinkSetUp(link); err != nil {
			return fmt.Errorf("set %s up: %w", name, err)
		}
		changed("%s: up", name)
	}
	return nil
}

// ensureRouters gives the device the wanted router addresses and takes away other ones of global scope: routers of an
// earlier pod CIDR.
func ensureRouters(nl *netlink.Handle, host netlink.Link, config BaseConfig, changed func(string, ...any)) error {
	addrs, err := dump(func() ([]netlink.Addr, error) { return nl.AddrList(host, netlink.FAMILY_ALL) })
	if err != nil {
		return fmt.Errorf("addresses of %s: %w", HostDevice, err)
	}
	var wanted []netip.Prefix
	for _, router := range []netip.Addr{config.Router4, config.Router6} {
		if router.IsValid() {
			wanted = append(wanted, netip.PrefixFrom(router, router.BitLen()))
		}
	}
	for _, prefix := range wanted {
		if hasAddr(addrs, prefix) {
			continue
		}
		if err := addRouter(nl, host, prefix); err != nil {
			return err
		}
		changed("%s: address %s added", HostDevice, prefix)
	}
	var problems []error
	for _, addr := range addrs {
		prefix := prefixOf(addr.IPNet)
		if prefix.Addr().IsLinkLocalUnicast() || slices.Contains(wanted, prefix) {
			continue
		}
		if err := nl.AddrDel(host, &addr); err != nil {
			problems = append(problems, fmt.Errorf("remove %s from %s: %w", prefix, HostDevice, err))
			continue
		}
		changed("%s: address %s removed", HostDevice, prefix)
	}
	return errors.Join(problems...)
}

func addRouter(nl *netlink.Handle, host netlink.Link, prefix netip.Prefix) error {
	addr := &netlink.Addr{IPNet: ipNet(prefix)}
	if prefix.Addr().Is6() {
		addr.Flags = unix.IFA_F_NODAD
	}
	err := nl.AddrAdd(host, addr)
	if errors.Is(err, unix.EACCES) {
		return fmt.Errorf("address %s of %s: %w; IPv6 is off on this node: set sysctl net.ipv6.conf.default.disable_ipv6=0, or enable-ipv6 to false",
			prefix, HostDevice, err)
	}
	if err != nil {
		return fmt.Errorf("address %s of %s: %w", prefix, HostDevice, err)
	}
	return nil
}

// ensureForwarding switches forwarding on for the families in use. rp_filter stays as it is: what pods send to the node
// arrives on HostDevice, where the route back to them leads, so that even its strict mode agrees.
func ensureForwarding(config BaseConfig, changed func(string, ...any)) error {
	if config.Router4.IsValid() {
		wrote, err := setSysctl("ipv4/ip_forward", "1")
		if err != nil {
			return err
		}
		if wrote {
			changed("sysctl net.ipv4.ip_forward=1")
		}
	}
	if !config.Router6.IsValid() {
		return nil
	}
	if forwarding, err := getSysctl("ipv6/conf/all/forwarding"); err != nil || forwarding == "1" {
		return err
	}
	// A forwarding node ignores router advertisements unless accept_ra is 2; devices that live on them keep listening.
	devices, err := net.Interfaces()
	if err != nil {
		return fmt.Errorf("list links: %w", err)
	}
	for _, device := range devices {
		name := "ipv6/conf/" + device.Name + "/accept_ra"
		if !foreignDevice(device.Name) {
			continue
		}
		if value, err := getSysctl(name); err != nil || value != "1" {
			continue // off, 2 already, or a device without IPv6
		}
		if err := writeSysctl(name, "2"); err != nil {
			return err
		}
		changed("sysctl net.ipv6.conf.%s.accept_ra=2", device.Name)
	}
	if err := writeSysctl("ipv6/conf/all/forwarding", "1"); err != nil {
		return err
	}
	changed("sysctl net.ipv6.conf.all.forwarding=1")
	return nil
}

func macOf(link netlink.Link) model.MAC {
	var mac model.MAC
	copy(mac[:], link.Attrs().HardwareAddr)
	return mac
}
