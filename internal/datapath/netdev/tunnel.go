// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"errors"
	"fmt"
	"net"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The tunnel device by protocol.
const (
	VXLAN        = "vxlan"
	Geneve       = "geneve"
	VXLANDevice  = "lash_vxlan"
	GeneveDevice = "lash_geneve"

	tunnelAlias = aliasPrefix + "tunnel"
)

// TunnelConfig is what the tunnel device is to look like.
type TunnelConfig struct {
	Protocol string // VXLAN or Geneve; empty: there is to be none
	Port     uint16 // UDP
	MTU      int    // bytes, of the device; routes through it name what is left of it
}

// Tunnel is what EnsureTunnel found or made.
type Tunnel struct {
	Name    string // empty: none
	Ifindex int
	Changes []string // as in Base
}

// EnsureTunnel makes the tunnel device as wanted from whatever state it is in, and removes that of another protocol, or
// any if none is wanted. The device takes destination and VNI from each packet's metadata ("external"); one serves all
// peers. The second call changes nothing. A device of that name that is not ours, and a port that somebody else has, are
// errors.
func (h *Host) EnsureTunnel(config TunnelConfig) (Tunnel, error) {
	nl, err := h.open()
	if err != nil {
		return Tunnel{}, fmt.Errorf("netlink: %w", err)
	}
	defer nl.Close()
	var tunnel Tunnel
	changed := func(format string, args ...any) {
		tunnel.Changes = append(tunnel.Changes, fmt.Sprintf(format, args...))
	}

	name := map[string]string{VXLAN: VXLANDevice, Geneve: GeneveDevice}[config.Protocol]
	for _, other := range []string{VXLANDevice, GeneveDevice} {
		if other == name {
			continue
		}
		if link, err := nl.LinkByName(other); err == nil && link.Attrs().Alias == tunnelAlias {
			if err := nl.LinkDel(link); err != nil && !isNotFound(err) {
				return tunnel, fmt.Errorf("delete %s: %w", other, err)
			}
			changed("%s: removed", other)
		}
	}
	if name == "" {
		return tunnel, nil
	}
	link, err := ensureTunnelLink(nl, name, config, changed)
	if err != nil {
		return tunnel, err
	}
	attrs := link.Attrs()
	if attrs.MTU != config.MTU {
		if err := nl.LinkSetMTU(link, config.MTU); err != nil {
			return tunnel, fmt.Errorf("MTU %d of %s: %w", config.MTU, name, err)
		}
		changed("%s: MTU %d, was %d", name, config.MTU, attrs.MTU)
	}
	if attrs.Flags&net.FlagUp == 0 {
		// The port is opened here.
		if err := nl.LinkSetUp(link); err != nil {
			return tunnel, fmt.Errorf("set %s up: %w", name, portTaken(nl, config, err))
		}
		changed("%s: up", name)
	}
	if err := h.do(func() error { return mergeOutside(name, changed) }); err != nil {
		return tunnel, err
	}
	tunnel.Name, tunnel.Ifindex = name, attrs.Index
	return tunnel, nil
}

// ensureTunnelLink returns the device, made anew if what cannot be changed is not as wanted.
func ensureTunnelLink(nl *netlink.Handle, name string, config TunnelConfig, changed func(string, ...any)) (netlink.Link, error) {
	link, err := nl.LinkByName(name)
	if err != nil && !isNotFound(err) {
		return nil, fmt.Errorf("find %s: %w", name, err)
	}
	if err == nil {
		// One without alias is ours: we may have been interrupted between creating and marking it.
		alias := link.Attrs().Alias
		if link.Type() != config.Protocol || alias != "" && alias != tunnelAlias {
			return nil, fmt.Errorf("device %s is not from here (%s, alias %q): rename or remove it", name, link.Type(), alias)
		}
		if port, external := tunnelPort(link); external && port == config.Port {
			return link, markTunnel(nl, link, changed)
		}
		if err := nl.LinkDel(link); err != nil && !isNotFound(err) {
			return nil, fmt.Errorf("delete %s: %w", name, err)
		}
		changed("%s: removed, it had another port or was not external", name)
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = name, config.MTU
	var wanted netlink.Link = &netlink.Vxlan{LinkAttrs: attrs, FlowBased: true, Port: int(config.Port), UDPCSum: true}
	if config.Protocol == Geneve {
		wanted = &netlink.Geneve{LinkAttrs: attrs, FlowBased: true, Dport: config.Port}
	}
	if err := nl.LinkAdd(wanted); err != nil {
		if errors.Is(err, unix.EOPNOTSUPP) {
			err = fmt.Errorf("%w: this kernel has no %s; set tunnel-protocol to another or routing-mode to native", err, config.Protocol)
		}
		return nil, fmt.Errorf("create %s: %w", name, portTaken(nl, config, err))
	}
	changed("%s: created", name)
	if link, err = nl.LinkByName(name); err != nil {
		return nil, fmt.Errorf("find %s: %w", name, err)
	}
	return link, markTunnel(nl, link, changed)
}

func markTunnel(nl *netlink.Handle, link netlink.Link, changed func(string, ...any)) error {
	if link.Attrs().Alias == tunnelAlias {
		return nil
	}
	if err := nl.LinkSetAlias(link, tunnelAlias); err != nil {
		return fmt.Errorf("alias of %s: %w", link.Attrs().Name, err)
	}
	changed("%s: alias set", link.Attrs().Name)
	return nil
}

// tunnelPort is the device's UDP port and whether it takes destinations from packets' metadata.
func tunnelPort(link netlink.Link) (port uint16, external bool) {
	switch l := link.(type) {
	case *netlink.Vxlan:
		return uint16(l.Port), l.FlowBased
	case *netlink.Geneve:
		return l.Dport, l.FlowBased
	}
	return 0, false
}

// mergeOutside switches the tunnel device's own receive offload (GRO) off: packets have been merged with their outer
// headers on, where they came in, and a second attempt only costs.
func mergeOutside(name string, changed func(string, ...any)) error {
	on, err := Ethtool(name, unix.ETHTOOL_GGRO, 0)
	if err == nil && on != 0 {
		_, err = Ethtool(name, unix.ETHTOOL_SGRO, 0)
		changed("%s: GRO off", name)
	}
	if err != nil {
		return fmt.Errorf("GRO of %s: %w", name, err)
	}
	return nil
}

// portTaken explains the errors by which the kernel refuses a port.
func portTaken(nl *netlink.Handle, config TunnelConfig, err error) error {
	if !errors.Is(err, unix.EEXIST) && !errors.Is(err, unix.EADDRINUSE) {
		return err
	}
	by := "somebody else"
	if links, _ := dump(nl.LinkList); links != nil {
		i := slices.IndexFunc(links, func(l netlink.Link) bool {
			port, _ := tunnelPort(l)
			return port == config.Port && l.Attrs().Alias != tunnelAlias
		})
		if i >= 0 {
			by = "device " + links[i].Attrs().Name
		}
	}
	return fmt.Errorf("%w: UDP port %d is taken by %s; remove that, or set tunnel-port to another on all nodes", err, config.Port, by)
}
