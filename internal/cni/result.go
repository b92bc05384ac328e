// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"encoding/json"
	"net/netip"
)

// Interface is one device of a result. MTU is of version 1.1.0 and left out before.
type Interface struct {
	Name    string `json:"name"`
	MAC     string `json:"mac,omitempty"`
	MTU     int    `json:"mtu,omitempty"`
	Sandbox string `json:"sandbox,omitempty"`
}

// IP is one address of a result. Version ("4", "6") exists before 1.0.0 only.
type IP struct {
	Version   string `json:"version,omitempty"`
	Interface *int   `json:"interface,omitempty"`
	Address   string `json:"address"`
	Gateway   string `json:"gateway,omitempty"`
}

// Route is one route of a result. MTU is of version 1.1.0 and left out before.
type Route struct {
	Dst string `json:"dst"`
	GW  string `json:"gw,omitempty"`
	MTU int    `json:"mtu,omitempty"`
}

type result struct {
	CNIVersion string      `json:"cniVersion"`
	Interfaces []Interface `json:"interfaces"`
	IPs        []IP        `json:"ips"`
	Routes     []Route     `json:"routes"`
	DNS        struct{}    `json:"dns"` // none of ours, but a required key of 0.3.1 and 0.4.0
}

// Attached is what an ADD has made, from which the result of any version is written.
type Attached struct {
	HostIfName, HostMAC  string
	IfName, MAC, Sandbox string
	MTU                  int // of the devices, bytes
	RouteMTU             int // of the default routes, bytes; 0 if they have none
	IPv4, IPv6           netip.Addr
	Router4, Router6     netip.Addr
}

// Render writes the result of an ADD as the version of the specification wants it.
func (a Attached) Render(version string) (json.RawMessage, error) {
	mtu, routeMTU := a.MTU, a.RouteMTU
	if versionBefore(version, "1.1.0") {
		mtu, routeMTU = 0, 0
	}
	res := result{
		CNIVersion: version,
		Interfaces: []Interface{
			{Name: a.HostIfName, MAC: a.HostMAC, MTU: mtu},
			{Name: a.IfName, MAC: a.MAC, MTU: mtu, Sandbox: a.Sandbox},
		},
	}
	for _, f := range []struct{ addr, router netip.Addr }{{a.IPv4, a.Router4}, {a.IPv6, a.Router6}} {
		if !f.addr.IsValid() {
			continue
		}
		inPod := 1
		ip := IP{Interface: &inPod, Address: hostPrefix(f.addr).String(), Gateway: f.router.String()}
		all := netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		number := "6"
		if f.addr.Is4() {
			all = netip.PrefixFrom(netip.IPv4Unspecified(), 0)
			number = "4"
		}
		if versionBefore(version, "1.0.0") {
			ip.Version = number
		}
		res.IPs = append(res.IPs, ip)
		res.Routes = append(res.Routes,
			Route{Dst: hostPrefix(f.router).String()},
			Route{Dst: all.String(), GW: f.router.String(), MTU: routeMTU})
	}
	return json.Marshal(res)
}

func hostPrefix(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }
